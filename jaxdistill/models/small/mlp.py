"""A residual MLP for small images."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array


def fourier_features(t: Array, dim: int, max_period: float = 10_000.0) -> Array:
    """Sines and cosines of t [b] at `dim`/2 frequencies, geometric from 1 to 1/max_period: [b,
    dim].
    """
    frequencies = np.exp(-np.log(max_period) * np.arange(dim // 2) / (dim // 2)).astype(np.float32)
    angle = t[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class Conditioning(nn.Module):
    """Time [b] and class [b] to one vector [b, width]. Class `num_classes` is the null class."""

    width: int
    num_classes: int
    time_scale: float

    @nn.compact
    def __call__(self, t: Array, cond: Array) -> Array:
        """T [b] and classes [b] -> [b, width]."""
        h = nn.Dense(self.width)(fourier_features(t * self.time_scale, 128))
        h = h + nn.Embed(self.num_classes + 1, self.width)(cond)
        return nn.silu(nn.Dense(self.width)(nn.silu(h)))


class ResidualMLP(nn.Module):
    """Flattened pixels through `depth` residual blocks with adaptive layer norm on time and class.

    Attributes:
      width: of the residual stream.
      depth: number of blocks.
      num_classes: classes 0..num_classes-1; num_classes itself is the null class.
      time_scale: factor on t, such that t * time_scale spans about [0, 1000].
      cond_width: of the vector of time and class, None for `width`. Every block's norm reads it: at
        `width` it costs more than the blocks.
    """

    width: int = 512
    depth: int = 3
    num_classes: int = 10
    time_scale: float = 1000.0
    cond_width: int | None = None

    @nn.nowrap
    def null_cond(self, cond: Array) -> Array:
        """The null class for each example of cond [b]."""
        return jnp.full_like(cond, self.num_classes)

    @nn.compact
    def __call__(
        self, x: Array, t: Array, cond: Array, features: bool = False
    ) -> Array | Sequence[Array]:
        """X [b, ...], t [b], cond int [b] -> output of x's shape; or with `features` the state
        after each block.
        """
        c = Conditioning(self.cond_width or self.width, self.num_classes, self.time_scale)(t, cond)
        h, states = nn.Dense(self.width)(x.reshape(x.shape[0], -1)), []
        for _ in range(self.depth):
            h = MLPBlock(self.width)(h, c)
            states.append(h)
        if features:
            return states
        out = nn.Dense(int(np.prod(x.shape[1:])), kernel_init=nn.initializers.zeros)(
            AdaptiveNorm()(h, c)
        )
        return out.reshape(x.shape)


class AdaptiveNorm(nn.Module):
    """LayerNorm(h) (1 + scale(c)) + shift(c), starting as plain LayerNorm (Peebles & Xie 2023)."""

    @nn.compact
    def __call__(self, h: Array, c: Array) -> Array:
        """States h [b, ..., w] and conditioning c [b, d] -> h's shape."""
        modulation = nn.Dense(2 * h.shape[-1], kernel_init=nn.initializers.zeros)(c)
        scale, shift = jnp.split(
            modulation.reshape(c.shape[0], *(1,) * (h.ndim - 2), -1), 2, axis=-1
        )
        return nn.LayerNorm(use_bias=False, use_scale=False)(h) * (1 + scale) + shift


class MLPBlock(nn.Module):
    """h + Dense(silu(Dense(norm(h, c))))."""

    width: int

    @nn.compact
    def __call__(self, h: Array, c: Array) -> Array:
        """States h [b, width] and conditioning c [b, d] -> h's shape."""
        y = nn.silu(nn.Dense(self.width)(AdaptiveNorm()(h, c)))
        return h + nn.Dense(self.width)(y)
