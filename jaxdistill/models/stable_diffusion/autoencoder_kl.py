"""AutoencoderKL of latent diffusion: images to latents and back."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from jaxdistill.models.layers import Attention, Conv, Dtype, GroupNorm, ResnetBlock

EPS = 1e-6


class MidBlock(nn.Module):
    """Residual block, attention of one head over the positions, residual block."""

    groups: int
    attend: bool
    attention: str
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """X [b, h, w, c] -> its shape."""
        b, h, w, c = x.shape
        x = ResnetBlock(c, self.groups, EPS, self.dtype, name="resnets.0")(x)
        if self.attend:
            y = GroupNorm(self.groups, EPS, name="attentions.0.group_norm")(x).reshape(b, h * w, c)
            x = x + Attention(1, True, self.attention, self.dtype, name="attentions.0")(y).reshape(
                x.shape
            )
        return ResnetBlock(c, self.groups, EPS, self.dtype, name="resnets.1")(x)


class Half(nn.Module):
    """What encoder and decoder share: their settings, their blocks and their last layers."""

    out_channels: int
    channels: Sequence[int]
    layers: int
    groups: int
    mid_attention: bool
    attention: str
    dtype: Dtype

    def block(self, channels: int, name: str, h: Array) -> Array:
        """A residual block."""
        return ResnetBlock(channels, self.groups, EPS, self.dtype, name=name)(h)

    def middle(self, h: Array) -> Array:
        """The middle block."""
        return MidBlock(
            self.groups, self.mid_attention, self.attention, self.dtype, name="mid_block"
        )(h)

    def last(self, h: Array) -> Array:
        """Norm, silu and the convolution to out_channels."""
        h = nn.silu(GroupNorm(self.groups, EPS, name="conv_norm_out")(h))
        return Conv(self.out_channels, dtype=self.dtype, name="conv_out")(h)


class Encoder(Half):
    """Images to the mean and log-variance of latents, out_channels of both together."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Images [b, h, w, c] in [-1, 1] -> [b, h / f, w / f, out_channels], f = 2^(levels - 1)."""
        h = Conv(self.channels[0], dtype=self.dtype, name="conv_in")(x)
        for level, channels in enumerate(self.channels):
            for i in range(self.layers):
                h = self.block(channels, f"down_blocks.{level}.resnets.{i}", h)
            if level < len(self.channels) - 1:
                # One row and column of zeros after the image only, as the original was trained.
                h = Conv(
                    channels,
                    3,
                    2,
                    ((0, 1), (0, 1)),
                    self.dtype,
                    name=f"down_blocks.{level}.downsamplers.0.conv",
                )(h)
        return self.last(self.middle(h))


class Decoder(Half):
    """Latents to images."""

    @nn.compact
    def __call__(self, z: Array) -> Array:
        """Latents [b, h, w, c] -> images [b, f h, f w, out_channels], f = 2^(levels - 1), not
        clipped.
        """
        h = self.middle(Conv(self.channels[-1], dtype=self.dtype, name="conv_in")(z))
        for number, channels in enumerate(reversed(self.channels)):
            for i in range(self.layers + 1):
                h = self.block(channels, f"up_blocks.{number}.resnets.{i}", h)
            if number < len(self.channels) - 1:
                doubled = (2 * h.shape[1], 2 * h.shape[2])
                h = Conv(channels, dtype=self.dtype, name=f"up_blocks.{number}.upsamplers.0.conv")(
                    h, doubled
                )
        return self.last(h)


class AutoencoderKL(nn.Module):
    """Diffusers' AutoencoderKL, NHWC.

    `encode` and `decode` speak the latents that the diffusion network sees.

    Attributes:
      in_channels, out_channels: of the images.
      latent_channels: of the latents.
      channels: of each level.
      layers: residual blocks a level.
      groups: of the group norms.
      scaling_factor: network latents = latents scaling_factor.
      mean, std: where both are given, of each channel: instead of latents (latents - mean) / std.
      use_quant_conv, use_post_quant_conv: whether there is a 1x1 convolution after the encoder and
        before the decoder.
      mid_attention: whether the middle attends.
      attention: a key of `attention.ATTENTION`.
      dtype: of the computation.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    channels: Sequence[int] = (128, 256, 512, 512)
    layers: int = 2
    groups: int = 32
    scaling_factor: float = 0.18215
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_attention: bool = True
    attention: str = "auto"
    dtype: Dtype = jnp.float32

    @property
    def factor(self) -> int:
        """Pixels a side of one latent."""
        return 2 ** (len(self.channels) - 1)

    def setup(self) -> None:
        """Name the parts as diffusers does."""
        common = (
            tuple(self.channels),
            self.layers,
            self.groups,
            self.mid_attention,
            self.attention,
            self.dtype,
        )
        self.encoder = Encoder(2 * self.latent_channels, *common)
        self.decoder = Decoder(self.out_channels, *common)
        if self.use_quant_conv:
            self.quant_conv = Conv(2 * self.latent_channels, 1, dtype=self.dtype)
        if self.use_post_quant_conv:
            self.post_quant_conv = Conv(self.latent_channels, 1, dtype=self.dtype)

    def __call__(self, x: Array) -> Array:
        """Images [b, h, w, c] in [-1, 1] -> reconstruction through the mean latents."""
        return self.decode(self.encode(x))

    def moments(self, x: Array) -> tuple[Array, Array]:
        """Images [b, h, w, c] in [-1, 1] -> mean and log-variance of the unscaled latents, the
        latter in [-30, 20].
        """
        h = self.encoder(x)
        if self.use_quant_conv:
            h = self.quant_conv(h)
        mean, log_variance = jnp.split(h.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def encode(self, x: Array, key: Array | None = None) -> Array:
        """Images [b, h, w, c] in [-1, 1] -> scaled latents; their mean, or a draw with `key`."""
        z, log_variance = self.moments(x)
        if key is not None:
            z = z + jnp.exp(0.5 * log_variance) * jax.random.normal(key, z.shape)
        if self.mean and self.std:
            z = (z - jnp.asarray(self.mean)) / jnp.asarray(self.std)
        return z * self.scaling_factor

    def decode(self, z: Array) -> Array:
        """Scaled latents [b, h, w, c] -> images [b, f h, f w, out_channels] around [-1, 1], not
        clipped.
        """
        z = z / self.scaling_factor
        if self.mean and self.std:
            z = z * jnp.asarray(self.std) + jnp.asarray(self.mean)
        if self.use_post_quant_conv:
            z = self.post_quant_conv(z)
        return self.decoder(z).astype(jnp.float32)
