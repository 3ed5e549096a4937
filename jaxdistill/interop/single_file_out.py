"""A pipeline written as one file of the original layout, which ComfyUI, A1111 and Forge read: the
inverse of `single_file`.

The file is streamed, a tensor at a time: safetensors' own `save_file` wants all of them in memory,
which is 7 GB for XL, and numpy has no view of some dtypes that are only copied here.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxdistill.errors import UserError
from jaxdistill.interop import diffusers_folder, marks, torch_weights
from jaxdistill.interop.diffusers_folder import Folder, Part
from jaxdistill.interop.original_layout import (
    OPEN_TEXT,
    SHORT,
    TEXT,
    UNET,
    VAE,
    XL_TEXT,
    origin,
)
from jaxdistill.interop.single_file import EXTRA_ENDS, EXTRAS
from jaxdistill.interop.torch_weights import Origin, Weights, WeightsError
from jaxdistill.run import checkpoint

DTYPES = {
    "float32": ("F32", np.dtype(np.float32)),
    "float16": ("F16", np.dtype(np.float16)),
    "bfloat16": ("BF16", np.dtype(jnp.bfloat16)),
}
"""Of tensors that are written: safetensors' name and numpy's."""
KEEP = "keep"
"""Instead of a dtype: that of the source."""


class Entry(NamedTuple):
    """A tensor of the file: safetensors' name of its dtype, its bytes, and what gives them."""

    kind: str
    shape: tuple[int, ...]
    size: int
    read: Callable[[], np.ndarray]


class Stored(NamedTuple):
    """A tensor in a file, by its header: `start` counts from the file's first byte."""

    kind: str
    shape: tuple[int, ...]
    start: int
    size: int


def header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors and the metadata of a safetensors file that was opened before."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        found = json.loads(file.read(length))
    metadata = found.pop("__metadata__", {})
    stored = {}
    for name, about in found.items():
        begin, end = about["data_offsets"]
        stored[name] = Stored(
            about["dtype"], tuple(about["shape"]), 8 + length + begin, end - begin
        )
    return stored, metadata


# --------------------------------------------------------------------------- what is to be written


def entries(
    folder: Folder, unet: Weights, *, dtype: str, others: str = KEEP, teacher: Folder | None = None
) -> dict[str, Entry]:
    """The tensors of the file, before anything large is read.

    Args:
      folder: the student's pipeline.
      unet: the student's UNet.
      dtype: of the UNet, a key of DTYPES, or KEEP: as in the teacher.
      others: likewise of the VAE and the text encoders; KEEP copies them.
      teacher: where these come from, of the student's folder if None. All tensors of a file but its
        UNet and averages are taken over, with its buffers and the marks that hold.

    Raises:
      WeightsError: a tensor is missing, or has a dtype that is not written.
    """
    source = teacher or folder
    names = diffusers_folder.names_of(folder.network)
    if missing := sorted(names.keys() - unet.shapes.keys()):
        raise WeightsError(f"{folder.network.where} has no {missing[0]}; copy it again")
    made = placed(unet, names, origin(folder.network.module, UNET), _kinds(source.network, dtype))
    made |= _part(source.vae, VAE, others)
    for part, prefix in zip(source.text_encoders, text_prefixes(source), strict=True):
        made |= _part(part, prefix, others)
    said = marks_of(folder)
    if source.file is not None:
        stored, _ = header(source.file)
        kept = {
            name: found
            for name, found in stored.items()
            if name.startswith(EXTRAS) or name.endswith(EXTRA_ENDS) or name in said
        }
        averages = {name for name in kept if name.startswith("model_ema.")}
        made |= {n: _copied(source.file, s) for n, s in kept.items() if n not in averages}
    empty = Entry("F32", (0,), 0, lambda: np.zeros(0, np.float32))
    return made | {mark: empty for mark in said if mark not in made}


def marks_of(folder: Folder) -> list[str]:
    """The keys that tell ComfyUI, Forge and `single_file` what a model predicts."""
    says = folder.scheduler
    v = says.get("prediction_type") == "v_prediction"
    return ["v_pred"] * v + ["ztsnr"] * bool(says.get("rescale_betas_zero_snr"))


def text_prefixes(folder: Folder) -> tuple[str, ...]:
    """Of the text encoders. 2.x has OpenCLIP's, told by its activation."""
    if folder.xl:
        return XL_TEXT
    plain = folder.text_encoders[0].module.activation == "quick_gelu"
    return (TEXT if plain else OPEN_TEXT,)


def _part(part: Part, prefix: str, dtype: str) -> dict[str, Entry]:
    """A component that was not trained. From a file of the original layout all is copied, what no
    module has as well; then what has another dtype or a LoRA is put in its place.
    """
    weights, made = part.weights(), {}
    if part.file is not None and _in_place(part, prefix):
        stored, _ = header(part.file)
        made = {n: _copied(part.file, s) for n, s in stored.items() if n.startswith(prefix)}
        if dtype == KEEP and isinstance(weights, torch_weights.RenamedWeights):
            return made
    names = diffusers_folder.names_of(part)
    if missing := sorted(names.keys() - weights.shapes.keys()):
        raise WeightsError(f"{part.where} has no {missing[0]}; copy it again")
    if part.origin is not None:
        for name in names:  # its place has another name where the file is not quite of the layout
            made.pop(part.origin(name).name, None)
    return made | placed(weights, names, origin(part.module, prefix), _kinds(part, dtype))


def _in_place(part: Part, prefix: str) -> bool:
    """Whether a file holds a component as the original layout does, or as transformers now does."""
    if part.origin is None:
        return False
    names = diffusers_folder.names_of(part)
    return any(
        all(
            part.origin(name).name == place.name or place.transposed
            for name in names
            for place in [origin(part.module, prefix, names=whose)(name)]
        )
        for whose in ("", SHORT)
    )


def _copied(path: Path, stored: Stored) -> Entry:
    def read() -> np.ndarray:
        if not stored.size:
            return np.zeros(0, np.uint8)
        return np.memmap(path, np.uint8, "r", stored.start, (stored.size,))

    return Entry(stored.kind, stored.shape, stored.size, read)


def _kinds(part: Part, dtype: str) -> Callable[[str], str]:
    """Of a component's tensor, by our name, the key of DTYPES in which it is written."""
    if dtype != KEEP:
        return lambda name: dtype
    headers = {path: header(path)[0] for path in part.files()}
    known = {kind: key for key, (kind, _) in DTYPES.items()}
    weights = part.weights()

    def kind_of(name: str) -> str:
        where = name if part.origin is None else part.origin(name).name
        path, theirs = weights.where[where]
        kind = headers[path][theirs].kind
        if kind not in known:
            raise WeightsError(f"{path}: {theirs} is {kind}, which is not written; choose a dtype")
        return known[kind]

    return kind_of


def placed(
    weights: Weights,
    names: Mapping[str, tuple[int, ...]],
    where: Callable[[str], Origin],
    kind_of: Callable[[str], str],
) -> dict[str, Entry]:
    """Tensors at their places in another layout, where q, k and v may be one.

    When they are read, `torch_weights.numbers` raises WeightsError for a value beyond the range of
    its dtype.

    Args:
      weights: the tensors.
      names: their names and shapes.
      where: name -> its place.
      kind_of: name -> a key of DTYPES.
    """
    groups: dict[str, list[tuple[int, str, Origin]]] = {}
    for name in names:
        place = where(name)
        groups.setdefault(place.name, []).append((place.third or 0, name, place))
    made = {}
    for there, group in groups.items():
        parts = [(name, place) for _, name, place in sorted(group, key=lambda found: found[0])]
        name, place = parts[0]
        shape = place.write(np.broadcast_to(np.False_, names[name])).shape
        shape = (shape[0] * len(parts), *shape[1:]) if len(parts) > 1 else shape
        kind, dtype = DTYPES[kind_of(name)]

        def read(parts: Any = parts, dtype: Any = dtype) -> np.ndarray:
            found = [p.write(torch_weights.numbers(weights, n, dtype)) for n, p in parts]
            return np.asarray(np.concatenate(found) if len(found) > 1 else found[0], dtype)

        made[there] = Entry(kind, shape, int(np.prod(shape)) * dtype.itemsize, read)
    return made


# --------------------------------------------------------------------------------------- metadata

_KEPT = ("author", "license", "tags", "trigger_phrase", "vae_dtype")
"""What of a teacher's modelspec is true of its student, too."""


def modelspec(
    folder: Folder, teacher: Folder, *, title: str, size: tuple[int, int], hint: str
) -> dict[str, str]:
    """Metadata of a checkpoint (Stability AI's ModelSpec 1.0). Without a date or a hash: the same
    student is the same bytes.

    Args:
      folder: the student's pipeline.
      teacher: whose author, licence and architecture are taken over where its file names them.
      title: of the student.
      size: height and width of its images, pixels.
      hint: how it is used.
    """
    older: Mapping[str, str] = header(teacher.file)[1] if teacher.file else {}
    v = "v_pred" in marks_of(folder)
    if not folder.family.original:
        architecture = folder.family.name
    elif folder.xl:
        architecture = "stable-diffusion-xl-v1-base"
    elif text_prefixes(folder) == (OPEN_TEXT,):
        architecture = "stable-diffusion-v2-768-v" if v else "stable-diffusion-v2-512"
    else:
        architecture = "stable-diffusion-v1"
    named = older.get("modelspec.architecture", "")
    if named and named not in marks.ARCHITECTURES:  # those say what a model predicts
        architecture = named
    kept = {f"modelspec.{name}": older.get(f"modelspec.{name}", "") for name in _KEPT}
    found = {
        "format": "pt",
        **{name: value for name, value in kept.items() if value},
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.resolution": f"{size[1]}x{size[0]}",
        "modelspec.usage_hint": hint,
    }
    if folder.family.original:  # the specification has no word for what a flow's network predicts
        found["modelspec.prediction_type"] = "v" if v else "epsilon"
    return found


# ------------------------------------------------------------------------------------------ writing


def check_target(path: Path) -> None:
    """Raise UserError unless a new safetensors file can be made here."""
    if path.suffix != ".safetensors":
        raise UserError(f"--out={path} must end in .safetensors")
    if path.exists():
        raise UserError(f"--out={path} exists; choose another name")
    if not path.parent.is_dir():
        raise UserError(f"--out={path}: the folder {path.parent} does not exist")


def write(path: Path, tensors: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; it appears whole or not at all.

    Raises WeightsError for values that a dtype cannot hold, or CheckpointError where the file
    cannot be written.
    """

    def order(name: str) -> tuple[float, str]:  # wide dtypes first: every tensor is aligned
        entry = tensors[name]
        return -entry.size / max(1, int(np.prod(entry.shape))), name

    names, at = sorted(tensors, key=order), 0
    about: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name in names:
        kind, shape, size, _ = tensors[name]
        about[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(about, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                value = np.ascontiguousarray(tensors[name].read())
                assert value.nbytes == tensors[name].size, name
                file.write(value.reshape(-1).view(np.uint8).data)
        os.replace(temporary, path)
    except OSError as error:
        raise checkpoint.not_written(f"write {path}", error) from None
    finally:
        temporary.unlink(missing_ok=True)
