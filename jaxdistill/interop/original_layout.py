"""The names of Stable Diffusion's original checkpoints: one file, whose tensors are named as in the
first releases (`model.diffusion_model.*`, `first_stage_model.*`, `cond_stage_model.*`).

`origin` says for each tensor of a diffusers component where the original layout keeps it.
"""

import re
from collections.abc import Callable
from dataclasses import replace

from flax import linen as nn

from jaxdistill.interop.torch_weights import Origin
from jaxdistill.models.stable_diffusion.autoencoder_kl import AutoencoderKL
from jaxdistill.models.stable_diffusion.unet_condition import UNetCondition

UNET = "model.diffusion_model."
VAE = "first_stage_model."
TEXT = "cond_stage_model.transformer."  # 1.x: transformers' own names
OPEN_TEXT = "cond_stage_model.model."  # 2.x: OpenCLIP's names
XL_TEXT = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")


DIFFUSERS, OPEN_CLIP, TRANSFORMERS, SHORT = "diffusers", "open_clip", "transformers", "short"
"""Whose names a component's tensors may have instead of the original layout's own: `SHORT` are
transformers' without `text_model.`, as its newest versions write them.
"""


def origin(module: nn.Module, prefix: str, *, names: str = "") -> Callable[[str], Origin]:
    """Diffusers' name of a tensor of this module -> where the original layout has it.

    `prefix`: one of those above, or another. `names`: whose they are; those of a text encoder are
    known by such a prefix.
    """
    if names == DIFFUSERS:
        return lambda name: Origin(prefix + name)
    if isinstance(module, UNetCondition):
        return lambda name: Origin(prefix + unet_name(name, module))
    if isinstance(module, AutoencoderKL):
        return lambda name: vae_origin(name, prefix, len(module.channels))
    if names == OPEN_CLIP or (not names and prefix.endswith("model.")):
        return lambda name: open_clip_origin(name, prefix)
    return lambda name: Origin(
        prefix + (name.removeprefix("text_model.") if names == SHORT else name)
    )


def averaged(found: Origin) -> Origin:
    """The moving average that a training checkpoint keeps beside a UNet's tensor."""
    return replace(found, name="model_ema." + found.name.removeprefix("model.").replace(".", ""))


# ----------------------------------------------------------------------------------------- the UNet

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}


def unet_name(name: str, module: UNetCondition) -> str:
    """The original name of a UNet's tensor, without its prefix.

    The original layout counts all blocks going down and all going up in one list each. The first
    entry going down is conv_in, and a downsampling is an entry of its own; an upsampling is the
    last part of its block.
    """
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    if not found:
        start = next((key for key in _UNET if name.startswith(f"{key}.")), name)
        rest = name[len(start) + 1 :]
        return f"{_UNET.get(start, start)}.{_inner(rest) if '.resnets.' in start else rest}"
    way, level, kind, number, rest = found.groups()
    i, j, last = int(level), int(number), len(module.channels) - 1
    layers = list(module.layers) if way == "down" else [n + 1 for n in reversed(module.layers)]
    before = sum(layers[:i])
    if way == "down":
        before += 1 + i  # conv_in, and the downsamplings of the levels before
    block = before + (layers[i] if kind == "downsamplers" else j)
    if kind == "upsamplers":
        block = before + layers[i] - 1
    blocks = "input_blocks" if way == "down" else "output_blocks"
    if kind == "resnets":
        return f"{blocks}.{block}.0.{_inner(rest)}"
    if kind == "attentions":
        return f"{blocks}.{block}.1.{rest}"
    if kind == "downsamplers":
        return f"{blocks}.{block}.0.op.{rest.removeprefix('conv.')}"
    part = 2 if module.depth_up[last - i] else 1
    return f"{blocks}.{block}.{part}.{rest}"


def _inner(rest: str) -> str:
    layer, _, leaf = rest.rpartition(".")
    return f"{_RESNET[layer]}.{leaf}"


# ---------------------------------------------------------------------------------- the autoencoder

_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def vae_origin(name: str, prefix: str, levels: int) -> Origin:
    """Of an autoencoder's tensor. The decoder's levels count from full resolution there."""
    if attention := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(\w+)", name):
        side, layer, leaf = attention.groups()
        kernel = layer != "group_norm" and leaf == "weight"
        return Origin(f"{prefix}{side}.mid.attn_1.{_ATTENTION[layer]}.{leaf}", kernel=kernel)
    name = re.sub(r"\.mid_block\.resnets\.(\d)\.", lambda m: f".mid.block_{int(m[1]) + 1}.", name)
    name = re.sub(r"\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r".down.\1.block.\2.", name)
    name = re.sub(r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample.", name)
    name = re.sub(r"\.up_blocks\.(\d+)\.", lambda m: f".up_blocks.{levels - 1 - int(m[1])}.", name)
    name = re.sub(r"\.up_blocks\.(\d+)\.resnets\.(\d+)\.", r".up.\1.block.\2.", name)
    name = re.sub(r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample.", name)
    name = name.replace(".conv_shortcut.", ".nin_shortcut.").replace(
        ".conv_norm_out.", ".norm_out."
    )
    return Origin(prefix + name)


# ------------------------------------------------------------------------------------- OpenCLIP's

_OPEN = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_OPEN_LAYERS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def open_clip_origin(name: str, prefix: str) -> Origin:
    """Of a text encoder's tensor, by OpenCLIP's names: q, k and v are one tensor there."""
    if name == "text_projection.weight":
        return Origin(f"{prefix}text_projection", transposed=True)
    if name in _OPEN:
        return Origin(prefix + _OPEN[name])
    number, layer, leaf = re.fullmatch(  # type: ignore[union-attr]
        r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(\w+)", name
    ).groups()
    start = f"{prefix}transformer.resblocks.{number}."
    if projection := re.fullmatch(r"self_attn\.([qkv])_proj", layer):
        return Origin(f"{start}attn.in_proj_{leaf}", third="qkv".index(projection[1]))
    return Origin(f"{start}{_OPEN_LAYERS[layer]}.{leaf}")
