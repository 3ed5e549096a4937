"""InceptionV3 as the Fréchet Inception distance uses it: the graph of TensorFlow's
inception-2015-12-05.

It differs from torchvision's network of that name: averages leave the padding out of their count,
the last block pools by maximum, and there are 1,008 classes. Modules are named as in pytorch-fid
and torch-fidelity, so that a parameter's path is its name in their state dict.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from jaxdistill.models.layers import Linear

SIDE = 299
"""Height and width of the input."""
WIDTH = 2048
"""Number of pooled features."""
CLASSES = 1008


class Features(NamedTuple):
    """pooled: means over positions of the last block [b, 2048]; logits: of its classifier [b,
    1008].
    """

    pooled: Array
    logits: Array


class FrozenBatchNorm(nn.Module):
    """y = (x - μ) γ / √(σ² + ε) + β with stored moments: batch normalisation in inference."""

    eps: float = 1e-3

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """X [b, h, w, c] -> its shape."""
        width = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, width)
        bias = self.param("bias", nn.initializers.zeros, width)
        mean = self.param("running_mean", nn.initializers.zeros, width)
        variance = self.param("running_var", nn.initializers.ones, width)
        return (x - mean) * (scale * jax.lax.rsqrt(variance + self.eps)) + bias


class ConvUnit(nn.Module):
    """Convolution without bias, batch normalisation, ReLU. `padded` keeps the size at stride 1."""

    features: int
    size: tuple[int, int]
    stride: int
    padded: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """X [b, h, w, c] -> [b, h', w', features]."""
        padding = [(s // 2, s // 2) if self.padded else (0, 0) for s in self.size]
        x = nn.Conv(self.features, self.size, self.stride, padding, use_bias=False, name="conv")(x)
        return nn.relu(FrozenBatchNorm(name="bn")(x))


class Block(nn.Module):
    """One "Mixed" block: parallel branches, joined along channels.

    Attributes:
      kind: A (35 x 35 positions), B (35 to 17), C (17 x 17), D (17 to 8) or E (8 x 8).
      width: features of A's pooled branch, or of C's inner 7 x 7 convolutions; the others have none
        to choose.
      max_pool: E's pooled branch takes the maximum, not the mean.
    """

    kind: str
    width: int = 0
    max_pool: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """X [b, h, w, c] -> [b, h', w', c']."""
        return jnp.concatenate(getattr(self, f"_{self.kind}")(x), axis=-1)

    def _unit(
        self,
        x: Array,
        name: str,
        features: int,
        height: int = 1,
        width: int = 0,
        *,
        stride: int = 1,
    ) -> Array:
        # Only convolutions with a stride leave the border out.
        return ConvUnit(features, (height, width or height), stride, stride == 1, name=name)(x)

    def _around(self, x: Array, features: int) -> Array:
        pool = nn.max_pool if self.max_pool else partial(nn.avg_pool, count_include_pad=False)
        return self._unit(pool(x, (3, 3), (1, 1), ((1, 1), (1, 1))), "branch_pool", features)

    def _A(self, x: Array) -> list[Array]:
        five = self._unit(self._unit(x, "branch5x5_1", 48), "branch5x5_2", 64, 5)
        double = self._unit(self._unit(x, "branch3x3dbl_1", 64), "branch3x3dbl_2", 96, 3)
        double = self._unit(double, "branch3x3dbl_3", 96, 3)
        return [self._unit(x, "branch1x1", 64), five, double, self._around(x, self.width)]

    def _B(self, x: Array) -> list[Array]:
        double = self._unit(self._unit(x, "branch3x3dbl_1", 64), "branch3x3dbl_2", 96, 3)
        double = self._unit(double, "branch3x3dbl_3", 96, 3, stride=2)
        return [
            self._unit(x, "branch3x3", 384, 3, stride=2),
            double,
            nn.max_pool(x, (3, 3), (2, 2)),
        ]

    def _C(self, x: Array) -> list[Array]:
        c = self.width
        seven = self._unit(self._unit(x, "branch7x7_1", c), "branch7x7_2", c, 1, 7)
        seven = self._unit(seven, "branch7x7_3", 192, 7, 1)
        double = self._unit(self._unit(x, "branch7x7dbl_1", c), "branch7x7dbl_2", c, 7, 1)
        double = self._unit(
            self._unit(double, "branch7x7dbl_3", c, 1, 7), "branch7x7dbl_4", c, 7, 1
        )
        double = self._unit(double, "branch7x7dbl_5", 192, 1, 7)
        return [self._unit(x, "branch1x1", 192), seven, double, self._around(x, 192)]

    def _D(self, x: Array) -> list[Array]:
        three = self._unit(self._unit(x, "branch3x3_1", 192), "branch3x3_2", 320, 3, stride=2)
        seven = self._unit(self._unit(x, "branch7x7x3_1", 192), "branch7x7x3_2", 192, 1, 7)
        seven = self._unit(
            self._unit(seven, "branch7x7x3_3", 192, 7, 1), "branch7x7x3_4", 192, 3, stride=2
        )
        return [three, seven, nn.max_pool(x, (3, 3), (2, 2))]

    def _E(self, x: Array) -> list[Array]:
        three = self._unit(x, "branch3x3_1", 384)
        double = self._unit(self._unit(x, "branch3x3dbl_1", 448), "branch3x3dbl_2", 384, 3)
        return [
            self._unit(x, "branch1x1", 320),
            self._unit(three, "branch3x3_2a", 384, 1, 3),
            self._unit(three, "branch3x3_2b", 384, 3, 1),
            self._unit(double, "branch3x3dbl_3a", 384, 1, 3),
            self._unit(double, "branch3x3dbl_3b", 384, 3, 1),
            self._around(x, 192),
        ]


class InceptionV3(nn.Module):
    """The network of FID (Szegedy et al. 2016, as TensorFlow shipped it in December 2015), in
    float32 and for inference only.
    """

    @nn.compact
    def __call__(self, x: Array) -> Features:
        """Images [b, 299, 299, 3] in [-1, 1] -> Features."""
        x = ConvUnit(32, (3, 3), 2, False, name="Conv2d_1a_3x3")(x)
        x = ConvUnit(32, (3, 3), 1, False, name="Conv2d_2a_3x3")(x)
        x = ConvUnit(64, (3, 3), 1, True, name="Conv2d_2b_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = ConvUnit(80, (1, 1), 1, False, name="Conv2d_3b_1x1")(x)
        x = ConvUnit(192, (3, 3), 1, False, name="Conv2d_4a_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        for name, width in (("5b", 32), ("5c", 64), ("5d", 64)):
            x = Block("A", width, name=f"Mixed_{name}")(x)
        x = Block("B", name="Mixed_6a")(x)
        for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            x = Block("C", width, name=f"Mixed_{name}")(x)
        x = Block("D", name="Mixed_7a")(x)
        x = Block("E", name="Mixed_7b")(x)
        # Probably a slip of that graph (its own first E block averages), but all published numbers
        # have it.
        x = Block("E", max_pool=True, name="Mixed_7c")(x)
        pooled = x.mean(axis=(1, 2))
        return Features(pooled, Linear(CLASSES, name="fc")(pooled))
