"""Stable Diffusion 1.x, 2.x and XL: U-Nets, CLIP's text encoders, schedules of betas."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdistill.interop import components, diffusers_scheduler
from jaxdistill.interop.clip_tokenizer import Tokenizer
from jaxdistill.interop.components import blocks, check_config, each
from jaxdistill.interop.diffusers_folder import Folder, FolderError
from jaxdistill.interop.diffusers_scheduler import Scheduler
from jaxdistill.interop.families.family import Encode, Family
from jaxdistill.models.stable_diffusion.autoencoder_kl import AutoencoderKL
from jaxdistill.models.stable_diffusion.unet_condition import UNetCondition
from jaxdistill.models.text.clip import CLIPText

INPUTS = {5: "pictures from depth", 7: "upscaling", 8: "editing by instructions", 9: "inpainting"}
"""What networks of so many input channels are for, with four of latents."""
UNET_KEYS = (
    "sample_size",
    "in_channels",
    "out_channels",
    "flip_sin_to_cos",
    "freq_shift",
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "norm_num_groups",
    "norm_eps",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "attention_head_dim",
    "num_attention_heads",
    "use_linear_projection",
    "addition_time_embed_dim",
    "upcast_attention",
    "dropout",
    "projection_class_embeddings_input_dim",
    "addition_embed_type_num_heads",
    "reverse_transformer_layers_per_block",
    "time_cond_proj_dim",
    # What an average of a training leaves in the config: it says nothing about the network.
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
)

UNET_FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
    "only_cross_attention": (False,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "addition_embed_type": (None, "text_time"),
    "num_class_embeds": (None,),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
}
"""Keys of a UNet's config that are read but must have one of these values."""

MIDDLES = {"UNetMidBlock2DCrossAttn": 2, "UNetMidBlock2D": 1, None: 0}
"""A UNet's mid_block_type -> its residual blocks; only two have an attention between them."""


def unet_module(config: Mapping[str, Any], where: Path, **options: Any) -> UNetCondition:
    """The network of a UNet2DConditionModel's config. `options`: attention, remat, scan, dtype.

    Raises FolderError.
    """
    check_config(config, where, UNET_KEYS, UNET_FIXED)
    channels = tuple(config["block_out_channels"])
    count = len(channels)
    down = blocks(
        config,
        "down_block_types",
        {"CrossAttnDownBlock2D": True, "DownBlock2D": False},
        count,
        where,
    )
    up = blocks(
        config, "up_block_types", {"CrossAttnUpBlock2D": True, "UpBlock2D": False}, count, where
    )
    # The field is named for a head's width, but holds their number.
    heads = each(
        config.get("num_attention_heads") or config.get("attention_head_dim", 8),
        count,
        "attention_head_dim",
        where,
    )
    if any(not isinstance(value, int) or value < 1 for value in heads):
        raise FolderError(
            f"{where}: attention_head_dim = {config.get('attention_head_dim')!r} must hold positive"
            " whole numbers"
        )
    if any(width % n for width, n in zip(channels, heads, strict=True)):
        raise FolderError(
            f"{where}: attention_head_dim = {list(heads)} heads do not divide block_out_channels ="
            f" {list(channels)}"
        )
    layers = each(config.get("layers_per_block", 2), count, "layers_per_block", where)
    depth, depth_up = _depths(config, layers, (down, up[::-1]), where)
    middle = MIDDLES[config.get("mid_block_type", "UNetMidBlock2DCrossAttn")]
    # The middle has the depth that is written for the last level, whether that attends or not.
    last = each(config.get("transformer_layers_per_block", 1), count, "", where)[-1]
    return UNetCondition(
        in_channels=config.get("in_channels", 4),
        out_channels=config.get("out_channels", 4),
        channels=channels,
        layers=layers,
        heads=heads,
        depth=depth,
        depth_up=depth_up,
        mid_layers=middle,
        mid_depth=(last[0] if isinstance(last, (list, tuple)) else last) if middle == 2 else 0,
        linear_projection=bool(config.get("use_linear_projection", False)),
        groups=config.get("norm_num_groups", 32),
        eps=float(config.get("norm_eps", 1e-5)),
        flip_sin_to_cos=bool(config.get("flip_sin_to_cos", True)),
        freq_shift=float(config.get("freq_shift", 0)),
        addition_time_width=(
            config["addition_time_embed_dim"]
            if config.get("addition_embed_type") == "text_time"
            else 0
        ),
        guidance_width=config.get("time_cond_proj_dim") or 0,
        **options,
    )


def _depths(
    config: Mapping[str, Any],
    layers: Sequence[int],
    attends: tuple[Sequence[bool], Sequence[bool]],
    where: Path,
) -> tuple[tuple[int | tuple[int, ...], ...], ...]:
    """Transformer blocks by level, going down and going up, 0 where the level does not attend: one
    number for a level, or one for each of its layers. Raises FolderError.
    """
    name, up = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
    down = each(config.get(name, 1), len(layers), name, where)
    if config.get(up) is None and any(isinstance(value, (list, tuple)) for value in down):
        raise FolderError(f"{where}: {name} = {config[name]!r} lists layers, and {up} is missing")
    above = each(config.get(up) or down[::-1], len(layers), up, where)[::-1]

    def checked(key: str, value: Any, count: int) -> int | tuple[int, ...]:
        listed = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        if any(not isinstance(n, int) or n < 1 for n in listed):
            raise FolderError(
                f"{where}: {key} = {config.get(key)!r} must hold positive whole numbers"
            )
        if isinstance(value, int):
            return value
        if len(listed) != count:
            raise FolderError(
                f"{where}: {key} = {config.get(key)!r} lists {len(listed)} layers of a level that"
                f" has {count}"
            )
        return listed

    return tuple(
        tuple(
            checked(key, value, count + more) if attending else 0
            for value, count, attending in zip(values, layers, flags, strict=True)
        )
        for key, values, more, flags in ((name, down, 0, attends[0]), (up, above, 1, attends[1]))
    )


def check_channels(given: int, made: int, latents: int, where: Path) -> None:
    """Raise FolderError for a UNet that does not turn noisy latents alone into a prediction of
    them: it is of another task, or of another VAE.
    """
    if given != latents and latents == 4 and given in INPUTS:
        raise FolderError(
            f"{where}: a network of {given} input channels is of {INPUTS[given]}: it takes more"
            " than noise and text; give a checkpoint of text to image"
        )
    if (given, made) != (latents, latents):
        raise FolderError(
            f"{where}: the network turns {given} channels into {made}, but the VAE has {latents};"
            " one of them belongs to another model"
        )


def clip_tokenizers(folder: Folder) -> list[Tokenizer]:
    """All give texts of one length. Raises FolderError for tokenizers that cannot be used,
    ValueError for a clip_skip that leaves no layer.
    """
    most = min(part.module.layers for part in folder.text_encoders) - 1
    if not 0 <= folder.clip_skip <= most:
        raise ValueError(f"clip_skip must be in 0..{most}, got {folder.clip_skip}")
    pairs = zip(folder.tokenizers, folder.text_encoders, strict=True)
    found = [Tokenizer(path, part.module.positions) for path, part in pairs]
    first = found[0]
    for other in found[1:]:
        if other.length != first.length:
            raise FolderError(
                f"{other.folder} gives texts of {other.length} tokens, but {first.folder} of"
                f" {first.length}; their states are put side by side, so set one model_max_length"
                " in both tokenizer_config.json"
            )
    return found


class StableDiffusion(Family):
    """1.x and 2.x."""

    name = "sd"
    pipelines = ("StableDiffusionPipeline",)
    network = "unet"
    networks = ("UNet2DConditionModel",)
    encoders: Mapping[str, tuple[str, ...]] = {"text_encoder": ("CLIPTextModel",)}
    tokenizers: Mapping[str, tuple[str, ...]] = {
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast")
    }
    text_dtype = np.float16
    original = True

    def network_module(
        self, config: Mapping[str, Any], where: Path, **options: Any
    ) -> UNetCondition:
        """See `Family`."""
        return unet_module(config, where, **options)

    def vae_module(self, config: Mapping[str, Any], where: Path, **options: Any) -> AutoencoderKL:
        """See `Family`."""
        return components.vae_module(config, where, moved_by="latents_mean" * self.xl, **options)

    def encoder_module(
        self, component: str, config: Mapping[str, Any], where: Path, *, dtype: Any
    ) -> CLIPText:
        """See `Family`."""
        projection = component == "text_encoder_2"
        return components.text_module(config, where, projection=projection, dtype=dtype)

    def check(self, folder: Folder) -> None:
        """See `Family`."""
        width = sum(encoder.module.hidden_size for encoder in folder.text_encoders)
        network, vae = folder.network, folder.vae.module
        wanted = network.config["cross_attention_dim"]
        wanted = wanted[0] if isinstance(wanted, list) else wanted
        if width != wanted:
            raise FolderError(
                f"{folder.path}: the unet's cross_attention_dim is {wanted}, but the text encoder"
                f" gives {width}; one of them belongs to another model"
            )
        channels = (network.module.in_channels, network.module.out_channels, vae.latent_channels)
        check_channels(*channels, folder.path / "unet" / "config.json")

    def open_tokenizers(self, folder: Folder) -> list[Tokenizer]:
        """See `Family`."""
        return clip_tokenizers(folder)

    def encode(self, folder: Folder) -> Encode:
        """See `Family`."""
        part = folder.text_encoders[0]
        # Padding is looked at where the config says so.
        masked = bool(part.config.get("use_attention_mask"))

        def encode(
            params: Sequence[Any], ids: Sequence[Array], masks: Sequence[Array], skip: int
        ) -> dict[str, Array]:
            mask = masks[0] if masked else None
            states = part.module.apply(params[0], ids[0], mask, skip=skip)
            return {"context": states.last.astype(jnp.float32)}

        return encode

    def native_size(self, folder: Folder) -> tuple[int, int]:
        """See `Family`."""
        native = folder.network.config.get("sample_size") or 64
        said = str(folder.network.config.get("_diffusers_version", ""))
        version = tuple(int(n) for n in re.findall(r"\d+", said)[:3])
        if not self.xl and version and version < (0, 9, 0) and isinstance(native, int):
            # As diffusers does: folders of that age give the training size of 1.x wrongly.
            native = max(native, 64)
        sides = native if isinstance(native, (list, tuple)) else (native, native)
        height, width = (side * folder.vae.module.factor for side in sides)
        return height, width

    def sized_config(self, folder: Folder, size: tuple[int, int]) -> dict[str, Any]:
        """See `Family`."""
        config, factor = dict(folder.network.config), folder.vae.module.factor
        # A list: of a number below 64 diffusers thinks that an old config is wrong.
        return {**config, "sample_size": [side // factor for side in size]}

    def scheduler(self, folder: Folder, **options: Any) -> Scheduler:
        """See `Family`."""
        where = diffusers_scheduler.config_path(folder)
        return diffusers_scheduler.read(folder.scheduler, where, xl=self.xl, **options)


class StableDiffusionXL(StableDiffusion):
    """XL's base, and what has its pipeline: SSD-1B, Segmind-Vega."""

    name = "sdxl"
    pipelines = ("StableDiffusionXLPipeline",)
    encoders: Mapping[str, tuple[str, ...]] = {
        **StableDiffusion.encoders,
        "text_encoder_2": ("CLIPTextModelWithProjection",),
    }
    tokenizers: Mapping[str, tuple[str, ...]] = {
        name: StableDiffusion.tokenizers["tokenizer"] for name in ("tokenizer", "tokenizer_2")
    }
    guidance = 5.0
    xl = True

    def encode(self, folder: Folder) -> Encode:
        """See `Family`."""
        modules = [part.module for part in folder.text_encoders]

        def encode(
            params: Sequence[Any], ids: Sequence[Array], masks: Sequence[Array], skip: int
        ) -> dict[str, Array]:
            del masks
            rows = zip(modules, params, ids, strict=True)
            states = [module.apply(p, i, skip=skip) for module, p, i in rows]
            context = jnp.concatenate([s.penultimate for s in states], axis=-1)
            return {
                "context": context.astype(jnp.float32),
                "pooled": states[-1].pooled.astype(jnp.float32),
            }

        return encode

    def at_size(self, folder: Folder, height: int, width: int) -> dict[str, np.ndarray]:
        """See `Family`: original size, crop corner, target size."""
        del folder
        return {"time_ids": np.asarray([height, width, 0, 0, height, width], np.float32)}

    def sized_config(self, folder: Folder, size: tuple[int, int]) -> dict[str, Any]:
        """See `Family`: XL's pipeline reads squares alone."""
        return Family.sized_config(self, folder, size)
