"""A run's folder and what its commands share: one config a folder, one line for what the user can
mend.
"""

import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from ml_collections import ConfigDict

import jaxdistill
from jaxdistill import partition
from jaxdistill.prediction import LossFn
from jaxdistill.run import checkpoint, distributed, loop
from jaxdistill.tasks.labelled_images.experiment import flatten
from jaxdistill.train import TrainState, everything, init_state, train_step


class UserError(Exception):
    """What the user can mend, in one line."""


def missing_extra(error: ModuleNotFoundError) -> str:
    """What to install for text to image, in one line."""
    return (
        f"{error.name} is not installed; text to image needs: pip install"
        ' "jaxdistill[text-to-image]" (".[text-to-image]" in a checkout)'
    )


def prepare_workdir(workdir: Path, config: ConfigDict) -> None:
    """Make the folder, check that it can be written, and that it belongs to this config. Raises
    UserError.

    Several processes may see one folder, or each its own under the same name.
    """
    failure = ""
    if distributed.is_main():
        failure = check_workdir(workdir, config)
    failure = (
        distributed.broadcast(failure.encode()).decode() if jax.process_count() > 1 else failure
    )
    if not failure and not distributed.share_folder(workdir) and not distributed.is_main():
        failure = check_workdir(workdir, config)
    if failure:
        raise UserError(failure)


def check_workdir(workdir: Path, config: ConfigDict) -> str:
    """What `prepare_workdir` does, in one process; what is wrong, or nothing."""
    if re.match(r"\w+:/", str(workdir)):
        return (
            f"--workdir={workdir} must be a folder of this machine; checkpoints may go to a bucket:"
            " --config.log.checkpoints=gs://..."
        )
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
        differences = [
            f"{k} = {flat_found.get(k)} there, {flat_wanted.get(k)} here"
            for flat_found, flat_wanted in [(flatten(found), flatten(wanted))]
            for k in sorted(flat_found.keys() | flat_wanted.keys())
            if flat_found.get(k) != flat_wanted.get(k)
        ]
        if differences:
            return (
                f"--workdir={workdir} holds a run of another config ({'; '.join(differences[:5])});"
                " choose another workdir or repeat that run's flags"
            )
    else:
        checkpoint.write_json(path, wanted)
    return ""


class Programs(NamedTuple):
    """What a phase compiles, and the shapes of its arguments with their places.

    start: (params, key=) -> state, each array made where it lives. step: (state, batch,
    teacher_params) -> (state, metrics).
    """

    start: Callable[..., TrainState]
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    state: TrainState
    teacher: Any


def programs(
    layout: partition.Layout,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    params: Any,
    teacher_params: Any,
    *,
    ema_decay: float,
    ema_of: Callable[[Any], Any] = everything,
    accumulate: int = 1,
) -> Programs:
    """The jitted programs of a phase on a mesh, from parameters or their shapes: what a run trains
    with and `jaxdistill.aot` plans.
    """
    init = partial(init_state, tx=tx, ema_of=ema_of)
    state = layout.describe(jax.eval_shape(init, params, key=jax.random.key(0)))
    teacher = None if teacher_params is None else layout.describe(teacher_params)
    state_places, teacher_places = (
        jax.tree.map(lambda a: a.sharding, tree) for tree in (state, teacher)
    )
    step = partial(
        train_step,
        loss_fn=loss_fn,
        tx=tx,
        ema_decay=ema_decay,
        ema_of=ema_of,
        accumulate=accumulate,
    )
    jitted = partition.jit_train_step(step, layout.mesh, state_places, teacher_places)
    return Programs(jax.jit(init, out_shardings=state_places), jitted, state, teacher)


def train_phase(
    name: str,
    params: Callable[[], Any],
    shapes: Any,
    key: jax.Array,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    batches: Callable[[int], Any],
    teacher_params: Any,
    health: loop.HealthFn,
    *,
    layout: partition.Layout,
    ema_decay: float,
    steps: int,
    health_every: int,
    log: ConfigDict,
    workdir: Path,
    stop: loop.StopSignal,
    advice: str,
    ema_of: Callable[[Any], Any] = everything,
    accumulate: int = 1,
    own: partition.Layout | None = None,
    **options: Any,
) -> tuple[TrainState, loop.Seconds]:
    """`loop.train_loop` of a loss on a mesh, from `params()` or the newest checkpoint: the last
    state and the seconds spent in all.

    `shapes` are those of the parameters (or any arrays like them); `params` is not called where
    there is a checkpoint. `log` gives "every" and "checkpoint_every"; batches: i -> this process's
    rows of batch i on the host; `options` go to the loop. The averages, of the health lines too,
    are arrays of this process alone: on its first device, or on the devices of `own`.
    """
    made = programs(
        layout,
        loss_fn,
        tx,
        shapes,
        teacher_params,
        ema_decay=ema_decay,
        ema_of=ema_of,
        accumulate=accumulate,
    )
    local = partial(partition.local, mesh=own.mesh if own else None)
    state, seconds = loop.train_loop(
        name,
        lambda: made.start(layout.place(params()), key=key),
        made.step,
        lambda i: partition.put_batch(batches(i), layout.mesh),
        None if teacher_params is None else layout.place(teacher_params),
        like=made.state,
        steps=steps,
        workdir=workdir,
        log_every=log.every,
        health_every=health_every,
        checkpoint_every=log.checkpoint_every,
        health=lambda ema, at: health(local(ema), at),
        stop=stop,
        advice=advice,
        **options,
    )
    return state._replace(ema_params=local(state.ema_params)), seconds


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
