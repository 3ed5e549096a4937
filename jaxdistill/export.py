"""Write a student as one file for ComfyUI, A1111 and Forge, or as a LoRA for its teacher.

python -m jaxdistill.export --model=runs/sd15/student --out=student.safetensors
python -m jaxdistill.export --model=runs/sd15/student --format=kohya --out=student_lora.safetensors

The file holds UNet, VAE and text encoders in the original layout. What was not trained is the
teacher's, bit for bit. A LoRA student's LoRA is written as it was trained; of another student the
nearest one of a rank to what it has learned. Of a transformer (SD 3, PixArt, FLUX, Z-Image) only a
LoRA under diffusers' names is written; PixArt's is for PEFT.
"""

import argparse
from pathlib import Path

from jaxdistill.errors import UserError
from jaxdistill.interop import add_flags, beside, given
from jaxdistill.run import compilation
from jaxdistill.run.cli import one_line_errors
from jaxdistill.run.help import Parser, named, note

TYPES = ("float16", "bfloat16", "float32")
FORMATS = ("checkpoint", "kohya", "diffusers")
RANK = 64
PICTURES = 4


def parser() -> Parser:
    """The flags."""
    p = Parser(__doc__, "--model=FOLDER --out=FILE")
    add = p.add_argument
    add("--model", required=True, metavar="FOLDER", help="a run's student/ or diffusers/")
    add("--out", required=True, metavar="FILE", help=".safetensors, a new file")
    about = "checkpoint; or a LoRA under the names of kohya (all UIs) or diffusers"
    add("--format", **named(FORMATS), default=FORMATS[0], help=about)
    about = f"of the UNet or the LoRA: {', '.join(TYPES)}, keep (the teacher's)"
    add("--dtype", **named((*TYPES, "keep")), default=TYPES[0], help=about)
    about = "of VAE and text encoders, likewise (default: keep, bit for bit)"
    add("--others", **named((*TYPES, "keep")), help=about)
    teachers = p.add_argument_group("the teacher")
    about = "a folder or .safetensors file (default: the one that the run's config names)"
    teachers.add_argument("--teacher", metavar="PATH", default="", help=about)
    add_flags(p, teachers, known=False)
    add = p.add_argument_group("a LoRA of a student of all weights").add_argument
    about = f"at most the widest layer's; narrower ones are held whole (default: {RANK})"
    add("--rank", type=int, metavar="N", help=about)
    about = f"pictures that measure what it is worth; 0: none (default: {PICTURES})"
    add("--num", type=int, metavar="N", help=about)
    add("--prompts", metavar="FILE", help="for them (default: the run's)")
    return p


def check(args: argparse.Namespace) -> None:
    """Raise UserError for flags that do not go together."""
    lora = args.format != "checkpoint"
    asked = [f"--{name}" for name in ("rank", "num", "prompts") if getattr(args, name) is not None]
    if asked and not lora:
        raise UserError(f"{asked[0]} is of a LoRA; add --format=kohya, or leave it out")
    if lora and args.others is not None:
        raise UserError("--others: a LoRA has no VAE and no text encoders; leave it out")
    if lora and args.dtype == "keep":
        raise UserError(f"--dtype=keep: a LoRA has no source; choose one of {', '.join(TYPES)}")
    if not args.teacher and (named := given(args)):
        raise UserError(f"--{named[0]} goes with --teacher; the run's config names its own")
    if args.num is not None and args.num < 0:
        raise UserError(f"--num must be at least 0, got {args.num}")


def write(args: argparse.Namespace, out: Path) -> None:
    """The file. Raises UserError."""
    from jaxdistill.interop import single_file_out
    from jaxdistill.tasks.text_to_image import take_away  # seconds to import

    single_file_out.check_target(out)
    student = take_away.open_student(args.model)
    take_away.check_format(student, args.format, out)
    files = beside(args, args.teacher)
    if args.format == "checkpoint":
        teacher = take_away.open_teacher(student, args.teacher, files)
        note(f"{args.model}: writing")
        options = {"dtype": args.dtype, "others": args.others or "keep"}
        take_away.write_file(student, teacher, out, **options)
        return
    if student.lora is None:
        teacher = take_away.open_teacher(student, args.teacher, files)
        widest = max(take_away.lora.layer_widths(student.folder).values())
        rank = min(RANK, widest) if args.rank is None else args.rank
        num = PICTURES if args.num is None else args.num
        factors = take_away.nearest(student, teacher, rank, prompts=args.prompts or "", num=num)
    else:
        asked = ("teacher", "rank", "num", "prompts")
        needless = [f"--{name}" for name in asked if getattr(args, name) not in (None, "")]
        if needless:
            raise UserError(f"{needless[0]}: {student.lora} was trained as a LoRA; leave it out")
        factors = take_away.lora.read(student.lora, student.folder.family)
    take_away.write_lora(student, factors, out, dtype=args.dtype, form=args.format)


def main(argv: list[str] | None = None) -> None:
    """Parse, check, write."""
    args = parser().parse_args(argv)
    out = Path(args.out)
    with one_line_errors():
        check(args)
        compilation.use_cache()
        write(args, out)
        print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
