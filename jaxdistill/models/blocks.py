"""Blocks of one kind in a row, or as a loop over stacked parameters."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array

from jaxdistill.model import stack
from jaxdistill.models.layers import LORA
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
    at: Sequence[int] = (),
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
      at: the numbers of the blocks after which it sees that.

    Returns:
      The last carry, and what was seen after those of `span` that are in `at`.
    """
    policy = REMAT_POLICIES[remat]
    at = [i for i in span if seen and i in at]

    def plain(block: Any, carry: Any, *shared: Any) -> Any:
        return block(carry, *shared)

    apply = plain
    if not scan or len(span) < 2:
        if policy is not None:
            apply = nn.remat(apply, policy=policy)
        states = []
        for i in span:
            carry = apply(kind(name=f"{name}.{i}"), carry, *shared)
            states += [seen(carry)] if i in at else []
        return carry, states
    block = kind(name=stack(name, span))
    gather = gather_of_blocks(stack(name, span), len(span), block.dtype)
    if gather is not None and not block.is_initializing():
        # Inside what is computed again: the loop would keep every block whole for its gradient.
        def gathered(block: Any, carry: Any, *shared: Any) -> Any:
            begin = functools.partial(gather, after=carry)
            return nn.map_variables(plain, ["params", LORA], begin)(block, carry, *shared)

        apply = gathered
    if policy is not None:
        apply = nn.remat(apply, policy=policy, prevent_cse=False)

    # Of few blocks, so that the loop does not keep what all give. The last place is the others'.
    places = np.array([at.index(i) if i in at else len(at) for i in span])

    def body(block: Any, both: Any, place: Array, *shared: Any) -> tuple[Any, None]:
        carry, states = both
        carry = apply(block, carry, *shared)
        if at:
            states = jax.lax.dynamic_update_index_in_dim(states, seen(carry), place, 0)
        return (carry, states), None

    scanned = nn.scan(
        body,
        variable_axes={"params": 0, LORA: 0},
        split_rngs={"params": True},
        length=len(span),
        in_axes=(0, *(nn.broadcast for _ in shared)),
    )
    kept: Any = None
    if at:
        shape = jax.eval_shape(seen, carry)
        kept = jnp.zeros((len(at) + 1, *shape.shape), shape.dtype)
    (carry, kept), _ = scanned(block, (carry, kept), places, *shared)
    return carry, [kept[i] for i in range(len(at))]
