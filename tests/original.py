"""Writes a pipeline folder as one file of the original layout, for tests."""

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jaxdistill.interop import diffusers_folder, families
from jaxdistill.interop.original_layout import OPEN_TEXT, TEXT, UNET, VAE, XL_TEXT, origin


def write(
    folder: Path, path: Path, *, parts=("unet", "vae", "text"), marks=(), metadata=None
) -> Path:
    """The folder's weights as one file; `marks` are keys of no weights."""
    found = families.open_folder(folder)
    encoders = list(zip(found.text_encoders, text_prefixes(found), strict=True))
    chosen = {"unet": [(found.network, UNET)], "vae": [(found.vae, VAE)], "text": encoders}
    tensors: dict[str, np.ndarray] = {name: np.zeros(()) for name in marks}
    for name in parts:
        for part, prefix in chosen[name]:
            tensors |= _tensors(part, prefix)
    save_file(tensors, path, metadata)
    return path


def text_prefixes(found: diffusers_folder.Folder) -> tuple[str, ...]:
    """Of the text encoders: 2.x has OpenCLIP's, told by its activation."""
    if found.xl:
        return XL_TEXT
    plain = found.text_encoders[0].module.activation == "quick_gelu"
    return (TEXT if plain else OPEN_TEXT,)


def _tensors(part: diffusers_folder.Part, prefix: str) -> dict[str, np.ndarray]:
    weights, there = part.weights(), origin(part.module, prefix)
    found: dict[str, np.ndarray] = {}
    thirds: dict[str, dict[int, np.ndarray]] = {}
    for name in weights.shapes:
        if name.endswith("position_ids"):
            continue
        place = there(name)
        value = place.write(weights.read(name))
        if place.third is None:
            found[place.name] = np.ascontiguousarray(value)
        else:
            thirds.setdefault(place.name, {})[place.third] = value
    return found | {n: np.concatenate([v[i] for i in range(3)]) for n, v in thirds.items()}


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
