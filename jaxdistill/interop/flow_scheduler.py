"""The scheduler_config.json of a flow-matching network: sigmas as diffusers' Euler scheduler has
them, and the config of a student's scheduler.

Times of the core are diffusers' sigmas: α = 1 - σ, and Euler's x + (σ' - σ) u is the DDIM step.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array

from jaxdistill import sampling
from jaxdistill import schedule as schedules
from jaxdistill.interop.diffusers_folder import FolderError
from jaxdistill.interop.diffusers_scheduler import (
    RATIOS,
    SOLVERS,
    Run,
    Scheduler,
    check_solver,
    one_of,
)
from jaxdistill.prediction import flow_prediction
from jaxdistill.sampling import Step, TimeGrid
from jaxdistill.schedule import NoiseSchedule, TimeFunction

EULER = "FlowMatchEulerDiscreteScheduler"
GIVEN = ("scheduler", "linspace")
"""Who spaces the steps before the shift: the scheduler, from 1 to its smallest sigma; or the
pipeline, which passes sigmas = linspace(1, 1/N, N)."""
SHIFT_TYPES = ("exponential", "linear")
DEFAULTS = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "shift_terminal": None,
    "time_shift_type": "exponential",
    "stochastic_sampling": False,
}
"""The scheduler's own. A pipeline's other ones are never seen: the scheduler fills in its own."""


def shifted(sigmas: Any, shift: float) -> Any:
    """σ = shift · s / (1 + (shift - 1) s): the same s with log(α/σ) moved by -log(shift)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def shift_of(config: Mapping[str, Any], tokens: int) -> float:
    """The static shift that equals the config's at this number of image tokens.

    Dynamic shifting has a μ linear in the tokens, and e^μ as its shift (or μ where time_shift_type
    is "linear"). Raises ValueError for a dynamic shift without tokens, or one that is not above 0.
    """
    config = {**DEFAULTS, **config}
    if not config["use_dynamic_shifting"]:
        return float(config["shift"])
    if tokens < 1:
        raise ValueError("a dynamic shift needs the number of image tokens, at least 1")
    mu = mu_of(config, tokens)
    shift = math.exp(mu) if config["time_shift_type"] == "exponential" else mu
    if not shift > 0:
        raise ValueError(f"time_shift_type = 'linear' has a shift of {shift:g} at {tokens} tokens")
    return shift


def mu_of(config: Mapping[str, Any], tokens: int) -> float:
    """μ at a number of image tokens: base_shift and max_shift at two of them, linear elsewhere."""
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (high - low)
    return float(tokens * slope + (config["base_shift"] - slope * low))


@dataclass(frozen=True, eq=False)
class FlowRuns:
    """The runs of a flow-matching scheduler: `run(steps, tokens)`.

    sigmas: one of GIVEN; usual: the number of tokens where none is said; counts: the only numbers
    of steps, where not all are meant.
    """

    config: Mapping[str, Any]
    sigmas: str
    usual: int = 0
    counts: tuple[int, ...] = ()

    @property
    def most(self) -> int:
        """The largest number of steps."""
        return max(self.counts) if self.counts else int(self.config["num_train_timesteps"])

    def __call__(self, steps: int, tokens: int = 0) -> Run:
        """The run of so many steps, of `counts` or in 1..most, for images of so many tokens.
        Raises ValueError.
        """
        if self.counts and steps not in self.counts:
            raise ValueError(f"steps must be {one_of(self.counts)}, got {steps}")
        if not 1 <= steps <= self.most:
            raise ValueError(f"steps must be in 1..{self.most}, got {steps}")
        times = self.times(steps, tokens or self.usual)
        if not np.isfinite(times).all():
            raise ValueError(f"the scheduler's sigmas of {steps} steps are not finite; take more")
        return Run(times, np.append(times[1:], np.float32(0.0)), 1.0, steps)

    def times(self, steps: int, tokens: int) -> np.ndarray:
        """Diffusers' sigmas without the final 0: float32 [N], rounded where diffusers rounds."""
        config = self.config
        sigmas: np.ndarray
        if self.sigmas == "linspace":
            sigmas = np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)
        else:
            count = int(config["num_train_timesteps"])
            sigmas = np.linspace(*self.ends(count), steps) / count
        if config["use_dynamic_shifting"]:
            shift = shift_of(config, tokens)
            sigmas = shift / (shift + (1 / sigmas - 1))
        else:
            sigmas = shifted(sigmas, float(config["shift"]))
        if config["shift_terminal"]:
            with np.errstate(invalid="ignore"):  # one step: 0/0
                sigmas = 1 - (1 - sigmas) / ((1 - sigmas[-1]) / (1 - config["shift_terminal"]))
        for key, spaced in RATIOS.items():
            if config.get(key):
                sigmas = spaced(steps, float(sigmas[0]), float(sigmas[-1]))
        return sigmas.astype(np.float32)

    def ends(self, count: int) -> tuple[float, float]:
        """Timesteps at the largest and the smallest sigma of the training, which a static shift
        has moved before it moves them again.
        """
        ends = np.asarray([count, 1], np.float32) / np.float32(count)
        if not self.config["use_dynamic_shifting"]:
            ends = shifted(ends, float(self.config["shift"]))
        return float(ends[0]) * count, float(ends[1]) * count


def check(config: Mapping[str, Any], where: Path, *, solver: str | None = None) -> None:
    """Raise FolderError where it is no scheduler of a flow-matching network, or has a setting that
    is not supported.
    """
    name = str(config.get("_class_name"))
    if not name.startswith("FlowMatch"):
        raise FolderError(
            f"{where}: the scheduler {name!r} is not of flow matching, as this family's network is;"
            f" only {EULER} is supported"
        )
    if name != EULER and solver is None:
        raise FolderError(
            f"{where}: the scheduler {name!r} is not supported, only {EULER}; choose"
            f" --solver={' or '.join(SOLVERS)} (in a run config.teacher.solver)"
        )
    config = {**DEFAULTS, **config}
    shift, count, terminal = (
        config[key] for key in ("shift", "num_train_timesteps", "shift_terminal")
    )
    chosen = [key for key in RATIOS if config.get(key)]
    if config.get("invert_sigmas"):
        problem = "invert_sigmas = True is not supported; set it to false"
    elif config["time_shift_type"] not in SHIFT_TYPES:
        problem = (
            f"time_shift_type = {config['time_shift_type']!r} is not known, only"
            f" {' and '.join(SHIFT_TYPES)}"
        )
    elif len(chosen) > 1:
        problem = f"{' and '.join(chosen)} exclude each other; set one of them to false"
    elif not isinstance(shift, (int, float)) or not 0 < shift < math.inf:
        problem = f"shift must be above 0 and finite, got {shift!r}"
    elif not isinstance(count, int) or count < 1:
        problem = f"num_train_timesteps must be a whole number of at least 1, got {count!r}"
    elif terminal and not (isinstance(terminal, (int, float)) and 0 < terminal < 1):
        problem = f"shift_terminal must be in (0, 1) or null, got {terminal!r}"
    else:
        problem = dynamic_problem(config) if config["use_dynamic_shifting"] else ""
    if problem:
        raise FolderError(f"{where}: {problem}")


def dynamic_problem(config: Mapping[str, Any]) -> str:
    """What is wrong with the four numbers of dynamic shifting; "" if nothing."""
    keys = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
    for key in keys:
        value = config[key]
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            return f"{key} must be a number with use_dynamic_shifting, got {value!r}"
    if config["base_image_seq_len"] == config["max_image_seq_len"]:
        return f"base_image_seq_len and max_image_seq_len are both {config['max_image_seq_len']}"
    return ""


def read(
    config: Mapping[str, Any],
    where: Path,
    *,
    network_time: TimeFunction,
    sigmas: str,
    tokens: int = 0,
    grid: str | None = None,
    solver: str | None = None,
    noise_correction: bool | None = None,
) -> Scheduler:
    """The scheduler of a flow-matching network.

    Args:
      config: scheduler_config.json.
      where: its path, for messages.
      network_time: sigma in [0, 1] -> what the family's network is told of 1000 training steps.
      sigmas: one of GIVEN, as the family's pipeline has it.
      tokens: image tokens of the runs that are asked for without them.
      grid: "trailing" is sigmas = "linspace", whatever the pipeline does: the times of a student.
      solver: a key of `diffusers_scheduler.SOLVERS` instead of the config's; "ddim" is Euler.
      noise_correction: on or off; the images are the same, as ε̂ = x at t = 1.

    Raises:
      FolderError: another process, or a class or setting that is not supported.
    """
    check(config, where, solver=solver)
    if solver is not None and solver not in SOLVERS:
        raise FolderError(f"solver = {solver!r} is not known; choose one of {', '.join(SOLVERS)}")
    if grid not in (None, "trailing"):
        raise FolderError(
            f"timestep spacing {grid!r} is of schedulers with betas; a flow-matching network has"
            " its scheduler's own, or trailing"
        )
    config = {**DEFAULTS, **config}
    scale = config["num_train_timesteps"] / 1000.0
    schedule = schedules.flow()._replace(
        network_time=network_time if scale == 1.0 else lambda t: network_time(scale * t)
    )
    step, start = solver_of(
        schedule, solver, stochastic=solver is None and bool(config["stochastic_sampling"])
    )
    run = FlowRuns(config, "linspace" if grid else sigmas, tokens)
    return Scheduler(
        schedule,
        flow_prediction,
        step,
        start,
        run,
        0.0,
        bool(noise_correction),
        timestep_scaling=0.0,
    )


def solver_of(
    schedule: NoiseSchedule, solver: str | None, *, stochastic: bool
) -> tuple[Callable[[Array], Step], Callable[[Array, Array], Any]]:
    """`Scheduler.solver` and `Scheduler.start`; `stochastic` draws fresh noise at each step."""
    if stochastic:
        return (
            lambda noise: sampling.renoise(schedule, sampling.keys_of(noise)),
            lambda x, left: sampling.start(x),
        )
    ddim = sampling.ddim(schedule)
    if solver == "dpm_solver_pp_2m":
        step = sampling.last_by(sampling.dpm_solver_pp_2m(schedule), ddim)
        return lambda noise: step, lambda x, left: sampling.Counted(sampling.start(x), left)
    return lambda noise: ddim, lambda x, left: sampling.start(x)


# -------------------------------------------------------------------------------------- students


def student_config(
    teacher: Mapping[str, Any],
    *,
    solver: str,
    shift: float,
    where: Path = Path("scheduler_config.json"),
) -> dict[str, Any]:
    """The scheduler config of a student: `EULER` with a static shift.

    Stock pipelines draw it with `sigmas=student_sigmas(steps)`.

    Args:
      teacher: its scheduler_config.json.
      solver: "ddim": Euler. "renoise" and "consistency": x_s = (1 - s) x̂0 + s ε with ε fresh
        (`stochastic_sampling`); a consistency model's f(x, t) is x̂0 = x - t u, x itself at t = 0.
      shift: as of `shift_of`, at the size that the student is trained for.
      where: the teacher's file, for messages.

    Raises:
      ValueError: an unknown solver, or a shift that is not above 0.
      FolderError: a teacher of another process.
    """
    check_solver(solver)
    check(teacher, where, solver="ddim")
    check_shift(shift)
    return {
        "_class_name": EULER,
        "num_train_timesteps": {**DEFAULTS, **teacher}["num_train_timesteps"],
        "shift": float(shift),
        "use_dynamic_shifting": False,
        "shift_terminal": None,
        **dict.fromkeys(RATIOS, False),
        "invert_sigmas": False,
        "stochastic_sampling": solver != "ddim",
    }


def training_schedule(
    teacher: Mapping[str, Any], *, network_time: TimeFunction, shift: float
) -> NoiseSchedule:
    """The schedule in which a student with this shift is trained: of times before the shift.

    So what is even in time follows the shift: the times at which losses are taken, and the grid of
    the student, which is `student_grid(solver, steps, 1.0)`, the trailing one. Raises ValueError.
    """
    scale = {**DEFAULTS, **teacher}["num_train_timesteps"] / 1000.0
    schedule = schedules.flow(float(shift))
    return schedule._replace(network_time=lambda t: network_time(scale * schedule.sigma(t)))


def student_sigmas(steps: int) -> list[float]:
    """What stock pipelines are given as `sigmas`: linspace(1, 1/N, N), before the shift."""
    return [float(s) for s in np.linspace(1.0, 1.0 / steps, steps)]


def student_grid(solver: str, steps: int, shift: float) -> TimeGrid:
    """The times [N] at which stock diffusers calls a student of `student_config` in N steps: the
    trailing grid, shifted. Raises ValueError.
    """
    check_solver(solver)
    check_shift(shift)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    even = np.asarray(student_sigmas(steps)).astype(np.float32)
    return sampling.check_grid(shifted(even, float(shift)), 1.0)


def check_shift(shift: float) -> None:
    """Raise ValueError unless it is above 0 and finite."""
    if not 0 < shift < math.inf:
        raise ValueError(f"shift must be above 0 and finite, got {shift}")
