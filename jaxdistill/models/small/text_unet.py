"""The small U-Net with text: cross-attention to token embeddings at every level."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from jaxdistill.models.small.mlp import fourier_features
from jaxdistill.models.small.unet import Attention, ResBlock, u_net


def places(h: int, w: int) -> Array:
    """Where a position is: [h, w, 6] of x, y, sin πx, cos πx, sin πy, cos πy, with x and y from -1
    to 1.

    Smooth on purpose: a table of free vectors would have to learn "left" anew at every position.
    """
    y, x = jnp.meshgrid(jnp.linspace(-1.0, 1.0, h), jnp.linspace(-1.0, 1.0, w), indexing="ij")
    return jnp.stack([x, y, *(f(jnp.pi * a) for a in (x, y) for f in (jnp.sin, jnp.cos))], axis=-1)


class CrossAttention(nn.Module):
    """Positions of x [b, h, w, c] attend to tokens, around a skip.

    A query knows its place: what a caption asks for differs by it.
    """

    heads: int = 4

    @nn.compact
    def __call__(self, x: Array, tokens: Array, mask: Array) -> Array:
        """States x [b, h, w, c], tokens [b, l, d], mask bool [b, l] -> x's shape."""
        b, h, w, c = x.shape
        split = (self.heads, c // self.heads)
        where = nn.Dense(c, kernel_init=nn.initializers.normal(0.7))(places(h, w))
        q = nn.Dense(c, use_bias=False)(nn.GroupNorm(max(1, c // 16))(x) + where).reshape(
            b, h * w, *split
        )
        k, v = (nn.Dense(c, use_bias=False)(tokens).reshape(b, -1, *split) for _ in range(2))
        out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :]).reshape(
            b, h * w, c
        )
        return x + nn.Dense(
            c, kernel_init=nn.initializers.variance_scaling(0.1, "fan_in", "normal")
        )(out).reshape(x.shape)


class AttentionPool(nn.Module):
    """Learned queries read the tokens. Their mean would lose which garment has which place."""

    queries: int = 8
    heads: int = 4

    @nn.compact
    def __call__(self, tokens: Array, mask: Array) -> Array:
        """Tokens [b, l, d], mask bool [b, l] -> [b, queries * d]."""
        b, _, d = tokens.shape
        q = self.param("queries", nn.initializers.normal(1.0), (self.queries, d)).reshape(
            self.queries, self.heads, -1
        )
        k, v = (
            nn.Dense(d, use_bias=False)(tokens).reshape(b, -1, self.heads, d // self.heads)
            for _ in range(2)
        )
        q = jnp.broadcast_to(q, (b, *q.shape))
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :]).reshape(b, -1)


class TextUNet(nn.Module):
    """`SmallUNet` conditioned on token embeddings: pooled beside the time, and by cross-attention
    after each block.

    Every block is told the places of its positions. Zero padding alone tells them too late:
    without, a teacher draws what a caption names but not where.

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
        return {
            "tokens": jnp.zeros_like(cond["tokens"]),
            "mask": jnp.broadcast_to(first, cond["mask"].shape),
        }

    @nn.compact
    def __call__(
        self, x: Array, t: Array, cond: Any, features: bool = False
    ) -> Array | Sequence[Array]:
        """X [b, h, w, c], t [b], cond {"tokens", "mask"} -> output of x's shape; or with `features`
        the states going down.
        """
        mask = cond["mask"]
        tokens = nn.Dense(self.text_width)(nn.LayerNorm()(cond["tokens"]))
        pooled = AttentionPool()(tokens, mask)
        dim = 4 * self.channels[0]
        c = nn.Dense(dim)(fourier_features(t * self.time_scale, 128)) + nn.Dense(dim)(pooled)
        c = nn.silu(nn.Dense(dim)(nn.silu(c)))
        lowest = len(self.channels) - 1

        def block(h: Array, channels: int, level: int) -> Array:
            h = h + nn.Dense(h.shape[-1], use_bias=False)(places(*h.shape[1:3]))
            h = ResBlock(channels)(h, c)
            if level == lowest:
                h = Attention()(h)
            return CrossAttention()(h, tokens, mask)

        return u_net(
            x,
            channels=self.channels,
            blocks=self.blocks,
            patch=self.patch,
            down=block,
            up=block,
            features=features,
        )
