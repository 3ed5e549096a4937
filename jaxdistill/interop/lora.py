"""Low-rank updates of a network's layers: made, merged, and written as diffusers' LoRA files (Hu et
al. 2021).
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array
from safetensors.numpy import save_file

from jaxdistill.interop.torch_weights import WeightsError, stacked_names, to_torch

FILE = "pytorch_lora_weights.safetensors"
PREFIX = "unet."


def layers(params: Any, targets: Sequence[str]) -> dict[tuple[str, ...], tuple[int, ...]]:
    """{path of a layer: shape of its kernel} of the layers that a target names.

    A target is a regular expression that must match the end of a layer's torch name at a dot:
    "to_q", "attn2.to_k", "conv1".

    Raises:
      WeightsError: a target that matches no layer, with some that would.
    """
    kernels = {
        path[:-1]: leaf.shape
        for path, leaf in flatten_dict(params["params"]).items()
        if path[-1] == "kernel"
    }
    found: dict[tuple[str, ...], tuple[int, ...]] = {}
    for target in targets:
        try:
            pattern = re.compile(rf"(^|\.)({target})$")
        except re.error as error:
            raise WeightsError(
                f"LoRA target {target!r} is no regular expression ({error})"
            ) from None
        hits = {path: shape for path, shape in kernels.items() if pattern.search(".".join(path))}
        if not hits:
            ends = sorted(
                {
                    re.sub(r"^.*?([a-z_]+[0-9]*(\.[0-9]+)?)$", r"\1", ".".join(path))
                    for path in kernels
                }
            )
            raise WeightsError(
                f"LoRA target {target!r} matches no layer; the layers end in {', '.join(ends)}"
            )
        found |= hits
    return dict(sorted(found.items()))


def init(key: Array, params: Any, targets: Sequence[str], rank: int, *, stacked: str = "") -> Any:
    """Fresh updates {path: {"down", "up"}} of the targets: down normal with variance 1/fan-in, up
    zero, so that nothing changes yet.

    Args:
      key: of the draw.
      params: of the network, {"params": ...}; arrays or their shapes.
      targets: as of `layers`.
      rank: of each update, at least 1.
      stacked: the path segment below which kernels have a leading axis of blocks.

    Raises:
      WeightsError: a target that matches nothing, or a rank below 1.
    """
    if rank < 1:
        raise WeightsError(f"the LoRA rank must be at least 1, got {rank}")
    tree: dict[tuple[str, ...], Array] = {}
    for i, (path, shape) in enumerate(layers(params, targets).items()):
        lead = shape[:1] if stacked and stacked in path else ()
        inner = shape[len(lead) :]
        down = (*lead, *inner[:-1], rank)
        up = (*lead, *((1, 1) if len(inner) == 4 else ()), rank, inner[-1])
        fan_in = int(np.prod(inner[:-1]))
        tree[(*path, "down")] = jax.random.normal(jax.random.fold_in(key, i), down) * fan_in**-0.5
        tree[(*path, "up")] = jnp.zeros(up)
    return unflatten_dict(tree)


def merge(params: Any, updates: Any) -> Any:
    """Parameters with the updates added to their kernels: W + down up."""
    flat, low = dict(flatten_dict(params["params"])), flatten_dict(updates)
    for path in [p[:-1] for p in low if p[-1] == "down"]:
        down, up = low[(*path, "down")], low[(*path, "up")]
        kernel = flat[(*path, "kernel")]
        up = up[0, 0] if up.ndim == 4 else up  # the 1x1 half of a convolution's update
        letters = "nir,nro->nio" if up.ndim == 3 else "...r,ro->...o"
        delta = jnp.einsum(letters, jnp.asarray(down, jnp.float32), jnp.asarray(up, jnp.float32))
        flat[(*path, "kernel")] = (kernel + delta).astype(kernel.dtype)
    return {"params": unflatten_dict(flat)}


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
