"""The training loop around a jitted step: progress, health, checkpoints, signals.

Knows nothing of the method.
"""

import collections
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from jaxdistill.costs import chips
from jaxdistill.run import distributed
from jaxdistill.run.checkpoint import Checkpoints
from jaxdistill.train import TrainState

HealthFn = Callable[[Any, int], Mapping[str, float]]
"""(EMA parameters, step) -> numbers for the curve; prints its own line and may save pictures."""


class NonFiniteError(RuntimeError):
    """A loss or gradient that is no number, in one line."""


class Stopped(Exception):
    """Raised after a signal, once the state is on disk."""


class Seconds(NamedTuple):
    """Wall seconds of a phase over all its starts, and those of them in which training waited for
    checkpoints to be written.

    Of an earlier start what came before its last save counts.
    """

    total: float
    saving: float


class StopSignal:
    """Remembers SIGTERM and SIGINT, so that the loop can save at a step's end.

    A second signal acts at once.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._last = 0

    def _handle(self, number: int, frame: Any) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = signal.Signals(number).name

    def at(self, step: int) -> str | None:
        """The signal that is acted on after this step; of several processes each must ask after
        every step.

        Of one process, what it received. Of several, JAX's preemption service takes SIGTERM of any
        of them and chooses a step for all.
        """
        if jax.process_count() > 1:
            self._last = step
            if multihost_utils.reached_preemption_sync_point(step):
                self.received = "SIGTERM"
        return self.received

    def begin(self, step: int) -> str | None:
        """As `at`, before the first step after `step`: the signal that came while nobody asked.

        JAX's service chooses the step after the last that anyone asked for, and a loop that starts
        elsewhere would never come to it.
        """
        if jax.process_count() > 1 and not self.at(self._last + 1):
            self.at(step)
        return self.received

    def between(self) -> str | None:
        """As `at`, where no steps are counted."""
        return self.at(self._last + 1)

    @contextmanager
    def installed(self) -> Iterator["StopSignal"]:
        """Handle both signals inside the block. Of several processes each leaves SIGTERM to JAX."""
        numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        old = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def prepare(what: str, work: Iterable[Any], stop: StopSignal) -> None:
    """Go through `work`, which has as many pieces in all processes, to its end or until a signal
    comes: then all stop, and it is closed.

    A piece that does not end is told as a step is that does not. Raises Stopped.
    """
    watchdog = distributed.Watchdog() if jax.process_count() > 1 else None
    try:
        for _ in work:
            if watchdog is not None:
                watchdog.step()
            if stop.between():
                raise Stopped(f"{what}: stopped by {stop.received}; the same command resumes it")
    finally:
        if watchdog is not None:
            watchdog.close()
        if isinstance(work, Generator):
            work.close()


class Curve:
    """A JSON-lines file of numbers by step; what a killed run wrote beyond its checkpoint is
    dropped on resume.
    """

    def __init__(self, path: Path, start: int) -> None:
        self._path = path
        if distributed.writes():
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [r for r in read_curve(path) if r["step"] <= start]
            path.write_text("".join(json.dumps(r) + "\n" for r in kept))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Append one record."""
        if not distributed.writes():
            return
        with self._path.open("a") as file:
            file.write(
                json.dumps({"step": step, **{k: float(f"{v:.6g}") for k, v in values.items()}})
                + "\n"
            )


def read_curve(path: Path) -> list[dict[str, Any]]:
    """The records of a curve file; a last line cut short by a kill is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def summary_writer() -> Any:
    """The class of tensorboardX, imported for those who train only, and without torch: numbers do
    not need it, and it takes two seconds.
    """
    hidden: dict[str, Any] = (
        {} if "torch" in sys.modules else {"torch": None}
    )  # no module: an ImportError, which tensorboardX expects
    sys.modules.update(hidden)
    try:
        from tensorboardX import SummaryWriter
    finally:
        for name in hidden:
            del sys.modules[name]
    return SummaryWriter


class Meter:
    """Where the time goes: seconds by kind since the last reading, and what the devices did in
    them.
    """

    def __init__(self, examples: int, flops: float, *, saving: float = 0.0) -> None:
        """`examples` and `flops` (of all devices, counted by hand or by `jaxdistill.aot`) of one
        step; 0 where unknown.

        `saving`: seconds that earlier starts have lost to saving.
        """
        self._examples, self._flops = examples, flops
        self._chip = chips.of_device(jax.local_devices()[0])
        self._began = self._since = time.perf_counter()
        self._steps, self._seconds = 0, {"input": 0.0, "save": 0.0, "health": 0.0}
        self._lost, self.saving = 0.0, saving

    @contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Count the block as "input", "save" or "health"."""
        began = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            self._seconds[kind] += seconds
            self._lost += 0.0 if kind == "input" else seconds
            self.saving += seconds if kind == "save" else 0.0

    def step(self) -> None:
        """One more step was started."""
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Numbers since the last reading, which must come when the steps' results are there.

        step_seconds and input_wait (a share) without saving and health; goodput: the share of the
        run's time that was training; save_seconds: what saving has cost since the phase began;
        images_per_second_a_chip, mfu and hbm_peak_gib where they are known.
        """
        now = time.perf_counter()
        training = max(now - self._since - self._seconds["save"] - self._seconds["health"], 1e-9)
        found = {
            "step_seconds": training / max(self._steps, 1),
            "input_wait": self._seconds["input"] / training,
            "goodput": 1 - self._lost / max(now - self._began, 1e-9),
            "save_seconds": self.saving,
        }
        rate = self._steps / training / jax.device_count()
        if self._examples:
            found["images_per_second_a_chip"] = rate * self._examples
        if self._flops and self._chip:
            found["mfu"] = rate * self._flops / self._chip.flops
        stats = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            found["hbm_peak_gib"] = stats["peak_bytes_in_use"] / 2**30
        self._since, self._steps, self._seconds = now, 0, dict.fromkeys(self._seconds, 0.0)
        return found


class Trace:
    """A profile of a few steps, written where TensorBoard finds it."""

    def __init__(self, folder: Path, first: int, count: int) -> None:
        """Of `count` steps from `first` on; 0 takes none."""
        self._folder, self._first, self._last = folder, first, first + count
        self._running = False

    def before(self, step: int) -> None:
        """Start where the step is the first."""
        if step == self._first < self._last:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, result: Any, rest: Callable[[], None]) -> None:
        """Stop where the step was the last; `rest` is called before the trace is written."""
        if self._running and step + 1 >= self._last:
            jax.block_until_ready(result)
            rest()
            self.close()

    def close(self) -> None:
        """Write what there is of a trace whose last step has not come: the run ends before it."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether every number of a tree is one; computed where the arrays are."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


class Best:
    """The averages of the step whose health number `key` was the lowest, kept as a checkpoint of
    their own. Survives restarts.

    Raises CheckpointError where what is there does not fit `like`, the averages of this run.
    """

    def __init__(self, folder: str, key: str, like: Any) -> None:
        self.key, self.value = key, math.inf
        self._checkpoints = Checkpoints(folder, keep=1)
        if self._checkpoints.latest is not None:
            self.value = float(self._checkpoints.restore(like)[1]["value"])

    @property
    def step(self) -> int | None:
        """Of the averages that are kept."""
        return self._checkpoints.latest

    def offer(self, step: int, averages: Any, report: Mapping[str, float]) -> None:
        """Keep these where they are better. Of many processes the first one's report counts.

        Raises ValueError for an unknown key.
        """
        if distributed.is_main() and self.key not in report:
            raise ValueError(
                f"keep_best = {self.key!r} is no health number; use one of"
                f" {', '.join(sorted(report))}"
            )
        value = float(report.get(self.key, math.nan))
        if jax.process_count() > 1:
            value = float(distributed.broadcast(repr(value).encode()))
        if value < self.value:
            self.value = value
            self._checkpoints.save(step, averages, {"value": value})

    def wait(self) -> None:
        """Until all is on disk."""
        self._checkpoints.wait()

    def restore(self, like: Any) -> Any:
        """The averages that are kept, or `like` where no number was ever finite. `wait` first."""
        return like if self.step is None else self._checkpoints.restore(like)[0]

    def close(self) -> None:
        """Wait until all is on disk."""
        self._checkpoints.close()


def train_loop(
    name: str,
    first: Callable[[], TrainState],
    step_fn: Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, Any]]],
    batches: Callable[[int], Any],
    teacher_params: Any,
    *,
    like: TrainState,
    steps: int,
    workdir: Path,
    log_every: int,
    health_every: int,
    checkpoint_every: int,
    health: HealthFn,
    stop: StopSignal,
    advice: str,
    checkpoint_folder: str | Path | None = None,
    examples: int = 0,
    flops: float = 0.0,
    profile: int = 0,
    keep_best: str = "",
) -> tuple[TrainState, Seconds]:
    """Train from the newest checkpoint, or from `first()`, to `steps`.

    Returns the state and the seconds spent in all.

    `like` describes the state: arrays, or ShapeDtypeStructs with their shardings. `first` is called
    only where there is no checkpoint, and nothing but the loop may hold its result, so that the
    devices hold one state and not two.

    The step number is the data position and, with the state's key, the randomness: a resumed run
    ends in the same bits as one that was never stopped.

    `examples` and `flops` of a step give images a second and MFU beside the loss, on the console
    and in TensorBoard. `profile`: steps of which a trace is written, from the eleventh of this
    start on. `checkpoint_folder`: instead of workdir/checkpoints; may be gs://. `keep_best`: a
    health number; the averages of the step where it was lowest are kept beside the checkpoints and
    returned as ema_params.

    Raises:
      ValueError: `keep_best` is no health number.
      NonFiniteError: a loss is not finite; names step and terms. Nothing non-finite is ever saved.
      Stopped: after SIGTERM or SIGINT, once the state is saved.
    """
    folder = checkpoint_folder or workdir / "checkpoints"
    checkpoints = Checkpoints(f"{folder}/{name}")
    before = Seconds(0.0, 0.0)
    if checkpoints.latest is None:
        state = first()
    else:
        state, meta = checkpoints.restore(like)
        before = Seconds(float(meta["seconds"]), float(meta.get("save_seconds", 0.0)))
        if distributed.is_main():
            print(f"{name}: resumes at step {int(state.step)} of {steps}")
    best = Best(f"{folder}/{name}-best", keep_best, like.ema_params) if keep_best else None
    start, began = int(state.step), time.perf_counter()
    curve = Curve(workdir / "curves" / f"{name}.jsonl", start)
    writer = summary_writer()(
        str(workdir / "tensorboard" / name),
        purge_step=start + 1,
        write_to_disk=distributed.writes(),
    )
    meter, trace = (
        Meter(examples, flops, saving=before.saving),
        Trace(workdir / "tensorboard" / name, start + 10, profile),
    )
    watchdog = distributed.Watchdog() if jax.process_count() > 1 else None
    pending: collections.deque[tuple[int, dict[str, Any]]] = collections.deque()
    last_saved = start

    def check(until: int) -> dict[str, float]:
        """Block until the oldest metrics are there, leaving `until` in flight; the newest checked
        ones.
        """
        values: dict[str, float] = {}
        while len(pending) > until:
            at, metrics = pending.popleft()
            values = {k: float(v) for k, v in jax.device_get(metrics).items()}
            if watchdog is not None:
                watchdog.step()
            if not np.isfinite(values["loss"]) or not np.isfinite(values["grad_norm"]):
                bad = ", ".join(f"{k} = {v:g}" for k, v in values.items() if not np.isfinite(v))
                raise NonFiniteError(
                    f"{name} step {at}: {bad}; the checkpoint of step {last_saved} is kept;"
                    f" {advice}"
                )
        return values

    def rest() -> None:
        """Health lines, saves and the trace may take their time."""
        if watchdog is not None:
            watchdog.pause()

    def save(step: int) -> None:
        nonlocal last_saved
        if not all_finite((state.params, state.ema_params)):
            raise NonFiniteError(
                f"{name} step {step - 1}: parameters are not finite; the checkpoint of step"
                f" {last_saved} is kept; {advice}"
            )
        checkpoints.save(step, state, {"seconds": spent().total, "save_seconds": meter.saving})
        last_saved = step

    def spent() -> Seconds:
        return Seconds(before.total + time.perf_counter() - began, meter.saving)

    # Off a terminal, a line every ten seconds is enough.
    bar = tqdm(
        total=steps,
        initial=start,
        desc=name,
        unit="step",
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
        dynamic_ncols=True,
        smoothing=0.05,
        disable=not distributed.is_main(),
    )
    try:
        if stop.begin(start) and start < steps:
            raise Stopped(
                f"{name} stopped by {stop.received} at step {start} of {steps}; the same command"
                " resumes it"
            )
        for i in range(start, steps):
            with meter.spent("input"):
                batch = batches(i)
            trace.before(i)
            state, metrics = step_fn(state, batch, teacher_params)
            meter.step()
            trace.after(i, metrics, rest)
            pending.append((i, metrics))
            done = i + 1
            # A few steps stay in flight, so that checking their numbers does not stall the device.
            values = check(0 if done % log_every == 0 or done == steps else 8)
            bar.update()
            if done % log_every == 0 or done == steps:
                speed = meter.read()
                shown = {
                    key: f"{speed[key]:.3g}"
                    for key in ("images_per_second_a_chip", "mfu", "save_seconds")
                    if speed.get(key)
                }
                bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False, **shown)
                curve.add(done, values)
                for key, value in (values | {f"speed/{k}": v for k, v in speed.items()}).items():
                    writer.add_scalar(key, value, done)
            if done % health_every == 0 or done == steps:
                check(0)
                rest()
                with meter.spent("health"):
                    report = health(state.ema_params, done)
                curve.add(done, {f"health/{k}": v for k, v in report.items()})
                for key, value in report.items():
                    writer.add_scalar(f"health/{key}", value, done)
                if best is not None:
                    with meter.spent("save"):
                        best.offer(done, state.ema_params, report)
            received = stop.at(done)
            if done % checkpoint_every == 0 or done == steps or received:
                check(0)  # the steps in flight are training, and not lost to saving
                rest()
                with meter.spent("save"):
                    save(done)
            if received and done < steps:
                with meter.spent("save"):
                    checkpoints.wait()
                raise Stopped(
                    f"{name} stopped by {received} and saved at step {done} of {steps}; the same"
                    " command resumes it"
                )
        if best is not None:
            with meter.spent("save"):
                best.wait()
            state = state._replace(ema_params=best.restore(state.ema_params))
            if distributed.is_main() and best.step is not None:
                print(
                    f"{name}: its best averages are those of step {best.step} ({keep_best}"
                    f" {best.value:g})",
                    flush=True,
                )
    finally:
        if watchdog is not None:
            watchdog.close()
        bar.close()
        with suppress(OSError):  # a full disk: the checkpoint says so
            trace.close()
            writer.close()
        with meter.spent("save"):
            checkpoints.close()
            if best is not None:
                best.close()
        found = spent()
        if start < steps and distributed.is_main():
            print(
                f"{name}: {found.total:.1f} s, of them {found.saving:.1f} s lost to saving",
                flush=True,
            )
    return state, found
