"""CLIP's text encoder, as Stable Diffusion and SDXL use it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from jaxdistill.models.layers import Dtype, LayerNorm, Linear

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


class CLIPAttention(nn.Module):
    """Multi-head self-attention with biases; causal for text."""

    heads: int
    causal: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """X [b, l, d] -> its shape. `mask` bool [b, l] is False where nobody looks."""
        b, length, d = x.shape
        split = (b, length, self.heads, d // self.heads)
        q, k, v = (
            Linear(d, dtype=self.dtype, name=f"{name}_proj")(x).reshape(split) for name in "qkv"
        )
        seen = None if mask is None else mask[:, None, None, :]
        out = jax.nn.dot_product_attention(q, k, v, mask=seen, is_causal=self.causal)
        out = out.reshape(x.shape)
        return Linear(d, dtype=self.dtype, name="out_proj")(out)


class CLIPLayer(nn.Module):
    """Pre-norm attention and MLP (Radford et al. 2021)."""

    heads: int
    intermediate: int
    activation: str
    eps: float
    causal: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """X [b, l, d] -> its shape. `mask` bool [b, l] is False where nobody looks."""
        x = x + CLIPAttention(self.heads, self.causal, self.dtype, name="self_attn")(
            LayerNorm(self.eps, name="layer_norm1")(x), mask
        )
        h = Linear(self.intermediate, dtype=self.dtype, name="mlp.fc1")(
            LayerNorm(self.eps, name="layer_norm2")(x)
        )
        return x + Linear(x.shape[-1], dtype=self.dtype, name="mlp.fc2")(
            ACTIVATIONS[self.activation](h)
        )


class TextStates(NamedTuple):
    """What the encoder gives.

    last: states after the final norm [b, l, d]; penultimate: before the last layer, not normed [b,
    l, d]; both as if `skip` layers at the end were not there. pooled: with all layers the last
    state at the end token, projected where the encoder has a projection [b, p].
    """

    last: Array
    penultimate: Array
    pooled: Array


class CLIPText(nn.Module):
    """CLIPTextModel and, with `projection`, CLIPTextModelWithProjection.

    Attributes are those of its config.

    Attributes:
      projection: width of the pooled projection, 0 for none.
      end_token: id of the end of a text; 2 means a config of before transformers 4.31, where the
        largest id of a row is the end.
    """

    vocab_size: int
    hidden_size: int
    intermediate: int
    layers: int
    heads: int
    positions: int = 77
    activation: str = "quick_gelu"
    eps: float = 1e-5
    projection: int = 0
    end_token: int = 2
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: Array, mask: Array | None = None, *, skip: int = 0) -> TextStates:
        """Token ids int [b, l] -> TextStates. `mask` bool [b, l] is False where nobody looks;
        0 <= skip < layers.
        """
        tokens = nn.Embed(
            self.vocab_size, self.hidden_size, name="text_model.embeddings.token_embedding"
        )(ids)
        places = nn.Embed(
            self.positions, self.hidden_size, name="text_model.embeddings.position_embedding"
        )(jnp.arange(ids.shape[1]))
        x = (tokens + places).astype(self.dtype)
        states = [x]
        for i in range(self.layers):
            layer = CLIPLayer(
                self.heads,
                self.intermediate,
                self.activation,
                self.eps,
                True,
                self.dtype,
                name=f"text_model.encoder.layers.{i}",
            )
            x = layer(x, mask)
            states.append(x)
        norm = LayerNorm(self.eps, name="text_model.final_layer_norm")
        last = norm(x)
        end = jnp.argmax(ids if self.end_token == 2 else ids == self.end_token, axis=-1)
        pooled = jnp.take_along_axis(last, end[:, None, None], axis=1)[:, 0]
        if self.projection:
            pooled = Linear(self.projection, False, self.dtype, name="text_projection")(pooled)
        shown = norm(states[-1 - skip]) if skip else last
        return TextStates(shown, states[-2 - skip], pooled)
