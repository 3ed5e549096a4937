"""Z-Image's single-stream transformer (Z-Image Team, 2025): ZImageTransformer2DModel of diffusers.

The image's tokens and the caption's are padded to multiples of 32 by learned tokens that all see.
Only what pads a caption further, to the length of its batch, is seen by nobody.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array

from jaxdistill.models.attention import ATTENTION
from jaxdistill.models.blocks import run_blocks
from jaxdistill.models.layers import Dtype, Linear, sinusoidal
from jaxdistill.models.stable_diffusion.unet_condition import like
from jaxdistill.models.transformers.layers import (
    RMSNorm,
    grid_of,
    plain_norm,
    rotary_angles,
    rotate,
    taps,
)

MULTIPLE = 32
"""Lengths of both streams are multiples of it."""
TIME_WIDTH = 256
"""Of the time embedding, in networks that are not narrower."""


class ZImageAttention(nn.Module):
    """Self-attention with rotary positions, without biases; RMS norms of queries and keys if
    `qk_norm`.
    """

    heads: int
    qk_norm: bool
    kernel: str
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array | None, angles: Array) -> Array:
        """X [b, l, d], mask bool [b, l] or None, angles [b, l, d / heads / 2] -> x's shape."""
        b, length, d = x.shape
        linear = functools.partial(Linear, d, False, self.dtype)
        q, k, v = (
            linear(name=f"to_{name}")(x).reshape(b, length, self.heads, -1) for name in "qkv"
        )
        if self.qk_norm:
            q, k = RMSNorm(1e-5, name="norm_q")(q), RMSNorm(1e-5, name="norm_k")(k)
        out = ATTENTION[self.kernel](rotate(q, angles), rotate(k, angles), v, mask)
        return linear(name="to_out.0")(out.reshape(x.shape))


class ZImageBlock(nn.Module):
    """Attention and a gated MLP, each between two RMS norms and around a skip. A `modulated` block
    gets scales and tanh gates from the time.
    """

    heads: int
    eps: float
    qk_norm: bool
    modulated: bool
    attention: str
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x: Array, mask: Array | None, angles: Array, time: Array | None = None
    ) -> Array:
        """X [b, l, d], mask and angles as ZImageAttention's, time [b, e] -> x's shape."""
        d = x.shape[-1]
        scales: Sequence[Array | float] = (1.0, 1.0)
        gates: Sequence[Array | float] = (1.0, 1.0)
        if self.modulated:
            modulation = Linear(4 * d, dtype=self.dtype, name="adaLN_modulation.0")(time)
            parts = jnp.split(modulation[:, None], 4, axis=-1)
            scales = [1.0 + part for part in parts[::2]]
            gates = [jnp.tanh(part) for part in parts[1::2]]

        def norm(name: str, x: Array) -> Array:
            return RMSNorm(self.eps, name=name)(x)

        attend = ZImageAttention(
            self.heads, self.qk_norm, self.attention, self.dtype, name="attention"
        )
        h = attend(norm("attention_norm1", x) * scales[0], mask, angles)
        x = x + gates[0] * norm("attention_norm2", h)
        h = norm("ffn_norm1", x) * scales[1]
        linear = functools.partial(Linear, use_bias=False, dtype=self.dtype)
        width = int(d / 3 * 8)  # as diffusers rounds it
        gate = nn.silu(linear(width, name="feed_forward.w1")(h))
        h = linear(d, name="feed_forward.w2")(gate * linear(width, name="feed_forward.w3")(h))
        return x + gates[1] * norm("ffn_norm2", h)


def caption_lengths(mask: Array) -> Array:
    """Lengths int32 [b] of captions with the pads that are seen, from their mask [b, m]: the count
    of its ones, rounded up to a multiple of 32.
    """
    count = jnp.sum(mask > 0.5, axis=-1, dtype=jnp.int32)
    return -(-count // MULTIPLE) * MULTIPLE


def caption_places(length: int) -> Array:
    """Rotary coordinates int32 [1, length, 3] of captions: (1 + i, 0, 0) for token i."""
    first = jnp.arange(1, length + 1, dtype=jnp.int32)
    return jnp.pad(first[None, :, None], ((0, 0), (0, 0), (0, 2)))


def image_places(captions: Array, height: int, width: int) -> Array:
    """Rotary coordinates int32 [b, l, 3] of images beside captions of so many tokens [b]: (captions
    + 1, row, column), and (0, 0, 0) for the pads; l is the next multiple of 32.
    """
    row, column = np.divmod(np.arange(height * width, dtype=np.int32), width)
    first = captions[:, None] + 1
    places = jnp.stack(jnp.broadcast_arrays(first, row[None], column[None]), axis=-1)
    return _with_pads(places, jnp.zeros((1, 3), places.dtype))


def _with_pads(tokens: Array, pad: Array) -> Array:
    """[b, l, d] and as many of pad [1, d] after them as make l a multiple of 32."""
    b, length, d = tokens.shape
    pads = jnp.broadcast_to(pad, (b, -length % MULTIPLE, d))
    return jnp.concatenate([tokens, pads], axis=1)


class ZImageTransformer(nn.Module):
    """Z-Image's network, NHWC. The attributes are those of its config.

    Attributes:
      in_channels: of the latents, and of the output.
      patch: pixels of latents along a token's side; one of the config's `all_patch_size`.
      width: of the tokens, `dim`.
      depth: blocks over both streams, `n_layers`.
      refiners: blocks over each stream alone before them, `n_refiner_layers`.
      heads: `n_heads`, which divide the width.
      eps: of the norms but those of queries and keys, `norm_eps`.
      qk_norm: whether queries and keys have norms.
      context_width: of a caption's tokens, `cap_feat_dim`.
      axes: rotary dimensions of (caption, row, column), `axes_dims`; their sum is a head's width.
      base: of the rotary frequencies, `rope_theta`.
      time_scale: what the time is multiplied by, `t_scale`.
      attention: a key of `attention.ATTENTION`, which must honour a mask.
      remat: a key of REMAT_POLICIES.
      scan: run blocks of one kind as a loop over stacked parameters.
      dtype: of the computation; parameters and norms stay float32.
    """

    in_channels: int = 16
    patch: int = 2
    width: int = 3840
    depth: int = 30
    refiners: int = 2
    heads: int = 30
    eps: float = 1e-5
    qk_norm: bool = True
    context_width: int = 2560
    axes: Sequence[int] = (32, 48, 48)
    base: float = 256.0
    time_scale: float = 1000.0
    attention: str = "auto"
    remat: str = "none"
    scan: bool = False
    dtype: Dtype = jnp.float32

    takes_guidance = False

    def example(self) -> tuple[Array, Array, dict[str, Array]]:
        """The smallest x, t and cond."""
        cond = {"context": jnp.zeros((1, 1, self.context_width)), "mask": jnp.ones((1, 1))}
        return jnp.zeros((1, self.patch, self.patch, self.in_channels)), jnp.zeros(1), cond

    @nn.compact
    def __call__(
        self, x: Array, t: Array, cond: dict[str, Array], features: bool = False
    ) -> Array | list[Array]:
        """One call of the network.

        Args:
          x: latents [b, h, w, in_channels] whose sides divide by `patch`.
          t: 1 - sigma of the flow, float [b] in [0, 1]; 0 is noise.
          cond: captions {"context" [r b, m, context_width], "mask" [r b, m]} of which the mask is
            1 at the first tokens, as many as the caption has, and 0 at the others.
          features: return hidden states of the image [r b, h / patch, w / patch, width] after
            `taps(depth)` instead.

        Returns:
          The flow's velocity u = eps - x0 [r b, h, w, in_channels] in x's dtype. (The checkpoint's
          output is -u.)
        """
        height, width = (side // self.patch for side in x.shape[1:3])
        lengths = caption_lengths(cond["mask"])
        angles = functools.partial(rotary_angles, dims=self.axes, base=self.base)
        image_angles = angles(image_places(lengths, height, width))
        tokens = -(-cond["mask"].shape[1] // MULTIPLE) * MULTIPLE
        caption_angles = angles(caption_places(tokens))
        mask = jnp.arange(tokens) < lengths[:, None]

        time = self._time(t)
        image = self._image(x, time, image_angles)
        caption = self._caption(cond, mask, caption_angles)
        image, time = like(image, caption), like(time, caption)
        count = height * width
        mask = jnp.pad(mask, ((0, 0), (image.shape[1], 0)), constant_values=True)
        shared = (
            mask,
            jnp.concatenate([image_angles, like(caption_angles, image_angles)], 1),
            time,
        )
        both, states = self._blocks(
            "layers",
            self.depth,
            jnp.concatenate([image, caption], axis=1),
            shared,
            seen=(lambda h: grid_of(h[:, :count], height, width)) if features else None,
        )
        if features:
            return states
        return self._velocity(both[:, :count], time, height, width).astype(x.dtype)

    def _blocks(
        self,
        name: str,
        depth: int,
        carry: Array,
        shared: Sequence[Any],
        *,
        modulated: bool = True,
        seen: Any = None,
    ) -> tuple[Array, list[Any]]:
        kind = functools.partial(
            ZImageBlock,
            self.heads,
            self.eps,
            self.qk_norm,
            modulated,
            self.attention,
            self.dtype,
        )
        return run_blocks(
            kind,
            name,
            range(depth),
            carry,
            shared,
            scan=self.scan,
            remat=self.remat,
            seen=seen,
            at=taps(depth),
        )

    def _time(self, t: Array) -> Array:
        """T [b] -> its embedding [b, e]."""
        h = sinusoidal(t * self.time_scale, 256, flip=True, shift=0.0)
        h = nn.silu(Linear(1024, dtype=self.dtype, name="t_embedder.mlp.0")(h))
        width = min(self.width, TIME_WIDTH)
        return Linear(width, dtype=self.dtype, name="t_embedder.mlp.2")(h)

    def _image(self, x: Array, time: Array, angles: Array) -> Array:
        """Latents -> refined tokens with their pads: [b, l, width], or [r b, l, width] where there
        are pads. Without any, all tokens are equally far from the caption, rotary attention sees
        differences alone, and so the r captions of one image have the same tokens.
        """
        b, h, w, c = x.shape
        p = self.patch
        patches = x.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
        patches = patches.reshape(b, -1, p * p * c)
        embed = Linear(self.width, dtype=self.dtype, name=f"all_x_embedder.{p}-1")
        tokens = _with_pads(embed(patches), self._pad_token("x_pad_token"))
        if tokens.shape[1] > patches.shape[1]:
            tokens, time = like(tokens, angles), like(time, angles)
        own = angles[:: angles.shape[0] // tokens.shape[0]]
        return self._blocks("noise_refiner", self.refiners, tokens, (None, own, time))[0]

    def _caption(self, cond: Mapping[str, Array], mask: Array, angles: Array) -> Array:
        """Captions -> refined tokens with their pads [r b, l, width]; `mask` and `angles` are of
        these.
        """
        h = RMSNorm(self.eps, name="cap_embedder.0")(cond["context"].astype(self.dtype))
        h = Linear(self.width, dtype=self.dtype, name="cap_embedder.1")(h)
        pad = self._pad_token("cap_pad_token")
        tokens = _with_pads(jnp.where(cond["mask"][..., None] > 0.5, h, pad), pad)
        shared = (mask, angles)
        return self._blocks("context_refiner", self.refiners, tokens, shared, modulated=False)[0]

    def _pad_token(self, name: str) -> Array:
        return self.param(name, nn.initializers.zeros, (1, self.width)).astype(self.dtype)

    def _velocity(self, tokens: Array, time: Array, height: int, width: int) -> Array:
        """The image's last states [b, height width, d] -> [b, height p, width p, c]."""
        name, p, c = f"all_final_layer.{self.patch}-1", self.patch, self.in_channels
        scale = Linear(self.width, dtype=self.dtype, name=f"{name}.adaLN_modulation.1")
        h = plain_norm(tokens) * (1.0 + scale(nn.silu(time)))[:, None]
        h = -Linear(p * p * c, dtype=self.dtype, name=f"{name}.linear")(h)
        h = h.reshape(-1, height, width, p, p, c).transpose(0, 1, 3, 2, 4, 5)
        return h.reshape(-1, height * p, width * p, c)
