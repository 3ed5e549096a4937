"""Class-conditional images as a task: the digits of scikit-learn, or Fashion-MNIST."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxdistill.names import choose
from jaxdistill.run import checkpoint, distributed, report
from jaxdistill.run.distillation import check_keep_best
from jaxdistill.run.run import Run
from jaxdistill.run.workdir import say
from jaxdistill.tasks.labelled_images import data
from jaxdistill.tasks.labelled_images.scores import (
    Evaluator,
    Extractor,
    make_extractor,
    train_extractor,
)
from jaxdistill.tasks.settings import check_frechet
from jaxdistill.tasks.small import Batches, SmallTask, rounded

COLUMNS = {
    "model": ("model", "{}"),
    "steps": ("steps", "{}"),
    "guidance": ("guidance", "{:g}"),
    "fd": ("FD ↓", "{:.3f}"),
    "fd_noise": ("± FD", "{:.3f}"),
    "fd_validation": ("FD, validation ↓", "{:.3f}"),
    "ratio": ("FD / reference ↓", "{:.2f}"),
    "accuracy": ("accuracy ↑", "{:.3f}"),
    "precision": ("precision ↑", "{:.3f}"),
    "recall": ("recall ↑", "{:.3f}"),
    "diversity": ("diversity (real = 1)", "{:.3f}"),
    "nearest_neighbour": ("distance to train (real = 1)", "{:.2f}"),
    "images_per_second": ("images/s", "{:,.0f}"),
}
PICTURED = ("fd", "accuracy", "precision", "recall", "diversity")
"""Columns of the picture's table."""


def make_dataset(block: Mapping[str, Any]) -> data.Dataset:
    """{"name", "folder"} -> Dataset. Raises ValueError."""
    makers: dict[str, Callable[[], data.Dataset]] = {
        "digits": data.digits,
        "fashion": lambda: data.fashion_mnist(block["folder"]),
    }
    return choose(makers, block["name"], "config.data.name")()


class LabelledImages(SmallTask):
    """See `SmallTask`. Raises ValueError."""

    def __init__(self, config: ConfigDict) -> None:
        self.dataset = make_dataset(config.data.to_dict())
        names = list(self.dataset.class_names)
        super().__init__(
            config,
            about={
                "name": self.dataset.name,
                "image_shape": list(self.dataset.train.images.shape[1:]),
                "range": [-1.0, 1.0],
                "class_names": names,
            },
            model={**config.model.to_dict(), "num_classes": len(names)},
            cond=jax.ShapeDtypeStruct((1,), jnp.int32),
        )
        self.check()
        self.distillation.check()

    def check(self) -> None:
        """Raise ValueError for settings that only this task has."""
        ev = self.config.eval
        if not ev.models:
            raise ValueError(
                "config.eval.models must name what to score: 'teacher', 'student' or both, got ()"
            )
        for name in ev.models:
            choose({"teacher": 0, "student": 0}, name, "config.eval.models")
        check_frechet(self.config, ev.features, "eval.samples", "log.health_samples")
        count = len(self.scored_split().labels)
        if ev.features >= count // 2:
            raise ValueError(
                f"config.eval.features = {ev.features} is too many for halves of the"
                f" {count} {ev.split} images; at most {count // 2 - 1} can be used"
            )
        steps = sorted(self.config.student.steps)
        check_keep_best(self.config.student.keep_best, ("fd", "distance"), steps)

    def scored_split(self) -> data.Split:
        """The split that config.eval.split names. Raises ValueError."""
        splits = {"test": self.dataset.test, "validation": self.dataset.validation}
        return choose(splits, self.config.eval.split, "config.eval.split")

    # -- conditioning and data

    def labels(self, numbers: np.ndarray) -> np.ndarray:
        """The classes in turn."""
        return (numbers % len(self.dataset.class_names)).astype(np.int32)

    train_conds = health_conds = labels

    def conds_key(self) -> Any:
        """They are numbers."""
        return len(self.dataset.class_names)

    def health_groups(self, count: int) -> np.ndarray:
        """The classes."""
        return self.labels(np.arange(count))

    def image_batches(self, size: int, seed: int, rows: np.ndarray | None) -> Batches:
        """Of the train split."""
        return data.Batches(self.dataset.train, size, seed, rows).__getitem__

    def quick(self, images: np.ndarray) -> dict[str, float]:
        """The Fréchet distance to the validation split."""
        return {"fd": self.validation.quick_fd(images)}

    # -- the run

    def extractor(self, run: Run) -> Extractor:
        """The frozen classifier of the metrics: trained at the first start, then read."""
        ev, folder = self.config.eval, run.workdir / "extractor"
        size: dict[str, Any] = {"channels": tuple(ev.channels), "features": ev.features}
        if (folder / "card.json").exists():
            params, _ = checkpoint.load_export(folder)
            classes = len(self.dataset.class_names)
            return make_extractor(params, self.dataset.train.images, num_classes=classes, **size)
        with run.timed("extractor"):
            say("feature extractor: training")
            made = train_extractor(self.dataset, steps=ev.extractor_steps, **size)
        about = {"role": "feature extractor", "hash": made.hash, "data": self.dataset.name}
        sizes = {"channels": list(ev.channels), "features": ev.features}
        card = {"format": self.common["format"], **about, **sizes}
        checkpoint.export(folder, made.params, card)
        return made

    def execute(self, run: Run) -> dict[str, Any]:
        """The whole job; returns what results.json holds, {} in processes other than the first."""
        path = self.teacher_path
        if path and not (run.workdir / "teacher").exists():
            self.given_teacher(Path(path))
        extractor = self.extractor(run)
        self.validation = Evaluator(self.dataset, self.dataset.validation, extractor)
        teacher = self.teacher(run)
        served = self.served(run, teacher)
        # Exports and checkpoints are on disk: a signal from here on may end the process at once.
        run.place.stop.release()
        if distributed.is_main():
            self.write_program(run.workdir / "sampler.stablehlo", next(iter(served.values())))
        distributed.barrier("exports are written")
        return self.evaluate(run, extractor, teacher, served)

    def evaluate(
        self, run: Run, extractor: Extractor, teacher: Any, served: Mapping[int, Any]
    ) -> dict[str, Any]:
        """The table and its picture. All processes draw, the first one scores."""
        ev = self.config.eval
        say(f"evaluation on the {ev.split} split")
        with run.timed("evaluation"):
            drawn = [
                (sampled, *self.timed_draw(sampled, self.labels, ev.samples, ev.seed))
                for sampled in self.sampled(teacher, served)
            ]
            if not distributed.is_main():
                distributed.barrier("results are written")  # who left before would end it
                return {}
            evaluator = Evaluator(self.dataset, self.scored_split(), extractor)
            rows, pictures = self.score(drawn, evaluator)
        results = run.write_results(
            self.results(rows, evaluator),
            title=f"{self.dataset.name}, seed {self.config.seed}",
            notes=self.notes(evaluator),
            columns=COLUMNS,
        )
        shown = {key: COLUMNS[key] for key in PICTURED}
        report.results_picture(run.workdir / "results.png", results, pictures, shown)
        distributed.barrier("results are written")
        return results

    def score(
        self, drawn: Sequence[Any], evaluator: Evaluator
    ) -> tuple[list[dict[str, Any]], dict[tuple[str, int], np.ndarray]]:
        """Rows of the table, and the first images of each sampler."""
        labels = self.labels(np.arange(self.config.eval.samples))
        rows: list[dict[str, Any]] = []
        pictures: dict[tuple[str, int], np.ndarray] = {}
        reference = self.teacher_sampler.card["sampler"]["guidance"]
        for sampled, images, rate in drawn:
            scores = rounded(evaluator(images, labels)._asdict())
            row = {"model": sampled.model, "steps": sampled.steps, "guidance": sampled.guidance}
            rows.append({**row, **scores, "images_per_second": rate})
            told = ", ".join(f"{key} {value}" for key, value in scores.items())
            say(f"  {sampled.model} {sampled.steps:2d} steps, {sampled.guidance:g}: {told}")
            if sampled.guidance == reference or sampled.model == "student":
                pictured = images[: 2 * len(self.dataset.class_names)]
                pictures[sampled.model, sampled.steps] = pictured
        return rows, pictures

    def results(self, rows: list[dict[str, Any]], evaluator: Evaluator) -> dict[str, Any]:
        """What results.json says beyond every run's."""
        first = rows[0] if rows[0]["model"] == "teacher" else None
        keys = ("model", "steps", "guidance", "fd", "fd_noise")
        reference = {k: first[k] for k in keys} if first else None
        for row in rows:
            row["ratio"] = round(row["fd"] / reference["fd"], 4) if reference else None
        ev, reals = self.config.eval, evaluator.reference
        return {
            "rows": rows,
            "reference": reference,
            "floor_fd": round(evaluator.floor_fd(), 5),
            "train_fd": round(evaluator.floor_fd_train(), 5),
            "protocol": {
                "split": ev.split,
                "reference_set": f"{self.dataset.name} {ev.split} split",
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
        }

    def notes(self, evaluator: Evaluator) -> str:
        """Below the table of results.md."""
        ev, count = self.config.eval, len(evaluator.reference.labels)
        return (
            f"FD of {ev.samples:,} samples to the {count} images of the {self.dataset.name}"
            f" {ev.split} split. Two real halves are {evaluator.floor_fd():.3f} apart, the training"
            f" images score {evaluator.floor_fd_train():.3f}. Feature extractor"
            f" {evaluator.extractor.hash}, accuracy {evaluator.classifier_accuracy:.3f} on the same"
            " images."
        )

    def write_program(self, path: Path, params: Any) -> None:
        """sampler.stablehlo: (params, noise [b, h, w, c], labels [b], times [n]) -> images
        [b, h, w, c] in [0, 1].

        b and n are free, so that one file serves every batch and every number of steps. Weights are
        arguments.
        """
        correct = self.recipe.sampler.noise_correction
        b, n = jax.export.symbolic_shape("b, n")
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
        sample = partial(self.student_sampler.sample, guidance=1.0, correct_noise=correct)
        exported = jax.export.export(jax.jit(sample), platforms=("cpu", "tpu", "cuda"))(
            shapes,
            jax.ShapeDtypeStruct((b, *self.image_shape), jnp.float32),
            jax.ShapeDtypeStruct((b,), jnp.int32),
            jax.ShapeDtypeStruct((n,), jnp.float32),
        )
        path.with_suffix(".tmp").write_bytes(exported.serialize())
        os.replace(path.with_suffix(".tmp"), path)
