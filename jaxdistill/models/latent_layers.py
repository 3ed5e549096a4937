"""Layers of latent diffusion networks: bf16 compute over f32 parameters, low-rank updates, attention by a chosen kernel.

Modules are named as diffusers names its own ("down_blocks.0", "to_out.0"), so that a parameter's path is its name in a checkpoint.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array

LORA = "lora"
"""The collection of low-rank updates: at a layer's path, {"down", "up"}, whose product is added to its kernel."""

Dtype = Any


class Linear(nn.Module):
    """y = x W + b, plus (x down) up where the `lora` collection holds an update of this layer. Computes in `dtype`."""

    features: int
    use_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """X [..., d] -> [..., features]."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        x = x.astype(self.dtype)
        y = x @ kernel.astype(self.dtype)
        if self.has_variable(LORA, "down"):
            down, up = (self.get_variable(LORA, name).astype(self.dtype) for name in ("down", "up"))
            y = y + (x @ down) @ up
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return y


class Conv(nn.Module):
    """A square convolution of NHWC states with symmetric padding (or `padding` pairs), plus a low-rank update like `Linear`'s."""

    features: int
    size: int = 3
    stride: int = 1
    padding: int | tuple[tuple[int, int], tuple[int, int]] | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """X [b, h, w, c] -> [b, h', w', features]. Padding None keeps the size at stride 1."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (self.size, self.size, x.shape[-1], self.features))
        around = self.size // 2 if self.padding is None else self.padding
        pads = ((around, around), (around, around)) if isinstance(around, int) else around
        x = x.astype(self.dtype)

        def convolve(x: Array, kernel: Array, stride: int, pads: Any) -> Array:
            return jax.lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))

        y = convolve(x, kernel.astype(self.dtype), self.stride, pads)
        if self.has_variable(LORA, "down"):
            down, up = (self.get_variable(LORA, name).astype(self.dtype) for name in ("down", "up"))
            y = y + convolve(convolve(x, down, self.stride, pads), up, 1, ((0, 0), (0, 0)))
        return y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)


class GroupNorm(nn.Module):
    """Group normalisation in float32, whatever comes in."""

    groups: int
    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """X [b, h, w, c] -> its shape and dtype."""
        b, c = x.shape[0], x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        # Channels first sum over positions, then over the few of a group: both reductions run over contiguous memory.
        flat = x.astype(jnp.float32).reshape(b, -1, c)
        mean = flat.mean(axis=1).reshape(b, self.groups, -1).mean(axis=-1)
        centre = jnp.repeat(mean, c // self.groups, axis=-1)[:, None]
        variance = jnp.square(flat - centre).mean(axis=1).reshape(b, self.groups, -1).mean(axis=-1)
        factor = jnp.repeat(jax.lax.rsqrt(variance + self.eps), c // self.groups, axis=-1)[:, None] * scale
        return ((flat - centre) * factor + bias).reshape(x.shape).astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation in float32, whatever comes in."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """X [..., c] -> its shape and dtype."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        y = x.astype(jnp.float32)
        centred = y - y.mean(axis=-1, keepdims=True)
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        return (centred * (jax.lax.rsqrt(variance + self.eps) * scale) + bias).astype(x.dtype)


# ------------------------------------------------------------------------------------------- attention

AttentionFn = Callable[[Array, Array, Array], Array]
"""(q [b, l, h, d], k [b, m, h, d], v [b, m, h, d]) -> [b, l, h, d]: softmax(q kᵀ/√d) v."""


def plain_attention(q: Array, k: Array, v: Array) -> Array:
    """XLA's own: all scores at once."""
    return jax.nn.dot_product_attention(q, k, v)


def looped_attention(q: Array, k: Array, v: Array, *, scores: int = 2**22) -> Array:
    """One head and a chunk of queries after the other, at most `scores` numbers at a time; they are computed again for the gradient.

    On CPU ten times faster than XLA's own for 4,096 positions, and its memory does not grow with their square.
    """
    b, length, h, d = q.shape
    size = next(n for n in range(max(1, min(scores // k.shape[1], length)), 0, -1) if length % n == 0)
    if size < min(length, 128):  # a length without a fitting divisor
        size = length

    @jax.checkpoint
    def rows(part: Array, k: Array, v: Array) -> Array:
        scores = ((part * d**-0.5) @ k.T).astype(jnp.float32)
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        return ((weights.astype(v.dtype) @ v) / weights.sum(axis=-1, keepdims=True)).astype(q.dtype)

    def head(qkv: tuple[Array, Array, Array]) -> Array:
        q, k, v = qkv
        return jax.lax.map(lambda part: rows(part, k, v), q.reshape(length // size, size, d)).reshape(length, d)

    folded = tuple(jnp.moveaxis(a, 2, 1).reshape(b * h, a.shape[1], d) for a in (q, k, v))
    return jnp.moveaxis(jax.lax.map(head, folded).reshape(b, h, length, d), 1, 2)


def auto_attention(q: Array, k: Array, v: Array) -> Array:
    """`looped_attention` for many positions where the program runs on a CPU, XLA's own elsewhere."""
    if q.shape[1] * k.shape[1] < 2**16:
        return plain_attention(q, k, v)
    return jax.lax.platform_dependent(q, k, v, cpu=looped_attention, default=plain_attention)


def flash_attention(q: Array, k: Array, v: Array) -> Array:
    """The TPU flash kernel, where its tiling fits (lengths multiples of 128, and heads wider than 128 too); XLA's own elsewhere.

    On several devices it must run within a mesh (`jax.sharding.use_abstract_mesh`).
    """
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention as kernel

    if q.shape[1] % 128 or k.shape[1] % 128 or (q.shape[3] > 128 and q.shape[3] % 128):
        return plain_attention(q, k, v)
    attend: Any = functools.partial(kernel, sm_scale=q.shape[-1] ** -0.5)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        # XLA cannot divide a kernel of its own: rows by the batch's axes, heads by "tensor".
        rows = tuple(name for name in mesh.axis_names if name != "tensor")
        spec = jax.sharding.PartitionSpec(rows, "tensor" if "tensor" in mesh.axis_names else None)
        attend = jax.shard_map(attend, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    heads_first = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
    return jnp.swapaxes(attend(*heads_first), 1, 2)


def chunked_attention(q: Array, k: Array, v: Array, *, queries: int = 512) -> Array:
    """All heads, `queries` positions at a time; the scores are computed again for the gradient.

    For a TPU where the flash kernel does not fit: memory grows with the length, not with its square.
    """
    b, length, h, d = q.shape
    if length <= queries or length % queries:
        return plain_attention(q, k, v)
    parts = jnp.moveaxis(q.reshape(b, length // queries, queries, h, d), 1, 0)
    rows = jax.checkpoint(lambda part: jax.nn.dot_product_attention(part, k, v))
    return jnp.moveaxis(jax.lax.map(rows, parts), 0, 1).reshape(b, length, h, d)


ATTENTION: dict[str, AttentionFn] = {
    "auto": auto_attention,
    "plain": plain_attention,
    "looped": looped_attention,
    "chunked": chunked_attention,
    "flash": flash_attention,
}


class Attention(nn.Module):
    """Multi-head attention of x to itself or to a context, with diffusers' names: to_q, to_k, to_v, to_out.0.

    Attributes:
      heads: number of heads, which divide the channels.
      qkv_bias: whether the three projections have a bias.
      kernel: a key of ATTENTION.
      dtype: of the computation.
    """

    heads: int
    qkv_bias: bool = False
    kernel: str = "auto"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, context: Array | None = None) -> Array:
        """X [b, l, c] and context [b, m, d] (x itself by default) -> [b, l, c]."""
        b, length, c = x.shape
        source = x if context is None else context
        linear = functools.partial(Linear, c, self.qkv_bias, self.dtype)
        q = linear(name="to_q")(x).reshape(b, length, self.heads, -1)
        k, v = (linear(name=name)(source).reshape(b, source.shape[1], self.heads, -1) for name in ("to_k", "to_v"))
        out = ATTENTION[self.kernel](q, k, v).reshape(b, length, c)
        return Linear(c, True, self.dtype, name="to_out.0")(out)


# ---------------------------------------------------------------------------------------- convolutional


class ResnetBlock(nn.Module):
    """GroupNorm, silu, convolution, twice, with the time embedding added between, around a skip (diffusers' ResnetBlock2D)."""

    channels: int
    groups: int
    eps: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, time: Array | None = None) -> Array:
        """X [b, h, w, c] and time [b, e] -> [b, h, w, channels]."""
        h = nn.silu(GroupNorm(self.groups, self.eps, name="norm1")(x))
        h = Conv(self.channels, dtype=self.dtype, name="conv1")(h)
        if time is not None:
            h = h + Linear(self.channels, dtype=self.dtype, name="time_emb_proj")(nn.silu(time))[:, None, None, :]
        h = nn.silu(GroupNorm(self.groups, self.eps, name="norm2")(h))
        h = Conv(self.channels, dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.channels:
            x = Conv(self.channels, 1, dtype=self.dtype, name="conv_shortcut")(x)
        return x.astype(self.dtype) + h


def nearest(x: Array, size: tuple[int, int]) -> Array:
    """Nearest-neighbour resize of [b, h, w, c] to `size`, with torch's rounding: source index ⌊i h/h'⌋."""
    b, h, w, c = x.shape
    if size == (2 * h, 2 * w):
        return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, (h, w), strict=True))
    return x[:, rows][:, :, columns]


def sinusoidal(t: Array, dim: int, *, flip: bool, shift: float) -> Array:
    """Sines and cosines of t [n] at dim/2 frequencies 10000^(-i/(dim/2 - shift)): float32 [n, dim]; cosines first with `flip`."""
    half = dim // 2
    frequencies = np.exp(-np.log(10_000.0) * np.arange(half) / (half - shift)).astype(np.float32)
    angle = t.astype(jnp.float32)[:, None] * frequencies
    parts: Sequence[Array] = (jnp.cos(angle), jnp.sin(angle)) if flip else (jnp.sin(angle), jnp.cos(angle))
    return jnp.concatenate(parts, axis=-1)


class Embedding(nn.Module):
    """linear_1, silu, linear_2: diffusers' TimestepEmbedding."""

    width: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """X [b, d] -> [b, width]."""
        h = nn.silu(Linear(self.width, dtype=self.dtype, name="linear_1")(x))
        return Linear(self.width, dtype=self.dtype, name="linear_2")(h)
