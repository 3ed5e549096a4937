"""PixArt-α and PixArt-Σ: T5's text under its mask, a transformer that predicts noise, a schedule of
betas.

A caption is lower-cased and stripped, as the stock pipelines do with clean_caption=False; by
default these rewrite it by rules of their own where bs4 and ftfy are installed. An image has the
size that is asked for: stock pipelines draw the nearest of a table of sizes and resize, unless they
are called with use_resolution_binning=False.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdistill.interop import components, t5_tokenizer
from jaxdistill.interop.clip_tokenizer import Tokens, check_text
from jaxdistill.interop.components import check_config
from jaxdistill.interop.diffusers_folder import Folder, FolderError
from jaxdistill.interop.families.family import Encode, Family
from jaxdistill.interop.t5_tokenizer import T5Tokenizer
from jaxdistill.models.text.t5 import T5Encoder
from jaxdistill.models.transformers.pixart import PixArt

KEYS = (
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "num_layers",
    "cross_attention_dim",
    "attention_bias",
    "sample_size",
    "patch_size",
    "norm_elementwise_affine",
    "norm_eps",
    "interpolation_scale",
    "use_additional_conditions",
    "caption_channels",
    # Nothing that is computed here hangs on these.
    "dropout",
    "norm_num_groups",
    "num_embeds_ada_norm",
    "upcast_attention",
)
FIXED: dict[str, tuple[Any, ...]] = {
    "activation_fn": ("gelu-approximate",),
    "norm_type": ("ada_norm_single",),
    "attention_type": ("default", None),
}
TOLD = 128
"""The sample_size (1024 pixels) of networks that PixArtAlphaPipeline tells the image's sizes."""


def network(config: Mapping[str, Any], where: Path, *, alpha: bool, **options: Any) -> PixArt:
    """The network of a PixArtTransformer2DModel's config; diffusers before 0.28 called the class
    Transformer2DModel, and left out what follows from sample_size.

    Args:
      config: its content.
      where: its file.
      alpha: whether the pipeline is PixArtAlphaPipeline.
      options: attention, remat, scan, dtype.

    Raises FolderError.
    """
    check_config(config, where, KEYS, FIXED)
    channels, side = config.get("in_channels", 4), config.get("sample_size", TOLD)
    scale, sizes = config.get("interpolation_scale"), config.get("use_additional_conditions")
    patch, text = config.get("patch_size", 2), config.get("caption_channels")
    crossed = config.get("cross_attention_dim", 1152)
    module = PixArt(
        in_channels=channels,
        out_channels=config.get("out_channels", 8) or channels,
        heads=config.get("num_attention_heads", 16),
        head_dim=config.get("attention_head_dim", 72),
        depth=config.get("num_layers", 28),
        patch=patch,
        base=side // patch,
        interpolation=float(max(side // 64, 1) if scale is None else scale),
        sizes=side == TOLD if sizes is None else bool(sizes),
        context=text or crossed,
        projected=text is not None,
        qkv_bias=bool(config.get("attention_bias", True)),
        eps=float(config.get("norm_eps", 1e-6)),
        affine=bool(config.get("norm_elementwise_affine", False)),
        **options,
    )
    if module.sizes and not (alpha and side == TOLD):
        raise FolderError(
            f"{where}: use_additional_conditions is on, but only PixArtAlphaPipeline tells a"
            f" network the image's sizes, and that of sample_size = {TOLD}; set it to false"
        )
    _check_widths(module, crossed, where)
    return module


def _check_widths(module: PixArt, crossed: int | None, where: Path) -> None:
    """Raise FolderError for widths that do not fit each other; `crossed`: cross_attention_dim."""
    width, multiple = module.heads * module.head_dim, 12 if module.sizes else 4
    if width % multiple:
        raise FolderError(
            f"{where}: num_attention_heads x attention_head_dim = {width} must be a multiple of"
            f" {multiple}"
        )
    if crossed is None or (module.projected and crossed != width):
        raise FolderError(
            f"{where}: cross_attention_dim = {crossed} must be num_attention_heads x"
            f" attention_head_dim = {width}"
        )
    allowed = (module.in_channels, 2 * module.in_channels)
    if module.out_channels not in allowed:
        raise FolderError(
            f"{where}: out_channels = {module.out_channels} must be {allowed[0]}, or {allowed[1]}"
            " with the learned variance"
        )


class Captions(T5Tokenizer):
    """T5's tokenizer of lower-cased captions without spaces around them."""

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Raises UserError for a prompt that is no text."""
        return super().__call__([check_text(text).lower().strip() for text in texts])


class PixArtAlpha(Family):
    """PixArt-α: 120 tokens; of 1024 pixels the image's sizes are an input."""

    name = "pixart-alpha"
    pipelines: tuple[str, ...] = ("PixArtAlphaPipeline",)
    networks = ("PixArtTransformer2DModel", "Transformer2DModel")
    encoders: Mapping[str, tuple[str, ...]] = {"text_encoder": ("T5EncoderModel",)}
    tokenizers: Mapping[str, tuple[str, ...]] = {"tokenizer": ("T5Tokenizer", "T5TokenizerFast")}
    steps = 20
    guidance = 4.5
    words = 120
    tells_sizes = True
    adapter = True
    call: Mapping[str, Any] = {"use_resolution_binning": False, "clean_caption": False}

    def network_module(self, config: Mapping[str, Any], where: Path, **options: Any) -> PixArt:
        """See `Family`."""
        return network(config, where, alpha=self.tells_sizes, **options)

    def check_tokenizer(self, folder: Path) -> None:
        """See `Family`."""
        t5_tokenizer.check_files(folder)

    def encoder_module(
        self, component: str, config: Mapping[str, Any], where: Path, *, dtype: Any
    ) -> T5Encoder:
        """See `Family`."""
        return components.t5_module(config, where, dtype=dtype)

    def check(self, folder: Folder) -> None:
        """See `Family`."""
        module, where = folder.network.module, folder.path / "transformer" / "config.json"
        key = "caption_channels" if module.projected else "cross_attention_dim"
        components.check_widths(folder, where, key, module.context)

    def open_tokenizers(self, folder: Folder) -> list[Any]:
        """See `Family`. Raises ValueError for a clip_skip, which T5 does not have."""
        if folder.clip_skip:
            raise ValueError(f"clip_skip must be 0 of PixArt (T5), got {folder.clip_skip}")
        return [Captions(path, self.words) for path in folder.tokenizers]

    def encode(self, folder: Folder) -> Encode:
        """See `Family`: padding is seen neither in T5 nor by the network."""
        module = folder.text_encoders[0].module

        def encode(
            params: Sequence[Any], ids: Sequence[Array], masks: Sequence[Array], skip: int
        ) -> dict[str, Array]:
            del skip
            states = module.apply(params[0], ids[0], masks[0])
            return {
                "context": states.astype(jnp.float32),
                "mask": masks[0].astype(jnp.float32),
            }

        return encode

    def at_size(self, folder: Folder, height: int, width: int) -> dict[str, np.ndarray]:
        """See `Family`."""
        if not folder.network.module.sizes:
            return {}
        return {
            "resolution": np.asarray([height, width], np.float32),
            "aspect_ratio": np.asarray([height / width], np.float32),
        }

    def multiple(self, folder: Folder) -> int:
        """See `Family`."""
        return math.lcm(8, folder.vae.module.factor * folder.network.module.patch)

    def native_size(self, folder: Folder) -> tuple[int, int]:
        """See `Family`."""
        side = folder.network.config.get("sample_size", TOLD) * folder.vae.module.factor
        return side, side

    def image_tokens(self, folder: Folder, height: int, width: int) -> int:
        """See `Family`."""
        return height * width // (folder.vae.module.factor * folder.network.module.patch) ** 2

    def sized_config(self, folder: Folder, size: tuple[int, int]) -> dict[str, Any]:
        """See `Family`. As it was: on sample_size hang the network's positions and whether it is
        told the image's sizes, so stock diffusers must be told the size.
        """
        del size
        return dict(folder.network.config)


class PixArtSigma(PixArtAlpha):
    """PixArt-Σ: 300 tokens, no sizes."""

    name = "pixart-sigma"
    pipelines = ("PixArtSigmaPipeline",)
    words = 300
    tells_sizes = False
