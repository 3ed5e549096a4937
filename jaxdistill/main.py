"""`python -m jaxdistill.main --config=configs/digits.py --workdir=DIR`: train a teacher, distil it,
evaluate, export.

The shell: names of the config become functions here, and files are written here.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from jaxdistill import partition
from jaxdistill.interop import card
from jaxdistill.methods import imagine_flash as flash
from jaxdistill.metrics import evaluate
from jaxdistill.prediction import LossFn
from jaxdistill.run import checkpoint, distributed, loop, report
from jaxdistill.run.workdir import (
    UserError,
    missing_extra,
    prepare_workdir,
    say,
    train_phase,
    versions,
)
from jaxdistill.tasks.labelled_images import data
from jaxdistill.tasks.labelled_images.experiment import (
    Experiment,
    build,
    flatten,
    from_student,
    scored_split,
    student_of,
)
from jaxdistill.train import TrainState, everything

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file with get_config(); --config.key=value sets any key."
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for checkpoints, exports and results; a second start in it resumes."
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One of several processes, which JAX finds: Cloud TPU pods, GKE, SLURM."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, where JAX cannot find the processes."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Their number, with --coordinator.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "This one's, from 0, with --coordinator.")


# ---------------------------------------------------------------------------------------------- run


class Drawn(NamedTuple):
    """The images [n, h, w, c] of one row of the table, in the classes' turn, and how many a second
    were drawn.
    """

    model: str
    steps: int
    guidance: float
    images: np.ndarray
    rate: float


class Run:
    """One experiment in one workdir."""

    def __init__(self, experiment: Experiment, workdir: Path, stop: loop.StopSignal) -> None:
        self.experiment, self.workdir, self.stop = experiment, workdir, stop
        self.config = experiment.config
        self.teacher_card, self.student_card = (
            experiment.teacher_sampler.card,
            experiment.student_sampler.card,
        )
        (workdir / "samples").mkdir(exist_ok=True)
        seconds = workdir / "seconds.json"
        self.seconds: dict[str, float] = json.loads(seconds.read_text()) if seconds.exists() else {}

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

    # -- samples

    def sample_fn(
        self, sampler: card.Sampler, *, guidance: float, correct_noise: bool
    ) -> Callable[..., np.ndarray]:
        """(params, noise, labels, grid) -> images [b, h, w, c] in [0, 1]."""
        program = jax.jit(partial(sampler.sample, guidance=guidance, correct_noise=correct_noise))
        return lambda params, noise, labels, grid: np.asarray(
            program(params, noise, labels, jnp.asarray(grid))
        )

    def labels(self, count: int, start: int = 0) -> np.ndarray:
        """The classes in turn."""
        return (np.arange(start, start + count) % self.experiment.num_classes).astype(np.int32)

    def noise(self, seed: int, start: int, count: int) -> jax.Array:
        """Standard normal starts."""
        return card.draw_noise(seed, start, count, self.experiment.image_shape)

    # -- phases

    def extractor(self) -> evaluate.Extractor:
        """The frozen classifier of the metrics: trained at the first start, then read from the
        workdir.
        """
        ev, dataset = self.config.eval, self.experiment.dataset
        folder = self.workdir / "extractor"
        if (folder / "card.json").exists():
            params, _ = checkpoint.load_export(folder)
            return evaluate.make_extractor(
                params,
                dataset.train.images,
                num_classes=self.experiment.num_classes,
                channels=tuple(ev.channels),
                features=ev.features,
            )
        with self.timed("extractor"):
            say("feature extractor: training")
            made = evaluate.train_extractor(
                dataset, channels=tuple(ev.channels), features=ev.features, steps=ev.extractor_steps
            )
            checkpoint.export(
                folder,
                made.params,
                {
                    "format": card.FORMAT,
                    "role": "feature extractor",
                    "hash": made.hash,
                    "channels": list(ev.channels),
                    "features": ev.features,
                    "data": dataset.name,
                },
            )
        return made

    def teacher(self, evaluator: evaluate.Evaluator) -> Any:
        """The teacher's parameters: from its export, from config.teacher.path, or trained."""
        folder, given = self.workdir / "teacher", self.config.teacher.path
        if (folder / "card.json").exists():
            return checkpoint.load_export(folder)[0]
        if given:
            params = self.given_teacher(Path(given))
            checkpoint.export(folder, params, self.teacher_card)
            return params
        experiment, config = self.experiment, self.config.teacher
        sample = self.sample_fn(experiment.teacher_sampler, guidance=1.0, correct_noise=False)
        count, grid = (
            self.config.log.health_samples,
            experiment.teacher_sampler.grid(self.config.log.teacher_steps),
        )
        noise, labels = self.noise(self.config.seed + 100, 0, count), self.labels(count)

        def health(params: Any, step: int) -> dict[str, float]:
            images = sample(params, noise, labels, grid)
            report.save_grid(self.workdir / "samples" / f"teacher_{step:07d}.png", images[:100])
            fd = evaluator.quick_fd(images)
            say(
                f"health  teacher {step}: FD {fd:.3f} on validation ({count} images, {len(grid)}"
                " steps)"
            )
            return {"fd": fd}

        params = card.init_params(experiment.model, experiment.image_shape, self.config.seed)
        state = self.train(
            "teacher",
            params,
            jax.random.key(self.config.seed),
            experiment.teacher_loss,
            experiment.teacher_tx,
            self.batches(experiment.dataset.train, config.batch_size, self.config.seed),
            None,
            health,
        )
        checkpoint.export(folder, state.ema_params, self.teacher_card)
        return jax.tree.map(np.asarray, state.ema_params)

    def given_teacher(self, folder: Path) -> Any:
        """The parameters of another run's teacher, if it is what the config describes.

        Raises UserError.
        """
        params, found = checkpoint.load_export(folder)
        if found.get("role") not in ("teacher", "student"):
            raise UserError(
                f"config.teacher.path={folder} holds a {found.get('role')}; give the teacher/"
                " folder of a run"
            )
        if list(self.experiment.image_shape) != list(found["data"]["image_shape"]):
            shapes = (
                f"{found['data']['image_shape']}, the data's are"
                f" {list(self.experiment.image_shape)}"
            )
            raise UserError(
                f"config.teacher.path={folder} draws images of shape {shapes}; give a teacher of"
                " this data"
            )
        for key in ("model", "schedule", "prediction"):
            if json.loads(json.dumps(self.teacher_card[key])) != found[key]:
                raise UserError(
                    f"config.teacher.path={folder} was trained with {key} = {found[key]}, the"
                    f" config says {self.teacher_card[key]}"
                )
        if from_student(self.config):
            if found["role"] != "student":
                raise UserError(
                    f"config.teacher.path={folder} holds a teacher; config.method.name = 'endpoint'"
                    " needs the student/ folder of a run"
                )
            for key in ("solver", "grid", "times", "noise_correction"):
                here, there = self.teacher_card["sampler"][key], found["sampler"][key]
                if json.loads(json.dumps(here)) != there:
                    raise UserError(
                        f"config.teacher.path={folder} is drawn from with {key} = {there}, the"
                        f" config says {here}"
                    )
        return params

    def student(self, teacher_params: Any, evaluator: evaluate.Evaluator) -> Any:
        """The student's parameters: from its export, or distilled."""
        folder = self.workdir / "student"
        if (folder / "card.json").exists():
            return checkpoint.load_export(folder)[0]
        experiment, config = self.experiment, self.config
        split = experiment.dataset.train
        if experiment.adversarial_on and config.adversarial.reals == "teacher":
            split = self.teacher_reals(teacher_params)
        health = StudentHealth(self, teacher_params, evaluator)
        state = self.train(
            "student",
            experiment.student_params(teacher_params),
            jax.random.key(config.seed + 1),
            experiment.student_loss,
            experiment.student_tx,
            self.batches(split, config.student.batch_size, config.seed + 1),
            teacher_params,
            health,
            ema_of=student_of,
        )
        checkpoint.export(folder, state.ema_params, self.student_card)
        return jax.tree.map(np.asarray, state.ema_params)

    def teacher_reals(self, teacher_params: Any) -> data.Split:
        """Images of the teacher, to stand for reals where no data may be used."""
        count, block = self.config.adversarial.pool, self.config.eval.batch_size
        sample = self.sample_fn(
            self.experiment.teacher_sampler,
            guidance=self.config.teacher.guidance,
            correct_noise=False,
        )
        grid = self.experiment.teacher_sampler.grid(self.config.teacher.steps)
        images: list[np.ndarray] = []

        def work() -> Iterator[None]:
            for i in range(0, count, block):
                images.append(
                    sample(
                        teacher_params,
                        self.noise(self.config.seed + 200, i, block),
                        self.labels(block, i),
                        grid,
                    )
                )
                yield

        loop.prepare("the teacher's images for the discriminator", work(), self.stop)
        stacked = np.concatenate(images)
        return data.Split(stacked, self.labels(len(stacked)))

    def batches(self, split: data.Split, size: int, seed: int) -> data.Batches:
        """This process's rows of the batches of a split."""
        return data.Batches(
            split, size, seed, partition.process_rows(self.experiment.layout.mesh, size)
        )

    def train(
        self,
        name: str,
        params: Any,
        key: jax.Array,
        loss_fn: LossFn,
        tx: optax.GradientTransformation,
        batches: data.Batches,
        teacher_params: Any,
        health: loop.HealthFn,
        *,
        ema_of: Callable[[Any], Any] = everything,
    ) -> TrainState:
        """One phase to its end; resumes where a checkpoint is."""
        block = self.config[name]
        state, seconds = train_phase(
            name,
            lambda: params,
            params,
            key,
            loss_fn,
            tx,
            batches.__getitem__,
            teacher_params,
            health,
            layout=self.experiment.layout,
            ema_decay=block.ema_decay,
            ema_of=ema_of,
            steps=block.iterations,
            health_every=block.health_every,
            log=self.config.log,
            workdir=self.workdir,
            stop=self.stop,
            advice=f"lower config.{name}.learning_rate and start in a new workdir",
            keep_best=block.get("keep_best", ""),
        )
        self.record(name, seconds.total)
        self.record(f"saving the {name}", seconds.saving)
        return state

    def student_images(
        self, params: Any, noise: jax.Array, labels: np.ndarray, programs: dict[str, Any]
    ) -> dict[int, np.ndarray]:
        """{steps: images} of every step count on the same noise, with one trajectory for all that
        share a grid's prefix.
        """
        sampler = self.experiment.student_sampler
        images: dict[int, np.ndarray] = {}
        if "visited" not in programs:
            programs["visited"] = jax.jit(
                partial(sampler.visited, correct_noise=self.config.method.noise_correction)
            )
        for grid in flash.unique_grids(list(self.experiment.grids.values())):
            visited = np.asarray(programs["visited"](params, noise, labels, jnp.asarray(grid)))
            images |= {
                n: visited[n - 1]
                for n, g in self.experiment.grids.items()
                if n <= len(grid) and np.array_equal(g, grid[:n])
            }
        return dict(sorted(images.items()))

    # -- results

    def write_program(self, params: Any) -> None:
        """sampler.stablehlo: (params, noise [b, h, w, c], labels [b], times [n]) -> images [b, h,
        w, c] in [0, 1].

        b and n are free, so that one file serves every batch and every number of steps. Weights are
        arguments.
        """
        sampler = self.experiment.student_sampler
        b, n = jax.export.symbolic_shape("b, n")
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
        program = jax.jit(
            partial(sampler.sample, guidance=1.0, correct_noise=self.config.method.noise_correction)
        )
        exported = jax.export.export(program, platforms=("cpu", "tpu", "cuda"))(
            shapes,
            jax.ShapeDtypeStruct((b, *self.experiment.image_shape), jnp.float32),
            jax.ShapeDtypeStruct((b,), jnp.int32),
            jax.ShapeDtypeStruct((n,), jnp.float32),
        )
        path = self.workdir / "sampler.stablehlo"
        path.with_suffix(".tmp").write_bytes(exported.serialize())
        os.replace(path.with_suffix(".tmp"), path)

    def write_results(
        self, drawn: list[Drawn], seconds: float, evaluator: evaluate.Evaluator
    ) -> dict[str, Any]:
        """Score what was `drawn` in so many seconds on config.eval.split; results.json, results.md,
        results.png and curves.png.
        """
        began = time.perf_counter()
        rows, pictures = self.score(drawn, evaluator)
        self.record("evaluation", seconds + time.perf_counter() - began)
        teachers = [row for row in rows if row["model"] == "teacher"]
        reference = (
            {k: teachers[0][k] for k in ("model", "steps", "guidance", "fd", "fd_noise")}
            if teachers
            else None
        )
        for row in rows:
            row["ratio"] = round(row["fd"] / reference["fd"], 4) if reference else None
        ev, dataset, reals = self.config.eval, self.experiment.dataset, evaluator.reference
        results = {
            "rows": rows,
            "reference": reference,
            "floor_fd": round(evaluator.floor_fd(), 5),
            "train_fd": round(evaluator.floor_fd_train(), 5),
            "protocol": {
                "reference_set": f"{dataset.name} {ev.split} split",
                "reference_count": len(reals.labels),
                "reference_sha256": data.fingerprint(reals),
                "extractor_sha256": evaluator.extractor.hash,
                "extractor_accuracy": round(evaluator.classifier_accuracy, 4),
                "features": ev.features,
                "samples": ev.samples,
                "sampling_seed": ev.seed,
                "pixel_range": [0.0, 1.0],
                "fd_noise": "standard error over samples, by a jackknife over 50 blocks of them",
                "floor_fd": (
                    f"between two halves of the {ev.split} split (half as many images as any row's"
                    " reference)"
                ),
                "train_fd": f"of the training images to the {ev.split} split",
            },
            "seed": self.config.seed,
            "seconds": self.seconds,
            "config": json.loads(self.config.to_json()),
            "versions": versions(),
        }
        checkpoint.write_json(self.workdir / "results.json", results)
        (self.workdir / "results.md").write_text(self.summary(results))
        report.results_picture(self.workdir / "results.png", results, pictures)
        curves = {
            p.stem: loop.read_curve(p)
            for p in sorted((self.workdir / "curves").glob("*.jsonl"), reverse=True)
        }
        if curves:
            report.curves_picture(self.workdir / "curves.png", curves)
        return results

    def draw(self, teacher_params: Any, student_params: Any) -> list[Drawn]:
        """The images of all rows of the table, the reference first.

        All processes draw, each its part, and hold all.
        """
        config, experiment = self.config, self.experiment
        settings = [
            ("teacher", config.teacher.steps, g)
            for g in dict.fromkeys((config.teacher.guidance, *config.eval.guidances))
        ]
        settings += [("teacher", n, config.teacher.guidance) for n in experiment.grids]
        settings += [("student", n, 1.0) for n in experiment.grids]
        found: list[Drawn] = []
        programs: dict[Any, Callable[..., np.ndarray]] = {}
        for model, steps, guidance in (
            setting for setting in settings if setting[0] in config.eval.models
        ):
            is_teacher = model == "teacher"
            sampler, params = (
                (experiment.teacher_sampler, teacher_params)
                if is_teacher
                else (experiment.student_sampler, student_params)
            )
            key = (model, guidance)
            if key not in programs:
                programs[key] = self.sample_fn(
                    sampler,
                    guidance=guidance,
                    correct_noise=sampler.card["sampler"]["noise_correction"],
                )
            images, rate = self.generate(
                programs[key],
                params,
                sampler.grid(steps) if is_teacher else experiment.grids[steps],
            )
            found.append(Drawn(model, steps, guidance, images, rate))
        return found

    def score(
        self, drawn: list[Drawn], evaluator: evaluate.Evaluator
    ) -> tuple[list[dict[str, Any]], dict[Any, np.ndarray]]:
        """Rows of the table, and the first picture row of each sampler."""
        labels = self.labels(self.config.eval.samples)
        rows: list[dict[str, Any]] = []
        pictures: dict[Any, np.ndarray] = {}
        for model, steps, guidance, images, rate in drawn:
            scores = evaluator(images, labels)
            row = {"model": model, "steps": steps, "guidance": guidance}
            row |= {k: None if np.isnan(v) else round(v, 5) for k, v in scores._asdict().items()}
            rows.append(row | {"images_per_second": round(rate, 1)})
            say(
                f"  {model} {steps:2d} steps, guidance {guidance:g}: FD {scores.fd:.4f} ±"
                f" {scores.fd_noise:.4f}, accuracy {scores.accuracy:.3f}, precision"
                f" {scores.precision:.3f}, recall {scores.recall:.3f}, diversity"
                f" {scores.diversity:.3f}"
            )
            if guidance == self.config.teacher.guidance or model == "student":
                pictures[model, steps] = images[: 2 * self.experiment.num_classes]
        return rows, pictures

    def generate(
        self, program: Callable[..., np.ndarray], params: Any, grid: np.ndarray
    ) -> tuple[np.ndarray, float]:
        """eval.samples images, and the images a second of all processes without the compile.

        They do not depend on the processes.
        """
        ev = self.config.eval
        block = min(ev.batch_size, ev.samples)
        starts = range(0, ev.samples, block)
        noises = [self.noise(ev.seed, i, block) for i in starts]
        params = jax.device_put(params)
        program(params, noises[0], self.labels(block), grid)
        jax.block_until_ready(noises)
        began = time.perf_counter()
        images = distributed.divided(
            len(starts), lambda i: program(params, noises[i], self.labels(block, starts[i]), grid)
        )
        rate = block * len(images) / (time.perf_counter() - began)
        return np.concatenate(images)[: ev.samples], rate

    def summary(self, results: Mapping[str, Any]) -> str:
        """results.md."""
        seconds = ", ".join(f"{k} {v:.0f} s" for k, v in results["seconds"].items())
        protocol = results["protocol"]
        return (
            f"# {self.experiment.dataset.name}, seed"
            f" {results['seed']}\n\n{report.markdown_table(results['rows'])}\nFD of"
            f" {protocol['samples']:,} samples to the {protocol['reference_count']} images of the"
            f" {protocol['reference_set']}; two real halves are {results['floor_fd']:.3f} apart,"
            f" the training images score {results['train_fd']:.3f}. Feature extractor"
            f" {protocol['extractor_sha256']}, accuracy {protocol['extractor_accuracy']:.3f} on the"
            f" same images.\n\nWall time: {seconds}; {results['versions']['machine']}.\n"
        )


class StudentHealth:
    """The health line: the student on fixed noises against the teacher on the same."""

    def __init__(self, run: Run, teacher_params: Any, evaluator: evaluate.Evaluator) -> None:
        config = run.config
        count = config.log.health_samples
        self.run, self.evaluator = run, evaluator
        self.programs: dict[str, Any] = {}
        self.noise, self.labels = run.noise(config.seed + 100, 0, count), run.labels(count)
        sampler = run.experiment.teacher_sampler
        sample = run.sample_fn(
            sampler,
            guidance=config.teacher.guidance,
            correct_noise=sampler.card["sampler"]["noise_correction"],
        )
        self.teacher = sample(
            teacher_params, self.noise, self.labels, sampler.grid(config.teacher.steps)
        )
        say(
            f"health  teacher: FD {evaluator.quick_fd(self.teacher):.3f} on validation ({count}"
            f" images, {config.teacher.steps} steps), saturation"
            f" {evaluate.saturation(self.teacher):.3f}"
        )
        images, numbers = self.measure(teacher_params, 0)  # the student starts as the teacher
        self.previous = {n: numbers[f"diversity_{n}"] for n in images}

    def __call__(self, params: Any, step: int) -> dict[str, float]:
        """Print the line, warn of a collapse, save a picture, and return the numbers."""
        images, numbers = self.measure(params, step)
        diversity = {n: numbers[f"diversity_{n}"] for n in images}
        last = step >= self.run.config.student.iterations
        # Few steps of the teacher are blurred, and so is the student at its start: while it
        # recovers it is no collapse.
        low = {
            n: v
            for n, v in diversity.items()
            if v < 0.8 and (last or v < self.previous.get(n, 1.0) + 0.02)
        }
        self.previous = diversity
        if low:
            where = ", ".join(f"{n} step{'s' * (n > 1)} ({v:.2f})" for n, v in low.items())
            say(
                f"WARNING student {step}: diversity below 0.8 of the teacher's at {where}; if it"
                " stays there the student collapses: use config.method.noise=trajectory, a"
                " stronger shift or a lower config.adversarial.weight"
            )
        columns = min(2 * self.run.experiment.num_classes, len(self.teacher))
        rows = np.stack([self.teacher[:columns], *(i[:columns] for i in images.values())])
        report.save_grid(
            self.run.workdir / "samples" / f"student_{step:07d}.png",
            rows.reshape(-1, *rows.shape[2:]),
            columns=columns,
        )
        return numbers

    def measure(self, params: Any, step: int) -> tuple[dict[int, np.ndarray], dict[str, float]]:
        """The images of each step count, and their numbers, printed."""
        numbers: dict[str, float] = {}
        images = self.run.student_images(params, self.noise, self.labels, self.programs)
        for n, student in images.items():
            health = evaluate.health(student, self.teacher, self.labels) | {
                "fd": self.evaluator.quick_fd(student)
            }
            say(
                f"health  student {step}, {n} step{'s' * (n > 1)}: "
                + ", ".join(f"{k} {v:.3f}" for k, v in health.items())
            )
            numbers |= {f"{k}_{n}": v for k, v in health.items()}
        return images, numbers


def run(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """The whole job; returns what results.json holds.

    Raises UserError, NonFiniteError or Stopped.
    """
    workdir = Path(workdir)
    try:
        experiment = build(config)
    except ValueError as error:
        raise UserError(str(error)) from None
    prepare_workdir(workdir, config)
    if (workdir / "results.json").exists():
        say(f"{workdir} is finished: evaluating it again")
    with loop.StopSignal().installed() as stop:
        job = Run(experiment, workdir, stop)
        try:
            if config.teacher.path and not (workdir / "teacher").exists():
                job.given_teacher(Path(config.teacher.path))
            extractor = job.extractor()
            validation = evaluate.Evaluator(
                experiment.dataset, experiment.dataset.validation, extractor
            )
            teacher_params = job.teacher(validation)
            student_params = job.student(teacher_params, validation)
        except checkpoint.CheckpointError as error:
            raise UserError(str(error)) from None
    # Exports and checkpoints are on disk; a signal from here on may end the process at once.
    if distributed.is_main():
        job.write_program(student_params)
    distributed.barrier("exports are written")
    say(f"evaluation on the {config.eval.split} split")
    began = time.perf_counter()
    drawn = job.draw(teacher_params, student_params)
    seconds = time.perf_counter() - began
    if not distributed.is_main():
        distributed.barrier("results are written")  # process 0 scores; who left before would end it
        return {}
    evaluator = evaluate.Evaluator(
        experiment.dataset, scored_split(config, experiment.dataset), extractor
    )
    results = job.write_results(drawn, seconds, evaluator)
    distributed.barrier("results are written")
    return results


def main(argv: list[str]) -> None:
    """Entry point after flag parsing."""
    if len(argv) > 1:
        fail(
            f"unexpected argument {argv[1]!r}; flags look like --config=configs/digits.py"
            " --workdir=DIR --config.key=value"
        )
    logging.set_verbosity(logging.FATAL)  # Orbax logs with a traceback what it raises as well
    config = given_config()
    try:
        distributed.start(
            COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, detect=DISTRIBUTED.value
        )
        about = {
            f"config.{key}": value for key, value in flatten(json.loads(config.to_json())).items()
        }
        distributed.check_same(
            {
                **about,
                "workdir": WORKDIR.value,
                "the code": distributed.code_hash(),
                **versions(machine=False),
            }
        )
    except distributed.DistributedError as error:
        fail(str(error))
    with distributed.device_errors_are_one_line(), full_disk_is_one_line():
        job(config)


def job(config: ConfigDict) -> None:
    """The run of a config, and what it says at its end."""
    if config.get("task") == "text_to_image":
        run_text(config)
        return
    try:
        results = run(config, WORKDIR.value)
    except loop.Stopped as stopped:
        say(str(stopped))
        return
    except (UserError, loop.NonFiniteError) as error:
        fail(str(error))
    if results and distributed.is_main():
        print(f"\n{report.markdown_table(results['rows'])}")
        print(
            f"{Path(WORKDIR.value) / 'results.png'} shows the images, results.md keeps this table"
        )


def run_text(config: ConfigDict) -> None:
    """A config that distils a diffusers folder."""
    try:
        from jaxdistill.tasks.text_to_image import (
            distil,
        )  # its libraries are not needed by the other configs

        distil.run(config, WORKDIR.value)
    except loop.Stopped as stopped:
        say(str(stopped))
        return
    except ModuleNotFoundError as error:
        fail(missing_extra(error))
    except (UserError, loop.NonFiniteError) as error:
        fail(str(error))
    if not distributed.is_main():
        return
    folder = Path(WORKDIR.value)
    print((folder / "results.md").read_text())
    print(
        f"{folder / 'diffusers'} is the student as a pipeline folder, {folder / 'student'} its"
        " Orbax export"
    )


def read_results(path: Path) -> dict[str, Any]:
    """A results.json. Raises UserError if it is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise UserError(f"{path} is damaged; remove it and run again") from None


def fail(line: str) -> NoReturn:
    """One clear line, exit code 2."""
    if checkpoint.FULL in line:
        print(f"error: {line}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(2)  # other libraries' exit handlers would write again, and trace back
    distributed.leave(f"error: {line}", 2)


@contextmanager
def full_disk_is_one_line() -> Iterator[None]:
    """Leave with one line where a file can't be written for want of space.

    What was finished before is kept.
    """
    try:
        yield
    except OSError as error:
        if not checkpoint.disk_is_full(error):
            raise
        fail(
            f"{checkpoint.FULL}{f' ({error.filename})' if error.filename else ''}; free some space"
            " and give the same command again"
        )


def parse_flags() -> list[str]:
    """The arguments that are no flags; leaves with one line for a mistake in the flags or the
    config file.
    """
    try:
        return flags.FLAGS(sys.argv)
    except (
        flags.Error,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        OSError,
        ImportError,
    ) as error:
        # KeyError's str is the repr of its message, once more for each block it passed through.
        text = " ".join(str(error).replace("\\n", " ").replace("\\", "").replace("'", "").split())
        fail(
            f"unknown config key: {text}" if isinstance(error, (AttributeError, KeyError)) else text
        )


def given_config(*, workdir: bool = True) -> ConfigDict:
    """The config of the flags; leaves with one line where it or the workdir is missing or the file
    cannot be loaded.
    """
    if workdir and (not flags.FLAGS["config"].present or WORKDIR.value is None):
        fail("both flags are needed: --config=configs/digits.py --workdir=DIR")
    if not flags.FLAGS["config"].present:
        fail("--config is missing: give a file such as configs/digits.py")
    try:
        CONFIG.value.keys()  # a file that could not be loaded fails at its first use
        return CONFIG.value
    except Exception as error:  # whatever the user's file raises
        cause = error.__cause__ or error
        text = next(
            (line.strip() for line in reversed(str(cause).splitlines()) if line.strip()),
            type(cause).__name__,
        )
        fail(f"--config cannot be loaded: {text}")


def cli() -> None:
    """Parse the flags, then run main."""
    main(parse_flags())


if __name__ == "__main__":
    cli()
