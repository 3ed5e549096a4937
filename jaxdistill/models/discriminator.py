"""Discriminator heads for the hidden states of a frozen network."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array


class FeatureHeads(nn.Module):
    """One small head for each hidden state: [b, ..., c] -> Dense, silu, mean over positions, Dense
    -> a logit.

    The hidden states are conditional, so the heads are too. Attribute width: of each head.
    """

    width: int = 128

    @nn.compact
    def __call__(self, features: Sequence[Array], cond: Any) -> Array:
        """Hidden states [b, ..., c] -> logits [b, number of states]."""
        logits = []
        for state in features:
            h = state.reshape(state.shape[0], -1, state.shape[-1])
            h = nn.LayerNorm(use_bias=False, use_scale=False)(h)
            h = nn.silu(nn.Dense(self.width)(h))
            h = nn.silu(nn.Dense(self.width)(h.mean(axis=1)))
            logits.append(nn.Dense(1)(h)[:, 0])
        return jnp.stack(logits, axis=-1)


def fresh_heads(
    heads: FeatureHeads, key: Array, states_of: Callable[..., Any], *inputs: Any, cond: Any
) -> Any:
    """First parameters of heads for the hidden states that `states_of(*inputs)` gives, which is
    traced and not computed.
    """
    states = [jnp.zeros(state.shape, state.dtype) for state in jax.eval_shape(states_of, *inputs)]
    return jax.jit(heads.init)(key, states, cond)
