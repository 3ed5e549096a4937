"""TDM (Luo et al. 2025, arXiv 2503.06674): match the student's trajectory to the teacher's, in
distribution, interval by interval.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdistill.methods.dmd2 import Losses, matching_gradient
from jaxdistill.methods.recipe import Kit, Recipe, SamplerSpec, Stage
from jaxdistill.methods.trajectories import flat, shortcut_distance, tile
from jaxdistill.model import Model
from jaxdistill.prediction import expand
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


class Intervals(NamedTuple):
    """Intervals t -> s of trajectories: the state x_s where one ends, the x̂0 of its start, and the
    rows' conditioning, all [m, ...]; of trajectories of several steps the (first x̂0, end).
    """

    x_s: Array
    x0: Array
    t: Array
    s: Array
    cond: Any
    ends: Any = ()


@dataclass(frozen=True)
class Scored:
    """The intervals of the student's trajectories, and how scores see them: between the times `low`
    and `high`.
    """

    student: Model
    grids: Sequence[TimeGrid]
    low: float
    high: float
    constrain: Constrain = unconstrained
    unroll: bool = False

    def intervals(self, params: Any, batch: Any, key: Array) -> Intervals:
        """Every interval of one trajectory a row; x_s and x0 carry the gradient.

        Raises ValueError for fewer rows than grids.
        """
        n, count = batch["x0"].shape[0], len(self.grids)
        if n < count:
            raise ValueError(f"a batch of {n} rows is too small for {count} grids that share it")
        noise = jax.random.normal(key, batch["x0"].shape, batch["x0"].dtype)
        noise = self.constrain(noise)
        parts, ends = [], []
        for i, grid in enumerate(self.grids):
            # Strided, not blocked: with a sharded batch each device keeps its own rows.
            x_T, cond = jax.tree.map(lambda a, i=i: a[i::count], (noise, batch["cond"]))
            x_T = self.constrain(x_T)  # which refuses what the devices cannot divide
            part, end = self._of_grid(params, x_T, cond, grid)
            parts.append(part)
            if len(grid) > 1:
                ends.append(end)
        together = jax.tree.map(lambda *a: jnp.concatenate(a), *parts)
        return together._replace(ends=ends)

    def _of_grid(
        self, params: Any, x_T: Array, cond: Any, grid: TimeGrid
    ) -> tuple[Intervals, tuple[Array, Array]]:
        """The intervals of one grid, and the (first x̂0, end) of its trajectories."""
        schedule, denoiser = self.student.schedule, self.student.denoiser(params, cond)
        step, first = ddim(schedule), start(x_T)
        end, visited = rollout(step, denoiser, first, grid, stop_gradient=True, unroll=self.unroll)
        times = jnp.asarray(np.append(grid, 0.0), jnp.float32)
        t, s = (jnp.repeat(part[:, None], len(x_T), axis=1) for part in (times[:-1], times[1:]))
        x0, eps, t, s = (flat(a) for a in (visited.x0, visited.eps, t, s))
        x_s = expand(schedule.alpha(s), x0) * x0 + expand(schedule.sigma(s), x0) * eps
        return Intervals(x_s, x0, t, s, tile(cond, len(grid))), (visited.x0[0], end.x)

    def diffused(self, found: Intervals, key: Array) -> tuple[Array, Array, Array, Array]:
        """x_s on to a random τ of its interval: (x_τ, τ, b, ε) of `diffuse_on`."""
        schedule = self.student.schedule
        key_u, key_eps = jax.random.split(key)
        t, s, x_s = found.t, found.s, jax.lax.stop_gradient(found.x_s)
        lowest, highest = (training_time(schedule, u, self.low, self.high) for u in (0.0, 1.0))
        u = self.constrain(jax.random.uniform(key_u, t.shape))
        tau = jnp.clip(training_time(schedule, u, s, t), lowest, highest)
        eps = self.constrain(jax.random.normal(key_eps, x_s.shape, x_s.dtype))
        x_tau, b = diffuse_on(schedule, x_s, eps, s, tau)
        return x_tau, tau, b, eps

    def fake_loss(self, params: Any, found: Intervals, key: Array) -> Array:
        """Of the fake score on these intervals."""
        schedule = self.student.schedule
        x_tau, tau, b, eps = self.diffused(found, key)
        scale = b / expand(schedule.sigma(tau), x_tau) ** 2
        denoised = self.student.denoiser(params, found.cond)(x_tau, tau).x0
        target = (scale * x_tau - eps) / expand(schedule.alpha(tau), x_tau)
        return jnp.mean((scale * denoised - target) ** 2)


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
) -> Losses:
    """½‖x_s - stopgrad(x_s - g)‖² over the intervals t -> s of the student's own DDIM trajectory,
    and the fake score's loss.

    x_s is where the student's step from t ends. It is diffused on to a random τ of (s, t), and g of
    `matching_gradient` compares there the real score with the fake one, which is trained on the
    same x_τ. Where both agree everywhere, the x_τ have the teacher's distribution. No data is used.

    What differs from the paper: it tells the network how many steps the trajectory has; here the
    networks have no such input, and one student learns all grids. Its published demo takes one
    random state of each trajectory, lets x̂0 there follow g, and has its fake score learn x̂0 with
    a clipped SNR and importance weights; here every state counts, x_s follows g, and the fake score
    has the exact loss below. That demo updates the fake score once for each step of the student,
    as `Settings.fake_updates` = 1 does.

    The fake score of q(x_τ | x_s), in x0 form D, is learned by (b/σ_τ²)² ‖D - D*‖², D* = (x_τ - ε
    σ_τ²/b)/α_τ: the denoising loss at s = 0, of bounded variance as τ -> s.

    With `shortcut` (ours) x̂0 of the trajectory's first state also takes ‖x̂0(x_T) -
    stopgrad(x_end)‖², x_end the image at the end of the same trajectory: one step goes where
    several do, for no further network call. Matching alone is worst there: from pure noise every
    image is possible, and it finds the modes first. The trajectory's end is a function of x_T.

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
      constrain: sharding constraint of random batches, and of each grid's part of one.
      unroll: as of `rollout`.

    Returns:
      The loss of both, and the critic: that of the fake score alone, on a trajectory of its own.
      params {"student", "fake"}, batch {"x0" (its shape alone), "cond"}.

    Raises:
      ValueError: no grid or a bad one, not 0 < low < high < 1, a shortcut below 0 or without a grid
        of several steps, or a batch of fewer rows than grids.
    """
    T = student.schedule.T
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
    scored = Scored(student, kept, low * T, high * T, constrain=constrain, unroll=unroll)

    def loss(
        params: Any, teacher_params: Any, batch: Any, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        keys = jax.random.split(key, 3)
        found = scored.intervals(params["student"], batch, keys[0])
        x_tau, tau, _, _ = scored.diffused(found, keys[1])
        real = teacher.guided(teacher_params, found.cond, null_cond, guidance_scale)(x_tau, tau)
        fake = student.denoiser(jax.lax.stop_gradient(params["fake"]), found.cond)(x_tau, tau)
        gradient = jax.lax.stop_gradient(matching_gradient(found.x0, real.x0, fake.x0))
        matching = 0.5 * jnp.mean((found.x_s - jax.lax.stop_gradient(found.x_s) + gradient) ** 2)
        of_fake = scored.fake_loss(params["fake"], found, keys[2])
        total = matching + fake_weight * of_fake
        size = jnp.sqrt(jnp.mean(gradient**2))
        metrics = {"matching": matching, "fake": of_fake, "gradient": size}
        if shortcut > 0:
            metrics["shortcut"] = shortcut_distance(found.ends)
            total = total + shortcut * metrics["shortcut"]
        return total, metrics

    def critic(
        params: Any, teacher_params: Any, batch: Any, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        del teacher_params
        key_states, key_fake = jax.random.split(key)
        student_params = jax.lax.stop_gradient(params["student"])
        found = jax.lax.stop_gradient(scored.intervals(student_params, batch, key_states))
        value = fake_weight * scored.fake_loss(params["fake"], found, key_fake)
        return value, {"fake": value}

    return Losses(loss, critic)


@dataclass(frozen=True)
class Settings:
    """fake_updates: of the fake score for one of the student."""

    learning_rate: float = 1e-4
    fake_learning_rate: float = 5e-4
    fake_updates: int = 1
    guidance: float = 1.0


def objectives(
    kit: Kit, settings: Settings, grids: Sequence[TimeGrid], *, shortcut: float = 0.0
) -> Losses:
    """Its losses on these grids. Raises ValueError."""
    if settings.fake_updates < 1:
        raise ValueError(f"fake_updates must be at least 1, got {settings.fake_updates}")
    return tdm(
        kit.network,
        kit.network,
        grids=grids,
        null_cond=kit.null_cond,
        guidance_scale=settings.guidance,
        shortcut=shortcut,
        constrain=kit.constrain,
        unroll=kit.unroll,
    )


def recipe(kit: Kit, settings: Settings) -> Recipe:
    """One stage, without data. Raises ValueError."""
    sampler = SamplerSpec()
    losses = objectives(kit, settings, kit.grids(sampler))
    stage = Stage(
        "",
        losses.loss,
        kit.optimizers(settings.learning_rate, fake=settings.fake_learning_rate),
        serves=kit.steps,
        critic=losses.critic,
        critic_updates=settings.fake_updates - 1,
    )
    return Recipe([stage], sampler)
