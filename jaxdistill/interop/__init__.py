"""Formats of other projects, in and out."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxdistill.errors import UserError
from jaxdistill.run.help import Parser, boolean, named

PICKLES = (".ckpt", ".pt", ".pth", ".bin")


PREDICTIONS = {
    "eps": ("epsilon", False),
    "v": ("v_prediction", False),
    "v_ztsnr": ("v_prediction", True),
}
"""--prediction -> (of a scheduler's config, whether its schedule ends at zero SNR)."""


@dataclass(frozen=True)
class Beside:
    """What a user names beside a checkpoint: files for what it lacks, words for what it does not
    say.

    Attributes:
      like: of a single file, a pipeline folder of its kind: configs, tokenizers, scheduler.
      vae: a folder of diffusers or a single file, instead of the checkpoint's.
      text_encoder: a folder of transformers or a single file, instead of the checkpoint's; of XL
        two, with a comma.
      prediction: of a single file, a key of PREDICTIONS; "" goes by the file's marks.
      ema: of a single file, take the averaged weights of its UNet where it has both.
    """

    like: str | Path = ""
    vae: str = ""
    text_encoder: str = ""
    prediction: str = ""
    ema: bool = True


NOTHING = Beside()

FLAGS: dict[str, dict[str, Any]] = {
    "like": {
        "metavar": "FOLDER",
        "help": "of a single file: a pipeline folder of its kind (default: published configs)",
    },
    "vae": {"metavar": "PATH", "help": "a VAE, file or folder, instead of the checkpoint's"},
    "text_encoder": {
        "metavar": "PATH",
        "help": "a text encoder, file or folder (XL: A,B); of a benchmark's export a MiniLM folder",
    },
    "prediction": {
        **named(tuple(PREDICTIONS)),
        "help": f"of a single file: {', '.join(PREDICTIONS)} (default: what its marks say)",
    },
    "ema": {"metavar": "BOOL", "type": boolean, "help": "of a single file: take averaged weights"},
}
"""The flags of `Beside`'s fields."""

OF_FILES = ("like", "prediction", "ema")
"""Those of no use for a folder."""


def add_flags(parser: Parser, group: Any) -> None:
    """The flags of `Beside`; `group` has their line in --help."""
    flags = {f"--{k}": {"default": getattr(NOTHING, k), **about} for k, about in FLAGS.items()}
    parser.add_more("--help_files", "checkpoints and LoRAs in files", flags, group=group)


def given(args: Namespace) -> list[str]:
    """The flags of `Beside` that are not at their default."""
    return [name for name in FLAGS if getattr(args, name) != getattr(NOTHING, name)]


def beside(args: Namespace, *paths: str | None) -> Beside:
    """Those flags, for checkpoints at `paths`. Raises UserError for one that has no use."""
    if not any(path and is_file(path) for path in paths):
        for name in given(args):
            if name in OF_FILES:
                raise UserError(
                    f"--{name} goes with a .safetensors checkpoint; leave it out for folders"
                )
    return Beside(**{name: getattr(args, name) for name in FLAGS})


def is_file(path: str | Path) -> bool:
    """Whether a checkpoint is meant as one file: it is one, or has the ending of one."""
    path = Path(path)
    return path.is_file() or (path.suffix in (".safetensors", *PICKLES) and not path.is_dir())
