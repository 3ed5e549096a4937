"""UNet2DConditionModel of Stable Diffusion 1.x, 2.x and SDXL: one module, configured by the
checkpoint's config.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from jaxdistill.models.blocks import REMAT_POLICIES, run_blocks
from jaxdistill.models.layers import (
    Attention,
    Conv,
    Dtype,
    Embedding,
    GroupNorm,
    LayerNorm,
    Linear,
    ResnetBlock,
    sinusoidal,
)

STACK = "transformer_blocks"
"""The path segment of a level's blocks, whose parameters are stacked where they are scanned."""


def like(a: Array, other: Array) -> Array:
    """`a` with each row repeated until it has the rows of `other`."""
    copies = other.shape[0] // a.shape[0]
    return jnp.repeat(a, copies, axis=0) if copies > 1 else a


def per_layer(depth: int | Sequence[int], count: int) -> tuple[int, ...]:
    """One number for each of a level's attention layers: all the same, or listed.

    Raises ValueError for a list of another length.
    """
    found = (depth,) * count if isinstance(depth, int) else tuple(depth)
    if len(found) != count:
        raise ValueError(f"{list(found)} must be one number or {count}, one per layer")
    return found


def guidance_embedding(scale: Array, width: int) -> Array:
    """Guidance scales [b] as a network with `guidance_width` reads them: float32 [b, width] of
    1000 (scale - 1), as diffusers' get_guidance_scale_embedding.
    """
    embedded = sinusoidal(1000.0 * (scale - 1.0), width, flip=False, shift=1.0)
    return jnp.pad(embedded, ((0, 0), (0, width % 2)))


class FeedForward(nn.Module):
    """GEGLU: (x W_a) gelu(x W_b), then a projection back."""

    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """X [b, l, c] -> its shape."""
        c = x.shape[-1]
        value, gate = jnp.split(Linear(8 * c, dtype=self.dtype, name="net.0.proj")(x), 2, axis=-1)
        return Linear(c, dtype=self.dtype, name="net.2")(
            value * jax.nn.gelu(gate, approximate=False)
        )


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each after a LayerNorm and around a skip."""

    heads: int
    attention: str
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        """X [b, l, c], context [r b, m, d] -> [r b, l, c]: row i of x meets the rows r i to r i + r
        - 1 of the context.
        """
        attention = {"kernel": self.attention, "dtype": self.dtype}
        x = x + Attention(self.heads, name="attn1", **attention)(LayerNorm(name="norm1")(x))
        x = like(x, context)
        x = x + Attention(self.heads, name="attn2", **attention)(
            LayerNorm(name="norm2")(x), context
        )
        return x + FeedForward(self.dtype, name="ff")(LayerNorm(name="norm3")(x))


class Transformer(nn.Module):
    """`depth` transformer blocks over the positions of a feature map, around a skip (diffusers'
    Transformer2DModel).
    """

    depth: int
    heads: int
    groups: int
    linear_projection: bool
    attention: str
    remat: str
    scan: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        """X [b, h, w, c], context [r b, m, d] -> [r b, h, w, c], as the blocks."""
        b, h, w, c = x.shape
        y = GroupNorm(self.groups, 1e-6, name="norm")(x)
        if self.linear_projection:
            y = Linear(c, dtype=self.dtype, name="proj_in")(y.reshape(b, h * w, c))
        else:
            y = Conv(c, 1, dtype=self.dtype, name="proj_in")(y).reshape(b, h * w, c)
        block = functools.partial(TransformerBlock, self.heads, self.attention, self.dtype)
        if self.scan and self.depth > 1:  # a loop's carry keeps its shape
            y = like(y, context)
        span = range(self.depth)
        y, _ = run_blocks(block, STACK, span, y, (context,), scan=self.scan, remat=self.remat)
        if self.linear_projection:
            y = Linear(c, dtype=self.dtype, name="proj_out")(y).reshape(-1, h, w, c)
        else:
            y = Conv(c, 1, dtype=self.dtype, name="proj_out")(y.reshape(-1, h, w, c))
        return like(x, y) + y


class UNetCondition(nn.Module):
    """Diffusers' UNet2DConditionModel, NHWC.

    Attributes are the fields of its config, checked in `interop.diffusers_folder`.

    Attributes:
      in_channels, out_channels: of the latents.
      channels: of each level.
      layers: residual blocks of each level going down; one more going up.
      heads: attention heads of each level.
      depth: transformer blocks of each attention layer going down, by level: a number, or one for
        each of its layers; 0 where the level has none.
      depth_up: the same going up, by level again (the first number is the level of full
        resolution).
      mid_layers: residual blocks of the middle: 2 around its attention; 1 or 0 without.
      mid_depth: transformer blocks of the middle's attention, 0 without.
      linear_projection: proj_in and proj_out are linear (2.x, XL), not 1x1 convolutions (1.x).
      groups, eps: of the group norms.
      flip_sin_to_cos, freq_shift: of the time embedding.
      addition_time_width: width of each embedded time id (XL), 0 without the text_time addition.
      guidance_width: width of the embedded guidance scale (LCM), 0 without.
      attention: a key of `attention.ATTENTION`.
      remat: a key of REMAT_POLICIES, for residual and transformer blocks.
      scan: run the transformer blocks of one attention layer as a `lax.scan` over stacked
        parameters.
      dtype: of the computation; parameters and norms stay float32.
    """

    in_channels: int = 4
    out_channels: int = 4
    channels: Sequence[int] = (320, 640, 1280, 1280)
    layers: Sequence[int] = (2, 2, 2, 2)
    heads: Sequence[int] = (8, 8, 8, 8)
    depth: Sequence[int | Sequence[int]] = (1, 1, 1, 0)
    depth_up: Sequence[int | Sequence[int]] = (1, 1, 1, 0)
    mid_layers: int = 2
    mid_depth: int = 1
    linear_projection: bool = False
    groups: int = 32
    eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0
    addition_time_width: int = 0
    guidance_width: int = 0
    attention: str = "auto"
    remat: str = "none"
    scan: bool = False
    dtype: Dtype = jnp.float32

    @property
    def takes_guidance(self) -> bool:
        """Whether the guidance scale is an input."""
        return self.guidance_width > 0

    @nn.compact
    def __call__(
        self, x: Array, t: Array, cond: Any, features: bool = False
    ) -> Array | list[Array]:
        """One call of the network.

        `cond` may have r rows for each of x, as guidance has two: what does not depend on it is
        then computed once. In 1.x and 2.x that is all up to the first cross-attention; XL's
        `pooled` enters with the time.

        Args:
          x: latents [b, h, w, in_channels].
          t: the training step of each example, float [b].
          cond: {"context" [r b, m, d]}; with the text_time addition also "pooled" [r b, p] and
            "time_ids" [r b, 6]; with `guidance_width` also the scale "guidance" [b] or [r b].
          features: return the hidden states at the end of each level going down and of the middle
            (where there is one) instead, for a discriminator.

        Returns:
          [r b, h, w, out_channels] in x's dtype, or the list of states.
        """
        embed: dict[str, Any] = {"flip": self.flip_sin_to_cos, "shift": self.freq_shift}
        width = 4 * self.channels[0]
        moment, scale = sinusoidal(t, self.channels[0], **embed), None
        if self.guidance_width:
            scale = guidance_embedding(cond["guidance"], self.guidance_width)
            moment = like(moment, scale)
        time = Embedding(width, self.dtype, name="time_embedding")(moment, scale)
        if self.addition_time_width:
            ids = cond["time_ids"]
            embedded = sinusoidal(ids.reshape(-1), self.addition_time_width, **embed).reshape(
                ids.shape[0], -1
            )
            added = jnp.concatenate([cond["pooled"].astype(jnp.float32), embedded], axis=-1)
            time = like(time, added) + Embedding(width, self.dtype, name="add_embedding")(added)
        context = cond["context"].astype(self.dtype)
        policy = REMAT_POLICIES[self.remat]
        resnet_module: Any = ResnetBlock if policy is None else nn.remat(ResnetBlock, policy=policy)

        def resnet(name: str, channels: int, h: Array) -> Array:
            return resnet_module(channels, self.groups, self.eps, self.dtype, name=name)(
                like(h, time), like(time, h)
            )

        def attend(name: str, level: int, depth: int, h: Array) -> Array:
            return Transformer(
                depth,
                self.heads[level],
                self.groups,
                self.linear_projection,
                self.attention,
                self.remat,
                self.scan,
                self.dtype,
                name=name,
            )(h, context)

        h = Conv(self.channels[0], dtype=self.dtype, name="conv_in")(x)
        skips, states, last = [h], [], len(self.channels) - 1
        for level, channels in enumerate(self.channels):
            at = f"down_blocks.{level}"
            for i, depth in enumerate(per_layer(self.depth[level], self.layers[level])):
                h = resnet(f"{at}.resnets.{i}", channels, h)
                if depth:
                    h = attend(f"{at}.attentions.{i}", level, depth, h)
                skips.append(h)
            states.append(h)
            if level < last:
                h = Conv(channels, stride=2, dtype=self.dtype, name=f"{at}.downsamplers.0.conv")(h)
                skips.append(h)
        for i in range(self.mid_layers):
            if i == 1 and self.mid_depth:
                h = attend("mid_block.attentions.0", last, self.mid_depth, h)
            h = resnet(f"mid_block.resnets.{i}", self.channels[-1], h)
        if features:
            return [*states, h] if self.mid_layers else states
        for number, level in enumerate(reversed(range(last + 1))):
            at = f"up_blocks.{number}"
            for i, depth in enumerate(per_layer(self.depth_up[level], self.layers[level] + 1)):
                h = resnet(
                    f"{at}.resnets.{i}",
                    self.channels[level],
                    jnp.concatenate([h, like(skips.pop(), h)], axis=-1),
                )
                if depth:
                    h = attend(f"{at}.attentions.{i}", level, depth, h)
            if level > 0:
                h = Conv(self.channels[level], dtype=self.dtype, name=f"{at}.upsamplers.0.conv")(
                    h, skips[-1].shape[1:3]
                )
        h = nn.silu(GroupNorm(self.groups, self.eps, name="conv_norm_out")(h))
        return Conv(self.out_channels, dtype=self.dtype, name="conv_out")(h).astype(x.dtype)
