"""Blocks of one kind in a row, or as a loop over stacked parameters."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn

from jaxdistill.model import stack
from jaxdistill.models.stable_diffusion.latent_layers import LORA
from jaxdistill.partition import gather_of_blocks

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def run_blocks(
    kind: Any,
    name: str,
    span: range,
    carry: Any,
    shared: Sequence[Any],
    *,
    scan: bool,
    remat: str,
    seen: Any = None,
) -> tuple[Any, list[Any]]:
    """The blocks `name`.i for i in `span`, one after the other: kind(name=...)(carry, *shared) ->
    carry. Call it inside a compact method.

    Args:
      kind: makes a block of a name; all have the same parameters.
      name: of the list in the checkpoint.
      span: their numbers.
      carry: what goes through them, an array or a tuple of arrays.
      shared: what all get, as a time embedding.
      scan: as a loop over parameters that are stacked at `stack(name, span)`.
      remat: a key of REMAT_POLICIES.
      seen: carry -> what a discriminator sees; None where nobody does.

    Returns:
      The last carry, and what was seen after each of `span`, [] without `seen`.
    """
    policy = REMAT_POLICIES[remat]

    def apply(block: Any, carry: Any, *shared: Any) -> Any:
        return block(carry, *shared)

    if not scan or len(span) < 2:
        if policy is not None:
            apply = nn.remat(apply, policy=policy)
        states = []
        for i in span:
            carry = apply(kind(name=f"{name}.{i}"), carry, *shared)
            states += [seen(carry)] if seen else []
        return carry, states
    block = kind(name=stack(name, span))
    gather = gather_of_blocks(stack(name, span), len(span), block.dtype)
    if gather is not None and not block.is_initializing():
        # Inside what is computed again: the loop would keep every block whole for its gradient.
        apply = nn.map_variables(apply, ["params", LORA], gather)
    if policy is not None:
        apply = nn.remat(apply, policy=policy, prevent_cse=False)

    def body(block: Any, carry: Any, *shared: Any) -> tuple[Any, Any]:
        carry = apply(block, carry, *shared)
        return carry, seen(carry) if seen else None

    scanned = nn.scan(
        body,
        variable_axes={"params": 0, LORA: 0},
        split_rngs={"params": True},
        length=len(span),
        in_axes=nn.broadcast,
    )
    carry, stacked = scanned(block, carry, *shared)
    return carry, [stacked[i] for i in range(len(span))] if seen else []
