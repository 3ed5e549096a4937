"""Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378): one point of the teacher's
guided path predicts as the next.

The paper's latent space is that of its teacher; here as there the loss sees whatever the network
sees.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdistill.methods.recipe import Kit, Recipe, SamplerSpec, Stage
from jaxdistill.model import Model
from jaxdistill.prediction import LossFn, diffuse, expand
from jaxdistill.sampling import (
    Constrain,
    boundary_function,
    ddim,
    divided_steps,
    start,
    unconstrained,
)


def consistency_distillation(
    student: Model,
    teacher: Model,
    *,
    null_cond: Callable[[Any], Any],
    guidance_scale: float,
    intervals: int = 50,
    huber: float = 0.001,
    constrain: Constrain = unconstrained,
) -> LossFn:
    """E d(f_Θ(x_t, t), f_Θ⁻(x̂_s, s)), x̂_s a guided DDIM step of the teacher from x_t = q(x_0, ε,
    t) (Luo et al., alg. 1).

    t is one of `intervals` even times and s the one below it (the paper's skipping, T/intervals); d
    is the pseudo-Huber distance √(‖a - b‖² + c²) - c by element; Θ⁻ is the moving average of Θ.

    What differs from the paper: there the guidance scale is drawn for each example and told to the
    network, so that a user chooses it later; here the networks have no such input, and one scale is
    distilled in.

    f is `boundary_function`'s: of a flow network x̂0 itself.

    Θ⁻ is params["target"], which the training step moves (`Objective.averages`).

    Args:
      student: the network that learns.
      teacher: the frozen network.
      null_cond: cond -> null conditioning.
      guidance_scale: distilled into the student.
      intervals: T divided into so many.
      huber: c.
      constrain: sharding constraint of random batches.

    Returns:
      loss(params, teacher_params, batch, key), params {"student", "target"} of one structure, batch
      {"x0", "cond"}.

    Raises:
      ValueError: intervals below 2 or more than a discrete schedule has times, or huber below 0.
    """
    if intervals < 2 or huber < 0:
        raise ValueError(
            "consistency distillation needs intervals >= 2 and huber >= 0, got"
            f" {intervals} and {huber:g}"
        )
    schedule = student.schedule
    function = boundary_function(schedule, student.parameterization)
    table = jnp.asarray(divided_steps(schedule, intervals))

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
        return distance, {"consistency": distance}

    return loss


@dataclass(frozen=True)
class Settings:
    """As in the paper."""

    learning_rate: float = 5e-4
    guidance: float = 1.0
    intervals: int = 50
    huber: float = 0.001
    target_decay: float = 0.95


def recipe(kit: Kit, settings: Settings) -> Recipe:
    """One stage on images, its target a moving average of the student. Raises ValueError."""
    loss = consistency_distillation(
        kit.network,
        kit.network,
        null_cond=kit.null_cond,
        guidance_scale=settings.guidance,
        intervals=settings.intervals,
        huber=settings.huber,
        constrain=kit.constrain,
    )
    if not 0 <= settings.target_decay < 1:
        raise ValueError(f"target_decay must be in [0, 1), got {settings.target_decay:g}")
    stage = Stage(
        "",
        loss,
        kit.optimizers(settings.learning_rate),
        serves=kit.steps,
        data="images",
        averages={"target": ("student", settings.target_decay)},
    )
    return Recipe([stage], SamplerSpec("consistency"))
