"""A checkpoint in one file, as model sites offer it, read as the pipeline that it stands for.

The file holds weights under the names of `original_layout`. What it does not say (heads, norm
groups, tokenizers, the schedule) comes from a pipeline folder of its kind.
"""

import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from jaxdistill.interop import NOTHING, PICKLES, Beside, diffusers_folder, is_file, lora_files
from jaxdistill.interop.diffusers_folder import Folder, FolderError, Part
from jaxdistill.interop.original_layout import (
    OPEN_TEXT,
    TEXT,
    UNET,
    VAE,
    XL_TEXT,
    averaged,
    origin,
)

EXTRAS = (
    "alphas_cumprod",
    "betas",
    "cond_stage_model.logit_scale",
    "edm_",
    "log_one_minus_alphas_cumprod",
    "logvar",
    "lvlb_weights",
    "model_ema.",
    "posterior_",
    "scale_factor",
    "sqrt_",
)
"""Beginnings of tensors that are no weights: buffers of the schedule, and averages."""
AVERAGES = "model_ema.diffusion"
"""What the names of a UNet's averaged tensors begin with."""
MARKS = ("v_pred", "ztsnr")
"""Keys that say of a model that it predicts v, and has zero terminal SNR."""
PREDICTIONS = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
}
"""Of modelspec's metadata -> of a scheduler's config."""


def open_checkpoint(path: str | Path, beside: Beside = NOTHING, **options: Any) -> Folder:
    """A pipeline folder or a single file, with what is named beside it. Raises FolderError,
    LoraError.
    """
    if is_file(path):
        found = open_file(path, beside, **options)
    else:
        found = diffusers_folder.open_folder(path, **options)
    found = found._replace(clip_skip=beside.clip_skip)
    return lora_files.styled(found, beside.loras)


def open_file(path: str | Path, beside: Beside, *, ema: bool = True, **options: Any) -> Folder:
    """Check a single file and describe its components. Reads names and configs only.

    Args:
      path: the file, safetensors.
      beside: what is named beside it; of `like` the weights of what the file lacks are taken, too.
      ema: take the averaged weights of the UNet where the file has both.
      **options: as of `diffusers_folder.open_folder`.

    Raises:
      FolderError: no such file, a pickle, another kind than `like`, tensors of no component, marks
        that disagree.
    """
    path = Path(path)
    names, metadata = _header(path)
    if not beside.like:
        raise FolderError(
            f"{path} holds weights only; give a pipeline folder of its kind for configs and"
            " tokenizers: --like=FOLDER, in a config config.teacher.like"
        )
    base = diffusers_folder.open_folder(beside.like, **options)
    prefixes = _kind(path, names, base)
    known = (UNET, VAE, *(prefix for prefix in prefixes if prefix), *EXTRAS)
    strange = sorted(n for n in names if not n.startswith(known) and n not in MARKS)
    if strange:
        raise FolderError(
            f"{path} has {len(strange)} tensors of no known component, such as {strange[0]}"
        )

    def part(found: Part, prefix: str) -> Part:
        if not prefix or not _has(names, prefix):
            print(f"{path} has no {found.folder.name}: taken from {found.folder}", file=sys.stderr)
            return found
        short = f"{prefix}embeddings.token_embedding.weight" in names
        where = origin(found.module, prefix, short=short)
        return found._replace(file=path, origin=where, prefix=prefix)

    unet = part(base.unet, UNET)
    if ema and _has(names, AVERAGES):
        print(f"{path}: the averaged weights of the UNet are taken", file=sys.stderr)
        plain = origin(base.unet.module, UNET)
        unet = unet._replace(origin=lambda name: averaged(plain(name)), prefix=AVERAGES)
    encoders = zip(base.text_encoders, prefixes, strict=True)
    return base._replace(
        file=path,
        unet=unet,
        vae=part(base.vae, VAE),
        text_encoders=tuple(part(found, prefix) for found, prefix in encoders),
        scheduler=_scheduler(path, names, metadata, base.scheduler),
    )


def _header(path: Path) -> tuple[Collection[str], Mapping[str, str]]:
    """The names of a file's tensors, and its metadata."""
    if path.suffix in PICKLES:
        raise FolderError(
            f"{path} is a pickle, which can run code when it is read; save it as safetensors in a"
            " program that you trust it to, such as the one it was made with"
        )
    try:
        with safe_open(str(path), "numpy") as file:
            return set(file.keys()), dict(file.metadata() or {})
    except FileNotFoundError:
        raise FolderError(f"{path} does not exist; give a .safetensors file") from None
    except (SafetensorError, OSError) as error:
        raise FolderError(
            f"{path} cannot be read as safetensors ({error}); it may be truncated; copy it again"
        ) from None


def _has(names: Collection[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def _kind(path: Path, names: Collection[str], base: Folder) -> tuple[str, ...]:
    """The prefixes of the text encoders, "" for one that the file lacks, once the file is of the
    folder's kind.
    """
    if not _has(names, UNET):
        some = ", ".join(sorted(names)[:3])
        raise FolderError(
            f"{path} has no UNet under {UNET}* (it has {some}, ...); checkpoints of Stable"
            " Diffusion 1.x, 2.x and XL are read"
        )
    xl = _has(names, f"{UNET}label_emb.") or _has(names, "conditioner.")
    if xl != base.xl:
        kinds = {True: "SDXL", False: "Stable Diffusion 1.x or 2.x"}
        raise FolderError(
            f"{path} is {kinds[xl]}, but {base.path} is {kinds[base.xl]}; give a folder of the"
            " file's kind"
        )
    if xl:
        return tuple(prefix if _has(names, prefix) else "" for prefix in XL_TEXT)
    return (next((prefix for prefix in (TEXT, OPEN_TEXT) if _has(names, prefix)), ""),)


def _scheduler(
    path: Path, names: Collection[str], metadata: Mapping[str, str], base: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The folder's scheduler, with what the file's marks say of the prediction."""
    told = metadata.get("modelspec.prediction_type", "")
    if told and told not in PREDICTIONS:
        raise FolderError(
            f"{path}: modelspec.prediction_type = {told!r} in its metadata is not supported, only"
            f" {' or '.join(map(repr, PREDICTIONS))}"
        )
    said = PREDICTIONS.get(told)
    if "v_pred" in names and said == "epsilon":
        raise FolderError(
            f"{path} disagrees with itself: its key v_pred says v prediction, its metadata"
            f" modelspec.prediction_type = {told!r}"
        )
    found = "v_prediction" if "v_pred" in names else said
    changes: dict[str, Any] = {"prediction_type": found} if found else {}
    if "ztsnr" in names:
        changes["rescale_betas_zero_snr"] = True
    changed = {
        k: v for k, v in changes.items() if base.get(k, "epsilon" if k[0] == "p" else None) != v
    }
    if changed:
        text = ", ".join(f"{name} = {value}" for name, value in changed.items())
        print(f"{path}: {text}, as its marks say", file=sys.stderr)
    return {**base, **changes}
