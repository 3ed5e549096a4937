"""What a network's output says: conversions between eps, v, x0 and flow outputs and the pair (x̂0,
ε̂).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdistill.schedule import NoiseSchedule, Time

ApplyFn = Callable[..., Array]
"""(params, x, t, cond) -> raw network output of x's shape; t is a float batch [b] in the network's
own units.
"""


Batch = Float[Array, "b *d"]
"""Images, noise or latents: the batch leads, the rest is the model's."""

Level = Float[Array, "..."]
"""α or σ, a scalar or already broadcast against the batch."""


class Prediction(NamedTuple):
    """x̂0 and ε̂ of a batch, both of x's shape.

    On purpose not forced to satisfy x = α x̂0 + σ ε̂.
    """

    x0: Array
    eps: Array


LossFn = Callable[[Any, Any, Any, Array], tuple[Array, dict[str, Array]]]
"""What a method is: (params, teacher_params, batch, key) -> (scalar loss, scalar metrics)."""

Denoiser = Callable[[Array, Array], Prediction]
"""(x [b, ...], t scalar or [b]) -> Prediction; the conditioning is closed over."""

Parameterization = Callable[[Array, Array, Array, Array], Prediction]
"""(output, x, α, σ) -> Prediction, with α and σ already broadcast against x."""

Target = Callable[[Array, Array, Array, Array], Array]
"""(x0, eps, α, σ) -> the output that a parameterization turns into them."""


def expand(value: Array, like: Array) -> Array:
    """Broadcast a scalar or a batch [b] against `like` [b, ...]."""
    value = jnp.asarray(value)
    return value if value.ndim == 0 else value.reshape(value.shape + (1,) * (like.ndim - 1))


def eps_prediction(output: Batch, x: Batch, alpha: Level, sigma: Level) -> Prediction:
    """ε̂ = output, x̂0 = (x - σ ε̂)/α. Singular at α = 0: `as_denoiser` refuses that pair."""
    return Prediction(x0=(x - sigma * output) / alpha, eps=output)


def v_prediction(output: Batch, x: Batch, alpha: Level, sigma: Level) -> Prediction:
    """x̂0 = α x - σ v, ε̂ = σ x + α v (Salimans & Ho 2022, app. D), for α² + σ² = 1."""
    return Prediction(x0=alpha * x - sigma * output, eps=sigma * x + alpha * output)


def x0_prediction(output: Batch, x: Batch, alpha: Level, sigma: Level) -> Prediction:
    """x̂0 = output, ε̂ = (x - α x̂0)/σ. ε̂ is undefined at σ = 0, where no step starts."""
    return Prediction(x0=output, eps=(x - alpha * output) / sigma)


def flow_prediction(output: Batch, x: Batch, alpha: Level, sigma: Level) -> Prediction:
    """U = ε - x_0: x̂0 = x - σ u, ε̂ = x + α u, for α + σ = 1 (Liu et al. 2022)."""
    return Prediction(x0=x - sigma * output, eps=x + alpha * output)


def eps_target(x0: Batch, eps: Batch, alpha: Level, sigma: Level) -> Batch:
    """The output that `eps_prediction` turns into (x0, eps)."""
    return eps


def v_target(x0: Batch, eps: Batch, alpha: Level, sigma: Level) -> Batch:
    """V = α ε - σ x_0."""
    return alpha * eps - sigma * x0


def x0_target(x0: Batch, eps: Batch, alpha: Level, sigma: Level) -> Batch:
    """The output that `x0_prediction` turns into (x0, eps)."""
    return x0


def flow_target(x0: Batch, eps: Batch, alpha: Level, sigma: Level) -> Batch:
    """U = ε - x_0."""
    return eps - x0


def diffuse(schedule: NoiseSchedule, x0: Batch, eps: Batch, t: Time) -> Batch:
    """q(x_0, ε, t) = α_t x_0 + σ_t ε. x0, eps [b, ...]; t scalar or [b] in [0, T]."""
    return expand(schedule.alpha(t), x0) * x0 + expand(schedule.sigma(t), x0) * eps


def as_denoiser(
    apply: ApplyFn,
    params: Any,
    cond: Any,
    *,
    schedule: NoiseSchedule,
    parameterization: Parameterization,
    copies: int = 1,
) -> Denoiser:
    """Close a network over its parameters and conditioning: (x, t) -> (x̂0, ε̂).

    Args:
      apply: (params, x [b, ...], t [b], cond) -> output [b, ...].
      params: its parameters; pass them as an argument of the jitted caller, never as a constant.
      cond: conditioning of the batch, handed on as it is.
      schedule: the forward process that the network was trained on.
      parameterization: what the output means, e.g. `v_prediction`.
      copies: rows of conditioning for each row of x, one after the other, where the network itself
        takes so many: x [b, ...] gives predictions of copies · b rows.

    Raises:
      ValueError: the network's output has another shape than x (of so many copies).
    """

    def denoiser(x: Array, t: Array) -> Prediction:
        t = jnp.asarray(t, jnp.float32)
        output = apply(params, x, jnp.broadcast_to(schedule.network_time(t), x.shape[:1]), cond)
        if copies > 1:
            x, t = (jnp.repeat(a, copies, axis=0) if jnp.ndim(a) else a for a in (x, t))
        if output.shape != x.shape:
            raise ValueError(
                f"the model returned shape {output.shape} for an input of shape {x.shape}; "
                "an ApplyFn must keep the shape (does yours also predict a variance?)"
            )
        return parameterization(
            output, x, expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
        )

    return denoiser


def check_pair(schedule: NoiseSchedule, parameterization: Parameterization) -> None:
    """Refuse a network output that the schedule cannot turn into x̂0.

    eps: x̂0 = (x - σ ε̂)/α divides by α_T = 0 at zero terminal SNR. v gives x0 back only where α² +
    σ² = 1, flow only where α + σ = 1.

    Raises:
      ValueError: `eps_prediction` with α(T) = 0, `v_prediction` where α² + σ² ≠ 1,
        `flow_prediction` where α + σ ≠ 1.
    """
    alpha, sigma = float(schedule.alpha(0.5 * schedule.T)), float(schedule.sigma(0.5 * schedule.T))
    if parameterization is v_prediction and abs(alpha**2 + sigma**2 - 1) > 1e-3:
        raise ValueError(
            "prediction 'v' needs a schedule with alpha^2 + sigma^2 = 1, such as 'cosine'; with"
            " this one use 'flow' or 'x0'"
        )
    if parameterization is flow_prediction and abs(alpha + sigma - 1) > 1e-3:
        raise ValueError(
            "prediction 'flow' needs the schedule with alpha + sigma = 1, 'flow'; with this one use"
            " 'v' or 'x0'"
        )
    if parameterization is eps_prediction and float(schedule.alpha(schedule.T)) < 1e-6:
        raise ValueError(
            "prediction 'eps' cannot start from zero terminal SNR (alpha_T = 0): x0 = (x - sigma"
            " eps)/alpha is undefined there; use prediction 'v' or 'x0', or a schedule with"
            " alpha_T > 0"
        )
