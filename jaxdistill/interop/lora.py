"""Low-rank updates of a network's layers: made, merged, and written as diffusers' LoRA files (Hu et
al. 2021).
"""

from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from jaxdistill.interop.torch_weights import stacked_names, to_torch

FILE = "pytorch_lora_weights.safetensors"
PREFIX = "unet."


def save(folder: Path, updates: Any, *, stacked: str = "") -> None:
    """Write `folder/pytorch_lora_weights.safetensors` as diffusers' `load_lora_weights` reads it
    (PEFT's names, alpha = rank).
    """
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in flatten_dict(updates).items():
        name = "lora_A" if path[-1] == "down" else "lora_B"
        for layer, value in stacked_names(path[:-1], np.asarray(leaf), stacked):
            turned = to_torch(("kernel",), value)
            tensors[f"{PREFIX}{layer}.{name}.weight"] = np.ascontiguousarray(turned, np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{FILE}.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.rename(folder / FILE)
