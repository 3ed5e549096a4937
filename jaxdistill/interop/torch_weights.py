"""Torch's weights and ours: a Linen parameter's path is its torch name, only the leaf's name and
the axes differ.
"""

import contextlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxdistill import partition
from jaxdistill.errors import UserError
from jaxdistill.model import stack, unstacked
from jaxdistill.run import checkpoint

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
FLOAT8 = {"F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2}
"""Safetensors' types that its reader for numpy does not know."""
ADAPTERS = (".base_layer.", ".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lora.")
"""In names of tensors: a LoRA of PEFT or diffusers that has not been merged."""
SHARD_BYTES = 10 * 2**30
"""Files larger than this are written in shards, as diffusers does."""


class WeightsError(UserError):
    """Weights that cannot be used, in one line."""


def torch_name(path: Sequence[str]) -> str:
    """("down_blocks.0", "conv1", "kernel") -> "down_blocks.0.conv1.weight"."""
    return ".".join((*path[:-1], LEAVES.get(path[-1], path[-1])))


def to_torch(path: Sequence[str], value: np.ndarray) -> np.ndarray:
    """Our axes to torch's: HWIO -> OIHW, [in, out] -> [out, in]."""
    if path[-1] != "kernel":
        return value
    return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T


def from_torch(path: Sequence[str], value: np.ndarray) -> np.ndarray:
    """Torch's axes to ours."""
    if path[-1] != "kernel":
        return value
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def torch_shape(path: Sequence[str], shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of torch's tensor for our parameter."""
    if path[-1] != "kernel":
        return tuple(shape)
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else tuple(reversed(shape))


@runtime_checkable
class Weights(Protocol):
    """Tensors by torch's names, read one at a time."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> np.ndarray:
        """One tensor."""

    def source(self, name: str) -> str:
        """Where it is, for messages."""


class WeightFiles:
    """The tensors of one or several safetensors files by name.

    Nothing is read before it is asked for.

    A file is mapped only while a tensor is copied out of it: pages of an open map count as memory
    of the process.
    """

    def __init__(
        self, files: Sequence[Path], *, rename: Callable[[str], str] = lambda name: name
    ) -> None:
        self.where: dict[str, tuple[Path, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.metadata: dict[str, str] = {}
        for path in files:
            with _opened(path) as file:
                self.metadata |= file.metadata() or {}
                for name in file.keys():  # noqa: SIM118 - not a dict
                    if rename(name) in self.where:
                        raise WeightsError(
                            f"{path} and {self.where[rename(name)][0]} both hold {name}; copy the"
                            " folder again"
                        )
                    self.where[rename(name)] = (path, name)
                    self.shapes[rename(name)] = tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """A copy of one tensor."""
        return self.read_several([name])[0]

    def read_several(self, names: Sequence[str]) -> list[np.ndarray]:
        """Copies of tensors of one file, which is opened once for them."""
        path = self.where[names[0]][0]
        with _opened(path) as file:
            return [_tensor(file, path, self.where[name][1]) for name in names]

    def source(self, name: str) -> str:
        """Where a tensor is, for messages."""
        path, theirs = self.where[name]
        return f"{path}: tensor {theirs}"

    def stored(self, name: str) -> np.ndarray:
        """A copy of one tensor in the type that the files have it in."""
        return self.read(name)


@dataclass(frozen=True)
class Origin:
    """Where another layout keeps a tensor of ours.

    Attributes:
      name: of the tensor there.
      third: of a fused projection its third along the first axis: 0, 1, 2 for q, k, v.
      transposed: a matrix whose axes are exchanged there.
      kernel: a matrix [o, i] that is written as a 1x1 convolution [o, i, 1, 1] there.
    """

    name: str
    third: int | None = None
    transposed: bool = False
    kernel: bool = False

    def read(self, value: np.ndarray) -> np.ndarray:
        """Ours from the tensor there."""
        if self.third is not None:
            return np.split(value, 3)[self.third]
        return value.T if self.transposed else value

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Ours, of the shape there."""
        if self.third is not None:
            return (shape[0] // 3, *shape[1:])
        return shape[::-1] if self.transposed else shape

    def write(self, value: np.ndarray) -> np.ndarray:
        """The tensor there from ours, or its third."""
        if self.kernel:
            return value[:, :, None, None]
        return value.T if self.transposed else value


class RenamedWeights(WeightFiles):
    """Some tensors of a file of another layout by our names. What begins with `prefix` there and
    has none of them keeps its own name, so that `load` tells of it.

    A matrix may be a 1x1 convolution there, or the reverse: `wanted` has our shapes by our names.
    """

    def __init__(
        self,
        path: Path,
        origins: Mapping[str, Origin],
        wanted: Mapping[str, tuple[int, ...]],
        *,
        prefix: str,
    ) -> None:
        super().__init__([path])
        theirs = self.shapes
        self._origins = {name: o for name, o in origins.items() if o.name in theirs}
        used = {o.name for o in self._origins.values()}
        left = {n: s for n, s in theirs.items() if n.startswith(prefix) and n not in used}
        here = {n: o.shape(theirs[o.name]) for n, o in self._origins.items()}
        self.shapes = {n: _as_wanted(shape, wanted[n]) for n, shape in here.items()} | left

    def read(self, name: str) -> np.ndarray:
        """A copy of one tensor, by our name."""
        found = self._origins[name]
        value = found.read(super().read(found.name))
        return np.ascontiguousarray(value).reshape(self.shapes[name])

    def source(self, name: str) -> str:
        """Where a tensor is, for messages."""
        return super().source(self._origins[name].name)


def _as_wanted(shape: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, ...]:
    """The wanted shape where they differ in the ones at the end alone."""
    alike = {len(shape), len(wanted)} == {2, 4} and shape[:2] == wanted[:2]
    return wanted if alike and {*shape[2:], *wanted[2:]} == {1} else shape


def _tensor(file: Any, path: Path, name: str) -> np.ndarray:
    """A tensor of an open file."""
    try:
        kind = FLOAT8.get(file.get_slice(name).get_dtype())
        return file.get_tensor(name) if kind is None else _raw(path, name, kind)
    except (SafetensorError, OSError, AttributeError, TypeError) as error:
        # The last two are numpy's, of a type that it does not have.
        raise WeightsError(
            f"{path}: tensor {name} cannot be read ({error}); copy the file again, or save it as"
            " float16, bfloat16 or float32"
        ) from None


def _raw(path: Path, name: str, dtype: Any) -> np.ndarray:
    """A tensor by its place in the file, which the header says: its length in 8 bytes, then JSON,
    then the tensors.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        about = json.loads(file.read(size))[name]
        first, last = about["data_offsets"]
        file.seek(8 + size + first)
        return np.frombuffer(file.read(last - first), dtype).reshape(about["shape"])


def numbers(files: Weights, name: str, dtype: Any) -> np.ndarray:
    """A tensor that `dtype` can hold. Raises WeightsError where it is not of floats, or one of its
    values is no finite number, there or as `dtype`.
    """
    value = files.read(name)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise WeightsError(
            f"{files.source(name)} is {value.dtype}: quantised weights are not read; save it as"
            " float16, bfloat16 or float32"
        )
    if not np.isfinite(value).all():
        count = int(np.size(value) - np.isfinite(value).sum())
        raise WeightsError(
            f"{files.source(name)} has {count} of {value.size} values that are not finite (NaN or"
            " infinite); a merge or a cast has damaged it: make the file again"
        )
    most = float(jnp.finfo(dtype).max)
    if most < float(jnp.finfo(value.dtype).max) and (largest := float(np.abs(value).max())) > most:
        raise WeightsError(
            f"{files.source(name)} has values up to {largest:.3g}, but {np.dtype(dtype)} ends at"
            f" {most:.3g}; choose bfloat16 or float32"
        )
    return value


POINTER = b"version https://git-lfs"


def check_pointer(path: Path) -> None:
    """Raise WeightsError for a file that git-lfs has not fetched yet, OSError for one that cannot
    be read.
    """
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise WeightsError(
                f"{path} is a git-lfs pointer, a few lines that stand for the file; fetch it: git"
                " lfs pull in its folder, or download it again"
            )


@runtime_checkable
class Update(Protocol):
    """Something that is added to tensors of a component while they are read, such as a LoRA."""

    @property
    def files(self) -> Sequence[Path]:
        """What it is read from: it is told apart by their bytes and its weight."""

    @property
    def weight(self) -> float:
        """Its factor."""

    @property
    def names(self) -> Collection[str]:
        """The tensors that it changes."""

    def read(self, name: str) -> np.ndarray:
        """What is added to one of them: an array of its own, float32, of its shape."""


class UpdatedWeights(WeightFiles):
    """The tensors of `base` with updates, in their order; those without any are as in `base`."""

    def __init__(self, base: WeightFiles, updates: Sequence[Update]) -> None:
        self.base, self.where = base, base.where
        self.shapes, self.metadata = base.shapes, base.metadata
        self._updates = updates

    def read(self, name: str) -> np.ndarray:
        """A copy of one tensor; float32 where it is changed."""
        return self._updated(name, self.base.read(name))

    def stored(self, name: str) -> np.ndarray:
        """A copy of one tensor in the type that `base` has it in. Raises WeightsError where that
        does not hold it.
        """
        dtype = (value := self.base.read(name)).dtype
        with np.errstate(over="ignore"):
            value = self._updated(name, value).astype(dtype)
        if not np.isfinite(value).all():
            raise WeightsError(
                f"{self.source(name)} has values that {dtype} cannot hold; lower the weight of the"
                " LoRA, or give the checkpoint as float32"
            )
        return value

    def source(self, name: str) -> str:
        """Where a tensor is, for messages."""
        added = [str(update.files[0]) for update in self._updates if name in update.names]
        return " with ".join([self.base.source(name), *added])

    def _updated(self, name: str, value: np.ndarray) -> np.ndarray:
        for update in self._updates:
            if name in update.names:
                added = update.read(name)
                added += value.astype(np.float32, copy=False)
                value = added
        return value


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        check_pointer(path)
    except OSError as error:
        raise WeightsError(
            f"{path} cannot be read ({error.strerror}); give this user the right to, or copy it"
            " again"
        ) from None
    try:
        handle = safe_open(str(path), "numpy")
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} cannot be read as safetensors ({error}); it may be truncated; copy the file"
            " again"
        ) from None
    with handle as file:
        yield file


def check(
    files: Weights,
    abstract: Any,
    *,
    where: str,
    ignore: Callable[[str], bool] = lambda name: False,
) -> dict[tuple[str, ...], list[tuple[str, tuple[int, ...]]]]:
    """{parameter of a module: names and shapes of its tensors}; no tensor is read. Arguments as of
    `load`.

    Raises WeightsError: listing the names that are missing, left over or of another shape.
    """
    wanted = flatten_dict(abstract["params"])
    plan = {path: _sources(path, leaf.shape) for path, leaf in wanted.items()}
    sources = {name: shape for pairs in plan.values() for name, shape in pairs}
    missing = sorted(sources.keys() - files.shapes.keys())
    left_over = sorted(name for name in files.shapes.keys() - sources.keys() if not ignore(name))
    if adapters := [name for name in left_over if any(mark in name for mark in ADAPTERS)]:
        raise WeightsError(
            f"{where} has the weights of an adapter beside its own ({_some(adapters, 2)}): merge it"
            " where the pipeline was made, with fuse_lora() and unload_lora_weights(), and save the"
            " pipeline again"
        )
    shapes = [
        f"{name} is {list(files.shapes[name])}, the config wants {list(shape)}"
        for name, shape in sorted(sources.items())
        if name in files.shapes and files.shapes[name] != shape
    ]
    problems = [
        f"{text}: {_some(names)}"
        for text, names in (
            ("missing", missing),
            ("left over", left_over),
            ("of another shape", shapes),
        )
        if names
    ]
    if problems:
        raise WeightsError(f"{where} does not fit its config: tensors {'; '.join(problems)}")
    return plan


def load(
    files: Weights,
    abstract: Any,
    *,
    where: str,
    dtype: Any = np.float32,
    ignore: Callable[[str], bool] = lambda name: False,
    shardings: Any = None,
) -> Any:
    """The parameters of a module from torch tensors: each tensor is used exactly once.

    Tensors are read one at a time, turned, cast and put on the device, so that the host never holds
    more than the largest beside what is already placed.

    Args:
      files: the tensors.
      abstract: the module's parameters as ShapeDtypeStructs: {"params": ...}.
      where: what the weights are, for messages.
      dtype: of the parameters.
      ignore: names of tensors that are known not to be parameters.
      shardings: a tree like `abstract` of shardings; the default device if None.

    Raises:
      WeightsError: of `check`, or naming a tensor whose values are no numbers of `dtype`.
    """
    plan = check(files, abstract, where=where, ignore=ignore)
    places = flatten_dict(shardings["params"]) if shardings is not None else dict.fromkeys(plan)
    loaded = {}
    for path, pairs in plan.items():
        tensors = (from_torch(path, numbers(files, name, dtype)) for name, _ in pairs)
        value = np.stack([*tensors]) if unstacked(path) else next(tensors)
        whole, place = np.ascontiguousarray(value, dtype), places[path]
        loaded[path] = jax.device_put(whole) if place is None else partition.put(whole, place)
    return {"params": unflatten_dict(loaded)}


def names_of(abstract: Any) -> dict[str, tuple[int, ...]]:
    """Torch's names and shapes of a module's parameters."""
    leaves = flatten_dict(abstract["params"]).items()
    return {name: s for path, leaf in leaves for name, s in _sources(path, leaf.shape)}


def _sources(path: Sequence[str], shape: Sequence[int]) -> list[tuple[str, tuple[int, ...]]]:
    """Torch names and shapes of one parameter."""
    if (blocks := unstacked(path)) is None:
        return [(torch_name(path), torch_shape(path, shape))]
    return [(torch_name(block), torch_shape(block, shape[1:])) for block in blocks]


def layer_names(path: Sequence[str], value: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """[(torch name, value)] of a layer's value; one for each block where the layer is stacked."""
    if (blocks := unstacked(path)) is None:
        return [(".".join(path), value)]
    return [(".".join(block), part) for block, part in zip(blocks, value, strict=True)]


def restacked(params: Any) -> Any:
    """Parameters of an export of 0.1, whose stacks do not say their blocks, as those of today."""
    old, flat = "transformer_blocks", flatten_dict(params)
    named = {
        tuple(stack(old, range(len(leaf))) if s == old else s for s in path): leaf
        for path, leaf in flat.items()
    }
    return unflatten_dict(named)


def _some(names: Sequence[str], count: int = 8) -> str:
    return ", ".join(names[:count]) + (
        f" and {len(names) - count} more" if len(names) > count else ""
    )


class TreeWeights:
    """The parameters of a module by torch's names, turned when they are read."""

    def __init__(self, params: Any) -> None:
        self._leaves: dict[str, tuple[Sequence[str], Any, int | None]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path, leaf in flatten_dict(params["params"]).items():
            many = unstacked(path) is not None
            for i, (name, shape) in enumerate(_sources(path, leaf.shape)):
                self._leaves[name] = (path, leaf, i if many else None)
                self.shapes[name] = shape

    def read(self, name: str) -> np.ndarray:
        """One tensor, on the host."""
        path, leaf, i = self._leaves[name]
        return to_torch(path, np.asarray(leaf if i is None else leaf[i]))

    def source(self, name: str) -> str:
        """Its name."""
        return f"the tensor {name}"


class Arrays:
    """Tensors that are in memory, by their names."""

    def __init__(self, values: Mapping[str, np.ndarray]) -> None:
        self._values = values
        self.shapes = {name: value.shape for name, value in values.items()}

    def read(self, name: str) -> np.ndarray:
        """One of them."""
        return self._values[name]

    def source(self, name: str) -> str:
        """Its name."""
        return f"the tensor {name}"


def torch_tensors(params: Any, *, dtype: Any = None) -> dict[str, np.ndarray]:
    """{"params": ...} -> torch's names and layouts, as contiguous host arrays (of `dtype`, if
    given). Raises WeightsError where one of them is not finite there.
    """
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in flatten_dict(params["params"]).items():
        value = np.asarray(leaf)
        parts = list(value) if unstacked(path) else [value]
        for (name, _), part in zip(_sources(path, value.shape), parts, strict=True):
            with np.errstate(over="ignore"):
                tensors[name] = np.ascontiguousarray(to_torch(path, part), dtype or part.dtype)
            if not np.isfinite(tensors[name]).all():
                raise WeightsError(
                    f"the tensor {name} has values that are not finite as {tensors[name].dtype};"
                    " choose a wider type, such as config.export.dtype=float32"
                )
    return tensors


def save(
    folder: Path, stem: str, tensors: Mapping[str, np.ndarray], *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `folder/stem.safetensors`, or shards with the index file that diffusers and
    transformers read. Raises CheckpointError where they cannot be written.
    """
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    names = (
        [f"{stem}.safetensors"]
        if len(shards) == 1
        else [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for name, shard in zip(names, shards, strict=True):
        temporary = folder / f"{name}.tmp"
        try:
            save_file(shard, temporary, metadata={"format": "pt"})
            os.replace(temporary, folder / name)
        except (SafetensorError, OSError) as error:
            temporary.unlink(missing_ok=True)
            raise checkpoint.not_written(f"write {folder / name}", error) from None
    if len(shards) > 1:
        weight_map = {
            tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        }
        save_index(folder, stem, weight_map, sum(tensor.nbytes for tensor in tensors.values()))


def save_index(folder: Path, stem: str, weight_map: Mapping[str, str], size: int) -> None:
    """Write the index of shards: {tensor: file} and the bytes of all."""
    index = {"metadata": {"total_size": size}, "weight_map": dict(weight_map)}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
