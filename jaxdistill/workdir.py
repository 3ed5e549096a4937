"""A run's folder and what its commands share: one config a folder, one line for what the user can mend."""

import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

import jax
from ml_collections import ConfigDict

import jaxdistill
from jaxdistill import checkpoint, loop
from jaxdistill.experiment import flatten


class UserError(Exception):
    """What the user can mend, in one line."""


def prepare_workdir(workdir: Path, config: ConfigDict) -> None:
    """Make the folder, check that it can be written, and that it belongs to this config. Raises UserError."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".write-test-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written ({error.strerror}); choose another folder") from None
    path, wanted = workdir / "config.json", json.loads(config.to_json())
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except ValueError:
            raise UserError(f"{path} is damaged; choose another workdir") from None
        differences = [
            f"{k} = {flat_found.get(k)} there, {flat_wanted.get(k)} here"
            for flat_found, flat_wanted in [(flatten(found), flatten(wanted))]
            for k in sorted(flat_found.keys() | flat_wanted.keys())
            if flat_found.get(k) != flat_wanted.get(k)
        ]
        if differences:
            raise UserError(
                f"--workdir={workdir} holds a run of another config ({'; '.join(differences[:5])}); "
                "choose another workdir or repeat that run's flags"
            )
    checkpoint.write_json(path, wanted)


def say(line: str) -> None:
    """Print beside a progress bar."""
    if sys.stderr.isatty():
        loop.tqdm.write(line, file=sys.stdout)
    else:
        print(line)
    sys.stdout.flush()


def versions() -> dict[str, str]:
    """Of what the numbers depend on, and the machine."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scikit-learn")
    found = {name: importlib.metadata.version(name) for name in packages}
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), {jax.device_count()} {jax.default_backend()} device(s)"
    return {"jaxdistill": jaxdistill.__version__, "python": platform.python_version(), **found, "machine": machine}
