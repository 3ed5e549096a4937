"""Formats of other projects, in and out."""

from pathlib import Path

from jaxdistill.errors import UserError

LIKE = "of a .safetensors checkpoint: a pipeline folder of its kind"
"""The help of --like."""

PICKLES = (".ckpt", ".pt", ".pth", ".bin")


def is_file(path: str | Path) -> bool:
    """Whether a checkpoint is meant as one file: it is one, or has the ending of one."""
    path = Path(path)
    return path.is_file() or (path.suffix in (".safetensors", *PICKLES) and not path.is_dir())


def check_like(like: str, *paths: str | None) -> None:
    """Raise UserError for a --like where no path is a file."""
    if like and not any(path and is_file(path) for path in paths):
        raise UserError("--like goes with a .safetensors checkpoint; leave it out for folders")
