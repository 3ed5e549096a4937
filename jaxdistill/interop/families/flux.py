"""FLUX.1 dev and schnell (Black Forest Labs 2024)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array

from jaxdistill.interop import components
from jaxdistill.interop.clip_tokenizer import TextTokenizer, Tokenizer
from jaxdistill.interop.diffusers_folder import Folder, FolderError
from jaxdistill.interop.families.family import Encode, FlowFamily
from jaxdistill.interop.t5_tokenizer import T5Tokenizer
from jaxdistill.models.transformers.flux import PATCH, FluxTransformer

KEYS = (
    "in_channels",
    "num_layers",
    "num_single_layers",
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
    "pooled_projection_dim",
    "guidance_embeds",
    "axes_dims_rope",
)
WORDS = 512
"""Tokens of T5 in a stock pipeline's call, in schnell too."""
NATIVE = 128
"""Latents a side of the stock pipeline's default image."""
WITH_IMAGES = {32: "pictures from a control image", 96: "inpainting"}
"""What networks of so many channels of latents are for, with 16 of noise."""


def module(config: Mapping[str, Any], where: Path, **options: Any) -> FluxTransformer:
    """The network of a FluxTransformer2DModel's config. `options`: attention, remat, scan, dtype.

    Raises FolderError.
    """
    packed = config.get("in_channels", 64)
    fixed = {"patch_size": (1,), "out_channels": (None, packed)}
    components.check_config(config, where, KEYS, fixed)
    axes = tuple(config.get("axes_dims_rope", (16, 56, 56)))
    width = config.get("attention_head_dim", 128)
    if packed % PATCH**2:
        raise FolderError(f"{where}: in_channels = {packed} must divide by {PATCH**2}")
    if len(axes) != 3 or sum(axes) != width or any(axis % 2 for axis in axes):
        raise FolderError(
            f"{where}: axes_dims_rope = {list(axes)} must be three even numbers whose sum is"
            f" attention_head_dim = {width}"
        )
    return FluxTransformer(
        in_channels=packed // PATCH**2,
        context_width=config.get("joint_attention_dim", 4096),
        pooled_width=config.get("pooled_projection_dim", 768),
        heads=config.get("num_attention_heads", 24),
        axes=axes,
        double=config.get("num_layers", 19),
        single=config.get("num_single_layers", 38),
        takes_guidance=bool(config.get("guidance_embeds", False)),
        **options,
    )


class Flux(FlowFamily):
    """FLUX.1. The guidance scale of dev is an input of its network, which is called once a step;
    schnell has no such input, and ignores the scale.
    """

    name = "flux"
    pipelines = ("FluxPipeline",)
    networks = ("FluxTransformer2DModel",)
    encoders: Mapping[str, tuple[str, ...]] = {
        "text_encoder": ("CLIPTextModel",),
        "text_encoder_2": ("T5EncoderModel",),
    }
    tokenizers: Mapping[str, tuple[str, ...]] = {
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "tokenizer_2": ("T5TokenizerFast", "T5Tokenizer"),
    }
    steps = 28
    guidance = 3.5
    negative = False

    def network_module(self, config: Mapping[str, Any], where: Path, **options: Any) -> nn.Module:
        """See `Family`."""
        return module(config, where, **options)

    def encoder_module(
        self, component: str, config: Mapping[str, Any], where: Path, *, dtype: Any
    ) -> nn.Module:
        """See `Family`."""
        if component == "text_encoder_2":
            return components.t5_module(config, where, dtype=dtype)
        return components.text_module(config, where, projection=False, dtype=dtype)

    def check_tokenizer(self, folder: Path) -> None:
        """See `Family`; T5's is checked when it is opened."""
        if folder.name == "tokenizer":
            components.check_clip_files(folder)

    def check(self, folder: Folder) -> None:
        """See `Family`."""
        network, latents = folder.network.module, folder.vae.module.latent_channels
        where = folder.path / "transformer" / "config.json"
        if network.in_channels != latents and network.in_channels in WITH_IMAGES:
            raise FolderError(
                f"{where}: a network of in_channels = {PATCH**2 * network.in_channels} is of"
                f" {WITH_IMAGES[network.in_channels]}: it takes more than noise and text; give a"
                " checkpoint of text to image"
            )
        if network.in_channels != latents:
            raise FolderError(
                f"{where}: in_channels = {PATCH**2 * network.in_channels} is not {PATCH**2} times"
                f" the VAE's {latents}; one of them belongs to another model"
            )
        wanted = {
            "pooled_projection_dim": (network.pooled_width, folder.text_encoders[0]),
            "joint_attention_dim": (network.context_width, folder.text_encoders[1]),
        }
        for key, (width, encoder) in wanted.items():
            if encoder.module.hidden_size != width:
                raise FolderError(
                    f"{where}: {key} is {width}, but {encoder.folder.name} gives"
                    f" {encoder.module.hidden_size}; one of them belongs to another model"
                )

    def open_tokenizers(self, folder: Folder) -> list[TextTokenizer]:
        """See `Family`. Raises ValueError for a clip_skip, which the pipeline does not have."""
        if folder.clip_skip:
            raise ValueError(
                f"clip_skip = {folder.clip_skip}: FLUX reads no such state; leave it 0"
            )
        clip, t5 = folder.tokenizers
        return [Tokenizer(clip, folder.text_encoders[0].module.positions), T5Tokenizer(t5, WORDS)]

    def tokens(self, folder: Folder) -> int:
        """See `Family`."""
        del folder
        return WORDS

    def encode(self, folder: Folder) -> Encode:
        """See `Family`: CLIP's pooled state, and T5's states. Padding is seen as any token."""
        clip, t5 = (part.module for part in folder.text_encoders)

        def encode(
            params: Sequence[Any], ids: Sequence[Array], masks: Sequence[Array], skip: int
        ) -> dict[str, Array]:
            del masks, skip
            return {
                "context": t5.apply(params[1], ids[1]).astype(jnp.float32),
                "pooled": clip.apply(params[0], ids[0]).pooled.astype(jnp.float32),
            }

        return encode

    def guides(self, folder: Folder, scale: float) -> bool:
        """See `Family`: never by its scale."""
        del folder, scale
        return False

    def cfg_scale(self, scale: Any) -> Any:
        """See `Family`: none. A teacher gets its scale as an input, and schnell has none."""
        del scale
        return 1.0

    def native_size(self, folder: Folder) -> tuple[int, int]:
        """See `Family`."""
        side = NATIVE * folder.vae.module.factor
        return side, side

    def sized_config(self, folder: Folder, size: tuple[int, int]) -> dict[str, Any]:
        """See `Family`: a config says no size, and a call of the pipeline must."""
        del size
        return dict(folder.network.config)

    def unpacked(self, latents: np.ndarray, shape: tuple[int, int, int, int]) -> np.ndarray:
        """See `Family`: packed [n, h/2 w/2, 4 c], or [n, c, h, w]. Raises ValueError for a packed
        array of another shape.
        """
        n, c, h, w = shape
        if latents.ndim != 3:
            return latents
        packed = [n, h * w // PATCH**2, c * PATCH**2]
        if list(latents.shape) != packed:
            raise ValueError(
                f"packed latents must be of shape {packed}, got {list(latents.shape)};"
                f" {list(shape)} [n, c, h, w] is taken, too"
            )
        parts = latents.reshape(n, h // PATCH, w // PATCH, c, PATCH, PATCH)
        return parts.transpose(0, 3, 1, 4, 2, 5).reshape(shape)

    def network_time(self, sigma: Array) -> Array:
        """See `FlowFamily`."""
        return sigma
