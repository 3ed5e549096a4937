"""A small convolutional classifier, whose penultimate layer serves as feature extractor for the
metrics.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array


class ConvClassifier(nn.Module):
    """Stride-2 convolutions, a dense layer of `features` units, logits.

    Images [b, h, w, c] in [0, 1].

    Attributes:
      num_classes: number of logits.
      channels: of each stride-2 convolution.
      features: width of the penultimate layer.
    """

    num_classes: int = 10
    channels: Sequence[int] = (32, 64)
    features: int = 64

    @nn.compact
    def __call__(self, images: Array) -> tuple[Array, Array]:
        """Returns (logits [b, num_classes], features [b, features])."""
        h = images * 2.0 - 1.0
        for channels in self.channels:
            h = nn.relu(nn.Conv(channels, (3, 3))(h))
            h = nn.relu(nn.Conv(channels, (3, 3), strides=(2, 2))(h))
        h = h.reshape(h.shape[0], -1)
        features = jax.nn.relu(nn.Dense(self.features)(h))
        return nn.Dense(self.num_classes)(features), jnp.asarray(features)
