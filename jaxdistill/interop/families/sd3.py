"""Stable Diffusion 3 and 3.5: CLIP-L, CLIP-G and T5, a transformer of two streams, flow matching.

The text is CLIP's tokens, then T5's 256, whose padding counts; a folder without T5 has zeros there.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from jaxdistill.interop import components, t5_tokenizer
from jaxdistill.interop.clip_tokenizer import TextTokenizer, Tokenizer
from jaxdistill.interop.components import check_config
from jaxdistill.interop.diffusers_folder import Folder, FolderError
from jaxdistill.interop.families.family import Encode, FlowFamily
from jaxdistill.interop.t5_tokenizer import T5Tokenizer
from jaxdistill.models.transformers.mmdit import MMDiT

T5_TOKENS = 256
"""Of the stock pipeline's call, max_sequence_length."""
CLIP_TOKENS = 77
"""Where no tokenizer says another number."""
CLIPS, T5 = ("text_encoder", "text_encoder_2"), "text_encoder_3"
KEYS = (
    "sample_size",
    "patch_size",
    "in_channels",
    "num_layers",
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
    "caption_projection_dim",
    "pooled_projection_dim",
    "out_channels",
    "pos_embed_max_size",
    "dual_attention_layers",
)
FIXED: dict[str, tuple[Any, ...]] = {"qk_norm": (None, "rms_norm")}


def network(config: Mapping[str, Any], where: Path, **options: Any) -> MMDiT:
    """The network of an SD3Transformer2DModel's config. `options`: attention, remat, scan, dtype.

    Raises FolderError.
    """
    check_config(config, where, KEYS, FIXED)
    channels, positions = config.get("in_channels", 16), config.get("pos_embed_max_size", 96)
    if not isinstance(positions, int) or positions < 1:
        raise FolderError(
            f"{where}: pos_embed_max_size = {positions!r} must be a whole number of at least 1"
        )
    module = MMDiT(
        in_channels=channels,
        out_channels=config.get("out_channels", 16) or channels,
        patch=config.get("patch_size", 2),
        layers=config.get("num_layers", 18),
        heads=config.get("num_attention_heads", 18),
        head_dim=config.get("attention_head_dim", 64),
        positions=positions,
        sample_size=config.get("sample_size", 128),
        dual=tuple(config.get("dual_attention_layers") or ()),
        qk_norm=config.get("qk_norm") is not None,
        context=config.get("joint_attention_dim", 4096),
        pooled=config.get("pooled_projection_dim", 2048),
        **options,
    )
    width, caption = module.heads * module.head_dim, config.get("caption_projection_dim", 1152)
    if caption != width:
        raise FolderError(
            f"{where}: caption_projection_dim = {caption} must be num_attention_heads x"
            f" attention_head_dim = {width}: text and image attend to each other"
        )
    if width % 4:
        raise FolderError(
            f"{where}: num_attention_heads x attention_head_dim = {width} must be a multiple of 4"
        )
    return module


class StableDiffusion3(FlowFamily):
    """SD 3 and 3.5, medium and large."""

    name = "sd3"
    pipelines = ("StableDiffusion3Pipeline",)
    networks = ("SD3Transformer2DModel",)
    encoders: Mapping[str, tuple[str, ...]] = {
        **dict.fromkeys(CLIPS, ("CLIPTextModelWithProjection",)),
        T5: ("T5EncoderModel",),
    }
    tokenizers: Mapping[str, tuple[str, ...]] = {
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "tokenizer_3": ("T5Tokenizer", "T5TokenizerFast"),
    }
    optional = (T5,)
    steps = 28
    guidance = 7.0
    sigmas = "scheduler"

    def network_time(self, sigma: Array) -> Array:
        """See `FlowFamily`."""
        return 1000.0 * sigma

    def network_module(self, config: Mapping[str, Any], where: Path, **options: Any) -> MMDiT:
        """See `Family`."""
        return network(config, where, **options)

    def encoder_module(
        self, component: str, config: Mapping[str, Any], where: Path, *, dtype: Any
    ) -> nn.Module:
        """See `Family`."""
        if component == T5:
            return components.t5_module(config, where, dtype=dtype)
        return components.text_module(config, where, projection=True, dtype=dtype)

    def check_tokenizer(self, folder: Path) -> None:
        """See `Family`."""
        if folder.name == "tokenizer_3":
            t5_tokenizer.check_files(folder)
        else:
            components.check_clip_files(folder)

    def check(self, folder: Folder) -> None:
        """See `Family`."""
        module, where = folder.network.module, folder.path / self.network / "config.json"
        clips = [folder.encoders[name].module for name in CLIPS]
        pooled, width = (sum(getattr(m, k) for m in clips) for k in ("projection", "hidden_size"))
        t5 = folder.encoders[T5].module.hidden_size if T5 in folder.encoders else module.context
        alien = "one of them belongs to another model"
        if pooled != module.pooled:
            raise FolderError(
                f"{where}: pooled_projection_dim is {module.pooled}, but {' and '.join(CLIPS)}"
                f" project to {pooled} together; {alien}"
            )
        if t5 != module.context or width > module.context:
            raise FolderError(
                f"{where}: joint_attention_dim is {module.context}, but {T5} gives {t5}, and"
                f" {' and '.join(CLIPS)} {width} together, which may be less; {alien}"
            )
        latents = folder.vae.module.latent_channels
        if (module.in_channels, module.out_channels) != (latents, latents):
            raise FolderError(
                f"{where}: the network turns {module.in_channels} channels into"
                f" {module.out_channels}, but the VAE has {latents}; {alien}"
            )

    def open_tokenizers(self, folder: Folder) -> list[TextTokenizer]:
        """See `Family`. Raises ValueError for a clip_skip that leaves no layer."""
        clips = [folder.encoders[name].module for name in CLIPS]
        most = min(module.layers for module in clips) - 1
        if not 0 <= folder.clip_skip <= most:
            raise ValueError(f"clip_skip must be in 0..{most}, got {folder.clip_skip}")
        pairs = zip(folder.tokenizers, clips, strict=False)
        first, second = (Tokenizer(path, module.positions) for path, module in pairs)
        if first.length > clips[1].positions:
            raise FolderError(
                f"{first.folder} gives texts of {first.length} tokens, but {CLIPS[1]} has"
                f" {clips[1].positions} positions; set model_max_length to that in"
                " tokenizer_config.json"
            )
        second.length = first.length  # as the stock pipeline, which asks the first alone
        t5: list[TextTokenizer] = [T5Tokenizer(p, T5_TOKENS) for p in folder.tokenizers[2:]]
        return [first, second, *t5]

    def tokens(self, folder: Folder) -> int:
        """See `Family`."""
        clip = self.open_tokenizers(folder)[0].length if folder.tokenizers else CLIP_TOKENS
        return clip + T5_TOKENS

    def encode(self, folder: Folder) -> Encode:
        """See `Family`."""
        modules, width = [p.module for p in folder.text_encoders], folder.network.module.context

        def encode(
            params: Sequence[Any], ids: Sequence[Array], masks: Sequence[Array], skip: int
        ) -> dict[str, Array]:
            del masks  # padding is seen
            rows = zip(modules[:2], params[:2], ids[:2], strict=True)
            clips = [module.apply(p, i, skip=skip) for module, p, i in rows]
            states = jnp.concatenate([s.penultimate for s in clips], axis=-1)
            states = jnp.pad(states, ((0, 0), (0, 0), (0, width - states.shape[-1])))
            if len(modules) > 2:
                words = modules[2].apply(params[2], ids[2])
            else:
                words = jnp.zeros((len(states), T5_TOKENS, width))
            pooled = jnp.concatenate([s.pooled for s in clips], axis=-1)
            return {
                "context": jnp.concatenate(
                    [states.astype(jnp.float32), words.astype(jnp.float32)], axis=1
                ),
                "pooled": pooled.astype(jnp.float32),
            }

        return encode

    def multiple(self, folder: Folder) -> int:
        """See `Family`."""
        return folder.network.module.patch * folder.vae.module.factor

    def largest(self, folder: Folder) -> int:
        """See `Family`: the table of positions."""
        return folder.network.module.positions * self.multiple(folder)
