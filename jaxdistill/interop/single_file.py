"""A checkpoint in one file, as model sites offer it, read as the pipeline that it stands for.

The file holds weights, under the names of `original_layout` or of diffusers. What it does not say
(heads, norm groups, tokenizers, the schedule) comes from the published configs of its family, or
from a pipeline folder of its kind.
"""

import functools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxdistill.interop import (
    NOTHING,
    Beside,
    architectures,
    diffusers_folder,
    families,
    is_file,
    lora_files,
    marks,
    torch_weights,
)
from jaxdistill.interop.diffusers_folder import KEY, Folder, FolderError, Part
from jaxdistill.interop.loose_parts import part_at, text_beside, vae_beside
from jaxdistill.interop.original_layout import UNET, averaged, origin
from jaxdistill.interop.recognise import (
    Place,
    Shapes,
    UNetFacts,
    check_other,
    check_unet,
    family,
    read_header,
    text_places,
    unet_place,
    vae_place,
)

EXTRAS = (
    "alphas_cumprod",
    "betas",
    "denoiser.",
    "log_one_minus_alphas_cumprod",
    "logvar",
    "lvlb_weights",
    "model_ema.",
    "posterior_",
    "scale_factor",
    "sqrt_",
)
"""Beginnings of tensors that are no weights: buffers of the schedule, and averages."""
EXTRA_ENDS = ("attn_mask", "logit_scale", "position_ids")
"""The same, ends."""
AVERAGES = "model_ema.diffusion"
"""What the names of a UNet's averaged tensors begin with."""


def open_checkpoint(path: str | Path, beside: Beside = NOTHING, **options: Any) -> Folder:
    """A pipeline folder or a single file, with what is named beside it. Raises FolderError,
    LoraError.
    """
    path = Path(path).expanduser()
    if is_file(path):
        found = open_file(path, beside, **options)
    else:
        found = families.open_folder(path, **options)
        encoders = text_beside(found, beside.text_encoder)
        found = found._replace(
            vae=vae_beside(found, beside.vae) or found.vae,
            text_encoders=tuple(a or b for a, b in zip(encoders, found.text_encoders, strict=True)),
        )
    return lora_files.styled(found._replace(clip_skip=beside.clip_skip), beside.loras)


def open_file(path: str | Path, beside: Beside, **options: Any) -> Folder:
    """Check a single file and describe its components. Reads names and configs only.

    Args:
      path: the file, safetensors.
      beside: what is named beside it; of `like` the weights of what the file lacks are taken, too.
      **options: as of `families.open_folder`.

    Raises:
      FolderError: no such file, a pickle, another family or task, another kind than `like`, tensors
        of no component, a component that is nowhere, marks that disagree.
    """
    path = Path(path)
    whole = path.absolute().parent.parent
    if path.is_file() and (whole / "model_index.json").is_file():
        raise FolderError(f"{path} is a part of a pipeline folder; give that: {whole}")
    shapes, metadata = read_header(path)
    place = unet_place(shapes) or check_other(path, shapes)
    facts = check_unet(path, shapes, place)
    told = marks.told(path, shapes, metadata, beside.prediction)
    if beside.like:
        base = _like(path, facts, beside, **options)
        if told is not None:
            _say(f"{path} {told.short}")
    else:
        kind = family(path, facts)
        told = told or marks.assumed(path, shapes, place, kind.name)
        _say(f"{path} is {kind.title} ({kind.reason}) and {told.short}")
        name = kind.name + ("-base" if (kind.name, told.prediction) == ("sd21", "epsilon") else "")
        base = families.open_folder(architectures.pipeline_folder(name), **options)
        _check_sizes(path, part_at(base.network, path, shapes, place), kind.title)
    plain = {key: value for key, value in base.scheduler.items() if key != KEY}
    found = base._replace(file=path, scheduler=plain)
    if told is not None:
        scheduler = told.scheduler(plain, published=not beside.like)
        found = found._replace(scheduler=scheduler)
    own = student_scheduler(path, metadata)
    if own and not beside.prediction:
        found = found._replace(scheduler=own)
    found = found._replace(network=_unet(found.network, path, shapes, place, ema=beside.ema))
    return _completed(found, path, shapes, place, beside)


def student_scheduler(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The scheduler's config that a student's file has in its metadata, with what it was made for
    under KEY; {} of other files. Raises FolderError.
    """
    try:
        found = json.loads(metadata.get(KEY, "{}"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise FolderError(f"{path}: {KEY} in its metadata is damaged; write the file anew")
    return found


def _like(path: Path, facts: UNetFacts, beside: Beside, **options: Any) -> Folder:
    """The folder that is named for configs, once it is of the file's kind."""
    base = families.open_folder(Path(beside.like).expanduser(), **options)
    if facts.label != base.xl:
        kinds = {True: "SDXL", False: "Stable Diffusion 1.x or 2.x"}
        raise FolderError(
            f"{path} is {kinds[facts.label]}, but {base.path} is {kinds[base.xl]}; give a folder of"
            " the file's kind"
        )
    return base


def _unet(part: Part, path: Path, shapes: Shapes, place: Place, *, ema: bool) -> Part:
    """The UNet, or its averages."""
    found = part_at(part, path, shapes, place)
    if place.prefix != UNET or not any(name.startswith(AVERAGES) for name in shapes):
        return found
    _say(f"{path}: of the UNet the {'averaged weights' if ema else 'weights as trained'} are taken")
    if not ema:
        return found
    plain = origin(part.module, UNET)
    return found._replace(origin=lambda name: averaged(plain(name)), prefix=AVERAGES)


def _check_sizes(path: Path, part: Part, title: str) -> None:
    """Raise FolderError for a UNet that the published config does not describe. A few tensors that
    are missing are told of when the weights are read.
    """
    wanted = torch_weights.names_of(diffusers_folder.abstract_params(part))
    found = part.weights().shapes
    other = [n for n, shape in wanted.items() if n in found and found[n] != shape]
    missing, left = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    if not other and (not missing or (len(missing) < 10 and not left)):
        return
    name = min(other or missing or left)
    sizes = f"{name} is {list(found[name])}" if name in found else f"it has no {name}"
    if name in wanted and name in found:
        sizes += f", not {list(wanted[name])}"
    raise FolderError(
        f"{path} looks like {title}, but differs from the published model ({sizes}); give a"
        " pipeline folder of its kind, weights or not: --like=FOLDER, in a config"
        " config.teacher.like"
    )


def _completed(found: Folder, path: Path, shapes: Shapes, place: Place, beside: Beside) -> Folder:
    """The folder with the VAE and the text encoders of the file, or of what is named beside it."""
    vae, texts = vae_place(shapes), text_places(shapes)
    own = () if place.prefix == UNET else ("",)
    prefixes = [place.prefix, *(p.prefix for p in (vae, *texts) if p)]
    known = (*(p for p in prefixes if p), *EXTRAS)
    strange = sorted(
        name
        for name in shapes
        if not own
        and not name.startswith(known)
        and not name.endswith(EXTRA_ENDS)
        and name not in marks.KEYS
    )
    if strange:
        raise FolderError(
            f"{path} has {len(strange)} tensors of no known component, such as {strange[0]}"
        )

    def part(named: Part | None, at: Place | None, fallback: Part, flag: str) -> Part:
        if named is not None:
            return named
        if at is not None:
            return part_at(fallback, path, shapes, at)
        try:
            fallback.files()
        except FolderError:
            raise FolderError(
                f"{path} has no {fallback.folder.name}; name one beside it:"
                f" --{flag}=FILE_OR_FOLDER, in a config config.teacher.{flag}"
            ) from None
        _say(f"{path} has no {fallback.folder.name}: taken from {fallback.folder}")
        return fallback

    named = text_beside(found, beside.text_encoder)
    places = _encoder_places(texts, len(found.text_encoders))
    encoders = zip(named, places, found.text_encoders, strict=True)
    return found._replace(
        vae=part(vae_beside(found, beside.vae), vae, found.vae, "vae"),
        text_encoders=tuple(part(*each, "text_encoder") for each in encoders),
    )


def _encoder_places(places: Sequence[Place], count: int) -> list[Place | None]:
    """For each text encoder its place in the file; XL's names have the number."""
    if count == 1:
        return [next(iter(places), None)]
    numbers = [re.search(r"embedders\.(\d)\.", place.prefix) for place in places]
    found = {int(m[1]) if m else i: p for i, (m, p) in enumerate(zip(numbers, places, strict=True))}
    return [found.get(i) for i in range(count)]


@functools.cache
def _say(line: str) -> None:
    """Once a process: a command may open a file twice."""
    print(line, file=sys.stderr)
