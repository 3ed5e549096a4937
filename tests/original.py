"""Writes a pipeline folder as one file of the original layout, for tests."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jaxdistill.interop import diffusers_folder, original_layout


def write(folder: Path, path: Path, *, parts=("unet", "vae", "text"), marks=(), metadata=None) -> Path:
    """The folder's weights as one file; `marks` are keys of no weights."""
    found = diffusers_folder.open_folder(folder)
    open_clip = not found.xl and found.text_encoders[0].module.activation == "gelu"
    text = original_layout.XL_TEXT if found.xl else (
        original_layout.OPEN_TEXT if open_clip else original_layout.TEXT,
    )
    chosen = {"unet": [(found.unet, original_layout.UNET)], "vae": [(found.vae, original_layout.VAE)]}
    chosen["text"] = list(zip(found.text_encoders, text, strict=True))
    tensors: dict[str, np.ndarray] = {name: np.zeros(()) for name in marks}
    for name in parts:
        for part, prefix in chosen[name]:
            tensors |= _tensors(part, prefix)
    save_file(tensors, path, metadata)
    return path


def _tensors(part: diffusers_folder.Part, prefix: str) -> dict[str, np.ndarray]:
    weights, origin = part.weights(), original_layout.origin(part.module, prefix)
    found: dict[str, np.ndarray] = {}
    thirds: dict[str, dict[int, np.ndarray]] = {}
    for name in weights.shapes:
        if name.endswith("position_ids"):
            continue
        there = origin(name)
        value = there.write(weights.read(name))
        if there.third is None:
            found[there.name] = np.ascontiguousarray(value)
        else:
            thirds.setdefault(there.name, {})[there.third] = value
    return found | {n: np.concatenate([v[i] for i in range(3)]) for n, v in thirds.items()}
