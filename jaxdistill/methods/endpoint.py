"""One step from several (ours): the first state's prediction learns where a student of several
steps ends.

A pair of noise and image costs direct distillation the teacher's 50 or 100 calls, so it has few of
them. A student of a few steps that is as good as its teacher gives a pair for two or three calls:
each is used once. Progressive distillation (Salimans & Ho 2022, arXiv 2202.00512) goes from many
steps to one by halves in the same way.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdistill.methods.recipe import Kit, Recipe, Stage
from jaxdistill.methods.trajectories import shortcut_distance
from jaxdistill.model import Model
from jaxdistill.prediction import Denoiser, LossFn
from jaxdistill.sampling import (
    Constrain,
    TimeGrid,
    check_grid,
    ddim,
    noise_correction,
    rollout,
    start,
    unconstrained,
)


def endpoint(
    student: Model,
    *,
    grid: TimeGrid,
    correct_noise: bool = True,
    constrain: Constrain = unconstrained,
    unroll: bool = False,
) -> LossFn:
    """E ‖x̂0^Θ(x_T) - x_end‖², x_end the image that a frozen student draws from the same x_T on
    `grid`.

    Args:
      student: the network of the student that learns and of the frozen one, which is the same
        before this training.
      grid: the times of the several steps, the first T.
      correct_noise: as the sampler will.
      constrain: sharding constraint of random batches.
      unroll: as of `rollout`.

    Returns:
      loss(params, teacher_params, batch, key) with params {"student": ...}, teacher_params those of
      the frozen student, and batch {"x0" (its shape alone: no data is used), "cond"}.

    Raises:
      ValueError: a bad grid, or one of a single step.
    """
    T = student.schedule.T
    times = check_grid(grid, T)
    if len(times) < 2:
        raise ValueError(f"endpoint needs a grid of several steps, got {times.tolist()}")
    step = ddim(student.schedule)

    def loss(
        params: Any, teacher_params: Any, batch: Any, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        x_T = constrain(jax.random.normal(key, batch["x0"].shape, batch["x0"].dtype))

        def denoiser(params: Any) -> Denoiser:
            plain = student.denoiser(params, batch["cond"])
            return noise_correction(x_T, T)(plain) if correct_noise else plain

        end = rollout(step, denoiser(teacher_params), start(x_T), times, unroll=unroll)[0].x
        x0 = denoiser(params["student"])(x_T, jnp.asarray(times[0])).x0
        value = shortcut_distance([(x0, end)])
        return value, {"shortcut": value}

    return loss


@dataclass(frozen=True)
class Settings:
    """steps: of the finished student that stands in the teacher's place."""

    learning_rate: float = 1e-3
    steps: int = 3
    noise_correction: bool = True


def recipe(kit: Kit, settings: Settings) -> Recipe:
    """One stage for a student of one step, from a finished one of several. Raises ValueError."""
    if kit.steps != (1,):
        raise ValueError(
            "endpoint trains a student of one step on images of a finished student of several; set"
            f' config.student.steps="(1,)", got {kit.steps}'
        )
    sampler = kit.trajectory(noise_correction=settings.noise_correction)
    loss = endpoint(
        kit.network,
        grid=kit.grid(sampler, settings.steps),
        correct_noise=settings.noise_correction,
        constrain=kit.constrain,
        unroll=kit.unroll,
    )
    stage = Stage("", loss, kit.optimizers(settings.learning_rate), serves=(1,))
    return Recipe([stage], sampler, learns_from=settings.steps)
