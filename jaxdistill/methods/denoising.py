"""Denoising regression: how a teacher is trained."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdistill.prediction import ApplyFn, LossFn, diffuse, expand
from jaxdistill.sampling import Constrain, unconstrained
from jaxdistill.schedule import NoiseSchedule, training_time


def denoising(
    apply: ApplyFn,
    *,
    schedule: NoiseSchedule,
    target: Callable[[Array, Array, Array, Array], Array],
    null_cond: Callable[[Any], Any],
    drop_cond: float = 0.1,
    time_skew: float = 1.0,
    constrain: Constrain = unconstrained,
) -> LossFn:
    """E ‖target(x_0, ε, t) - network(α_t x_0 + σ_t ε, t)‖², t of `training_time`, uniform by
    default (Ho et al. 2020, eq. 14).

    Args:
      apply: the network.
      schedule: its forward process.
      target: (x0, eps, α, σ) -> the output to regress on, e.g. `v_target`.
      null_cond: cond -> the null conditioning of the same structure.
      drop_cond: share of examples whose conditioning becomes null, for classifier-free guidance, in
        [0, 1].
      time_skew: t = T (1 - (1 - u)^time_skew) for u uniform in [0, 1]: above 1 more of the batch is
        near T, where an image's layout is decided.
      constrain: sharding constraint put on every random batch.

    Returns:
      loss(params, teacher_params, batch, key) with batch {"x0": [b, ...] in [-1, 1], "cond":
      batch-leading pytree}; teacher_params is unused.

    Raises:
      ValueError: time_skew is not above 0.
    """
    if not time_skew > 0:
        raise ValueError(f"time_skew must be above 0 (1 = uniform), got {time_skew:g}")

    def loss(
        params: Any, teacher_params: Any, batch: Any, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        x0 = batch["x0"]
        key_t, key_eps, key_drop = jax.random.split(key, 3)
        # One stratum an example: uniform over t with less variance than independent draws (Kingma
        # et al. 2021, app. I.1).
        u = (jnp.arange(x0.shape[0]) + jax.random.uniform(key_t, (x0.shape[0],))) / x0.shape[0]
        u = 1.0 - (1.0 - u) ** time_skew if time_skew != 1.0 else u
        t = constrain(training_time(schedule, u))
        eps = constrain(jax.random.normal(key_eps, x0.shape, x0.dtype))
        drop = constrain(jax.random.bernoulli(key_drop, drop_cond, (x0.shape[0],)))
        cond = jax.tree.map(
            lambda c, n: jnp.where(expand(drop, c), n, c), batch["cond"], null_cond(batch["cond"])
        )
        output = apply(params, diffuse(schedule, x0, eps, t), schedule.network_time(t), cond)
        wanted = target(x0, eps, expand(schedule.alpha(t), x0), expand(schedule.sigma(t), x0))
        value = jnp.mean((output - wanted) ** 2)
        return value, {"mse": value}

    return loss
