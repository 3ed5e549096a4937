"""Qwen3 as Z-Image reads it (Yang et al. 2025): a causal language model up to its last layer but
one, with transformers' names.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from jaxdistill.models.blocks import run_blocks
from jaxdistill.models.layers import Dtype, Linear
from jaxdistill.models.transformers.layers import RMSNorm, rotary_angles


def rotate_halves(x: Array, angles: Array) -> Array:
    """Pairs (i, i + d / 2) of x [b, l, h, d] turned by angles [l, d / 2], in float32: x's shape and
    dtype.
    """
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Qwen3Attention(nn.Module):
    """Causal self-attention with rotary positions and norms of queries and keys; groups of heads
    share keys and values (Ainslie et al. 2023).
    """

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    use_bias: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array, angles: Array) -> Array:
        """X [b, l, d], mask bool [b, l], angles [l, head_dim / 2] -> x's shape."""
        b, length, d = x.shape

        def project(name: str, heads: int) -> Array:
            linear = Linear(heads * self.head_dim, self.use_bias, self.dtype, name=f"{name}_proj")
            return linear(x).reshape(b, length, heads, self.head_dim)

        q, k, v = project("q", self.heads), project("k", self.kv_heads), project("v", self.kv_heads)
        q = rotate_halves(RMSNorm(self.eps, name="q_norm")(q), angles)
        k = rotate_halves(RMSNorm(self.eps, name="k_norm")(k), angles)
        seen = mask[:, None, None, :]
        out = jax.nn.dot_product_attention(q, k, v, mask=seen, is_causal=True)
        return Linear(d, self.use_bias, self.dtype, name="o_proj")(out.reshape(b, length, -1))


class Qwen3Layer(nn.Module):
    """Attention and a gated MLP, each after an RMS norm and around a skip."""

    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    eps: float
    use_bias: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array, angles: Array) -> Array:
        """X [b, l, d], mask bool [b, l], angles [l, head_dim / 2] -> x's shape."""
        attend = Qwen3Attention(
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.eps,
            self.use_bias,
            self.dtype,
            name="self_attn",
        )
        x = x + attend(RMSNorm(self.eps, name="input_layernorm")(x), mask, angles)
        h = RMSNorm(self.eps, name="post_attention_layernorm")(x)
        linear = functools.partial(Linear, use_bias=False, dtype=self.dtype)
        gate = nn.silu(linear(self.intermediate, name="mlp.gate_proj")(h))
        h = gate * linear(self.intermediate, name="mlp.up_proj")(h)
        return x + linear(x.shape[-1], name="mlp.down_proj")(h)


class Qwen3Text(nn.Module):
    """Transformers' Qwen3Model. Attributes are those of its config.

    Attributes:
      layers: `num_hidden_layers`; the last has no effect on what is returned.
      heads, kv_heads: `num_attention_heads`, and `num_key_value_heads`, which divides them.
      head_dim: of queries, keys and values.
      base: of the rotary frequencies, `rope_theta`.
      use_bias: of the four projections, `attention_bias`.
      scan: run the layers as a loop over stacked parameters.
      dtype: of the computation; norms stay float32.
    """

    vocab_size: int = 151_936
    hidden_size: int = 2560
    intermediate: int = 9728
    layers: int = 36
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    eps: float = 1e-6
    base: float = 1e6
    use_bias: bool = False
    scan: bool = False
    dtype: Dtype = jnp.float32

    def example(self) -> tuple[Array, Array]:
        """The smallest ids and mask."""
        return jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)

    @nn.compact
    def __call__(self, ids: Array, mask: Array) -> Array:
        """The input of the last layer, transformers' hidden_states[-2]: [b, l, hidden_size].

        Args:
          ids: tokens int [b, l].
          mask: bool [b, l], False on padding, whose rows of the result mean nothing.
        """
        embed = nn.Embed(self.vocab_size, self.hidden_size, name="embed_tokens")
        x = embed(ids).astype(self.dtype)
        angles = rotary_angles(jnp.arange(ids.shape[1])[:, None], [self.head_dim], self.base)
        kind = functools.partial(
            Qwen3Layer,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.intermediate,
            self.eps,
            self.use_bias,
            self.dtype,
        )
        span = range(self.layers - 1)
        x, _ = run_blocks(kind, "layers", span, x, (mask, angles), scan=self.scan, remat="none")
        # A checkpoint has these weights too. What comes of them is not used, so XLA leaves it out.
        unused = kind(name=f"layers.{self.layers - 1}")(x, mask, angles)
        RMSNorm(self.eps, name="norm")(unused)
        return x
