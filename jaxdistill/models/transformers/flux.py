"""FluxTransformer2DModel of FLUX.1: streams of text and image that attend together, then one stream
(Black Forest Labs 2024); one module, configured by the checkpoint's config.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from jaxdistill.models.attention import ATTENTION
from jaxdistill.models.blocks import run_blocks
from jaxdistill.models.layers import Dtype, Embedding, Linear, sinusoidal
from jaxdistill.models.stable_diffusion.unet_condition import like
from jaxdistill.models.transformers.layers import (
    RMSNorm,
    grid_of,
    plain_norm,
    rotary_angles,
    rotate,
    taps,
)

PATCH = 2
"""Latent pixels in a token, by row and by column."""

ROTARY_BASE = 10_000.0
MOMENT_WIDTH = 256
gelu = functools.partial(jax.nn.gelu, approximate=True)


def packed(x: Array) -> Array:
    """Latents [b, h, w, c] -> tokens [b, h/2 w/2, 4 c], row by row, the features (c, dy, dx): as
    FluxPipeline takes them.
    """
    b, h, w, c = x.shape
    parts = x.reshape(b, h // PATCH, PATCH, w // PATCH, PATCH, c)
    return parts.transpose(0, 1, 3, 5, 2, 4).reshape(b, -1, PATCH * PATCH * c)


def unpacked(tokens: Array, height: int, width: int) -> Array:
    """Tokens [b, height/2 width/2, 4 c] -> latents [b, height, width, c]; the inverse of
    `packed`.
    """
    parts = tokens.reshape(len(tokens), height // PATCH, width // PATCH, -1, PATCH, PATCH)
    return parts.transpose(0, 1, 4, 2, 5, 3).reshape(len(tokens), height, width, -1)


def rounded(x: Array, dtype: Dtype) -> Array:
    """Float32 values that `dtype` has. XLA may drop a pair of casts, but not this."""
    kind = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x.astype(jnp.float32), kind.nexp, kind.nmant)


def bounded(x: Array) -> Array:
    """Float16 without infinities, as diffusers' blocks do; other types as they are."""
    most = jnp.finfo(jnp.float16).max
    return jnp.clip(x, -most, most) if x.dtype == jnp.float16 else x


def token_positions(words: int, rows: int, columns: int) -> Array:
    """(0, row, column) of each image token, after (0, 0, 0) for each of `words`: float32 [words +
    rows columns, 3].
    """
    row, column = jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij")
    image = jnp.stack([jnp.zeros_like(row), row, column], axis=-1).reshape(-1, 3)
    return jnp.pad(image, ((words, 0), (0, 0))).astype(jnp.float32)


class Modulation(nn.Module):
    """`parts` vectors of x's width for each example, from silu(moment): list of [b, 1, c]."""

    width: int
    parts: int
    dtype: Dtype

    @nn.compact
    def __call__(self, moment: Array) -> list[Array]:
        """Moment [b, c] -> `parts` arrays [b, 1, c]."""
        linear = Linear(self.parts * self.width, dtype=self.dtype, name="linear")
        return jnp.split(linear(nn.silu(moment))[:, None], self.parts, axis=-1)


def modulated(x: Array, shift: Array, scale: Array) -> Array:
    """norm(x) (1 + scale) + shift (Peebles and Xie 2022)."""
    return plain_norm(x) * (1 + scale) + shift


class FeedForward(nn.Module):
    """Four times as wide in between, with GELU by tanh."""

    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """X [b, l, c] -> its shape."""
        c = x.shape[-1]
        h = gelu(Linear(4 * c, dtype=self.dtype, name="net.0.proj")(x))
        return Linear(c, dtype=self.dtype, name="net.2")(h)


class FluxAttention(nn.Module):
    """Self-attention with normed and rotated queries and keys, over one stream or two."""

    heads: int
    kernel: str
    dtype: Dtype

    def project(self, x: Array, names: Sequence[str], norms: Sequence[str]) -> list[Array]:
        """q, k, v of a stream [b, l, c]: three [b, l, heads, d], q and k normed."""
        b, length, c = x.shape
        q, k, v = (
            Linear(c, dtype=self.dtype, name=name)(x).reshape(b, length, self.heads, -1)
            for name in names
        )
        return [*(RMSNorm(name=name)(a) for name, a in zip(norms, (q, k), strict=True)), v]

    @nn.compact
    def __call__(self, x: Array, angles: Array, text: Array | None = None) -> Any:
        """X [b, l, c], `text` [b, m, c] -> (x's, text's), each projected; without `text` only x's,
        as it comes.

        Args:
          x: the image, or without `text` all tokens.
          angles: of all tokens, text first: [m + l, d / 2].
          text: the other stream.
        """
        streams = [self.project(x, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))]
        if text is not None:
            names = ("add_q_proj", "add_k_proj", "add_v_proj")
            streams.insert(0, self.project(text, names, ("norm_added_q", "norm_added_k")))
        q, k, v = (jnp.concatenate(parts, axis=1) for parts in zip(*streams, strict=True))
        out = ATTENTION[self.kernel](rotate(q, angles), rotate(k, angles), v)
        out = out.reshape(*out.shape[:2], -1)
        if text is None:
            return out
        words = text.shape[1]
        return (
            Linear(x.shape[-1], dtype=self.dtype, name="to_out.0")(out[:, words:]),
            Linear(x.shape[-1], dtype=self.dtype, name="to_add_out")(out[:, :words]),
        )


class DoubleBlock(nn.Module):
    """Text and image attend together, each with its own weights (diffusers'
    FluxTransformerBlock).
    """

    heads: int
    attention: str
    dtype: Dtype

    @nn.compact
    def __call__(
        self, streams: tuple[Array, Array], moment: Array, angles: Array
    ) -> tuple[Array, Array]:
        """(text [b, m, c], image [b, l, c]), moment [b, c] -> the two of the same shapes."""
        text, image = streams
        width = image.shape[-1]
        of_image = Modulation(width, 6, self.dtype, name="norm1")(moment)
        of_text = Modulation(width, 6, self.dtype, name="norm1_context")(moment)
        attended = FluxAttention(self.heads, self.attention, self.dtype, name="attn")(
            modulated(image, *of_image[:2]), angles, modulated(text, *of_text[:2])
        )

        def after(x: Array, out: Array, parts: list[Array], name: str) -> Array:
            _, _, gate, shift, scale, gate_mlp = parts
            x = x + gate * out
            return x + gate_mlp * FeedForward(self.dtype, name=name)(modulated(x, shift, scale))

        image = after(image, attended[0], of_image, "ff")
        return bounded(after(text, attended[1], of_text, "ff_context")), image


class SingleBlock(nn.Module):
    """Attention and MLP side by side over all tokens (diffusers' FluxSingleTransformerBlock)."""

    heads: int
    attention: str
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, moment: Array, angles: Array) -> Array:
        """Text and image tokens [b, m + l, c], moment [b, c] -> x's shape."""
        c = x.shape[-1]
        shift, scale, gate = Modulation(c, 3, self.dtype, name="norm")(moment)
        h = modulated(x, shift, scale)
        mlp = gelu(Linear(4 * c, dtype=self.dtype, name="proj_mlp")(h))
        attended = FluxAttention(self.heads, self.attention, self.dtype, name="attn")(h, angles)
        joined = jnp.concatenate([attended, mlp], axis=-1)
        return bounded(x + gate * Linear(c, dtype=self.dtype, name="proj_out")(joined))


class FluxTransformer(nn.Module):
    """Diffusers' FluxTransformer2DModel on unpacked NHWC latents.

    Attributes:
      in_channels: of the latents, a quarter of the config's.
      context_width: of the text's states.
      pooled_width: of the pooled text.
      heads: attention heads.
      axes: rotary dimensions by axis (always 0, row, column), whose sum is the width of a head.
      double: blocks with a stream each for text and image.
      single: blocks with one stream, after them.
      takes_guidance: the guidance scale is an input (FLUX.1 dev).
      attention: a key of `attention.ATTENTION`.
      remat: a key of REMAT_POLICIES, for the blocks.
      scan: run the blocks of a kind as a `lax.scan` over stacked parameters.
      dtype: of the computation; parameters and norms stay float32.
    """

    in_channels: int = 16
    context_width: int = 4096
    pooled_width: int = 768
    heads: int = 24
    axes: Sequence[int] = (16, 56, 56)
    double: int = 19
    single: int = 38
    takes_guidance: bool = False
    attention: str = "auto"
    remat: str = "none"
    scan: bool = False
    dtype: Dtype = jnp.float32

    def example(self) -> tuple[Any, ...]:
        """The smallest inputs of a call."""
        cond = {
            "context": jnp.zeros((1, 2, self.context_width)),
            "pooled": jnp.zeros((1, self.pooled_width)),
        }
        if self.takes_guidance:
            cond["guidance"] = jnp.zeros((1,))
        return jnp.zeros((1, PATCH, PATCH, self.in_channels)), jnp.zeros((1,)), cond

    def moment(self, t: Array, cond: Any) -> Array:
        """The time, the scale and the pooled text in one vector: [r b, c].

        Time and scale are rounded to `dtype` as the stock pipeline rounds them: in bfloat16 a scale
        of 3.5 is read as 3.504.
        """

        def embedded(values: Array, name: str) -> Array:
            waves = sinusoidal(values, MOMENT_WIDTH, flip=True, shift=0.0)
            return embedding(name=f"time_text_embed.{name}")(waves)

        def thousand(values: Array) -> Array:
            return rounded(1000.0 * values, self.dtype)

        width = self.heads * sum(self.axes)
        embedding = functools.partial(Embedding, width, self.dtype)
        pooled = embedding(name="time_text_embed.text_embedder")(cond["pooled"])
        # The scheduler's time is 1000 σ, which the pipeline divides and the network multiplies.
        times = thousand(rounded(thousand(t.astype(jnp.float32)) / 1000.0, self.dtype))
        moment = like(embedded(times, "timestep_embedder"), pooled)
        if self.takes_guidance:
            scales = thousand(rounded(cond["guidance"], self.dtype))
            moment = moment + like(embedded(scales, "guidance_embedder"), pooled)
        return moment + pooled

    @nn.compact
    def __call__(
        self, x: Array, t: Array, cond: Any, features: bool = False
    ) -> Array | list[Array]:
        """One call of the network.

        Args:
          x: latents [b, h, w, in_channels]; h and w are even.
          t: σ of each example, float [b], in [0, 1].
          cond: {"context" [r b, m, d], "pooled" [r b, p]}, r rows for each of x; with
            `takes_guidance` also the scale "guidance" [b] or [r b], as a user gives it.
          features: return the states of the image tokens after the blocks `taps(double + single)`
            instead, for a discriminator.

        Returns:
          u = eps - x0, [r b, h, w, in_channels] in x's dtype, or the list of states [r b, h/2, w/2,
          heads · sum(axes)].
        """
        _, h, w, _ = x.shape
        rows, columns = h // PATCH, w // PATCH
        linear = functools.partial(Linear, dtype=self.dtype)
        width = self.heads * sum(self.axes)
        text = linear(width, name="context_embedder")(cond["context"])
        image = like(linear(width, name="x_embedder")(packed(x)), text)
        moment = self.moment(t, cond)
        words = text.shape[1]
        angles = rotary_angles(token_positions(words, rows, columns), self.axes, ROTARY_BASE)
        block = {"heads": self.heads, "attention": self.attention, "dtype": self.dtype}
        run = functools.partial(
            run_blocks, shared=(moment, angles), scan=self.scan, remat=self.remat
        )
        at = taps(self.double + self.single)
        (text, image), seen = run(
            functools.partial(DoubleBlock, **block),
            "transformer_blocks",
            range(self.double),
            (text, image),
            seen=(lambda streams: streams[1]) if features else None,
            at=at,
        )
        tokens, later = run(
            functools.partial(SingleBlock, **block),
            "single_transformer_blocks",
            range(self.single),
            jnp.concatenate([text, image], axis=1),
            seen=(lambda tokens: tokens[:, words:]) if features else None,
            at=[i - self.double for i in at],
        )
        if features:
            return [grid_of(states, rows, columns) for states in (*seen, *later)]
        scale, shift = Modulation(width, 2, self.dtype, name="norm_out")(moment)
        out = linear(PATCH * PATCH * self.in_channels, name="proj_out")(
            modulated(tokens[:, words:], shift, scale)
        )
        return unpacked(out, h, w).astype(x.dtype)
