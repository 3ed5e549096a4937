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

from jaxdistill.adversarial import Adversary
from jaxdistill.methods.recipe import Kit, Recipe, SamplerSpec, Stage
from jaxdistill.model import Model
from jaxdistill.names import choose
from jaxdistill.prediction import (
    Batch,
    Denoiser,
    LossFn,
    diffuse,
    expand,
)
from jaxdistill.sampling import (
    Constrain,
    OneTime,
    Step,
    TimeGrid,
    Trajectory,
    check_grid,
    ddim,
    dpm_solver_pp_2m,
    noise_correction,
    rollout,
    scan,
    start,
    unconstrained,
)
from jaxdistill.schedule import NoiseSchedule

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
    """

    shift: Shift = no_shift
    noise_source: NoiseSource | None = trajectory_noise
    steps: int = 4
    guidance_scale: float = 1.0
    solver: Callable[[NoiseSchedule], Step] = ddim


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


def unique_grids(grids: Sequence[TimeGrid]) -> list[TimeGrid]:
    """The grids that are no prefix of another, longest first.

    A trajectory on (T, a, b) passes every state of (T, a) and (T), and its x̂0 at each state is the
    final image of that shorter sampler: rolling out the prefix would be the same calls again.
    """
    kept: list[TimeGrid] = []
    for grid in sorted(grids, key=len, reverse=True):
        if not any(np.array_equal(other[: len(grid)], grid) for other in kept):
            kept.append(grid)
    return kept


class Slots(NamedTuple):
    """How a batch of rows walks several grids in one loop: row r has grid r mod G, and starts anew
    when it has come to its end.

    t, t_next [S, b]: where slot s of a row stands and ends, S the length of the longest grid;
    restart bool [S, b].
    """

    t: np.ndarray
    t_next: np.ndarray
    restart: np.ndarray


def slots_of(grids: Sequence[TimeGrid], batch_size: int) -> Slots:
    """The slots of `batch_size` rows. No slot is idle: a one-step row draws a new noise in each."""
    count = max(len(grid) for grid in grids)
    at = [np.arange(count) % len(grid) for grid in grids]
    t = [np.asarray(grid, np.float32)[i] for grid, i in zip(grids, at, strict=True)]
    t_next = [
        np.append(grid, 0.0).astype(np.float32)[i + 1] for grid, i in zip(grids, at, strict=True)
    ]
    columns = np.arange(batch_size) % len(grids)
    return Slots(
        *(np.stack(rows, axis=1)[:, columns] for rows in (t, t_next, [i == 0 for i in at]))
    )


def shortcut_distance(pairs: Sequence[tuple[Array, Array]]) -> Array:
    """Mean of ‖x̂0(x_T) - stopgrad(x_end)‖² over pairs of a trajectory's first x̂0 and its end,
    each [b, ...].
    """
    first, end = (jnp.concatenate(column) for column in zip(*pairs, strict=True))
    return jnp.mean((first - jax.lax.stop_gradient(end)) ** 2)


class Visited(NamedTuple):
    """States of b rows: row r walked grids[r mod G]. cond [b], x_T as the trajectory's rows or one
    for each state.
    """

    trajectory: Trajectory
    x_T: Array
    cond: Any
    grids: Sequence[TimeGrid]


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

    What differs from the paper: it adds a discriminator without saying which, here it is that of
    `adversarial`. γ is a function passed in, and `TABLE` was tuned here. One student serves all
    `grids`, which share its batches.

    With `shortcut` (ours) the first state's x̂0 also takes ‖x̂0(x_T) - stopgrad(x_end)‖², x_end the
    image at the end of the same trajectory: one step goes where several do, for no network call
    more.

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
    if adversary_states not in ("all", "one"):
        raise ValueError(f"adversary_states must be 'all' or 'one', got {adversary_states!r}")
    T = student.schedule.T
    grids = unique_grids([check_grid(grid, T) for grid in grids])
    if reconstruction.steps < 1:
        raise ValueError(f"the teacher needs k >= 1 steps, got {reconstruction.steps}")
    for grid in grids:
        check_shift(reconstruction.shift, grid, T)
    if shortcut < 0 or (
        shortcut > 0 and not (backward and whole_trajectory and max(map(len, grids)) > 1)
    ):
        raise ValueError(
            "the shortcut must be at least 0, and above 0 needs whole backward trajectories of"
            f" several steps, got {shortcut:g}"
        )
    student_step = ddim(student.schedule) if solver is None else solver
    teacher_step = reconstruction.solver(teacher.schedule)
    # Between integers a discrete schedule is read as it is; below 1 the network knows no time.
    lowest = 1.0 if teacher.schedule.discrete else 0.0
    for step in (student_step, teacher_step):
        if isinstance(step, OneTime):
            step.refuse()

    def student_denoiser(params: Any, cond: Any, noise: Array) -> Denoiser:
        denoiser = student.denoiser(params, cond)
        return noise_correction(noise, T)(denoiser) if correct_noise else denoiser

    def teacher_x0(teacher_params: Any, x: Array, t: Array, cond: Any) -> Array:
        """x̂0(f_Φ^k(x), ε̂_Φ, t/k): k teacher steps over t, t(k-1)/k, ..., t/k. x [m, ...], t [m]."""
        denoiser = teacher.guided(teacher_params, cond, null_cond, reconstruction.guidance_scale)
        k = reconstruction.steps
        grid = t[None] * (jnp.arange(k, 0, -1, dtype=t.dtype) / k)[:, None]
        grid = jnp.maximum(grid, lowest)
        return rollout(teacher_step, denoiser, start(x, own_times=True), grid, unroll=unroll)[0].x

    def whole(params: Any, cond: Any, x_T: Array, grid: TimeGrid) -> Trajectory:
        denoiser = student_denoiser(params, cond, x_T)
        trajectory = rollout(
            student_step, denoiser, start(x_T), grid, stop_gradient=True, unroll=unroll
        )[1]
        return trajectory._replace(
            t=jnp.broadcast_to(trajectory.t[:, None], trajectory.x.shape[:2])
        )

    def slotted(params: Any, cond: Any, noise: Array, slots: Slots) -> tuple[Trajectory, Array]:
        """All grids in one loop. noise [S, b, ...] holds what a restart of slot s draws.

        Returns each state's own x_T as well.
        """

        def body(carry: Any, slot: Any) -> Any:
            t, t_next, restart, fresh = slot
            # A row that starts anew has no history: all of its state is that of a first step.
            state, x_T = jax.lax.stop_gradient(
                jax.tree.map(
                    lambda new, old: jnp.where(expand(restart, new), new, old),
                    (start(fresh, own_times=True), fresh),
                    carry,
                )
            )
            prediction = student_denoiser(params, cond, x_T)(state.x, t)
            return (student_step(prediction, state, t, t_next), x_T), (
                Trajectory(t, state.x, *prediction),
                x_T,
            )

        first = (start(noise[0], own_times=True), noise[0])
        return scan(body, first, (*map(jnp.asarray, slots), noise), unroll=unroll)[1]

    def one_step(params: Any, cond: Any, x_T: Array, grid: TimeGrid, key: Array) -> Trajectory:
        """A trajectory of length one: a state drawn for each example, uniformly over the grid."""
        index = constrain(jax.random.randint(key, x_T.shape[:1], 0, len(grid)))
        states = x_T[None]
        if len(grid) > 1:
            denoiser = student_denoiser(jax.lax.stop_gradient(params), cond, x_T)
            last, visited = rollout(
                student_step, denoiser, start(x_T), grid[:-1], t_end=float(grid[-1]), unroll=unroll
            )
            states = jax.lax.stop_gradient(jnp.concatenate([visited.x, last.x[None]]))
        x = jnp.take_along_axis(states, expand(index, x_T)[None], axis=0)[0]
        t = jnp.asarray(grid)[index]
        return Trajectory(
            t[None], x[None], *(p[None] for p in student_denoiser(params, cond, x_T)(x, t))
        )

    def on_data(
        params: Any, cond: Any, x0: Array, noise: Array, grid: TimeGrid, key: Array
    ) -> Trajectory:
        """The student's predictions at x_t = q(x_0, ε, t): forward distillation."""
        b = x0.shape[0]
        t = jnp.broadcast_to(jnp.asarray(grid)[:, None], (len(grid), b))
        if not whole_trajectory:
            t = t[constrain(jax.random.randint(key, (b,), 0, len(grid))), jnp.arange(b)][None]
        n = t.shape[0]
        times = flat(t)
        x = diffuse(student.schedule, tile(x0, n), tile(noise, n), times)
        prediction = student_denoiser(params, tile(cond, n), tile(noise, n))(x, times)
        return Trajectory(t, *(states_of(a, n) for a in (x, *prediction)))

    def parts_of(params: Any, batch: Any, key_noise: Array, key_state: Array) -> list[Visited]:
        """What the student visits: all grids in one part, or a part for each grid."""
        shape, dtype = batch["x0"].shape, batch["x0"].dtype
        if backward and whole_trajectory and len(grids) > 1:
            slots = slots_of(grids, shape[0])
            noise = jax.vmap(constrain)(jax.random.normal(key_noise, (len(slots.t), *shape), dtype))
            return [Visited(*slotted(params, batch["cond"], noise, slots), batch["cond"], grids)]
        noise = constrain(jax.random.normal(key_noise, shape, dtype))
        parts = []
        for i, grid in enumerate(grids):
            # Strided, not blocked: with a sharded batch each device keeps its own rows.
            x0, x_T, cond = jax.tree.map(
                lambda a, i=i: a[i :: len(grids)], (batch["x0"], noise, batch["cond"])
            )
            key = jax.random.fold_in(key_state, i)
            if not backward:
                trajectory = on_data(params, cond, x0, x_T, grid, key)
            elif whole_trajectory:
                trajectory = whole(params, cond, x_T, grid)
            else:
                trajectory = one_step(params, cond, x_T, grid, key)
            parts.append(Visited(trajectory, x_T, cond, [grid]))
        return parts

    def teacher_start(part: Visited, key: Array) -> tuple[Array, Array]:
        """Where the teacher starts: (x [b n, ...], t [b n])."""
        fixed: Trajectory = jax.lax.stop_gradient(part.trajectory)
        t = flat(fixed.t)
        if reconstruction.noise_source is None:
            return flat(fixed.x), t
        eps = reconstruction.noise_source(key, fixed, part.x_T)
        t_teacher = jnp.maximum(reconstruction.shift(t), lowest)
        return (
            diffuse(teacher.schedule, flat(fixed.x0), constrain(flat(eps)), t_teacher),
            t_teacher,
        )

    def loss(
        params: Any, teacher_params: Any, batch: Any, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        b = batch["x0"].shape[0]
        if b % len(grids):
            raise ValueError(
                f"batch size {b} must be a multiple of the {len(grids)} grids that share it"
            )
        key_noise, key_state, key_srl, key_adversary = jax.random.split(key, 4)
        parts = parts_of(params["student"], batch, key_noise, key_state)
        starts = [
            teacher_start(part, jax.random.fold_in(key_srl, i)) for i, part in enumerate(parts)
        ]
        # One call of the teacher for all that was visited: one copy of its network in the program.
        x, t = jax.tree.map(lambda *a: jnp.concatenate(a), *starts)
        x0 = jnp.concatenate([flat(part.trajectory.x0) for part in parts])
        cond = jax.tree.map(
            lambda *c: jnp.concatenate(c),
            *(tile(part.cond, part.trajectory.t.shape[0]) for part in parts),
        )
        target = jax.lax.stop_gradient(teacher_x0(teacher_params, x, t, cond))
        error = jnp.mean((target - x0) ** 2, axis=tuple(range(1, target.ndim)))
        value = jnp.mean(
            weight(jnp.concatenate([flat(part.trajectory.t) for part in parts])) * error
        )
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
                x0, cond = one_state(x0, parts, jax.random.fold_in(key_adversary, 1))
            real, real_cond = batch.get("real", batch["x0"]), batch.get("real_cond", batch["cond"])
            terms = adversary(
                params["discriminator"], teacher_params, x0, cond, real, real_cond, key_adversary
            )
            value += terms.generator + terms.discriminator
            metrics |= terms.metrics
        return value, metrics

    def errors_by_step(error: Array, parts: Sequence[Visited]) -> dict[str, Array]:
        """{"reconstruction/N_n": mean error of the n-th state of the N-step grid}."""
        found: dict[str, Array] = {}
        at = 0
        for part in parts:
            n, b = part.trajectory.t.shape
            errors = states_of(error[at : at + n * b], n)
            at += n * b
            for i, grid in enumerate(part.grids):
                found |= {
                    f"reconstruction/{len(grid)}_{j + 1}": jnp.mean(errors[j, i :: len(part.grids)])
                    for j in range(len(grid))
                }
        return found

    def distance_to_end(parts: Sequence[Visited]) -> Array:
        """`shortcut_distance` of all grids of several steps."""
        pairs = []
        for part in parts:
            for i, grid in enumerate(part.grids):
                rows = part.trajectory.x0[:, i :: len(part.grids)]
                firsts = (
                    range(0, len(rows) - len(grid) + 1, len(grid)) if len(grid) > 1 else ()
                )  # a trajectory cut short has no end
                pairs += [(rows[at], rows[at + len(grid) - 1]) for at in firsts]
        return shortcut_distance(pairs)

    def one_state(x0: Array, parts: Sequence[Visited], key: Array) -> tuple[Array, Any]:
        """One random state of each row, from the flattened states of all parts."""
        states, conds, at = [], [], 0
        for i, part in enumerate(parts):
            n, b = part.trajectory.t.shape
            slot = constrain(jax.random.randint(jax.random.fold_in(key, i), (b,), 0, n))
            rows = x0[at : at + n * b].reshape(b, n, *x0.shape[1:])
            # A sum instead of a lookup: with a sharded batch a lookup by computed rows would gather
            # it.
            chosen = (slot[:, None] == jnp.arange(n)).reshape(b, n, *(1,) * (rows.ndim - 2))
            states.append(jnp.sum(jnp.where(chosen, rows, 0.0), axis=1))
            conds.append(part.cond)
            at += n * b
        return jnp.concatenate(states), jax.tree.map(lambda *c: jnp.concatenate(c), *conds)

    return loss


# Of a batch's states those of one row stand together: a device that holds some rows holds their
# states, and nothing travels.


def tile(tree: Any, n: int) -> Any:
    """[b, ...] -> [b n, ...], each row n times."""
    return jax.tree.map(lambda a: jnp.repeat(a, n, axis=0), tree)


def flat(x: Array) -> Array:
    """[n, b, ...] -> [b n, ...], the n states of a row together."""
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])


def states_of(x: Array, n: int) -> Array:
    """[b n, ...] -> [n, b, ...]: `flat` undone."""
    return jnp.swapaxes(x.reshape(-1, n, *x.shape[1:]), 0, 1)


# -------------------------------------------------------------------------------------- the recipe

NOISE_SOURCES = {"trajectory": trajectory_noise, "initial": initial_noise, "fresh": fresh_noise}
SHIFTS: dict[str, Callable[..., Shift]] = {
    "none": lambda T: no_shift,
    "power": power_shift,
    "linear": linear_shift,
    "table": table_shift,
}
SOLVERS = {"ddim": ddim, "dpm_solver_pp_2m": dpm_solver_pp_2m}

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
    weight_power: float = 0.0
    teacher_steps: int = 2
    teacher_solver: str = "ddim"
    adversarial_weight: float = 0.05
    shortcut: float = 0.0
    times: Sequence[float] = ()


def reconstruction_of(settings: Settings, T: float) -> Reconstruction:
    """What the teacher corrects. Raises ValueError."""
    shift = choose(SHIFTS, settings.shift, "shift")(T, **settings.shifts.get(settings.shift, {}))
    source = choose(NOISE_SOURCES, settings.noise, "noise")
    return Reconstruction(
        shift=shift,
        noise_source=source if settings.srl else None,
        steps=settings.teacher_steps,
        guidance_scale=settings.guidance,
        solver=choose(SOLVERS, settings.teacher_solver, "teacher_solver"),
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
