"""Families of pipelines: which there are, and a folder as one of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxdistill.interop import explain_path
from jaxdistill.interop.diffusers_folder import Folder, FolderError, Part, read_json
from jaxdistill.interop.families.family import Family
from jaxdistill.interop.families.flux import Flux
from jaxdistill.interop.families.pixart import PixArtAlpha, PixArtSigma
from jaxdistill.interop.families.sd3 import StableDiffusion3
from jaxdistill.interop.families.stable_diffusion import StableDiffusion, StableDiffusionXL
from jaxdistill.interop.families.zimage import ZImage

SD, SDXL = StableDiffusion(), StableDiffusionXL()
FAMILIES = (SD, SDXL, StableDiffusion3(), PixArtAlpha(), PixArtSigma(), Flux(), ZImage())
PIPELINES: Mapping[str, Family] = {name: f for f in FAMILIES for name in f.pipelines}
"""Known classes of model_index.json."""
OTHER_TASKS = {
    "Inpaint": "inpainting",
    "Fill": "inpainting",
    "Kontext": "editing by instructions",
    "Redux": "variations of pictures",
    "Upscale": "upscaling",
    "Pix2Pix": "editing by instructions",
    "Depth2Img": "pictures from depth",
    "ControlNet": "pictures from a control image",
    "FluxControl": "pictures from a control image",
    "T2IAdapter": "pictures from a control image",
    "AnimateDiff": "video",
    "Video": "video",
}
"""Parts of the names of pipelines whose networks take more than noise and text."""


def _read_index(root: Path) -> tuple[dict[str, Any], Family, dict[str, str]]:
    """model_index.json, its family, and the tokenizer of each text encoder that is there. Raises
    FolderError.
    """
    where = root / "model_index.json"
    if not where.is_file():
        raise FolderError(explain_path(root))
    index: dict[str, Any] = read_json(where)
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in PIPELINES:
        raise FolderError(f"{where}: {_other_pipeline(index)}")
    family = PIPELINES[name]

    def check(component: str, classes: tuple[str, ...]) -> None:
        entry = index.get(component)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        allowed = " or ".join(classes)
        if found is None and component in {**family.encoders, **family.tokenizers}:
            spare = f"; only {' and '.join(family.optional)} may be left out" * bool(
                family.optional
            )
            raise FolderError(
                f"{where} names no {component}, which {name} needs ({allowed}){spare}; save the"
                " whole pipeline"
            )
        if found not in classes:
            raise FolderError(
                f"{where}: {component} is of class {found!r}; only {allowed} is supported"
            )

    check(family.network, family.networks)
    check("vae", ("AutoencoderKL",))
    encoders = {}
    for encoder, tokenizer in zip(family.encoders, family.tokenizers, strict=True):
        if encoder in family.optional and (index.get(encoder) or [None])[0] is None:
            continue
        check(encoder, family.encoders[encoder])
        check(tokenizer, family.tokenizers[tokenizer])
        encoders[encoder] = tokenizer
    return index, family, encoders


def _other_pipeline(index: Mapping[str, Any]) -> str:
    """Why a pipeline is not supported, and what is."""
    name = str(index.get("_class_name"))
    shown = f"the pipeline {index.get('_class_name')!r}"
    task = next((task for part, task in OTHER_TASKS.items() if part in name), "")
    refiner = "XLImg2Img" in name and (index.get("text_encoder") or [None])[0] is None
    if refiner:
        return f"{shown} is XL's refiner, which ends another's work; give the base"
    if "Img2Img" in name and not task:
        same = name.replace("Img2Img", "")
        same = same if same in PIPELINES else "StableDiffusionPipeline"
        return (
            f"{shown} starts from pictures; its networks may be those of text to"
            f" image: then save them as {same}"
        )
    does = f" is of {task}; it" if task else ""
    return f"{shown}{does} is not supported, only {', '.join(PIPELINES)}"


def open_folder(
    path: str | Path,
    *,
    attention: str = "auto",
    remat: str = "none",
    scan: bool = False,
    dtype: Any = jnp.float32,
) -> Folder:
    """Check a pipeline folder and describe its components. Reads configs only.

    Args:
      path: holds model_index.json.
      attention: of the networks, as in `UNetCondition`.
      remat: of the network that is distilled, as in `UNetCondition`.
      scan: of that network: its blocks of one kind as a loop.
      dtype: of the computation of all networks.

    Raises:
      FolderError: no pipeline folder, an unknown pipeline, component or setting, missing files; one
        line that names it.
    """
    root = Path(path)
    index, family, encoders = _read_index(root)
    options = {"attention": attention, "dtype": dtype}

    def part(component: str, stem: str, make: Any, **more: Any) -> Part:
        where = root / component / "config.json"
        config = read_json(where)
        try:
            return Part(make(config, where, **more), config, where.parent, stem)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, FolderError):
                raise
            raise FolderError(
                f"{where} is damaged: {type(error).__name__} {error}; copy it again"
            ) from None

    def encoder(name: str) -> Part:
        return part(name, "model", lambda *about: family.encoder_module(name, *about, dtype=dtype))

    stem, network = "diffusion_pytorch_model", family.network_module
    zeros = family.xl and bool(index.get("force_zeros_for_empty_prompt", True))
    found = Folder(
        path=root,
        components=index,
        family=family,
        text_encoders=tuple(encoder(name) for name in encoders),
        network=part(family.network, stem, network, remat=remat, scan=scan, **options),
        vae=part("vae", stem, family.vae_module, **options),
        encoder_names=tuple(encoders),
        tokenizers=tuple(root / name for name in encoders.values()),
        scheduler=read_json(root / "scheduler" / "scheduler_config.json"),
        zero_empty_prompt=zeros,
    )
    family.check(found)
    for tokenizer in found.tokenizers:
        family.check_tokenizer(tokenizer)
    return found
