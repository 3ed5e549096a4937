"""The small U-Net with text: cross-attention to token embeddings at every level."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from jaxdistill.models.mlp import fourier_features
from jaxdistill.models.unet import Attention, ResBlock


class CrossAttention(nn.Module):
    """Positions of x [b, h, w, c] attend to tokens, around a skip."""

    heads: int = 4

    @nn.compact
    def __call__(self, x: Array, tokens: Array, mask: Array) -> Array:
        """States x [b, h, w, c], tokens [b, l, d], mask bool [b, l] -> x's shape."""
        b, h, w, c = x.shape
        split = (self.heads, c // self.heads)
        q = nn.Dense(c, use_bias=False)(nn.GroupNorm(max(1, c // 16))(x).reshape(b, h * w, c)).reshape(b, h * w, *split)
        k, v = (nn.Dense(c, use_bias=False)(tokens).reshape(b, -1, *split) for _ in range(2))
        out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :]).reshape(b, h * w, c)
        return x + nn.Dense(c, kernel_init=nn.initializers.zeros)(out).reshape(x.shape)


class TextUNet(nn.Module):
    """`SmallUNet` conditioned on token embeddings: their mean beside the time, and cross-attention after each block.

    The null conditioning is a caption without content: zero embeddings, one position visible.

    Attributes:
      channels: of each level; each further level halves the resolution.
      blocks: residual blocks a level.
      patch: pixels a side folded into channels; sides must be multiples of patch * 2^(levels - 1).
      text_width: to which the token embeddings are projected once.
      time_scale: factor on t, such that t * time_scale spans about [0, 1000].
    """

    channels: Sequence[int] = (32, 96)
    blocks: int = 1
    patch: int = 2
    text_width: int = 128
    time_scale: float = 1000.0

    @nn.nowrap
    def null_cond(self, cond: Any) -> Any:
        """The null conditioning for {"tokens" [b, l, d], "mask" [b, l]}."""
        first = jnp.arange(cond["mask"].shape[1]) == 0
        return {"tokens": jnp.zeros_like(cond["tokens"]), "mask": jnp.broadcast_to(first, cond["mask"].shape)}

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Any, features: bool = False) -> Array | Sequence[Array]:
        """X [b, h, w, c], t [b], cond {"tokens", "mask"} -> output of x's shape; or with `features` the states going down."""
        b, height, width, image_channels = x.shape
        p, unit = self.patch, self.patch * 2 ** (len(self.channels) - 1)
        if height % unit or width % unit:
            raise ValueError(
                f"TextUNet(patch={p}, {len(self.channels)} levels) needs sides that are multiples of {unit}, got {height}x{width}"
            )
        mask = cond["mask"]
        tokens = nn.Dense(self.text_width)(nn.LayerNorm()(cond["tokens"]))
        pooled = jnp.sum(tokens * mask[..., None], axis=1) / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
        dim = 4 * self.channels[0]
        c = nn.Dense(dim)(fourier_features(t * self.time_scale, 128)) + nn.Dense(dim)(pooled)
        c = nn.silu(nn.Dense(dim)(nn.silu(c)))
        lowest = len(self.channels) - 1

        def block(h: Array, channels: int, level: int) -> Array:
            h = ResBlock(channels)(h, c)
            if level == lowest:
                h = Attention()(h)
            return CrossAttention()(h, tokens, mask)

        h = x.reshape(b, height // p, p, width // p, p, image_channels).transpose(0, 1, 3, 2, 4, 5)
        h = nn.Conv(self.channels[0], (3, 3))(h.reshape(b, height // p, width // p, -1))
        skips, states = [h], []
        for level, channels in enumerate(self.channels):
            if level:
                h = nn.Conv(channels, (3, 3), strides=(2, 2))(h)
                skips.append(h)
            for _ in range(self.blocks):
                h = block(h, channels, level)
                skips.append(h)
            states.append(h)
        h = block(h, self.channels[-1], lowest)
        if features:
            return [*states, h]
        for level, channels in reversed(list(enumerate(self.channels))):
            for _ in range(self.blocks + 1):
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), channels, level)
            if level:
                h = jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2)
                h = nn.Conv(self.channels[level - 1], (3, 3))(h)
        h = nn.silu(nn.GroupNorm(max(1, h.shape[-1] // 16))(h))
        out = nn.Conv(p * p * image_channels, (3, 3), kernel_init=nn.initializers.zeros)(h)
        out = out.reshape(b, height // p, width // p, p, p, image_channels).transpose(0, 1, 3, 2, 4, 5)
        return out.reshape(x.shape)
