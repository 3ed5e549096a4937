"""Low-rank updates of a network's layers in files (Hu et al. 2021): those that were trained, or
the best ones of a difference; under Kohya's names, which UIs read of UNets, or diffusers'. Stock
diffusers has no loader for PixArt's: PEFT has, for a file with its config beside it.

All have one rank r and alpha = r: W + up down, in every reader.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
from flax.traverse_util import flatten_dict

from jaxdistill.errors import UserError
from jaxdistill.interop import diffusers_folder, lora_names, single_file_out, torch_weights
from jaxdistill.interop.diffusers_folder import Folder
from jaxdistill.interop.families.family import Family
from jaxdistill.interop.single_file_out import Entry
from jaxdistill.interop.torch_weights import Origin, Weights, WeightsError, layer_names, to_torch
from jaxdistill.run import checkpoint

FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "kohya_lora_weights.safetensors"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
FORMATS = ("kohya", "diffusers")

Factors = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""{layer by torch's name: (down [r, i] or [r, i, h, w], up [o, r] or [o, r, 1, 1])}."""


def factors_of(updates: Any) -> Factors:
    """Of a tree of updates that was trained."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for path, leaf in flatten_dict(updates).items():
        for layer, value in layer_names(path[:-1], np.asarray(leaf)):
            found.setdefault(layer, {})[path[-1]] = to_torch(("kernel",), value)
    return {layer: (both["down"], both["up"]) for layer, both in found.items()}


# -------------------------------------------------------------------------------------------- files


def save(folder: Path, updates: Any, pipeline: Folder) -> None:
    """Write a run's LoRA of a pipeline's network into a folder: under diffusers' names for
    `load_lora_weights` and, where stock pipelines have none, PEFT's adapter for
    `PeftModel.from_pretrained(pipe.transformer, folder)`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    factors = factors_of(updates)
    files = {FILE: "diffusers"} | ({ADAPTER: "peft"} if pipeline.family.adapter else {})
    for name, form in files.items():
        tensors = entries(factors, pipeline, dtype="float32", form=form)
        single_file_out.write(folder / name, tensors, {"format": "pt"})
    if pipeline.family.adapter:
        write_config(folder, factors)


def write_config(folder: Path, factors: Factors) -> None:
    """PEFT's config beside an adapter's file."""
    rank = len(next(iter(factors.values()))[0])
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(factors),
        "inference_mode": True,
    }
    checkpoint.write_json(folder / ADAPTER_CONFIG, config)


def read(path: Path, family: Family) -> Factors:
    """A file of diffusers' names that a run has written. Raises WeightsError for others."""
    files, prefix = torch_weights.WeightFiles([path]), f"{family.network}."
    layers = {name.rpartition(".lora_")[0] for name in files.shapes}
    wanted = {f"{layer}.lora_{half}.weight" for layer in layers for half in "AB"}
    if wanted != files.shapes.keys() or not all(layer.startswith(prefix) for layer in layers):
        raise WeightsError(f"{path} is not a LoRA that a run has written; copy it again")
    return {
        layer.removeprefix(prefix): (
            files.read(f"{layer}.lora_A.weight"),
            files.read(f"{layer}.lora_B.weight"),
        )
        for layer in sorted(layers)
    }


def entries(factors: Factors, folder: Folder, *, dtype: str, form: str) -> dict[str, Entry]:
    """The tensors of a file for a pipeline, in one of FORMATS or of PEFT ("peft"); Kohya's names
    have an alpha each.
    """
    found: dict[str, np.ndarray] = {}
    kohya = form == "kohya"
    stems = kohya_stems(folder) if kohya else {}
    prefix = lora_names.PEFT if form == "peft" else f"{folder.family.network}."
    for layer, (down, up) in factors.items():
        if kohya:
            found[f"{stems[layer]}.lora_down.weight"] = down
            found[f"{stems[layer]}.lora_up.weight"] = up
            found[f"{stems[layer]}.alpha"] = np.asarray(len(down), np.float32)
        else:
            found[f"{prefix}{layer}.lora_A.weight"] = down
            found[f"{prefix}{layer}.lora_B.weight"] = up
    weights = torch_weights.Arrays(found)
    return single_file_out.placed(weights, weights.shapes, Origin, lambda name: dtype)


def kohya_stems(folder: Folder) -> dict[str, str]:
    """Of the UNet's layers, as Kohya's trainer has them: XL with the original layout's blocks."""
    return lora_names.kohya_names(folder.network, lora_names.UNET, original=folder.xl)


def metadata(folder: Folder, factors: Factors, spec: Mapping[str, str]) -> dict[str, str]:
    """Of a LoRA for this pipeline; `spec`: of `single_file_out.modelspec`.

    A1111 shows a LoRA beside the checkpoints of the family that Kohya's ss_* name, and takes a file
    with other metadata for one of 1.x.
    """
    rank = str(len(next(iter(factors.values()))[0]))
    if not folder.family.original:
        return {**spec, "modelspec.architecture": f"{spec['modelspec.architecture']}/lora"}
    two = spec["modelspec.architecture"].startswith("stable-diffusion-v2")
    v = spec["modelspec.prediction_type"] == "v"
    return {
        **spec,
        "modelspec.architecture": f"{spec['modelspec.architecture']}/lora",
        "ss_base_model_version": ("sdxl_base_v1-0" if folder.xl else f"sd_v{1 + two}{'_v' * v}"),
        "ss_network_alpha": rank,
        "ss_network_dim": rank,
        "ss_network_module": "networks.lora",
        "ss_v2": str(two),
    }


# --------------------------------------------------------------------------------- of a difference


@dataclass(frozen=True)
class Truncation:
    """The best updates of one rank of a difference between two networks.

    Attributes:
      factors: of the layers that differ.
      squares: {layer: (squared Frobenius norm of its difference, of its part that is kept)}.
      rest: squared norm of the difference in biases and norms, which a LoRA cannot hold.
    """

    factors: Factors
    squares: Mapping[str, tuple[float, float]]
    rest: float

    @property
    def total(self) -> float:
        """Squared norm of the whole difference."""
        return self.rest + sum(whole for whole, _ in self.squares.values())

    @property
    def share(self) -> float:
        """Of the squared norm, what is kept."""
        return sum(kept for _, kept in self.squares.values()) / self.total

    def worst(self, count: int) -> list[tuple[str, float]]:
        """[(layer, share that is kept)] of those that lose most of the whole."""
        lost = sorted(self.squares.items(), key=lambda item: item[1][1] - item[1][0])
        return [(layer, kept / whole) for layer, (whole, kept) in lost[:count]]


def layer_widths(folder: Folder) -> dict[str, int]:
    """Of a network's linear layers and convolutions, the rank at which an update is any
    difference.
    """
    shapes = diffusers_folder.names_of(folder.network)
    return {
        name.removesuffix(".weight"): min(shape[0], int(np.prod(shape[1:])))
        for name, shape in shapes.items()
        if len(shape) > 1 and name.endswith(".weight")
    }


def check_rank(folder: Folder, rank: int) -> list[str]:
    """The layers narrower than `rank`. Raises UserError where all are, or it is below 1."""
    widths = layer_widths(folder)
    widest = max(widths, key=lambda layer: widths[layer])
    if not 1 <= rank <= widths[widest]:
        raise UserError(
            f"--rank={rank} must be in 1..{widths[widest]}, the width of {widest}, the widest layer"
        )
    return [layer for layer, width in widths.items() if width < rank]


def truncated(student: Weights, teacher: Weights, folder: Folder, rank: int) -> Truncation:
    """The updates of a rank that lead nearest from the teacher to the student, layer by layer.

    A layer that is narrower than the rank is held whole; its factors are filled with zeros.

    Raises UserError where the two are equal.
    """
    widths = layer_widths(folder)
    factors, squares, rest = {}, {}, 0.0
    for name in diffusers_folder.names_of(folder.network):
        difference = student.read(name).astype(np.float64) - teacher.read(name).astype(np.float64)
        whole = float(np.sum(np.square(difference)))
        layer, _, leaf = name.rpartition(".")
        if leaf != "weight" or layer not in widths:
            rest += whole
        elif whole:
            down, up = nearest(difference, rank)
            factors[layer] = (down, up)
            kept = float(np.sum(np.square(up.reshape(len(up), -1) @ down.reshape(len(down), -1))))
            squares[layer] = (whole, kept)
    if not factors:
        raise UserError(
            f"the weights of {folder.name} are its teacher's: there is nothing to write"
        )
    return Truncation(factors, squares, rest)


def nearest(difference: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """(down, up), float32, of the matrix of this rank nearest to [o, i] or [o, i, h, w].

    Projects on the leading eigenvectors of the Gram matrix of the shorter side, in float64: exact,
    as fast as a randomised SVD at these sizes (0.7 s for 10240 x 1280), and no singular value
    divides anything. Both factors are of equal norm.
    """
    matrix = difference.reshape(len(difference), -1).astype(np.float64)
    wide = matrix.shape[0] <= matrix.shape[1]
    short = matrix if wide else matrix.T
    n = len(short)
    _, vectors = scipy.linalg.eigh(short @ short.T, subset_by_index=(max(0, n - rank), n - 1))
    rows = vectors.T @ short
    norms = np.sqrt(np.linalg.norm(rows, axis=1, keepdims=True))
    rows = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    columns = vectors * norms.T
    down, up = (rows, columns) if wide else (columns.T, rows.T)
    more = rank - len(down)
    down, up = np.pad(down, ((0, more), (0, 0))), np.pad(up, ((0, 0), (0, more)))
    kernel = difference.shape[1:]
    up = up.reshape(*up.shape, *(1,) * (difference.ndim - 2))
    return down.reshape(rank, *kernel).astype(np.float32), up.astype(np.float32)


class Merged:
    """Weights with updates added."""

    def __init__(self, base: Weights, factors: Factors) -> None:
        self.shapes = base.shapes
        self._base, self._factors = base, factors

    def read(self, name: str) -> np.ndarray:
        """One tensor; float32 where it is changed."""
        value, layer = self._base.read(name), name.removesuffix(".weight")
        if layer not in self._factors or layer == name:
            return value
        down, up = (np.asarray(part, np.float32) for part in self._factors[layer])
        added = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
        return value.astype(np.float32) + added.reshape(value.shape)

    def source(self, name: str) -> str:
        """That of the weights."""
        return self._base.source(name)
