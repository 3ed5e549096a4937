"""What a training tells while it goes on: curves, TensorBoard's files, its speed, a profile."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from jaxdistill.costs import chips
from jaxdistill.run import distributed


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
