"""T5's encoder (Raffel et al. 2020, and v1.1), as SD 3, PixArt and FLUX use it."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array

from jaxdistill.models.blocks import run_blocks
from jaxdistill.models.layers import Dtype, Linear
from jaxdistill.models.transformers.layers import RMSNorm

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}
"""By transformers' names."""


def distance_buckets(length: int, buckets: int, distance: int) -> np.ndarray:
    """Which learned bias a query's row and a key's column share: int [length, length].

    Half of the buckets are for keys after the query. Of a half, the first half are single
    positions; the others grow as a logarithm up to `distance`, and the last has all beyond.
    """
    place = np.arange(length)
    far = place[None, :] - place[:, None]
    half = buckets // 2
    single = half // 2
    size = np.abs(far)
    # In float32 as torch: a boundary may fall on a position.
    ratio = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(single))
    steps = ratio / np.float32(math.log(distance / single)) * np.float32(half - single)
    coarse = np.minimum(single + steps.astype(np.int64), half - 1)
    return np.where(size < single, size, coarse) + np.where(far > 0, half, 0)


class T5Block(nn.Module):
    """Pre-norm attention without 1/√d, then an MLP; no biases. The residual is float32.

    Attributes:
      heads, head_dim: of the attention; their product need not be the width.
      intermediate: width of the MLP.
      activation: a key of ACTIVATIONS.
      gated: act(x wi_0) · (x wi_1) in place of act(x wi).
      eps: of the norms.
      dtype: of the matrix products. With float16 the last one is float32, which float16 overflows.
    """

    heads: int
    head_dim: int
    intermediate: int
    activation: str
    gated: bool
    eps: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, bias: Array, mask: Array | None = None) -> Array:
        """X float32 [b, l, d], bias [1, h, l, l] and mask bool [b, l] (False where nobody looks) ->
        x's shape.
        """
        b, length, width = x.shape
        h = RMSNorm(self.eps, name="layer.0.layer_norm")(x)
        inner = self.heads * self.head_dim
        q, k, v = (
            self._linear(inner, f"layer.0.SelfAttention.{name}")(h).reshape(
                b, length, self.heads, self.head_dim
            )
            for name in "qkv"
        )
        seen = None if mask is None else mask[:, None, None, :]
        out = jax.nn.dot_product_attention(q, k, v, bias, seen, scale=1.0)
        x = x + self._linear(width, "layer.0.SelfAttention.o")(out.reshape(b, length, inner))
        h = RMSNorm(self.eps, name="layer.1.layer_norm")(x)
        act, mlp = ACTIVATIONS[self.activation], "layer.1.DenseReluDense"
        last = jnp.float32 if self.dtype == jnp.float16 else self.dtype
        if self.gated:
            gate = act(self._linear(self.intermediate, f"{mlp}.wi_0")(h)).astype(last)
            h = gate * self._linear(self.intermediate, f"{mlp}.wi_1")(h)
        else:
            h = act(self._linear(self.intermediate, f"{mlp}.wi")(h))
        return x + Linear(width, False, last, name=f"{mlp}.wo")(h)

    def _linear(self, features: int, name: str) -> Linear:
        return Linear(features, False, self.dtype, name=name)


class T5Encoder(nn.Module):
    """T5EncoderModel. Attributes are those of its config, and of the blocks.

    Attributes:
      buckets, distance: of the relative positions, as `distance_buckets`.
      scan: the blocks as a loop over stacked parameters.
    """

    vocab_size: int
    hidden_size: int
    intermediate: int
    layers: int
    heads: int
    head_dim: int
    activation: str = "gelu_new"
    gated: bool = True
    buckets: int = 32
    distance: int = 128
    eps: float = 1e-6
    scan: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: Array, mask: Array | None = None) -> Array:
        """Token ids int [b, l] -> states after the final norm, float32 [b, l, d]. `mask` bool [b,
        l] is False where nobody looks; without one, padding is seen as any token.
        """
        x = nn.Embed(self.vocab_size, self.hidden_size, name="shared")(ids).astype(jnp.float32)
        # Stored in block 0 and used by all: outside of it, all blocks have the same parameters.
        biases = nn.Embed(
            self.buckets,
            self.heads,
            name="encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        )(distance_buckets(ids.shape[1], self.buckets, self.distance))
        bias = biases.transpose(2, 0, 1)[None].astype(self.dtype)
        block = functools.partial(
            T5Block,
            self.heads,
            self.head_dim,
            self.intermediate,
            self.activation,
            self.gated,
            self.eps,
            self.dtype,
        )
        x, _ = run_blocks(
            block,
            "encoder.block",
            range(self.layers),
            x,
            (bias, mask),
            scan=self.scan,
            remat="none",
        )
        return RMSNorm(self.eps, name="encoder.final_layer_norm")(x)
