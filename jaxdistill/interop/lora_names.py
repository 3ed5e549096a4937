"""How files of LoRAs name a pipeline's layers: Kohya's stems, with diffusers' block names or those
of the original layout, and the dotted names of diffusers and PEFT.

A stem has underscores where a layer's path has dots and underscores, so it is never taken apart:
each table is made of the names that a module has.
"""

import re
from collections.abc import Iterator, Sequence

from jaxdistill.interop.diffusers_folder import Folder, Part, abstract_params
from jaxdistill.interop.original_layout import unet_name
from jaxdistill.interop.torch_weights import names_of
from jaxdistill.models.stable_diffusion.unet_condition import UNetCondition
from jaxdistill.models.text.clip import CLIPText
from jaxdistill.models.text.t5 import T5Encoder

UNET = "lora_unet_"
TEXT = "lora_te_"  # of 1.x and 2.x
XL_TEXT = ("lora_te1_", "lora_te2_")
PEFT = "base_model.model."

_KOHYA_TEXT = ((TEXT, XL_TEXT[0]), (XL_TEXT[1],))
_COMFY_TEXT = ("text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer.")
_T5 = ("lora_te3_", "text_encoders.t5xxl.transformer.")
"""Kohya's and ComfyUI's, wherever T5 stands in a pipeline."""
_OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def layers(part: Part) -> dict[str, dict[str, tuple[int, ...]]]:
    """{layer by torch's name: {"weight": its shape, "bias": ...}}; tables and tokens are none."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in names_of(abstract_params(part)).items():
        layer, _, leaf = name.rpartition(".")
        if leaf in ("weight", "bias"):
            found.setdefault(layer, {})[leaf] = shape
    return found


def original_layer(part: Part, layer: str) -> str:
    """A layer of a UNet by the original layout's names; others are trained under transformers'."""
    if not isinstance(part.module, UNetCondition):
        return layer
    return unet_name(f"{layer}.weight", part.module).removesuffix(".weight")


def kohya_names(part: Part, prefix: str, *, original: bool = False) -> dict[str, str]:
    """{layer by torch's name: its stem in Kohya's files}, all distinct.

    Args:
      part: a UNet or a text encoder.
      prefix: UNET, TEXT or one of XL_TEXT.
      original: with the block names of the original layout, as Kohya's trainer writes XL; those of
        diffusers if False, as it writes 1.x and 2.x.
    """
    return {
        layer: prefix + (original_layer(part, layer) if original else layer).replace(".", "_")
        for layer in layers(part)
    }


def components(folder: Folder) -> dict[str, Part]:
    """The components that LoRAs change, by diffusers' names."""
    return {folder.family.network: folder.network, **folder.encoders}


def known_stems(folder: Folder) -> dict[str, list[tuple[str, str]]]:
    """{stem in a file: [(component, layer)]} of every way to name one that is read.

    A stem of a text encoder without its component's name may be of either of XL's.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for component, part in components(folder).items():
        for layer in layers(part):
            for stem in dict.fromkeys(_stems(component, part, layer)):
                found.setdefault(stem, []).append((component, layer))
    return found


def _stems(component: str, part: Part, layer: str) -> Iterator[str]:
    """Every name of a layer that is read."""
    if component == "unet":
        there = original_layer(part, layer)
        for name in (layer, there):
            yield from _joined((UNET, "lycoris_"), name.replace(".", "_"))
        yield from _joined(("diffusion_model.", "model.diffusion_model."), there)
        yield from _joined(("unet.", "", PEFT), *_old_attention(layer))
        return
    if component == "transformer":
        yield from _joined(("transformer.", "", PEFT, "diffusion_model."), layer)
        yield from _joined((UNET, "lora_transformer_", "lycoris_"), layer.replace(".", "_"))
        return
    if isinstance(part.module, T5Encoder):
        yield _T5[0] + layer.replace(".", "_")
        yield from _joined((f"{component}.", "", PEFT, _T5[1]), layer)
        return
    if not isinstance(part.module, CLIPText):
        yield from _joined((f"{component}.", "", PEFT), layer)
        return
    number = 0 if component == "text_encoder" else 1
    for name in (layer, layer.removeprefix("text_model.")):
        yield from _joined(_KOHYA_TEXT[number], name.replace(".", "_"))
        for old, new in _OLD_TEXT.items():
            if name.endswith(f"self_attn.{old}"):
                yield f"{component}.{name.removesuffix(old)}{new}"
        prefixes = (f"{component}.", "", PEFT, _COMFY_TEXT[number])
        yield from _joined(prefixes, name)


def _joined(prefixes: Sequence[str], *names: str) -> Iterator[str]:
    return (prefix + name for name in names for prefix in prefixes)


def _old_attention(layer: str) -> tuple[str, ...]:
    """A layer of a UNet, and the names that diffusers gave it below its attention's processor."""
    found = re.fullmatch(r"(.+\.attn[12])\.to_(q|k|v|out)(\.0)?", layer)
    if not found:
        return (layer,)
    short = f"to_{found[2]}"
    return (layer, f"{found[1]}.processor.{short}", f"{found[1]}.{short}")
