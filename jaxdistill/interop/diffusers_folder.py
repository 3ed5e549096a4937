"""A pipeline folder as diffusers writes it, read without torch: configs to modules, safetensors to
parameters, and back.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxdistill.errors import UserError
from jaxdistill.interop import explain_path, torch_weights
from jaxdistill.interop.torch_weights import Origin, Update, WeightFiles
from jaxdistill.models.stable_diffusion.autoencoder_kl import AutoencoderKL
from jaxdistill.models.stable_diffusion.unet_condition import UNetCondition
from jaxdistill.models.text.clip import ACTIVATIONS, CLIPText
from jaxdistill.run import checkpoint

PIPELINES = {"StableDiffusionPipeline": False, "StableDiffusionXLPipeline": True}
"""Known pipeline classes, and whether they are XL."""
KEY = "_jaxdistill"
"""Of a student's scheduler_config.json: what it was made for, and the LoRAs that it holds."""
OTHER_TASKS = {
    "Inpaint": "inpainting",
    "Upscale": "upscaling",
    "Pix2Pix": "editing by instructions",
    "Depth2Img": "pictures from depth",
    "ControlNet": "pictures from a control image",
    "T2IAdapter": "pictures from a control image",
    "AnimateDiff": "video",
    "Video": "video",
}
"""Parts of the names of pipelines whose networks take more than noise and text."""
INPUTS = {5: "pictures from depth", 7: "upscaling", 8: "editing by instructions", 9: "inpainting"}
"""What networks of so many input channels are for, with four of latents."""


class FolderError(UserError):
    """A pipeline folder that cannot be used, in one line."""


class Part(NamedTuple):
    """A component: its module, its checked config and its weight files.

    `file`: instead of the folder's weights, those of one file. In another layout `origin` says for
    each of diffusers' names what holds it; all begin with `prefix`.
    `updates`: what is added to the weights while they are read.
    """

    module: nn.Module
    config: Mapping[str, Any]
    folder: Path
    stem: str
    file: Path | None = None
    origin: Callable[[str], Origin] | None = None
    prefix: str = ""
    updates: tuple[Update, ...] = ()

    @property
    def is_folders(self) -> bool:
        """Whether its weights are its folder's, as they are."""
        return self.file is None and not self.updates

    @property
    def where(self) -> str:
        """The weights, for messages."""
        return str(self.folder) if self.file is None else f"{self.file} ({self.prefix}*)"

    def files(self) -> list[Path]:
        """The safetensors files of the weights. Raises FolderError where there are none."""
        return weight_files(self.folder, self.stem) if self.file is None else [self.file]

    def weights(self) -> WeightFiles:
        """The tensors by diffusers' names of today. Raises FolderError, WeightsError."""
        base = self._base_weights()
        return torch_weights.UpdatedWeights(base, self.updates) if self.updates else base

    def _base_weights(self) -> WeightFiles:
        """Those tensors without updates."""
        if self.file is None or self.origin is None:
            return WeightFiles(self.files(), rename=_renamer(self.module))
        names = names_of(self)
        origins = {name: self.origin(name) for name in names}
        return torch_weights.RenamedWeights(self.file, origins, names, prefix=self.prefix)


class Folder(NamedTuple):
    """A checked pipeline folder. Nothing large has been read. `components` is model_index.json;
    of its text encoders the last `clip_skip` layers are left out.
    """

    path: Path
    components: Mapping[str, Any]
    xl: bool
    unet: Part
    vae: Part
    text_encoders: tuple[Part, ...]
    tokenizers: tuple[Path, ...]
    scheduler: Mapping[str, Any]
    zero_empty_prompt: bool
    file: Path | None = None
    clip_skip: int = 0

    @property
    def encoders(self) -> dict[str, Part]:
        """The text encoders by diffusers' names."""
        return {f"text_encoder{'_2' * i}": part for i, part in enumerate(self.text_encoders)}

    @property
    def name(self) -> str:
        """Of the checkpoint, for titles."""
        return (self.file or self.path).name


# -------------------------------------------------------------------------------------------- files


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FolderError naming the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FolderError(
            f"{path} is missing; give a pipeline folder written by diffusers' save_pretrained"
        ) from None
    except OSError as error:
        raise FolderError(
            f"{path} cannot be read ({error.strerror}); give this user the right to, or copy it"
            " again"
        ) from None
    except ValueError as error:
        raise FolderError(f"{path} is damaged ({error}); copy it again") from None
    if not isinstance(found, dict):
        raise FolderError(f"{path} is not a JSON object; copy it again")
    return found


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors of a component: one file or shards; of a variant ("fp16") where there are no
    others.

    Raises FolderError where there are only .bin weights, nothing, or a shard is missing.
    """
    start = re.escape(stem)
    names = (
        rf"{start}\.(\w+)\.safetensors",
        rf"{start}\.safetensors\.index\.(\w+)\.json",
        rf"{start}\.(\w+)\.safetensors\.index\.json",
    )
    variants = sorted(
        {
            match[1]
            for path in folder.glob(f"{stem}.*")
            for name in names
            if (match := re.fullmatch(name, path.name))
        }
    )
    for name in ("", *variants):
        infix = f".{name}" if name else ""
        whole = folder / f"{stem}{infix}.safetensors"
        if whole.is_file():
            return [whole]
        for index in (
            folder / f"{stem}.safetensors.index{infix}.json",
            folder / f"{stem}{infix}.safetensors.index.json",
        ):
            if index.is_file():
                listed = read_json(index).get("weight_map")
                if not isinstance(listed, dict) or not listed:
                    raise FolderError(f"{index} has no weight_map; copy the folder again")
                shards = sorted({folder / str(file) for file in listed.values()})
                for shard in shards:
                    if not shard.is_file():
                        raise FolderError(
                            f"{shard} is missing, but {index.name} names it; copy the folder again"
                        )
                return shards
    pickles = sorted(p.name for p in folder.glob("*.bin")) or sorted(
        p.name for p in folder.glob("*.msgpack")
    )
    if pickles:
        raise FolderError(
            f"{folder} holds {pickles[0]} only, and pickles can run code; save the pipeline"
            " as safetensors, with safe_serialization=True"
        )
    whole = folder / f"{stem}.safetensors"
    if whole.is_symlink():
        raise FolderError(
            f"{whole} is a link to {whole.readlink()}, which does not exist; copy the folder again"
        )
    raise FolderError(f"{whole} is missing; copy the folder again")


# ------------------------------------------------------------------------------------------ configs


def _check(
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


def _each(value: Any, count: int, name: str, where: Path) -> tuple[Any, ...]:
    """A number for every level, or a list of one for each."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * count
    if len(values) != count:
        raise FolderError(
            f"{where}: {name} = {value!r} must be one value or {count}, one per block"
        )
    return values


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


def unet_module(config: Mapping[str, Any], where: Path, **options: Any) -> UNetCondition:
    """The network of a UNet2DConditionModel's config. `options`: attention, remat, scan, dtype.

    Raises FolderError.
    """
    _check(config, where, UNET_KEYS, UNET_FIXED)
    channels = tuple(config["block_out_channels"])
    count = len(channels)
    down = _blocks(
        config,
        "down_block_types",
        {"CrossAttnDownBlock2D": True, "DownBlock2D": False},
        count,
        where,
    )
    up = _blocks(
        config, "up_block_types", {"CrossAttnUpBlock2D": True, "UpBlock2D": False}, count, where
    )
    # The field is named for a head's width, but holds their number.
    heads = _each(
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
    layers = _each(config.get("layers_per_block", 2), count, "layers_per_block", where)
    depth, depth_up = _depths(config, layers, (down, up[::-1]), where)
    middle = MIDDLES[config.get("mid_block_type", "UNetMidBlock2DCrossAttn")]
    # The middle has the depth that is written for the last level, whether that attends or not.
    last = _each(config.get("transformer_layers_per_block", 1), count, "", where)[-1]
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
    down = _each(config.get(name, 1), len(layers), name, where)
    if config.get(up) is None and any(isinstance(value, (list, tuple)) for value in down):
        raise FolderError(f"{where}: {name} = {config[name]!r} lists layers, and {up} is missing")
    above = _each(config.get(up) or down[::-1], len(layers), up, where)[::-1]

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


def _blocks(
    config: Mapping[str, Any], name: str, known: Mapping[str, bool], count: int, where: Path
) -> tuple[bool, ...]:
    found = tuple(config[name])
    if len(found) != count:
        raise FolderError(f"{where}: {name} names {len(found)} blocks, block_out_channels {count}")
    for block in found:
        if block not in known:
            raise FolderError(
                f"{where}: the block {block!r} is not known; choose one of {', '.join(known)}"
            )
    return tuple(known[block] for block in found)


def vae_module(
    config: Mapping[str, Any], where: Path, *, xl: bool = False, **options: Any
) -> AutoencoderKL:
    """The autoencoder of an AutoencoderKL's config. `options`: attention, dtype.

    What its pipeline does not look at is not looked at here: a shift_factor, and but for `xl`
    latents_mean and latents_std. Raises FolderError.
    """
    _check(config, where, VAE_KEYS, VAE_FIXED)
    channels = tuple(config["block_out_channels"])
    _blocks(config, "down_block_types", {"DownEncoderBlock2D": True}, len(channels), where)
    _blocks(config, "up_block_types", {"UpDecoderBlock2D": True}, len(channels), where)
    mean, std = (tuple(config.get(f"latents_{name}") or ()) for name in ("mean", "std"))
    latents = config.get("latent_channels", 4)
    moved = bool(xl and mean and std)
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


CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
}


def _read_index(root: Path) -> tuple[dict[str, Any], list[str]]:
    """model_index.json, and the components that its pipeline needs. Raises FolderError."""
    where = root / "model_index.json"
    if not where.is_file():
        raise FolderError(explain_path(root))
    index: dict[str, Any] = read_json(where)
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in PIPELINES:
        raise FolderError(f"{where}: {_other_pipeline(index)}")
    needed = ["unet", "vae", "text_encoder", "tokenizer"]
    needed += ["text_encoder_2", "tokenizer_2"] if PIPELINES[name] else []
    for component in needed:
        entry = index.get(component)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if found not in CLASSES[component]:
            allowed = " or ".join(CLASSES[component])
            raise FolderError(
                f"{where}: {component} is of class {found!r}; only {allowed} is supported"
            )
    return index, needed


def _other_pipeline(index: Mapping[str, Any]) -> str:
    """Why a pipeline is not supported, and what is."""
    name = str(index.get("_class_name"))
    shown = f"the pipeline {index.get('_class_name')!r}"
    task = next((task for part, task in OTHER_TASKS.items() if part in name), "")
    refiner = "XLImg2Img" in name and (index.get("text_encoder") or [None])[0] is None
    if refiner:
        return f"{shown} is XL's refiner, which ends another's work; give the base"
    if "Img2Img" in name and not task:
        same = "StableDiffusionXLPipeline" if "XL" in name else "StableDiffusionPipeline"
        return (
            f"{shown} starts from pictures; its networks may be those of text to"
            f" image: then save them as {same}"
        )
    does = f" is of {task}; it" if task else ""
    return f"{shown}{does} is not supported, only {', '.join(PIPELINES)}"


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


def _tokenizers(root: Path, needed: Sequence[str]) -> tuple[Path, ...]:
    """The folders of the tokenizers. Raises FolderError for one without its files."""
    tokenizers = [root / component for component in needed if component.startswith("tokenizer")]
    for tokenizer in tokenizers:
        if not (tokenizer / "tokenizer.json").is_file() and not all(
            (tokenizer / f).is_file() for f in ("vocab.json", "merges.txt")
        ):
            raise FolderError(
                f"{tokenizer} has neither tokenizer.json nor vocab.json and merges.txt; copy the"
                " folder again"
            )
    return tuple(tokenizers)


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
      remat: of the UNet, as in `UNetCondition`.
      scan: of the UNet, as in `UNetCondition`.
      dtype: of the computation of all networks.

    Raises:
      FolderError: no pipeline folder, an unknown pipeline, component or setting, missing files; one
        line that names it.
    """
    root = Path(path)
    index, needed = _read_index(root)
    xl = PIPELINES[index["_class_name"]]
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

    encoders = [part("text_encoder", "model", text_module, projection=False, dtype=dtype)]
    if xl:
        encoders.append(part("text_encoder_2", "model", text_module, projection=True, dtype=dtype))
    unet = part("unet", "diffusion_pytorch_model", unet_module, remat=remat, scan=scan, **options)
    width, wanted = (
        sum(encoder.module.hidden_size for encoder in encoders),
        _context_width(unet.config),
    )
    if width != wanted:
        raise FolderError(
            f"{root}: the unet's cross_attention_dim is {wanted}, but the text encoder gives"
            f" {width}; one of them belongs to another model"
        )
    vae = part("vae", "diffusion_pytorch_model", vae_module, xl=xl, **options)
    channels = (unet.module.in_channels, unet.module.out_channels, vae.module.latent_channels)
    check_channels(*channels, root / "unet" / "config.json")
    return Folder(
        path=root,
        components=index,
        xl=xl,
        unet=unet,
        vae=vae,
        text_encoders=tuple(encoders),
        tokenizers=_tokenizers(root, needed),
        scheduler=read_json(root / "scheduler" / "scheduler_config.json"),
        zero_empty_prompt=bool(index.get("force_zeros_for_empty_prompt", True)) if xl else False,
    )


# ------------------------------------------------------------------------------------------ weights


def example_inputs(part: Part) -> tuple[Any, ...]:
    """The smallest inputs that a part's module can be initialised with."""
    config, module = part.config, part.module
    if isinstance(module, UNetCondition):
        side = 2 ** (len(module.channels) - 1)
        cond = {"context": jnp.zeros((1, 2, _context_width(config)))}
        if module.addition_time_width:
            pooled = (
                config["projection_class_embeddings_input_dim"] - 6 * module.addition_time_width
            )
            cond |= {"pooled": jnp.zeros((1, pooled)), "time_ids": jnp.zeros((1, 6))}
        if module.guidance_width:
            cond |= {"guidance": jnp.zeros((1,))}
        return jnp.zeros((1, side, side, module.in_channels)), jnp.zeros((1,)), cond
    if isinstance(module, AutoencoderKL):
        return (jnp.zeros((1, module.factor * 2, module.factor * 2, module.in_channels)),)
    return (jnp.zeros((1, 2), jnp.int32),)


def _context_width(config: Mapping[str, Any]) -> int:
    width = config["cross_attention_dim"]
    return width[0] if isinstance(width, list) else width


def abstract_params(part: Part) -> Any:
    """The shapes of a part's parameters; nothing is computed."""
    leaves, tree = jax.tree.flatten(example_inputs(part))
    found = _initialised(
        part.module, tree, tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in leaves)
    )
    return jax.tree.map(lambda a: a, found)  # a tree of its own


@lru_cache(maxsize=16)
def _initialised(module: nn.Module, tree: Any, inputs: Sequence[jax.ShapeDtypeStruct]) -> Any:
    """The shapes of `module.init`, traced once: a run reads a folder's weights several times."""
    return jax.eval_shape(module.init, jax.random.key(0), *jax.tree.unflatten(tree, inputs))


def load_params(part: Part, *, dtype: Any = np.float32, shardings: Any = None) -> Any:
    """The parameters of a part, straight to `dtype` and `shardings`.

    Raises FolderError or WeightsError.
    """
    return torch_weights.load(
        part.weights(),
        abstract_params(part),
        where=part.where,
        dtype=dtype,
        ignore=_ignored(part),
        shardings=shardings,
    )


def names_of(part: Part) -> dict[str, tuple[int, ...]]:
    """Torch's names and shapes of a part's parameters."""
    return torch_weights.names_of(abstract_params(part))


def _renamer(module: nn.Module) -> Any:
    """Older names of a checkpoint to those of today."""
    if isinstance(module, CLIPText):
        return lambda name: (
            name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"
        )
    if isinstance(module, AutoencoderKL):
        old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
        pattern = re.compile(r"(\.attentions\.\d+)\.(query|key|value|proj_attn)\.")
        return lambda name: pattern.sub(lambda m: f"{m[1]}.{old[m[2]]}.", name)
    return lambda name: name


def _ignored(part: Part) -> Callable[[str], bool]:
    """Tensors of a checkpoint that are no parameters."""
    module, prefix = part.module, part.prefix
    if not isinstance(module, CLIPText):
        # Of an autoencoder's own training: its loss, and averages.
        return lambda name: name.startswith((f"{prefix}loss.", f"{prefix}model_ema."))

    def ignored(name: str) -> bool:
        rest = name.removeprefix(prefix)
        # Buffers of older transformers and of OpenCLIP; a projection that a plain CLIPTextModel
        # does not use.
        if rest.endswith("position_ids") or rest == "attn_mask":
            return True
        if rest.startswith("text_projection"):
            return not module.projection
        # The temperature and the other half of a whole CLIP.
        if part.file is not None and rest.startswith(("logit_scale", "vis")):
            return True
        # Layers after the one whose output 2.x takes.
        layer = re.search(r"(resblocks|encoder\.layers)\.(\d+)\.", rest)
        return bool(part.file and layer and int(layer[2]) >= module.layers)

    return ignored


OTHER_FORMATS = (
    "*.safetensors",
    "*.index*.json",
    "*.bin",
    "*.msgpack",
    "*.ckpt",
    "*.onnx*",
    "openvino_*",
)
"""Files of a component that are weights."""


def weights_of(component: Path) -> list[Path]:
    """The safetensors of any component, none where it has no weights of that format."""
    for stem in ("model", "diffusion_pytorch_model"):
        with contextlib.suppress(FolderError):
            return weight_files(component, stem)
    return []


def component_files(source: Path) -> dict[str, Path]:
    """{path in a copy: file} of a component, so that stock diffusers loads the copy without naming
    a variant: its safetensors once, under plain names.

    Other formats of the weights are left out where there are safetensors, and copied where there
    are none.
    """
    weights = weights_of(source)
    found: dict[str, Path] = {}
    for root, _, names in os.walk(source, followlinks=True):
        for name in names:
            if not (weights and any(fnmatch(name, pattern) for pattern in OTHER_FORMATS)):
                path = Path(root, name)
                found[str(path.relative_to(source))] = path
    plain = {re.sub(r"\.\w+(?=(-\d+-of-\d+)?\.safetensors$)", "", p.name): p for p in weights}
    return found | plain


def copy_component(source: Path, target: Path) -> None:
    """Copy a component's folder (see `component_files`). Its modes are not copied: what is read
    only there can be removed here.
    """
    files, weights = component_files(source), weights_of(source)
    for name, path in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)
    if len(weights) > 1:
        where = torch_weights.WeightFiles(weights).where
        names = {path: name for name, path in files.items()}
        stem = names[weights[0]].partition("-")[0]
        weight_map = {name: names[path] for name, (path, _) in where.items()}
        torch_weights.save_index(
            target, stem, weight_map, sum(path.stat().st_size for path in weights)
        )


def part_of(source: Folder, name: str) -> Part | None:
    """A component's part, None for one that the folder only copies."""
    return {"vae": source.vae, **source.encoders}.get(name)


def copy_part(source: Folder, name: str, target: Path) -> None:
    """A component's folder, with the weights that the source takes for it."""
    part = part_of(source, name)
    if part is None or part.is_folders:
        copy_component(source.path / name if part is None else part.folder, target)
        return
    target.mkdir()
    checkpoint.write_json(target / "config.json", part.config)
    weights = part.weights()
    names = torch_weights.names_of(abstract_params(part))
    torch_weights.save(target, part.stem, {n: weights.stored(n) for n in names})


def copied(source: Folder) -> list[str]:
    """The components that a student takes over. Only components: a repository often holds the whole
    model once more beside them.
    """
    return [
        name
        for name, entry in source.components.items()
        if isinstance(entry, list)
        and entry[0]
        and (source.path / name).is_dir()
        and name not in ("unet", "scheduler")
    ]


def check_target(target: Path) -> None:
    """Raise FolderError where a student's folder would replace something else."""
    if target.exists() and not target.is_dir():
        raise FolderError(f"{target} exists and is a file; choose another folder")
    if target.exists() and any(target.iterdir()) and not (target / "model_index.json").is_file():
        raise FolderError(f"{target} exists and is not a pipeline folder; choose another folder")


def rehearse(source: Folder, target: Path) -> int:
    """What `save_student` will do, without a write: bytes of what it copies.

    A training of hours should not end in the first look at the teacher's other files.

    Raises:
      FolderError: the target is something else, or a file cannot be read or was never fetched.
      CheckpointError: something is left there that cannot be removed.
    """
    check_target(target)
    for end in (".tmp", ".old"):
        checkpoint.clear(target.with_name(target.name + end))
    size = 0
    for name in copied(source):
        part = part_of(source, name)
        if part is not None and not part.is_folders:
            size += 4 * sum(a.size for a in jax.tree.leaves(abstract_params(part)))
            continue
        for path in component_files(source.path / name if part is None else part.folder).values():
            try:
                torch_weights.check_pointer(path)
                size += path.stat().st_size
            except OSError as error:
                raise FolderError(
                    f"{path} cannot be read ({error.strerror}), and a student's folder takes a"
                    " copy of it; mend this, or copy the teacher's folder again"
                ) from None
    return size


def save_student(
    source: Folder,
    target: str | Path,
    params: Any,
    *,
    scheduler: Mapping[str, Any],
    size: tuple[int, int] | None = None,
    dtype: Any = None,
    extra: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write a pipeline folder that is `source` with another UNet and scheduler.

    Appears whole or not at all.

    Args:
      source: the teacher's folder; its other components are copied file by file.
      target: the folder to write.
      params: of the UNet.
      scheduler: its config.
      size: height and width in pixels that the student was made for; those of the source if None.
      dtype: of the UNet's weights; that of the parameters if None.
      extra: {file name: JSON object} to put beside model_index.json.

    Raises:
      FolderError: the target exists and holds something else than a pipeline.
      CheckpointError: it cannot be written.
    """
    target = Path(target).absolute()
    check_target(target)
    with checkpoint.made_whole(target) as temporary:
        for name in copied(source):
            copy_part(source, name, temporary / name)
        (temporary / "unet").mkdir()
        torch_weights.save(
            temporary / "unet",
            source.unet.stem,
            torch_weights.torch_tensors(params, dtype=dtype),
        )
        config = source.unet.config if size is None else sized_config(source, size)
        checkpoint.write_json(temporary / "unet" / "config.json", config)
        (temporary / "scheduler").mkdir()
        checkpoint.write_json(temporary / "scheduler" / "scheduler_config.json", scheduler)
        index = _index(source, temporary) | {"scheduler": ["diffusers", scheduler["_class_name"]]}
        checkpoint.write_json(temporary / "model_index.json", index)
        for name, value in (extra or {}).items():
            checkpoint.write_json(temporary / name, value)


def sized_config(folder: Folder, size: tuple[int, int]) -> dict[str, Any]:
    """The UNet's config for a size (height, width in pixels) that diffusers then draws by default.

    XL's pipeline reads squares alone: for other sizes its config stays.
    """
    config = dict(folder.unet.config)
    if size == native_size(folder):
        return config
    height, width = (side // folder.vae.module.factor for side in size)
    if not folder.xl:
        # A list: of a number below 64 diffusers thinks that an old config is wrong.
        return {**config, "sample_size": [height, width]}
    return {**config, "sample_size": height} if height == width else config


def native_size(folder: Folder) -> tuple[int, int]:
    """Height and width in pixels that diffusers draws by default."""
    native = folder.unet.config.get("sample_size") or 64
    version = tuple(
        int(n)
        for n in re.findall(r"\d+", str(folder.unet.config.get("_diffusers_version", "")))[:3]
    )
    if not folder.xl and version and version < (0, 9, 0) and isinstance(native, int):
        # As diffusers does: folders of that age give the training size of 1.x wrongly.
        native = max(native, 64)
    sides = native if isinstance(native, (list, tuple)) else (native, native)
    height, width = (side * folder.vae.module.factor for side in sides)
    return height, width


def _index(source: Folder, written: Path) -> dict[str, Any]:
    """The source's model_index.json for a folder that has these components."""
    index = dict(source.components)
    for name, entry in source.components.items():
        if isinstance(entry, list) and entry[0] and not (written / name).is_dir():
            # A safety checker that the teacher's folder names and does not hold.
            index[name] = [None, None]
            if name == "safety_checker":
                index["requires_safety_checker"] = False
    return index
