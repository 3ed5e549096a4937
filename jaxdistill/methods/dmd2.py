"""DMD2 (Yin et al. 2024, arXiv 2405.14867): match the student's distribution to the teacher's
through two scores and a GAN.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdistill.adversarial import Adversary
from jaxdistill.methods.recipe import Kit, Recipe, SamplerSpec, Stage
from jaxdistill.model import Model
from jaxdistill.prediction import LossFn, diffuse, expand
from jaxdistill.sampling import (
    Constrain,
    TimeGrid,
    check_grid,
    renoise,
    rollout,
    start,
    unconstrained,
)
from jaxdistill.schedule import training_time


def matching_gradient(x0: Array, real: Array, fake: Array) -> Array:
    """(fake - real) / mean |x0 - real| of each image: the direction that lowers KL(student ‖
    teacher) (Yin et al. 2023, eqs. 7-8).
    """
    axes = tuple(range(1, x0.ndim))
    return (fake - real) / jnp.maximum(jnp.mean(jnp.abs(x0 - real), axis=axes, keepdims=True), 1e-3)


class Losses(NamedTuple):
    """The loss of a student beside its critics, and that of the critics alone."""

    loss: LossFn
    critic: LossFn


def dmd2(
    student: Model,
    teacher: Model,
    *,
    grid: TimeGrid,
    null_cond: Callable[[Any], Any],
    guidance_scale: float,
    low: float = 0.02,
    high: float = 0.98,
    backward_simulation: bool = True,
    adversary: Adversary | None = None,
    fake_weight: float = 1.0,
    constrain: Constrain = unconstrained,
    unroll: bool = False,
) -> Losses:
    """½‖x̂0 - stopgrad(x̂0 - g)‖² with g of `matching_gradient` at a random time, and the fake
    score's own denoising loss.

    x̂0 is the student's output at a random time of `grid`. Its input is, with backward simulation,
    the student's own sampler's state there (x_s = α_s x̂0 + σ_s ε with fresh ε); else real data
    noised to that time.

    What differs from the paper: its discriminator is a head on the fake score's encoder and trains
    that with it, here the heads read the frozen teacher. Its fake score learns to predict ε at all
    times; here its loss is ‖x0 error‖²/σ² at the times of the scores. Its fake score and
    discriminator have five updates on fresh batches for one of the student; here there are
    `Settings.fake_updates` of them, by default one, on fresh images of one batch's conditioning.

    Args:
      student: the generator.
      teacher: the real score; also the architecture of the fake one.
      grid: the times of the student's sampler, the first T.
      null_cond: cond -> null conditioning.
      guidance_scale: of the real score.
      low: lowest time of the scores, share of T.
      high: highest.
      backward_simulation: see above.
      adversary: the GAN term, or None.
      fake_weight: of the fake score's loss.
      constrain: sharding constraint of random batches.
      unroll: as of `rollout`.

    Returns:
      The loss of all, of which each term pulls on one network only; and the critic, that of fake
      score and discriminator alone on images of their own. params {"student", "fake",
      "discriminator"}, batch {"x0", "cond"}, and "real", "real_cond" where x0 is no data.

    Raises:
      ValueError: a bad grid, or not 0 <= low < high <= 1.
    """
    T, schedule = student.schedule.T, student.schedule
    times = check_grid(grid, T)
    if not 0 <= low < high <= 1:
        raise ValueError(f"dmd2 needs 0 <= low < high <= 1, got {low:g} and {high:g}")

    def generated(student_params: Any, batch: Any, key: Array) -> Array:
        """x̂0 at a random time of the grid, from the student's own sampler's state or from data."""
        cond, shape = batch["cond"], batch["x0"].shape
        keys = jax.random.split(key, 3)
        noise = constrain(jax.random.normal(keys[0], shape, batch["x0"].dtype))
        index = constrain(jax.random.randint(keys[1], shape[:1], 0, len(times)))
        t = jnp.asarray(times)[index]
        denoiser = student.denoiser(student_params, cond)
        if not backward_simulation:
            return denoiser(diffuse(schedule, batch["x0"], noise, t), t).x0
        frozen = student.denoiser(jax.lax.stop_gradient(student_params), cond)
        step = renoise(schedule, keys[2])
        last = float(times[-1])
        end, visited = rollout(step, frozen, start(noise), times[:-1], t_end=last, unroll=unroll)
        states = jax.lax.stop_gradient(jnp.concatenate([visited.x, end.x[None]]))
        x_t = jnp.take_along_axis(states, expand(index, noise)[None], axis=0)[0]
        return denoiser(x_t, t).x0

    def fake_loss(fake_params: Any, x0: Array, cond: Any, key: Array) -> Array:
        """Of the fake score on the student's images, one stratum of the times an example.

        In the v-like balance ‖x0 error‖² / σ²: the plain x0 loss forgets the low noise levels.
        """
        n, (key_u, key_eps) = len(x0), jax.random.split(key)
        u = (jnp.arange(n) + jax.random.uniform(key_u, (n,))) / n
        tau = constrain(training_time(schedule, u, low * T, high * T))
        eps = constrain(jax.random.normal(key_eps, x0.shape, x0.dtype))
        denoised = student.denoiser(fake_params, cond)(diffuse(schedule, x0, eps, tau), tau).x0
        return jnp.mean((denoised - x0) ** 2 / expand(schedule.sigma(tau), x0) ** 2)

    def judged(params: Any, teacher_params: Any, batch: Any, x0: Array, key: Array) -> Any:
        """The adversarial terms of the student's images."""
        assert adversary is not None
        real, real_cond = batch.get("real", batch["x0"]), batch.get("real_cond", batch["cond"])
        return adversary(
            params["discriminator"], teacher_params, x0, batch["cond"], real, real_cond, key
        )

    def loss(
        params: Any, teacher_params: Any, batch: Any, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        cond, keys = batch["cond"], jax.random.split(key, 5)
        x0 = generated(params["student"], batch, keys[0])
        fixed = jax.lax.stop_gradient(x0)
        u = constrain(jax.random.uniform(keys[1], x0.shape[:1]))
        tau = training_time(schedule, u, low * T, high * T)
        eps = constrain(jax.random.normal(keys[2], x0.shape, x0.dtype))
        x_tau = diffuse(schedule, fixed, eps, tau)
        real = teacher.guided(teacher_params, cond, null_cond, guidance_scale)(x_tau, tau)
        fake = student.denoiser(jax.lax.stop_gradient(params["fake"]), cond)(x_tau, tau)
        gradient = jax.lax.stop_gradient(matching_gradient(fixed, real.x0, fake.x0))
        matching = 0.5 * jnp.mean((x0 - (fixed - gradient)) ** 2)
        of_fake = fake_loss(params["fake"], fixed, cond, keys[3])
        value = matching + fake_weight * of_fake
        size = jnp.sqrt(jnp.mean(gradient**2))
        metrics = {"matching": matching, "fake": of_fake, "gradient": size}
        if adversary is not None:
            terms = judged(params, teacher_params, batch, x0, keys[4])
            value += terms.generator + terms.discriminator
            metrics |= terms.metrics
        return value, metrics

    def critic(
        params: Any, teacher_params: Any, batch: Any, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        keys = jax.random.split(key, 3)
        student_params = jax.lax.stop_gradient(params["student"])
        x0 = jax.lax.stop_gradient(generated(student_params, batch, keys[0]))
        value = of_fake = fake_weight * fake_loss(params["fake"], x0, batch["cond"], keys[1])
        if adversary is not None:
            value += judged(params, teacher_params, batch, x0, keys[2]).discriminator
        return value, {"fake": of_fake}

    return Losses(loss, critic)


@dataclass(frozen=True)
class Settings:
    """fake_updates: of the fake score and the discriminator for one of the student (5 in the
    paper).
    """

    learning_rate: float = 1e-4
    fake_learning_rate: float = 5e-4
    fake_updates: int = 1
    guidance: float = 1.0
    adversarial_weight: float = 0.003


def recipe(kit: Kit, settings: Settings) -> Recipe:
    """One stage. Raises ValueError."""
    if settings.fake_updates < 1:
        raise ValueError(f"fake_updates must be at least 1, got {settings.fake_updates}")
    sampler = SamplerSpec("renoise")
    adversary = kit.adversary(settings.adversarial_weight)
    losses = dmd2(
        kit.network,
        kit.network,
        grid=kit.grid(sampler, max(kit.steps)),
        null_cond=kit.null_cond,
        guidance_scale=settings.guidance,
        adversary=adversary,
        constrain=kit.constrain,
        unroll=kit.unroll,
    )
    optimizers = kit.optimizers(
        settings.learning_rate,
        fake=settings.fake_learning_rate,
        discriminator=adversary is not None,
    )
    stage = Stage(
        "",
        losses.loss,
        optimizers,
        serves=kit.steps,
        critic=losses.critic,
        critic_updates=settings.fake_updates - 1,
    )
    return Recipe([stage], sampler)
