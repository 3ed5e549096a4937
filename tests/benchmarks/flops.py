"""What the folded upsampling and the shared rows of guidance save, counted at the real sizes of
`configs/tpu_v4.py`; nothing is computed.

    python tests/benchmarks/flops.py --out=docs/results/flops.json

FLOPs of the products and convolutions of one call on one latent, of a guided one, of decoding it,
and of a training step a row: as they are, and with each upsampling made before its convolution and
a guided call of two whole rows.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from unittest import mock

import jax
from jaxtyping import Array

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configs import tpu_v4
from jaxdistill.models import layers
from jaxdistill.tasks.text_to_image.setup import TextSetup, open_teacher


class Plain(TextSetup):
    """Each row of conditioning is a whole call."""

    def call_flops(self, *, features: bool = False, copies: int = 1) -> float:
        return copies * super().call_flops(features=features)


def after_resize(x: Array, kernel: Array) -> Array:
    doubled = layers.nearest(x, (2 * x.shape[1], 2 * x.shape[2]))
    return layers.convolution(doubled, kernel.astype(x.dtype), pads=((1, 1), (1, 1)))


def counts(setup: TextSetup) -> dict[str, float]:
    found = {
        "call": setup.call_flops(),
        "guided": setup.call_flops(copies=2),
        "decode": setup.decode_flops(),
    }
    return found | {"step_a_row": setup.step_flops() / setup.config.student.batch_size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    out = parser.parse_args().out
    found = {}
    for name, size in (("1.5", ""), ("XL", "sdxl")):
        config = tpu_v4.get_config(size)
        config.mesh.data = config.mesh.fsdp = 1
        now = counts(TextSetup(config, open_teacher(config)))
        with mock.patch.object(layers, "doubled_convolution", after_resize):
            plain = counts(Plain(config, open_teacher(config)))
        found[name] = {
            "now": now,
            "plain": plain,
            "percent_fewer": {key: round(100 * (1 - now[key] / plain[key]), 2) for key in now},
        }
        print(name, json.dumps(found[name], indent=2), flush=True)
    written = {
        "command": shlex.join(["python", *sys.argv]),
        **found,
        "versions": {"jax": jax.__version__},
    }
    Path(out).write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
