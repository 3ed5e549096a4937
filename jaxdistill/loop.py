"""The training loop around a jitted step: progress, health, checkpoints, signals. Knows nothing of the method."""

import collections
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from jaxdistill.checkpoint import Checkpoints
from jaxdistill.train import TrainState

HealthFn = Callable[[Any, int], Mapping[str, float]]
"""(EMA parameters, step) -> numbers for the curve; prints its own line and may save pictures."""


class NonFiniteError(RuntimeError):
    """A loss or gradient that is no number, in one line."""


class Stopped(Exception):
    """Raised after a signal, once the state is on disk."""


class StopSignal:
    """Remembers SIGTERM and SIGINT, so that the loop can save at a step's end. A second signal acts at once."""

    def __init__(self) -> None:
        self.received: str | None = None

    def _handle(self, number: int, frame: Any) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = signal.Signals(number).name

    @contextmanager
    def installed(self) -> Iterator["StopSignal"]:
        """Handle both signals inside the block."""
        old = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


class Curve:
    """A JSON-lines file of numbers by step; what a killed run wrote beyond its checkpoint is dropped on resume."""

    def __init__(self, path: Path, start: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [r for r in read_curve(path) if r["step"] <= start]
        path.write_text("".join(json.dumps(r) + "\n" for r in kept))
        self._path = path

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Append one record."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **{k: float(f"{v:.6g}") for k, v in values.items()}}) + "\n")


def read_curve(path: Path) -> list[dict[str, Any]]:
    """The records of a curve file; a last line cut short by a kill is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def train_loop(
    name: str,
    state: TrainState,
    step_fn: Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, Any]]],
    batches: Callable[[int], Any],
    teacher_params: Any,
    *,
    steps: int,
    workdir: Path,
    log_every: int,
    health_every: int,
    checkpoint_every: int,
    health: HealthFn,
    stop: StopSignal,
    advice: str,
) -> tuple[TrainState, float]:
    """Train from the newest checkpoint, or from `state`, to `steps`. Returns the state and the seconds spent in all.

    The step number is the data position and, with the state's key, the randomness: a resumed run ends in the same
    bits as one that was never stopped.

    Raises:
      NonFiniteError: a loss is not finite; names step and terms. Nothing non-finite is ever saved.
      Stopped: after SIGTERM or SIGINT, once the state is saved.
    """
    checkpoints = Checkpoints(workdir / "checkpoints" / name)
    seconds_before = 0.0
    if checkpoints.latest is not None:
        state, meta = checkpoints.restore(state)
        seconds_before = float(meta["seconds"])
        print(f"{name}: resumes at step {int(state.step)} of {steps}")
    start, began = int(state.step), time.perf_counter()
    curve = Curve(workdir / "curves" / f"{name}.jsonl", start)
    writer = SummaryWriter(str(workdir / "tensorboard" / name), purge_step=start + 1)
    pending: collections.deque[tuple[int, dict[str, Any]]] = collections.deque()
    last_saved = start

    def check(until: int) -> dict[str, float]:
        """Block until the oldest metrics are there, leaving `until` in flight; the newest checked ones."""
        values: dict[str, float] = {}
        while len(pending) > until:
            at, metrics = pending.popleft()
            values = {k: float(v) for k, v in jax.device_get(metrics).items()}
            if not np.isfinite(values["loss"]) or not np.isfinite(values["grad_norm"]):
                bad = ", ".join(f"{k} = {v:g}" for k, v in values.items() if not np.isfinite(v))
                raise NonFiniteError(f"{name} step {at}: {bad}; the checkpoint of step {last_saved} is kept; {advice}")
        return values

    def save(step: int) -> None:
        nonlocal last_saved
        check(0)
        if not all(bool(np.isfinite(np.asarray(leaf)).all()) for leaf in jax.tree.leaves((state.params, state.ema_params))):
            raise NonFiniteError(
                f"{name} step {step - 1}: parameters are not finite; the checkpoint of step {last_saved} is kept; {advice}"
            )
        checkpoints.save(step, state, {"seconds": seconds_before + time.perf_counter() - began})
        last_saved = step

    # Off a terminal, a line every ten seconds is enough.
    bar = tqdm(
        total=steps,
        initial=start,
        desc=name,
        unit="step",
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
        dynamic_ncols=True,
        smoothing=0.05,
    )
    try:
        for i in range(start, steps):
            state, metrics = step_fn(state, batches(i), teacher_params)
            pending.append((i, metrics))
            done = i + 1
            # A few steps stay in flight, so that checking their numbers does not stall the device.
            values = check(0 if done % log_every == 0 or done == steps else 8)
            bar.update()
            if done % log_every == 0 or done == steps:
                bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
                curve.add(done, values)
                for key, value in values.items():
                    writer.add_scalar(key, value, done)
            if done % health_every == 0 or done == steps:
                check(0)
                report = health(state.ema_params, done)
                curve.add(done, {f"health/{k}": v for k, v in report.items()})
                for key, value in report.items():
                    writer.add_scalar(f"health/{key}", value, done)
            if done % checkpoint_every == 0 or done == steps or stop.received:
                save(done)
            if stop.received and done < steps:
                checkpoints.wait()
                raise Stopped(f"{name} stopped by {stop.received} and saved at step {done} of {steps}; the same command resumes it")
    finally:
        bar.close()
        writer.close()
        checkpoints.close()
    return state, seconds_before + time.perf_counter() - began
