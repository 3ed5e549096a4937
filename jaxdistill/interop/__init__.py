"""Formats of other projects, in and out."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxdistill.errors import UserError
from jaxdistill.run.help import Parser

PICKLES = (".ckpt", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Beside:
    """What a user names beside a checkpoint: files for what it lacks, words for what it does not
    say.

    Attributes:
      like: of a single file, a pipeline folder of its kind: configs, tokenizers, scheduler.
      clip_skip: layers at the end of the text encoders that are left out, as in diffusers.
    """

    like: str | Path = ""
    clip_skip: int = 0


NOTHING = Beside()

FLAGS: dict[str, dict[str, Any]] = {
    "like": {"metavar": "FOLDER", "help": "of a single file: a pipeline folder of its kind"},
    "clip_skip": {
        "type": int,
        "metavar": "N",
        "help": "text layers left out, as in diffusers; 1 is A1111's clip skip 2",
    },
}
"""The flags of `Beside`'s fields."""


def add_flags(parser: Parser, group: Any) -> None:
    """The flags of `Beside`; `group` has their line in --help."""
    flags = {f"--{k}": {"default": getattr(NOTHING, k), **about} for k, about in FLAGS.items()}
    parser.add_more("--help_files", "checkpoints and LoRAs in files", flags, group=group)


def beside(args: Namespace, *paths: str | None) -> Beside:
    """Those flags, for checkpoints at `paths`. Raises UserError for one that has no use."""
    if args.like and not any(path and is_file(path) for path in paths):
        raise UserError("--like goes with a .safetensors checkpoint; leave it out for folders")
    return Beside(**{name: getattr(args, name) for name in FLAGS})


def is_file(path: str | Path) -> bool:
    """Whether a checkpoint is meant as one file: it is one, or has the ending of one."""
    path = Path(path)
    return path.is_file() or (path.suffix in (".safetensors", *PICKLES) and not path.is_dir())
