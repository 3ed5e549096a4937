"""`python -m jaxdistill.sample --model=DIR/student --steps=3 --num=64 --out=grid.png`: images from an export."""

import argparse
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import card, checkpoint, report


def boolean(text: str) -> bool:
    """True or false, as a flag's value."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def labels_list(text: str) -> list[int]:
    """Comma-separated class numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of class numbers such as 3,7") from None


class Parser(argparse.ArgumentParser):
    """Errors are one line."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """Print the line and leave."""
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def parser() -> Parser:
    """The flags."""
    p = Parser(prog="python -m jaxdistill.sample", description=__doc__)
    p.add_argument("--model", required=True, help="teacher/ or student/ folder of a run")
    p.add_argument("--steps", type=int, help="network calls an image; default: the card's")
    p.add_argument("--num", type=int, default=64, help="number of images")
    p.add_argument("--seed", type=int, default=0, help="image i depends on the seed and i alone")
    p.add_argument("--labels", type=labels_list, help="classes, taken in turn; default: all")
    p.add_argument("--guidance", type=float, help="classifier-free guidance scale; default: the card's")
    p.add_argument("--noise_correction", type=boolean, help="true or false; default: the card's")
    p.add_argument("--batch_size", type=int, default=500, help="images sampled at once")
    p.add_argument("--out", required=True, help=".png for a grid, .npz for images float32 [n, h, w, c] in [0, 1] and labels")
    return p


def generate(
    folder: str | Path,
    *,
    num: int,
    steps: int | None = None,
    seed: int = 0,
    labels: list[int] | None = None,
    guidance: float | None = None,
    noise_correction: bool | None = None,
    batch_size: int = 500,
) -> tuple[np.ndarray, np.ndarray]:
    """Images float32 [num, h, w, c] in [0, 1] and their labels int32 [num] from an export.

    None takes the card's setting. Raises ValueError for a setting that the export cannot serve.
    """
    params, exported = checkpoint.load_export(folder)
    if "sampler" not in exported:
        raise ValueError(f"{folder} holds a {exported.get('role', 'thing')} that draws no images; give a teacher/ or student/ folder")
    sampler = card.build_sampler(exported)
    settings, names = exported["sampler"], exported["data"]["class_names"]
    steps = settings["steps"] if steps is None else steps
    guidance = settings["guidance"] if guidance is None else guidance
    correct = settings["noise_correction"] if noise_correction is None else noise_correction
    for name, value in (("steps", steps), ("num", num), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if not 0 <= seed < 2**31:
        raise ValueError(f"--seed must be in 0..{2**31 - 1}, got {seed}")
    if not np.isfinite(guidance) or guidance < 0:
        raise ValueError(f"--guidance must be a number of at least 0 (1 = none), got {guidance}")
    classes = list(range(len(names))) if labels is None else labels
    for label in classes:
        if not 0 <= label < len(names):
            raise ValueError(f"--labels: class {label} is not in 0..{len(names) - 1} ({', '.join(names)})")
    grid = jnp.asarray(sampler.grid(steps))
    program = jax.jit(partial(sampler.sample, guidance=float(guidance), correct_noise=correct))
    conds = np.resize(np.asarray(classes, np.int32), num)
    block, images = min(batch_size, num), []
    shape = tuple(exported["data"]["image_shape"])
    for i in range(0, num, block):
        cond = np.resize(conds[i : i + block], block)  # the last block is filled up, so that one program serves all
        images.append(np.asarray(program(params, card.draw_noise(seed, i, block, shape), cond, grid)))
    return np.concatenate(images)[:num], conds


def main(argv: list[str] | None = None) -> None:
    """Parse, sample, write."""
    args = parser().parse_args(argv)
    out = Path(args.out)
    try:
        if out.suffix not in (".png", ".npz"):
            raise ValueError(f"--out={out} must end in .png or .npz")
        if not out.parent.is_dir():
            raise ValueError(f"--out={out}: the folder {out.parent} does not exist")
        images, labels = generate(
            args.model,
            num=args.num,
            steps=args.steps,
            seed=args.seed,
            labels=args.labels,
            guidance=args.guidance,
            noise_correction=args.noise_correction,
            batch_size=args.batch_size,
        )
        if out.suffix == ".png":
            report.save_grid(out, images, scale=max(1, 64 // images.shape[1]))
        else:
            np.savez_compressed(out, images=images, labels=labels)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{out}: {len(images)} images")


if __name__ == "__main__":
    main()
