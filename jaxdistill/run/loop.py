"""The training loop around a jitted step: progress, health, checkpoints, signals.

Knows nothing of the method.
"""

import collections
import dataclasses
import math
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from jaxdistill.partition import Layout
from jaxdistill.run import distributed
from jaxdistill.run.checkpoint import Checkpoints
from jaxdistill.run.guard import (
    DRIFT,
    ERROR,
    LOSS,
    Event,
    Guard,
    GuardSettings,
    numbers_of,
    summary,
    texts_of,
)
from jaxdistill.run.records import Curve, Meter, Trace, summary_writer
from jaxdistill.train import TrainState

HealthFn = Callable[[Any, int], Mapping[str, float]]
"""(EMA parameters, step) -> numbers for the curve; prints its own line and may save pictures."""


class NonFiniteError(RuntimeError):
    """A loss or gradient that is no number, in one line. `step`: where."""

    step = 0


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


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether every number of a tree is one; computed where the arrays are."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


class Best:
    """What was kept at the step where the health number `key` was the lowest, the averages or the
    whole state, with all numbers of that line. Survives restarts; a fresh training forgets what an
    earlier one left.

    Raises CheckpointError where what is there does not fit `like`.
    """

    def __init__(self, folder: str, key: str, like: Any, *, fresh: bool) -> None:
        self.key, self.value = key, math.inf
        self.health: dict[str, float] = {}
        self._like, self._checkpoints = like, Checkpoints(folder, keep=1)
        if fresh:
            self._checkpoints.drop(0)
        if self._checkpoints.latest is not None:
            meta = self._checkpoints.restore(like)[1]
            self.value, self.health = float(meta["value"]), numbers_of(meta["health"])

    @property
    def step(self) -> int | None:
        """Of what is kept."""
        return self._checkpoints.latest

    def offer(self, step: int, tree: Any, health: Mapping[str, float]) -> None:
        """Keep this where it is better. Raises ValueError for an unknown key."""
        if self.key not in health:
            raise ValueError(
                f"keep_best = {self.key!r} is not a health number; choose one of"
                f" {', '.join(sorted(health))}"
            )
        if health[self.key] < self.value:
            self.value, self.health = health[self.key], dict(health)
            if self.step is not None and self.step >= step:  # of a start that had come farther
                self._checkpoints.drop(step)
            self._checkpoints.save(step, tree, {"value": self.value, "health": texts_of(health)})

    def restore(self) -> Any:
        """What is kept, or None where no number was ever finite."""
        self.wait()
        return None if self.step is None else self._checkpoints.restore(self._like)[0]

    def wait(self) -> None:
        """Until it is on disk."""
        self._checkpoints.wait()

    def close(self) -> None:
        """Wait until all is on disk."""
        self._checkpoints.close()


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
      guard: what it does where the health lines go wrong; None looks at nothing.
      rank: the health number by which a guard knows the best line.
      slower: factor on the learning rate -> such a `step`.
      mend: what to change where a guard finds something.
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
    guard: GuardSettings | None = None
    slower: Callable[[float], Callable[..., Any]] | None = None
    rank: str = DRIFT
    mend: str = ""
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
    """The last state; the seconds spent in all; the health numbers of its averages; what the guard
    has found.
    """

    state: TrainState
    seconds: Seconds
    health: dict[str, float]
    events: Sequence[Event] = ()


def train_loop(loop: Loop, place: Place) -> Trained:
    """Train from the newest checkpoint, or from `loop.first()`, to `loop.steps`.

    The step number is the data position and, with the state's key, the randomness: a resumed run
    ends in the same bits as one that was never stopped. A checkpoint holds all that results need:
    the newest health numbers with it, and those of the best averages beside them.

    Where the guard acts, training ends early, or goes on from the best health line's state at a
    lower rate.

    Raises:
      ValueError: `keep_best` is no health number.
      NonFiniteError: a loss is not finite, and no guard acts; names step and terms. Nothing
        non-finite is ever saved.
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
        self.fresh = self.checkpoints.latest is None
        self.before, self.health = Seconds(0.0, 0.0), dict[str, float]()
        self.guard, self.ended = Guard(loop.guard) if loop.guard else None, False
        acts = loop.guard is not None and loop.guard.acts
        self.returns = loop.guard is not None and loop.guard.returns
        if self.fresh:
            self.state = loop.first()
        else:
            self.state, meta = self.checkpoints.restore(loop.like)
            self.before = Seconds(float(meta["seconds"]), float(meta["save_seconds"]))
            self.health = numbers_of(meta["health"])
            if self.guard is not None:
                self.guard.resume(meta["guard"])
                self.ended = loop.steps <= int(meta["ended"])
            if distributed.is_main() and not self.ended:
                print(f"{loop.name}: resumes at step {int(self.state.step)} of {loop.steps}")
        self.best: Best | None = None
        if loop.keep_best or acts:
            like = loop.like if self.returns else loop.like.ema_params
            self.best = Best(f"{folder}-best", loop.keep_best or loop.rank, like, fresh=self.fresh)
        self.step = self.step_now()
        self.start, self.began = int(self.state.step), time.perf_counter()
        self.done = self.start
        self.board = place.workdir / "tensorboard" / loop.name
        there = -1 if self.fresh else self.start
        self.curve, self.writer = self.records(loop.steps if self.ended else there)
        self.meter = Meter(loop.examples, loop.flops, saving=self.before.saving)
        self.trace = Trace(self.board, self.start + 10, place.profile)
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
        if self.fresh and self.guard is not None:
            self.look(0)  # what comes is measured against it
        while self.done < loop.steps and not self.ended:
            i = self.done
            with self.meter.spent("input"):
                batch = loop.batches(i)
            self.trace.before(i)
            self.state, metrics = self.step(self.state, batch, loop.given)
            self.meter.step()
            self.trace.after(i, metrics, self.rest)
            self.pending.append((i, metrics))
            self.done += 1
            try:
                self.after(self.done)
            except NonFiniteError as error:
                if error.step == 0 or not self.can_mend():
                    raise
                self.act([Event.of_loss(error.step)])

    def can_mend(self) -> bool:
        """Whether the guard has something to go back to, or to end with."""
        if self.guard is None or not self.guard.settings.acts or self.best is None:
            return False
        return bool(self.best.step) or (self.best.step == 0 and self.returns)

    def last_finite(self) -> None:
        """The state of the last checkpoint, or the first one: this one is never saved."""
        self.checkpoints.wait()
        del self.state
        restored = self.checkpoints.latest is not None
        self.state = self.checkpoints.restore(self.loop.like)[0] if restored else self.loop.first()

    def step_now(self) -> Callable[..., Any]:
        """The step at the guard's rate."""
        rate, slower = self.guard.rate if self.guard else 1.0, self.loop.slower
        if rate == 1.0:
            return self.loop.step
        assert slower is not None
        return slower(rate)

    def act(self, events: list[Event]) -> None:
        """What the guard does about these: tell, end, or go back."""
        assert self.guard is not None
        best = self.best.step if self.best is not None else None
        action = self.guard.act(events, best)
        kept = f"what step {best} had" if best else "the untrained student"
        then = {
            "warn": f"try {self.loop.mend}",
            "stop": f"training ends, with {kept}; try {self.loop.mend}",
            "rollback": f"training goes on from step {best}, at {self.guard.rate:.2g} of its rate",
        }[action]
        for event in events:
            self.writer.add_text("guard", str(event), event.step)
        if distributed.is_main():
            print(
                f"guard: {self.loop.name}, {summary(events)}; {then}", file=sys.stderr, flush=True
            )
        if action == "warn":
            return
        assert self.best is not None
        self.rest()
        self.pending.clear()
        self.best.wait()
        if self.returns:
            self.take_best()
        elif any(event.number == LOSS for event in events):
            self.last_finite()
        self.done, self.ended = int(self.state.step), action == "stop"
        self.checkpoints.drop(self.done)
        self.save(self.done)
        if self.ended:
            return
        self.step = self.step_now()
        self.writer.close()
        self.curve, self.writer = self.records(self.done)
        self.bar.n = self.done

    def take_best(self) -> None:
        """What was kept takes the place of this: the devices never hold two whole states."""
        assert self.best is not None
        if self.returns:
            del self.state
            self.state = self.best.restore()
        else:
            self.state = self.state._replace(ema_params=self.best.restore())

    def records(self, start: int) -> tuple[Curve, Any]:
        """The curve and TensorBoard's writer, without what they hold of later steps."""
        board, writes = str(self.board), distributed.writes()
        curve = Curve(self.place.workdir / "curves" / f"{self.loop.name}.jsonl", start)
        return curve, summary_writer()(board, purge_step=start + 1, write_to_disk=writes)

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
            if self.ended or self.done != done:
                return
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
                self.not_finite(at, bad)
        return values

    def not_finite(self, step: int, what: str) -> NoReturn:
        """Raise NonFiniteError."""
        error = NonFiniteError(
            f"{self.loop.name} step {step}: {what}; the checkpoint of step {self.last_saved} is"
            f" kept; {self.loop.advice}"
        )
        error.step = step
        raise error

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
        if self.guard is not None:
            self.health[DRIFT] = self.guard.drift(self.health)
        self.curve.add(done, {f"health/{k}": v for k, v in self.health.items()})
        for key, value in self.health.items():
            if not (key.endswith(ERROR) and math.isnan(value)):
                self.writer.add_scalar(f"health/{key}", value, done)
        if self.best is not None and (done or not self.loop.keep_best):  # none asked for step 0
            with self.meter.spent("save"):
                # No name of its own: it would hold the state while another one is restored.
                self.best.offer(
                    done, self.state if self.returns else self.state.ema_params, self.health
                )
        if self.guard is not None and (
            events := self.guard.judge(done, self.health, last=done == self.loop.steps)
        ):
            self.act(events)

    def rest(self) -> None:
        """What comes now may take its time."""
        if self.watchdog is not None:
            self.watchdog.pause()

    def save(self, step: int) -> None:
        """A checkpoint."""
        if not all_finite((self.state.params, self.state.ema_params)):
            self.not_finite(step - 1, "parameters are not finite")
        seconds = self.spent()
        meta: dict[str, Any] = {"seconds": seconds.total, "save_seconds": seconds.saving}
        meta["health"] = texts_of(self.health)
        if self.guard is not None:
            ended = self.loop.steps if self.ended else -1  # more steps go on
            meta |= {"guard": self.guard.state(), "ended": ended}
        self.checkpoints.save(step, self.state, meta)
        self.last_saved = step

    def spent(self) -> Seconds:
        """Of all starts."""
        return Seconds(self.before.total + time.perf_counter() - self.began, self.meter.saving)

    def result(self) -> Trained:
        """The last state, with the best averages where those were asked for."""
        health, best, events = self.health, self.best, self.guard.events if self.guard else ()
        if best is not None and best.step is not None and (self.ended or self.loop.keep_best):
            with self.meter.spent("save"):
                self.take_best()
            health = best.health
            if distributed.is_main():
                where = f"step {best.step} ({best.key} {best.value:g})"
                print(f"{self.loop.name}: uses the averages of {where}, its best", flush=True)
        return Trained(self.state, self.spent(), health, tuple(events))

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
