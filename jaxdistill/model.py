"""A network with what its output means, and how its trainable weights are stored."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from jaxdistill.prediction import ApplyFn, Denoiser, Parameterization, as_denoiser
from jaxdistill.sampling import guided_denoiser
from jaxdistill.schedule import NoiseSchedule


class Model(NamedTuple):
    """A network with what its output means.

    Attributes:
      apply: (params, x [b, ...], t [b], cond) -> output of x's shape.
      schedule: the forward process that it was trained on.
      parameterization: what the output means, as `v_prediction`.
      shares: it takes several rows of conditioning for one of x (see `guided_denoiser`).
      cfg_scale: guidance scale -> the w of u + w (c - u) that is meant by it.
    """

    apply: ApplyFn
    schedule: NoiseSchedule
    parameterization: Parameterization
    shares: bool = False
    cfg_scale: Callable[[Any], Any] = lambda scale: scale

    def denoiser(self, params: Any, cond: Any) -> Denoiser:
        """`as_denoiser` of these parameters for one batch."""
        return as_denoiser(
            self.apply,
            params,
            cond,
            schedule=self.schedule,
            parameterization=self.parameterization,
        )

    def guided(
        self, params: Any, cond: Any, null_cond: Callable[[Any], Any], scale: float | Array
    ) -> Denoiser:
        """`guided_denoiser` of these parameters for one batch."""
        return guided_denoiser(
            self.apply,
            params,
            cond,
            schedule=self.schedule,
            parameterization=self.parameterization,
            null_cond=null_cond,
            scale=self.cfg_scale(scale),
            shared=self.shares,
        )


# ----------------------------------------------------------------------------------- stacked blocks

_STACK = re.compile(r"(.+)\.(\d+):(\d+)")


def stack(name: str, span: range) -> str:
    """The path segment "name.0:10" of blocks name.0 to name.9 whose parameters are one array each,
    its first axis the block.
    """
    return f"{name}.{span.start}:{span.stop}"


def unstacked(path: Sequence[str]) -> list[tuple[str, ...]] | None:
    """The paths of the blocks at a path below a `stack`; None of others."""
    for i, segment in enumerate(path):
        if match := _STACK.fullmatch(segment):
            blocks = range(int(match[2]), int(match[3]))
            return [(*path[:i], f"{match[1]}.{n}", *path[i + 1 :]) for n in blocks]
    return None


# -------------------------------------------------------------------------------- trainable weights

_BUFFERS = ("pos_embed.pos_embed",)
"""Ends of the names of arrays that checkpoints hold and nobody trains."""


def trained(params: Any) -> Any:
    """Whether each array is trained: a tree of bools, False for a checkpoint's buffers."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not any(getattr(key, "key", "") in _BUFFERS for key in path[-1:]), params
    )


class Weights(NamedTuple):
    """How a trainable copy of a network is stored beside the frozen one it starts from.

    Attributes:
      fresh: base -> what is trained, equal to the base before the first step.
      variables: (trained, base) -> what the network is applied to.
      merged: (trained, base) -> plain parameters.
    """

    fresh: Callable[[Any], Any]
    variables: Callable[[Any, Any], Any]
    merged: Callable[[Any, Any], Any]


def full_weights() -> Weights:
    """All weights of the network, a tree of their own."""
    return Weights(
        fresh=lambda base: jax.tree.map(jnp.array, base),
        variables=lambda trained, base: trained,
        merged=lambda trained, base: trained,
    )


def low_rank(
    key: Array,
    targets: Sequence[str],
    rank: int,
    *,
    beside: bool = False,
) -> Weights:
    """LoRA (Hu et al. 2021): updates W + down up of the kernels that `targets` name.

    Several such networks share one copy of the frozen base in memory.

    Args:
      key: of the first `down`; every network starts with the same one.
      targets: as of `lora_layers`.
      rank: of each update, at least 1.
      beside: the network reads the updates from a collection "lora" beside the base's, and never
        forms W + down up; without it the sum is formed at each call.
    """

    def fresh(base: Any) -> Any:
        return lora_init(key, base, targets, rank)

    def variables(trained: Any, base: Any) -> Any:
        base = jax.lax.stop_gradient(base)
        return {**base, "lora": trained} if beside else lora_merge(base, trained)

    return Weights(fresh, variables, lambda trained, base: lora_merge(base, trained))


def lora_layers(params: Any, targets: Sequence[str]) -> dict[tuple[str, ...], tuple[int, ...]]:
    """{path of a layer: shape of its kernel} of the layers that a target names.

    A target is a regular expression that must match the end of a layer's path at a dot: "to_q",
    "attn2.to_k", "conv1".

    Raises:
      ValueError: a target that matches no layer, with some that would.
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
            raise ValueError(
                f"LoRA target {target!r} is not a regular expression ({error})"
            ) from None
        hits = {path: shape for path, shape in kernels.items() if pattern.search(".".join(path))}
        if not hits:
            ending = re.compile(r"^.*?([A-Za-z_]+[0-9]*(\.[0-9]+)?)$")
            ends = {ending.sub(r"\1", ".".join(path)) for path in kernels}
            raise ValueError(
                f"LoRA target {target!r} matches no layer; the layers end in"
                f" {', '.join(sorted(ends))}"
            )
        found |= hits
    return dict(sorted(found.items()))


def lora_init(key: Array, params: Any, targets: Sequence[str], rank: int) -> Any:
    """Fresh updates {path: {"down", "up"}} of the targets: down normal with variance 1/fan-in, up
    zero, so that nothing changes yet.

    Arguments as of `low_rank`; `params` {"params": ...} may be arrays or their shapes.

    Raises:
      ValueError: a target that matches nothing, or a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"the LoRA rank must be at least 1, got {rank}")
    tree: dict[tuple[str, ...], Array] = {}
    for i, (path, shape) in enumerate(lora_layers(params, targets).items()):
        lead = shape[:1] if unstacked(path) else ()
        inner = shape[len(lead) :]
        down = (*lead, *inner[:-1], rank)
        up = (*lead, *((1, 1) if len(inner) == 4 else ()), rank, inner[-1])
        fan_in = int(np.prod(inner[:-1]))
        tree[(*path, "down")] = jax.random.normal(jax.random.fold_in(key, i), down) * fan_in**-0.5
        tree[(*path, "up")] = jnp.zeros(up)
    return unflatten_dict(tree)


def lora_merge(params: Mapping[str, Any], updates: Any) -> Any:
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
