"""DMD2 (Yin et al. 2024, arXiv 2405.14867): match the student's distribution to the teacher's
through two scores and a GAN.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdistill.adversarial import Adversary
from jaxdistill.methods.imagine_flash import Model
from jaxdistill.prediction import LossFn, diffuse, expand
from jaxdistill.sampling import Constrain, TimeGrid, check_grid, unconstrained
from jaxdistill.schedule import training_time


def matching_gradient(x0: Array, real: Array, fake: Array) -> Array:
    """(fake - real) / mean |x0 - real| of each image: the direction that lowers KL(student ‖
    teacher) (Yin et al. 2023, eqs. 7-8).
    """
    axes = tuple(range(1, x0.ndim))
    return (fake - real) / jnp.maximum(jnp.mean(jnp.abs(x0 - real), axis=axes, keepdims=True), 1e-3)


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
) -> LossFn:
    """½‖x̂0 - stopgrad(x̂0 - g)‖² with g of `matching_gradient` at a random time, and the fake
    score's own denoising loss.

    x̂0 is the student's output at a random time of `grid`. Its input is, with backward simulation,
    the student's own sampler's state there (x_s = α_s x̂0 + σ_s ε with fresh ε); else real data
    noised to that time.

    Args:
      student: the generator.
      teacher: the real score; also the architecture of the fake one.
      grid: the times of the student's sampler, the first T.
      null_cond: cond -> null conditioning.
      guidance_scale: of the real score.
      low: lowest time of the scores, share of T.
      high: highest.
      backward_simulation: see above.
      adversary: the GAN term, or None. Its heads read the frozen teacher (the paper's read the fake
        score's encoder).
      fake_weight: of the fake score's loss.
      constrain: sharding constraint of random batches.

    Returns:
      loss(params, teacher_params, batch, key), params {"student", "fake", "discriminator"}, batch
      {"x0", "cond"}. Each term pulls on one group only; the paper's several fake steps for one of
      the student are a matter of learning rates here.

    Raises:
      ValueError: a bad grid, or not 0 <= low < high <= 1.
    """
    T, schedule = student.schedule.T, student.schedule
    times = check_grid(grid, T)
    if not 0 <= low < high <= 1:
        raise ValueError(f"dmd2 needs 0 <= low < high <= 1, got {low:g} and {high:g}")

    def simulated(params: Any, cond: Any, x_T: Array, key: Array) -> Sequence[Array]:
        """The states of the student's sampler at the grid's times."""
        states, denoiser = [x_T], student.denoiser(jax.lax.stop_gradient(params), cond)
        for i in range(len(times) - 1):
            x0 = denoiser(states[-1], jnp.asarray(times[i])).x0
            noise = constrain(jax.random.normal(jax.random.fold_in(key, i), x_T.shape, x_T.dtype))
            states.append(
                jax.lax.stop_gradient(diffuse(schedule, x0, noise, jnp.asarray(times[i + 1])))
            )
        return states

    def loss(
        params: Any, teacher_params: Any, batch: Any, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        cond, shape = batch["cond"], batch["x0"].shape
        keys = jax.random.split(key, 7)
        noise = constrain(jax.random.normal(keys[0], shape, batch["x0"].dtype))
        index = constrain(jax.random.randint(keys[1], shape[:1], 0, len(times)))
        t = jnp.asarray(times)[index]
        if backward_simulation:
            states = jnp.stack(simulated(params["student"], cond, noise, keys[2]))
            x_t = jnp.take_along_axis(states, expand(index, noise)[None], axis=0)[0]
        else:
            x_t = diffuse(schedule, batch["x0"], noise, t)
        x0 = student.denoiser(params["student"], cond)(x_t, t).x0
        fixed = jax.lax.stop_gradient(x0)

        u = constrain(jax.random.uniform(keys[3], shape[:1]))
        tau = training_time(schedule, u, low * T, high * T)
        x_tau = diffuse(schedule, fixed, constrain(jax.random.normal(keys[4], shape)), tau)
        real = teacher.guided(teacher_params, cond, null_cond, guidance_scale)(x_tau, tau).x0
        fake = student.denoiser(jax.lax.stop_gradient(params["fake"]), cond)(x_tau, tau).x0
        gradient = jax.lax.stop_gradient(matching_gradient(fixed, real, fake))
        matching = 0.5 * jnp.mean((x0 - (fixed - gradient)) ** 2)

        u = (jnp.arange(shape[0]) + jax.random.uniform(keys[5], shape[:1])) / shape[0]
        eps = constrain(jax.random.normal(keys[6], shape))
        tau = constrain(training_time(schedule, u, low * T, high * T))
        denoised = student.denoiser(params["fake"], cond)(diffuse(schedule, fixed, eps, tau), tau)
        # In the v-like balance ‖x0 error‖² / σ²: the plain x0 loss forgets the low noise levels.
        scale = expand(schedule.sigma(tau), x0) ** 2
        fake_loss = jnp.mean((denoised.x0 - fixed) ** 2 / scale)
        value = matching + fake_weight * fake_loss
        metrics = {
            "matching": matching,
            "fake": fake_loss,
            "gradient": jnp.sqrt(jnp.mean(gradient**2)),
        }
        if adversary is not None:
            terms = adversary(
                params["discriminator"],
                teacher_params,
                x0,
                cond,
                batch["x0"],
                batch["cond"],
                jax.random.fold_in(key, 7),
            )
            value += terms.generator + terms.discriminator
            metrics |= terms.metrics
        return value, metrics

    return loss
