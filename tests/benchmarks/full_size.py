"""The real Stable Diffusion 1.5 UNet, 860 M parameters: peak host memory of loading it, and one
call against torch.

    python tests/benchmarks/full_size.py --out=docs/results/full_size.json

Random weights, saved by diffusers. Loading and calling run in processes of their own, so that each
one's memory is its own. About 10 minutes and 12 GB of memory on 2 CPU cores.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

BATCH, SIDE, TOKENS = 1, 64, 77


def inputs():
    r = np.random.default_rng(0)
    x, context = (
        r.standard_normal(shape, np.float32)
        for shape in ((BATCH, SIDE, SIDE, 4), (BATCH, TOKENS, 768))
    )
    return x, np.full(BATCH, 500.0, np.float32), context


def by_torch(folder: Path) -> None:
    """Make the weights and call the network once."""
    import diffusers
    import torch

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval()
    unet.save_pretrained(folder / "unet", max_shard_size="20GB")
    x, t, context = inputs()
    with torch.no_grad():
        out = unet(
            torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(t), torch.tensor(context)
        ).sample
    np.save(folder / "torch.npy", out.numpy().transpose(0, 2, 3, 1))


def part_of(folder: Path):
    from jaxdistill.interop import diffusers_folder
    from jaxdistill.interop.families import stable_diffusion

    config = json.loads((folder / "unet" / "config.json").read_text())
    where = folder / "unet" / "config.json"
    return diffusers_folder.Part(
        stable_diffusion.unet_module(config, where), config, where.parent, "diffusion_pytorch_model"
    )


def load(folder: Path):
    """Load the weights; says what the process needed beyond its imports."""
    import jax

    from jaxdistill.interop import diffusers_folder

    part = part_of(folder)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    params = jax.block_until_ready(diffusers_folder.load_params(part))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    found = {
        "parameters": size // 4,
        "bytes": size,
        "peak_bytes": peak,
        "peak_ratio": round(peak / size, 4),
        "seconds": time.perf_counter() - began,
    }
    return part, params, found


def by_jax(folder: Path) -> None:
    import jax

    part, params, found = load(folder)
    x, t, context = inputs()
    began = time.perf_counter()
    out = np.asarray(jax.jit(part.module.apply)(params, x, t, {"context": context}))
    expected = np.load(folder / "torch.npy")
    found |= {
        "call_seconds": time.perf_counter() - began,
        "relative_error": float(np.abs(out - expected).max() / np.abs(expected).max()),
    }
    print(json.dumps({k: round(v, 8) if isinstance(v, float) else v for k, v in found.items()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument(
        "--folder", help="where to keep the 3.4 GB of weights; default: a temporary one"
    )
    parser.add_argument("--role", choices=("torch", "jax"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        {"torch": by_torch, "jax": by_jax}[args.role](Path(args.folder))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.folder or scratch)
        common = [sys.executable, __file__, f"--out={args.out}", f"--folder={folder}"]
        subprocess.run([*common, "--role=torch"], check=True)
        said = subprocess.run(
            [*common, "--role=jax"], check=True, capture_output=True, text=True
        ).stdout
    found = {
        "command": "python tests/benchmarks/full_size.py",
        "limits": {"peak_ratio": 1.3, "relative_error": 1e-4},
        **json.loads(said.splitlines()[-1]),
    }
    Path(args.out).write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
