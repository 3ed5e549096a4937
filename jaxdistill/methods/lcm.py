"""Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378): one point of the teacher's
guided path predicts as the next.

The paper's latent space is that of its teacher; here as there the loss sees whatever the network
sees.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdistill.methods.imagine_flash import Model
from jaxdistill.prediction import Denoiser, LossFn, Prediction, diffuse, expand
from jaxdistill.sampling import Constrain, ddim, divided_steps, start, unconstrained


def consistency_function(
    T: float, *, sigma_data: float = 0.5, scale: float = 10.0
) -> Callable[[Denoiser], Denoiser]:
    """f(x, t) = c_skip x + c_out x̂0, a transform: c_skip = σ²/(τ² + σ²), c_out = τ/√(τ² + σ²), τ =
    1000 scale t/T.

    f(x, 0) = x (Luo et al., app. C; Song et al. 2023, eq. 5 with σ = sigma_data).
    """

    def transform(denoiser: Denoiser) -> Denoiser:
        def function(x: Array, t: Array) -> Prediction:
            prediction = denoiser(x, t)
            tau = expand(jnp.asarray(t), x) / T * 1000.0 * scale
            x0 = (sigma_data**2 * x + tau * jnp.sqrt(tau**2 + sigma_data**2) * prediction.x0) / (
                tau**2 + sigma_data**2
            )
            return prediction._replace(x0=x0)

        return function

    return transform


def consistency_distillation(
    student: Model,
    teacher: Model,
    *,
    null_cond: Callable[[Any], Any],
    guidance_scale: float,
    intervals: int = 50,
    huber: float = 0.001,
    target_decay: float = 0.95,
    constrain: Constrain = unconstrained,
) -> LossFn:
    """E d(f_Θ(x_t, t), f_Θ⁻(x̂_s, s)), x̂_s a guided DDIM step of the teacher from x_t = q(x_0, ε,
    t) (Luo et al., alg. 1).

    t is one of `intervals` even times and s the one below it (the paper's skipping, T/intervals); d
    is the pseudo-Huber distance √(‖a - b‖² + c²) - c by element; Θ⁻ is the moving average of Θ.

    Θ⁻ is params["target"]: its term ½‖Θ⁻ - Θ‖² makes `optax.sgd(1 - target_decay)` exactly the
    moving average, so give that group this optimizer (`target_optimizer`).

    Args:
      student: the network that learns.
      teacher: the frozen network.
      null_cond: cond -> null conditioning.
      guidance_scale: distilled into the student.
      intervals: T divided into so many.
      huber: c.
      target_decay: checked only.
      constrain: sharding constraint of random batches.

    Returns:
      loss(params, teacher_params, batch, key), params {"student", "target"} of one structure, batch
      {"x0", "cond"}.

    Raises:
      ValueError: intervals below 2 or more than a discrete schedule has times, huber below 0 or
        target_decay outside [0, 1).
    """
    if intervals < 2 or huber < 0 or not 0 <= target_decay < 1:
        raise ValueError(
            "consistency distillation needs intervals >= 2, huber >= 0 and target_decay in [0, 1), "
            f"got {intervals}, {huber:g} and {target_decay:g}"
        )
    T, schedule = student.schedule.T, student.schedule
    function, table = consistency_function(T), jnp.asarray(divided_steps(schedule, intervals))

    def f(params: Any, cond: Any, x: Array, t: Array) -> Array:
        denoiser = student.denoiser(params, cond)
        return function(denoiser)(x, t).x0

    def loss(
        params: Any, teacher_params: Any, batch: Any, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        x0, cond = batch["x0"], batch["cond"]
        key_t, key_eps = jax.random.split(key)
        eps = constrain(jax.random.normal(key_eps, x0.shape, x0.dtype))
        t, s = table[:, constrain(jax.random.randint(key_t, x0.shape[:1], 0, intervals))]
        x_t = diffuse(schedule, x0, eps, t)
        denoiser = teacher.guided(teacher_params, cond, null_cond, guidance_scale)
        x_s = ddim(teacher.schedule)(denoiser(x_t, t), start(x_t), t, s).x
        # At s = 0 the function is the identity by its boundary condition, whatever the network
        # says: it is not asked there, where a discrete schedule has no time.
        target = f(params["target"], cond, x_s, jnp.maximum(s, table[0, -1]))
        target = jax.lax.stop_gradient(jnp.where(expand(s > 0, x_s), target, x_s))
        difference = f(params["student"], cond, x_t, t) - target
        distance = jnp.mean(jnp.sqrt(difference**2 + huber**2) - huber)
        followed = jax.lax.stop_gradient(params["student"])
        average = jax.tree.map(lambda a, b: 0.5 * jnp.sum((a - b) ** 2), params["target"], followed)
        # The average's term is added at its value 0: it has a gradient, and the loss stays
        # readable.
        pull = sum(jax.tree.leaves(average), start=jnp.zeros(()))
        return distance + pull - jax.lax.stop_gradient(pull), {"consistency": distance}

    return loss
