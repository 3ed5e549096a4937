"""The training loop around a jitted step: progress, health, checkpoints, signals.

Knows nothing of the method.
"""

import collections
import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from jaxdistill.costs import chips
from jaxdistill.partition import Layout
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
        self._old: dict[int, Any] = {}

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

    def heed(self) -> None:
        """Raise Stopped after a signal, where no step of a training would see it."""
        if self.received:
            raise Stopped(f"stopped by {self.received}; the same command resumes it")

    @contextmanager
    def installed(self) -> Iterator["StopSignal"]:
        """Handle both signals inside the block. Of several processes each leaves SIGTERM to JAX."""
        numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        self._old = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield self
        finally:
            self.release()

    def release(self) -> None:
        """From here on a signal ends the process at once: all that matters is on disk."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}


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
    """The averages of the step whose health number `key` was the lowest, with all numbers of that
    line, kept as a checkpoint of their own. Survives restarts.

    Raises CheckpointError where what is there does not fit `like`, the averages of this run.
    """

    def __init__(self, folder: str, key: str, like: Any) -> None:
        self.key, self.value = key, math.inf
        self.health: dict[str, float] = {}
        self._checkpoints = Checkpoints(folder, keep=1)
        if self._checkpoints.latest is not None:
            meta = self._checkpoints.restore(like)[1]
            self.value, self.health = float(meta["value"]), numbers_of(meta["health"])

    @property
    def step(self) -> int | None:
        """Of the averages that are kept."""
        return self._checkpoints.latest

    def offer(self, step: int, averages: Any, health: Mapping[str, float]) -> None:
        """Keep these where they are better. Raises ValueError for an unknown key."""
        if self.key not in health:
            raise ValueError(
                f"keep_best = {self.key!r} is not a health number; choose one of"
                f" {', '.join(sorted(health))}"
            )
        if health[self.key] < self.value:
            self.value, self.health = health[self.key], dict(health)
            self._checkpoints.save(
                step, averages, {"value": self.value, "health": texts_of(health)}
            )

    def wait(self) -> None:
        """Until all is on disk."""
        self._checkpoints.wait()

    def restore(self, like: Any) -> Any:
        """The averages that are kept, or `like` where no number was ever finite. `wait` first."""
        return like if self.step is None else self._checkpoints.restore(like)[0]

    def close(self) -> None:
        """Wait until all is on disk."""
        self._checkpoints.close()


def texts_of(numbers: Mapping[str, float]) -> dict[str, str]:
    """Numbers as a checkpoint's JSON holds them: NaN and infinity are none of JSON's."""
    return {name: repr(float(value)) for name, value in numbers.items()}


def numbers_of(texts: Mapping[str, str]) -> dict[str, float]:
    """`texts_of` undone, to the bit."""
    return {name: float(text) for name, text in texts.items()}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run's trainings happen, and how often they are looked at.

    Attributes:
      workdir: of curves, TensorBoard's files and, by default, of the checkpoints.
      stop: the signal to heed.
      layout: the mesh and where arrays live on it.
      every: steps between losses in the curve.
      checkpoint_every: steps.
      checkpoints: their folder, instead of workdir/checkpoints; may be gs://.
      profile: steps of which a trace is written, from the eleventh of a start on.
      own: where this process draws by itself; its first device by default.
    """

    workdir: Path
    stop: StopSignal
    layout: Layout
    every: int = 50
    checkpoint_every: int = 500
    checkpoints: str = ""
    profile: int = 0
    own: Layout | None = None


@dataclasses.dataclass(frozen=True)
class Loop:
    """What `train_loop` repeats.

    Attributes:
      name: of the phase.
      first: the state before the first step. Called only where there is no checkpoint; nothing but
        the loop may hold its result, so that the devices hold one state and not two.
      like: describes the state: arrays, or ShapeDtypeStructs with their shardings.
      step: (state, batch, given) -> (state, metrics).
      batches: step -> its batch.
      given: the loss's second argument.
      health: (averages, step) -> numbers.
      steps: where to end.
      health_every: steps.
      keep_best: a health number; the averages of the step where it was lowest are returned.
      advice: what to do where a loss is no number.
      examples: of a step, for images a second.
      flops: of a step on all devices, for MFU.
    """

    name: str
    first: Callable[[], TrainState]
    like: TrainState
    step: Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, Any]]]
    batches: Callable[[int], Any]
    given: Any
    health: HealthFn
    steps: int
    health_every: int
    keep_best: str = ""
    advice: str = ""
    examples: int = 0
    flops: float = 0.0


SHOWN = {
    "images_per_second_a_chip": "{:.3g} images/s per chip",
    "mfu": "MFU {:.3g}",
    "save_seconds": "{:.3g} s lost to saving",
}
"""What the bar tells of the speed."""


class Trained(NamedTuple):
    """The last state; the seconds spent in all; the health numbers of its averages."""

    state: TrainState
    seconds: Seconds
    health: dict[str, float]


def train_loop(loop: Loop, place: Place) -> Trained:
    """Train from the newest checkpoint, or from `loop.first()`, to `loop.steps`.

    The step number is the data position and, with the state's key, the randomness: a resumed run
    ends in the same bits as one that was never stopped. A checkpoint holds all that results need:
    the newest health numbers with it, and those of the best averages beside them.

    Raises:
      ValueError: `keep_best` is no health number.
      NonFiniteError: a loss is not finite; names step and terms. Nothing non-finite is ever saved.
      Stopped: after SIGTERM or SIGINT, once the state is saved.
    """
    running = _Running(loop, place)
    try:
        running.go()
        found = running.result()
    finally:
        running.close()
    return found._replace(seconds=running.spent())  # with the wait for the last checkpoint


class _Running:
    """One start of a loop: its state, and what has to be closed."""

    def __init__(self, loop: Loop, place: Place) -> None:
        self.loop, self.place, self.stop = loop, place, place.stop
        folder = f"{place.checkpoints or place.workdir / 'checkpoints'}/{loop.name}"
        self.checkpoints = Checkpoints(folder)
        self.before, self.health = Seconds(0.0, 0.0), dict[str, float]()
        if self.checkpoints.latest is None:
            self.state = loop.first()
        else:
            self.state, meta = self.checkpoints.restore(loop.like)
            self.before = Seconds(float(meta["seconds"]), float(meta["save_seconds"]))
            self.health = numbers_of(meta["health"])
            if distributed.is_main():
                print(f"{loop.name}: resumes at step {int(self.state.step)} of {loop.steps}")
        keep = loop.keep_best
        self.best = Best(f"{folder}-best", keep, loop.like.ema_params) if keep else None
        self.start, self.began = int(self.state.step), time.perf_counter()
        self.curve = Curve(place.workdir / "curves" / f"{loop.name}.jsonl", self.start)
        board = place.workdir / "tensorboard" / loop.name
        writes, purged = distributed.writes(), self.start + 1
        self.writer = summary_writer()(str(board), purge_step=purged, write_to_disk=writes)
        self.meter = Meter(loop.examples, loop.flops, saving=self.before.saving)
        self.trace = Trace(board, self.start + 10, place.profile)
        self.watchdog = distributed.Watchdog() if jax.process_count() > 1 else None
        self.pending: collections.deque[tuple[int, dict[str, Any]]] = collections.deque()
        self.last_saved = self.start
        # Off a terminal, a line every ten seconds is enough.
        self.bar = tqdm(
            total=loop.steps,
            initial=self.start,
            desc=f"{loop.name}, compiling" if self.start < loop.steps else loop.name,
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
            dynamic_ncols=True,
            smoothing=0.05,
            disable=not distributed.is_main(),
        )

    def go(self) -> None:
        """All steps that are left."""
        loop, start = self.loop, self.start
        if self.stop.begin(start) and start < loop.steps:
            raise Stopped(
                f"{loop.name} stopped by {self.stop.received} at step {start} of {loop.steps};"
                " the same command resumes it"
            )
        for i in range(start, loop.steps):
            with self.meter.spent("input"):
                batch = loop.batches(i)
            self.trace.before(i)
            self.state, metrics = loop.step(self.state, batch, loop.given)
            self.meter.step()
            self.trace.after(i, metrics, self.rest)
            self.pending.append((i, metrics))
            self.after(i + 1)

    def after(self, done: int) -> None:
        """What is due when so many steps have been started."""
        loop, place, last = self.loop, self.place, done == self.loop.steps
        logged = done % place.every == 0 or last
        if done == self.start + 1:
            self.bar.set_description_str(loop.name, refresh=False)
        # A few steps stay in flight, so that checking their numbers does not stall the device.
        values = self.check(0 if logged else 8)
        self.bar.update()
        if logged:
            self.log(done, values)
        if done % loop.health_every == 0 or last:
            self.look(done)
        received = self.stop.at(done)
        if done % place.checkpoint_every == 0 or last or received:
            self.check(0)  # the steps in flight are training, and not lost to saving
            self.rest()
            with self.meter.spent("save"):
                self.save(done)
        if received and not last:
            with self.meter.spent("save"):
                self.checkpoints.wait()
            raise Stopped(
                f"{loop.name} stopped by {received} and saved at step {done} of {loop.steps}; the"
                " same command resumes it"
            )

    def check(self, until: int) -> dict[str, float]:
        """Block until the oldest metrics are there, leaving `until` in flight; the newest ones."""
        values: dict[str, float] = {}
        while len(self.pending) > until:
            at, metrics = self.pending.popleft()
            values = {k: float(v) for k, v in jax.device_get(metrics).items()}
            if self.watchdog is not None:
                self.watchdog.step()
            if not np.isfinite(values["loss"]) or not np.isfinite(values["grad_norm"]):
                bad = ", ".join(f"{k} = {v:g}" for k, v in values.items() if not np.isfinite(v))
                if at == 0:
                    raise NonFiniteError(
                        f"{self.loop.name} step 0: {bad}; nothing has been trained yet: the"
                        " teacher's weights, the data or the precision of the computation"
                        " (config.compute) give no numbers"
                    )
                self.not_finite(f"step {at}: {bad}")
        return values

    def not_finite(self, what: str) -> NoReturn:
        """Raise NonFiniteError."""
        raise NonFiniteError(
            f"{self.loop.name} {what}; the checkpoint of step {self.last_saved} is kept;"
            f" {self.loop.advice}"
        )

    def log(self, done: int, values: Mapping[str, float]) -> None:
        """Losses and speed, on the bar, in the curve and for TensorBoard."""
        speed = self.meter.read()
        told = [f"loss {values['loss']:.4f}"]
        told += [form.format(speed[key]) for key, form in SHOWN.items() if speed.get(key)]
        self.bar.set_postfix_str(", ".join(told), refresh=False)
        self.curve.add(done, values)
        for key, value in {**values, **{f"speed/{k}": v for k, v in speed.items()}}.items():
            self.writer.add_scalar(key, value, done)

    def look(self, done: int) -> None:
        """The health line. Of many processes the first one's numbers count, for all."""
        self.check(0)
        self.rest()
        with self.meter.spent("health"):
            found = dict(self.loop.health(self.state.ema_params, done))
        self.health = distributed.agreed(found)
        self.curve.add(done, {f"health/{k}": v for k, v in self.health.items()})
        for key, value in self.health.items():
            self.writer.add_scalar(f"health/{key}", value, done)
        if self.best is not None:
            with self.meter.spent("save"):
                self.best.offer(done, self.state.ema_params, self.health)

    def rest(self) -> None:
        """What comes now may take its time."""
        if self.watchdog is not None:
            self.watchdog.pause()

    def save(self, step: int) -> None:
        """A checkpoint."""
        if not all_finite((self.state.params, self.state.ema_params)):
            self.not_finite(f"step {step - 1}: parameters are not finite")
        seconds = self.spent()
        meta = {"seconds": seconds.total, "save_seconds": seconds.saving}
        self.checkpoints.save(step, self.state, {**meta, "health": texts_of(self.health)})
        self.last_saved = step

    def spent(self) -> Seconds:
        """Of all starts."""
        return Seconds(self.before.total + time.perf_counter() - self.began, self.meter.saving)

    def result(self) -> Trained:
        """The last state, with the best averages where those were asked for."""
        state, health, best = self.state, self.health, self.best
        if best is not None:
            with self.meter.spent("save"):
                best.wait()
            state = state._replace(ema_params=best.restore(state.ema_params))
            health = best.health or health
            if distributed.is_main() and best.step is not None:
                where = f"step {best.step} ({best.key} {best.value:g})"
                print(f"{self.loop.name}: uses the averages of {where}, its best", flush=True)
        return Trained(state, self.spent(), health)

    def close(self) -> None:
        """Wait until all is on disk."""
        if self.watchdog is not None:
            self.watchdog.close()
        self.bar.close()
        with suppress(OSError):  # a full disk: the checkpoint says so
            self.trace.close()
            self.writer.close()
        with self.meter.spent("save"):
            self.checkpoints.close()
            if self.best is not None:
                self.best.close()
        found = self.spent()
        if self.start < self.loop.steps and distributed.is_main():
            lost = f"of which {found.saving:.1f} s lost to saving"
            print(f"{self.loop.name}: {found.total:.1f} s, {lost}", flush=True)
