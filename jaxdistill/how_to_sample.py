"""Tell how a student is drawn in another program, or write a workflow for ComfyUI.

python -m jaxdistill.how_to_sample --model=runs/sd15/diffusers --ui=a1111
python -m jaxdistill.how_to_sample --model=runs/sd15/lora --ui=comfyui --steps=2 --out=w.json
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from jaxdistill.interop import how_to_sample
from jaxdistill.interop.diffusers_folder import read_json
from jaxdistill.run import checkpoint
from jaxdistill.run.help import Parser, named

UIS = ("diffusers", "comfyui", "a1111", "forge")


def parser() -> Parser:
    """The flags."""
    p = Parser(__doc__, "--model=FOLDER --ui=NAME")
    add = p.add_argument
    about = "what a run or an export wrote: it holds how_to_sample.json"
    add("--model", required=True, metavar="FOLDER", help=about)
    add("--ui", required=True, **named(UIS), help=f"the program: {', '.join(UIS)}")
    about = ".json to write a workflow to (comfyui)"
    add("--out", metavar="FILE", help=about)
    about = "of the workflow, one of the student's (default: its most)"
    add("--steps", type=int, metavar="N", help=about)
    about = "of the workflow: the file in models/checkpoints (default: as the folder's)"
    add("--checkpoint", metavar="NAME", help=about)
    about = "of the workflow: the file in models/loras (default: as the folder's)"
    add("--lora", metavar="NAME", help=about)
    return p


def names_of(folder: Path) -> dict[str, str]:
    """The checkpoint and the LoRA that the folder's own workflow names."""
    path = folder / how_to_sample.WORKFLOW
    nodes = read_json(path).values() if path.is_file() else ()
    inputs = {key: value for node in nodes for key, value in node["inputs"].items()}
    return {"checkpoint": inputs.get("ckpt_name", ""), "lora": inputs.get("lora_name", "")}


def run(args: argparse.Namespace) -> str:
    """What the command prints. Raises ValueError."""
    folder = Path(args.model)
    if not (folder / how_to_sample.FILE).is_file():
        raise ValueError(
            f"--model={folder} has no {how_to_sample.FILE}; give the diffusers/ or lora/ folder"
            " of a finished run"
        )
    how = read_json(folder / how_to_sample.FILE)
    if how.get("format") != how_to_sample.FORMAT:
        raise ValueError(
            f"{folder / how_to_sample.FILE}: format {how.get('format')!r} is not"
            f" {how_to_sample.FORMAT!r}; it was written by another version"
        )
    given = {"--steps": args.steps, "--checkpoint": args.checkpoint, "--lora": args.lora}
    if args.out is None:
        if flags := [flag for flag, value in given.items() if value is not None]:
            raise ValueError(f"{flags[0]} is of a workflow; give --ui=comfyui and --out=FILE")
        return json.dumps(how[args.ui], indent=2)
    out = Path(args.out)
    if args.ui != "comfyui" or out.suffix != ".json":
        raise ValueError(f"--out={out}: only --ui=comfyui has a workflow, a .json file")
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {args.steps}")
    names: dict[str, Any] = names_of(folder)
    names |= {key: value for key in names if (value := getattr(args, key)) is not None}
    checkpoint.write_json(out, how_to_sample.comfyui_workflow(how, **names, steps=args.steps or 0))
    return str(out)


def main(argv: list[str] | None = None) -> None:
    """Parse, tell or write."""
    args = parser().parse_args(argv)
    try:
        print(run(args))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
