"""Noise schedules of the forward process x_t = α_t x_0 + σ_t ε.

Time runs from 0 (clean data: α = 1, σ = 0) to `T` (the start of sampling). For a discrete
schedule of n betas, T = n and time t = i + 1 is the training step i of the network, so that
`network_time(t) = t - 1` is what a checkpoint of diffusers expects as `timestep`. Every function
takes a scalar or a batch of times and may be jitted.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Time = Float[Array, ""] | Float[Array, " b"] | float
TimeFunction = Callable[..., Array]


def _identity(t: Time) -> Array:
    return jnp.asarray(t, jnp.float32)


class NoiseSchedule(NamedTuple):
    """α(t) and σ(t) for t in [0, T], and the time that the network is told.

    `alpha`, `sigma` and `network_time` map a scalar or a batch of times to an array of its shape.
    `discrete`: networks are trained at the integer times 1..T only, and asked at no time below 1.
    """

    alpha: TimeFunction
    sigma: TimeFunction
    T: float
    network_time: TimeFunction = _identity
    discrete: bool = False


def training_time(
    schedule: NoiseSchedule, u: Array | float, low: Time = 0.0, high: Time | None = None
) -> Array:
    """A time in (low, high] at which networks are trained, for u uniform in [0, 1): uniform, too.

    low + u (high - low), but above 0; of a discrete schedule an integer of (low, high], each as
    likely. Where there is none, and at u = 1, it is the last one up to `high`, and at least 1. Ends
    are times, by default 0 and T, and may be arrays.
    """
    high = schedule.T if high is None else high
    if not schedule.discrete:
        return jnp.maximum(low + (high - low) * u, np.finfo(np.float32).eps * schedule.T)
    before, last = jnp.floor(low), jnp.floor(high)
    return jnp.maximum(jnp.minimum(before + 1.0 + jnp.floor(u * (last - before)), last), 1.0)


def log_snr(schedule: NoiseSchedule, t: Time) -> Array:
    """λ_t = log(α_t / σ_t), half the log signal-to-noise ratio: ∞ at t = 0, -∞ where α_t = 0."""
    return jnp.log(schedule.alpha(t)) - jnp.log(schedule.sigma(t))


def same_log_snr(source: NoiseSchedule, target: NoiseSchedule) -> TimeFunction:
    """A time of `source` -> the time of `target` with the same log(α/σ), in [0, T]; jittable.

    0 stays 0, and what has less signal than `target` ever has is at its T. By bisection, exact to
    float32 also where the log-SNR is infinite. α/σ must fall as t grows, in both.
    """

    def carried(t: Time) -> Array:
        alpha, sigma = source.alpha(t), source.sigma(t)

        def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = ends
            middle = 0.5 * (low + high)
            clearer = target.sigma(middle) * alpha < target.alpha(middle) * sigma
            return jnp.where(clearer, middle, low), jnp.where(clearer, high, middle)

        ends = jnp.zeros_like(sigma), jnp.full_like(sigma, target.T)
        low, high = jax.lax.fori_loop(0, 32, halve, ends)
        # α_T is 0 in both, or less than what is asked for.
        last = target.sigma(target.T) * alpha <= target.alpha(target.T) * sigma
        return jnp.where(sigma == 0.0, 0.0, jnp.where(last, target.T, 0.5 * (low + high)))

    return carried


def cosine() -> NoiseSchedule:
    """α_t = cos(π t / 2), σ_t = sin(π t / 2) for t in [0, 1] (Nichol & Dhariwal 2021 without its
    offset).

    Terminal SNR is exactly zero: α is computed as sin(π (1 - t) / 2), which float32 rounds to 0 at
    t = 1.
    """
    return NoiseSchedule(
        alpha=lambda t: jnp.sin(jnp.pi / 2 * (1.0 - _identity(t))),
        sigma=lambda t: jnp.sin(jnp.pi / 2 * _identity(t)),
        T=1.0,
    )


def flow(shift: float = 1.0) -> NoiseSchedule:
    """α_t = 1 - σ_t, σ_t = t for t in [0, 1] (rectified flow; Liu et al. 2022).

    Not variance preserving. With a shift, σ_t = shift · t / (1 + (shift - 1) t): log(α/σ) is moved
    by -log(shift) (Esser et al. 2024, section 5.3.2), and the network is told σ_t. It is the same
    process at other times: what is even in t follows the shift, as grids and the times of a
    training. Raises ValueError unless shift > 0.
    """
    if not 0 < shift < np.inf:
        raise ValueError(f"shift must be above 0 and finite, got {shift}")
    if shift == 1.0:
        return NoiseSchedule(alpha=lambda t: 1.0 - _identity(t), sigma=_identity, T=1.0)

    def alpha(t: Time) -> Array:
        return (1.0 - _identity(t)) / (1.0 + (shift - 1.0) * _identity(t))

    def sigma(t: Time) -> Array:
        return shift * _identity(t) / (1.0 + (shift - 1.0) * _identity(t))

    return NoiseSchedule(alpha, sigma, T=1.0, network_time=sigma)


def shifted(schedule: NoiseSchedule, snr_scale: float) -> NoiseSchedule:
    """The variance-preserving schedule whose α/σ is `snr_scale` times that of `schedule`.

    Shifts the log-SNR by a constant, as a change of resolution does (Hoogeboom et al. 2023), and
    keeps α = 0 where it was 0. Raises ValueError unless snr_scale > 0.
    """
    if not snr_scale > 0:
        raise ValueError(f"snr_scale must be above 0, got {snr_scale}")

    def alpha(t: Time) -> Array:
        a, s = snr_scale * schedule.alpha(t), schedule.sigma(t)
        return a / jnp.sqrt(a**2 + s**2)

    def sigma(t: Time) -> Array:
        a, s = snr_scale * schedule.alpha(t), schedule.sigma(t)
        return s / jnp.sqrt(a**2 + s**2)

    return schedule._replace(alpha=alpha, sigma=sigma)


def linear_betas(n: int = 1000, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """β_i linear from `start` to `end`: float64 [n] (DDPM, Ho et al. 2020)."""
    return np.linspace(start, end, n, dtype=np.float64)


def scaled_linear_betas(n: int = 1000, start: float = 0.00085, end: float = 0.012) -> np.ndarray:
    """√β_i linear from √start to √end: float64 [n] (latent diffusion; the defaults are Stable
    Diffusion's).
    """
    return np.linspace(start**0.5, end**0.5, n, dtype=np.float64) ** 2


def cosine_betas(n: int = 1000, max_beta: float = 0.999) -> np.ndarray:
    """β_i = 1 - ᾱ((i+1)/n) / ᾱ(i/n) with ᾱ(u) = cos²(π/2 · (u + 0.008)/1.008), capped: float64 [n].

    Nichol & Dhariwal 2021, eq. 17; "squaredcos_cap_v2" in diffusers.
    """
    bar = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - bar[1:] / bar[:-1], max_beta)


def rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Betas [n] whose ᾱ ends at exactly 0: √ᾱ is shifted and scaled so that its first value stays.

    Lin et al. 2023 ("Common diffusion noise schedules and sample steps are flawed"), algorithm 1.
    """
    root = np.sqrt(np.cumprod(1.0 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    bar = root**2
    return 1.0 - np.concatenate([bar[:1], bar[1:] / bar[:-1]])


def linear_ratio(schedule: NoiseSchedule, *, log: bool = False) -> NoiseSchedule:
    """The discrete schedule with σ/α, not α², linear between its integer times: how k-diffusion's
    samplers read it.

    With `log` the logarithm of σ/α is linear from time 1 on, as where a time is looked up by its
    σ/α. The same at integers. Variance preserving; α_T must be above 0.
    """

    def ratio(t: Time) -> Array:
        t = jnp.clip(_identity(t), 0.0, schedule.T)
        low = jnp.floor(t)
        high = jnp.minimum(low + 1.0, schedule.T)
        ratios = [schedule.sigma(at) / schedule.alpha(at) for at in (low, high)]
        found = ratios[0] + (t - low) * (ratios[1] - ratios[0])
        return (
            jnp.where(low < 1.0, found, ratios[0] * (ratios[1] / ratios[0]) ** (t - low))
            if log
            else found
        )

    return schedule._replace(
        alpha=lambda t: jax.lax.rsqrt(1.0 + ratio(t) ** 2),
        sigma=lambda t: ratio(t) * jax.lax.rsqrt(1.0 + ratio(t) ** 2),
    )


def ddpm(betas: np.ndarray) -> NoiseSchedule:
    """The schedule of n discrete betas, α_t = √ᾱ_{t-1} at integer t in 1..n, and α_0 = 1.

    Between integers α² is interpolated linearly, so the schedule can be read at continuous times
    and is exact at the integers. T = n; the network is told t - 1, its own training step.

    Args:
      betas: float [n], each in (0, 1]; a last beta of 1 gives zero terminal SNR.

    Raises:
      ValueError: betas are not one-dimensional or leave (0, 1].
    """
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or betas.size < 2 or not ((betas > 0) & (betas <= 1)).all():
        raise ValueError(
            f"betas must be a vector of at least 2 values in (0, 1], got shape {betas.shape}"
        )
    # ᾱ is accumulated in float64 on the host: in float32 its tail drifts by 1e-5 and σ near 0 is
    # lost.
    alpha_bar = np.concatenate([[1.0], np.cumprod(1.0 - betas)])
    n = betas.size
    alpha_sq, sigma_sq = alpha_bar.astype(np.float32), (1.0 - alpha_bar).astype(np.float32)

    def read(table: np.ndarray, t: Time) -> Array:
        # Not jnp.interp, which reads T as the end of the last interval and loses a small last value
        # to rounding.
        t, values = jnp.clip(_identity(t), 0.0, n), jnp.asarray(table)
        i = jnp.floor(t).astype(jnp.int32)
        return jnp.sqrt(values[i] + (t - i) * (values[jnp.minimum(i + 1, n)] - values[i]))

    return NoiseSchedule(
        alpha=lambda t: read(alpha_sq, t),
        sigma=lambda t: read(sigma_sq, t),
        T=float(n),
        network_time=lambda t: _identity(t) - 1.0,
        discrete=True,
    )
