"""`distill`: any method on a network of the user's own, from a notebook."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxdistill import partition
from jaxdistill.errors import UserError
from jaxdistill.run import cost
from jaxdistill.run.loop import NonFiniteError, Seconds, StopSignal, Trained
from jaxdistill.run.phase import Training, programs
from jaxdistill.run.records import read_curve
from jaxdistill.run.run import Run
from jaxdistill.run.workdir import prepare_workdir, say
from jaxdistill.tasks.own_model.problem import Options, Problem
from jaxdistill.tasks.own_model.task import OwnModel


class Distilled:
    """A student.

    Attributes:
      params: {steps: its parameters}, of the teacher's structure.
      history: {phase: [{"step", "loss", ...} or {"step", "health/distance_N", ...}, ...]}.
    """

    def __init__(
        self,
        params: Mapping[int, Any],
        history: Mapping[str, list[dict[str, Any]]],
        grids: Mapping[int, np.ndarray],
        program: Callable[..., Any],
    ) -> None:
        self.params, self.history = dict(params), dict(history)
        self._grids, self._program = dict(grids), program

    def sample(self, noise: Any, cond: Any, steps: int) -> jax.Array:
        """Standard normal noise [b, ...], cond with b rows -> images [b, ...]. Raises UserError."""
        if steps not in self.params:
            served = ", ".join(map(str, self.params))
            raise UserError(
                f"steps = {steps} is not served by this student; choose one of {served}"
            )
        return self._program(self.params[steps], noise, cond, self._grids[steps])


def distill(
    problem: Problem,
    method: str = "imagine_flash",
    *,
    settings: Mapping[str, Any] | None = None,
    options: Options | None = None,
    workdir: str | Path | None = None,
) -> Distilled:
    """Distil a teacher by one of `METHODS`.

    Args:
      problem: the teacher and its inputs.
      method: a key of `METHODS`.
      settings: of the method: fields of `METHODS[method].settings`.
      options: of training.
      workdir: folder of checkpoints and curves: the same call resumes there. None trains in memory.

    What it will cost is printed first.

    Raises:
      UserError: in one line, for what cannot be, as a training that does not fit the device.
      NonFiniteError: a loss is no finite number.
    """
    task = OwnModel(problem, method, settings or {}, options or Options())
    work = task.distillation
    work.check()
    found, place = task.cost(on_disk=workdir is not None), cost.here()
    if excess := cost.excess(found, place, None):
        raise UserError(excess)
    for line in cost.lines(found, place, None, cost.Rates()):
        say(line)
    teacher = task.params
    task.prepare()
    if workdir is None:
        memory = InMemory(task.layout)
        students = work.students(memory, teacher, {}, task.health)
        history = memory.history
    else:
        if task.iterators:
            raise UserError(
                "workdir needs streams that are functions of i, because iterators do not resume"
            )
        config, folder = task.config, Path(workdir)
        prepare_workdir(folder, config)
        with StopSignal().installed() as stop:
            run = Run(config, folder, stop, task.layout)
            students = work.students(run, teacher, {}, task.health)
        phases = [work.phase(i) for i in range(len(work.recipe.stages))]
        history = {name: read_curve(folder / "curves" / f"{name}.jsonl") for name in phases}
    params: dict[int, Any] = {}
    for student in students:
        merged = jax.device_put(task.weights.merged(student.trained, teacher))
        params |= dict.fromkeys(student.stage.serves, merged)
    return Distilled(dict(sorted(params.items())), history, task.grids, task.program)


class InMemory:
    """Trains without a file."""

    flops: Callable[[int], float] | None = None

    def __init__(self, layout: partition.Layout, *, every: int = 50) -> None:
        self.layout, self.every = layout, every
        self.history: dict[str, list[dict[str, Any]]] = {}

    def train(self, training: Training) -> Trained:
        """One training to its end. Raises NonFiniteError."""
        made, layout = programs(training, self.layout), self.layout
        state = made.start(layout.place(training.params()), key=training.key)
        given, health = layout.place(training.given), dict[str, float]()
        records = self.history.setdefault(training.name, [])
        bar = tqdm(range(training.steps), desc=training.name, unit="step", mininterval=0.5)
        pending = None
        for i in bar:
            batch = partition.put_batch(training.batches(i), layout.mesh)
            state, metrics = made.step(state, batch, given)
            done, last = i + 1, i + 1 == training.steps
            for step, values in ((i - 1, pending), (i, metrics if last else None)):
                check_finite(training, step, values)  # one step stays in flight
            pending = metrics
            if done % self.every == 0 or done == 1 or last:
                records.append({"step": done, **{k: float(v) for k, v in metrics.items()}})
                bar.set_postfix(loss=f"{records[-1]['loss']:.4g}", refresh=False)
            if done % training.health_every == 0 or last:
                health = dict(training.health(state.ema_params, done))
                records.append({"step": done, **{f"health/{k}": v for k, v in health.items()}})
        return Trained(state, Seconds(bar.format_dict["elapsed"], 0.0), health)


def check_finite(training: Training, step: int, metrics: Mapping[str, Any] | None) -> None:
    """Raise NonFiniteError where a step's loss or gradient is no number."""
    values = {k: float(v) for k, v in (metrics or {}).items()}
    bad = [f"{k} = {v:g}" for k, v in values.items() if not np.isfinite(v)]
    if bad and not np.isfinite([values["loss"], values["grad_norm"]]).all():
        raise NonFiniteError(
            f"{training.name} step {step}: {', '.join(bad)}; lower learning_rate in settings"
        )
