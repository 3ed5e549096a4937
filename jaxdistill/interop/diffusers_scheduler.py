"""A scheduler_config.json as a schedule, a solver and the times of a run; and the config and code of a student's scheduler."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdistill import prediction, sampling
from jaxdistill import schedule as schedules
from jaxdistill.interop.diffusers_folder import Folder, FolderError
from jaxdistill.prediction import Parameterization
from jaxdistill.sampling import Denoiser, Step
from jaxdistill.schedule import NoiseSchedule

SPACINGS = ("trailing", "leading", "linspace")
PREDICTIONS = {"epsilon": prediction.eps_prediction, "v_prediction": prediction.v_prediction, "sample": prediction.x0_prediction}
BETAS = {
    "linear": lambda n, start, end: schedules.linear_betas(n, start, end),
    "scaled_linear": lambda n, start, end: schedules.scaled_linear_betas(n, start, end),
    "squaredcos_cap_v2": lambda n, start, end: schedules.cosine_betas(n),
}
NOISE_CORRECTION = "NoiseCorrectionDDIMScheduler"
CLASSES = ("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", NOISE_CORRECTION)
SOLVERS = {"ddim": "DDIMScheduler", "dpm_solver_pp_2m": "DPMSolverMultistepScheduler"}
OFF = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
    "thresholding",
    "euler_at_final",
)
"""Settings that must be off."""
SIGMAS = ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler")
"""Classes that think in sigma/alpha: their steps meet the next time of the grid."""
FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "PNDMScheduler": {"skip_prk_steps": (True,)},
    "EulerDiscreteScheduler": {
        "interpolation_type": ("linear",),
        "timestep_type": ("discrete",),
        "final_sigmas_type": ("zero",),
    },
    "DPMSolverMultistepScheduler": {
        "algorithm_type": ("dpmsolver++",),
        "solver_order": (2,),
        "solver_type": ("midpoint",),
        "final_sigmas_type": ("zero", "sigma_min"),
        "lambda_min_clipped": (-math.inf, "-Infinity"),
    },
}
"""Settings whose values are implemented."""


class Run(NamedTuple):
    """One run of a scheduler: a network call at each of `times`, a step from there to `next_times`, from x = noise · `scale`."""

    times: np.ndarray
    next_times: np.ndarray
    scale: float


class Scheduler(NamedTuple):
    """What a scheduler config says, as functions of the core."""

    schedule: NoiseSchedule
    parameterization: Parameterization
    step: Step
    start: Callable[[Array], Any]
    run: Callable[[int], Run]
    clip: float
    noise_correction: bool

    def transform(self, denoiser: Denoiser, noise: Array) -> Denoiser:
        """The scheduler's own transforms: noise correction and clipping of x̂0."""
        if self.noise_correction:
            denoiser = sampling.noise_correction(noise, self.schedule.T)(denoiser)
        return sampling.clip(self.schedule, -self.clip, self.clip, keep_eps=True)(denoiser) if self.clip else denoiser


def betas_of(config: Mapping[str, Any], where: Path) -> np.ndarray:
    """The betas [n], rescaled to zero terminal SNR where the config says so. Raises FolderError."""
    name = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], np.float64)
    elif name in BETAS:
        betas = BETAS[name](int(config.get("num_train_timesteps", 1000)), config.get("beta_start", 1e-4), config.get("beta_end", 0.02))
    else:
        raise FolderError(f"{where}: beta_schedule = {name!r} is not supported, only {', '.join(BETAS)}")
    return schedules.rescale_zero_terminal_snr(betas) if config.get("rescale_betas_zero_snr") else betas


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
      xl: of an XL pipeline. The others of Stable Diffusion override two old defaults, and so does this function.
      grid: one of SPACINGS instead of the config's timestep_spacing.
      solver: a key of SOLVERS instead of the config's class.
      noise_correction: on or off; by default on for the class that this package writes.

    Raises:
      FolderError: a class or setting that is not supported, or eps prediction with zero terminal SNR.
    """
    name = str(config.get("_class_name"))
    instead = f"choose --solver={' or '.join(SOLVERS)} (in a run config.teacher.solver)"
    if solver is not None and solver not in SOLVERS:
        raise FolderError(f"solver = {solver!r} is not known; choose one of {', '.join(SOLVERS)}")
    if solver is None and name not in CLASSES:
        raise FolderError(f"{where}: the scheduler {name!r} is not supported, only {', '.join(CLASSES)}; {instead}")
    kind = SOLVERS[solver] if solver is not None else name
    for key in OFF if solver is None else ("thresholding",):
        if config.get(key):
            raise FolderError(f"{where}: {key} = {config[key]!r} is not supported; {instead}, or set it to false")
    for key, allowed in FIXED.get(kind, {}).items() if solver is None else ():
        value = config.get(key, False if key == "skip_prk_steps" else allowed[0])
        if value not in allowed:
            raise FolderError(f"{where}: {key} = {value!r} is not supported, only {' or '.join(map(repr, allowed))}; choose --solver=ddim")
    spacing = grid or config.get("timestep_spacing") or ("linspace" if kind in SIGMAS else "leading")
    if spacing not in SPACINGS:
        raise FolderError(f"timestep spacing {spacing!r} is not known; choose one of {', '.join(SPACINGS)}")
    predicts = config.get("prediction_type", "epsilon")
    if predicts not in PREDICTIONS:
        raise FolderError(f"{where}: prediction_type = {predicts!r} is not supported, only {', '.join(PREDICTIONS)}")
    if kind == "PNDMScheduler" and predicts != "epsilon":
        raise FolderError(f"{where}: PNDM with prediction_type = {predicts!r} is not supported; {instead}")
    parameterization = PREDICTIONS[predicts]
    try:
        betas = betas_of(config, where)
        prediction.check_pair(schedules.ddpm(betas), parameterization)
        if config.get("rescale_betas_zero_snr") and kind in SIGMAS:
            # Diffusers keeps these off infinity by a smallest alpha-bar of 2^-24, and so the first step is a huge but finite one.
            betas = np.append(betas[:-1], 1.0 - 2.0**-24 / np.prod(1.0 - betas[:-1]))
        schedule = schedules.ddpm(betas)
    except FolderError:
        raise
    except (TypeError, ValueError) as error:
        raise FolderError(f"{where}: {error}") from None
    count = int(schedule.T)
    offset = int(config.get("steps_offset", 0))
    clipping = float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample", solver is None) and kind == "DDIMScheduler" else 0.0
    if not xl:
        # Stable Diffusion's pipeline corrects two defaults of old configs: it never clips latents, and its leading grid starts at 1.
        offset, clipping = 1, 0.0
    if kind in SIGMAS:
        ends_clean = config.get("final_sigmas_type", "zero") == "zero"
    else:
        ends_clean = bool(config.get("set_alpha_to_one", kind != "PNDMScheduler"))
    end = 0.0 if ends_clean else 1.0
    corrected = name == NOISE_CORRECTION if noise_correction is None else noise_correction

    def timesteps(steps: int) -> np.ndarray:
        """Diffusers' own, decreasing."""
        if spacing == "trailing":
            return np.round(np.arange(count, 0, -count / steps)) - 1
        if kind == "DPMSolverMultistepScheduler":
            if spacing == "linspace":
                return np.linspace(0, count - 1, steps + 1).round()[::-1][:-1]
            return (np.arange(steps + 1) * (count // (steps + 1)))[::-1][:-1] + offset
        if spacing == "linspace":
            even = np.linspace(0, count - 1, steps)[::-1]
            return even if kind == "EulerDiscreteScheduler" else even.round()
        return (np.arange(steps) * (count // steps))[::-1] + offset

    def run(steps: int) -> Run:
        if not 1 <= steps <= count:
            raise ValueError(f"steps must be in 1..{count}, got {steps}")
        if kind == "DPMSolverMultistepScheduler" and not ends_clean and 1 < steps < 15 and config.get("lower_order_final", True):
            raise ValueError(f"{where}: final_sigmas_type = 'sigma_min' with {steps} steps is not supported; take 15 or more, or {instead}")
        times = timesteps(steps).astype(np.float64) + 1.0
        if kind in SIGMAS:
            following = np.append(times[1:], end)
        else:
            # Their steps have one length, whatever the grid: a step may end beside the next time.
            following = times - count // steps
            following = np.where(following < 1.0, end, following)
        if kind == "PNDMScheduler" and steps > 1:
            # The second call repeats the first interval, from where it is taken to begin.
            began = times[1] + count // steps
            times, following = np.insert(times, 1, times[1]), np.insert(following, 1, began)
        scale = 1.0
        if kind == "EulerDiscreteScheduler" and spacing != "leading":
            scale = float(schedule.sigma(jnp.float32(times[0])))
        return Run(times.astype(np.float32), following.astype(np.float32), scale)

    if kind == "EulerDiscreteScheduler":
        schedule = schedules.linear_ratio(schedule)
    steps_of: dict[str, tuple[Step, Callable[[Array], Any]]] = {
        "PNDMScheduler": (sampling.plms(schedule), sampling.plms_start),
        "DPMSolverMultistepScheduler": (sampling.dpm_solver_pp_2m(schedule), sampling.start),
    }
    step, start = steps_of.get(kind, (sampling.ddim(schedule), sampling.start))
    return Scheduler(schedule, parameterization, step, start, run, clipping, corrected)


def of_folder(folder: Folder, **options: Any) -> Scheduler:
    """The folder's scheduler; `options` as of `read`. Raises FolderError."""
    return read(folder.scheduler, folder.path / "scheduler" / "scheduler_config.json", xl=folder.xl, **options)


def student_config(teacher: Mapping[str, Any], *, noise_correction: bool) -> dict[str, Any]:
    """The scheduler config of a student: DDIM on trailing times to clean images, with the teacher's betas and prediction."""
    kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type", "rescale_betas_zero_snr")
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
