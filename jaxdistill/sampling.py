"""Time grids, solver steps, denoiser transforms, and the rollout that a sampler and a training step
share.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdistill.prediction import (
    ApplyFn,
    Batch,
    Denoiser,
    Parameterization,
    Prediction,
    Target,
    as_denoiser,
    eps_prediction,
    eps_target,
    expand,
    flow_prediction,
)
from jaxdistill.schedule import NoiseSchedule, Time, log_snr

TimeGrid = np.ndarray
"""Decreasing float32 vector of the N times at which the network is called; the first is T."""

Transform = Callable[[Denoiser], Denoiser]
"""Decorates a denoiser."""

Constrain = Callable[[Array], Array]
"""Puts a sharding constraint on a batch-leading array.

Noise carries no sharding of its own: without a constraint every device would compute the whole
batch, and no value would show it.
"""


def unconstrained(x: Array) -> Array:
    """The constraint of a single device: none."""
    return x


@dataclass(frozen=True)
class SamplerSpec:
    """How a student is sampled.

    Attributes:
      solver: "ddim"; or with fresh noise between the steps "renoise", and "consistency", which
        reads the network as LCM's f(x, t).
      grid: "trailing", "leading", "linspace"; "nested": the first N of `times` are the grid of N
        steps; "listed": `times` holds a list for each number of steps.
      times: shares of T, decreasing from 1, or lists of them.
      noise_correction: whether the first step goes on with the noise that was drawn.
    """

    solver: str = "ddim"
    grid: str = "trailing"
    times: Sequence[Any] = ()
    noise_correction: bool = False


# -------------------------------------------------------------------------------------------- grids


def trailing_grid(steps: int, T: float, *, discrete: bool = False) -> TimeGrid:
    """T (1 - i/N), i = 0..N-1: [N] times from T down; the last interval ends at 0.

    With `discrete`, times are rounded to integers as diffusers' "trailing" does (its timestep is
    our time - 1; Lin et al. 2023, table 2). Raises ValueError for steps < 1.
    """
    _check_steps(steps, T, discrete)
    grid = np.arange(steps, 0, -1) * (T / steps)
    return np.asarray(np.round(grid) if discrete else grid, np.float32)


def divided_steps(schedule: NoiseSchedule, steps: int, substeps: int = 1) -> np.ndarray:
    """Float32 [substeps + 1, steps]: column i holds the times of the substeps of step i of the
    trailing grid, and where that step ends.

    All are times of the trailing grid of steps · substeps. Raises ValueError as `trailing_grid`.
    """
    fine = trailing_grid(steps * substeps, schedule.T, discrete=schedule.discrete)
    first = np.arange(steps) * substeps
    return np.append(fine, np.float32(0.0))[first + np.arange(substeps + 1)[:, None]]


def leading_grid(
    steps: int, T: float, *, discrete: bool = False, offset: float | None = None
) -> TimeGrid:
    """Times i T/N + offset (+ 1 when discrete), i = N-1..0: [N] of them, none at T.

    With `discrete`, T/N is floored as diffusers' "leading" does; `offset` is its `steps_offset` (1
    for Stable Diffusion, 0 by default). A continuous grid's default offset is T/1000. Does not
    start at T: fit for a teacher's sampler, refused for a student. Raises ValueError for steps < 1
    or a time outside (0, T].
    """
    _check_steps(steps, T, discrete)
    offset = (0.0 if discrete else T / 1000.0) if offset is None else offset
    width = T // steps if discrete else T / steps
    grid = np.arange(steps - 1, -1, -1) * width + offset + (1.0 if discrete else 0.0)
    if not (grid > 0).all() or not (grid <= T).all():
        raise ValueError(
            f"leading_grid(steps={steps}, offset={offset}) leaves (0, {T}]; choose an offset in (0,"
            f" {T / steps:g}]"
        )
    return np.asarray(grid, np.float32)


def linspace_grid(
    steps: int, T: float, *, discrete: bool = False, end: float | None = None
) -> TimeGrid:
    """[N] times evenly spaced from T to `end`, both included ("linspace" in diffusers, where end is
    1, our time 1).

    `end` defaults to 1 when discrete and T/1000 else. Raises ValueError for steps < 1 or an end
    outside (0, T].
    """
    _check_steps(steps, T, discrete)
    end = (1.0 if discrete else T / 1000.0) if end is None else end
    if not 0 < end <= T:
        raise ValueError(
            f"linspace_grid ends at a time in (0, {T:g}], got end={end:g}; the step to 0 is implied"
        )
    # diffusers builds the increasing sequence and reverses it: a single step is then its lower end.
    # It rounds its own timesteps (our times - 1), and rounding halves to even does not commute with
    # the shift.
    grid = np.linspace(end - discrete, T - discrete, steps)[::-1]
    return np.asarray(np.round(grid) + 1 if discrete else grid, np.float32)


def _check_steps(steps: int, T: float, discrete: bool) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if discrete and steps > T:
        raise ValueError(
            f"steps must be at most {T:g}, the times of a discrete schedule, got {steps}"
        )


def check_grid(grid: TimeGrid, T: float) -> TimeGrid:
    """The grid as float32 [N], if a student can be sampled on it.

    Raises:
      ValueError: it is empty, does not start at T, does not decrease, or leaves (0, T].
    """
    grid = np.asarray(grid, np.float32)
    shown = [round(float(t), 6) for t in grid.ravel()]
    if grid.ndim != 1 or grid.size < 1:
        raise ValueError(f"a time grid needs at least one time, got {shown}")
    if not np.isfinite(grid).all():
        raise ValueError(f"a time grid must be finite, got {shown}")
    if not np.isclose(grid[0], T, rtol=1e-6):
        raise ValueError(f"a time grid must start at T = {T:g}, got {shown}")
    if (np.diff(grid) >= 0).any():
        raise ValueError(f"a time grid must decrease strictly, got {shown}")
    if grid[-1] <= 0:
        raise ValueError(f"a time grid ends above 0 (the step to 0 is implied), got {shown}")
    # Exactly T: noise correction asks for t >= T.
    return np.concatenate([np.asarray([T], np.float32), grid[1:]])


def karras_ratios(steps: int, high: float, low: float, *, rho: float = 7.0) -> np.ndarray:
    """σ/α from `high` to `low`, evenly spaced in its ρ-th root: float64 [N] (Karras et al. 2022,
    eq. 5). One step is `high`.
    """
    return np.linspace(high ** (1 / rho), low ** (1 / rho), steps) ** rho


def exponential_ratios(steps: int, high: float, low: float) -> np.ndarray:
    """σ/α from `high` to `low`, evenly spaced in its logarithm: float64 [N]. One step is `high`."""
    return np.exp(np.linspace(np.log(high), np.log(low), steps))


def quantile_ratios(
    steps: int, high: float, low: float, *, quantile: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """σ/α from `high` to `low` at even quantiles of a distribution on [0, 1]: float64 [N].

    One step is `high`. The quantiles of Beta(0.6, 0.6) are dense at both ends ("Beta sampling is
    all you need", Lee et al. 2024).
    """
    return low + quantile(1.0 - np.linspace(0.0, 1.0, steps)) * (high - low)


# --------------------------------------------------------------------------------------- transforms


def chain(*transforms: Transform) -> Transform:
    """Apply transforms from left to right: the first is nearest the network."""

    def apply(denoiser: Denoiser) -> Denoiser:
        for transform in transforms:
            denoiser = transform(denoiser)
        return denoiser

    return apply


def guidance(scale: float | Array, *, shared: bool = False) -> Transform:
    """Classifier-free guidance: p = u + scale (c - u) on both fields (Ho & Salimans 2022).

    The denoiser below must be closed over 2b rows of conditioning, each row's followed by its null
    (`with_null_rows`); the one above takes b. One network call of twice the batch, and with a
    sharded batch nothing travels. With `shared` the denoiser below takes b rows as well and answers
    2b (`as_denoiser` with copies=2).
    """

    def transform(denoiser: Denoiser) -> Denoiser:
        def guided(x: Array, t: Array) -> Prediction:
            twice = 1 if shared else 2
            both = denoiser(
                jnp.repeat(x, twice, axis=0), jnp.repeat(t, twice, axis=0) if jnp.ndim(t) else t
            )

            def guide(p: Array) -> Array:
                pairs = p.reshape(x.shape[0], 2, *p.shape[1:])
                return pairs[:, 1] + expand(jnp.asarray(scale), x) * (pairs[:, 0] - pairs[:, 1])

            return jax.tree.map(guide, both)

        return guided

    return transform


def with_null_rows(cond: Any, null: Any) -> Any:
    """Conditioning [b, ...] and null conditioning [b, ...] -> [2b, ...], alternating: what
    `guidance` wants below it.
    """
    return jax.tree.map(
        lambda c, n: jnp.stack([c, n], axis=1).reshape(-1, *c.shape[1:]), cond, null
    )


def guided_denoiser(
    apply: ApplyFn,
    params: Any,
    cond: Any,
    *,
    schedule: NoiseSchedule,
    parameterization: Parameterization,
    null_cond: Callable[[Any], Any],
    scale: float | Array,
    shared: bool = False,
) -> Denoiser:
    """`as_denoiser` under `guidance`; at scale 1 the plain denoiser, at half the cost.

    Args:
      apply: the network.
      params: its parameters.
      cond: conditioning of the batch, a batch-leading pytree.
      schedule: the forward process.
      parameterization: what the output means.
      null_cond: cond -> the null conditioning of the same structure.
      scale: of the guidance, by its formula below 1 as well: 0 is the unconditional prediction.
        One that is traced always guides.
      shared: `apply` takes b rows of x with 2b of conditioning, and computes once what does not
        depend on it.
    """
    if isinstance(scale, (int, float)) and scale == 1.0:
        return as_denoiser(
            apply, params, cond, schedule=schedule, parameterization=parameterization
        )
    both = with_null_rows(cond, null_cond(cond))
    copies = 2 if shared else 1
    below = as_denoiser(
        apply, params, both, schedule=schedule, parameterization=parameterization, copies=copies
    )
    return guidance(scale, shared=shared)(below)


def noise_correction(noise: Batch, T: float) -> Transform:
    """At t = T, ε̂ becomes the noise that the sampler drew; x̂0 stays the network's (Imagine Flash,
    section 3.3).

    f(x_T) = α_s x̂0(x_T, ε̂, T) + σ_s ε. The identity for t < T, and for v-prediction with zero
    terminal SNR.

    Args:
      noise: [b, ...], the ε of the start x_T (x_T itself where σ_T = 1).
      T: the time at which it applies.
    """

    def transform(denoiser: Denoiser) -> Denoiser:
        def corrected(x: Array, t: Array) -> Prediction:
            prediction = denoiser(x, t)
            return prediction._replace(
                eps=jnp.where(expand(jnp.asarray(t) >= T, x), noise, prediction.eps)
            )

        return corrected

    return transform


def clip(
    schedule: NoiseSchedule, low: float = -1.0, high: float = 1.0, *, keep_eps: bool = False
) -> Transform:
    """Clip x̂0 to [low, high] and recompute ε̂ = (x - α x̂0)/σ so that the pair still meets at x.

    diffusers' `clip_sample` with `use_clipped_model_output`; with `keep_eps` without: ε̂ stays the
    network's. t must be above 0.
    """

    def transform(denoiser: Denoiser) -> Denoiser:
        def clipped(x: Array, t: Array) -> Prediction:
            prediction = denoiser(x, t)
            x0 = jnp.clip(prediction.x0, low, high)
            if keep_eps:
                return prediction._replace(x0=x0)
            return Prediction(
                x0, (x - expand(schedule.alpha(t), x) * x0) / expand(schedule.sigma(t), x)
            )

        return clipped

    return transform


def consistency_function(T: float, *, sigma_data: float = 0.5, scale: float = 10.0) -> Transform:
    """x̂0 becomes f(x, t) = c_skip x + c_out x̂0, the network read as a consistency model.

    c_skip = σ²/(τ² + σ²), c_out = τ/√(τ² + σ²), τ = 1000 scale t/T, so that f(x, 0) = x (Luo et
    al., app. C; Song et al. 2023, eq. 5 with σ = sigma_data).
    """

    def transform(denoiser: Denoiser) -> Denoiser:
        def function(x: Array, t: Array) -> Prediction:
            prediction = denoiser(x, t)
            tau = expand(jnp.asarray(t), x) / T * 1000.0 * scale
            x0 = (sigma_data**2 * x + tau * jnp.sqrt(tau**2 + sigma_data**2) * prediction.x0) / (
                tau**2 + sigma_data**2
            )
            return prediction._replace(x0=x0)

        return function

    return transform


def boundary_function(schedule: NoiseSchedule, parameterization: Parameterization) -> Transform:
    """A network's x̂0 as a consistency model's f(x, t), which is x at t = 0.

    A flow network's x̂0 = x - σ u is one as it is, whatever the network says, and then a sampler
    that knows no f draws it. The others' is that of `consistency_function`.
    """
    if parameterization is flow_prediction:
        return chain()
    return consistency_function(schedule.T)


# -------------------------------------------------------------------------------------------- steps


class SamplerState(NamedTuple):
    """What a solver carries: x [b, ...] at the current time, and its last x̂0 and λ (multistep
    solvers); `first` until a step was taken.

    λ and `first` are scalars, or [b] where each example has times of its own.
    """

    x: Array
    previous_x0: Array
    previous_log_snr: Array
    first: Array


Step = Callable[[Prediction, Any, Array, Array], Any]
"""(prediction at t, state, t, t_next) -> state at t_next, a `SamplerState` or the solver's own; t
and t_next scalar or [b].
"""


def start(x: Batch, *, own_times: bool = False) -> SamplerState:
    """The state before the first step, from x at the first time of the grid; `own_times` where each
    example has times of its own: then all of the state leads with the batch.
    """
    shape = x.shape[:1] if own_times else ()
    return SamplerState(x, jnp.zeros_like(x), jnp.zeros(shape, jnp.float32), jnp.ones(shape, bool))


@dataclass(frozen=True)
class OneTime:
    """A `Step` that takes one time for the whole batch: t and t_next scalar. All others also take
    times of each example, from `start(x, own_times=True)`.
    """

    name: str
    step: Step

    def __call__(self, prediction: Prediction, state: Any, t: Array, t_next: Array) -> Any:
        """The step. Raises ValueError for times of each example."""
        if jnp.ndim(t) or jnp.ndim(t_next):
            self.refuse()
        return self.step(prediction, state, t, t_next)

    def refuse(self) -> NoReturn:
        """Raise ValueError: the caller has times of each example."""
        raise ValueError(
            f"{self.name} takes one time for the whole batch, got one for each example; use ddim"
            " or dpm_solver_pp_2m"
        )


def ddim(schedule: NoiseSchedule) -> Step:
    """x_s = α_s x̂0 + σ_s ε̂ (DDIM, η = 0; Song et al. 2021, eq. 12). First order."""

    def step(prediction: Prediction, state: SamplerState, t: Time, t_next: Time) -> SamplerState:
        x = state.x
        x_next = (
            expand(schedule.alpha(t_next), x) * prediction.x0
            + expand(schedule.sigma(t_next), x) * prediction.eps
        )
        return state._replace(x=x_next.astype(x.dtype), first=jnp.zeros_like(state.first))

    return step


def dpm_solver_pp_2m(schedule: NoiseSchedule) -> Step:
    """DPM-Solver++(2M): x_s = (σ_s/σ_t) x - α_s (e^{-h} - 1) D, h = λ_s - λ_t (Lu et al. 2022, alg.
    2). Second order.

    D = x̂0 + (x̂0 - x̂0_prev) h / (2 h_prev); the first step, the step from zero SNR and the step
    to t = 0 are of first order (h is infinite there, and the limit is the DDIM step), and so is one
    after a step of no length. Times of each example need `start(x, own_times=True)`.
    """
    first_order = ddim(schedule)

    def step(prediction: Prediction, state: SamplerState, t: Array, t_next: Array) -> SamplerState:
        if jnp.ndim(t) != jnp.ndim(state.previous_log_snr):
            raise ValueError(
                f"dpm_solver_pp_2m got times of shape {jnp.shape(t)}; start with start(x,"
                f" own_times={jnp.ndim(t) > 0})"
            )
        lam, lam_next = log_snr(schedule, t), log_snr(schedule, t_next)
        h, h_previous = lam_next - lam, lam - state.previous_log_snr
        usable = ~state.first & jnp.isfinite(h) & jnp.isfinite(h_previous) & (h_previous != 0)
        ratio = expand(jnp.where(usable, h / jnp.where(usable, h_previous, 1.0), 0.0), state.x)
        data = prediction.x0 + 0.5 * ratio * (prediction.x0 - state.previous_x0)
        # The ε̂ that makes the first-order step carry D instead of x̂0; α_s x̂0 + σ_s ε̂ is exact
        # in both limits of h.
        alpha, sigma = expand(schedule.alpha(t), state.x), expand(schedule.sigma(t), state.x)
        eps = jnp.where(expand(usable, state.x), (state.x - alpha * data) / sigma, prediction.eps)
        out = first_order(Prediction(data, eps), state, t, t_next)
        return out._replace(previous_x0=prediction.x0.astype(state.x.dtype), previous_log_snr=lam)

    return step


class PLMSState(NamedTuple):
    """What `plms` carries: x at the current time, the last four ε̂ (newest first), the start x, and
    the call's number.
    """

    x: Array
    history: Array
    first_x: Array
    number: Array


def plms_start(x: Batch) -> PLMSState:
    """The state of `plms` before its first step."""
    return PLMSState(x, jnp.zeros((4, *x.shape), x.dtype), x, jnp.zeros((), jnp.int32))


def plms(
    schedule: NoiseSchedule,
    *,
    target: Target = eps_target,
    parameterization: Parameterization = eps_prediction,
) -> Step:
    """The DDIM step with ε̂ extrapolated from the last four calls (Liu et al. 2022, "PNDM", eq.
    12): Adams-Bashforth, fourth order.

    The first interval is taken twice: with ε̂ of its start, then from its start again with the mean
    of both ends' (diffusers' PNDM without Runge-Kutta steps). So the grid holds its second time
    twice, and a run of N steps makes N + 1 calls; the t_next of the second call is where its
    interval began. Starts from `plms_start`. t scalar.

    What is extrapolated is the output that `target` makes of a prediction and `parameterization`
    reads: ε̂, or as diffusers does it for a v network, v, which is not the same.
    """
    rows = (
        [1, 0, 0, 0],
        [1 / 2, 1 / 2, 0, 0],
        [3 / 2, -1 / 2, 0, 0],
        [23 / 12, -16 / 12, 5 / 12, 0],
        [55 / 24, -59 / 24, 37 / 24, -9 / 24],
    )
    coefficients = np.asarray(rows, np.float32)

    def step(prediction: Prediction, state: PLMSState, t: Array, t_next: Array) -> PLMSState:
        second = state.number == 1
        output = target(prediction.x0, prediction.eps, schedule.alpha(t), schedule.sigma(t))
        pushed = jnp.concatenate([output[None], state.history[:3]])
        row = jnp.asarray(coefficients)[jnp.minimum(state.number, 4)]
        x = jnp.where(second, state.first_x, state.x)
        start_t, end_t = jnp.where(second, t_next, t), jnp.where(second, t, t_next)
        x0, eps = parameterization(
            jnp.tensordot(row, pushed, axes=1), x, schedule.alpha(start_t), schedule.sigma(start_t)
        )
        moved = schedule.alpha(end_t) * x0 + schedule.sigma(end_t) * eps
        # The mean of the second call is no evaluation of the network: what is kept for the next
        # ones is the first output.
        history = jnp.where(second, state.history, pushed)
        return PLMSState(moved.astype(x.dtype), history, state.first_x, state.number + 1)

    return OneTime("plms", step)


class UniPCState(NamedTuple):
    """What `uni_pc` carries: x at the current time, the corrected x of the one before, x̂0 and time
    of the last two (newest first).

    number: of steps taken; left: of steps to come, 0 where the last one is as the others.
    """

    x: Array
    corrected: Array
    x0: Array
    times: Array
    number: Array
    left: Array


def uni_pc_start(x: Batch, left: int | Array = 0) -> UniPCState:
    """The state of `uni_pc` before its first step; `left` steps, the last of them of first order,
    or with 0 any number.
    """
    zero = jnp.zeros((), jnp.int32)
    return UniPCState(
        x,
        x,
        jnp.zeros((2, *x.shape), x.dtype),
        jnp.zeros(2, jnp.float32),
        zero,
        jnp.asarray(left, jnp.int32),
    )


def uni_pc(schedule: NoiseSchedule, *, linear: bool = False) -> Step:
    """UniPC-2 on x̂0 (Zhao et al. 2023, alg. 1 and 2, with data prediction): each x is corrected by
    the call that starts from it.

    With z = λ_t - λ_s from t to s and D = (x̂0_prev - x̂0)/r, r = (λ_prev - λ_t)/(λ_s - λ_t),

        UniP: x_s = (σ_s/σ_t) x_t - α_s ((e^z - 1) x̂0_t + B/2 · D),
        UniC: the same with (e^z - 1) x̂0_t + ρ D + ρ_c (x̂0_s - x̂0_t); ρ + ρ_c = φ, r ρ + ρ_c = 2
          (φ/z - 1/2), φ = (e^z - 1)/z - 1.

    B is e^z - 1 (the paper's B₂, "bh2"), or z where `linear` (B₁, "bh1"). The first step predicts
    without D and is corrected with B/2 · (x̂0_s - x̂0_t) alone; a last one of first order predicts
    without D, and it alone may end at s = 0. Starts from `uni_pc_start`. t scalar.
    """

    def interval(t: Array, t_next: Array) -> tuple[Array, Array, Array]:
        z = log_snr(schedule, t) - log_snr(schedule, t_next)
        return z, jnp.expm1(z), z if linear else jnp.expm1(z)

    def step(prediction: Prediction, state: UniPCState, t: Array, t_next: Array) -> UniPCState:
        before, earlier = state.times
        # From the time before to this one, once more, now that x̂0 is known at both ends. The first
        # call corrects nothing.
        z, grown, b = interval(before, t)
        r = (log_snr(schedule, earlier) - log_snr(schedule, before)) / -z
        phi = grown / z - 1.0
        rho = (phi - 2.0 * (phi / z - 0.5)) / (1.0 - r)
        change = prediction.x0 - state.x0[0]
        curved = rho * (state.x0[1] - state.x0[0]) / r + (phi - rho) * change
        data = grown * state.x0[0] + jnp.where(state.number == 1, 0.5 * b * change, curved)
        corrected = (
            schedule.sigma(t) / schedule.sigma(before) * state.corrected - schedule.alpha(t) * data
        )
        x = jnp.where(state.number == 0, state.x, corrected)

        z, grown, b = interval(t, t_next)
        r = (log_snr(schedule, before) - log_snr(schedule, t)) / -z
        curved = 0.5 * b * (state.x0[0] - prediction.x0) / r
        data = grown * prediction.x0 + jnp.where(
            (state.number == 0) | (state.left == 1), 0.0, curved
        )
        x_next = schedule.sigma(t_next) / schedule.sigma(t) * x - schedule.alpha(t_next) * data
        x0 = jnp.stack([prediction.x0.astype(x.dtype), state.x0[0]])
        return UniPCState(
            x_next.astype(x.dtype),
            x.astype(state.x.dtype),
            x0,
            jnp.stack([t, before]),
            state.number + 1,
            state.left - 1,
        )

    return OneTime("uni_pc", step)


class Counted(NamedTuple):
    """A solver's state and the number of steps that are left."""

    state: Any
    left: Array

    @property
    def x(self) -> Array:
        """At the current time."""
        return self.state.x


def last_by(step: Step, last: Step) -> Step:
    """`step`, and `last` where one step is left; both on the state inside a `Counted`. t scalar.

    Left 0 is never counted down to one.
    """

    def counted(prediction: Prediction, state: Counted, t: Array, t_next: Array) -> Counted:
        taken, ended = (solver(prediction, state.state, t, t_next) for solver in (step, last))
        return Counted(
            jax.tree.map(lambda a, b: jnp.where(state.left == 1, b, a), taken, ended),
            state.left - 1,
        )

    return OneTime("last_by", counted)


def keys_of(noise: Batch) -> Array:
    """Keys [b] that are functions of each image's own start, not of its batch."""
    first = noise[
        (slice(None), *(0,) * (noise.ndim - 1))
    ]  # b may be free, as in an exported program
    bits = jax.lax.bitcast_convert_type(first.astype(jnp.float32), jnp.uint32)
    return jax.vmap(jax.random.key)(bits)


def fresh_noise(key: Array, t: Array, like: Array) -> Array:
    """Standard normal of like's shape and type, a function of key and time. t scalar.

    `key` is one, or [b] for images that do not depend on their batch.
    """
    bits = jax.lax.bitcast_convert_type(jnp.asarray(t, jnp.float32), jnp.uint32)
    if jnp.ndim(key):
        return jax.vmap(
            lambda k: jax.random.normal(jax.random.fold_in(k, bits), like.shape[1:], like.dtype)
        )(key)
    return jax.random.normal(jax.random.fold_in(key, bits), like.shape, like.dtype)


def ancestral(schedule: NoiseSchedule, key: Array) -> Step:
    """x_s = α_s x̂0 + σ_s (ρ ε̂ + √(1 - ρ²) ε), ρ = σ_s α_t / (α_s σ_t), ε drawn afresh: DDIM with
    η = 1 (Song et al. 2021, eq. 12).

    A draw from q(x_s | x_t, x̂0) (Ho et al. 2020, eq. 7); k-diffusion's "Euler ancestral". `key` is
    one key, or [b] for images that do not depend on their batch; the noise of a step is a function
    of key and t_next. t and t_next scalar.
    """

    def step(prediction: Prediction, state: SamplerState, t: Array, t_next: Array) -> SamplerState:
        noise = fresh_noise(key, t_next, state.x)
        alpha, sigma = schedule.alpha(t_next), schedule.sigma(t_next)
        kept = sigma * schedule.alpha(t) / (alpha * schedule.sigma(t))
        x = alpha * prediction.x0 + sigma * (
            kept * prediction.eps + jnp.sqrt(jnp.maximum(1.0 - kept**2, 0.0)) * noise
        )
        return state._replace(x=x.astype(state.x.dtype), first=jnp.zeros_like(state.first))

    return OneTime("ancestral", step)


def renoise(schedule: NoiseSchedule, key: Array) -> Step:
    """x_s = α_s x̂0 + σ_s ε with ε drawn afresh (multistep consistency sampling; Song et al. 2023,
    alg. 1).

    `key` is one key, or [b] for images that do not depend on their batch. The noise of a step is a
    function of key and t_next: t_next scalar, one time for the whole batch.
    """

    def step(prediction: Prediction, state: SamplerState, t: Array, t_next: Array) -> SamplerState:
        noise = fresh_noise(key, t_next, state.x)
        x_next = schedule.alpha(t_next) * prediction.x0 + schedule.sigma(t_next) * noise
        return state._replace(x=x_next.astype(state.x.dtype), first=jnp.zeros_like(state.first))

    return OneTime("renoise", step)


# ------------------------------------------------------------------------------------------ rollout


class Trajectory(NamedTuple):
    """What a rollout visited: x, x0 and eps [N, b, ...] at the times t [N] (or [N, b])."""

    t: Array
    x: Array
    x0: Array
    eps: Array


def scan(
    body: Callable[[Any, Any], tuple[Any, Any]], first: Any, inputs: Any, *, unroll: bool
) -> tuple[Any, Any]:
    """`lax.scan` that with `unroll` leaves no loop, one step included.

    `lax.scan(unroll=True)` keeps a loop of one step as a loop, and XLA's CPU backend runs the
    gradient of a convolution's weights inside a loop many times slower.
    """
    if not unroll or len(jax.tree.leaves(inputs)[0]) != 1:
        return jax.lax.scan(body, first, inputs, unroll=unroll)
    last, output = body(first, jax.tree.map(lambda x: x[0], inputs))
    return last, jax.tree.map(lambda x: x[None], output)


def rollout(
    step: Step,
    denoiser: Denoiser,
    state: SamplerState,
    grid: Array | TimeGrid,
    *,
    t_end: float | Array = 0.0,
    stop_gradient: bool = False,
    unroll: bool = False,
) -> tuple[SamplerState, Trajectory]:
    """Run the solver from grid[0] to t_end by `lax.scan`: one network call for each time of the
    grid.

    With `stop_gradient` the carried state is cut, so each x̂0 of the trajectory depends on the
    parameters through its own network call only (backward distillation; Imagine Flash, section
    3.1).

    Args:
      step: the solver.
      denoiser: (x, t) -> Prediction.
      state: `start(x)` with x at the time grid[0].
      grid: decreasing times [N], or [N, b] for times of each example.
      t_end: where the last step ends; 0 gives clean samples.
      stop_gradient: cut the gradient of the carried state.
      unroll: compile one copy of the body a step. Longer to compile; XLA's CPU backend runs
        convolutions inside a loop on one thread and without its fast kernels.

    Returns:
      The state at t_end and the trajectory of the N visited states.
    """
    times = jnp.asarray(grid, jnp.float32)
    next_times = jnp.concatenate(
        [times[1:], jnp.broadcast_to(jnp.asarray(t_end, jnp.float32), times[:1].shape)]
    )

    def body(state: SamplerState, pair: tuple[Array, Array]) -> tuple[SamplerState, Trajectory]:
        t, t_next = pair
        if stop_gradient:
            state = jax.lax.stop_gradient(state)
        prediction = denoiser(state.x, t)
        return step(prediction, state, t, t_next), Trajectory(t, state.x, *prediction)

    final, trajectory = scan(body, state, (times, next_times), unroll=unroll)
    return (jax.lax.stop_gradient(final) if stop_gradient else final), trajectory
