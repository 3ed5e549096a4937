"""Distil one teacher with several methods and seeds, and compare the students in one table.

    python -m jaxdistill.benchmark --config=configs/benchmark.py --workdir=runs/benchmark

The config lists methods and seeds: config.benchmark. The same command resumes a benchmark that was
stopped; finished students are not trained again. On a CPU several processes share the work.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from jaxdistill.errors import UserError, choose
from jaxdistill.run import checkpoint, compilation, report, workers
from jaxdistill.run.cli import Command, one_line_errors
from jaxdistill.run.loop import NonFiniteError, StopSignal
from jaxdistill.run.run import Run
from jaxdistill.run.workdir import prepare_workdir, say, versions
from jaxdistill.tasks import open_task
from jaxdistill.tasks.settings import changed
from jaxdistill.tasks.small import Sampled, SmallTask

ABOUT = ("method", "model", "steps", "guidance")
"""What a row of means is of; the rows that it is of have a seed, too."""

LEFT_OUT = ("model", "steps", "guidance", "fd_noise", "fd_validation", "images_per_second")
"""Columns of a run's table that a table of means has not, or not as a score."""


TO_THE_END = {"guard.action": "warn"}
"""Of every run: what is compared has equal lengths."""

SCORED = {"eval.models": ("student",)}
"""Of a run whose teacher is another's."""


class Entry(NamedTuple):
    """A run of a list: its name in the table, its seed, the keys that it changes, and its folder in
    the workdir. Its teacher is the `given` folder of another run, `origin`, or its own.
    """

    name: str
    seed: int
    changes: Mapping[str, Any]
    folder: str
    origin: "Entry | None" = None
    given: str = "teacher"

    @property
    def key(self) -> str:
        """Its name in a workdir."""
        return slug(self.name, self.seed)


class Listing(NamedTuple):
    """The runs of a command; the title of their names, the name of its files, and its chart."""

    entries: Sequence[Entry]
    column: str
    output: str
    chart: Mapping[str, Any]


def slug(name: str, seed: int) -> str:
    """Folder name of one run."""
    return f"{name.replace(' ', '-').replace(',', '')}-{seed}"


def key_of(row: Mapping[str, Any]) -> str:
    """What tells a row from the others; its picture's name."""
    run = slug(row["method"], row["seed"])
    return f"{run}-{row['model']}-{row['steps']}-{row['guidance']:g}"


class Study:
    """The runs of a list in one workdir. Making it opens all tasks and writes nothing. Raises
    ValueError for what can be known before any work.
    """

    def __init__(
        self, config: ConfigDict, workdir: Path, listing: Listing, stop: StopSignal
    ) -> None:
        self.config, self.workdir, self.listing, self.stop = config, workdir, listing, stop
        self.entries = listing.entries
        self.tasks: dict[str, SmallTask] = {}
        for entry in self.entries:
            self.tasks[entry.key] = self.opened(entry)
        self.first = self.tasks[self.entries[0].key]
        self.claims = workers.Claims(workdir / "claims", stop)
        self.rows_path = workdir / "rows.json"
        self.inputs: dict[str, str] = {}

    def opened(self, entry: Entry) -> SmallTask:
        """Its task; all share the first one's data and programs."""
        changes = {**TO_THE_END, **entry.changes, "seed": entry.seed}
        if entry.origin:
            changes["teacher.path"] = str(self.workdir / entry.origin.folder / entry.given)
        share = next(iter(self.tasks.values()), None)
        task = open_task(changed(self.config, changes), share=share)
        if not isinstance(task, SmallTask):
            raise ValueError(f"config.task = {self.config.task!r} has no table of methods")
        if task.recipe.learns_from and entry.given != "student":
            raise ValueError(
                f"{entry.name} learns from a student of several steps, and this list has none;"
                " use `python -m jaxdistill.ablate`"
            )
        return task

    def run_of(self, entry: Entry) -> Run:
        """Its phases, in its folder."""
        folder, task = self.workdir / entry.folder, self.tasks[entry.key]
        folder.mkdir(parents=True, exist_ok=True)
        return Run(task.config, folder, self.stop, task.layout, caches=self.workdir / "cache")

    def open(self) -> None:
        """Make what the scores need, at the first start."""
        with self.claims.claim("scores"):
            run = self.run_of(self.entries[0]._replace(folder=""))
            run.check_inputs(self.first.made_from())
            run.keep_inputs()
            self.inputs = run.inputs
            self.first.data.open(run)

    # -- rows

    @cached_property
    def protocol(self) -> dict[str, Any]:
        """What the scores of all rows depend on."""
        return self.first.protocol()

    def stored(self) -> dict[str, dict[str, Any]]:
        """{key: row} of all that are there. Raises UserError for rows of another protocol."""
        if not self.rows_path.exists():
            return {}
        stored = json.loads(self.rows_path.read_text())
        if stored["protocol"] != self.protocol:
            raise UserError(
                f"{self.rows_path} holds rows of another protocol ({stored['protocol']}); remove it"
                " or choose another workdir"
            )
        return {key_of(row): row for row in stored["rows"]}

    def wanted(self, entry: Entry) -> dict[str, Sampled]:
        """{key of a row: who is scored}, the reference first."""
        about = {"method": entry.name, "seed": entry.seed}
        return {key_of({**about, **s.key}): s for s in self.tasks[entry.key].sampled()}

    def missing(self, entry: Entry) -> dict[str, Sampled]:
        """Those of `wanted` that are not scored yet."""
        stored = self.stored()
        return {key: s for key, s in self.wanted(entry).items() if key not in stored}

    def rows(self) -> list[dict[str, Any]]:
        """Those of the list, ordered by name, with "ratio": FD over that of the first row of their
        teacher. Rows of other names are left alone.
        """
        stored, rows = self.stored(), []
        names = list(dict.fromkeys(entry.name for entry in self.entries))
        for entry in sorted(self.entries, key=lambda entry: names.index(entry.name)):
            reference = stored.get(next(iter(self.wanted(entry.origin or entry))))
            fd = reference["fd"] if reference and reference["model"] == "teacher" else None
            for row in (stored[key] for key in self.wanted(entry) if key in stored):
                rows.append({**row, "ratio": round(row["fd"] / fd, 4) if fd else None})
        return rows

    def add_row(self, entry: Entry, key: str, sampled: Sampled) -> None:
        """Score and keep it, and its first images."""
        task = self.tasks[entry.key]
        scores, images = task.row(sampled, *task.drawn(sampled))
        path = self.picture(key)
        path.parent.mkdir(exist_ok=True)
        np.save(path, (images * 255.0 + 0.5).astype(np.uint8))
        row = {"method": entry.name, "seed": entry.seed, **scores}
        with self.claims.claim("rows"):
            rows = [*self.stored().values(), row]
            checkpoint.write_json(self.rows_path, {"protocol": self.protocol, "rows": rows})

    # -- work

    def teacher(self, entry: Entry) -> Any:
        """Its teacher's parameters. What they come from is made first where it is missing."""
        task, origin = self.tasks[entry.key], entry.origin
        if origin is None:
            with self.claims.claim(f"teacher-{entry.key}"):
                return task.teacher(self.run_of(entry))
        if entry.given == "student":
            with self.claims.claim(origin.key):
                self.students(origin)
        else:
            self.teacher(origin)
        return task.given_teacher(Path(task.config.teacher.path))

    def students(self, entry: Entry) -> dict[int, Any]:
        """{steps: parameters}, from its exports or trained."""
        task, run = self.tasks[entry.key], self.run_of(entry)
        if found := task.exported(run):
            return found
        teacher = self.teacher(entry)
        with self.claims.claim("caches"):  # which others may need, too
            task.prepare(run, teacher)
        return task.served(run, teacher)

    def make(self, entry: Entry) -> None:
        """A run and its rows. Of a finished one rows.json alone is needed."""
        self.stop.heed()
        if not (missing := self.missing(entry)):
            return
        say(f"{entry.name}, seed {entry.seed}")
        models = {sampled.model for sampled in missing.values()}
        students = self.students(entry) if "student" in models else {}
        teacher = self.teacher(entry) if "teacher" in models else None
        for key, sampled in missing.items():
            params = teacher if sampled.model == "teacher" else students[sampled.steps]
            self.add_row(entry, key, sampled._replace(params=params))

    def run(self) -> None:
        """All that no other process has done or does."""
        self.claims.share({entry.key: partial(self.make, entry) for entry in self.entries})

    def train_teachers(self, processes: int) -> None:
        """Where they are fewer than the processes: one training is faster with all cores."""
        own = [entry for entry in self.entries if entry.origin is None]
        for entry in own if len(own) < processes else ():
            self.teacher(entry)

    # -- results

    def write(self) -> str:
        """The files of the results: .json, .md, .png. Returns the table."""
        task, listing, rows = self.first, self.listing, self.rows()
        found = averages(rows)
        results = {
            "rows": rows,
            "means": found,
            "reference": rows[0] if rows[0]["model"] == "teacher" else None,
            **task.reals(),
            "protocol": self.protocol,
            "inputs": self.inputs,
            "config": json.loads(self.config.to_json()),
            "versions": versions(),
        }
        seeds = sorted({entry.seed for entry in self.entries})
        name = f"{task.common['data']['name']}, {self.config.eval.split} split"
        text = (
            f"# {name}, seeds {', '.join(map(str, seeds))}\n\n"
            f"{table(found, listing.column, task.columns)}\nMean ± standard deviation over seeds;"
            f" the reference of a row is the first one of its teacher. {task.notes()}\n\n"
            f"{results['versions']['machine']}.\n"
        )
        chart = {**listing.chart, "scores": task.charted}
        with self.claims.claim("results"):
            checkpoint.write_json(self.workdir / f"{listing.output}.json", results)
            (self.workdir / f"{listing.output}.md").write_text(text)
            path, shown = self.workdir / f"{listing.output}.png", self.pictures()
            report.methods_picture(path, results, task.captions(), shown, chart)
        return text

    def picture(self, key: str) -> Path:
        """Where the first images of a row are kept."""
        return self.workdir / "pictures" / f"{key}.npy"

    def pictures(self) -> dict[tuple[str, int], np.ndarray]:
        """{(name, steps): the first images [c, h, w, ch] of its first seed}: of a student at the
        steps that its task shows, else of the reference.
        """
        shown: dict[tuple[str, int], np.ndarray] = {}
        # Where rows.json alone was carried here there is no picture.
        blank = np.full((len(self.first.captions()), *self.first.image_shape), 127, np.uint8)
        for name, entry in {entry.name: entry for entry in reversed(self.entries)}.items():
            wanted, at = self.wanted(entry), ("student", self.tasks[entry.key].shown_steps)
            students = (key for key, s in wanted.items() if (s.model, s.steps) == at)
            key = next(students, next(iter(wanted)))
            images = np.load(self.picture(key)) if self.picture(key).exists() else blank
            shown[name, wanted[key].steps] = images.astype(np.float32) / 255.0
        return dict(reversed(shown.items()))


def averages(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation ("KEY_sd") over seeds of all scores."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in ABOUT), []).append(row)
    found = []
    for values, group in groups.items():
        mean = {**dict(zip(ABOUT, values, strict=True)), "seeds": len(group)}
        for key in (key for key in group[0] if key not in (*ABOUT, "seed")):
            scores = [row[key] for row in group if row[key] is not None]
            mean[key] = round(float(np.mean(scores)), 4) if scores else None
            spread = round(float(np.std(scores, ddof=1)), 4) if len(scores) > 1 else None
            mean[f"{key}_sd"] = spread
        found.append(mean)
    return found


def table(
    means: Sequence[Mapping[str, Any]], column: str, columns: Mapping[str, tuple[str, str]]
) -> str:
    """Of `averages`: mean ± standard deviation. `columns`: of a run's table."""
    forms = {key: form for key, (_, form) in columns.items() if key not in LEFT_OUT}

    def cell(mean: Mapping[str, Any], key: str) -> str | None:
        parts = [mean[key], mean[f"{key}_sd"]]
        return " ± ".join(forms[key].format(part) for part in parts if part is not None) or None

    rows = []
    for mean in means:
        guidance = f", guidance {mean['guidance']:g}" if mean["model"] == "teacher" else ""
        scores = {key: cell(mean, key) for key in forms}
        rows.append({**mean, "model": mean["model"] + guidance, **scores})
    titles = {"method": column, "model": "model", "steps": "steps"}
    titles |= {key: columns[key][0] for key in forms}
    return report.markdown_table(rows, {key: (title, "{}") for key, title in titles.items()})


def listed(config: ConfigDict) -> Listing:
    """A teacher and the methods of config.benchmark, each with each seed. Raises ValueError."""
    wanted = config.get("benchmark")
    if wanted is None or not wanted.methods:
        raise ValueError(
            "config.benchmark.methods is empty; name keys of config.methods, as"
            " configs/benchmark.py does"
        )
    choose(report.CHARTS, wanted.chart.kind, "config.benchmark.chart.kind")
    for name in wanted.methods:
        choose(dict.fromkeys(config.methods), name, "config.benchmark.methods")
        if wanted.chart.kind == "axis":
            report.on_axis(name, wanted.chart.axis)
    first = {"method.name": wanted.methods[0], "eval.models": ("teacher",)}
    teacher = Entry("teacher", config.seed, first, "")
    students = [
        Entry(name, seed, {"method.name": name, **SCORED}, f"students/{slug(name, seed)}", teacher)
        for seed in wanted.seeds
        for name in wanted.methods
    ]
    return Listing([teacher, *students], "method", "results", wanted.chart.to_dict())


def define(values: flags.FlagValues) -> None:
    """The flags of a list's command."""
    about = "processes that share the work on a CPU; 0: one per core, up to 4 (default)"
    flags.DEFINE_integer("processes", 0, about, lower_bound=0, flag_values=values)
    about = "internal: the process that this one helps"
    flags.DEFINE_integer("helper", 0, about, flag_values=values)


def work(command: Command, make: Callable[[ConfigDict], Listing], module: str) -> None:
    """A list, by as many processes as were asked for."""
    config, workdir, stop = command.given_config(), command.folder(), StopSignal()
    count = workers.count_of(command.processes)
    compilation.check_devices()
    try:
        study = Study(config, workdir, make(config), stop)
    except ValueError as error:
        raise UserError(str(error)) from error
    prepare_workdir(workdir, config)
    compilation.use_cache(config.compute.compilation_cache)
    with stop.installed():
        if command.helper:
            workers.end_with(command.helper)
        study.open()
        count = min(count, sum(bool(study.missing(entry)) for entry in study.entries))
        if count > 1 and not command.helper:
            study.train_teachers(count)
            logs = workdir / "logs"
            say(f"{count} processes share the rest; the others write to {logs}")
            again = [sys.executable, "-m", module, *sys.argv[1:], f"--helper={os.getpid()}"]
            workers.run(again, count, logs, stop)
            stop.heed()
        study.run()  # what a process that failed has left
        if not command.helper:
            print(study.write())


def run_list(command: Command, make: Callable[[ConfigDict], Listing], module: str) -> None:
    """The command of a list; `make` raises ValueError."""
    with one_line_errors():
        command.parse()
        try:
            work(command, make, module)
        except (UserError, NonFiniteError) as error:
            if command.helper:  # the process it helps comes to the same place and says it
                sys.exit(f"process {os.getpid()} has failed: {error}")
            raise


def main() -> None:
    """The command."""
    run_list(Command(__doc__, define=define), listed, "jaxdistill.benchmark")


if __name__ == "__main__":
    main()
