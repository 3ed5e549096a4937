"""Draw images with a student or teacher of a run, or with a diffusers pipeline folder.

python -m jaxdistill.sample --model=runs/digits/student --out=digits.png
python -m jaxdistill.sample --model=runs/sd15/student --prompt="a red fox" --out=fox.png
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdistill.errors import missing_extra
from jaxdistill.interop import add_flags, beside, card, check_unused, explain_path, given, is_file
from jaxdistill.models.attention import ATTENTION
from jaxdistill.run import checkpoint, compilation, report
from jaxdistill.run.help import Parser, boolean, named, note


def labels_list(text: str) -> list[int]:
    """Comma-separated class numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of class numbers such as 3,7"
        ) from None


def parser() -> Parser:
    """The flags."""
    p = Parser(__doc__, "--model=FOLDER --out=FILE")
    add = p.add_argument
    about = "a run's student/, a diffusers folder, or a .safetensors checkpoint"
    add("--model", required=True, metavar="FOLDER", help=about)
    about = ".png: a grid; .npz: images, float32 [n, h, w, c] in [0, 1]"
    add("--out", required=True, metavar="FILE", help=about)
    add("--num", type=int, metavar="N", help="images (default: 64, or 1 with --prompt)")
    add("--steps", type=int, metavar="N", help="sampler steps (default: the model's)")
    add("--seed", type=int, default=0, metavar="N", help="image i depends on seed and i only")
    about = (
        "scale as the stock pipeline means it: classifier-free, 1 = none (Z-Image: 0); of FLUX.1"
        " dev an input of its network, of schnell nothing (default: the model's)"
    )
    add("--guidance", type=float, metavar="SCALE", help=about)
    add(
        "--noise_correction",
        type=boolean,
        metavar="BOOL",
        help="true or false (default: the model's)",
    )
    about = "images at once (default: 500, or 4 per device of a pipeline)"
    add("--batch_size", type=int, metavar="N", help=about)
    classes = p.add_argument_group("class-conditional models")
    about = "class numbers, used in turn, such as 3,7 (default: all)"
    classes.add_argument("--labels", type=labels_list, metavar="N,N", help=about)
    add = p.add_argument_group("models that read text").add_argument
    add("--prompt", metavar="TEXT", help="what to draw")
    pipelines = p.add_argument_group("pipeline folders and their students")
    add = pipelines.add_argument
    about = "what guidance moves away from (default: the pipeline's)"
    add("--negative_prompt", metavar="TEXT", help=about)
    add("--height", type=int, metavar="N", help="pixels (default: the model's)")
    add("--width", type=int, metavar="N", help="pixels (default: the model's)")
    about = f"time grid: {', '.join(card.GRIDS)} (default: the folder's)"
    add("--grid", **named(tuple(card.GRIDS)), help=about)
    about = f"{', '.join(card.SOLVERS)} (default: the folder's scheduler)"
    add("--solver", **named(tuple(card.SOLVERS)), help=about)
    about = (
        ".npy of starting noise instead of the seed's, float32 [num, c, h, w]; of FLUX also packed,"
        " [num, h w / 4, 4 c]"
    )
    add("--latents", metavar="FILE", help=about)
    add_computing(pipelines)
    add_flags(p, pipelines)
    return p


def add_computing(flags: Any) -> None:
    """How a pipeline computes, as flags of a parser or of a group."""
    add = flags.add_argument
    about = "decode in tiles of N x N latents; 0: in one piece"
    add("--tile", type=int, default=0, metavar="N", help=about)
    types = ("float32", "bfloat16")
    add("--dtype", **named(types), default=types[0], help=f"of computation: {', '.join(types)}")
    about = f"{', '.join(ATTENTION)}; flash needs a TPU, cudnn an NVIDIA GPU"
    add("--attention", **named(tuple(ATTENTION)), default="auto", help=about)


def computing(args: argparse.Namespace) -> dict[str, Any]:
    """Those flags as options of `pipeline.load`.

    Raises ValueError for tiles that cannot overlap.
    """
    if args.tile < 0 or args.tile == 1:
        raise ValueError(f"--tile must be 0 (never) or at least 2, got {args.tile}")
    return {"tile": args.tile, "dtype": jnp.dtype(args.dtype), "attention": args.attention}


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
        raise ValueError(
            f"{folder} holds a {exported.get('role', 'thing')} that draws no images; give a"
            " teacher/ or student/ folder"
        )
    sampler = card.build_sampler(exported)
    settings, names = exported["sampler"], exported["data"]["class_names"]
    steps = settings["steps"] if steps is None else steps
    check_numbers(seed=seed, steps=steps, num=num, batch_size=batch_size)
    if guidance is not None:
        card.check_guidance(guidance, "--guidance")
    classes = list(range(len(names))) if labels is None else labels
    for label in classes:
        if not 0 <= label < len(names):
            raise ValueError(
                f"--labels: class {label} is not in 0..{len(names) - 1} ({', '.join(names)})"
            )
    conds = np.resize(np.asarray(classes, np.int32), num)
    options: dict[str, Any] = {
        "steps": steps,
        "guidance": guidance,
        "noise_correction": noise_correction,
    }
    return sampler.draw(params, conds, seed=seed, batch_size=batch_size, **options), conds


def check_numbers(*, seed: int, **counts: int) -> None:
    """Raise ValueError for a flag's count below 1 or a seed that jax.random.key does not take."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed must be in 0..{2**32 - 1}, got {seed}")


PIPELINE_FLAGS = ("negative_prompt", "height", "width", "grid", "solver", "latents", "as")


def kind(folder: Path) -> str:
    """What a folder draws from: "pipeline" (a diffusers folder, an export that names one, a file),
    "caption" or "label".
    """
    if (folder / "model_index.json").is_file() or is_file(folder):
        return "pipeline"
    try:
        found = json.loads((folder / "card.json").read_text())
        return "pipeline" if "components" in found else "caption" if found.get("text") else "label"
    except (OSError, ValueError, AttributeError):
        return "label"  # said better by who reads it


def prompt_numbers(args: argparse.Namespace, *, batch_size: int) -> tuple[int, int]:
    """--num and --batch_size of a model that draws from text. Raises ValueError."""
    if args.prompt is None:
        raise ValueError(
            f'--prompt is missing: {args.model} draws from text; give --prompt="a photo of a cat"'
        )
    if args.labels is not None:
        raise ValueError(
            f"--labels: {args.model} draws from text and has no classes; give --prompt"
        )
    num, batch_size = (
        1 if args.num is None else args.num,
        (batch_size if args.batch_size is None else args.batch_size),
    )
    check_numbers(seed=args.seed, num=num, batch_size=batch_size)
    return num, batch_size


def caption_images(args: argparse.Namespace) -> tuple[np.ndarray, list[str]]:
    """Images and their captions from a benchmark's export. Raises ValueError."""
    try:
        from jaxdistill.interop.text_export import TextExport
    except ModuleNotFoundError as error:
        if (line := missing_extra(error)) is None:
            raise
        raise ValueError(line) from None

    num, batch_size = prompt_numbers(args, batch_size=500)
    flags = [name for name in PIPELINE_FLAGS if getattr(args, name) is not None]
    flags += [name for name in given(args) if name != "text_encoder"]
    if flags:
        raise ValueError(
            f"--{flags[0]}: {args.model} has its own size, grid and solver; leave it out"
        )
    model = TextExport(args.model, encoder=args.text_encoder)
    if args.steps is not None:
        check_numbers(seed=args.seed, steps=args.steps)
    captions = [args.prompt] * num
    settings = {
        "steps": args.steps,
        "guidance": args.guidance,
        "noise_correction": args.noise_correction,
    }
    return model(captions, **settings, seed=args.seed, batch_size=batch_size), captions


def text_images(args: argparse.Namespace) -> tuple[np.ndarray, list[str]]:
    """Images and their prompts. Raises ValueError."""
    try:
        # The tokenizers' library takes seconds to import.
        from jaxdistill.interop import known_students
        from jaxdistill.tasks.text_to_image import pipeline
    except ModuleNotFoundError as error:
        if (line := missing_extra(error)) is None:
            raise
        raise ValueError(line) from None

    num, batch_size = prompt_numbers(args, batch_size=4)
    options = computing(args)
    files = beside(args, args.model)
    student = known_students.of(getattr(args, "as"), [args.steps] if args.steps else [], files)
    latents = None
    if args.latents is not None:
        try:
            latents = np.load(args.latents, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"--latents={args.latents} cannot be read as .npy ({error})") from None
        if args.num is None and latents.ndim in (3, 4):  # FLUX packs a row in two
            num = len(latents)
    note(f"{args.model}: loading and compiling (a minute or more for a large model)")
    call = {
        name: getattr(args, name)
        for name in ("steps", "guidance", "height", "width", "negative_prompt")
    }
    call |= {"batch_size": batch_size, "latents": latents}
    pipe = pipeline.load(
        args.model,
        beside=files,
        known=student,
        grid=args.grid,
        solver=args.solver,
        noise_correction=args.noise_correction,
        layout=pipeline.every_device(),
        call={**call, "count": num},
        **options,
    )
    prompts = [args.prompt] * num
    chosen = {"steps": pipe.steps if args.steps is None else args.steps, "guidance": args.guidance}
    size = pipe.check(height=args.height, width=args.width)
    if unread := pipe.unread(guidance=args.guidance, negative_prompt=args.negative_prompt):
        print(f"warning: {args.model} does not read {unread}", file=sys.stderr)
    if unlike := pipeline.unlike(pipe.settings, **chosen, size=size):
        print(f"warning: {args.model} was {unlike}", file=sys.stderr)
    return pipe(prompts, seed=args.seed, **call), prompts


def main(argv: list[str] | None = None) -> None:
    """Parse, sample, write."""
    args = parser().parse_args(argv)
    compilation.use_cache()
    out = Path(args.out)
    try:
        compilation.check_devices()
        if out.suffix not in (".png", ".npz"):
            raise ValueError(f"--out={out} must end in .png or .npz")
        if not out.parent.is_dir():
            raise ValueError(f"--out={out}: the folder {out.parent} does not exist")
        if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
            raise ValueError(f"--out={out} cannot be written; choose another file")
        draws_from = kind(Path(args.model))
        if draws_from != "pipeline":
            check_unused(args, args.model)
        if draws_from != "label":
            images, prompts = (
                text_images(args) if draws_from == "pipeline" else caption_images(args)
            )
            extra: dict[str, Any] = {"prompts": np.asarray(prompts)}
        else:
            flags = [n for n in ("prompt", *PIPELINE_FLAGS) if getattr(args, n) is not None]
            flags += given(args)
            if flags and (Path(args.model) / "card.json").is_file():
                raise ValueError(
                    f"--{flags[0]}: {args.model} draws classes, not text; give --labels, or a"
                    " pipeline folder as --model"
                )
            if not (Path(args.model) / "card.json").is_file():
                raise ValueError(explain_path(args.model))
            images, labels = generate(
                args.model,
                num=64 if args.num is None else args.num,
                steps=args.steps,
                seed=args.seed,
                labels=args.labels,
                guidance=args.guidance,
                noise_correction=args.noise_correction,
                batch_size=500 if args.batch_size is None else args.batch_size,
            )
            extra = {"labels": labels}
        if out.suffix == ".png":
            report.save_grid(out, images, scale=max(1, 64 // images.shape[1]))
        else:
            np.savez_compressed(out, images=images, **extra)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{out}: {len(images)} image{'s' * (len(images) > 1)}")


if __name__ == "__main__":
    main()
