"""Imagine Flash (Kohler et al. 2024, arXiv 2405.05224): backward distillation with a shifted
reconstruction loss.

`imagine_flash` assembles the loss; shift γ, weight w, noise source and adversary are functions
passed in.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdistill import schedule as schedules
from jaxdistill.adversarial import Adversary
from jaxdistill.errors import choose
from jaxdistill.methods.recipe import Kit, Recipe, SamplerSpec, Stage
from jaxdistill.methods.trajectories import (
    Visited,
    Walk,
    all_states,
    distance_to_end,
    errors_by_step,
    flat,
    one_state,
    unique_grids,
)
from jaxdistill.model import Model
from jaxdistill.prediction import Batch, LossFn, diffuse
from jaxdistill.sampling import (
    Constrain,
    OneTime,
    Step,
    TimeGrid,
    Trajectory,
    check_grid,
    ddim,
    dpm_solver_pp_2m,
    rollout,
    start,
    unconstrained,
)
from jaxdistill.schedule import NoiseSchedule, same_log_snr

Shift = Callable[[Array], Array]
"""γ: student time -> the time at which the teacher starts.

Monotone, [0, T] -> (0, T], jittable over a batch.
"""

Weight = Callable[[Array], Array]
"""w: student time -> weight of that example's loss. Jittable over a batch."""

NoiseSource = Callable[[Array, Trajectory, Array], Array]
"""(key, trajectory [N, b, ...], x_T [b, ...]) -> the ε [N, b, ...] that re-noises the student's
prediction.
"""


# ----------------------------------------------------------------------------- shift γ and weight w


def power_shift(T: float, *, strength: float = 0.3, power: float = 3.0) -> Shift:
    """γ(t) = t - strength · T (t/T)^power: near T the teacher starts much earlier, near 0 hardly.

    Monotone on [0, T] iff strength · power <= 1; γ(t) in (0, T] for t in (0, T]. Raises ValueError
    outside 0 <= strength < 1, power >= 1, strength · power <= 1.
    """
    if not (0 <= strength < 1 and power >= 1 and strength * power <= 1 + 1e-6):
        raise ValueError(
            "power_shift needs 0 <= strength < 1, power >= 1 and strength * power <= 1, got"
            f" strength={strength}, power={power}"
        )
    return lambda t: t - strength * T * (t / T) ** power


def linear_shift(T: float, *, low: float = 0.1, high: float = 0.9) -> Shift:
    """γ(t) = T (low + (high - low) t/T). Raises ValueError unless 0 < low <= high <= 1."""
    if not 0 < low <= high <= 1:
        raise ValueError(f"linear_shift needs 0 < low <= high <= 1, got low={low}, high={high}")
    return lambda t: T * (low + (high - low) * t / T)


def table_shift(T: float, *, times: Sequence[float], values: Sequence[float]) -> Shift:
    """γ by linear interpolation of a table, both columns as fractions of T: γ(times[i] T) =
    values[i] T.

    Raises ValueError unless times increase, values do not decrease and values lie in (0, 1].
    """
    x, y = np.asarray(times, np.float32), np.asarray(values, np.float32)
    if (
        x.shape != y.shape
        or x.size < 1
        or (np.diff(x) <= 0).any()
        or (np.diff(y) < 0).any()
        or y.min() <= 0
        or y.max() > 1
    ):
        raise ValueError(
            f"table_shift needs increasing times and non-decreasing values in (0, 1], got {times}"
            f" -> {values}"
        )
    return lambda t: T * jnp.interp(jnp.asarray(t) / T, x, y)


def no_shift(t: Array) -> Array:
    """γ(t) = t."""
    return t


def uniform_weight(t: Array) -> Array:
    """w(t) = 1."""
    return jnp.ones_like(t)


def power_weight(T: float, *, power: float) -> Weight:
    """w(t) = (t/T)^power: a positive power favours the first step, a negative one the last."""
    return lambda t: (t / T) ** power


# ------------------------------------------------------------------------------------ noise sources


def trajectory_noise(key: Array, trajectory: Trajectory, x_T: Batch) -> Array:
    """ε̂_Θ at t: χ is the point of the student's own path at γ(t).

    Keeps the student's layout and diversity.
    """
    return trajectory.eps


def initial_noise(key: Array, trajectory: Trajectory, x_T: Batch) -> Array:
    """x_T for every step of its trajectory."""
    return jnp.broadcast_to(x_T, trajectory.x0.shape)


def fresh_noise(key: Array, trajectory: Trajectory, x_T: Batch) -> Array:
    """Drawn afresh for each state: makes SRL a form of score distillation."""
    return jax.random.normal(key, trajectory.x0.shape, trajectory.x0.dtype)


def mixed_noise(fraction: float) -> NoiseSource:
    """√(1-f) ε̂_Θ + √f ε, f in [0, 1]: from `trajectory_noise` (0) to `fresh_noise` (1)."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"mixed_noise needs a fraction in [0, 1], got {fraction}")

    def source(key: Array, trajectory: Trajectory, x_T: Array) -> Array:
        return (1 - fraction) ** 0.5 * trajectory.eps + fraction**0.5 * fresh_noise(
            key, trajectory, x_T
        )

    return source


# ----------------------------------------------------------------------------------------- the loss


class Reconstruction(NamedTuple):
    """What the teacher corrects and how: the shifted reconstruction loss, or the plain one.

    With `noise_source` None the teacher starts from the student's own state at t (no SRL).

    `reference` is the schedule whose times γ and the k steps are in, carried over to the run's own
    by equal log-SNR; None is the run's own.
    """

    shift: Shift = no_shift
    noise_source: NoiseSource | None = trajectory_noise
    steps: int = 4
    guidance_scale: float = 1.0
    solver: Callable[[NoiseSchedule], Step] = ddim
    reference: NoiseSchedule | None = None

    def carried(self, schedule: NoiseSchedule, function: Callable[[Array], Array]) -> Shift:
        """A function of the reference's times as one of the schedule's."""
        if self.reference is None:
            return function
        there = same_log_snr(schedule, self.reference)
        back = same_log_snr(self.reference, schedule)
        return lambda t: back(function(there(t)))


PLAIN = Reconstruction()
"""One guidance-free target of 4 teacher steps from the student's own state, by way of SRL with γ(t)
= t.
"""


def check_shift(shift: Shift, grid: TimeGrid, T: float) -> None:
    """Raise ValueError where γ leaves (0, T] or falls as t grows, on the grid and on 100 times of
    [grid[-1], T].
    """
    times = np.unique(np.concatenate([np.linspace(grid[-1], T, 100), grid]).astype(np.float32))
    values = np.asarray(shift(jnp.asarray(times)))
    if not (np.isfinite(values).all() and values.min() > 0 and values.max() <= T * (1 + 1e-6)):
        raise ValueError(
            f"the shift gamma must map times to (0, {T:g}], got values from {values.min():g} to"
            f" {values.max():g}; lower its strength or range"
        )
    if (np.diff(values) < -1e-6 * T).any():
        at = float(times[int(np.argmin(np.diff(values)))])
        raise ValueError(f"the shift gamma must not fall as t grows, but it falls after t = {at:g}")


def check_flash(
    reconstruction: Reconstruction,
    grids: Sequence[TimeGrid],
    schedule: NoiseSchedule,
    *,
    adversary_states: str,
) -> None:
    """Raise ValueError for k < 1, a shift that cannot be, or an adversary of other states."""
    if adversary_states not in ("all", "one"):
        raise ValueError(f"adversary_states must be 'all' or 'one', got {adversary_states!r}")
    if reconstruction.steps < 1:
        raise ValueError(f"the teacher needs k >= 1 steps, got {reconstruction.steps}")
    shift = reconstruction.carried(schedule, reconstruction.shift)
    for grid in grids:
        check_shift(shift, grid, schedule.T)


class Correction(NamedTuple):
    """The teacher's answers to the student's states."""

    teacher: Model
    null_cond: Callable[[Any], Any]
    reconstruction: Reconstruction
    constrain: Constrain
    unroll: bool

    @property
    def step(self) -> Step:
        """Of the teacher's solver."""
        return self.reconstruction.solver(self.teacher.schedule)

    @property
    def lowest(self) -> float:
        """The first time: between integers a discrete schedule is read as it is; below 1 the
        network knows no time.
        """
        return 1.0 if self.teacher.schedule.discrete else 0.0

    def __call__(self, params: Any, parts: Sequence[Visited], cond: Any, key: Array) -> Array:
        """x̂0^Φ [m, ...] of all states, without a gradient. One call of the teacher for all that
        was visited: one copy of its network in the program.
        """
        starts = [self.start(part, jax.random.fold_in(key, i)) for i, part in enumerate(parts)]
        x, t = jax.tree.map(lambda *a: jnp.concatenate(a), *starts)
        return jax.lax.stop_gradient(self.x0(params, x, t, cond))

    def start(self, part: Visited, key: Array) -> tuple[Array, Array]:
        """Where the teacher starts: (x [b n, ...], t [b n])."""
        shift, source = self.reconstruction.shift, self.reconstruction.noise_source
        fixed: Trajectory = jax.lax.stop_gradient(part.trajectory)
        t = flat(fixed.t)
        if source is None:
            return flat(fixed.x), t
        eps = source(key, fixed, part.x_T)
        carried = self.reconstruction.carried(self.teacher.schedule, shift)
        gamma = jnp.maximum(carried(t), self.lowest)
        noise = self.constrain(flat(eps))
        return diffuse(self.teacher.schedule, flat(fixed.x0), noise, gamma), gamma

    def x0(self, params: Any, x: Array, t: Array, cond: Any) -> Array:
        """x̂0(f_Φ^k(x), ε̂_Φ, t/k): k teacher steps over t, t(k-1)/k, ..., t/k, times of the
        reference.

        x [m, ...], t [m].
        """
        scale, k = self.reconstruction.guidance_scale, self.reconstruction.steps
        denoiser = self.teacher.guided(params, cond, self.null_cond, scale)

        def at(share: Array) -> Array:
            return self.reconstruction.carried(self.teacher.schedule, lambda t: t * share)(t)

        grid = jax.vmap(at)(jnp.arange(k, 0, -1, dtype=t.dtype) / k)
        grid = jnp.maximum(grid, self.lowest)
        return rollout(self.step, denoiser, start(x, own_times=True), grid, unroll=self.unroll)[0].x


def imagine_flash(
    student: Model,
    teacher: Model,
    *,
    grids: Sequence[TimeGrid],
    null_cond: Callable[[Any], Any],
    reconstruction: Reconstruction = PLAIN,
    weight: Weight = uniform_weight,
    backward: bool = True,
    whole_trajectory: bool = True,
    correct_noise: bool = True,
    solver: Step | None = None,
    adversary: Adversary | None = None,
    adversary_states: str = "all",
    shortcut: float = 0.0,
    constrain: Constrain = unconstrained,
    unroll: bool = False,
) -> LossFn:
    """E w(t) ‖stopgrad(x̂0^Φ) - x̂0^Θ‖² over the states of the student's trajectory (Imagine Flash,
    eqs. 4-7).

    The student's x̂0 at each state carries the gradient, the state does not. The loss is the mean
    over states and examples of the mean square over an image's elements.

    What differs from the paper: the paper does not describe its discriminator; here it is that of
    `adversarial`. γ is a function passed in, and `TABLE` was tuned here. One student serves all
    `grids`, which share its batches.

    With `shortcut` (ours) the first state's x̂0 also takes ‖x̂0(x_T) - stopgrad(x_end)‖², x_end the
    image at the end of the same trajectory: one step goes where several do, for no further
    network call.

    Args:
      student: the network that learns; its parameters are an argument of the loss.
      teacher: the frozen network; its parameters are an argument of the loss.
      grids: one grid for each number of steps the student will serve. Prefixes of a longer grid
        cost nothing (`unique_grids`); where several remain, the batch is divided among them, and
        all walk in one loop (`slots_of`), so that the program holds one copy of the network.
      null_cond: cond -> null conditioning of the same structure (used where guidance_scale != 1).
      reconstruction: γ, noise source, k, the guidance scale and the solver of the teacher (DDIM in
        the paper).
      weight: w(t).
      backward: False trains on x_t = q(x_0, ε, t) of real data instead (forward distillation).
      whole_trajectory: every visited state is an example, with no call of its own; False draws one
        state an example, rolled out without gradient, and spends one more call on it.
      correct_noise: apply noise correction in the rollout, as the sampler will.
      solver: the student's solver; DDIM by default. As the teacher's it must take times of each
        example: no `OneTime`.
      adversary: the adversarial term, or None.
      adversary_states: which of the student's predictions it judges: "all", or "one" state of each
        row, drawn at random.
      shortcut: weight of the first state's distance to its trajectory's end; grids of one step have
        none. 0 is the paper's form.
      constrain: sharding constraint put on every random batch.
      unroll: as of `rollout`.

    Returns:
      loss(params, teacher_params, batch, key) -> (loss, metrics). params {"student": ...,
      "discriminator": ...}, batch {"cond": batch-leading pytree, "x0": [b, ...] in [-1, 1] or a
      shape-giving array where no data is used}; the adversary's reals are x0 with cond, or "real"
      [r, ...] with "real_cond" where the batch holds them.

    Raises:
      ValueError: a bad grid or shift, k < 1, a solver that takes one time for the whole batch, a
        shortcut below 0 or without whole trajectories of several steps, or a batch that does not
        divide among the grids.
    """
    T = student.schedule.T
    grids = unique_grids([check_grid(grid, T) for grid in grids])
    several = backward and whole_trajectory and max(map(len, grids)) > 1
    check_flash(reconstruction, grids, student.schedule, adversary_states=adversary_states)
    if shortcut < 0 or (shortcut > 0 and not several):
        raise ValueError(
            "the shortcut must be at least 0, and above 0 needs whole backward trajectories of"
            f" several steps, got {shortcut:g}"
        )
    walk = Walk(
        student,
        grids,
        solver or ddim(student.schedule),
        backward=backward,
        whole=whole_trajectory,
        correct_noise=correct_noise,
        constrain=constrain,
        unroll=unroll,
    )
    correction = Correction(teacher, null_cond, reconstruction, constrain, unroll)
    for step in (walk.step, correction.step):
        if isinstance(step, OneTime):
            step.refuse()

    def loss(
        params: Any, teacher_params: Any, batch: Any, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        key_noise, key_state, key_srl, key_adversary = jax.random.split(key, 4)
        parts = walk.visit(params["student"], batch, key_noise, key_state)
        x0, cond, t = all_states(parts)
        target = correction(teacher_params, parts, cond, key_srl)
        error = jnp.mean((target - x0) ** 2, axis=tuple(range(1, target.ndim)))
        value = jnp.mean(weight(t) * error)
        metrics = {"reconstruction": value}
        if whole_trajectory:
            metrics |= errors_by_step(error, parts)
        if shortcut > 0:
            metrics["shortcut"] = distance_to_end(parts)
            value += shortcut * metrics["shortcut"]
        if adversary is not None:
            if adversary_states == "one":
                # Every row once, at a slot of its own: the adversary's cost no longer grows with
                # the steps.
                key_state = jax.random.fold_in(key_adversary, 1)
                x0, cond = one_state(x0, parts, key_state, constrain)
            real, real_cond = batch.get("real", batch["x0"]), batch.get("real_cond", batch["cond"])
            terms = adversary(
                params["discriminator"], teacher_params, x0, cond, real, real_cond, key_adversary
            )
            value += terms.generator + terms.discriminator
            metrics |= terms.metrics
        return value, metrics

    return loss


# -------------------------------------------------------------------------------------- the recipe

NOISE_SOURCES = {"trajectory": trajectory_noise, "initial": initial_noise, "fresh": fresh_noise}
SHIFTS: dict[str, Callable[..., Shift]] = {
    "none": lambda T: no_shift,
    "power": power_shift,
    "linear": linear_shift,
    "table": table_shift,
}
SOLVERS = {"ddim": ddim, "dpm_solver_pp_2m": dpm_solver_pp_2m}
REFERENCES: dict[str, Callable[[], NoiseSchedule]] = {
    "cosine": schedules.cosine,
    "flow": schedules.flow,
    "scaled_linear": lambda: schedules.ddpm(schedules.scaled_linear_betas()),
}
"""Schedules whose times γ may be in; the last is Stable Diffusion's."""

TABLE = {"times": (0.3, 0.5, 0.75, 1.0), "values": (0.52, 0.65, 0.77, 0.87)}
"""Shares of T; tuned on scenes."""


@dataclass(frozen=True)
class Settings:
    """Every part of the method.

    Attributes:
      learning_rate: of the student.
      guidance: scale of the teacher that is distilled.
      backward: False is forward distillation on data.
      whole_trajectory: False draws one random state an example.
      noise_correction: in training and sampling.
      srl: False lets the teacher start from the student's own state.
      noise: SRL's noise: "trajectory", "initial" or "fresh".
      shift: SRL's γ: "none", "power", "linear" or "table", with its arguments in `shifts`.
      shifts: {name: arguments}.
      reference: "cosine", "flow" or "scaled_linear": γ and the k steps are in times of that
        schedule, carried over to the run's own by equal log-SNR; "": in the run's own.
      reference_snr: factor on the reference's α/σ, 1/shift for a run whose size has a shift.
      weight_power: w(t) = (t/T)^power.
      teacher_steps: k.
      teacher_solver: "ddim" or "dpm_solver_pp_2m".
      adversarial_weight: 0 switches the discriminator off.
      shortcut: ours: weight of the first state's distance to the end of its trajectory.
      times: instead of config.student.times.
    """

    learning_rate: float = 1e-3
    guidance: float = 1.0
    backward: bool = True
    whole_trajectory: bool = True
    noise_correction: bool = True
    srl: bool = True
    noise: str = "trajectory"
    shift: str = "table"
    shifts: Mapping[str, Any] = field(
        default_factory=lambda: {
            "power": {"strength": 0.3, "power": 3.0},
            "linear": {"low": 0.1, "high": 0.9},
            "table": dict(TABLE),
        }
    )
    reference: str = ""
    reference_snr: float = 1.0
    weight_power: float = 0.0
    teacher_steps: int = 2
    teacher_solver: str = "ddim"
    adversarial_weight: float = 0.05
    shortcut: float = 0.0
    times: Sequence[Any] = ()


def reconstruction_of(settings: Settings, T: float) -> Reconstruction:
    """What the teacher corrects. Raises ValueError."""
    reference = None
    if settings.reference:
        reference = choose(REFERENCES, settings.reference, "reference")()
        reference = schedules.shifted(reference, settings.reference_snr)
        T = reference.T
    shift = choose(SHIFTS, settings.shift, "shift")(T, **settings.shifts.get(settings.shift, {}))
    source = choose(NOISE_SOURCES, settings.noise, "noise")
    return Reconstruction(
        shift=shift,
        noise_source=source if settings.srl else None,
        steps=settings.teacher_steps,
        guidance_scale=settings.guidance,
        solver=choose(SOLVERS, settings.teacher_solver, "teacher_solver"),
        reference=reference,
    )


def loss_of(
    kit: Kit, settings: Settings, sampler: SamplerSpec, steps: Sequence[int] = ()
) -> LossFn:
    """The loss on the sampler's grids of these step counts, by default of all that are served;
    with some of them alone there is no adversary. Raises ValueError.
    """
    T = kit.network.schedule.T
    return imagine_flash(
        kit.network,
        kit.network,
        grids=kit.grids(sampler, steps),
        null_cond=kit.null_cond,
        reconstruction=reconstruction_of(settings, T),
        weight=power_weight(T, power=settings.weight_power),
        backward=settings.backward,
        whole_trajectory=settings.whole_trajectory,
        correct_noise=settings.noise_correction,
        adversary=None if steps else kit.adversary(settings.adversarial_weight),
        adversary_states=kit.adversarial.states,
        shortcut=0.0 if steps else settings.shortcut,
        constrain=kit.constrain,
        unroll=kit.unroll,
    )


def recipe(kit: Kit, settings: Settings) -> Recipe:
    """One stage. Raises ValueError."""
    correct = settings.noise_correction
    sampler = kit.trajectory(noise_correction=correct, times=settings.times)
    optimizers = kit.optimizers(
        settings.learning_rate, discriminator=settings.adversarial_weight > 0
    )
    data = "noise" if settings.backward else "images"
    stage = Stage("", loss_of(kit, settings, sampler), optimizers, serves=kit.steps, data=data)
    return Recipe([stage], sampler)
