"""Progressive (step) distillation: a student takes in one step what its teacher takes in two, again
and again.

Salimans & Ho 2022 (arXiv 2202.00512), with the guidance distilled in by the first stage's teacher
(Meng et al. 2023).
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
from jaxdistill.sampling import Constrain, ddim, divided_steps, rollout, start, unconstrained


def step_distillation(
    student: Model,
    teacher: Model,
    *,
    steps: int,
    null_cond: Callable[[Any], Any],
    guidance_scale: float = 1.0,
    substeps: int = 2,
    constrain: Constrain = unconstrained,
    unroll: bool = False,
) -> LossFn:
    """E max(1, SNR_t) ‖x̃ - x̂0^Θ(x_t)‖², x̃ the x0 whose one DDIM step meets the teacher's
    `substeps` (Salimans & Ho, alg. 2).

    x̃ = (x_s - (σ_s/σ_t) x_t) / (α_s - (σ_s/σ_t) α_t), with x_t = q(x_0, ε, t) at t of the trailing
    grid of `steps` times, s the next one and x_s the teacher's result.

    What differs from the papers: Meng et al. tell the student the guidance scale, here one scale is
    distilled in. Salimans & Ho begin with thousands of steps; here the first student has
    `Settings.first` of them, from a teacher that takes `substeps` for each.

    Args:
      student: the network that learns.
      teacher: the original network, or the student of the stage before.
      steps: of this stage's student, at least 1.
      null_cond: cond -> null conditioning (used where guidance_scale != 1).
      guidance_scale: of the teacher; above 1 only in the first stage, later teachers have it in
        them.
      substeps: teacher steps for one of the student.
      constrain: sharding constraint of random batches.
      unroll: as of `rollout`.

    Returns:
      loss(params, teacher_params, batch, key), params {"student": ...}, batch {"x0" [b, ...] in
      [-1, 1], "cond"}.

    Raises:
      ValueError: steps or substeps below 1 or more than a discrete schedule has times.
    """
    if steps < 1 or substeps < 1:
        raise ValueError(
            f"step distillation needs at least one step and one substep, got {steps} and {substeps}"
        )
    schedule = student.schedule
    table = jnp.asarray(divided_steps(schedule, steps, substeps))
    teacher_step = ddim(teacher.schedule)

    def loss(
        params: Any, teacher_params: Any, batch: Any, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        x0, cond = batch["x0"], batch["cond"]
        key_t, key_eps = jax.random.split(key)
        eps = constrain(jax.random.normal(key_eps, x0.shape, x0.dtype))
        times = table[:, constrain(jax.random.randint(key_t, x0.shape[:1], 0, steps))]
        t, s = times[0], times[-1]
        x_t = diffuse(schedule, x0, eps, t)
        denoiser = teacher.guided(teacher_params, cond, null_cond, guidance_scale)
        x_s = rollout(teacher_step, denoiser, start(x_t), times[:-1], t_end=s, unroll=unroll)[0].x
        alpha_t, sigma_t = expand(schedule.alpha(t), x0), expand(schedule.sigma(t), x0)
        alpha_s, sigma_s = expand(schedule.alpha(s), x0), expand(schedule.sigma(s), x0)
        ratio = sigma_s / sigma_t
        target = jax.lax.stop_gradient((x_s - ratio * x_t) / (alpha_s - ratio * alpha_t))
        network = student.denoiser(params["student"], cond)
        weight = jnp.maximum(1.0, (alpha_t / sigma_t) ** 2)
        errors = jnp.mean(
            weight * (target - network(x_t, t).x0) ** 2, axis=tuple(range(1, x0.ndim))
        )
        value = jnp.mean(errors)
        return value, {"distillation": value}

    return loss


@dataclass(frozen=True)
class Settings:
    """first: steps of the first stage's student, a power of two."""

    learning_rate: float = 5e-4
    guidance: float = 1.0
    first: int = 16


def recipe(kit: Kit, settings: Settings) -> Recipe:
    """A stage for each halving from `first` steps to 1; a step count that is no power of two is
    served by the next larger student. Raises ValueError.
    """
    if settings.first < 1:
        raise ValueError(f"first must be at least 1, got {settings.first}")
    if max(kit.steps) > settings.first:
        raise ValueError(
            f"first = {settings.first} must be at least the most steps that are served,"
            f" {max(kit.steps)}"
        )
    counts = [settings.first]
    while counts[-1] > 1:
        counts.append(counts[-1] // 2)
    optimizers, stages = kit.optimizers(settings.learning_rate), []
    for i, count in enumerate(counts):
        loss = step_distillation(
            kit.network,
            kit.network,
            steps=count,
            null_cond=kit.null_cond,
            guidance_scale=1.0 if i else settings.guidance,
            constrain=kit.constrain,
            unroll=kit.unroll,
        )
        stages.append(
            Stage(
                f"{count}",
                loss,
                optimizers,
                share=1 / len(counts),
                serves=[n for n in kit.steps if count // 2 < n <= count],
                teacher="previous" if i else "teacher",
                data="images",
            )
        )
    return Recipe(stages, SamplerSpec())
