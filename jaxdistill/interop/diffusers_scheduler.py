"""A scheduler_config.json as a schedule, a solver and the times of a run; and the config of a
student's scheduler.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy.special import betaincinv

from jaxdistill import prediction, sampling
from jaxdistill import schedule as schedules
from jaxdistill.interop.diffusers_folder import Folder, FolderError
from jaxdistill.prediction import Parameterization, Prediction, Target
from jaxdistill.sampling import Denoiser, Step, TimeGrid, Transform, consistency_function
from jaxdistill.schedule import NoiseSchedule

SPACINGS = ("trailing", "leading", "linspace")
PREDICTIONS = {
    "epsilon": (prediction.eps_prediction, prediction.eps_target),
    "v_prediction": (prediction.v_prediction, prediction.v_target),
    "sample": (prediction.x0_prediction, prediction.x0_target),
}
BETAS: dict[str, Callable[[int, float, float], np.ndarray]] = {
    "linear": lambda n, start, end: even(n, start, end),
    "scaled_linear": lambda n, start, end: even(n, start**0.5, end**0.5) ** 2,
    "squaredcos_cap_v2": lambda n, start, end: schedules.cosine_betas(n),
}
NOISE_CORRECTION = "NoiseCorrectionDDIMScheduler"
"""A class of its own that students' folders once had: DDIM with noise correction."""
DDIM, PNDM, EULER, ANCESTRAL = (
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
)
DPM, UNIPC, LCM = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "LCMScheduler"
CLASSES = (DDIM, PNDM, EULER, ANCESTRAL, DPM, UNIPC, LCM, NOISE_CORRECTION)
SOLVERS = {"ddim": DDIM, "dpm_solver_pp_2m": DPM}
INSTEAD = f"choose --solver={' or '.join(SOLVERS)} (in a run config.teacher.solver)"
RATIOS: dict[str, Callable[..., np.ndarray]] = {
    "use_karras_sigmas": sampling.karras_ratios,
    "use_exponential_sigmas": sampling.exponential_ratios,
    "use_beta_sigmas": partial(
        sampling.quantile_ratios, quantile=lambda p: betaincinv(0.6, 0.6, p)
    ),
}
"""Settings that space the steps by sigma/alpha, not by time."""
OFF = (*RATIOS, "use_lu_lambdas", "use_flow_sigmas", "thresholding", "euler_at_final")
"""Settings that must be off, but for those of `ON`."""
ON = {EULER: tuple(RATIOS), DPM: (*RATIOS, "euler_at_final"), UNIPC: tuple(RATIOS)}
SIGMAS = (EULER, ANCESTRAL, DPM, UNIPC)
"""Classes that think in sigma/alpha: their steps meet the next time of the grid."""
NOT_PREDICTED = {PNDM: ("sample",), ANCESTRAL: ("sample",)}
"""Prediction types that diffusers does not have for a class."""
ENDS: dict[str, tuple[Any, ...]] = {
    "sigma_min": (None,),
    "sigma_max": (None,),
    "final_sigmas_type": ("zero", "sigma_min"),
}
FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    PNDM: {"skip_prk_steps": (True,)},
    EULER: {
        "interpolation_type": ("linear",),
        "timestep_type": ("discrete",),
        **ENDS,
        "final_sigmas_type": ("zero",),
    },
    DPM: {
        "algorithm_type": ("dpmsolver++",),
        "solver_order": (2,),
        "solver_type": ("midpoint",),
        "lambda_min_clipped": (-math.inf, "-Infinity"),
        **ENDS,
    },
    UNIPC: {
        "solver_order": (2,),
        "solver_type": ("bh2", "bh1"),
        "predict_x0": (True,),
        "disable_corrector": ([],),
        "solver_p": (None,),
        **ENDS,
    },
}
"""Settings whose values are implemented."""
DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
}
"""Diffusers' own, but for LCM's."""
LCM_DEFAULTS = {
    **DEFAULTS,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
STUDENT_SOLVERS = ("ddim", "renoise", "consistency")
RENOISE_SCALING = 1e6
"""LCM's timestep_scaling at which c_skip x vanishes beside c_out x̂0 = x̂0 in float32."""


class Run(NamedTuple):
    """One run of a scheduler: a network call at each of `times`, a step from there to `next_times`,
    from x = noise · `scale`.

    left: the number of steps where the last of them is a lower one, 0 where it is as the others.
    """

    times: np.ndarray
    next_times: np.ndarray
    scale: float
    left: int = 0


@runtime_checkable
class AnyRuns(Protocol):
    """A scheduler's runs."""

    @property
    def counts(self) -> tuple[int, ...]:
        """The only numbers of steps, where not all are meant."""

    @property
    def most(self) -> int:
        """The largest number of steps."""

    def __call__(self, steps: int, tokens: int = 0) -> Run:
        """The run of so many steps for images of so many tokens, by which a shift of flow matching
        may go. Raises ValueError.
        """


class Scheduler(NamedTuple):
    """What a scheduler config says, as functions of the core.

    solver: noise -> the steps of the images that start from it, on which fresh noise depends;
    start: (x, left) -> the first state; timestep_scaling: of LCM's boundary condition, 0 where
    there is none.
    """

    schedule: NoiseSchedule
    parameterization: Parameterization
    solver: Callable[[Array], Step]
    start: Callable[[Array, Array], Any]
    run: "AnyRuns"
    clip: float
    noise_correction: bool
    timestep_scaling: float

    def transform(self, denoiser: Denoiser, noise: Array) -> Denoiser:
        """The scheduler's own transforms: noise correction, clipping of x̂0, LCM's f(x, t)."""
        if self.noise_correction:
            denoiser = sampling.noise_correction(noise, self.schedule.T)(denoiser)
        if self.clip:
            denoiser = sampling.clip(self.schedule, -self.clip, self.clip, keep_eps=True)(denoiser)
        if self.timestep_scaling:
            denoiser = boundary_condition(self.timestep_scaling)(denoiser)
        return denoiser

    def begin(self, noise: Array, run: Run) -> Any:
        """The state before the run's first step."""
        return self.start(noise * run.scale, jnp.int32(run.left))

    def advance(self, denoiser: Denoiser, state: Any, noise: Array, t: Array, t_next: Array) -> Any:
        """One network call and the step; `noise` is what the run began with."""
        return self.solver(noise)(self.transform(denoiser, noise)(state.x, t), state, t, t_next)


def even(n: int, start: float, end: float) -> np.ndarray:
    """From start to end, float32 [n]: torch's linspace, which counts from both ends in float32
    steps and rounds once.
    """
    first, last, i = np.float32(start), np.float32(end), np.arange(n)
    step = np.float64((last - first) / np.float32(n - 1))
    return np.where(i < n // 2, first + step * i, last - step * (n - 1 - i)).astype(np.float32)


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with its class's own betas where it names none."""
    return {**(LCM_DEFAULTS if config.get("_class_name") == LCM else DEFAULTS), **config}


def betas_of(config: Mapping[str, Any], where: Path) -> np.ndarray:
    """The betas [n], rescaled to zero terminal SNR where the config says so. Raises FolderError."""
    config = with_defaults(config)
    name = config["beta_schedule"]
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], np.float64)
    elif name in BETAS:
        betas = BETAS[name](
            int(config["num_train_timesteps"]), config["beta_start"], config["beta_end"]
        )
    else:
        raise FolderError(
            f"{where}: beta_schedule = {name!r} is not supported, only {', '.join(BETAS)}"
        )
    # Diffusers keeps 1 - beta as float32; what a fraction of a timestep is cut to may hang on the
    # last bit.
    betas = 1.0 - (np.float32(1.0) - betas.astype(np.float32)).astype(np.float64)
    return (
        schedules.rescale_zero_terminal_snr(betas)
        if config.get("rescale_betas_zero_snr")
        else betas
    )


def timesteps(kind: str, spacing: str, count: int, steps: int, offset: int) -> np.ndarray:
    """Diffusers' own [N], decreasing, of a class and a spacing of times."""
    if spacing == "trailing":
        return np.round(np.arange(count, 0, -count / steps)) - 1
    if kind in (DPM, UNIPC):
        if spacing == "linspace":
            return np.linspace(0, count - 1, steps + 1).round()[::-1][:-1]
        return (np.arange(steps + 1) * (count // (steps + 1)))[::-1][:-1] + offset
    if spacing == "linspace":
        apart = np.linspace(0, count - 1, steps)[::-1]
        return apart if kind in (EULER, ANCESTRAL) else apart.round()
    return (np.arange(steps) * (count // steps))[::-1] + offset


def lcm_timesteps(count: int, steps: int, original: int) -> np.ndarray:
    """LCM's own [N], decreasing: every (original / N)-th, rounded down, of the `original` timesteps
    that the training skips between, which are count // original apart (Luo et al. 2023, alg. 3).
    """
    skipped = np.arange(original, 0, -1) * (count // original) - 1
    return skipped[np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)]


def told(setting: str, kind: str, config: Mapping[str, Any]) -> Callable[[Any, Any], Any] | None:
    """(np or jnp, timesteps) -> those that the network is told, where steps are spaced by a key of
    `RATIOS`; None is as they are.

    Euler's are fractions. The others' become integers: Karras' are rounded, the rest (and in
    DPM-Solver Karras' of cosine betas) cut.
    """
    if not setting or kind == EULER:
        return None
    rounded = setting == "use_karras_sigmas" and (
        kind == UNIPC or config.get("beta_schedule") != "squaredcos_cap_v2"
    )
    return (
        (lambda library, i: library.round(i)) if rounded else (lambda library, i: library.floor(i))
    )


def boundary_condition(timestep_scaling: float) -> Transform:
    """LCM's f(x, t) = c_skip x + c_out x̂0 with τ = timestep_scaling · (t - 1): of diffusers'
    timestep, which is our time less one.
    """
    function = consistency_function(1000.0, scale=timestep_scaling)

    def transform(denoiser: Denoiser) -> Denoiser:
        def bounded(x: Array, t: Array) -> Prediction:
            prediction = denoiser(x, t)
            return function(lambda *_: prediction)(x, t - 1.0)

        return bounded

    return transform


# ------------------------------------------------------------------------------------ what is read


def check_process(config: Mapping[str, Any], where: Path) -> None:
    """Raise FolderError where the networks of a scheduler config are of another process than
    x_t = α_t x_0 + σ_t ε with betas: no solver of ours steps along that.
    """
    name = str(config.get("_class_name"))
    flow = name.startswith("FlowMatch") or config.get("use_flow_sigmas")
    if flow or "flow" in str(config.get("prediction_type")):
        process = "flow matching"
    elif name.startswith("EDM") or config.get("sigma_data") is not None:
        process = "EDM's process of sigmas"
    elif config.get("timestep_type", "discrete") != "discrete":
        process = "a process of continuous noise levels"
    elif config.get("snr_shift_scale", 1.0) not in (None, 1.0):
        process = "a process with a shifted SNR"
    elif name in CLASSES or any(config.get(k) is not None for k in ("beta_end", "trained_betas")):
        return
    else:
        process = "a process without betas"
    raise FolderError(
        f"{where}: {name} says that the network is of {process}; of this family only networks that"
        " were trained on a schedule of betas are supported, whatever the solver"
    )


def class_of(config: Mapping[str, Any], where: Path, solver: str | None) -> str:
    """The class whose steps are taken. Raises FolderError."""
    name = str(config.get("_class_name"))
    if solver is not None:
        if solver not in SOLVERS:
            raise FolderError(
                f"solver = {solver!r} is not known; choose one of {', '.join(SOLVERS)}"
            )
        return SOLVERS[solver]
    if name not in CLASSES:
        raise FolderError(
            f"{where}: the scheduler {name!r} is not supported, only {', '.join(CLASSES)};"
            f" {INSTEAD}"
        )
    return name


def check_settings(config: Mapping[str, Any], where: Path, kind: str, *, own: bool) -> None:
    """Raise FolderError for a setting that is not supported; a chosen solver (`own` False) has no
    settings but for thresholding.
    """
    for key in OFF if own else ("thresholding",):
        if config.get(key) and key not in ON.get(kind, ()):
            # No solver of ours has thresholding: choosing another one is no way out.
            mend = "" if key == "thresholding" else f"{INSTEAD}, or "
            raise FolderError(
                f"{where}: {key} = {config[key]!r} is not supported; {mend}set it to false"
            )
    for key, allowed in FIXED.get(kind, {}).items() if own else ():
        value = config.get(key, False if key == "skip_prk_steps" else allowed[0])
        if value not in allowed:
            raise FolderError(
                f"{where}: {key} = {value!r} is not supported, only"
                f" {' or '.join(map(repr, allowed))}; {INSTEAD}"
            )


def spacing_of(config: Mapping[str, Any], kind: str, grid: str | None) -> str:
    """One of SPACINGS, or LCM for that class's own. Raises FolderError."""
    if kind == LCM and grid is None:
        return LCM  # whatever timestep_spacing says
    default = "linspace" if kind in SIGMAS else "leading"
    spacing = str(grid or config.get("timestep_spacing") or default)
    if spacing not in SPACINGS:
        raise FolderError(
            f"timestep spacing {spacing!r} is not known; choose one of {', '.join(SPACINGS)}"
        )
    return spacing


def ratio_setting(config: Mapping[str, Any], where: Path, kind: str) -> str:
    """The key of RATIOS by which the steps are spaced, "" where there is none. Raises
    FolderError.
    """
    chosen = [key for key in ON.get(kind, ()) if key in RATIOS and config.get(key)]
    if len(chosen) > 1:
        raise FolderError(
            f"{where}: {' and '.join(chosen)} exclude each other; set one of them to false, or"
            f" {INSTEAD}"
        )
    return chosen[0] if chosen else ""


def predicted(config: Mapping[str, Any], where: Path, kind: str) -> tuple[Parameterization, Target]:
    """What the network's output means. Raises FolderError."""
    predicts = config.get("prediction_type", "epsilon")
    if predicts not in PREDICTIONS:
        raise FolderError(
            f"{where}: prediction_type = {predicts!r} is not supported, only"
            f" {', '.join(PREDICTIONS)}"
        )
    if predicts in NOT_PREDICTED.get(kind, ()):
        raise FolderError(
            f"{where}: {kind} with prediction_type = {predicts!r} is not supported; {INSTEAD}"
        )
    return PREDICTIONS[predicts]


def ends_clean(config: Mapping[str, Any], where: Path, kind: str) -> bool:
    """Whether the last step ends at 0, not at the first timestep of the training. Raises
    FolderError.
    """
    if kind in (ANCESTRAL, LCM):
        return True
    if kind not in SIGMAS:
        return bool(config.get("set_alpha_to_one", kind != PNDM))
    clean = config.get("final_sigmas_type", "zero") == "zero"
    if kind == UNIPC and clean:
        # Diffusers' ends in NaN there: B(h) = h or D of an infinite step.
        for key, value in (("solver_type", "bh1"), ("lower_order_final", False)):
            if config.get(key, True) == value:
                raise FolderError(
                    f"{where}: {key} = {value!r} cannot step to final_sigmas_type = 'zero'; set"
                    f" 'sigma_min', or {INSTEAD}"
                )
    return clean


def checked_betas(
    config: Mapping[str, Any], where: Path, kind: str, parameterization: Parameterization
) -> np.ndarray:
    """The betas [n] as the class uses them. Raises FolderError, also where the prediction cannot
    start from them.
    """
    zero_snr = bool(config.get("rescale_betas_zero_snr"))
    if zero_snr and kind == PNDM:
        raise FolderError(
            f"{where}: diffusers' PNDM ignores rescale_betas_zero_snr = True; {INSTEAD}, or"
            " set it to false"
        )
    try:
        betas = betas_of(config, where)
        prediction.check_pair(schedules.ddpm(betas), parameterization)
        if zero_snr and kind in SIGMAS:
            # Diffusers keeps these off infinity by a smallest alpha-bar of 2^-24, and so the first
            # step is a huge but finite one.
            betas = np.append(betas[:-1], 1.0 - 2.0**-24 / np.prod(1.0 - betas[:-1]))
            schedules.ddpm(betas)
    except FolderError:
        raise
    except (TypeError, ValueError) as error:
        raise FolderError(f"{where}: {error}") from None
    return betas


def lcm_settings(config: Mapping[str, Any], where: Path, count: int) -> tuple[int, float]:
    """original_inference_steps and timestep_scaling. Raises FolderError."""
    original = int(config.get("original_inference_steps", 50))
    scaling = float(config.get("timestep_scaling", 10.0))
    if not 1 <= original <= count:
        raise FolderError(
            f"{where}: original_inference_steps must be in 1..{count}, the timesteps of the"
            f" training, got {original}"
        )
    if not 0 < scaling < math.inf:
        raise FolderError(f"{where}: timestep_scaling must be above 0 and finite, got {scaling}")
    return original, scaling


@dataclass(frozen=True, eq=False)
class Runs:
    """The runs of a scheduler, called with their number of steps.

    spacing: as of `spacing_of`; by_ratio: of `ratio_setting`; original: of `lcm_settings`; clean:
    of `ends_clean`; betas, schedule: as the class reads them; counts: the only numbers of steps,
    where not all are meant; listed: {steps: diffusers' timesteps} instead of a rule.
    """

    kind: str
    config: Mapping[str, Any]
    spacing: str
    by_ratio: str
    offset: int
    original: int
    clean: bool
    betas: np.ndarray
    schedule: NoiseSchedule
    counts: tuple[int, ...] = ()
    listed: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def most(self) -> int:
        """The largest number of steps."""
        if self.counts:
            return max(self.counts)
        return self.original if self.spacing == LCM else len(self.betas)

    def __call__(self, steps: int, tokens: int = 0) -> Run:
        """The run of so many steps, of `counts` or in 1..most; images of all sizes have the same.
        Raises ValueError.
        """
        if self.counts and steps not in self.counts:
            raise ValueError(f"steps must be {one_of(self.counts)}, got {steps}")
        if not 1 <= steps <= self.most:
            raise ValueError(f"steps must be in 1..{self.most}, got {steps}")
        count = len(self.betas)
        by_rule = steps not in self.listed
        times = self.by_sigma(steps) if self.by_ratio and by_rule else self.timesteps(steps) + 1.0
        next_times = self.following(times, count // steps if by_rule else None)
        if self.kind == PNDM and steps > 1:
            # The second call repeats the first interval, from where it is taken to begin.
            began = times[1] + count // steps
            times, next_times = np.insert(times, 1, times[1]), np.insert(next_times, 1, began)
        scale = 1.0
        if self.kind in (EULER, ANCESTRAL) and self.spacing != "leading":
            scale = float(self.schedule.sigma(jnp.float32(times[0])))
        return Run(
            times.astype(np.float32),
            next_times.astype(np.float32),
            scale,
            len(times) if self.ends_lower(len(times)) else 0,
        )

    def timesteps(self, steps: int) -> np.ndarray:
        """Diffusers' own, float64 [N]."""
        if steps in self.listed:
            return np.asarray(self.listed[steps], np.float64)
        count = len(self.betas)
        found = (
            lcm_timesteps(count, steps, self.original)
            if self.spacing == LCM
            else timesteps(self.kind, self.spacing, count, steps, self.offset)
        )
        return found.astype(np.float64)

    def by_sigma(self, steps: int) -> np.ndarray:
        """Times [N] float32 of steps that are even in sigma/alpha."""
        ratios, known = ratios_of(self.betas), np.arange(len(self.betas))
        # Euler spaces between the ends of its times, the others between those of the training.
        ends = self.timesteps(steps)[[0, -1]] if self.kind == EULER else known[[-1, 0]]
        found = np.interp(
            np.log(RATIOS[self.by_ratio](steps, *np.interp(ends, known, ratios))),
            np.log(ratios),
            known,
        )
        times = (found + 1.0).astype(np.float32)
        integers = told(self.by_ratio, self.kind, self.config)
        if integers is None:
            return times
        # A timestep just below an integer is cut to the one before, and must not become that
        # integer as a float32.
        whole = integers(np, found)
        return np.where(
            integers(np, times - 1.0) == whole, times, np.nextafter(times, np.float32(whole + 1.0))
        )

    def following(self, times: np.ndarray, width: int | None) -> np.ndarray:
        """Where the step from each of the times ends: at the next one, or `width` away."""
        end = 0.0 if self.clean else 1.0
        if width is None or self.kind in SIGMAS or self.kind == LCM:
            # UniPC's sigma_min is that of its own steps, so that the last one is empty.
            empty = self.kind == UNIPC and self.by_ratio and not self.clean
            return np.append(times[1:], times[-1] if empty else end)
        # Their steps have one length, whatever the grid: a step may end beside the next time.
        return np.where(times - width < 1.0, end, times - width)

    def ends_lower(self, calls: int) -> bool:
        """Whether the last step is one of a lower order."""
        lower = bool(self.config.get("lower_order_final", True))
        if self.kind == UNIPC:
            return lower
        return bool(self.config.get("euler_at_final")) or (lower and calls < 15)


def one_of(counts: Sequence[int]) -> str:
    """(2, 4, 8) -> "2, 4 or 8"."""
    *most, last = map(str, counts)
    return f"{', '.join(most)} or {last}" if most else last


def latent_settings(
    config: Mapping[str, Any], kind: str, *, xl: bool, own: bool
) -> tuple[int, float]:
    """steps_offset, and the range to which x̂0 is clipped (0: it is not).

    Stable Diffusion's pipeline, but not XL's, corrects two defaults of old configs: it never clips
    latents, and its leading grid starts at 1.
    """
    if not xl:
        return 1, 0.0
    clips = kind in (DDIM, LCM) and config.get("clip_sample", own and kind == DDIM)
    return int(config.get("steps_offset", 0)), (
        float(config.get("clip_sample_range", 1.0)) if clips else 0.0
    )


def read(
    config: Mapping[str, Any],
    where: Path,
    *,
    xl: bool = False,
    grid: str | None = None,
    solver: str | None = None,
    noise_correction: bool | None = None,
) -> Scheduler:
    """The scheduler of a folder.

    Args:
      config: scheduler_config.json.
      where: its path, for messages.
      xl: of an XL pipeline. The others of Stable Diffusion override two old defaults, and so does
        this function.
      grid: one of SPACINGS instead of the config's timestep_spacing, of its spacing by sigma/alpha
        and of LCM's own.
      solver: a key of SOLVERS instead of the config's class.
      noise_correction: on or off; by default on for the class `NOISE_CORRECTION`.

    Raises:
      FolderError: another process, a class or setting that is not supported, or eps prediction
        with zero terminal SNR.
    """
    own = solver is None
    check_process(config, where)
    kind = class_of(config, where, solver)
    check_settings(config, where, kind, own=own)
    spacing = spacing_of(config, kind, grid)
    by_ratio = ratio_setting(config, where, kind) if own and grid is None else ""
    parameterization, target = predicted(config, where, kind)
    clean = ends_clean(config, where, kind)
    betas = checked_betas(config, where, kind, parameterization)
    original, scaling = lcm_settings(config, where, len(betas)) if kind == LCM else (0, 0.0)
    offset, clip = latent_settings(config, kind, xl=xl, own=own)
    schedule = schedules.ddpm(betas)
    if kind in (EULER, ANCESTRAL) or by_ratio:
        schedule = schedules.linear_ratio(schedule, log=bool(by_ratio))
    integers = told(by_ratio, kind, config)
    if integers is not None:
        schedule = schedule._replace(
            network_time=lambda t: integers(jnp, jnp.asarray(t, jnp.float32) - 1.0)
        )
    step, start = solver_of(
        kind, schedule, parameterization, target, linear=config.get("solver_type") == "bh1"
    )
    run = Runs(kind, config, spacing, by_ratio, offset, original, clean, betas, schedule)
    if noise_correction is None:
        noise_correction = config.get("_class_name") == NOISE_CORRECTION
    return Scheduler(schedule, parameterization, step, start, run, clip, noise_correction, scaling)


def ratios_of(betas: np.ndarray) -> np.ndarray:
    """Sigma/alpha of the n training steps, increasing."""
    bar = np.cumprod(1.0 - betas).astype(np.float32)
    return np.sqrt((np.float32(1.0) - bar) / bar)


def solver_of(
    kind: str,
    schedule: NoiseSchedule,
    parameterization: Parameterization,
    target: Target,
    *,
    linear: bool,
) -> tuple[Callable[[Array], Step], Callable[[Array, Array], Any]]:
    """`Scheduler.solver` and `Scheduler.start` of a class; `linear` as of `uni_pc`."""
    fresh = {ANCESTRAL: sampling.ancestral, LCM: sampling.renoise}
    if kind in fresh:
        return lambda noise: fresh[kind](
            schedule, sampling.keys_of(noise)
        ), lambda x, left: sampling.start(x)
    if kind == PNDM:
        plms = sampling.plms(schedule, target=target, parameterization=parameterization)
        return lambda noise: plms, lambda x, left: sampling.plms_start(x)
    if kind == UNIPC:
        uni_pc = sampling.uni_pc(schedule, linear=linear)
        return lambda noise: uni_pc, sampling.uni_pc_start
    ddim = sampling.ddim(schedule)
    if kind == DPM:
        step = sampling.last_by(sampling.dpm_solver_pp_2m(schedule), ddim)
        return lambda noise: step, lambda x, left: sampling.Counted(sampling.start(x), left)
    return lambda noise: ddim, lambda x, left: sampling.start(x)


def of_folder(folder: Folder, **options: Any) -> Scheduler:
    """The folder's scheduler; `options` as of `read`. Raises FolderError."""
    return folder.family.scheduler(folder, **options)


def config_path(folder: Folder) -> Path:
    """Where the folder's scheduler config is."""
    return folder.path / "scheduler" / "scheduler_config.json"


# -------------------------------------------------------------------------------------- students


def original_steps(T: float) -> int:
    """A student's original_inference_steps: 50 as LCM has them, or T where 50 does not divide it,
    so that the first timestep is always T - 1.
    """
    return 50 if T % 50 == 0 else int(T)


def student_grid(solver: str, steps: int, T: float) -> TimeGrid:
    """The times [N] at which stock diffusers calls a student of `student_config` in N steps: its
    timesteps + 1, of which the first is T.

    Trailing times for "ddim", LCM's own for "renoise" and "consistency". Raises ValueError.
    """
    check_solver(solver)
    if solver == "ddim":
        return sampling.check_grid(sampling.trailing_grid(steps, T, discrete=True), T)
    most = original_steps(T)
    if not 1 <= steps <= most:
        raise ValueError(f"steps of {solver} must be in 1..{most}, got {steps}")
    return sampling.check_grid(lcm_timesteps(int(T), steps, most) + 1, T)


def student_timesteps(config: Mapping[str, Any], steps: int) -> list[int]:
    """The timesteps [N] at which stock diffusers calls a student of this scheduler_config.json.

    Raises FolderError, and ValueError for a number of steps that the scheduler does not have.
    """
    run = read(config, Path("scheduler_config.json"), xl=True).run(steps)
    return [round(float(t)) - 1 for t in run.times]


def student_config(
    teacher: Mapping[str, Any],
    *,
    solver: str = "ddim",
    where: Path = Path("scheduler_config.json"),
) -> dict[str, Any]:
    """The scheduler config of a student, of a stock class, with the teacher's betas and prediction.

    Args:
      teacher: its scheduler_config.json.
      solver: "ddim": DDIM on trailing times to clean images. "consistency": LCM's scheduler, x_s =
        α_s f(x_t, t) + σ_s ε with ε fresh. "renoise": the same with x̂0 instead of f, by a
        timestep_scaling at which f = x̂0.
      where: the teacher's file, for messages.

    Raises:
      ValueError: an unknown solver.
      FolderError: a teacher of another process.
    """
    check_solver(solver)
    check_process(teacher, where)
    teacher = with_defaults(teacher)
    kept = (*DEFAULTS, "trained_betas", "prediction_type", "rescale_betas_zero_snr")
    common = {
        **{key: teacher[key] for key in kept if key in teacher},
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 1,
        "thresholding": False,
        "timestep_spacing": "trailing",
    }
    if solver == "ddim":
        return {"_class_name": DDIM, **common}
    T = float(teacher["num_train_timesteps"])
    return {
        "_class_name": LCM,
        **common,
        "original_inference_steps": original_steps(T),
        # `consistency_function` counts T as 1000, diffusers as T.
        "timestep_scaling": RENOISE_SCALING if solver == "renoise" else 10.0 * 1000.0 / T,
    }


def check_solver(solver: str) -> None:
    """Raise ValueError for a solver that no student has."""
    if solver not in STUDENT_SOLVERS:
        raise ValueError(
            f"a student's solver = {solver!r} is not known; choose one of"
            f" {', '.join(STUDENT_SOLVERS)}"
        )
