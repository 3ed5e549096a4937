"""Configs of components that several families have, as modules: the autoencoder, CLIP's and T5's
text encoders.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxdistill.interop.diffusers_folder import Folder, FolderError
from jaxdistill.models.stable_diffusion.autoencoder_kl import AutoencoderKL
from jaxdistill.models.text import t5
from jaxdistill.models.text.clip import ACTIVATIONS, CLIPText


def check_config(
    config: Mapping[str, Any], where: Path, known: Sequence[str], fixed: Mapping[str, Sequence[Any]]
) -> None:
    """Raise FolderError for a field with a value that the modules do not implement, or a set field
    that nobody knows.
    """
    for name, allowed in fixed.items():
        value: Any = config.get(name)
        alike = (
            isinstance(value, (list, tuple))
            and len(value) > 0
            and all(item == value[0] for item in value)
        )
        if name in config and (value[0] if alike else value) not in allowed:
            shown = " or ".join(repr(value) for value in allowed)
            raise FolderError(f"{where}: {name} = {config[name]!r} is not supported, only {shown}")
    for name, value in config.items():
        if (
            not name.startswith("_")
            and name not in known
            and name not in fixed
            and value not in (None, False)
        ):
            raise FolderError(
                f"{where}: the setting {name} = {value!r} is not known; this version"
                " does not support it"
            )


def each(value: Any, count: int, name: str, where: Path) -> tuple[Any, ...]:
    """A number for every level, or a list of one for each."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * count
    if len(values) != count:
        raise FolderError(
            f"{where}: {name} = {value!r} must be one value or {count}, one per block"
        )
    return values


def blocks(
    config: Mapping[str, Any], name: str, known: Mapping[str, bool], count: int, where: Path
) -> tuple[bool, ...]:
    """What is known of each of `count` blocks by its class. Raises FolderError."""
    found = tuple(config[name])
    if len(found) != count:
        raise FolderError(f"{where}: {name} names {len(found)} blocks, block_out_channels {count}")
    for block in found:
        if block not in known:
            raise FolderError(
                f"{where}: the block {block!r} is not known; choose one of {', '.join(known)}"
            )
    return tuple(known[block] for block in found)


VAE_KEYS = (
    "in_channels",
    "out_channels",
    "block_out_channels",
    "layers_per_block",
    "latent_channels",
    "norm_num_groups",
    "sample_size",
    "scaling_factor",
    "shift_factor",
    "latents_mean",
    "latents_std",
    "force_upcast",
    "use_quant_conv",
    "use_post_quant_conv",
    "mid_block_add_attention",
    "down_block_types",
    "up_block_types",
)

VAE_FIXED = {"act_fn": ("silu", "swish")}


def vae_module(
    config: Mapping[str, Any], where: Path, *, moved_by: str = "", **options: Any
) -> AutoencoderKL:
    """The autoencoder of an AutoencoderKL's config. `options`: attention, dtype.

    `moved_by`: beside the scale, what its pipeline looks at: "shift_factor", "latents_mean" (and
    latents_std), or nothing. Raises FolderError.
    """
    check_config(config, where, VAE_KEYS, VAE_FIXED)
    channels = tuple(config["block_out_channels"])
    blocks(config, "down_block_types", {"DownEncoderBlock2D": True}, len(channels), where)
    blocks(config, "up_block_types", {"UpDecoderBlock2D": True}, len(channels), where)
    mean, std = (tuple(config.get(f"latents_{name}") or ()) for name in ("mean", "std"))
    latents = config.get("latent_channels", 4)
    if moved_by == "shift_factor":
        mean, std = (float(config.get("shift_factor") or 0.0),) * latents, (1.0,) * latents
    moved = bool(moved_by and mean and std)
    if moved and not len(mean) == len(std) == latents:
        raise FolderError(
            f"{where}: latents_mean and latents_std hold {len(mean)} and {len(std)} numbers, but"
            f" there are {latents} latent_channels"
        )
    return AutoencoderKL(
        in_channels=config.get("in_channels", 3),
        out_channels=config.get("out_channels", 3),
        latent_channels=latents,
        mean=mean if moved else None,
        std=std if moved else None,
        channels=channels,
        layers=config.get("layers_per_block", 1),
        groups=config.get("norm_num_groups", 32),
        scaling_factor=float(config.get("scaling_factor") or 0.18215),
        use_quant_conv=bool(config.get("use_quant_conv", True)),
        use_post_quant_conv=bool(config.get("use_post_quant_conv", True)),
        mid_attention=bool(config.get("mid_block_add_attention", True)),
        **options,
    )


def text_module(
    config: Mapping[str, Any], where: Path, *, projection: bool, dtype: Any = jnp.float32
) -> CLIPText:
    """The encoder of a CLIPTextConfig. Raises FolderError."""
    activation = config.get("hidden_act", "quick_gelu")
    if activation not in ACTIVATIONS:
        raise FolderError(
            f"{where}: hidden_act = {activation!r} is not supported, only"
            f" {' or '.join(map(repr, ACTIVATIONS))}"
        )
    if config.get("model_type", "clip_text_model") not in ("clip_text_model", "clip"):
        raise FolderError(
            f"{where}: model_type = {config['model_type']!r} is not supported, only"
            " 'clip_text_model'"
        )
    return CLIPText(
        vocab_size=config.get("vocab_size", 49408),
        hidden_size=config.get("hidden_size", 512),
        intermediate=config.get("intermediate_size", 2048),
        layers=config.get("num_hidden_layers", 12),
        heads=config.get("num_attention_heads", 8),
        positions=config.get("max_position_embeddings", 77),
        activation=activation,
        eps=float(config.get("layer_norm_eps", 1e-5)),
        projection=config.get("projection_dim", 512) if projection else 0,
        end_token=config.get("eos_token_id", 49407),
        dtype=dtype,
    )


def t5_module(config: Mapping[str, Any], where: Path, **options: Any) -> t5.T5Encoder:
    """The encoder of a T5Config. `options`: dtype. Raises FolderError."""
    kind = config.get("model_type", "t5")
    if kind != "t5":
        raise FolderError(f"{where}: model_type = {kind!r} is not supported, only 't5'")
    mlp = str(config.get("feed_forward_proj", "relu"))
    gate, _, name = mlp.rpartition("-")
    activation = "gelu_new" if mlp == "gated-gelu" else name  # as transformers reads it
    if activation not in t5.ACTIVATIONS or gate not in ("", "gated"):
        allowed = ", ".join(f"{name!r}" for name in t5.ACTIVATIONS)
        raise FolderError(
            f"{where}: feed_forward_proj = {mlp!r} is not supported, only {allowed}, each also"
            " behind 'gated-', and 'gated-gelu'"
        )
    return t5.T5Encoder(
        vocab_size=config.get("vocab_size", 32128),
        hidden_size=config.get("d_model", 512),
        intermediate=config.get("d_ff", 2048),
        layers=config.get("num_layers", 6),
        heads=config.get("num_heads", 8),
        head_dim=config.get("d_kv", 64),
        activation=activation,
        gated=gate == "gated",
        buckets=config.get("relative_attention_num_buckets", 32),
        distance=config.get("relative_attention_max_distance", 128),
        eps=float(config.get("layer_norm_epsilon", 1e-6)),
        **options,
    )


def check_clip_files(tokenizer: Path) -> None:
    """Raise FolderError for a folder without the files of CLIP's tokenizer."""
    if not (tokenizer / "tokenizer.json").is_file() and not all(
        (tokenizer / f).is_file() for f in ("vocab.json", "merges.txt")
    ):
        raise FolderError(
            f"{tokenizer} has neither tokenizer.json nor vocab.json and merges.txt; copy the"
            " folder again"
        )


def check_widths(folder: Folder, where: Path, key: str, width: int) -> None:
    """Raise FolderError unless the only text encoder of a folder gives states of the `width` that
    the network's config has at `key`, and the VAE latents of the network's channels.
    """
    (encoder,), vae, channels = folder.text_encoders, folder.vae, folder.network.module.in_channels
    for name, here, there, says in (
        (key, width, encoder.module.hidden_size, "the text encoder gives"),
        ("in_channels", channels, vae.module.latent_channels, "the VAE has"),
    ):
        if here != there:
            raise FolderError(
                f"{where}: {name} is {here}, but {says} {there}; one of them belongs to another"
                " model"
            )
