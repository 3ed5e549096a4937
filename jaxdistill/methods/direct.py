"""Direct distillation: regress the student's N-step image on the teacher's many-step image from the
same noise.

The honest baseline (Luhman & Luhman 2021, "Knowledge distillation in iterative generative models",
for one step). The pairs are made once; no teacher runs during training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdistill.methods.recipe import Kit, Pairs, Recipe, Stage
from jaxdistill.methods.trajectories import unique_grids
from jaxdistill.model import Model
from jaxdistill.prediction import LossFn
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


def direct(
    student: Model,
    *,
    grids: Sequence[TimeGrid],
    correct_noise: bool = True,
    constrain: Constrain = unconstrained,
    unroll: bool = False,
) -> LossFn:
    """E ‖x̂0^Θ(x_t) - y‖² at each state of the student's own trajectory from x_T, y the teacher's
    image from that x_T.

    The state is cut from the gradient, as in backward distillation, so on nested grids one
    trajectory trains every number of steps.

    What differs from the paper: it has one step alone, to which this comes down on a grid of one.

    Args:
      student: the network that learns.
      grids: one for each number of steps.
      correct_noise: as the sampler will.
      constrain: sharding constraint of batches.
      unroll: as of `rollout`.

    Returns:
      loss(params, teacher_params, batch, key) with params {"student": ...} and batch {"noise" [b,
      ...], "target" [b, ...] in [-1, 1], "cond"}; teacher_params and key are unused.

    Raises:
      ValueError: a bad grid.
    """
    T = student.schedule.T
    kept = unique_grids([check_grid(grid, T) for grid in grids])
    step = ddim(student.schedule)

    def loss(
        params: Any, teacher_params: Any, batch: Any, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        noise = constrain(batch["noise"])
        denoiser = student.denoiser(params["student"], batch["cond"])
        if correct_noise:
            denoiser = noise_correction(noise, T)(denoiser)
        metrics: dict[str, Array] = {}
        total, count = jnp.zeros(()), 0
        for grid in kept:
            x0 = rollout(step, denoiser, start(noise), grid, stop_gradient=True, unroll=unroll)[
                1
            ].x0
            errors = jnp.mean((x0 - batch["target"][None]) ** 2, axis=tuple(range(1, x0.ndim)))
            metrics |= {f"reconstruction/{len(grid)}_{n + 1}": errors[n] for n in range(len(grid))}
            total, count = total + jnp.sum(errors), count + len(grid)
        value = total / count
        return value, {"reconstruction": jax.lax.stop_gradient(value), **metrics}

    return loss


@dataclass(frozen=True)
class Settings:
    """pairs_share: of a budget in network calls, which makes the pairs; pairs: their number where
    the budget is in iterations (0: the adversary's pool); noise_correction: in training and
    sampling.
    """

    learning_rate: float = 1e-3
    pairs_share: float = 0.5
    pairs: int = 0
    pairs_solver: str = "ddim"
    pairs_steps: int = 50
    noise_correction: bool = True


def recipe(kit: Kit, settings: Settings) -> Recipe:
    """One stage on pairs. Raises ValueError."""
    if not 0 < settings.pairs_share < 1:
        raise ValueError(f"pairs_share must be above 0 and below 1, got {settings.pairs_share:g}")
    if settings.pairs < 0 or settings.pairs_steps < 1:
        raise ValueError(
            "pairs must be at least 0 and pairs_steps at least 1, got"
            f" {settings.pairs} and {settings.pairs_steps}"
        )
    sampler = kit.trajectory(noise_correction=settings.noise_correction)
    loss = direct(
        kit.network,
        grids=kit.grids(sampler),
        correct_noise=settings.noise_correction,
        constrain=kit.constrain,
        unroll=kit.unroll,
    )
    stage = Stage("", loss, kit.optimizers(settings.learning_rate), serves=kit.steps, data="pairs")
    pairs = Pairs(settings.pairs_share, settings.pairs, settings.pairs_solver, settings.pairs_steps)
    return Recipe([stage], sampler, pairs)
