"""Z-Image (Z-Image Team, 2025): Qwen3's text through its chat template, a transformer of flow
matching that is told 1 - sigma.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxdistill.interop import components
from jaxdistill.interop.components import check_config
from jaxdistill.interop.diffusers_folder import Folder, FolderError
from jaxdistill.interop.families.family import Encode, FlowFamily
from jaxdistill.interop.qwen_tokenizer import QwenTokenizer
from jaxdistill.models.text.qwen3 import Qwen3Text
from jaxdistill.models.transformers.zimage import ZImageTransformer

KEYS = (
    "in_channels",
    "dim",
    "n_layers",
    "n_refiner_layers",
    "n_heads",
    "norm_eps",
    "qk_norm",
    "cap_feat_dim",
    "rope_theta",
    "t_scale",
    "axes_dims",
    "axes_lens",
    "n_kv_heads",  # all heads have keys of their own in diffusers, whatever it says
)
FIXED: dict[str, tuple[Any, ...]] = {
    "all_patch_size": (2,),
    "all_f_patch_size": (1,),
    "siglip_feat_dim": (None,),
}
"""The stock pipeline has patches of 2 and no pictures as input, whatever a config says."""
TEXT_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("qwen3",),
    "hidden_act": ("silu",),
    "use_sliding_window": (False,),
}
NATIVE = 1024
"""Pixels a side that the stock pipeline draws by default."""


def network(config: Mapping[str, Any], where: Path, **options: Any) -> ZImageTransformer:
    """The network of a ZImageTransformer2DModel's config. `options`: attention, remat, scan, dtype.

    Raises FolderError.
    """
    check_config(config, where, KEYS, FIXED)
    made = ZImageTransformer(
        in_channels=config.get("in_channels", 16),
        width=config.get("dim", 3840),
        depth=config.get("n_layers", 30),
        refiners=config.get("n_refiner_layers", 2),
        heads=config.get("n_heads", 30),
        eps=float(config.get("norm_eps", 1e-5)),
        qk_norm=bool(config.get("qk_norm", True)),
        context_width=config.get("cap_feat_dim", 2560),
        axes=tuple(config.get("axes_dims", (32, 48, 48))),
        base=float(config.get("rope_theta", 256.0)),
        time_scale=float(config.get("t_scale", 1000.0)),
        **options,
    )
    if made.width % made.heads:
        raise FolderError(f"{where}: n_heads = {made.heads} do not divide dim = {made.width}")
    head = made.width // made.heads
    if len(made.axes) != 3 or sum(made.axes) != head or any(axis % 2 for axis in made.axes):
        raise FolderError(
            f"{where}: axes_dims = {list(made.axes)} must be three even numbers whose sum is a"
            f" head's width, dim / n_heads = {head}"
        )
    return made


def text_module(config: Mapping[str, Any], where: Path, *, dtype: Any) -> Qwen3Text:
    """The encoder of a Qwen3Config, of transformers 4 or 5. Raises FolderError."""
    for name, allowed in TEXT_FIXED.items():
        if config.get(name, allowed[0]) not in allowed:
            raise FolderError(
                f"{where}: {name} = {config[name]!r} is not supported, only {allowed[0]!r}"
            )
    kinds = {*(config.get("layer_types") or ()), "full_attention"}
    if len(kinds) > 1:
        raise FolderError(
            f"{where}: layer_types has {', '.join(sorted(kinds))}; only full_attention is supported"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise FolderError(f"{where}: rope_type = {kind!r} is not supported, only 'default'")
    heads = config.get("num_attention_heads", 32)
    kv_heads = config.get("num_key_value_heads", 32) or heads
    if heads % kv_heads:
        raise FolderError(
            f"{where}: num_key_value_heads = {kv_heads} do not divide num_attention_heads = {heads}"
        )
    return Qwen3Text(
        vocab_size=config.get("vocab_size", 151936),
        hidden_size=config.get("hidden_size", 4096),
        intermediate=config.get("intermediate_size", 22016),
        layers=config.get("num_hidden_layers", 32),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=config.get("head_dim", 128),
        eps=float(config.get("rms_norm_eps", 1e-6)),
        base=float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
        use_bias=bool(config.get("attention_bias", False)),
        scan=True,
        dtype=dtype,
    )


class ZImage(FlowFamily):
    """Z-Image and Z-Image-Turbo."""

    name = "z-image"
    pipelines = ("ZImagePipeline",)
    networks = ("ZImageTransformer2DModel",)
    encoders: Mapping[str, tuple[str, ...]] = {"text_encoder": ("Qwen3Model", "Qwen3ForCausalLM")}
    tokenizers: Mapping[str, tuple[str, ...]] = {
        "tokenizer": ("Qwen2Tokenizer", "Qwen2TokenizerFast")
    }
    guidance = 5.0
    unguided = 0.0
    words = 512

    def network_module(
        self, config: Mapping[str, Any], where: Path, **options: Any
    ) -> ZImageTransformer:
        """See `Family`."""
        return network(config, where, **options)

    def encoder_module(
        self, component: str, config: Mapping[str, Any], where: Path, *, dtype: Any
    ) -> Qwen3Text:
        """See `Family`."""
        return text_module(config, where, dtype=dtype)

    def check(self, folder: Folder) -> None:
        """See `Family`."""
        module, where = folder.network.module, folder.path / "transformer" / "config.json"
        components.check_widths(folder, where, "cap_feat_dim", module.context_width)

    def open_tokenizers(self, folder: Folder) -> list[Any]:
        """See `Family`. Raises ValueError for a clip_skip, which Qwen3 does not have."""
        if folder.clip_skip:
            raise ValueError(f"clip_skip must be 0 of Z-Image (Qwen3), got {folder.clip_skip}")
        return [QwenTokenizer(path) for path in folder.tokenizers]

    def encode(self, folder: Folder) -> Encode:
        """See `Family`: what stands behind a caption is 0, and its mask too."""
        module = folder.text_encoders[0].module

        def encode(
            params: Sequence[Any], ids: Sequence[Array], masks: Sequence[Array], skip: int
        ) -> dict[str, Array]:
            del skip
            states = module.apply(params[0], ids[0], masks[0]).astype(jnp.float32)
            context = jnp.where(masks[0][..., None], states, 0.0)
            return {"context": context, "mask": masks[0].astype(jnp.float32)}

        return encode

    def guides(self, folder: Folder, scale: float) -> bool:
        """See `Family`: above 0, as c + scale (c - u)."""
        del folder
        return scale > 0.0

    def cfg_scale(self, scale: Any) -> Any:
        """See `Family`: c + scale (c - u) is u + (1 + scale) (c - u)."""
        return 1.0 + scale

    def network_time(self, sigma: Array) -> Array:
        """See `FlowFamily`: 0 is noise."""
        return 1.0 - sigma

    def largest(self, folder: Folder) -> int:
        """See `Family`: stock diffusers' tables of rotary positions."""
        rows_and_columns = folder.network.config.get("axes_lens", (1024, 512, 512))[1:]
        return min(rows_and_columns) * self.multiple(folder)

    def native_size(self, folder: Folder) -> tuple[int, int]:
        """See `Family`."""
        del folder
        return NATIVE, NATIVE

    def sized_config(self, folder: Folder, size: tuple[int, int]) -> dict[str, Any]:
        """See `Family`. As it was: the config says nothing of sizes."""
        del size
        return dict(folder.network.config)
