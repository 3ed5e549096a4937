"""A run: a task and a method in a workdir. Phases, caches, seconds, files of results."""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxdistill.errors import UserError
from jaxdistill.partition import Layout
from jaxdistill.run import checkpoint, distributed, inputs, report
from jaxdistill.run.cost import size_of
from jaxdistill.run.guard import Event, by_line, summary
from jaxdistill.run.loop import Place, StopSignal, Trained, prepare
from jaxdistill.run.phase import Training, train
from jaxdistill.run.records import read_curve
from jaxdistill.run.workdir import say, versions


class Run:
    """One workdir at work. `caches`: the folder of its record caches."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        stop: StopSignal,
        layout: Layout,
        *,
        caches: Path | None = None,
    ) -> None:
        self.config, self.workdir, self.layout = config, workdir, layout
        self.caches = caches or workdir / "cache"
        log = config.log
        self.place = Place(
            workdir=workdir,
            stop=stop,
            layout=layout,
            every=log.every,
            checkpoint_every=log.checkpoint_every,
            checkpoints=log.get("checkpoints", ""),
            profile=log.get("profile", 0),
        )
        (workdir / "samples").mkdir(exist_ok=True)
        seconds = workdir / "seconds.json"
        self.seconds: dict[str, float] = json.loads(seconds.read_text()) if seconds.exists() else {}

        self.events: dict[str, Sequence[Event]] = {}
        """What the guard found in each training."""

        self._records: inputs.Records = {}

        self.flops: Callable[[int], float] | None = None
        """Of a step of a stage on all devices, for MFU."""

    def drawn_on(self, layout: Layout | None) -> None:
        """The averages of the health lines are wanted on these devices of this process."""
        self.place = dataclasses.replace(self.place, own=layout)

    def check_inputs(self, given: Mapping[str, inputs.Input]) -> None:
        """Raise UserError where the workdir's run was made from something else. The workdir
        remembers them from its first training on.
        """
        self._records = inputs.check(self.workdir, given)

    @property
    def inputs(self) -> dict[str, str]:
        """What it is made from, {name: checksum}."""
        return {name: str(record["sha256"]) for name, record in self._records.items()}

    def keep_inputs(self) -> None:
        """Remember them: what comes is made from them."""
        if self._records:
            inputs.keep(self.workdir, self._records)

    # -- time

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Record the wall seconds of a block that is not resumed."""
        began = time.perf_counter()
        yield
        self.record(phase, time.perf_counter() - began)

    def record(self, phase: str, seconds: float) -> None:
        """Keep a phase's wall seconds across restarts."""
        self.seconds[phase] = round(seconds, 1)
        checkpoint.write_json(self.workdir / "seconds.json", self.seconds)

    # -- work

    def train(self, training: Training) -> Trained:
        """One training to its end; resumes where a checkpoint is."""
        self.keep_inputs()
        found = train(training, self.place)
        self.events[training.name] = found.events
        self.record(training.name, found.seconds.total)
        self.record(f"saving the {training.name}", found.seconds.saving)
        return found

    def cache(
        self,
        name: str,
        key: str,
        count: int,
        make: Callable[[list[int]], Mapping[str, np.ndarray]],
        what: str,
        *,
        rows: int,
    ) -> Any:
        """A record cache below config.data.cache (the workdir's cache/ by default), made where it
        is missing.

        All processes make it together, `rows` records each at a time. `make`: their numbers, of
        which the last may stand several times so that one program serves all -> fields [rows, ...].
        """
        from jaxdistill.run import record_cache, workers  # take a second to import

        folder = self.caches / f"{name}-{key}"
        block = rows * distributed.count()

        def part(first: int, last: int) -> dict[str, np.ndarray]:
            numbers = [min(i, last - 1) for i in range(first, first + rows)]
            return {field: values[: last - first] for field, values in make(numbers).items()}

        def work() -> Iterator[None]:
            # Another run may be at the same cache: it is made once.
            mine = ExitStack()
            if writes := distributed.writes():
                mine.enter_context(workers.Claims(self.caches, self.place.stop).claim(folder.name))
            writer = record_cache.Writer(folder, count, block=block) if writes else None
            # A machine that is new here has none of it.
            start = distributed.least(writer.done if writer else count)
            told = Progress(what, start, count, block)
            try:
                for first in range(start, count, block):
                    last = min(first + block, count)
                    values = distributed.divided_rows(first, last, part)
                    if first == start:
                        check_space(folder, what, values, count - start)
                    if writer and first >= writer.done:
                        writer.add(values)
                    told.at(last)
                    yield
            finally:
                if writer:
                    writer.close()
                mine.close()

        prepare(what, work(), self.place.stop)
        distributed.barrier("a cache is written")
        return record_cache.Cache(folder)

    # -- results

    def write_results(
        self,
        results: Mapping[str, Any],
        *,
        title: str,
        notes: str,
        columns: Mapping[str, tuple[str, str]],
    ) -> dict[str, Any]:
        """results.json, results.md and curves.png; returns what results.json holds.

        Args:
          results: {"rows": [{"model", "steps", ...}], ...} without what every run has.
          title: of results.md.
          notes: below its table.
          columns: {key of a row: (title, format)}.
        """
        path = self.workdir / "results.json"
        # What is not trained again keeps what it had.
        before = json.loads(path.read_text()).get("guard", {}) if path.exists() else {}
        there = {
            name: [Event.of_record(record) for record in found] for name, found in before.items()
        }
        events = {name: found for name, found in {**there, **self.events}.items() if found}
        whole = {
            **results,
            "guard": {k: [event.record() for event in found] for k, found in events.items()},
            "seed": self.config.seed,
            "seconds": self.seconds,
            "inputs": self.inputs,
            "config": json.loads(self.config.to_json()),
            "versions": versions(),
        }
        checkpoint.write_json(path, whole)
        table = report.markdown_table(whole["rows"], columns)
        seconds = ", ".join(f"{k} {v:.0f} s" for k, v in self.seconds.items())
        machine = whole["versions"]["machine"]
        found = [
            f"Guard, {name}, {summary(line)}: {line[0].action}."
            for name, listed in events.items()
            for line in by_line(listed)
        ]
        end = "\n\n".join([*found, f"Wall time: {seconds}; {machine}."])
        text = f"# {title}\n\n{table}\n{notes}\n\n{end}\n"
        (self.workdir / "results.md").write_text(text)
        files = sorted((self.workdir / "curves").glob("*.jsonl"), reverse=True)
        curves = {path.stem: read_curve(path) for path in files}
        if curves:
            report.curves_picture(self.workdir / "curves.png", curves)
        return whole


def check_space(folder: Path, what: str, values: Mapping[str, np.ndarray], count: int) -> None:
    """Say how much disk `count` records like those of `values` [n, ...] take, before they are
    there. All processes must call it. Raises UserError where there is not as much.
    """
    record = sum(rows[0].nbytes for rows in values.values())
    say(f"{what}: {count} x {size_of(record)} = {size_of(count * record)} in {folder}")
    free = shutil.disk_usage(folder.parent).free if distributed.writes() else None
    if not distributed.everyone(free is None or free > count * record):
        left = "too little" if free is None else size_of(free)
        raise UserError(
            f"{what} take {size_of(count * record)} in {folder.parent}, where {left} is free; make"
            " room, give fewer prompts, or set config.data.cache to another disk"
        )


class Progress:
    """Says from time to time how far a preparation is, and how long the rest takes."""

    def __init__(self, what: str, start: int, count: int, block: int) -> None:
        self._what, self._start, self._count, self._block = what, start, count, block
        self._began, self._said = 0.0, start

    def at(self, done: int) -> None:
        """So many are there."""
        first = self._began == 0.0
        if first:  # its time is that of compiling
            self._began = time.perf_counter()
        if first or done == self._count or done - self._said >= 1000:
            made = max(done - self._start - self._block, 1)
            rate = made / max(time.perf_counter() - self._began, 1e-6)
            left = "" if first else f", {(self._count - done) / rate:.0f} s left"
            say(f"{self._what}: {done} of {self._count}{left}")
            self._said = done
