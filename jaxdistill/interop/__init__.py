"""Formats of other projects, in and out."""

import json
import re
from argparse import Action, Namespace
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
      clip_skip: layers at the end of the text encoders that are left out, as in diffusers.
      loras: files of LoRAs that are added to the weights, FILE or FILE:WEIGHT.
    """

    like: str | Path = ""
    vae: str = ""
    text_encoder: str = ""
    prediction: str = ""
    ema: bool = True
    clip_skip: int = 0
    loras: tuple[str, ...] = ()


NOTHING = Beside()


class Several(Action):
    """A flag whose values are separated by commas, or have one flag each: a tuple."""

    def __call__(self, parser: Any, namespace: Namespace, values: Any, option: Any = None) -> None:
        """Add the values."""
        setattr(namespace, self.dest, (*getattr(namespace, self.dest), *values.split(",")))


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
    "clip_skip": {
        "type": int,
        "metavar": "N",
        "help": "text layers left out, as in diffusers; 1 is A1111's clip skip 2",
    },
    "loras": {
        "flag": "lora",
        "action": Several,
        "metavar": "FILE:WEIGHT,FILE",
        "help": "LoRAs to add; a weight is 1 by default",
    },
}
"""The flags of `Beside`'s fields; `flag` is a name that is not the field's."""

OF_FILES = ("like", "prediction", "ema")
"""Those of no use for a folder."""

AS = {
    "metavar": "NAME",
    "help": "draw the student as its kind is: lcm, turbo, lightning:N, hyper:N, dmd2, dmd2:1",
}
"""The flag --as of a published student, `known_students.known`."""


def add_flags(parser: Parser, group: Any, *, known: bool = True) -> None:
    """The flags of `Beside` and, where students are drawn, --as; `group` has their line in
    --help.
    """
    flags = {}
    for name, about in FLAGS.items():
        options = {"dest": name, "default": getattr(NOTHING, name), **about}
        flags[f"--{options.pop('flag', name)}"] = options
    if known:
        flags["--as"] = AS
    parser.add_more("--help_files", "checkpoints and LoRAs in files", flags, group=group)


def given(args: Namespace) -> list[str]:
    """The flags of `Beside` that are not at their default."""
    changed = [name for name in FLAGS if getattr(args, name) != getattr(NOTHING, name)]
    return [FLAGS[name].get("flag", name) for name in changed]


def beside(args: Namespace, *paths: str | None) -> Beside:
    """Those flags, for checkpoints at `paths`. Raises UserError for one that has no use."""
    if not any(path and is_file(path) for path in paths):
        for name in given(args):
            if name in OF_FILES:
                raise UserError(
                    f"--{name} goes with a .safetensors checkpoint; leave it out for folders"
                )
    named: dict[str, Any] = {name: getattr(args, name) for name in FLAGS}
    return Beside(**named | {"loras": tuple(args.loras)})


def check_unused(args: Namespace, path: str | Path) -> None:
    """Raise UserError where something is named beside what is no pipeline folder or single file;
    a text encoder goes with a benchmark's export, too.
    """
    for flag in given(args):
        if flag != "text_encoder":
            raise UserError(
                f"--{flag} goes with a pipeline folder or a single file, not with {path}"
            )


def is_file(path: str | Path) -> bool:
    """Whether a checkpoint is meant as one file: it is one, or has the ending of one."""
    path = Path(path)
    return path.is_file() or (path.suffix in (".safetensors", *PICKLES) and not path.is_dir())


def explain_path(path: str | Path) -> str:
    """Why nothing can be drawn from a path: what is there instead of a checkpoint, and what to
    give. One line.
    """
    root = Path(path)
    try:
        names = sorted(entry.name for entry in root.iterdir())
    except FileNotFoundError:
        return _explain_missing(root)
    except NotADirectoryError:
        return (
            f"{root} is a file; give a pipeline folder, or a checkpoint that ends in .safetensors"
        )
    except OSError as error:
        return f"{root} cannot be read ({error.strerror}); give this user the right to read it"
    start = f"{root} is not a pipeline folder"
    if run := [name for name in ("diffusers", "student") if name in names]:
        return f"{start}: it is a run's workdir; give {root / run[0]}"
    if "config.json" in names:
        try:
            kind = json.loads((root / "config.json").read_text())["_class_name"]
        except (OSError, ValueError, KeyError, TypeError):
            kind = "one model"
        above = root.resolve().parent
        mend = (
            f"give {above}" if (above / "model_index.json").is_file() else "give a whole pipeline"
        )
        return f"{start}: it is one network ({kind}); {mend}"
    for name in names:
        if (root / name / "model_index.json").is_file():
            return f"{start}, but holds one; give {root / name}"
    if "card.json" in names:
        return f"{start}: it is an export of a model that reads no text; give one that does"
    if {"adapter_config.json", "pytorch_lora_weights.safetensors"} & {*names}:
        return f"{start}: it holds a LoRA; give the checkpoint that it belongs to"
    if whole := [name for name in names if name.endswith(".safetensors")]:
        return f"{start}, but holds files of weights; give one of them, as {root / whole[0]}"
    return (
        f"{start}: it has no model_index.json, as diffusers' save_pretrained writes it, and no"
        " card.json, as a run's student/ has"
    )


def _explain_missing(path: Path) -> str:
    """`explain_path` where nothing is."""
    if path.is_symlink():
        return f"{path} is a link to {path.readlink()}, which does not exist; copy the files there"
    if str(path).startswith("~"):
        return f"{path}: the shell did not replace ~ here; give {path.expanduser()}"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.parent.exists():
        return (
            f"{path} does not exist; if it is a name on a hub: nothing is downloaded here, so"
            f" download it (hf download {path} --local-dir FOLDER) and give the folder"
        )
    return f"{path} does not exist; give a pipeline folder or a .safetensors checkpoint"
