"""A small training as one of several processes: `python tests/pod_job.py WORKDIR COORDINATOR
PROCESSES PROCESS`, or WORKDIR alone.

POD_STEPS: how many steps. POD_CHECKPOINTS: a folder for the checkpoints in place of the workdir's.
"""

import os
import sys
from pathlib import Path

import jax
import numpy as np
import optax
from small import SHAPE, flash, make, train

from jaxdistill import partition
from jaxdistill.run import distributed, loop
from jaxdistill.run.workdir import say
from jaxdistill.tasks.labelled_images import data

STEPS, BATCH = int(os.environ.get("POD_STEPS", 120)), 32


def main(workdir: str, coordinator: str = "", processes: str = "1", process: str = "0") -> None:
    if coordinator:
        distributed.start(coordinator, int(processes), int(process), timeout=60)
    model, teacher = make(64, 2)
    layout = partition.layout({"data": -1, "fsdp": 2, "smallest": 64})
    loss_fn = flash(model, constrain=partition.constrain_batch(layout.mesh))

    def loss(params, teacher, batch, key):
        return loss_fn(layout.gathered(params), layout.gathered(teacher), batch, key)

    images = np.random.default_rng(0).uniform(size=(100, *SHAPE)).astype(np.float32)
    split = data.Split(images, np.arange(100, dtype=np.int32) % 10)  # a wrong row is another label
    folder = Path(workdir)
    folder.mkdir(exist_ok=True)
    distributed.share_folder(folder)
    with distributed.device_errors_are_one_line(), loop.StopSignal().installed() as stop:
        try:
            state = train(
                teacher,
                loss,
                optax.adam(1e-4),
                data.Batches(
                    split, BATCH, 0, partition.process_rows(layout.mesh, BATCH)
                ).__getitem__,
                steps=STEPS,
                place=loop.Place(
                    folder,
                    stop,
                    layout,
                    every=5,
                    checkpoint_every=25,
                    checkpoints=os.environ.get("POD_CHECKPOINTS", ""),
                ),
            )
        except loop.Stopped as stopped:
            say(str(stopped))
            return
    made: list[int] = []

    def draw(i: int) -> np.ndarray:
        made.append(i)
        return np.asarray(jax.random.normal(jax.random.fold_in(jax.random.key(1), i), (3, 2)))

    np.savez(
        folder / f"drawn-{process}.npz", drawn=np.stack(distributed.divided(5, draw)), made=made
    )
    if distributed.writes():
        np.savez(folder / "student.npz", *jax.tree.leaves(state.ema_params))


if __name__ == "__main__":
    main(*sys.argv[1:])
