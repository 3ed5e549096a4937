"""A plain fine-tuning step of FLUX.1-dev for a v5p-8, by the TPU's compiler.

    python tests/benchmarks/plain_step.py --out=docs/results/plain_step.json

All weights, 8 images of 1024x1024, AdamW in float32, no average, our network and our mesh. It is
no method of ours: MaxDiffusion has published what such a step takes on that slice, measured, so it
tells how far a real step is from the compiler's bound. Takes one core some ten minutes.
"""

import argparse
import json
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import jax  # noqa: E402
import optax  # noqa: E402

from configs import flux  # noqa: E402
from jaxdistill import partition  # noqa: E402
from jaxdistill.costs.flops import flops_of  # noqa: E402
from jaxdistill.methods.denoising import denoising  # noqa: E402
from jaxdistill.prediction import flow_target  # noqa: E402
from jaxdistill.run import checkpoint  # noqa: E402
from jaxdistill.run.phase import Training, programs  # noqa: E402
from jaxdistill.tasks.text_to_image import plan  # noqa: E402
from jaxdistill.tasks.text_to_image.setup import TextSetup, open_teacher  # noqa: E402
from jaxdistill.train import Objective  # noqa: E402

TOPOLOGY = "v5p:2x2x1"
PUBLISHED = {"seconds": 1.769, "of": "MaxDiffusion's README: FLUX.1-dev, v5p-8, batch 8"}


def loss_of(setup: TextSetup) -> Any:
    """Flow matching on a batch, of parameters that the mesh divides."""
    plain = denoising(
        setup.network.apply,
        schedule=setup.schedule,
        target=flow_target,
        null_cond=lambda cond: cond,
        drop_cond=0.0,
        constrain=partition.constrain_batch(setup.layout.mesh),
    )

    def loss(params: Any, given: Any, batch: Any, key: jax.Array) -> Any:
        with partition.on_mesh(setup.layout):
            return plain(setup.inside(params), given, batch, key)

    return loss


def plain_program(config: Any, devices: Any) -> plan.Program:
    """The whole step: gradient and AdamW."""
    setup = TextSetup(config, open_teacher(config), devices=devices)
    training = Training(
        name="plain",
        objective=Objective(loss=loss_of(setup), tx=optax.adamw(1e-5)),
        params=lambda: None,
        shapes=setup.abstract,
        key=jax.random.key(0),
        batches=lambda i: None,
        given=None,
        health=lambda averages, step: {},
        steps=1,
        health_every=1,
        ema_decay=0.0,
        ema_of=lambda params: {},
    )
    made = programs(training, setup.layout)
    batch = setup.batch_shapes(setup.recipe.stages[0])
    batch = {name: batch[name] for name in ("x0", "cond")}
    kinds = {"network": made.state.params, "optimizer": made.state.opt_state, "batch": batch}
    plain = setup.as_written
    gradient = jax.value_and_grad(loss_of(plain), has_aux=True)
    key = jax.eval_shape(partial(jax.random.key, 0))
    flops = flops_of(gradient, plain.abstract, None, batch, key)
    rows = config.student.batch_size
    return plan.Program(made.step, (made.state, batch, None), kinds, flops, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    config = flux.get_config()
    config.teacher.architecture = "flux-dev"
    config.student.update({"lora_rank": 0, "batch_size": 8})
    config.mesh.update({"data": 1, "fsdp": -1})
    config.compute.attention = "flash"
    chip, devices = plan.topology(TOPOLOGY)
    program = plain_program(config, devices)
    report = plan.measure(program, chip, len(devices))
    report = {"topology": TOPOLOGY, "compiled": "plain step", **report}
    full = program.analytic_flops / len(devices) / chip.flops
    report["seconds_at"] = {
        "mfu_1": round(full, 3),
        "mfu_0.55": round(full / 0.55, 3),
        "bound": round(report["step_ms_at_least"] / 1e3, 3),
    }
    report["published"] = {**PUBLISHED, "mfu": round(full / PUBLISHED["seconds"], 3)}
    print(plan.text_of(report))
    print(json.dumps({name: report[name] for name in ("seconds_at", "published")}))
    command = shlex.join(["python", *sys.argv])
    checkpoint.write_json(Path(args.out), {"command": command, **report})


if __name__ == "__main__":
    main()
