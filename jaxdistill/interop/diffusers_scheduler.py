"""A scheduler_config.json as a schedule, a solver and the times of a run; and the config and code
of a student's scheduler.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy.special import betaincinv

from jaxdistill import prediction, sampling
from jaxdistill import schedule as schedules
from jaxdistill.interop.diffusers_folder import Folder, FolderError
from jaxdistill.prediction import Parameterization, Target
from jaxdistill.sampling import Denoiser, Step
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
DDIM, PNDM, EULER, ANCESTRAL = (
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
)
DPM, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
CLASSES = (DDIM, PNDM, EULER, ANCESTRAL, DPM, UNIPC, NOISE_CORRECTION)
SOLVERS = {"ddim": DDIM, "dpm_solver_pp_2m": DPM}
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


class Run(NamedTuple):
    """One run of a scheduler: a network call at each of `times`, a step from there to `next_times`,
    from x = noise · `scale`.

    left: the number of steps where the last of them is a lower one, 0 where it is as the others.
    """

    times: np.ndarray
    next_times: np.ndarray
    scale: float
    left: int = 0


class Scheduler(NamedTuple):
    """What a scheduler config says, as functions of the core.

    solver: noise -> the steps of the images that start from it, on which fresh noise depends;
    start: (x, left) -> the first state.
    """

    schedule: NoiseSchedule
    parameterization: Parameterization
    solver: Callable[[Array], Step]
    start: Callable[[Array, Array], Any]
    run: Callable[[int], Run]
    clip: float
    noise_correction: bool

    def transform(self, denoiser: Denoiser, noise: Array) -> Denoiser:
        """The scheduler's own transforms: noise correction and clipping of x̂0."""
        if self.noise_correction:
            denoiser = sampling.noise_correction(noise, self.schedule.T)(denoiser)
        return (
            sampling.clip(self.schedule, -self.clip, self.clip, keep_eps=True)(denoiser)
            if self.clip
            else denoiser
        )

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


def betas_of(config: Mapping[str, Any], where: Path) -> np.ndarray:
    """The betas [n], rescaled to zero terminal SNR where the config says so. Raises FolderError."""
    name = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], np.float64)
    elif name in BETAS:
        betas = BETAS[name](
            int(config.get("num_train_timesteps", 1000)),
            config.get("beta_start", 1e-4),
            config.get("beta_end", 0.02),
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


def told(setting: str, kind: str, config: Mapping[str, Any]) -> Callable[[Any, Any], Any] | None:
    """(np or jnp, timesteps) -> those that the network is told, where steps are spaced by a key of
    `RATIOS`; None is as they are.

    Euler's are fractions. The others' become integers: Karras' are rounded, the rest (and in
    DPM-Solver Karras' of cosine betas) cut.
    """
    if kind == EULER:
        return None
    rounded = setting == "use_karras_sigmas" and (
        kind == UNIPC or config.get("beta_schedule") != "squaredcos_cap_v2"
    )
    return (
        (lambda library, i: library.round(i)) if rounded else (lambda library, i: library.floor(i))
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
      grid: one of SPACINGS instead of the config's timestep_spacing, and of its spacing by
        sigma/alpha.
      solver: a key of SOLVERS instead of the config's class.
      noise_correction: on or off; by default on for the class that this package writes.

    Raises:
      FolderError: a class or setting that is not supported, or eps prediction with zero terminal
        SNR.
    """
    name = str(config.get("_class_name"))
    instead = f"choose --solver={' or '.join(SOLVERS)} (in a run config.teacher.solver)"
    if solver is not None and solver not in SOLVERS:
        raise FolderError(f"solver = {solver!r} is not known; choose one of {', '.join(SOLVERS)}")
    if solver is None and name not in CLASSES:
        raise FolderError(
            f"{where}: the scheduler {name!r} is not supported, only {', '.join(CLASSES)};"
            f" {instead}"
        )
    kind = SOLVERS[solver] if solver is not None else name
    for key in OFF if solver is None else ("thresholding",):
        if config.get(key) and key not in ON.get(kind, ()):
            raise FolderError(
                f"{where}: {key} = {config[key]!r} is not supported; {instead}, or set it to false"
            )
    for key, allowed in FIXED.get(kind, {}).items() if solver is None else ():
        value = config.get(key, False if key == "skip_prk_steps" else allowed[0])
        if value not in allowed:
            raise FolderError(
                f"{where}: {key} = {value!r} is not supported, only"
                f" {' or '.join(map(repr, allowed))}; choose --solver=ddim"
            )
    spacing = (
        grid or config.get("timestep_spacing") or ("linspace" if kind in SIGMAS else "leading")
    )
    if spacing not in SPACINGS:
        raise FolderError(
            f"timestep spacing {spacing!r} is not known; choose one of {', '.join(SPACINGS)}"
        )
    by_ratio = [
        key
        for key in ON.get(kind, ())
        if key in RATIOS and config.get(key) and solver is None and grid is None
    ]
    if len(by_ratio) > 1:
        raise FolderError(
            f"{where}: {' and '.join(by_ratio)} exclude each other; set one of them to false, or"
            f" {instead}"
        )
    predicts = config.get("prediction_type", "epsilon")
    if predicts not in PREDICTIONS:
        raise FolderError(
            f"{where}: prediction_type = {predicts!r} is not supported, only"
            f" {', '.join(PREDICTIONS)}"
        )
    if predicts in NOT_PREDICTED.get(kind, ()):
        raise FolderError(
            f"{where}: {kind} with prediction_type = {predicts!r} is not supported; {instead}"
        )
    parameterization, target = PREDICTIONS[predicts]
    clean = config.get("final_sigmas_type", "zero") == "zero" or kind == ANCESTRAL
    ends_clean = clean if kind in SIGMAS else bool(config.get("set_alpha_to_one", kind != PNDM))
    lower_final = bool(config.get("lower_order_final", True))
    # Diffusers' UniPC ends in NaN there: B(h) = h or D of an infinite step.
    endless = (
        (("solver_type", "bh1"), ("lower_order_final", False))
        if kind == UNIPC and ends_clean
        else ()
    )
    for key, value in endless:
        if config.get(key, True) == value:
            raise FolderError(
                f"{where}: {key} = {value!r} has no step to final_sigmas_type = 'zero'; set"
                f" 'sigma_min', or {instead}"
            )
    try:
        betas = betas_of(config, where)
        prediction.check_pair(schedules.ddpm(betas), parameterization)
        if config.get("rescale_betas_zero_snr") and kind == PNDM:
            raise FolderError(
                f"{where}: rescale_betas_zero_snr = True is nothing to diffusers' PNDM; {instead},"
                " or set it to false"
            )
        if config.get("rescale_betas_zero_snr") and kind in SIGMAS:
            # Diffusers keeps these off infinity by a smallest alpha-bar of 2^-24, and so the first
            # step is a huge but finite one.
            betas = np.append(betas[:-1], 1.0 - 2.0**-24 / np.prod(1.0 - betas[:-1]))
        schedule = schedules.ddpm(betas)
    except FolderError:
        raise
    except (TypeError, ValueError) as error:
        raise FolderError(f"{where}: {error}") from None
    count = int(schedule.T)
    offset = int(config.get("steps_offset", 0))
    clipping = (
        float(config.get("clip_sample_range", 1.0))
        if config.get("clip_sample", solver is None) and kind == DDIM
        else 0.0
    )
    if not xl:
        # Stable Diffusion's pipeline corrects two defaults of old configs: it never clips latents,
        # and its leading grid starts at 1.
        offset, clipping = 1, 0.0
    end = 0.0 if ends_clean else 1.0
    corrected = name == NOISE_CORRECTION if noise_correction is None else noise_correction
    integers = told(by_ratio[0], kind, config) if by_ratio else None

    def spaced(steps: int) -> np.ndarray:
        """Times [N] float32 of steps that are even in sigma/alpha."""
        ratios, known = ratios_of(betas), np.arange(count)
        # Euler spaces between the ends of its times, the others between those of the training.
        ends = (
            timesteps(kind, spacing, count, steps, offset)[[0, -1]]
            if kind == EULER
            else known[[-1, 0]]
        )
        found = np.interp(
            np.log(RATIOS[by_ratio[0]](steps, *np.interp(ends, known, ratios))),
            np.log(ratios),
            known,
        )
        times = (found + 1.0).astype(np.float32)
        if integers is None:
            return times
        # A timestep just below an integer is cut to the one before, and must not become that
        # integer as a float32.
        whole = integers(np, found)
        return np.where(
            integers(np, times - 1.0) == whole, times, np.nextafter(times, np.float32(whole + 1.0))
        )

    def run(steps: int) -> Run:
        if not 1 <= steps <= count:
            raise ValueError(f"steps must be in 1..{count}, got {steps}")
        times = (
            spaced(steps)
            if by_ratio
            else timesteps(kind, spacing, count, steps, offset).astype(np.float64) + 1.0
        )
        if kind in SIGMAS:
            # UniPC's sigma_min is that of its own steps, so that the last one is empty.
            following = np.append(
                times[1:], times[-1] if kind == UNIPC and by_ratio and not ends_clean else end
            )
        else:
            # Their steps have one length, whatever the grid: a step may end beside the next time.
            following = times - count // steps
            following = np.where(following < 1.0, end, following)
        if kind == PNDM and steps > 1:
            # The second call repeats the first interval, from where it is taken to begin.
            began = times[1] + count // steps
            times, following = np.insert(times, 1, times[1]), np.insert(following, 1, began)
        scale = 1.0
        if kind in (EULER, ANCESTRAL) and spacing != "leading":
            scale = float(schedule.sigma(jnp.float32(times[0])))
        lower = (
            lower_final
            if kind == UNIPC
            else bool(config.get("euler_at_final")) or (lower_final and len(times) < 15)
        )
        return Run(
            times.astype(np.float32),
            following.astype(np.float32),
            scale,
            len(times) if lower else 0,
        )

    if kind in (EULER, ANCESTRAL) or by_ratio:
        schedule = schedules.linear_ratio(schedule, log=bool(by_ratio))
    if integers is not None:
        schedule = schedule._replace(
            network_time=lambda t: integers(jnp, jnp.asarray(t, jnp.float32) - 1.0)
        )
    step, start = solver_of(
        kind, schedule, parameterization, target, linear=config.get("solver_type") == "bh1"
    )
    return Scheduler(schedule, parameterization, step, start, run, clipping, corrected)


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
    if kind == ANCESTRAL:
        return lambda noise: sampling.ancestral(
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
    return read(
        folder.scheduler,
        folder.path / "scheduler" / "scheduler_config.json",
        xl=folder.xl,
        **options,
    )


def student_config(teacher: Mapping[str, Any], *, noise_correction: bool) -> dict[str, Any]:
    """The scheduler config of a student: DDIM on trailing times to clean images, with the teacher's
    betas and prediction.
    """
    kept = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "prediction_type",
        "rescale_betas_zero_snr",
    )
    return {
        "_class_name": NOISE_CORRECTION if noise_correction else "DDIMScheduler",
        **{key: teacher[key] for key in kept if key in teacher},
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 1,
        "thresholding": False,
        "timestep_spacing": "trailing",
    }


NOISE_CORRECTION_MODULE = "scheduling_noise_correction"
NOISE_CORRECTION_CODE = '''"""DDIM whose first step uses the noise that was drawn, not the guessed one (Imagine Flash, section 3.3)."""

from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput


class NoiseCorrectionDDIMScheduler(DDIMScheduler):
    """At the first timestep the sample is the noise itself: x_s = alpha_s x0 + sigma_s x_T. Everywhere else DDIM with eta = 0."""

    def step(self, model_output, timestep, sample, eta=0.0, return_dict=True, **unused):
        if int(timestep) != int(self.timesteps[0]):
            return super().step(model_output, timestep, sample, eta=0.0, return_dict=return_dict)
        previous = int(timestep) - self.config.num_train_timesteps // self.num_inference_steps
        alpha_bar = self.alphas_cumprod[int(timestep)]
        alpha_bar_next = self.alphas_cumprod[previous] if previous >= 0 else self.final_alpha_cumprod
        alpha, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        if self.config.prediction_type == "epsilon":
            x0 = (sample - sigma * model_output) / alpha
        elif self.config.prediction_type == "v_prediction":
            x0 = alpha * sample - sigma * model_output
        else:
            x0 = model_output
        following = alpha_bar_next**0.5 * x0 + (1 - alpha_bar_next) ** 0.5 * sample
        return DDIMSchedulerOutput(prev_sample=following, pred_original_sample=x0) if return_dict else (following,)
'''
"""Written into a student's folder: diffusers loads it with `trust_remote_code=True`."""
