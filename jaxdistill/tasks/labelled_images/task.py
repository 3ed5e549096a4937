"""Class-conditional images as a task: the digits of scikit-learn, or Fashion-MNIST."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxdistill.errors import choose
from jaxdistill.interop import card
from jaxdistill.run import checkpoint, inputs
from jaxdistill.run.run import Run
from jaxdistill.run.workdir import say
from jaxdistill.tasks.labelled_images import data
from jaxdistill.tasks.labelled_images.scores import (
    Evaluator,
    Extractor,
    Metrics,
    make_extractor,
    train_extractor,
)
from jaxdistill.tasks.settings import check_frechet
from jaxdistill.tasks.small import Batches, Sampled, SmallTask

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
    return data.checked(choose(makers, block["name"], "config.data.name")())


class LabelledData:
    """A dataset and, once it is open, the extractor and the evaluators of its scores.

    Raises ValueError.
    """

    extractor: Extractor

    def __init__(self, config: ConfigDict) -> None:
        self.config = config
        self.dataset = make_dataset(config.data.to_dict())

    def made_from(self) -> dict[str, inputs.Input]:
        """What it is, by name."""
        splits = (self.dataset.train, self.dataset.validation, self.dataset.test)
        return {"the images (config.data)": inputs.value([data.fingerprint(s) for s in splits])}

    def open(self, run: Run) -> None:
        """The frozen classifier of the metrics: trained at the first start, then read."""
        ev, folder = self.config.eval, run.workdir / "extractor"
        size: dict[str, Any] = {"channels": tuple(ev.channels), "features": ev.features}
        if (folder / "card.json").exists():
            params, _ = checkpoint.load_export(folder)
            classes, images = len(self.dataset.class_names), self.dataset.train.images
            self.extractor = make_extractor(params, images, num_classes=classes, **size)
            return
        with run.timed("extractor"):
            say("feature extractor: training")
            self.extractor = train_extractor(self.dataset, steps=ev.extractor_steps, **size)
        about = {"role": "feature extractor", "hash": self.extractor.hash}
        sizes = {"channels": list(ev.channels), "features": ev.features}
        sha256 = data.fingerprint(self.dataset.train)
        about |= {"data": self.dataset.name, "data_sha256": sha256}
        made = {"format": card.FORMAT, **about, **sizes}
        checkpoint.export(folder, self.extractor.params, made)

    def split(self) -> data.Split:
        """The one that config.eval.split names. Raises ValueError."""
        splits = {"test": self.dataset.test, "validation": self.dataset.validation}
        return choose(splits, self.config.eval.split, "config.eval.split")

    @cached_property
    def evaluator(self) -> Evaluator:
        """Scores against that split."""
        if self.config.eval.split == "validation":
            return self.validation
        return Evaluator(self.dataset, self.split(), self.extractor)

    @cached_property
    def validation(self) -> Evaluator:
        """Scores for the health lines."""
        return Evaluator(self.dataset, self.dataset.validation, self.extractor)


class LabelledImages(SmallTask):
    """See `SmallTask`. Raises ValueError."""

    columns, shown = COLUMNS, PICTURED
    charted = MappingProxyType({"fd": "Fréchet distance ↓", "accuracy": "accuracy ↑"})

    def __init__(
        self,
        config: ConfigDict,
        *,
        share: "LabelledImages | None" = None,
        devices: int | None = None,
    ) -> None:
        self.data = share.data if share else LabelledData(config)
        self.dataset = self.data.dataset
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
            share=share,
            devices=devices,
        )

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
        count = len(self.data.split().labels)
        if ev.features >= count // 2:
            raise ValueError(
                f"config.eval.features = {ev.features} is too many for halves of the"
                f" {count} {ev.split} images; at most {count // 2 - 1} can be used"
            )

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
        return {"fd": self.data.validation.quick_fd(images)}

    # -- the table

    def drawn(self, sampled: Sampled) -> tuple[tuple[np.ndarray, ...], float]:
        """Of the classes in turn."""
        ev = self.config.eval
        images, rate = self.timed_draw(sampled, self.labels, ev.samples, ev.seed)
        return (images,), rate

    def scores(self, *images: np.ndarray) -> Metrics:
        """Against the scored split."""
        return self.data.evaluator(images[0], self.labels(np.arange(len(images[0]))))

    def captions(self) -> Sequence[str]:
        """The classes, twice."""
        return [str(name) for name in self.dataset.class_names] * 2

    def reals(self) -> dict[str, Any]:
        """Of two halves, of the train split, and what the classifier itself reaches."""
        evaluator = self.data.evaluator
        return {
            "ceiling": {"accuracy": round(evaluator.classifier_accuracy, 4)},
            "floor_fd": round(evaluator.floor_fd(), 5),
            "train_fd": round(evaluator.floor_fd_train(), 5),
        }

    def protocol(self) -> dict[str, Any]:
        """With the reference and the extractor."""
        ev, evaluator = self.config.eval, self.data.evaluator
        return {
            **super().protocol(),
            "reference_set": f"{self.dataset.name} {ev.split} split",
            "reference_count": len(evaluator.reference.labels),
            "reference_sha256": data.fingerprint(evaluator.reference),
            "extractor_sha256": evaluator.extractor.hash,
            "extractor_accuracy": round(evaluator.classifier_accuracy, 4),
            "features": ev.features,
            "fd_noise": "standard error over samples, by a jackknife over 50 blocks of them",
            "floor_fd": (
                f"between two halves of the {ev.split} split (half as many images as any row's"
                " reference)"
            ),
            "train_fd": f"of the training images to the {ev.split} split",
        }

    def notes(self) -> str:
        """Below the table of results.md."""
        ev, evaluator = self.config.eval, self.data.evaluator
        count = len(evaluator.reference.labels)
        return (
            f"FD of {ev.samples:,} samples to the {count} images of the {self.dataset.name}"
            f" {ev.split} split. Two real halves are {evaluator.floor_fd():.3f} apart, the training"
            f" images score {evaluator.floor_fd_train():.3f}. Feature extractor"
            f" {evaluator.extractor.hash}, accuracy {evaluator.classifier_accuracy:.3f} on the same"
            " images."
        )

    def write_more(self, folder: Path, served: Mapping[int, Any]) -> None:
        """sampler.stablehlo."""
        self.write_program(folder / "sampler.stablehlo", next(iter(served.values())))

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
