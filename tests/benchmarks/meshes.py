r"""The text-to-image step on eight CPU devices against one: values, FLOPs and memory on every kind
of mesh.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 \
        python tests/benchmarks/meshes.py --out=docs/results/meshes.json

A tiny UNet of the 1.x layout, float32, with guidance, adversary and noise correction; 16 rows.
About five minutes on 2 CPU cores.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdistill import partition
from jaxdistill.costs import hlo
from jaxdistill.interop import architectures, diffusers_folder
from jaxdistill.tasks.text_to_image.setup import TextSetup

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
import text_config  # noqa: E402

UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (16, 16),
    "norm_num_groups": 4,
    "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
}
PIPELINE = {**architectures.PIPELINES["sd15"], "unet": UNET}
MESHES = (
    {"data": 8},
    {"data": 1, "fsdp": 8},
    {"data": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
)


def run(mesh: dict[str, int], steps: int, devices: Any = None) -> dict[str, Any]:
    """The losses, parameters and cost of `steps` steps."""
    config = text_config.get_config()
    config.mesh.update({**mesh, "smallest": 256})
    config.student.update({"batch_size": 16, "learning_rate": 1e-4})
    setup = TextSetup(config, architectures.folder(PIPELINE), devices=devices)
    network = setup.network.init(
        jax.random.key(0), *diffusers_folder.example_inputs(setup.folder.network)
    )
    params = jax.tree.map(np.asarray, {"student": network, "discriminator": setup.fresh_heads()})
    made = setup.programs()
    state = made.start(setup.layout.place(params), key=jax.random.key(1))
    null = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), setup.abstract_null())
    teacher = setup.layout.place({"teacher": params["student"], "null": null})
    r = np.random.default_rng(0)
    batch = jax.tree.map(lambda a: r.standard_normal(a.shape, np.float32), setup.abstract_batch())
    batch = partition.put_batch(batch, setup.layout.mesh)
    compiled = made.step.lower(state, batch, teacher).compile()
    losses = []
    for _ in range(steps):
        state, metrics = made.step(state, batch, teacher)
        losses.append(float(metrics["loss"]))
    memory, counts = compiled.memory_analysis(), hlo.count(compiled.as_text())
    return {
        "losses": losses,
        "params": jax.tree.map(np.asarray, state.params),
        "flops": counts.flops,
        "collectives": counts.collectives,
        "bytes": {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    one = run({}, args.steps, jax.devices()[:1])
    rows = []
    for mesh in MESHES:
        found = run(mesh, args.steps)
        pairs = zip(jax.tree.leaves(found["params"]), jax.tree.leaves(one["params"]), strict=True)
        rows.append(
            {
                "mesh": mesh,
                "largest_relative_difference_of_losses": max(
                    abs(a / b - 1) for a, b in zip(found["losses"], one["losses"], strict=True)
                ),
                "largest_difference_of_parameters": max(
                    float(np.abs(a - b).max()) for a, b in pairs
                ),
                "flops_a_device_times_8": found["flops"] * 8 / one["flops"],
                "bytes_a_device": found["bytes"],
                "collective_bytes_a_device": found["collectives"],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    about = {
        "command": shlex.join(["python", *sys.argv]),
        "steps": args.steps,
        "one_device_bytes": one["bytes"],
        "jax": jax.__version__,
    }
    Path(args.out).write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
