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
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxdistill.errors import UserError
from jaxdistill.interop import torch_weights
from jaxdistill.interop.torch_weights import Origin, Update, WeightFiles
from jaxdistill.models.stable_diffusion.autoencoder_kl import AutoencoderKL
from jaxdistill.models.stable_diffusion.unet_condition import UNetCondition
from jaxdistill.models.text.clip import CLIPText
from jaxdistill.models.text.qwen3 import Qwen3Text
from jaxdistill.run import checkpoint

if TYPE_CHECKING:
    from jaxdistill.interop.families.family import Family

KEY = "_jaxdistill"
"""Of a student's scheduler_config.json: what it was made for, and the LoRAs that it holds."""


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
    """A checked pipeline folder. Nothing large has been read. `components` is model_index.json,
    `network` what is distilled; each text encoder has a name and a tokenizer's folder, and its last
    `clip_skip` layers are left out.
    """

    path: Path
    components: Mapping[str, Any]
    family: "Family"
    network: Part
    vae: Part
    text_encoders: tuple[Part, ...]
    encoder_names: tuple[str, ...]
    tokenizers: tuple[Path, ...]
    scheduler: Mapping[str, Any]
    zero_empty_prompt: bool
    file: Path | None = None
    clip_skip: int = 0

    @property
    def encoders(self) -> dict[str, Part]:
        """The text encoders by diffusers' names."""
        return dict(zip(self.encoder_names, self.text_encoders, strict=True))

    @property
    def xl(self) -> bool:
        """Whether it is Stable Diffusion XL."""
        return self.family.xl

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
    if parts := sorted(p.name for p in folder.glob(f"{stem}*-of-*.safetensors")):
        raise FolderError(
            f"{folder} holds {parts[0]}, but no {stem}.safetensors.index.json that names all of"
            " its shards; copy the folder again"
        )
    raise FolderError(f"{whole} is missing; copy the folder again")


# ------------------------------------------------------------------------------------------ configs


# ------------------------------------------------------------------------------------------ weights


def example_inputs(part: Part) -> tuple[Any, ...]:
    """The smallest inputs that a part's module can be initialised with."""
    config, module = part.config, part.module
    if hasattr(module, "example"):
        return module.example()
    if isinstance(module, UNetCondition):
        side, width = 2 ** (len(module.channels) - 1), config["cross_attention_dim"]
        width = width[0] if isinstance(width, list) else width
        cond = {"context": jnp.zeros((1, 2, width))}
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


def check_weights(*parts: Part) -> None:
    """Refuse parts whose weights `load_params` would refuse by their headers: in time, as a large
    part that is read before them takes minutes. Raises FolderError or WeightsError.
    """
    for part in parts:
        torch_weights.check(
            part.weights(), abstract_params(part), where=part.where, ignore=_ignored(part)
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
    if isinstance(module, Qwen3Text):  # as part of the language model
        return lambda name: name.removeprefix("model.")
    return lambda name: name


def _ignored(part: Part) -> Callable[[str], bool]:
    """Tensors of a checkpoint that are no parameters."""
    module, prefix = part.module, part.prefix
    if isinstance(module, Qwen3Text):  # what makes words of its states
        return lambda name: name == "lm_head.weight"
    if not isinstance(module, CLIPText):
        # Of an autoencoder's own training: its loss, and averages. Of PixArt's: what it saw in
        # place of a caption. Of T5: once more "shared".
        others = ("loss.", "model_ema.", "caption_projection.y_embedding", "encoder.embed_tokens.")
        return lambda name: name.startswith(tuple(prefix + other for other in others))

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
        and name not in (source.family.network, "scheduler")
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
    """Write a pipeline folder that is `source` with another network and scheduler.

    Appears whole or not at all.

    Args:
      source: the teacher's folder; its other components are copied file by file.
      target: the folder to write.
      params: of the network.
      scheduler: its config.
      size: height and width in pixels that the student was made for; those of the source if None.
      dtype: of the network's weights; that of the parameters if None.
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
        network = temporary / source.family.network
        network.mkdir()
        torch_weights.save(
            network,
            source.network.stem,
            torch_weights.torch_tensors(params, dtype=dtype),
        )
        config = source.network.config
        if size is not None and size != source.family.native_size(source):
            config = source.family.sized_config(source, size)
        checkpoint.write_json(network / "config.json", config)
        (temporary / "scheduler").mkdir()
        checkpoint.write_json(temporary / "scheduler" / "scheduler_config.json", scheduler)
        index = _index(source, temporary) | {"scheduler": ["diffusers", scheduler["_class_name"]]}
        checkpoint.write_json(temporary / "model_index.json", index)
        for name, value in (extra or {}).items():
            checkpoint.write_json(temporary / name, value)


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
