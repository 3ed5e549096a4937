"""A small convolutional U-Net for images of a few dozen pixels a side."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from jaxdistill.models.small.mlp import Conditioning


class ResBlock(nn.Module):
    """GroupNorm, silu, 3x3 convolution, scale and shift by c [b, d], twice, around a skip (Dhariwal
    & Nichol 2021).
    """

    channels: int

    @nn.compact
    def __call__(self, x: Array, c: Array) -> Array:
        """States x [b, h, w, k] and conditioning c [b, d] -> [b, h, w, channels]."""
        groups = max(1, self.channels // 16)
        h = nn.Conv(self.channels, (3, 3))(nn.silu(nn.GroupNorm(max(1, x.shape[-1] // 16))(x)))
        modulation = nn.Dense(2 * self.channels, kernel_init=nn.initializers.zeros)(c)[
            :, None, None, :
        ]
        scale, shift = jnp.split(modulation, 2, axis=-1)
        h = nn.GroupNorm(groups, use_bias=False, use_scale=False)(h) * (1 + scale) + shift
        h = nn.Conv(self.channels, (3, 3), kernel_init=nn.initializers.zeros)(nn.silu(h))
        return h + (
            x if x.shape[-1] == self.channels else nn.Dense(self.channels, use_bias=False)(x)
        )


class Attention(nn.Module):
    """Self-attention over the positions of x [b, h, w, c], around a skip."""

    heads: int = 4

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """States x [b, h, w, c] -> x's shape."""
        b, h, w, c = x.shape
        tokens = nn.GroupNorm(max(1, c // 16))(x).reshape(b, h * w, c)
        q, k, v = jnp.split(
            nn.Dense(3 * c, use_bias=False)(tokens).reshape(
                b, h * w, 3 * self.heads, c // self.heads
            ),
            3,
            axis=2,
        )
        out = jax.nn.dot_product_attention(q, k, v).reshape(b, h * w, c)
        return x + nn.Dense(c, kernel_init=nn.initializers.zeros)(out).reshape(x.shape)


Block = Callable[[Array, int, int], Array]
"""(states [b, h, w, c], channels, level) -> states [b, h, w, channels]."""


def u_net(
    x: Array,
    *,
    channels: Sequence[int],
    blocks: int,
    patch: int,
    down: Block,
    up: Block,
    features: bool,
) -> Array | Sequence[Array]:
    """The frame of a U-Net on patches, for use inside a compact module: x [b, h, w, c] -> x's
    shape, or the states going down.

    `down` is the block on the way down, `up` the one in the middle and on the way up. Raises
    ValueError where the sides are no multiples of patch * 2^(levels - 1).
    """
    b, height, width, image_channels = x.shape
    p, unit = patch, patch * 2 ** (len(channels) - 1)
    if height % unit or width % unit:
        raise ValueError(
            f"a U-Net of patch={p} and {len(channels)} levels needs sides that are multiples of"
            f" {unit}, got {height}x{width}"
        )
    h = x.reshape(b, height // p, p, width // p, p, image_channels).transpose(0, 1, 3, 2, 4, 5)
    h = nn.Conv(channels[0], (3, 3))(h.reshape(b, height // p, width // p, -1))
    skips, states = [h], []
    for level, width_here in enumerate(channels):
        if level:
            h = nn.Conv(width_here, (3, 3), strides=(2, 2))(h)
            skips.append(h)
        for _ in range(blocks):
            h = down(h, width_here, level)
            skips.append(h)
        states.append(h)
    h = up(h, channels[-1], len(channels) - 1)
    if features:
        return [*states, h]
    for level, width_here in reversed(list(enumerate(channels))):
        for _ in range(blocks + 1):
            h = up(jnp.concatenate([h, skips.pop()], axis=-1), width_here, level)
        if level:
            h = jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2)
            h = nn.Conv(channels[level - 1], (3, 3))(h)
    h = nn.silu(nn.GroupNorm(max(1, h.shape[-1] // 16))(h))
    out = nn.Conv(p * p * image_channels, (3, 3), kernel_init=nn.initializers.zeros)(h)
    out = out.reshape(b, height // p, width // p, p, p, image_channels).transpose(0, 1, 3, 2, 4, 5)
    return out.reshape(x.shape)


class SmallUNet(nn.Module):
    """Patches of `patch` pixels to channels, then a U-Net with attention at its lowest level.

    Attributes:
      channels: of each level; each further level halves the resolution.
      blocks: residual blocks a level.
      patch: pixels a side that are folded into channels; the image's sides must be multiples of
        patch * 2^(levels - 1).
      num_classes: classes 0..num_classes-1; num_classes itself is the null class.
      time_scale: factor on t, such that t * time_scale spans about [0, 1000].
    """

    channels: Sequence[int] = (64, 128)
    blocks: int = 2
    patch: int = 2
    num_classes: int = 10
    time_scale: float = 1000.0

    @nn.nowrap
    def null_cond(self, cond: Array) -> Array:
        """The null class for each example of cond [b]."""
        return jnp.full_like(cond, self.num_classes)

    @nn.compact
    def __call__(
        self, x: Array, t: Array, cond: Array, features: bool = False
    ) -> Array | Sequence[Array]:
        """X [b, h, w, c], t [b], cond int [b] -> output of x's shape; or with `features` the states
        going down.
        """
        c = Conditioning(4 * self.channels[0], self.num_classes, self.time_scale)(t, cond)

        def up(h: Array, channels: int, level: int) -> Array:
            return ResBlock(channels)(h, c)

        def down(h: Array, channels: int, level: int) -> Array:
            h = up(h, channels, level)
            return Attention()(h) if level == len(self.channels) - 1 else h

        return u_net(
            x,
            channels=self.channels,
            blocks=self.blocks,
            patch=self.patch,
            down=down,
            up=up,
            features=features,
        )
