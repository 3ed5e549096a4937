"""A run's folder and what its commands share: one config a folder, one line for what the user can mend."""

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

import jaxdistill
from jaxdistill import checkpoint, loop, partition
from jaxdistill.experiment import flatten
from jaxdistill.prediction import LossFn
from jaxdistill.train import TrainState, everything, train_step


class UserError(Exception):
    """What the user can mend, in one line."""


def missing_extra(error: ModuleNotFoundError) -> str:
    """What to install for text to image, in one line."""
    return f'{error.name} is not installed; text to image needs: pip install "jaxdistill[text-to-image]" (".[text-to-image]" in a checkout)'


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


def train_phase(
    name: str,
    state: TrainState,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    batches: Callable[[int], Any],
    teacher_params: Any,
    health: loop.HealthFn,
    *,
    mesh: Mesh,
    ema_decay: float,
    steps: int,
    health_every: int,
    log: ConfigDict,
    workdir: Path,
    stop: loop.StopSignal,
    advice: str,
    ema_of: Callable[[Any], Any] = everything,
) -> tuple[TrainState, float]:
    """`loop.train_loop` of a loss on the mesh, state and teacher replicated: the last state and the seconds spent in all.

    `log` gives "every" and "checkpoint_every"; batches: i -> host batch i.
    """
    whole = partition.replicated(mesh)
    return loop.train_loop(
        name,
        jax.device_put(state, whole),
        partition.jit_train_step(partial(train_step, loss_fn=loss_fn, tx=tx, ema_decay=ema_decay, ema_of=ema_of), mesh),
        lambda i: partition.put_batch(batches(i), mesh),
        jax.device_put(teacher_params, whole),
        steps=steps,
        workdir=workdir,
        log_every=log.every,
        health_every=health_every,
        checkpoint_every=log.checkpoint_every,
        health=health,
        stop=stop,
        advice=advice,
    )


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
