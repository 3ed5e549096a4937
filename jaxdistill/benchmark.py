"""`python -m jaxdistill.benchmark --config=configs/benchmark.py --workdir=DIR`: few-step methods on
one teacher, one table.

Runs over a list of methods and seeds on scenes. Every method gets the same budget in network calls
and the same batch. A killed benchmark goes on where it stopped, and finished students are not
trained again. On a CPU several processes share the work, each on its own cores (`--processes`).
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from filelock import FileLock, Timeout
from ml_collections import ConfigDict

from jaxdistill.errors import UserError
from jaxdistill.methods.recipe import Recipe
from jaxdistill.names import choose
from jaxdistill.run import checkpoint, compilation, report, workers
from jaxdistill.run.cli import Command, one_line_errors
from jaxdistill.run.loop import NonFiniteError, Stopped, StopSignal
from jaxdistill.run.run import Run
from jaxdistill.run.workdir import flatten, prepare_workdir, say, versions
from jaxdistill.tasks.scenes.task import PICTURED, SHAPE, SceneData, Scenes, check, watched
from jaxdistill.tasks.settings import check_config
from jaxdistill.tasks.small import Sampled

SCORES = (
    "fd",
    "precision",
    "recall",
    "colour",
    "garment",
    "relation",
    "all_right",
    "unseen_all_right",
    "diversity",
)
"""Of the table."""

SHARED = ("data.scale", "text.length", "model", "schedule", "prediction", "teacher", "recogniser")
"""Parts of the config that a benchmark and its base must have in common."""

FREE = ("guidance", "steps", "grid", "health_every", "path", "solver", "time_skew")
"""Keys of the teacher that may differ: how it is sampled and watched, not what it is."""


def of_method(config: ConfigDict, name: str, seed: int) -> ConfigDict:
    """The config of one student."""
    one = config.copy_and_resolve_references()
    one.method.name, one.seed = name, seed
    return one


class Claims:
    """Shared work: who does what, among processes that see one folder."""

    def __init__(self, folder: Path, heed: Callable[[], None]) -> None:
        self._folder, self._heed = folder / "claims", heed
        self._folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def claim(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """Whether this process has `name` to itself inside the block: at once, or with `wait` as
        soon as no other has it.

        The system ends the claim of a process that dies. Raises Stopped where a signal comes while
        it waits.
        """
        lock, told = FileLock(self._folder / f"{name}.lock"), False
        while not lock.is_locked:
            try:
                lock.acquire(timeout=1.0 if wait else 0.0)
            except Timeout:
                if not wait:
                    yield False
                    return
                self._heed()
                if not told:
                    say(f"{name}: waiting for another process")
                    told = True
        try:
            yield True
        finally:
            lock.release()

    def share(self, tasks: Mapping[str, Callable[[], None]]) -> None:
        """Do the tasks that no other process is at; then those that others were at, which is
        nothing where they finished them.
        """
        others = []
        for name, task in tasks.items():
            with self.claim(name, wait=False) as mine:
                if mine:
                    task()
                else:
                    others.append(name)
        for name in others:
            with self.claim(name):
                tasks[name]()


class Benchmark:
    """One teacher and its students in one workdir."""

    def __init__(self, config: ConfigDict, workdir: Path, stop: StopSignal) -> None:
        self.config, self.workdir, self.stop = config, workdir, stop
        self.claims = Claims(workdir, self.heed_stop)
        folder = Path(config.data.cache) if config.data.cache else caches_of(config, workdir)
        folder.mkdir(parents=True, exist_ok=True)
        with Claims(folder, self.heed_stop).claim("scenes"):
            watch = watched("captions", self.heed_stop)
            self.data = SceneData(config, folder, base=workdir, watch=watch)
        first = of_method(config, config.benchmark.methods[0], config.seed)
        self.task = Scenes(first, data=self.data)
        self.rows_path = workdir / "rows.json"

    def heed_stop(self) -> None:
        """Raise Stopped after a signal, where no training step would see it."""
        if self.stop.received:
            again = "start the same command again to go on"
            raise Stopped(f"stopped by {self.stop.received}; {again}")

    def prepare(self) -> Any:
        """The teacher's parameters, and the recogniser: trained at the first start."""
        with self.claims.claim("teacher"):
            self.task.validation  # noqa: B018 (trains the recogniser)
            run = Run(self.task.config, self.workdir, self.stop, self.task.layout)
            return self.task.teacher(run)

    # -- rows

    def known_rows(self) -> list[Any]:
        """Those that are there. Raises UserError for rows of another protocol or method."""
        if not self.rows_path.exists():
            return []
        stored = json.loads(self.rows_path.read_text())
        if stored["protocol"] != self.task.protocol():
            raise UserError(
                f"{self.rows_path} holds rows of another protocol ({stored['protocol']}); remove it"
                " or use another workdir"
            )
        methods = self.config.benchmark.methods
        if unknown := {row["method"] for row in stored["rows"]} - {"teacher", *methods}:
            raise UserError(
                f"{self.rows_path} holds rows of {min(unknown)}, which config.benchmark.methods"
                " does not name; take them out or add it"
            )
        return list(stored["rows"])

    def add_row(self, name: str, seed: int, sampled: Sampled, task: Scenes) -> None:
        """Score what is not scored yet."""
        key = {"method": name, "seed": seed, "steps": sampled.steps, "guidance": sampled.guidance}
        if any(all(row[k] == v for k, v in key.items()) for row in self.known_rows()):
            return
        evaluator = self.data.evaluator(self.config.eval.split)
        scores, images = task.score(sampled, evaluator)
        path = self.picture_path(key)
        path.parent.mkdir(exist_ok=True)
        np.save(path, (images * 255.0 + 0.5).astype(np.uint8))
        row = {**key, **scores}
        say("  " + ", ".join(f"{k} {v}" for k, v in row.items()))
        with self.claims.claim("rows"):
            rows = [*self.known_rows(), row]
            checkpoint.write_json(self.rows_path, {"protocol": self.task.protocol(), "rows": rows})

    def scored(self, name: str, seed: int) -> bool:
        """Whether the rows hold all step counts of a method's seed."""
        rows = [row for row in self.known_rows() if (row["method"], row["seed"]) == (name, seed)]
        return {row["steps"] for row in rows} >= set(self.config.student.steps)

    def unscored(self) -> int:
        """How many students are still to be trained or scored."""
        wanted = self.config.benchmark
        return sum(not self.scored(name, seed) for name in wanted.methods for seed in wanted.seeds)

    # -- work

    def score_teacher(self, teacher: Any, guidance: float, steps: int) -> None:
        """A row of the teacher."""
        sampler = self.task.teacher_sampler
        sampled = Sampled("teacher", steps, guidance, sampler, teacher)
        self.add_row("teacher", self.config.seed, sampled, self.task)

    def make_student(self, teacher: Any, name: str, seed: int) -> None:
        """Train a method's student and score it. Of a finished one rows.json alone is needed."""
        self.heed_stop()
        if self.scored(name, seed):
            return
        task = Scenes(of_method(self.config, name, seed), data=self.data, share=self.task)
        folder = self.workdir / "students" / f"{name}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        run = Run(task.config, folder, self.stop, task.layout, caches=self.workdir / "cache")
        say(f"{name}, seed {seed}")
        if not (served := task.exported(run)):
            with self.caches_of_teacher(task):
                task.prepare(run, teacher)
            served = task.export(run, task.students(run, teacher), teacher)
        for steps, params in served.items():
            sampled = Sampled("student", steps, 1.0, task.student_sampler, params)
            self.add_row(name, seed, sampled, task)

    @contextmanager
    def caches_of_teacher(self, task: Scenes) -> Iterator[None]:
        """One process at a time makes the pool or the pairs that others may need, too."""
        if task.recipe.pairs or task.config.adversarial.reals == "teacher":
            with self.claims.claim("pairs"):
                yield
        else:
            yield

    def run(self, teacher: Any = None, *, helper: bool = False) -> dict[str, Any]:
        """Teacher, students, scores, files; a `helper` leaves the files to another process, and its
        result is empty.
        """
        config = self.config
        teacher = self.prepare() if teacher is None else teacher
        scale, steps = config.teacher.guidance, config.teacher.steps
        samplers = [(g, steps) for g in dict.fromkeys((scale, *config.eval.guidances))]
        samplers += [(scale, n) for n in config.student.steps]
        tasks: dict[str, Callable[[], None]] = {
            f"teacher-{g:g}-{n}": partial(self.score_teacher, teacher, g, n) for g, n in samplers
        }
        wanted = config.benchmark
        for seed in wanted.seeds:
            for name in wanted.methods:
                tasks[f"{name}-{seed}"] = partial(self.make_student, teacher, name, seed)
        self.claims.share(tasks)
        return {} if helper else self.write()

    def write(self) -> dict[str, Any]:
        """results.json, results.md, results.png."""
        config, rows = self.config, self.in_order(self.known_rows())
        evaluator = self.data.evaluator(config.eval.split)
        first = [r for r in rows if (r["method"], r["steps"]) == ("teacher", config.teacher.steps)]
        results = {
            "rows": rows,
            "reference": first[0],
            **self.task.reals(evaluator),
            "protocol": self.task.protocol(),
            "config": json.loads(config.to_json()),
            "versions": versions(),
        }
        with self.claims.claim("results"):
            checkpoint.write_json(self.workdir / "results.json", results)
            (self.workdir / "results.md").write_text(table(results))
            captions, chart = evaluator.reference.captions[:PICTURED], config.benchmark.chart
            path, shown = self.workdir / "results.png", self.pictured(rows)
            report.methods_picture(path, results, captions, shown, chart=chart.to_dict())
        return results

    def in_order(self, rows: Sequence[Any]) -> list[Any]:
        """Rows in the order of the config: processes add them as they finish."""
        methods, teacher = ["teacher", *self.config.benchmark.methods], self.config.teacher

        def place(row: Mapping[str, Any]) -> tuple[Any, ...]:
            reference = (row["steps"] != teacher.steps, row["guidance"] != teacher.guidance)
            at = methods.index(row["method"])
            return at, row["seed"], *reference, row["guidance"], row["steps"]

        return sorted(rows, key=place)

    def picture_path(self, key: Mapping[str, Any]) -> Path:
        """Where the first images of a row are kept."""
        name = f"{key['method']}-{key['seed']}-{key['steps']}-{key['guidance']:g}.npy"
        return self.workdir / "pictures" / name

    def pictured(self, rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], np.ndarray]:
        """{(method, steps): its first images [c, h, w, ch]}: the reference, and each method's first
        seed at 3 steps (or the most below).
        """
        config, shown = self.config, dict[tuple[str, int], np.ndarray]()
        wanted = [("teacher", config.teacher.steps, config.seed)]
        seeds = config.benchmark.seeds[:1]
        count = self.task.shown_steps
        wanted += [(name, count, seed) for name in config.benchmark.methods for seed in seeds]
        # Where rows.json alone was carried here there is no picture.
        blank = np.full((min(PICTURED, config.eval.samples), *SHAPE), 127, np.uint8)
        for method, steps, seed in wanted:
            key = (method, steps, seed)
            row = next(r for r in rows if (r["method"], r["steps"], r["seed"]) == key)
            path = self.picture_path(row)
            images = np.load(path) if path.exists() else blank
            shown[method, steps] = images.astype(np.float32) / 255.0
        return shown


def caches_of(config: ConfigDict, workdir: Path) -> Path:
    """Where scenes and embeddings stand: beside the base's, unless that is an export alone."""
    base = Path(config.base) if config.base else workdir
    return base if (base / "scenes").exists() else workdir


def table(results: Mapping[str, Any]) -> str:
    """results.md: mean ± standard deviation over seeds."""
    reference, groups = results["reference"], dict[tuple[str, int], list[Mapping[str, Any]]]()
    for row in results["rows"]:
        groups.setdefault((row["method"], row["steps"]), []).append(row)

    def shown(values: Sequence[float], digits: int = 3) -> str:
        spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
        return f"{np.mean(values):.{digits}f}{spread}"

    rows = []
    for (method, steps), found in groups.items():
        cells = {key: shown([row[key] for row in found]) for key in SCORES}
        ratio = shown([row["fd"] / reference["fd"] for row in found], 2)
        rows.append(
            {"method": method, "steps": steps, "seeds": len(found), "ratio": ratio, **cells}
        )
    titles = {"method": "method", "steps": "steps", "seeds": "seeds", "ratio": "FD / teacher's"}
    columns = {key: (title, "{}") for key, title in {**titles, **{k: k for k in SCORES}}.items()}
    ceiling = ", ".join(f"{k} {v:.3f}" for k, v in results["ceiling"].items())
    protocol = results["protocol"]
    return (
        f"# Few-step methods on scenes, {protocol['split']} split\n\n"
        f"{report.markdown_table(rows, columns)}\n{protocol['samples']:,} samples a row; two halves"
        f" of the real scenes are {results['floor_fd']:.3f} apart. Real scenes score {ceiling}."
        f" Recogniser {protocol['recogniser_sha256']}; {results['versions']['machine']}.\n"
    )


def check_base(config: ConfigDict) -> None:
    """Raise UserError where config.base holds no teacher, or one of other settings."""
    if not config.base:
        return
    folder = Path(config.base)
    for part in ("config.json", "teacher/card.json", "recogniser/card.json"):
        if not (folder / part).exists():
            raise UserError(
                f"config.base = {config.base} has no {part}; give the workdir of a benchmark that"
                " has trained its teacher"
            )
    there = flatten(json.loads((folder / "config.json").read_text()))
    here = flatten(json.loads(config.to_json()))
    for key in sorted(there.keys() & here.keys()):
        shared = any(key == part or key.startswith(f"{part}.") for part in SHARED)
        free = key.startswith("teacher.") and key.removeprefix("teacher.") in FREE
        if shared and not free and there[key] != here[key]:
            raise UserError(
                f"config.base = {config.base} was made with {key} = {there[key]}, here it is"
                f" {here[key]}"
            )


def check_all(config: ConfigDict) -> None:
    """Raise ValueError for what can be known before any work."""
    check_config(config)
    check(config)
    check_base(config)
    wanted = config.benchmark
    if not wanted.methods:
        raise UserError("config.benchmark.methods is empty; name keys of config.methods")
    for name in wanted.methods:
        choose(dict.fromkeys(config.methods), name, "config.benchmark.methods")
        recipe_of(config, name)
    choose(report.CHARTS, wanted.chart.kind, "config.benchmark.chart.kind")
    if wanted.chart.kind == "axis":
        for name in wanted.methods:
            report.on_axis(name, wanted.chart.axis)


def recipe_of(config: ConfigDict, name: str) -> Recipe:
    """A method's recipe on a network that does nothing. Raises ValueError for its settings."""
    from jaxdistill import methods
    from jaxdistill.interop import card
    from jaxdistill.methods.recipe import Kit, SamplerSpec
    from jaxdistill.model import Model
    from jaxdistill.prediction import v_prediction
    from jaxdistill.sampling import check_grid
    from jaxdistill.tasks.settings import adversarial_settings, student_settings

    schedule = card.build_schedule(config.schedule.to_dict())

    def grid(spec: SamplerSpec, steps: int) -> Any:
        block = card.sampler_block(spec, steps=steps)
        return check_grid(card.build_grid(block, steps, schedule.T), schedule.T)

    kit = Kit(
        network=Model(lambda params, x, t, cond: x, schedule, v_prediction),
        null_cond=lambda cond: cond,
        grid=grid,
        features=lambda params, x, t, cond: [x],
        heads=lambda params, states, cond: states[0],
        student=student_settings(config.student),
        adversarial=adversarial_settings(config.adversarial),
    )
    blocks = config.copy_and_resolve_references().methods.to_dict()
    return methods.build(name, blocks)(kit)


def processes_of(wanted: int) -> int:
    """How many processes --processes asks for. Raises UserError where that cannot be."""
    cpu = jax.default_backend() == "cpu"
    if wanted < 0:
        raise UserError(f"--processes must be at least 0, got {wanted}")
    if wanted > 1 and not cpu:
        raise UserError(
            f"--processes = {wanted} shares the cores of a CPU; a {jax.default_backend()} takes one"
            " process"
        )
    return wanted or (min(len(workers.cores()), workers.MOST) if cpu else 1)


QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
"""Flags of XLA's CPU compiler: kernels without MLIR, and a program in one piece. The TPU's compiler
ends a process that has them.
"""


def choose_optimizations(config: ConfigDict) -> None:
    """Leave XLA's costly passes out where config.compute.optimize is False, before anything is
    compiled.
    """
    if not config.compute.optimize:
        jax.config.update("jax_disable_most_optimizations", True)
        if jax.config.jax_platforms == "cpu":  # type: ignore[attr-defined]
            # Which the other processes inherit.
            os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}".strip()


def define(values: flags.FlagValues) -> None:
    """The command's own flags."""
    about = "Processes that share the work on a CPU, each on its own cores; 0: one a core, up to 4."
    flags.DEFINE_integer("processes", 0, about, flag_values=values)
    about = "Set by the command itself: the process that this one helps."
    flags.DEFINE_integer("helper", 0, about, flag_values=values)


def work(command: Command, config: ConfigDict) -> None:
    """The benchmark, by as many processes as were asked for."""
    workdir, helper = command.folder(), command.helper
    count = processes_of(command.processes)
    prepare_workdir(workdir, config)
    compilation.use_cache()
    with StopSignal().installed() as stop:
        if helper:
            workers.end_with(helper)
            Benchmark(config, workdir, stop).run(helper=True)
            return
        bench = Benchmark(config, workdir, stop)
        count, teacher = min(count, bench.unscored()), None
        if count > 1:
            teacher = bench.prepare()  # one training is faster with all cores
            logs = workdir / "logs"
            say(f"{count} processes share the rest; all but the first write to {logs}")
            again = [sys.executable, "-m", "jaxdistill.benchmark", *sys.argv[1:]]
            workers.run([*again, f"--helper={os.getpid()}"], count, logs, stop)
            bench.heed_stop()
        # What a process that failed has left, and the files.
        print(table(bench.run(teacher)))


def main() -> None:
    """The command."""
    with one_line_errors():
        command = Command(__doc__, define=define).parse()
        config = command.given_config()
        choose_optimizations(config)
        try:
            check_all(config)
        except ValueError as error:
            raise UserError(str(error)) from error
        try:
            work(command, config)
        except (UserError, NonFiniteError) as error:
            if not command.helper:
                raise
            # The error is that of the process it helps, which comes to the same place.
            print(f"process {os.getpid()} has failed: {error}")
            sys.exit(2)


if __name__ == "__main__":
    main()
