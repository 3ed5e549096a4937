"""Compare teacher and student on the same prompts and seeds: images, scores and a picture page.

    python -m jaxdistill.compare --teacher=sd1 --student=runs/sd15/student --prompts=p.txt --out=cmp

--out gets `images/<row>/00000.png`, ... in the order of the prompts; `scores.json` with the
protocol of every number; `scores.md`; `images.jsonl` with the CLIP score of every image; and
`page.png`. --images=OUT/images scores them again; other folders of images work too.

With --bases it tells whether a LoRA of few steps works on other checkpoints and beside other LoRAs:
each base in each style is drawn without it, as their teacher, and with it.
"""

import gc
import json
import os
import re
import shlex
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from jaxdistill.interop import (
    Beside,
    add_flags,
    beside,
    card,
    explain_path,
    how_to_sample,
    is_file,
    known_students,
    lora_files,
)
from jaxdistill.interop.known_students import Described, Known
from jaxdistill.interop.prompts import read_prompts as read_file
from jaxdistill.metrics import image_metrics
from jaxdistill.metrics.compare import (
    ROW,
    CompareError,
    Judges,
    Row,
    embed,
    markdown,
    open_rows,
    page,
    prompts_hash,
    score,
    write,
)
from jaxdistill.metrics.image_metrics import METRICS, PROTOCOLS, Reference
from jaxdistill.run import compilation
from jaxdistill.run.help import Parser, named
from jaxdistill.sample import add_computing, check_numbers, computing
from jaxdistill.tasks.text_to_image import pipeline

# ------------------------------------------------------------------------------------------ prompts


def read_prompts(paths: Sequence[str], repeat: int = 1) -> list[dict[str, Any]]:
    """The prompts of files (`interop.prompts`), each `repeat` times in a row.

    Of several files, the name is a prompt's category.

    Raises PromptError for a file that cannot be used.
    """
    items: list[dict[str, Any]] = []
    for path in paths:
        category = {"category": Path(path).stem} if len(paths) > 1 else {}
        items += [{**category, **item} for item in read_file(path)]
    return [item for item in items for _ in range(repeat)]


# ------------------------------------------------------------------------------------------- images


def draw(
    pipe: Callable[..., np.ndarray],
    items: Sequence[Mapping[str, Any]],
    folder: Path,
    *,
    batch_size: int,
    label: str,
    **options: Any,
) -> list[Path]:
    """Draw image i of prompt i into `folder`, as 8-bit PNG; never more than eight batches are in
    memory.

    Args:
      pipe: of `pipeline.load`.
      items: the prompts.
      folder: is made with the first image.
      batch_size: images at once, on each device.
      label: of the progress bar.
      **options: of the pipe: steps, guidance, height, width, seed, negative_prompt.

    Raises:
      NotFinite: of the pipe.
    """
    files: list[Path] = []
    chunk = 8 * batch_size * jax.device_count()
    with tqdm(total=len(items), desc=f"{label}, compiling", unit="image", file=sys.stderr) as bar:
        for start in range(0, len(items), chunk):
            prompts = [item["prompt"] for item in items[start : start + chunk]]
            for image in pipe(prompts, start=start, batch_size=batch_size, **options):
                folder.mkdir(
                    parents=True, exist_ok=True
                )  # not before there is an image: a setting that is refused leaves no trace
                files.append(folder / f"{len(files):05d}.png")
                Image.fromarray((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)).save(files[-1])
            bar.set_description_str(label, refresh=False)
            bar.update(len(prompts))
    return files


@dataclass(frozen=True)
class Drawing:
    """A checkpoint, and how it is drawn.

    Attributes:
      model: what its rows are called.
      source: its path.
      files: what is named beside it.
      steps: the numbers of steps of its rows.
      guidance, solver: None is the checkpoint's own.
      known: instead of its scheduler and settings.
      made: what a student was made for, as of `pipeline.made_for`.
      teacher: the model whose rows these are measured against.
    """

    model: str
    source: str
    files: Beside
    steps: Sequence[int]
    guidance: float | None = None
    solver: str | None = None
    known: Known | Described | None = None
    made: Mapping[str, Any] = field(default_factory=dict)
    teacher: str = ""

    def call(self, **more: Any) -> dict[str, Any]:
        """What it is asked for at its most steps, as of `pipeline.check_call`."""
        return {"steps": max(self.steps), "guidance": self.guidance, **more}

    def load(self, **options: Any) -> Any:
        """Its pipeline; `options` as of `pipeline.load`. Raises FolderError, WeightsError."""
        chosen: dict[str, Any] = {"known": self.known, "solver": self.solver}
        return pipeline.load(self.source, beside=self.files, **chosen, **options)


def pair(args: Namespace) -> list[Drawing]:
    """Student and teacher, of those that are given. The student goes first: it is the faster one,
    and shows soonest where something is wrong.
    """
    files = beside(args, args.teacher, args.student)
    known = known_students.of(getattr(args, "as"), args.steps or (), files)
    if args.teacher and isinstance(known, Described):
        raise CompareError(
            f"--lora is added to the teacher, too, and {known.path} is of a student; compare such a"
            " LoRA with --bases"
        )
    made = pipeline.made_for(args.student) if args.student and known is None else {}
    own = known_students.counts_of(known) if known else list(pipeline.served(made))
    steps = args.steps or own or [1, 2, 3]
    found = []
    if args.student:
        options = {"known": known, "solver": args.student_solver, "made": made}
        guidance = args.student_guidance
        found.append(Drawing("student", args.student, files, steps, guidance, **options))
    if args.teacher:
        steps = [args.teacher_steps]
        found.append(Drawing("teacher", args.teacher, files, steps, args.guidance, args.solver))
    return found


def table(args: Namespace) -> list[Drawing]:
    """Each base in each style, without and with the LoRA of few steps. Raises FolderError."""
    files = beside(args, *args.bases)
    file, _ = lora_files.parse(files.loras[0])
    known = known_students.of(getattr(args, "as"), args.steps or (), files)
    if known is None:
        raise CompareError(
            f"--lora={files.loras[0]} has no {how_to_sample.FILE} beside it that says how it is"
            " drawn; say --as=NAME"
        )
    made = known.content if isinstance(known, Described) else {}
    own = known_students.counts_of(known)
    styled = distinct([lora_files.parse(style)[0] for style in args.styles])
    found = []
    for base, base_name in zip(args.bases, distinct(args.bases), strict=True):
        for style, style_name in zip(args.styles, styled, strict=True):
            styles = () if style == "none" else (style,)
            name = base_name if style == "none" else f"{base_name} + {style_name}"
            few = Drawing(
                f"{name} + {file.stem}",
                base,
                replace(files, loras=(*styles, *files.loras)),
                args.steps or own,
                args.student_guidance,
                args.student_solver,
                known,
                made,
                teacher=name,
            )
            plain, steps = replace(files, loras=styles), [args.teacher_steps]
            found += [Drawing(name, base, plain, steps, args.guidance, args.solver), few]
    return found


def distinct(paths: Sequence[str | Path]) -> list[str]:
    """A short name of each path, which nobody else has."""
    names = [Path(path).stem for path in paths]
    return [name if names.count(name) == 1 else f"{i + 1}-{name}" for i, name in enumerate(names)]


def draw_rows(
    args: Namespace, plan: Sequence[Drawing], items: Sequence[Mapping[str, Any]], out: Path
) -> list[Row]:
    """The images of all drawings at each of their numbers of steps, from the same seeds."""
    computed, made = computing(args), next((d.made for d in plan if d.made), {})
    common: dict[str, Any] = {
        side: made.get(side) if getattr(args, side) is None else getattr(args, side)
        for side in ("height", "width")
    }
    if args.negative_prompt is not None:
        common["negative_prompt"] = args.negative_prompt
    for drawing in plan[1:]:
        # Read once and let go, so that a damaged folder is found before the first image and only
        # one pipeline is in memory.
        drawing.load(call=drawing.call(**common), **computed)
        gc.collect()
    rows = []
    for drawing in plan:
        call = drawing.call(**common)
        pipe = drawing.load(call=call, layout=pipeline.every_device(), **computed)
        pipe.text.announce([item["prompt"] for item in items])
        for steps in drawing.steps:
            options = {"steps": steps, "guidance": drawing.guidance, **common, "seed": args.seed}
            warn_unlike(drawing, steps, common["height"], common["width"])
            rows.append(draw_row(args, drawing, pipe, items, out, options))
        del pipe
        gc.collect()
    return sorted(rows, key=lambda row: row.model != "teacher")


def warn_unlike(drawing: Drawing, steps: int, height: int | None, width: int | None) -> None:
    """Tell of a row for which the student was not made, where its size is known."""
    if height is None or width is None:
        return
    size = (height, width)
    told = pipeline.unlike(drawing.made, steps=steps, guidance=drawing.guidance, size=size)
    if told:
        student = drawing.model if drawing.teacher else drawing.source
        print(f"warning: {student} was {told}", file=sys.stderr)


def draw_row(
    args: Namespace,
    drawing: Drawing,
    pipe: Any,
    items: Sequence[Mapping[str, Any]],
    out: Path,
    options: Mapping[str, Any],
) -> Row:
    """The images of a drawing with the pipe's `options`, and beside them what drew them."""
    model, steps = drawing.model, options["steps"]
    folder = out / "images" / re.sub(r"[^\w.-]+", "-", f"{model}-{steps}")
    while folder.exists():  # of another row, whose name differs in a mark alone
        folder = folder.with_name(f"{folder.name}-2")
    size = {"batch_size": args.batch_size}
    files = draw(pipe, items, folder, label=folder.name, **size, **options)
    used = getattr(pipe, "guidance", None) if drawing.guidance is None else drawing.guidance
    said = {
        "model": model,
        "source": str(drawing.source),
        "prompts": prompts_hash(items),
        **options,
        "guidance": used,
        **size,
        "as": getattr(args, "as") if isinstance(drawing.known, Known) else None,
        "solver": drawing.solver,
        "teacher": drawing.teacher or None,
        **asdict(drawing.files),
        **computing(args),
        "dtype": args.dtype,
    }
    (folder / ROW).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    return Row(model, steps, used, files, said)


# ------------------------------------------------------------------------------------------ command


def counts(text: str) -> list[int]:
    """Comma-separated numbers of at least 1."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 1,2,3")
    return list(dict.fromkeys(found))


def names(text: str) -> list[str]:
    """Comma-separated words."""
    return [part for part in text.split(",") if part]


def parser() -> Parser:
    """The flags."""
    p = Parser("\n".join((__doc__ or "").splitlines()[:3]), "--prompts=FILE --out=FOLDER")
    add = p.add_argument
    add("--teacher", metavar="FOLDER", help="a diffusers folder, or a .safetensors checkpoint")
    add("--student", metavar="FOLDER", help="a student's export or its diffusers/ folder")
    about = "finished images to score, instead of --teacher and --student"
    add("--images", metavar="FOLDER", help=about)
    about = ".txt, .jsonl, .csv or .parquet; FILE,FILE: each name is a category"
    add("--prompts", type=names, metavar="FILE", help=about)
    add("--out", metavar="FOLDER", help="new folder for images and scores")
    drawing = p.add_argument_group("drawing")
    add = drawing.add_argument
    about = "images per prompt, each from its own seed"
    add("--images_per_prompt", type=int, default=1, metavar="N", help=about)
    about = "the student's step counts (default: its own, or 1,2,3)"
    add("--steps", type=counts, metavar="N,N", help=about)
    add("--teacher_steps", type=int, default=50, metavar="N", help="the teacher's steps")
    about = "the teacher's, as its stock pipeline means it (default: its folder's)"
    add("--guidance", type=float, metavar="SCALE", help=about)
    about = "the student's guidance scale (default: its folder's)"
    add("--student_guidance", type=float, metavar="SCALE", help=about)
    about = f"the teacher's: {', '.join(card.SOLVERS)} (default: its scheduler)"
    add("--solver", **named(tuple(card.SOLVERS)), help=about)
    about = "the student's, one of the same (default: its scheduler)"
    add("--student_solver", **named(tuple(card.SOLVERS)), help=about)
    about = "what guidance moves away from (default: the pipeline's)"
    add("--negative_prompt", metavar="TEXT", help=about)
    add("--height", type=int, metavar="N", help="pixels (default: the student's)")
    add("--width", type=int, metavar="N", help="pixels (default: the student's)")
    about = "image i depends on seed, i and its prompt only"
    add("--seed", type=int, default=0, metavar="N", help=about)
    about = "images at once, per device in drawing"
    add("--batch_size", type=int, default=4, metavar="N", help=about)
    add_computing(drawing)
    p.add_more("--help_table", "base x style x LoRA of few steps", TABLE, group=drawing)
    add_scoring(p, p.add_argument_group("scores"))
    add_flags(p, drawing)
    return p


TABLE: dict[str, dict[str, Any]] = {
    "--bases": {
        "type": names,
        "metavar": "PATH,PATH",
        "help": "checkpoints to draw with --lora=FILE, the LoRA of few steps, and without",
    },
    "--styles": {
        "type": names,
        "default": ["none"],
        "metavar": "FILE:WEIGHT,none",
        "help": "LoRAs to draw them in, in turn; none is the base itself (default: none)",
    },
}
"""The flags of `table`."""


def add_scoring(p: Parser, flags: Any) -> None:
    """The flags of the scores."""
    add = flags.add_argument
    about = "Inception in safetensors, for FID, KID, precision, recall"
    add("--inception", metavar="FILE", help=about)
    about = "real images: a folder, or an .npz of --save_reference"
    add("--reference", metavar="PATH", help=about)
    add("--clip", metavar="FOLDER", help="CLIP of transformers, for the CLIP score")
    about = f"{','.join(METRICS)} (default: all that the files allow)"
    add("--metrics", type=names, metavar="NAME,NAME", help=about)
    add("--page_prompts", type=int, default=8, metavar="N", help="columns of page.png")
    more: dict[str, dict[str, Any]] = {
        "--protocol": {
            **named(list(PROTOCOLS)),
            "default": "clean-fid",
            "help": ", ".join(PROTOCOLS),
        },
        "--save_reference": {
            "metavar": "FILE",
            "help": ".npz to keep the reference's statistics and features in",
        },
        "--kid_subset_size": {
            "type": int,
            "default": 1000,
            "metavar": "N",
            "help": "images per KID subset",
        },
    }
    p.add_more("--help_scores", "how FID and KID are computed", more, group=flags)


def check_flags(args: Namespace) -> None:
    """Raise CompareError where flags do not go together, ValueError where one is out of range."""
    if args.images and (args.teacher or args.student or args.bases):
        raise CompareError(
            "--images replaces --teacher, --student and --bases; give one or the other"
        )
    check_table(args)
    counts = {
        flag: getattr(args, flag)
        for flag in ("images_per_prompt", "teacher_steps", "batch_size", "page_prompts")
    }
    check_numbers(seed=args.seed, **counts)
    computing(args)
    if bool(args.inception) != bool(args.reference):
        raise CompareError("--inception and --reference need each other; give both or none")
    if args.save_reference and not args.reference:
        raise CompareError("--save_reference needs --inception and --reference")
    if args.save_reference and Path(args.save_reference).suffix != ".npz":
        raise CompareError(f"--save_reference={args.save_reference} must end in .npz")
    if not (args.images or args.teacher or args.student or args.bases):
        if not args.save_reference:
            raise CompareError("nothing to compare; give --teacher, --student or --images")
        return
    for flag in ("prompts", "out"):
        if not getattr(args, flag):
            raise CompareError(
                f"--{flag} is missing; python -m jaxdistill.compare --help shows an example"
            )
    given = [("teacher", args.teacher), ("student", args.student)]
    for flag, path in [*given, *(("bases", base) for base in args.bases or ())]:
        if path and not Path(path).is_dir() and not is_file(path):
            raise CompareError(f"--{flag}: {explain_path(path)}")
    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CompareError(f"--out={out} exists and is not empty; choose a new folder")
    above = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise CompareError(f"--out={out} cannot be written; choose another folder")


def check_table(args: Namespace) -> None:
    """Raise CompareError where the flags of `table` do not go together."""
    if not args.bases:
        if args.styles != ["none"]:
            raise CompareError("--styles goes with --bases; for a pair, name LoRAs in --lora")
        return
    if args.teacher or args.student:
        raise CompareError("--bases replaces --teacher and --student; give one or the other")
    if len(args.loras) != 1:
        raise CompareError(
            f"--bases needs one --lora=FILE, the LoRA of few steps, got {len(args.loras)};"
            " LoRAs of styles go to --styles"
        )


def wanted(args: Namespace, reference: Reference | None) -> list[str]:
    """The metrics to compute: those asked for, or all that can be.

    Raises CompareError for one whose files are not given.
    """
    possible = (["clip"] if args.clip else []) + (
        ["fid", "kid", "precision_recall"] if reference is not None else []
    )
    if args.metrics is None:
        if reference is not None and reference.features is None:
            print(
                f"warning: {args.reference} holds statistics only: KID, precision and recall are"
                " left out; give a folder of images for them",
                file=sys.stderr,
            )
            return [metric for metric in possible if metric in ("fid", "clip")]
        return possible
    for metric in args.metrics:
        if metric not in METRICS:
            raise CompareError(
                f"--metrics: {metric!r} is not known; choose one of {', '.join(METRICS)}"
            )
        if metric not in possible:
            raise CompareError(
                f"--metrics: {metric} needs"
                f" {'--clip' if metric == 'clip' else '--inception and --reference'}"
            )
    return list(args.metrics)


def run(args: Namespace, command: str = "") -> dict[str, Any]:
    """What the command does; returns scores.json.

    All that is given is read and checked before the first image is drawn.

    Raises:
      ValueError: a flag, file or folder that cannot be used, in one line.
    """
    check_flags(args)
    items = read_prompts(args.prompts, args.images_per_prompt) if args.prompts else []
    ready = open_rows(args.images, items) if args.images else []
    extractor = reference = None
    if args.inception:
        extractor = image_metrics.load_inception(
            args.inception, protocol=args.protocol, batch_size=args.batch_size
        )
        reference = image_metrics.open_reference(args.reference, extractor)
        if args.save_reference:
            image_metrics.save_reference(args.save_reference, reference)
            print(f"{args.save_reference}: {reference.count:,} images")
    if not (args.images or args.teacher or args.student or args.bases):
        return {}
    metrics = wanted(args, reference)
    if reference is not None:
        image_metrics.check_counts(metrics, len(items), reference, subset_size=args.kid_subset_size)
    clip = (
        image_metrics.load_clip(args.clip, batch_size=args.batch_size)
        if "clip" in metrics
        else None
    )
    texts, cut = embed(clip, items) if clip is not None else (None, 0)
    judges = Judges(metrics, extractor, reference, clip, texts, cut, args.kid_subset_size)
    out = Path(args.out)
    plan = table(args) if args.bases else pair(args)
    rows = ready or draw_rows(args, plan, items, out)
    out.mkdir(parents=True, exist_ok=True)
    page(out / "page.png", rows, items, count=args.page_prompts)
    teachers = {row.model: row for row in rows}
    scored = [score(row, items, judges, teachers.get(row.teacher)) for row in rows]
    results = {
        "rows": [result for result, _ in scored],
        "prompts": {
            "files": args.prompts,
            "hash": prompts_hash(items),
            "count": len(items),
            "images_per_prompt": args.images_per_prompt,
        },
        "seed": None if args.images else args.seed,
        "command": command,
        "machine": image_metrics.machine(),
    }
    write(out, results, rows, items, [single for _, single in scored])
    return results


def main(argv: list[str] | None = None) -> None:
    """Parse, draw, score, write."""
    given = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(given)
    compilation.use_cache()
    try:
        compilation.check_devices()
        results = run(args, f"python -m jaxdistill.compare {shlex.join(given)}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if results:
        print(markdown(results), end="")


if __name__ == "__main__":
    main()
