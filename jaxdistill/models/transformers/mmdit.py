"""SD3Transformer2DModel of Stable Diffusion 3 and 3.5: image and text in two streams that attend to
each other (Esser et al. 2024).
"""

import functools
import itertools
from dataclasses import field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array

from jaxdistill.models.attention import ATTENTION
from jaxdistill.models.blocks import run_blocks
from jaxdistill.models.layers import Conv, Dtype, Embedding, Linear, sinusoidal
from jaxdistill.models.stable_diffusion.unet_condition import like
from jaxdistill.models.transformers.layers import RMSNorm, grid_of, plain_norm, sine_positions, taps

TIME_WIDTH = 256
"""Sines and cosines of the time."""


def modulated(x: Array, shift: Array, scale: Array) -> Array:
    """norm(x) (1 + scale) + shift of x [b, l, d] by vectors [b, d], in float32: x's dtype."""
    normed = plain_norm(x.astype(jnp.float32))
    return (normed * (1 + scale[:, None]) + shift[:, None]).astype(x.dtype)


class JointBlock(nn.Module):
    """Attention over image and text together, then an MLP for each, all modulated by the time.

    Attributes:
      heads: they divide the width.
      qk_norm: queries and keys of a head are normed.
      dual: the image also attends to itself alone.
      last: the text is read and not written: it has no MLP.
      attention, dtype: as of the network.
    """

    heads: int
    qk_norm: bool
    dual: bool
    last: bool
    attention: str
    dtype: Dtype

    @nn.compact
    def __call__(self, states: tuple[Array, Array], time: Array) -> tuple[Array, Array]:
        """Image [b, l, d] and text [b, m, d], and silu of the time embedding [b, d] -> their
        shapes.
        """
        x, text = states
        shift, scale, gate, *mlp = self._modulation(time, 9 if self.dual else 6, "norm1")
        if self.last:
            text_scale, text_shift = self._modulation(time, 2, "norm1_context")
        else:
            text_shift, text_scale, text_gate, *text_mlp = self._modulation(
                time, 6, "norm1_context"
            )
        seen, seen_text = modulated(x, shift, scale), modulated(text, text_shift, text_scale)
        out, text_out = self._joint(seen, seen_text)
        y = x + gate[:, None] * out
        if self.dual:
            shift, scale, gate = mlp[3:]
            y = y + gate[:, None] * self._own(modulated(x, shift, scale))
        y = y + self._mlp(y, mlp[:3], "ff")
        if not self.last:
            text = text + text_gate[:, None] * text_out
            text = text + self._mlp(text, text_mlp, "ff_context")
        return y, text

    def _linear(self, features: int, name: str) -> Linear:
        return Linear(features, dtype=self.dtype, name=name)

    def _modulation(self, time: Array, parts: int, name: str) -> list[Array]:
        made = self._linear(parts * time.shape[-1], f"{name}.linear")(time)
        return jnp.split(made, parts, axis=-1)

    def _qkv(self, x: Array, names: tuple[str, ...], norms: tuple[str, ...]) -> list[Array]:
        """Queries, keys and values [b, l, h, d / h]."""
        b, length, width = x.shape
        made = [self._linear(width, n)(x).reshape(b, length, self.heads, -1) for n in names]
        if self.qk_norm:
            made[:2] = [RMSNorm(name=n)(a) for n, a in zip(norms, made[:2], strict=True)]
        return made

    def _image_qkv(self, x: Array, name: str) -> list[Array]:
        names = tuple(f"{name}.to_{part}" for part in "qkv")
        return self._qkv(x, names, (f"{name}.norm_q", f"{name}.norm_k"))

    def _joint(self, x: Array, text: Array) -> tuple[Array, Array]:
        """What image and text take from both; the second has no meaning in the last block."""
        length, width = x.shape[1:]
        image = self._image_qkv(x, "attn")
        names = tuple(f"attn.add_{part}_proj" for part in "qkv")
        words = self._qkv(text, names, ("attn.norm_added_q", "attn.norm_added_k"))
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(image, words, strict=True))
        # The last block has queries of the text in its file, and no use for them.
        out = ATTENTION[self.attention](image[0] if self.last else q, k, v)
        out = out.reshape(*out.shape[:2], width)
        x = self._linear(width, "attn.to_out.0")(out[:, :length])
        return x, text if self.last else self._linear(width, "attn.to_add_out")(out[:, length:])

    def _own(self, x: Array) -> Array:
        """What the image takes from itself alone."""
        out = ATTENTION[self.attention](*self._image_qkv(x, "attn2")).reshape(x.shape)
        return self._linear(x.shape[-1], "attn2.to_out.0")(out)

    def _mlp(self, x: Array, by: list[Array], name: str) -> Array:
        shift, scale, gate = by
        width = x.shape[-1]
        h = self._linear(4 * width, f"{name}.net.0.proj")(modulated(x, shift, scale))
        h = jax.nn.gelu(h, approximate=True)
        return gate[:, None] * self._linear(width, f"{name}.net.2")(h)


class MMDiT(nn.Module):
    """The network; attributes are those of its config. See `transformers.layers` for the call: t is
    1000 σ, cond {"context" [r b, m, d], "pooled" [r b, p]}, the output u = ε - x0.

    Attributes:
      dual: blocks in which the image attends to itself too (SD 3.5 medium).
      positions: side of the table of positions, in patches; images are its centre.
      sample_size: latents' side that a fresh table is scaled for; a checkpoint's is as it is.
      context, pooled: widths of the text's states and of its vector.
      attention: a key of ATTENTION.
      remat: a key of REMAT_POLICIES.
      scan: blocks of one kind as a loop over stacked parameters.
    """

    in_channels: int = 16
    out_channels: int = 16
    patch: int = 2
    layers: int = 24
    heads: int = 24
    head_dim: int = 64
    positions: int = 192
    sample_size: int = field(default=128, compare=False)
    dual: tuple[int, ...] = ()
    qk_norm: bool = False
    context: int = 4096
    pooled: int = 2048
    attention: str = "auto"
    remat: str = "none"
    scan: bool = False
    dtype: Dtype = jnp.float32

    @property
    def takes_guidance(self) -> bool:
        """No guidance is distilled into it."""
        return False

    def example(self) -> tuple[Any, ...]:
        """The smallest inputs."""
        cond = {"context": jnp.zeros((1, 1, self.context)), "pooled": jnp.zeros((1, self.pooled))}
        return jnp.zeros((1, self.patch, self.patch, self.in_channels)), jnp.zeros((1,)), cond

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Any, *, features: bool = False) -> Any:
        """See the class. Raises ValueError for latents that are larger than the table, or no whole
        number of patches.
        """
        dtype, width, text = x.dtype, self.heads * self.head_dim, cond["context"]
        y = self._patches(x)
        h, w = y.shape[1:3]
        y = like(y.reshape(y.shape[0], h * w, width), text)
        time = Embedding(width, self.dtype, name="time_text_embed.timestep_embedder")(
            sinusoidal(t, TIME_WIDTH, flip=True, shift=0.0)
        )
        pooled = Embedding(width, self.dtype, name="time_text_embed.text_embedder")(cond["pooled"])
        time = nn.silu(like(time, text) + pooled)
        text = Linear(width, dtype=self.dtype, name="context_embedder")(text)
        y, states = self._blocks(y, text, time, features)
        if features:
            return [grid_of(seen, h, w) for seen in states]
        scale, shift = jnp.split(
            Linear(2 * width, dtype=self.dtype, name="norm_out.linear")(time), 2, axis=-1
        )
        p = self.patch
        out = Linear(p * p * self.out_channels, dtype=self.dtype, name="proj_out")(
            modulated(y, shift, scale)
        )
        out = out.reshape(-1, h, w, p, p, self.out_channels).swapaxes(2, 3)
        return out.reshape(-1, h * p, w * p, self.out_channels).astype(dtype)

    def _patches(self, x: Array) -> Array:
        """[b, h, w, c] -> [b, h / p, w / p, d] with positions added."""
        p, side, width = self.patch, self.positions, self.heads * self.head_dim
        h, w = x.shape[1] // p, x.shape[2] // p
        if (h * p, w * p) != x.shape[1:3] or max(h, w) > side:
            raise ValueError(
                f"latents of {x.shape[1]} x {x.shape[2]}: each side must be a multiple of {p} up to"
                f" {side * p}"
            )

        def table(key: Array, shape: tuple[int, ...]) -> Array:
            places = np.arange(side) * (self.sample_size // p) / side
            return jnp.asarray(sine_positions(places, places, width)).reshape(shape)

        stored = self.param("pos_embed.pos_embed", table, (1, side * side, width))
        # A buffer of the checkpoint: read and written, never trained.
        places = jax.lax.stop_gradient(stored).reshape(side, side, width)
        top, left = (side - h) // 2, (side - w) // 2
        y = Conv(width, p, p, 0, self.dtype, name="pos_embed.proj")(x)
        return y + places[top : top + h, left : left + w].astype(self.dtype)

    def _blocks(self, x: Array, text: Array, time: Array, features: bool) -> tuple[Array, Any]:
        """The image's last states, and those at `taps` with `features`."""
        states: list[Array] = []
        kinds = [(i in self.dual, i == self.layers - 1) for i in range(self.layers)]
        start, carry = 0, (x, text)
        for (dual, last), group in itertools.groupby(kinds):
            span = range(start, start + len(list(group)))
            carry, seen = run_blocks(
                functools.partial(
                    JointBlock, self.heads, self.qk_norm, dual, last, self.attention, self.dtype
                ),
                "transformer_blocks",
                span,
                carry,
                (time,),
                scan=self.scan,
                remat=self.remat,
                seen=(lambda carry: carry[0]) if features else None,
                at=taps(self.layers),
            )
            states += seen
            start = span.stop
        return carry[0], states
