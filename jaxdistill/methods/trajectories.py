"""The states that a student is trained on: how it visits them, and how they lie in a batch.

Of a batch's states those of one row stand together: a device that holds some rows holds their
states, and nothing travels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdistill.model import Model
from jaxdistill.prediction import Denoiser, diffuse, expand
from jaxdistill.sampling import (
    Constrain,
    Step,
    TimeGrid,
    Trajectory,
    noise_correction,
    rollout,
    scan,
    start,
    unconstrained,
)


def tile(tree: Any, n: int) -> Any:
    """[b, ...] -> [b n, ...], each row n times."""
    return jax.tree.map(lambda a: jnp.repeat(a, n, axis=0), tree)


def flat(x: Array) -> Array:
    """[n, b, ...] -> [b n, ...], the n states of a row together."""
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])


def states_of(x: Array, n: int) -> Array:
    """[b n, ...] -> [n, b, ...]: `flat` undone."""
    return jnp.swapaxes(x.reshape(-1, n, *x.shape[1:]), 0, 1)


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


class Visited(NamedTuple):
    """States of b rows: row r walked grids[r mod G]. cond [b], x_T as the trajectory's rows or one
    for each state.
    """

    trajectory: Trajectory
    x_T: Array
    cond: Any
    grids: Sequence[TimeGrid]


@dataclass(frozen=True)
class Walk:
    """How the student visits the states that it is trained on.

    Attributes:
      student: its network.
      grids: of which none is a prefix of another.
      step: of its solver.
      backward: False visits x_t = q(x_0, ε, t) of real data instead of its own trajectory.
      whole: every state of a trajectory; False draws one a row, and rolls it out without gradient.
      correct_noise: with noise correction.
      constrain: sharding constraint put on every random batch.
      unroll: as of `rollout`.
    """

    student: Model
    grids: Sequence[TimeGrid]
    step: Step
    backward: bool = True
    whole: bool = True
    correct_noise: bool = True
    constrain: Constrain = unconstrained
    unroll: bool = False

    def visit(self, params: Any, batch: Any, key_noise: Array, key_state: Array) -> list[Visited]:
        """What the student visits: all grids in one part, or a part for each grid.

        Raises ValueError for a batch that does not divide among the grids.
        """
        shape, dtype, count = batch["x0"].shape, batch["x0"].dtype, len(self.grids)
        if shape[0] % count:
            raise ValueError(
                f"batch size {shape[0]} must be a multiple of the {count} grids that share it"
            )
        if self.backward and self.whole and count > 1:
            slots = slots_of(self.grids, shape[0])
            noise = jax.random.normal(key_noise, (len(slots.t), *shape), dtype)
            noise = jax.vmap(self.constrain)(noise)
            walked = self._slotted(params, batch["cond"], noise, slots)
            return [Visited(*walked, batch["cond"], self.grids)]
        noise = self.constrain(jax.random.normal(key_noise, shape, dtype))
        parts = []
        for i, grid in enumerate(self.grids):
            # Strided, not blocked: with a sharded batch each device keeps its own rows.
            x0, x_T, cond = jax.tree.map(
                lambda a, i=i: a[i::count], (batch["x0"], noise, batch["cond"])
            )
            key = jax.random.fold_in(key_state, i)
            if not self.backward:
                trajectory = self._on_data(params, cond, x0, x_T, grid, key)
            elif self.whole:
                trajectory = self._whole(params, cond, x_T, grid)
            else:
                trajectory = self._one_state(params, cond, x_T, grid, key)
            parts.append(Visited(trajectory, x_T, cond, [grid]))
        return parts

    def denoiser(self, params: Any, cond: Any, x_T: Array) -> Denoiser:
        """The student's, corrected where asked."""
        denoiser = self.student.denoiser(params, cond)
        if not self.correct_noise:
            return denoiser
        return noise_correction(x_T, self.student.schedule.T)(denoiser)

    def _whole(self, params: Any, cond: Any, x_T: Array, grid: TimeGrid) -> Trajectory:
        denoiser, first = self.denoiser(params, cond, x_T), start(x_T)
        _, trajectory = rollout(
            self.step, denoiser, first, grid, stop_gradient=True, unroll=self.unroll
        )
        times = jnp.broadcast_to(trajectory.t[:, None], trajectory.x.shape[:2])
        return trajectory._replace(t=times)

    def _slotted(
        self, params: Any, cond: Any, noise: Array, slots: Slots
    ) -> tuple[Trajectory, Array]:
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
            prediction = self.denoiser(params, cond, x_T)(state.x, t)
            after = self.step(prediction, state, t, t_next)
            return (after, x_T), (Trajectory(t, state.x, *prediction), x_T)

        first = (start(noise[0], own_times=True), noise[0])
        return scan(body, first, (*map(jnp.asarray, slots), noise), unroll=self.unroll)[1]

    def _one_state(
        self, params: Any, cond: Any, x_T: Array, grid: TimeGrid, key: Array
    ) -> Trajectory:
        """A trajectory of length one: a state drawn for each example, uniformly over the grid."""
        index = self.constrain(jax.random.randint(key, x_T.shape[:1], 0, len(grid)))
        states = x_T[None]
        if len(grid) > 1:
            denoiser, first = self.denoiser(jax.lax.stop_gradient(params), cond, x_T), start(x_T)
            last, visited = rollout(
                self.step, denoiser, first, grid[:-1], t_end=float(grid[-1]), unroll=self.unroll
            )
            states = jax.lax.stop_gradient(jnp.concatenate([visited.x, last.x[None]]))
        x = jnp.take_along_axis(states, expand(index, x_T)[None], axis=0)[0]
        t = jnp.asarray(grid)[index]
        prediction = self.denoiser(params, cond, x_T)(x, t)
        return Trajectory(t[None], x[None], *(p[None] for p in prediction))

    def _on_data(
        self, params: Any, cond: Any, x0: Array, noise: Array, grid: TimeGrid, key: Array
    ) -> Trajectory:
        """The student's predictions at x_t = q(x_0, ε, t): forward distillation."""
        b = x0.shape[0]
        t = jnp.broadcast_to(jnp.asarray(grid)[:, None], (len(grid), b))
        if not self.whole:
            index = self.constrain(jax.random.randint(key, (b,), 0, len(grid)))
            t = t[index, jnp.arange(b)][None]
        n = t.shape[0]
        times = flat(t)
        x = diffuse(self.student.schedule, tile(x0, n), tile(noise, n), times)
        prediction = self.denoiser(params, tile(cond, n), tile(noise, n))(x, times)
        return Trajectory(t, *(states_of(a, n) for a in (x, *prediction)))


def all_states(parts: Sequence[Visited]) -> tuple[Array, Any, Array]:
    """x̂0 [m, ...], conditioning and times [m] of all states of all parts."""
    x0 = jnp.concatenate([flat(part.trajectory.x0) for part in parts])
    conds = [tile(part.cond, part.trajectory.t.shape[0]) for part in parts]
    cond = jax.tree.map(lambda *c: jnp.concatenate(c), *conds)
    return x0, cond, jnp.concatenate([flat(part.trajectory.t) for part in parts])


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


def shortcut_distance(pairs: Sequence[tuple[Array, Array]]) -> Array:
    """Mean of ‖x̂0(x_T) - stopgrad(x_end)‖² over pairs of a trajectory's first x̂0 and its end,
    each [b, ...].
    """
    first, end = (jnp.concatenate(column) for column in zip(*pairs, strict=True))
    return jnp.mean((first - jax.lax.stop_gradient(end)) ** 2)


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


def one_state(
    x0: Array, parts: Sequence[Visited], key: Array, constrain: Constrain
) -> tuple[Array, Any]:
    """One random state of each row, from the flattened states of all parts, and its row's
    conditioning.
    """
    states, conds, at = [], [], 0
    for i, part in enumerate(parts):
        n, b = part.trajectory.t.shape
        slot = constrain(jax.random.randint(jax.random.fold_in(key, i), (b,), 0, n))
        rows = x0[at : at + n * b].reshape(b, n, *x0.shape[1:])
        # A sum instead of a lookup: with a sharded batch a lookup by computed rows would gather it.
        chosen = (slot[:, None] == jnp.arange(n)).reshape(b, n, *(1,) * (rows.ndim - 2))
        states.append(jnp.sum(jnp.where(chosen, rows, 0.0), axis=1))
        conds.append(part.cond)
        at += n * b
    return jnp.concatenate(states), jax.tree.map(lambda *c: jnp.concatenate(c), *conds)
