"""TDM (Luo et al. 2025, arXiv 2503.06674): match the student's trajectory to the teacher's, in
distribution, interval by interval.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdistill.methods.dmd2 import matching_gradient
from jaxdistill.methods.imagine_flash import Model, shortcut_distance
from jaxdistill.prediction import LossFn, expand
from jaxdistill.sampling import Constrain, TimeGrid, check_grid, ddim, rollout, start, unconstrained
from jaxdistill.schedule import NoiseSchedule, training_time


def diffuse_on(
    schedule: NoiseSchedule, x_s: Array, eps: Array, s: Array, tau: Array
) -> tuple[Array, Array]:
    """From x_s on to τ >= s: (x_τ = (α_τ/α_s) x_s + b ε, b), b² = σ_τ² - (α_τ/α_s)² σ_s² of shape
    [b, 1, ...].

    α_s must not be 0.
    """
    a = expand(schedule.alpha(tau) / schedule.alpha(s), x_s)
    b = jnp.sqrt(
        jnp.maximum(
            expand(schedule.sigma(tau), x_s) ** 2 - (a * expand(schedule.sigma(s), x_s)) ** 2, 0.0
        )
    )
    return a * x_s + b * eps, b


def tdm(
    student: Model,
    teacher: Model,
    *,
    grids: Sequence[TimeGrid],
    null_cond: Callable[[Any], Any],
    guidance_scale: float,
    low: float = 0.02,
    high: float = 0.98,
    fake_weight: float = 1.0,
    shortcut: float = 0.0,
    constrain: Constrain = unconstrained,
    unroll: bool = False,
) -> LossFn:
    """½‖x_s - stopgrad(x_s - g)‖² over the intervals t -> s of the student's own DDIM trajectory,
    and the fake score's loss.

    x_s is where the student's step from t ends. It is diffused on to a random τ of (s, t), and g of
    `matching_gradient` compares there the real score with the fake one, which is trained on the
    same x_τ: the x_τ of the whole trajectory have the teacher's distribution when the fake score
    has nowhere a quarrel with it. No data is used. The paper tells the network how many steps the
    trajectory has; here the networks have no such input, and one student learns all grids.

    The fake score of q(x_τ | x_s), in x0 form D, is learned by (b/σ_τ²)² ‖D - D*‖², D* = (x_τ - ε
    σ_τ²/b)/α_τ: the denoising loss at s = 0, of bounded variance as τ -> s.

    With `shortcut` (ours) x̂0 of the trajectory's first state also takes ‖x̂0(x_T) -
    stopgrad(x_end)‖², x_end the image at the end of the same trajectory: one step goes where
    several do, for no network call more. Matching alone is at its worst there, as it may choose
    among the modes of a state that leaves all open; the end of the trajectory is a function of x_T.

    Args:
      student: the generator.
      teacher: the real score; also the architecture of the fake one.
      grids: one for each number of steps; the batch is divided among them.
      null_cond: cond -> null conditioning.
      guidance_scale: of the real score.
      low: lowest time of the scores, share of T.
      high: highest.
      fake_weight: of the fake score's loss.
      shortcut: weight of the first state's distance to the trajectory's end; grids of one step have
        none. 0 is the paper's form.
      constrain: sharding constraint of random batches.
      unroll: as of `rollout`.

    Returns:
      loss(params, teacher_params, batch, key), params {"student", "fake"}, batch {"x0" (its shape
      alone), "cond"}.

    Raises:
      ValueError: no grid or a bad one, not 0 < low < high < 1, a shortcut below 0 or without a grid
        of several steps, or a batch that does not divide among the grids.
    """
    T, schedule = student.schedule.T, student.schedule
    kept = [check_grid(grid, T) for grid in grids]
    if not kept:
        raise ValueError("tdm needs at least one grid of times, got none")
    if not 0 < low < high < 1:
        raise ValueError(f"tdm needs 0 < low < high < 1, got {low:g} and {high:g}")
    if shortcut < 0 or (shortcut > 0 and all(len(grid) == 1 for grid in kept)):
        raise ValueError(
            "tdm's shortcut must be at least 0, and above 0 needs a grid of several steps, got"
            f" {shortcut:g}"
        )
    step = ddim(schedule)
    lowest, highest = (training_time(schedule, u, low * T, high * T) for u in (0.0, 1.0))

    def ends(
        params: Any, cond: Any, x_T: Array, grid: TimeGrid
    ) -> tuple[Array, Array, Array, Array, Array]:
        """Of every interval of one trajectory, in one batch: x_s and x̂0 with gradient, t and s;
        and the trajectory's end.
        """
        end, visited = rollout(
            step,
            student.denoiser(params, cond),
            start(x_T),
            grid,
            stop_gradient=True,
            unroll=unroll,
        )
        n, b = visited.x.shape[:2]
        t, s = (
            jnp.repeat(jnp.asarray(times, jnp.float32), b)
            for times in (grid, np.append(grid[1:], 0.0))
        )
        x0, eps = (a.reshape(n * b, *x_T.shape[1:]) for a in (visited.x0, visited.eps))
        return (
            expand(schedule.alpha(s), x0) * x0 + expand(schedule.sigma(s), x0) * eps,
            x0,
            t,
            s,
            end.x,
        )

    def loss(
        params: Any, teacher_params: Any, batch: Any, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        n = batch["x0"].shape[0]
        if n % len(kept):
            raise ValueError(
                f"batch size {n} must be a multiple of the {len(kept)} grids that share it"
            )
        keys = jax.random.split(key, 5)
        noise = constrain(jax.random.normal(keys[0], batch["x0"].shape, batch["x0"].dtype))
        parts, conds = [], []
        for i, grid in enumerate(kept):
            cond = jax.tree.map(lambda a, i=i: a[i :: len(kept)], batch["cond"])
            parts.append(ends(params["student"], cond, noise[i :: len(kept)], grid))
            copies = len(grid)
            conds.append(jax.tree.map(lambda a, copies=copies: jnp.concatenate([a] * copies), cond))
        x_s, x0, t, s, _ = (jnp.concatenate(column) for column in zip(*parts, strict=True))
        cond = jax.tree.map(lambda *c: jnp.concatenate(c), *conds)
        fixed = jax.lax.stop_gradient(x_s)

        def diffused(key_u: Array, key_eps: Array) -> tuple[Array, Array, Array, Array]:
            u = constrain(jax.random.uniform(key_u, t.shape))
            tau = jnp.clip(training_time(schedule, u, s, t), lowest, highest)
            eps = constrain(jax.random.normal(key_eps, fixed.shape, fixed.dtype))
            x_tau, b = diffuse_on(schedule, fixed, eps, s, tau)
            return x_tau, tau, b, eps

        x_tau, tau, _, _ = diffused(keys[1], keys[2])
        real = teacher.guided(teacher_params, cond, null_cond, guidance_scale)(x_tau, tau).x0
        fake = student.denoiser(jax.lax.stop_gradient(params["fake"]), cond)(x_tau, tau).x0
        gradient = jax.lax.stop_gradient(matching_gradient(x0, real, fake))
        matching = 0.5 * jnp.mean((x_s - (fixed - gradient)) ** 2)

        x_tau, tau, b, eps = diffused(keys[3], keys[4])
        scale = b / expand(schedule.sigma(tau), fixed) ** 2
        denoised = student.denoiser(params["fake"], cond)(x_tau, tau).x0
        fake_loss = jnp.mean(
            (scale * denoised - (scale * x_tau - eps) / expand(schedule.alpha(tau), fixed)) ** 2
        )
        total = matching + fake_weight * fake_loss
        metrics = {
            "matching": matching,
            "fake": fake_loss,
            "gradient": jnp.sqrt(jnp.mean(gradient**2)),
        }
        if shortcut > 0:
            # Of each trajectory of several steps: x̂0 of its first state beside its end.
            firsts = [
                (x0[: len(end)], end)
                for grid, (_, x0, _, _, end) in zip(kept, parts, strict=True)
                if len(grid) > 1
            ]
            metrics["shortcut"] = shortcut_distance(firsts)
            total = total + shortcut * metrics["shortcut"]
        return total, metrics

    return loss
