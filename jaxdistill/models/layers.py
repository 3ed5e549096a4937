"""Layers of networks that read checkpoints: bf16 compute over f32 parameters, low-rank updates,
attention by a chosen kernel.

Modules are named as diffusers names its own ("down_blocks.0", "to_out.0"), so that a parameter's
path is its name in a checkpoint.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array

from jaxdistill.models.attention import ATTENTION

LORA = "lora"
"""The collection of low-rank updates: at a layer's path, {"down", "up"}, whose product is added to
its kernel.
"""

Dtype = Any
Pads = tuple[tuple[int, int], tuple[int, int]]
"""Zeros before and after the rows, and the columns."""


class Linear(nn.Module):
    """y = x W + b, plus (x down) up where the `lora` collection holds an update of this layer.

    Computes in `dtype`.
    """

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


def _xla_convolution(x: Array, kernel: Array, stride: int, pads: Pads) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolution(x: Array, kernel: Array, pads: Pads) -> Array:
    """Of stride 1, with a gradient that XLA's CPU backend runs fast."""
    return _xla_convolution(x, kernel, 1, pads)


def _convolution_forward(x: Array, kernel: Array, pads: Pads) -> tuple[Array, Any]:
    return _convolution(x, kernel, pads), (x, kernel)


def _convolution_backward(pads: Pads, kept: Any, cotangent: Array) -> tuple[Array, Array]:
    x, kernel = kept
    size = kernel.shape[:2]
    rows, columns = ((n - 1 - low, n - 1 - high) for n, (low, high) in zip(size, pads, strict=True))
    to_x = _xla_convolution(cotangent, kernel[::-1, ::-1].swapaxes(2, 3), 1, (rows, columns))
    by_xla = jax.linear_transpose(lambda kernel: _xla_convolution(x, kernel, 1, pads), kernel)

    def by_product(cotangent: Array) -> Array:
        """One matrix product over all positions: up to five times as fast as XLA's, whose CPU
        backend has no kernel for it.
        """
        _, h, w, features = cotangent.shape
        states = jnp.pad(x.transpose(3, 0, 1, 2), ((0, 0), (0, 0), *pads))
        shifted = [
            states[:, :, i : i + h, j : j + w] for i in range(size[0]) for j in range(size[1])
        ]
        product = jnp.stack(shifted).reshape(-1, cotangent[..., 0].size) @ cotangent.reshape(
            -1, features
        )
        return product.reshape(kernel.shape)

    return to_x, jax.lax.platform_dependent(
        cotangent, cpu=by_product, default=lambda g: by_xla(g)[0]
    )


_convolution.defvjp(_convolution_forward, _convolution_backward)


def convolution(
    x: Array, kernel: Array, *, stride: int = 1, pads: Pads = ((0, 0), (0, 0))
) -> Array:
    """States [b, h, w, c] with a kernel [n, m, c, f] -> [b, h', w', f].

    It has no forward-mode derivative at stride 1.
    """
    if kernel.shape[:2] == (1, 1) and stride == 1 and pads == ((0, 0), (0, 0)):
        return x @ kernel[0, 0]
    return (
        _convolution(x, kernel, pads) if stride == 1 else _xla_convolution(x, kernel, stride, pads)
    )


def doubled_convolution(x: Array, kernel: Array) -> Array:
    """A 3x3 convolution of the nearest-neighbour double of x, without making it: 4/9 of the
    multiplications.

    Of the nine taps on doubled positions two or more meet the same pixel. Output row 2i is k_0
    x_{i-1} + (k_1 + k_2) x_i and row 2i + 1 is (k_0 + k_1) x_i + k_2 x_{i+1}, columns likewise:
    four kernels of 2x2 on x itself.

    Args:
      x: [b, h, w, c].
      kernel: [3, 3, c, f], added up in float32, then used in x's dtype.

    Returns:
      [b, 2h, 2w, f], with zeros around as padding 1 gives.
    """
    b, h, w, c = x.shape

    def fold(k: Array, axis: int) -> Array:
        """Three taps along `axis` -> two, and in front the two phases."""
        first, middle, last = jnp.split(k, 3, axis=axis)
        return jnp.stack(
            [
                jnp.concatenate(pair, axis=axis)
                for pair in ((first, middle + last), (first + middle, last))
            ]
        )

    folded = fold(fold(kernel.astype(jnp.float32), 1), 1)  # [row phase, column phase, 2, 2, c, f]
    taps = folded.transpose(2, 3, 4, 0, 1, 5).reshape(2, 2, c, -1).astype(x.dtype)
    y = convolution(x, taps, pads=((1, 1), (1, 1))).reshape(b, h + 1, w + 1, 2, 2, -1)
    phases = [
        jnp.stack([y[:, r : r + h, s : s + w, r, s] for s in range(2)], axis=3) for r in range(2)
    ]
    return jnp.stack(phases, axis=2).reshape(b, 2 * h, 2 * w, -1)


class Conv(nn.Module):
    """A square convolution of NHWC states with symmetric padding (or `padding` pairs), plus a
    low-rank update like `Linear`'s.
    """

    features: int
    size: int = 3
    stride: int = 1
    padding: int | Pads | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, resized: tuple[int, int] | None = None) -> Array:
        """X [b, h, w, c] -> [b, h', w', features].

        Padding None keeps the size at stride 1; `resized` is (h', w') of a resize before.
        """
        kernel = self.param(
            "kernel",
            nn.initializers.lecun_normal(),
            (self.size, self.size, x.shape[-1], self.features),
        )
        around = self.size // 2 if self.padding is None else self.padding
        pads = ((around, around), (around, around)) if isinstance(around, int) else around
        x = x.astype(self.dtype)
        doubled = (
            resized == (2 * x.shape[1], 2 * x.shape[2])
            and self.size == 3
            and self.stride == 1
            and around == 1
        )
        if resized is not None and not doubled:
            x = nearest(x, resized)

        def convolve(x: Array, kernel: Array) -> Array:
            return (
                doubled_convolution(x, kernel)
                if doubled
                else convolution(x, kernel.astype(self.dtype), stride=self.stride, pads=pads)
            )

        y = convolve(x, kernel)
        if self.has_variable(LORA, "down"):
            down, up = (self.get_variable(LORA, name) for name in ("down", "up"))
            y = y + convolution(convolve(x, down), up.astype(self.dtype))
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
        # Channels first sum over positions, then over the few of a group: both reductions run over
        # contiguous memory.
        flat = x.astype(jnp.float32).reshape(b, -1, c)
        mean = flat.mean(axis=1).reshape(b, self.groups, -1).mean(axis=-1)
        centre = jnp.repeat(mean, c // self.groups, axis=-1)[:, None]
        variance = jnp.square(flat - centre).mean(axis=1).reshape(b, self.groups, -1).mean(axis=-1)
        factor = (
            jnp.repeat(jax.lax.rsqrt(variance + self.eps), c // self.groups, axis=-1)[:, None]
            * scale
        )
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


# ---------------------------------------------------------------------------------------- attention


class Attention(nn.Module):
    """Multi-head attention of x to itself or to a context, with diffusers' names: to_q, to_k, to_v,
    to_out.0.

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
    def __call__(self, x: Array, context: Array | None = None, mask: Array | None = None) -> Array:
        """X [b, l, c] and context [b, m, d] (x itself by default) -> [b, l, c].

        `mask` bool [b, m] is False where nobody looks.
        """
        b, length, c = x.shape
        source = x if context is None else context
        linear = functools.partial(Linear, c, self.qkv_bias, self.dtype)
        q = linear(name="to_q")(x).reshape(b, length, self.heads, -1)
        k, v = (
            linear(name=name)(source).reshape(b, source.shape[1], self.heads, -1)
            for name in ("to_k", "to_v")
        )
        attend = ATTENTION[self.kernel]
        out = (attend(q, k, v) if mask is None else attend(q, k, v, mask)).reshape(b, length, c)
        return Linear(c, True, self.dtype, name="to_out.0")(out)


# ------------------------------------------------------------------------------------ convolutional


class ResnetBlock(nn.Module):
    """GroupNorm, silu, convolution, twice, with the time embedding added between, around a skip
    (diffusers' ResnetBlock2D).
    """

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
            h = (
                h
                + Linear(self.channels, dtype=self.dtype, name="time_emb_proj")(nn.silu(time))[
                    :, None, None, :
                ]
            )
        h = nn.silu(GroupNorm(self.groups, self.eps, name="norm2")(h))
        h = Conv(self.channels, dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.channels:
            x = Conv(self.channels, 1, dtype=self.dtype, name="conv_shortcut")(x)
        return x.astype(self.dtype) + h


def nearest(x: Array, size: tuple[int, int]) -> Array:
    """Nearest-neighbour resize of [b, h, w, c] to `size`, with torch's rounding: source index ⌊i
    h/h'⌋.
    """
    b, h, w, c = x.shape
    if size == (2 * h, 2 * w):
        return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(
            b, 2 * h, 2 * w, c
        )
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, (h, w), strict=True))
    return x[:, rows][:, :, columns]


def sinusoidal(t: Array, dim: int, *, flip: bool, shift: float) -> Array:
    """Sines and cosines of t [n] at dim/2 frequencies 10000^(-i/(dim/2 - shift)): float32 [n, dim];
    cosines first with `flip`.
    """
    half = dim // 2
    # The exponent in float32, as torch has it: at t = 3500 (a guidance scale) its rounding counts.
    exponent = np.arange(half, dtype=np.float32) * np.float32(-np.log(10_000.0))
    exponent = (exponent / np.float32(half - shift)).astype(np.float64)
    frequencies = np.exp(exponent).astype(np.float32)
    angle = t.astype(jnp.float32)[:, None] * frequencies
    parts: Sequence[Array] = (
        (jnp.cos(angle), jnp.sin(angle)) if flip else (jnp.sin(angle), jnp.cos(angle))
    )
    return jnp.concatenate(parts, axis=-1)


class Embedding(nn.Module):
    """linear_1, silu, linear_2: diffusers' TimestepEmbedding, to whose input a condition is added
    (`cond_proj`).
    """

    width: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, condition: Array | None = None) -> Array:
        """X [b, d] and a condition [b, e] -> [b, width]."""
        if condition is not None:
            project = Linear(x.shape[-1], use_bias=False, dtype=self.dtype, name="cond_proj")
            x = x + project(condition)
        h = nn.silu(Linear(self.width, dtype=self.dtype, name="linear_1")(x))
        return Linear(self.width, dtype=self.dtype, name="linear_2")(h)
