"""What a file of weights holds, told by the names and shapes of its tensors."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

from safetensors import SafetensorError, safe_open

from jaxdistill.interop import PICKLES, explain_path
from jaxdistill.interop.diffusers_folder import FolderError
from jaxdistill.interop.original_layout import DIFFUSERS, OPEN_CLIP, SHORT, TRANSFORMERS, UNET

Shapes = Mapping[str, tuple[int, ...]]
"""Of a file's tensors by their names."""

KNOWN = "checkpoints of Stable Diffusion 1.x, 2.x and XL are read"


PICKLE = (
    "a pickle, which can run code when it is read; save it as safetensors in a program that you"
    " trust it to: ComfyUI's node CheckpointSave, or diffusers' from_single_file and"
    " save_pretrained"
)
STARTS = {
    b"version https://git-lfs": (
        "a pointer of git-LFS: the file itself was not fetched; run git lfs pull in its folder"
    ),
    b"GGUF": "a GGUF file, whose weights are quantised; give the .safetensors that it was made of",
    b"PK\x03\x04": PICKLE,
    b"\x80": PICKLE,
    b"{": "JSON; give the .safetensors file, or the pipeline folder as a whole",
    b"<": "a page of a web site; the download has failed",
}
"""First bytes of a file -> what it is instead of safetensors, and the mend."""


def read_header(path: Path) -> tuple[Shapes, Mapping[str, str]]:
    """The shapes of a file's tensors, and its metadata; no tensor is read. Raises FolderError."""
    if path.suffix in PICKLES:
        raise FolderError(f"{path} is {PICKLE}")
    try:
        with path.open("rb") as raw:
            first = raw.read(32)
        with safe_open(str(path), "numpy") as file:
            shapes = {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
            return shapes, dict(file.metadata() or {})
    except FileNotFoundError:
        if not path.suffix:
            raise FolderError(explain_path(path)) from None
        raise FolderError(f"{path} does not exist; give a .safetensors file") from None
    except (SafetensorError, OSError) as error:
        for start, kind in STARTS.items():
            if first.startswith(start):
                raise FolderError(f"{path} is {kind}") from None
        raise FolderError(
            f"{path} cannot be read as safetensors ({error}); it may be truncated; copy it again"
        ) from None


class Place(NamedTuple):
    """Where a file holds a component.

    Attributes:
      prefix: what the names of all its tensors begin with.
      names: whose they are: see `original_layout.DIFFUSERS`; "" the original's own.
      width: of a text encoder.
    """

    prefix: str
    names: str = ""
    width: int = 0


class Family(NamedTuple):
    """A published family.

    Attributes:
      name: of `architectures.PIPELINES`.
      title: for messages.
      reason: what in the file says so.
    """

    name: str
    title: str
    reason: str


def unet_place(shapes: Shapes) -> Place | None:
    """Of a UNet: the original layout with its prefix or without any, or diffusers' names."""
    for prefix in (UNET, ""):
        if {f"{prefix}input_blocks.0.0.weight", f"{prefix}out.2.weight"} <= shapes.keys():
            return Place(prefix)
    theirs = {"conv_in.weight", "conv_out.weight", "time_embedding.linear_1.weight"}
    return Place("", DIFFUSERS) if theirs <= shapes.keys() else None


def vae_place(shapes: Shapes) -> Place | None:
    """Of an autoencoder, under any prefix."""
    end = "decoder.conv_in.weight"
    for name in sorted(n for n in shapes if n.endswith(end)):
        prefix = name.removesuffix(end)
        if f"{prefix}encoder.conv_in.weight" in shapes:
            theirs = any(n.startswith(f"{prefix}decoder.up_blocks.") for n in shapes)
            return Place(prefix, DIFFUSERS if theirs else "")
    return None


def text_places(shapes: Shapes) -> list[Place]:
    """Of CLIP's text encoders, under any prefix, by name."""
    end, found = "token_embedding.weight", []
    for name in sorted(n for n in shapes if n.endswith(end)):
        prefix, width = name.removesuffix(end), shapes[name][-1]
        if not prefix.endswith("embeddings."):
            found.append(Place(prefix, OPEN_CLIP, width))
            continue
        prefix = prefix.removesuffix("embeddings.")
        whole = prefix.removesuffix("text_model.")
        found.append(Place(whole, SHORT if whole == prefix else TRANSFORMERS, width))
    return found


# ------------------------------------------------------------------------------------- checkpoints

CHANNELS = {
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "a model that edits pictures (InstructPix2Pix)",
    9: "an inpainting model",
    16: "a model of another autoencoder",
}
"""What a UNet's number of input channels says, where it is not 4."""

FAMILIES = {
    (768, False): ("sd15", "Stable Diffusion 1.x"),
    (1024, False): ("sd21", "Stable Diffusion 2.x"),
    (2048, True): ("sdxl", "Stable Diffusion XL"),
}
"""(width of the context, whether a pooled text is added to the time) -> `Family`."""

OTHERS = {
    (1280, True): "the refiner of Stable Diffusion XL",
    (1024, True): "Stable Diffusion 2.1 unCLIP",
}


class UNetFacts(NamedTuple):
    """What a UNet's shapes say: input channels, the context's width, whether it adds a pooled text
    to the time (`label_emb`).
    """

    channels: int
    context: int
    label: bool

    @property
    def reason(self) -> str:
        """For messages."""
        return f"context of {self.context}, {'with' if self.label else 'without'} label_emb"


def unet_facts(shapes: Shapes, place: Place) -> UNetFacts:
    """Of the UNet at `place`."""
    theirs = place.names == DIFFUSERS
    first = "conv_in.weight" if theirs else f"{place.prefix}input_blocks.0.0.weight"
    label = "add_embedding." if theirs else f"{place.prefix}label_emb."
    contexts = [
        shape[1]
        for name, shape in shapes.items()
        if name.startswith(place.prefix) and name.endswith("attn2.to_k.weight")
    ]
    added = any(name.startswith(label) for name in shapes)
    return UNetFacts(shapes[first][1], min(contexts, default=0), added)


def check_unet(path: object, shapes: Shapes, place: Place) -> UNetFacts:
    """What the UNet at `place` is. Raises FolderError for another task than text to image."""
    facts = unet_facts(shapes, place)
    if facts.channels != 4:
        kind = CHANNELS.get(facts.channels, "a model of another kind")
        raise FolderError(
            f"{path} is {kind}: its UNet has {facts.channels} input channels, and that of text to"
            f" image has 4; {KNOWN}"
        )
    other = OTHERS.get(facts[1:], "")
    if any(name.startswith(f"{place.prefix}encoder_hid_proj.") for name in shapes):
        other = "Kolors, or another model whose encoder is not CLIP"
    if other:
        raise FolderError(f"{path} is {other} ({facts.reason}); {KNOWN}")
    return facts


def family(path: object, facts: UNetFacts) -> Family:
    """The published family of a UNet. Raises FolderError for none."""
    found = FAMILIES.get(facts[1:])
    if found is None:
        raise FolderError(
            f"{path} is of no published family ({facts.reason}); give a pipeline folder of its"
            " kind, weights or not, for configs and tokenizers: --like=FOLDER, in a config"
            " config.teacher.like"
        )
    return Family(*found, facts.reason)


# ------------------------------------------------------------------------------------- other files

WHOLE = ": of this kind pipeline folders are read, and no single files; give the diffusers folder"

SIGNS = {
    r"\.(lora[._](down|up|A|B)|lora_linear_layer|hada_w|lokr_w|oft_|dora_)": (
        "a LoRA: give the checkpoint that it belongs to, and this file with --lora"
    ),
    r"control_model\.|input_hint_block\.|controlnet_cond_embedding\.": "a ControlNet",
    r"motion_modules\.": "a motion module of AnimateDiff",
    r"^(ip_adapter|image_proj)\.": "an IP-Adapter",
    r"single_transformer_blocks\.|double_(stream_)?blocks\.": f"FLUX or a model like it{WHOLE}",
    r"joint_blocks\.|attn\.add_[kqv]_proj": f"Stable Diffusion 3{WHOLE}",
    r"adaln_single\.|y_embedder\.y_proj": f"PixArt or a model like it{WHOLE}",
    r"(noise|context)_refiner\.": f"Z-Image or a model like it{WHOLE}",
    r"effnet_mapper\.|clip_txt_pooled_mapper\.": "Stable Cascade",
}
"""Pattern of a tensor's name -> what a file without a UNet is, whatever else it holds."""

WEAK_SIGNS = {
    r"(transformer_blocks|layers|\bblocks)\.\d+\.": "a transformer",
    r"emb_params|string_to_param|^clip_[lg]$|<.+>": "a textual inversion",
}
"""The same, of a file that holds nothing else."""


def check_other(path: object, shapes: Shapes) -> NoReturn:
    """Raise FolderError that tells what a file without a UNet is."""

    def told(signs: Mapping[str, str]) -> str:
        return next((k for p, k in signs.items() if any(re.search(p, n) for n in shapes)), "")

    kind = told(SIGNS)
    if not kind and vae_place(shapes):
        kind = "an autoencoder (VAE): give it beside a checkpoint, with --vae"
    if not kind and text_places(shapes):
        kind = "a text encoder: give it beside a checkpoint, with --text_encoder"
    kind = kind or told(WEAK_SIGNS)
    some = ", ".join(sorted(shapes)[:3])
    raise FolderError(
        f"{path} has no UNet under {UNET}* (it has {some}, ...)"
        + (f"; by its names it is {kind}" if kind else "")
        + f"; {KNOWN}"
    )
