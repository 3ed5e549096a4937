"""What stands in a scene: axis, and colour and garment of both places.

Its hidden layer is the feature space of the metrics.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array


class Recogniser(nn.Module):
    """Strided 3x3 convolutions, one hidden layer of `features`, one linear head for each of the
    scene's labels.

    Attributes:
      classes: of each head.
      channels: of the convolutions; each halves the resolution.
      features: width of the hidden layer.
    """

    classes: Sequence[int]
    channels: Sequence[int] = (32, 64, 128)
    features: int = 64

    @nn.compact
    def __call__(self, x: Array) -> tuple[tuple[Array, ...], Array]:
        """Images x [b, h, w, c] in [0, 1] -> (logits [b, classes[i]] of each head, features [b,
        features]).
        """
        h = 2.0 * x - 1.0
        for channels in self.channels:
            h = nn.silu(nn.GroupNorm(8)(nn.Conv(channels, (3, 3))(h)))
            h = nn.silu(nn.Conv(channels, (3, 3), strides=(2, 2))(h))
        # Flattened, not pooled: the places are what the relation is about.
        features = nn.Dense(self.features)(h.reshape(h.shape[0], -1))
        hidden = nn.silu(features)
        return tuple(nn.Dense(n)(hidden) for n in self.classes), jnp.asarray(features)
