"""A run's folder and what its commands share: one config a folder, one line for what the user can
mend.
"""

import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

import jaxdistill
from jaxdistill.errors import UserError
from jaxdistill.run import checkpoint, distributed, loop

ITERATIONS = "student.iterations"
"""The key of a config that a finished run may go on with."""


def prepare_workdir(workdir: Path, config: ConfigDict, *, longer: bool | None = None) -> None:
    """Make the folder, check that it can be written, and that it belongs to this config, of which
    the exports may change. Raises UserError.

    `longer`: whether config.student.iterations may grow, too, as of a run of one stage; None where
    nobody asks.

    Several processes may see one folder, or each its own under the same name.
    """
    failure = ""
    if distributed.is_main():
        failure = check_workdir(workdir, config, longer=longer)
    failure = (
        distributed.broadcast(failure.encode()).decode() if jax.process_count() > 1 else failure
    )
    if not failure and not distributed.share_folder(workdir) and not distributed.is_main():
        failure = check_workdir(workdir, config, longer=longer)
    if failure:
        raise UserError(failure)


def check_workdir(workdir: Path, config: ConfigDict, *, longer: bool | None = None) -> str:
    """What `prepare_workdir` does, in one process; what is wrong, or nothing."""
    if re.match(r"\w+:/", str(workdir)):
        return (
            f"--workdir={workdir} must be a folder of this machine; checkpoints may go to a bucket:"
            " --config.log.checkpoints=gs://..."
        )
    if workdir.exists() and not workdir.is_dir():
        return f"--workdir={workdir} is not a folder; choose another one"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".write-test-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        return f"--workdir={workdir} cannot be written ({error.strerror}); choose another folder"
    path, wanted = workdir / "config.json", json.loads(config.to_json())
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except ValueError:
            return f"{path} is damaged; choose another workdir"
        if failure := difference(flatten(found), flatten(wanted), longer=longer):
            return f"--workdir={workdir} {failure}"
        if found == wanted:
            return ""
    checkpoint.write_json(path, wanted)
    return ""


def difference(there: Mapping[str, Any], here: Mapping[str, Any], *, longer: bool | None) -> str:
    """Why the run of one flat config cannot go on with another, "" where it can."""
    changed = [k for k in sorted(there.keys() | here.keys()) if there.get(k) != here.get(k)]
    changed = [k for k in changed if not k.startswith("export.")]  # made anew at each start
    if longer is not None and changed == [ITERATIONS] and 0 < there[ITERATIONS] < here[ITERATIONS]:
        if longer:
            return ""
        return (
            f"holds a run of {there[ITERATIONS]} {ITERATIONS}, which its method divides among"
            f" stages: it cannot go on to {here[ITERATIONS]}; choose another workdir"
        )
    if not changed:
        return ""
    text = "; ".join(f"{k} = {there.get(k)} there, {here.get(k)} here" for k in changed[:5])
    return (
        f"holds a run of another config ({text}); choose another workdir, or use that run's flags"
    )


def say(line: str) -> None:
    """Print beside a progress bar. Of many processes one does."""
    if not distributed.is_main():
        return
    if sys.stderr.isatty():
        loop.tqdm.write(line, file=sys.stdout)
    else:
        print(line)
    sys.stdout.flush()


def versions(*, machine: bool = True) -> dict[str, str]:
    """Of what the numbers depend on, and the machine."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scikit-learn")
    found = {name: importlib.metadata.version(name) for name in packages}
    about = {"jaxdistill": jaxdistill.__version__, "python": platform.python_version(), **found}
    if machine:
        about["machine"] = (
            f"{os.cpu_count()} CPU cores ({platform.machine()}), {jax.device_count()}"
            f" {jax.default_backend()} device(s)"
        )
    return about


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat
