"""PixArtTransformer2DModel of PixArt-α (Chen et al. 2023) and PixArt-Σ (Chen et al. 2024): blocks
whose modulation is one shared projection of the time plus a table of their own.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array

from jaxdistill.models.blocks import run_blocks
from jaxdistill.models.layers import (
    Attention,
    Conv,
    Dtype,
    Embedding,
    LayerNorm,
    Linear,
    sinusoidal,
)
from jaxdistill.models.stable_diffusion.unet_condition import like
from jaxdistill.models.transformers.layers import grid_of, plain_norm, sine_positions, taps

TIME_WIDTH = 256
"""Sines and cosines of the time, and of each micro-condition."""


class MLP(nn.Module):
    """Linear to four times the width, gelu, linear back (diffusers' FeedForward)."""

    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """X [b, l, c] -> its shape."""
        c = x.shape[-1]
        h = nn.gelu(Linear(4 * c, dtype=self.dtype, name="net.0.proj")(x))
        return Linear(c, dtype=self.dtype, name="net.2")(h)


class CaptionProjection(nn.Module):
    """linear_1, gelu, linear_2: the text's states at the network's width."""

    width: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """X [b, m, d] -> [b, m, width]."""
        h = nn.gelu(Linear(self.width, dtype=self.dtype, name="linear_1")(x))
        return Linear(self.width, dtype=self.dtype, name="linear_2")(h)


class CombinedEmbeddings(nn.Module):
    """The time's embedding, plus that of the image's sizes where the network has them: two thirds
    of the width for height and width, one for their ratio (Podell et al. 2023, micro-conditions).
    """

    width: int
    sizes: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, t: Array, cond: Any) -> Array:
        """T [b] and cond {"resolution" [b, 2], "aspect_ratio" [b, 1]} -> [b, width]."""

        def embed(values: Array, width: int, name: str) -> Array:
            waves = sinusoidal(values.reshape(-1), TIME_WIDTH, flip=True, shift=0.0)
            embedded = Embedding(width, self.dtype, name=name)(waves)
            return embedded.reshape(values.shape[0], -1)

        time = embed(t, self.width, "timestep_embedder")
        if not self.sizes:
            return time
        part = self.width // 3
        resolution = embed(cond["resolution"], part, "resolution_embedder")
        ratio = embed(cond["aspect_ratio"], part, "aspect_ratio_embedder")
        return time + jnp.concatenate([resolution, ratio], axis=-1)


class AdaLNSingle(nn.Module):
    """One modulation for all blocks: shift, scale, gate of attention and of the MLP."""

    sizes: bool
    width: int
    dtype: Dtype

    @nn.compact
    def __call__(self, t: Array, cond: Any) -> tuple[Array, Array]:
        """T [b] -> (modulation [b, 6, width], the embedded time [b, width])."""
        embedded = CombinedEmbeddings(self.width, self.sizes, self.dtype, name="emb")(t, cond)
        six = Linear(6 * self.width, dtype=self.dtype, name="linear")(nn.silu(embedded))
        return six.reshape(-1, 6, self.width), embedded


def table(module: nn.Module, rows: int, width: int) -> Array:
    """The module's scale_shift_table: float32 [rows, width]."""
    init = nn.initializers.normal(width**-0.5)
    return module.param("scale_shift_table", init, (rows, width)).astype(jnp.float32)


def modulated(x: Array, shift: Array, scale: Array) -> Array:
    """X [b, l, c] scaled by 1 + scale [b, 1, c] and shifted, in float32: its shape and dtype."""
    return (x.astype(jnp.float32) * (1.0 + scale) + shift).astype(x.dtype)


class PixArtBlock(nn.Module):
    """Self-attention and an MLP, both modulated and gated, around a cross-attention that is neither
    normed nor gated.
    """

    heads: int
    qkv_bias: bool
    eps: float
    affine: bool
    attention: str
    dtype: Dtype

    def _norm(self, x: Array, name: str) -> Array:
        return LayerNorm(self.eps, name=name)(x) if self.affine else plain_norm(x, self.eps)

    @nn.compact
    def __call__(self, x: Array, modulation: Array, context: Array, mask: Array) -> Array:
        """One block.

        Args:
          x: [b, l, c].
          modulation: [b, 6, c]; this block's table is added.
          context: the text's states [b, m, d].
          mask: bool [b, m], False at keys that nobody sees.

        Returns:
          x's shape and dtype.
        """
        six = table(self, 6, x.shape[-1]) + modulation.astype(jnp.float32)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = jnp.split(six, 6, axis=1)
        attention = functools.partial(
            Attention, self.heads, self.qkv_bias, self.attention, self.dtype
        )
        seen = attention(name="attn1")(modulated(self._norm(x, "norm1"), shift, scale))
        x = (x + gate * seen).astype(x.dtype)
        x = x + attention(name="attn2")(x, context, mask)
        y = modulated(self._norm(x, "norm2"), shift_mlp, scale_mlp)
        return (x + gate_mlp * MLP(self.dtype, name="ff")(y)).astype(x.dtype)


class PixArt(nn.Module):
    """Diffusers' PixArtTransformer2DModel, NHWC. Called as `layers` says.

    Attributes are the fields of its config.

    Attributes:
      in_channels: of the latents.
      out_channels: in_channels, or twice as many, of which the second half (the learned variance)
        is dropped.
      heads, head_dim: of attention; their product is the width.
      depth: number of blocks.
      patch: side of a patch, in latents.
      base: patches a side for which coordinates step by 1 / interpolation.
      interpolation: divides the coordinates.
      sizes: cond has "resolution" [r b, 2], height and width in pixels, and "aspect_ratio"
        [r b, 1], height / width. The network's width must then divide by 3.
      context: width of the text's states.
      projected: whether these are brought to the network's width.
      qkv_bias: whether queries, keys and values have a bias.
      eps, affine: of the blocks' norms; `affine` norms have a scale and a bias.
      attention: a key of `attention.ATTENTION`.
      remat: a key of REMAT_POLICIES, for each block.
      scan: run the blocks as a `lax.scan` over stacked parameters.
      dtype: of the computation; parameters, norms and modulation stay float32.
    """

    in_channels: int = 4
    out_channels: int = 8
    heads: int = 16
    head_dim: int = 72
    depth: int = 28
    patch: int = 2
    base: int = 64
    interpolation: float = 2.0
    sizes: bool = False
    context: int = 4096
    projected: bool = True
    qkv_bias: bool = True
    eps: float = 1e-6
    affine: bool = False
    attention: str = "auto"
    remat: str = "none"
    scan: bool = False
    dtype: Dtype = jnp.float32

    takes_guidance = False

    @nn.compact
    def __call__(
        self, x: Array, t: Array, cond: Any, features: bool = False
    ) -> Array | list[Array]:
        """One call of the network; see `layers`.

        Args:
          x: latents [b, h, w, in_channels], h and w multiples of `patch`.
          t: the training step of each example, float [b].
          cond: {"context" [r b, m, d], "mask" [r b, m]}, the mask 1.0 at the text's tokens and 0.0
            at its padding; with `sizes` also "resolution" and "aspect_ratio".
          features: return hidden states at `taps(depth)`.

        Returns:
          [r b, h, w, in_channels] in x's dtype, or the list of states.
        """
        width = self.heads * self.head_dim
        rows, columns = x.shape[1] // self.patch, x.shape[2] // self.patch
        context, mask = cond["context"].astype(self.dtype), cond["mask"] > 0.5
        patches = Conv(width, self.patch, self.patch, 0, self.dtype, name="pos_embed.proj")(x)
        h = (patches + self._positions(rows, columns)).astype(self.dtype)
        h = like(h.reshape(-1, rows * columns, width), context)
        single = AdaLNSingle(self.sizes, width, self.dtype, name="adaln_single")
        modulation, time = single(like(t, context), cond)
        if self.projected:
            context = CaptionProjection(width, self.dtype, name="caption_projection")(context)
        block = functools.partial(
            PixArtBlock,
            self.heads,
            self.qkv_bias,
            self.eps,
            self.affine,
            self.attention,
            self.dtype,
        )
        h, states = run_blocks(
            block,
            "transformer_blocks",
            range(self.depth),
            h,
            (modulation, context, mask),
            scan=self.scan,
            remat=self.remat,
            seen=(lambda h: h) if features else None,
            at=taps(self.depth),
        )
        if features:
            return [grid_of(seen, rows, columns) for seen in states]
        two = table(self, 2, width) + time.astype(jnp.float32)[:, None]
        h = modulated(plain_norm(h), two[:, :1], two[:, 1:])
        h = Linear(self.patch**2 * self.out_channels, dtype=self.dtype, name="proj_out")(h)
        return self._image(h, rows, columns).astype(x.dtype)

    def example(self) -> tuple[Array, Array, dict[str, Array]]:
        """The smallest inputs of a call."""
        cond = {"context": jnp.zeros((1, 2, self.context)), "mask": jnp.ones((1, 2))}
        if self.sizes:
            cond |= {"resolution": jnp.ones((1, 2)), "aspect_ratio": jnp.ones((1, 1))}
        return jnp.zeros((1, self.patch, self.patch, self.in_channels)), jnp.zeros((1,)), cond

    def _positions(self, rows: int, columns: int) -> Array:
        """Coordinate i of n along an axis is i base / n / interpolation: [rows, columns, width]."""

        def axis(n: int) -> np.ndarray:
            steps = np.arange(n, dtype=np.float32)
            return steps / np.float32(n / self.base) / np.float32(self.interpolation)

        return sine_positions(axis(rows), axis(columns), self.heads * self.head_dim)

    def _image(self, tokens: Array, rows: int, columns: int) -> Array:
        """Patches [b, l, (dy, dx, c)] -> the latents' channels [b, h, w, in_channels]."""
        p = self.patch
        patches = tokens.reshape(-1, rows, columns, p, p, self.out_channels)
        kept = patches[..., : self.in_channels].swapaxes(2, 3)
        return kept.reshape(-1, rows * p, columns * p, self.in_channels)
