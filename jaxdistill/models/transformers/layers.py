"""What the diffusion transformers share: norms and positions.

A network is called as network(x, t, cond, features=False):

  x: latents [b, h, w, c], never packed.
  t: the time in the network's own units, float [b].
  cond: {"context" [r b, m, d], ...}, r rows for each of x (guidance has two).
  features: return hidden states of the image [r b, h', w', width] at `taps(depth)` instead.

It returns [r b, h, w, c] in x's dtype.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array

TAPS = 4
"""Hidden states that a discriminator sees, evenly spaced over the depth."""


def taps(depth: int) -> list[int]:
    """The blocks, counted from 0, after which a discriminator sees the states."""
    return sorted({-(-depth * (i + 1) // TAPS) - 1 for i in range(TAPS)})


class RMSNorm(nn.Module):
    """y = x / √(mean x² + eps) · scale over the last axis, in float32, whatever comes in."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """X [..., c] -> its shape and dtype."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        mean = jnp.square(y).mean(axis=-1, keepdims=True)
        return (y * jax.lax.rsqrt(mean + self.eps) * scale).astype(x.dtype)


def plain_norm(x: Array, eps: float = 1e-6) -> Array:
    """Layer normalisation without scale and bias, in float32: x's shape and dtype."""
    y = x.astype(jnp.float32)
    centred = y - y.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


def grid_of(tokens: Array, height: int, width: int) -> Array:
    """[b, h w, d] -> [b, h, w, d], row by row."""
    return tokens.reshape(tokens.shape[0], height, width, -1)


# ---------------------------------------------------------------------------------------- positions


def sine_positions(rows: np.ndarray, columns: np.ndarray, dim: int) -> Array:
    """The 2D table of MAE (He et al. 2021) at these coordinates: float32 [rows, columns, dim].

    The first half is [sin, cos] of the column, the second of the row, at frequencies 10000^(-k /
    (dim / 4)). A program holds the two axes only, not the table.
    """
    frequencies = 10_000.0 ** (-np.arange(dim // 4) / (dim / 4))

    def one(values: np.ndarray) -> np.ndarray:
        angle = np.asarray(values, np.float64)[:, None] * frequencies
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1).astype(np.float32)

    shape = (len(rows), len(columns), dim // 2)
    halves = (one(columns)[None], one(rows)[:, None])
    return jnp.concatenate([jnp.broadcast_to(half, shape) for half in halves], axis=-1)


def rotary_angles(positions: Array, dims: Sequence[int], base: float) -> Array:
    """Angles float32 [..., l, sum(dims) / 2] of positions [..., l, axes]: of axis a dims[a] / 2 of
    them, position · base^(-2k / dims[a]) (Su et al. 2021).
    """
    parts = []
    for a, dim in enumerate(dims):
        frequencies = base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
        parts.append(positions[..., a, None].astype(jnp.float32) * frequencies.astype(np.float32))
    return jnp.concatenate(parts, axis=-1)


def rotate(x: Array, angles: Array) -> Array:
    """Interleaved pairs of x [b, l, h, d] turned by angles [l, d / 2] or [b, l, d / 2], in float32:
    x's shape and dtype.
    """
    cos, sin = (jnp.repeat(f(angles), 2, axis=-1)[..., None, :] for f in (jnp.cos, jnp.sin))
    # Each pair's other half, by a product that is exact: an axis of two would be padded to a TPU's
    # tiles, and a roll be copied.
    swap = np.kron(np.eye(x.shape[-1] // 2), [[0, 1], [-1, 0]]).astype(x.dtype)
    exact = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    other = jnp.dot(x, swap, **exact)
    return (x.astype(jnp.float32) * cos + other * sin).astype(x.dtype)
