"""ADD (Sauer et al. 2023, arXiv 2311.17042): an adversarial loss, and a distillation loss through
the teacher's denoising.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdistill.adversarial import Adversary
from jaxdistill.methods.recipe import Kit, Recipe, SamplerSpec, Stage
from jaxdistill.model import Model
from jaxdistill.prediction import LossFn, diffuse, expand
from jaxdistill.sampling import Constrain, TimeGrid, check_grid, unconstrained
from jaxdistill.schedule import training_time


def add(
    student: Model,
    teacher: Model,
    *,
    grid: TimeGrid,
    adversary: Adversary,
    null_cond: Callable[[Any], Any],
    guidance_scale: float = 1.0,
    distillation_weight: float = 2.5,
    constrain: Constrain = unconstrained,
) -> LossFn:
    """L_adv + λ E c(t) ‖x̂0^Θ - stopgrad(x̂0^Φ(q(x̂0^Θ, ε', t)))‖², c(t) = α_t (Sauer et al. 2023,
    eqs. 1, 4; exponential weighting).

    x̂0^Θ is the student's prediction at real data noised to a random time of `grid`; t is uniform.

    What differs from the paper: its discriminator reads the DINO features of clean images, with an
    R1 penalty and the embeddings of the text and of an image; here it is the one that all methods
    share, on the frozen teacher's features of noised images and without the penalty.

    Args:
      student: the generator.
      teacher: the frozen network.
      grid: the student's times, the first T (the paper's are four).
      adversary: the adversarial term.
      null_cond: cond -> null conditioning.
      guidance_scale: of the teacher.
      distillation_weight: λ.
      constrain: sharding constraint of random batches.

    Returns:
      loss(params, teacher_params, batch, key), params {"student", "discriminator"}, batch {"x0",
      "cond"}.

    Raises:
      ValueError: a bad grid.
    """
    T, schedule = student.schedule.T, student.schedule
    times = check_grid(grid, T)

    def loss(
        params: Any, teacher_params: Any, batch: Any, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        data, cond = batch["x0"], batch["cond"]
        keys = jax.random.split(key, 5)
        s = jnp.asarray(times)[
            constrain(jax.random.randint(keys[0], data.shape[:1], 0, len(times)))
        ]
        x_s = diffuse(
            schedule, data, constrain(jax.random.normal(keys[1], data.shape, data.dtype)), s
        )
        network = student.denoiser(params["student"], cond)
        x0 = network(x_s, s).x0
        fixed = jax.lax.stop_gradient(x0)
        u = constrain(jax.random.uniform(keys[2], data.shape[:1]))
        t = training_time(teacher.schedule, u, low=0.02 * T)
        x_t = diffuse(
            teacher.schedule,
            fixed,
            constrain(jax.random.normal(keys[3], data.shape, data.dtype)),
            t,
        )
        denoiser = teacher.guided(teacher_params, cond, null_cond, guidance_scale)
        target = jax.lax.stop_gradient(denoiser(x_t, t).x0)
        distillation = jnp.mean(expand(teacher.schedule.alpha(t), data) * (x0 - target) ** 2)
        terms = adversary(params["discriminator"], teacher_params, x0, cond, data, cond, keys[4])
        value = terms.generator + terms.discriminator + distillation_weight * distillation
        return value, {"distillation": distillation, **terms.metrics}

    return loss


@dataclass(frozen=True)
class Settings:
    """As in the paper, but for the discriminator."""

    learning_rate: float = 5e-4
    guidance: float = 1.0
    distillation_weight: float = 2.5
    adversarial_weight: float = 0.05


def recipe(kit: Kit, settings: Settings) -> Recipe:
    """One stage on images. Raises ValueError."""
    sampler = SamplerSpec("renoise")
    adversary = kit.adversary(settings.adversarial_weight)
    if adversary is None:
        raise ValueError("adversarial_weight must be above 0, because add needs its adversary")
    loss = add(
        kit.network,
        kit.network,
        grid=kit.grid(sampler, max(kit.steps)),
        adversary=adversary,
        null_cond=kit.null_cond,
        guidance_scale=settings.guidance,
        distillation_weight=settings.distillation_weight,
        constrain=kit.constrain,
    )
    optimizers = kit.optimizers(settings.learning_rate, discriminator=True)
    return Recipe([Stage("", loss, optimizers, serves=kit.steps, data="images")], sampler)
