"""CLIP's image encoder."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from jaxdistill.models.layers import Dtype, LayerNorm, Linear
from jaxdistill.models.text.clip import CLIPLayer


class CLIPVision(nn.Module):
    """CLIPVisionModelWithProjection (Radford et al. 2021). Attributes are those of its config.

    Attributes:
      projection: width of the space that images and texts share.
    """

    hidden_size: int
    intermediate: int
    layers: int
    heads: int
    image_size: int
    patch_size: int
    projection: int
    activation: str = "quick_gelu"
    eps: float = 1e-5
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalised images [b, image_size, image_size, 3] -> embeddings [b, projection], not of
        unit length.
        """
        patch, where = (self.patch_size,) * 2, "vision_model.embeddings"
        x = nn.Conv(
            self.hidden_size,
            patch,
            patch,
            "VALID",
            use_bias=False,
            dtype=self.dtype,
            name=f"{where}.patch_embedding",
        )(x)
        x = x.reshape(x.shape[0], -1, self.hidden_size)
        start = self.param(
            f"{where}.class_embedding", nn.initializers.normal(0.02), (self.hidden_size,)
        )
        x = jnp.concatenate(
            [jnp.broadcast_to(start.astype(x.dtype), (x.shape[0], 1, self.hidden_size)), x], axis=1
        )
        count = (self.image_size // self.patch_size) ** 2 + 1
        x = x + nn.Embed(count, self.hidden_size, name=f"{where}.position_embedding")(
            jnp.arange(count)
        ).astype(self.dtype)
        x = LayerNorm(self.eps, name="vision_model.pre_layrnorm")(x)  # their spelling
        for i in range(self.layers):
            name = f"vision_model.encoder.layers.{i}"
            x = CLIPLayer(
                self.heads,
                self.intermediate,
                self.activation,
                self.eps,
                False,
                self.dtype,
                name=name,
            )(x)
        x = LayerNorm(self.eps, name="vision_model.post_layernorm")(x[:, 0])
        return Linear(self.projection, False, self.dtype, name="visual_projection")(x)
