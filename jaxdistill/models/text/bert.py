"""A BERT encoder: captions to token embeddings.

Its weights come from a folder (`interop.sentence_encoder`).
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array


class BertLayer(nn.Module):
    """Post-norm attention and MLP (Devlin et al. 2019)."""

    heads: int
    intermediate: int
    eps: float

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """States x [b, l, d] and mask bool [b, l] -> x's shape."""
        b, length, d = x.shape
        split = (b, length, self.heads, d // self.heads)
        q, k, v = (nn.Dense(d, name=name)(x).reshape(split) for name in ("query", "key", "value"))
        attended = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :]).reshape(
            b, length, d
        )
        x = nn.LayerNorm(self.eps, name="attention_norm")(
            x + nn.Dense(d, name="attention_out")(attended)
        )
        h = nn.gelu(nn.Dense(self.intermediate, name="intermediate")(x), approximate=False)
        return nn.LayerNorm(self.eps, name="output_norm")(x + nn.Dense(d, name="output")(h))


class BertEncoder(nn.Module):
    """BERT without its pooler.

    Attributes:
      vocab_size, hidden_size, layers, heads, intermediate, max_positions: as in the checkpoint's
        config.
      eps: of the layer norms.
    """

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    intermediate: int
    max_positions: int = 512
    eps: float = 1e-12

    @nn.compact
    def __call__(self, ids: Array, mask: Array) -> Array:
        """Token ids int [b, l] and mask bool [b, l] (False on padding) -> embeddings [b, l,
        hidden_size].
        """
        x = nn.Embed(self.vocab_size, self.hidden_size, name="word")(ids)
        x = x + nn.Embed(self.max_positions, self.hidden_size, name="position")(
            jnp.arange(ids.shape[1])
        )
        x = x + nn.Embed(2, self.hidden_size, name="token_type")(jnp.zeros_like(ids))
        x = nn.LayerNorm(self.eps, name="embedding_norm")(x)
        for i in range(self.layers):
            x = BertLayer(self.heads, self.intermediate, self.eps, name=f"layer_{i}")(x, mask)
        return x
