"""LoRAs in files, added to a pipeline's weights while those are read: W + weight alpha / r up down
(Hu et al. 2021), with convolutions (LoCon), as Kohya's trainer, diffusers and PEFT write them.

Every key of a file is used once, or the file is refused. What is not read is named: LoHa, LoKr,
DoRA and other kinds of updates.
"""

import json
import math
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxdistill.errors import UserError
from jaxdistill.interop import PICKLES, lora_names
from jaxdistill.interop.diffusers_folder import KEY, Folder, read_json
from jaxdistill.interop.torch_weights import Update, WeightFiles
from jaxdistill.run import checkpoint

ROLES = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.bias": "bias",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
    ".diff": "diff",
    ".diff_b": "diff_b",
    ".w_norm": "diff",
    ".b_norm": "diff_b",
}
"""Ends of a file's keys, and what such a tensor is to its layer."""
FOREIGN = {
    ".hada_": "LoHa",
    ".lokr_": "LoKr",
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".lora_embedding_": "LoRA of an embedding",
    ".oft_": "OFT",
    ".on_input": "IA3",
}
"""Parts of the keys of other kinds of updates."""
Shape = tuple[int, ...]
Place = tuple[str, str]
"""A component, and a layer of it by torch's name."""
_WIDTHS: Mapping[Shape, str] = {
    (768,): "Stable Diffusion 1.x",
    (1024,): "Stable Diffusion 2.x",
    (2048,): "SDXL",
}
"""Families by the width of the text in cross-attention."""
_TOLD = {
    r"sdxl|stable-diffusion-xl": _WIDTHS[(2048,)],
    r"sd_v2|sd_2|stable-diffusion-v2": _WIDTHS[(1024,)],
    r"sd_v1|sd_1|stable-diffusion-v1": _WIDTHS[(768,)],
}
"""What trainers write of the base into a file's metadata."""
_MARKS = {
    r"double_blocks|single_transformer_blocks": "Flux",
    r"joint_blocks|add_q_proj": "Stable Diffusion 3",
    r"lora_te2_|text_encoder_2\.": _WIDTHS[(2048,)],
}
METADATA = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's configs in a file's metadata, their keys behind a component's."""
NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
"""Files of PEFT's and of diffusers' folders."""


class LoraError(UserError):
    """A LoRA that cannot be used, in one line."""


class Change(NamedTuple):
    """What a file has for one tensor.

    `keys`: {role: key}, of "down", "up", "mid", "alpha", or one of "diff" and "bias".
    `shape`: of the tensor. `rank`: of the update. `alpha`: where no key has it. `rows`: those of
    the file's tensor that are this one's, where it holds several layers.
    """

    keys: Mapping[str, str]
    shape: Shape
    rank: int = 1
    alpha: float = 1.0
    root: bool = False  # scaled by alpha / sqrt(r) (Kalajdzievski 2023)
    rows: slice = slice(None)


@dataclass(frozen=True)
class Lora:
    """What one file adds to one component: an `Update`."""

    files: Sequence[Path]
    weight: float
    tensors: WeightFiles
    changes: Mapping[str, Change]

    @property
    def names(self) -> Collection[str]:
        """The tensors that it changes."""
        return self.changes.keys()

    def read(self, name: str) -> np.ndarray:
        """What is added to one of them, float32. Raises LoraError for values that are not finite.

        A convolution with a core (Tucker): up [o, r], mid [r, s, h, w], down [s, i].
        """
        change = self.changes[name]
        values = self._values(change.keys)
        for role in values.keys() & {"up", "diff", "bias"}:
            values[role] = values[role][change.rows]
        scale = self.weight
        if "diff" not in values:
            alpha = np.asarray(values.pop("alpha", change.alpha)).item()
            scale *= alpha / (math.sqrt(change.rank) if change.root else change.rank)
        if len(values) == 1:
            (value,) = values.values()
            return np.float32(scale) * value.reshape(change.shape)
        up, down = (values[role].reshape(len(values[role]), -1) for role in ("up", "down"))
        down *= np.float32(scale)
        if "mid" in values:
            value = np.einsum("or,rshw,si->oihw", up, values["mid"], down, optimize=True)
        else:
            value = up @ down
        return value.reshape(change.shape)

    def _values(self, keys: Mapping[str, str]) -> dict[str, np.ndarray]:
        """{role: values, float32}."""
        found = {}
        tensors = self.tensors.read_several([*keys.values()])
        for (role, key), tensor in zip(keys.items(), tensors, strict=True):
            found[role] = tensor.astype(np.float32)
            if role != "alpha" and not jnp.issubdtype(tensor.dtype, jnp.floating):
                raise LoraError(
                    f"{self.files[0]}: {key} is {tensor.dtype}: quantised LoRAs are not read; take"
                    " one in float16, bfloat16 or float32"
                )
            if not np.isfinite(found[role]).all():
                raise LoraError(
                    f"{self.files[0]}: {key} has values that are not finite; the file is damaged,"
                    " or its training failed: take another one"
                )
        return found


def styled(folder: Folder, loras: Sequence[str]) -> Folder:
    """The folder whose components have these LoRAs added, in their order. Reads names and shapes.

    One that the folder's weights hold already, as a student's of a teacher with it, is left out,
    and a line says so.

    Args:
      folder: a pipeline.
      loras: FILE or FILE:WEIGHT, as of `parse`; a folder of PEFT or diffusers will do.

    Raises:
      LoraError: a file that cannot be read, or keys that are not the folder's.
    """
    if not loras:
        return folder
    entries = record(folder)
    held = {entry["hash"]: entry["weight"] for entry in entries}
    names = {entry["file"] for entry in entries}
    stems, given = lora_names.known_stems(folder), set()
    for text in loras:
        path, weight = parse(text)
        files = _files(path)
        name = checkpoint.hash_files(files)
        if name in given:
            raise LoraError(f"{files[0]} is given twice; give it once, with one weight")
        given.add(name)
        where = folder.file or folder.path
        if name not in held and files[0].name in names:
            raise LoraError(
                f"{where} holds another version of {files[0].name} already; give the checkpoint"
                f" without it, or rename {files[0]} if it is another style"
            )
        if name not in held:
            folder = _with(folder, files, weight, stems)
        elif held[name] != weight:
            raise LoraError(
                f"{where} holds {files[0]} with the weight {held[name]:g} already, not"
                f" {weight:g}; leave it out, or give the checkpoint without it"
            )
        else:
            print(f"{where} holds {files[0]} already: not added again", file=sys.stderr)
    return folder


def parse(text: str) -> tuple[Path, float]:
    """FILE:0.8 -> its path and weight; 1 without one. Raises LoraError."""
    path, _, weight = text.rpartition(":")
    if path and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", weight):
        return Path(path).expanduser(), float(weight)
    if path.endswith(".safetensors"):
        raise LoraError(f"{text}: {weight!r} is no weight; give FILE or FILE:0.8")
    if not text:
        raise LoraError("a LoRA's file has no name; give FILE or FILE:0.8")
    return Path(text).expanduser(), 1.0


def record(folder: Folder) -> list[dict[str, Any]]:
    """The LoRAs in a folder's weights: those of its own teacher, and what is added now."""
    found = folder.scheduler.get(KEY, {}).get("loras", [])
    updates = [u for part in lora_names.components(folder).values() for u in part.updates]
    added = dict.fromkeys((tuple(update.files), update.weight) for update in updates)
    return found + [
        {"file": files[0].name, "weight": weight, "hash": checkpoint.hash_files(files)}
        for files, weight in added
    ]


def _files(path: Path) -> tuple[Path, ...]:
    """The weights at a path, and PEFT's config beside them. Raises LoraError."""
    if path.is_dir():
        inside = [path / name for name in NAMES if (path / name).is_file()]
        if not inside:
            raise LoraError(f"{path} is a folder without {' or '.join(NAMES)}; give a LoRA's file")
        path = inside[0]
    if not path.exists():
        raise LoraError(f"{path} does not exist; give a LoRA's .safetensors file")
    if path.suffix in PICKLES:
        raise LoraError(
            f"{path} is a pickle, which can run code when it is read; save it as safetensors in a"
            " program that you trust it to"
        )
    if path.name != NAMES[0]:
        return (path,)
    config = path.with_name("adapter_config.json")
    if not config.is_file():
        raise LoraError(f"{path} needs {config.name} beside it, which has its alpha; copy it there")
    return (path, config)


# ----------------------------------------------------------------------------------------- the keys


def _grouped(path: Path, tensors: WeightFiles) -> tuple[dict[str, dict[str, str]], list[str]]:
    """{stem: {role: key}}, and the keys without a role.

    Raises LoraError where no key is a LoRA's, or a layer lacks a part.
    """
    found: dict[str, dict[str, str]] = {}
    strange = []
    for key in sorted(tensors.shapes):
        kind = next((kind for part, kind in FOREIGN.items() if part in key), "")
        if kind:
            raise LoraError(
                f"{path} is a {kind} ({key}), which is not read; only LoRA, LoCon and full"
                " differences are: merge it into the checkpoint with the program it is for"
            )
        end = next((end for end in ROLES if key.endswith(end)), "")
        if not end:
            strange.append(key)
            continue
        keys = found.setdefault(key.removesuffix(end), {})
        other = keys.setdefault(ROLES[end], key)
        if other != key:
            raise LoraError(f"{path} has {other} and {key} for one part of a layer")
    if not any({"down", "up", "diff", "diff_b"} & keys.keys() for keys in found.values()):
        some = ", ".join(strange[:3])
        whole = any(re.search(r"diffusion_model\.|down_blocks\.|text_model\.", k) for k in strange)
        what = "is a whole checkpoint or component" if whole else "has none of a LoRA's keys"
        raise LoraError(f"{path} {what} (it has {some}, ...); give a LoRA's file")
    for stem, keys in found.items():
        if problem := _incomplete(keys, tensors.shapes):
            raise LoraError(f"{path} is damaged: {stem} {problem}; get the file again")
    return found, strange


def _incomplete(keys: Mapping[str, str], shapes: Mapping[str, Shape]) -> str:
    """What is wrong with the parts of one layer, or nothing."""
    low = keys.keys() & {"down", "up", "mid", "alpha", "bias"}
    if not low:
        return ""
    for part in ("down", "up"):
        if part not in keys:
            return f"has {' and '.join(sorted(low))} without {part}"
    if "diff" in keys or {"bias", "diff_b"} <= keys.keys():
        return "has a low-rank and a full difference"
    if "alpha" in keys and math.prod(shapes[keys["alpha"]]) != 1:
        return f"has an alpha of shape {list(shapes[keys['alpha']])}, not a number"
    down, up = shapes[keys["down"]], shapes[keys["up"]]
    if min(len(down), len(up)) < 2 or math.prod(up[2:]) != 1:
        return f"has a down of shape {list(down)} and an up of {list(up)}"
    mid = shapes[keys["mid"]] if "mid" in keys else (down[0], down[0], 1, 1)
    if "mid" in keys and (len(mid) != 4 or math.prod(down[2:]) != 1):
        return f"has a mid of shape {list(mid)} and a down of {list(down)}"
    if mid[:2] != (up[1], down[0]):
        return f"has parts of different ranks: down {list(down)}, up {list(up)}"
    return "is of rank 0" if not down[0] else ""


def _plain(shape: Shape) -> Shape:
    """A shape, where a 1x1 convolution is a matrix."""
    return tuple(shape[:2] if math.prod(shape[2:]) == 1 else shape)


def _change(keys: Mapping[str, str], shapes: Mapping[str, Shape]) -> Shape:
    """The shape of what a layer's keys add to its weight; none where they change a bias only."""
    if "diff" in keys:
        return _plain(shapes[keys["diff"]])
    if "down" not in keys:
        return ()
    down, kernel = shapes[keys["down"]], shapes[keys.get("mid", keys["down"])][2:]
    return _plain((shapes[keys["up"]][0], down[1], *kernel))


def _misfit(
    keys: Mapping[str, str], shapes: Mapping[str, Shape], layer: Mapping[str, Shape]
) -> str:
    """Why keys do not fit a layer whose tensors have these shapes, or nothing."""
    added = _change(keys, shapes)
    if added and added != _plain(layer["weight"]):
        return f"is {list(added)}, the layer {list(layer['weight'])}"
    bias = shapes[keys["bias"]] if "bias" in keys else None
    bias = shapes[keys["diff_b"]] if "diff_b" in keys else bias
    if bias is not None and tuple(bias) != tuple(layer.get("bias", ())):
        return f"has a bias of {list(bias)}, the layer {list(layer.get('bias', ()))}"
    return ""


# --------------------------------------------------------------------------------------- the layers


def _with(
    folder: Folder,
    files: Sequence[Path],
    weight: float,
    stems: Mapping[str, Sequence[Place]],
) -> Folder:
    """The folder with one file added. `stems`: of `known_stems`. Raises LoraError."""
    tensors = WeightFiles(files[:1])
    parts = lora_names.components(folder)
    shapes = {component: lora_names.layers(part) for component, part in parts.items()}
    rows: dict[Place, slice] = {}
    places = _places(files[0], tensors, folder, stems, shapes, rows)
    configs = _configs(files, tensors.metadata)
    changes: dict[str, dict[str, Change]] = {}
    for (component, layer), keys in places.items():
        config = configs.get(component, configs.get("", {}))
        try:
            found = _changes(layer, keys, tensors.shapes, shapes[component][layer], config)
            share = rows.get((component, layer), slice(None))
            found = {name: change._replace(rows=share) for name, change in found.items()}
        except (AttributeError, TypeError, ValueError, re.error) as error:
            raise LoraError(f"{files[-1]}: the alpha of {layer} is damaged ({error})") from None
        changes.setdefault(component, {}).update(found)
    for component, added in changes.items():
        update: Update = Lora(files, weight, tensors, added)
        part = parts[component]
        parts[component] = part._replace(updates=(*part.updates, update))
    network = parts.pop(folder.family.network)
    return folder._replace(network=network, text_encoders=tuple(parts.values()))


def _places(
    path: Path,
    tensors: WeightFiles,
    folder: Folder,
    stems: Mapping[str, Sequence[Place]],
    shapes: Mapping[str, Mapping[str, Mapping[str, Shape]]],
    rows: dict[Place, slice],
) -> dict[Place, dict[str, str]]:
    """{(component, layer): {role: key}} of all keys of a file; adds to `rows` what is theirs of
    tensors of several layers. Raises LoraError.
    """
    grouped, strange = _grouped(path, tensors)
    found: dict[Place, dict[str, str]] = {}
    network, fused = folder.family.network, lora_names.fused_stems(folder)
    problems = dict.fromkeys(strange, "is unknown")
    for stem, keys in grouped.items():
        if stem in fused:
            whole, parts = _together([(name, shapes[network][name]) for name in fused[stem]])
            if problem := _misfit(keys, tensors.shapes, whole):
                problems[stem] = problem
            for layer, part in parts.items():
                other = next(iter(found.get((network, layer), {}).values()), "")
                if other:
                    raise LoraError(f"{path} has {stem} and {other} for one layer")
                found[network, layer], rows[network, layer] = keys, part
            continue
        told = {
            (component, layer): _misfit(keys, tensors.shapes, shapes[component][layer])
            for component, layer in stems.get(stem, ())
        }
        fits = [place for place, problem in told.items() if not problem]
        if len(fits) > 1:
            fits = [place for place in fits if place[0] == path.parent.name]
        if len(fits) != 1:
            why = next(iter(told.values()), "is unknown") or "may be of either text encoder"
            problems[stem] = why
        elif fits[0] in found:
            other = next(iter(found[fits[0]].values()))
            raise LoraError(f"{path} has {next(iter(keys.values()))} and {other} for one layer")
        else:
            found[fits[0]] = keys
    if problems:
        matched = len({key for keys in found.values() for key in keys.values()})
        some = ", ".join(f"{name} {why}" for name, why in [*problems.items()][:3])
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        base = _base(tensors)
        raise LoraError(
            f"{path}: {matched} of its {len(tensors.shapes)} keys fit {folder.name}, but {some}"
            f"{more}; {f'it looks like one for {base}, ' if base else ''}give a LoRA for this"
            " checkpoint"
        )
    return found


def _together(
    several: Sequence[tuple[str, Mapping[str, Shape]]],
) -> tuple[dict[str, Shape], dict[str, slice]]:
    """The shapes of a layer that holds several, row below row, and the rows of each."""
    parts, count = {}, 0
    for name, leaves in several:
        parts[name] = slice(count, count + leaves["weight"][0])
        count = parts[name].stop
    whole = {"weight": (count, *several[0][1]["weight"][1:])}
    if all("bias" in leaves for _, leaves in several):
        whole["bias"] = (count,)
    return whole, parts


def _base(tensors: WeightFiles) -> str:
    """The family that a LoRA seems to be for, or nothing."""
    keys = ("ss_base_model_version", "modelspec.architecture")
    told = " ".join(tensors.metadata.get(key, "") for key in keys)
    for pattern, family in _TOLD.items():
        if re.search(pattern, told):
            return family
    for key, shape in tensors.shapes.items():
        if re.search(r"attn2.to_[kv]\W.*(down|lora_A)", key) and shape[1:2] in _WIDTHS:
            return _WIDTHS[shape[1:2]]
    text = " ".join(tensors.shapes)
    return next((family for pattern, family in _MARKS.items() if re.search(pattern, text)), "")


def _changes(
    layer: str,
    keys: Mapping[str, str],
    shapes: Mapping[str, Shape],
    there: Mapping[str, Shape],
    config: Mapping[str, Any],
) -> dict[str, Change]:
    """{tensor: what is added to it} of one layer. `there`: the shapes of its tensors."""
    found = {}
    if "diff" in keys:
        found["weight"] = Change({"diff": keys["diff"]}, there["weight"])
    if "diff_b" in keys:
        found["bias"] = Change({"diff": keys["diff_b"]}, there["bias"])
    if "down" in keys:
        rank = shapes[keys["down"]][0]
        scale = (rank, _alpha(config, layer, rank), bool(config.get("use_rslora")))
        low = {role: key for role, key in keys.items() if role not in ("bias", "diff_b")}
        found["weight"] = Change(low, there["weight"], *scale)
        if "bias" in keys:
            alpha = {"alpha": keys["alpha"]} if "alpha" in keys else {}
            found["bias"] = Change({"bias": keys["bias"], **alpha}, there["bias"], *scale)
    return {f"{layer}.{leaf}": change for leaf, change in found.items()}


def _configs(files: Sequence[Path], metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """{component: PEFT's config of it}; "" is for all. Raises LoraError, FolderError."""
    if len(files) > 1:
        return {"": read_json(files[1])}
    try:
        told = json.loads(metadata.get(METADATA, "{}"))
        found: dict[str, dict[str, Any]] = {}
        for name, value in told.items():
            component, _, key = name.rpartition(".")
            found.setdefault(component, {})[key] = value
    except (ValueError, AttributeError) as error:
        raise LoraError(f"{files[0]}: {METADATA} in its metadata is damaged ({error})") from None
    return found


def _alpha(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """A layer's alpha in a config of PEFT: of the first pattern that ends its name."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", layer):
            return float(alpha)
    return float(config.get("lora_alpha", rank))
