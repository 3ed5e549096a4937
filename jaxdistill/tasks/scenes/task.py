"""Scenes as a task: captions in, 32x32 pictures of two garments out.

With config.data.source, the folder of Fashion-MNIST's files, there are real scenes: to train a
teacher and a recogniser, and as the methods' data. Without it a finished teacher is distilled from
captions alone, and scored against statistics of real scenes that are stored beside the recogniser.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxdistill.errors import UserError
from jaxdistill.interop import sentence_encoder
from jaxdistill.names import choose
from jaxdistill.run import checkpoint, distributed, report
from jaxdistill.run.distillation import check_keep_best
from jaxdistill.run.loop import tqdm
from jaxdistill.run.run import Run
from jaxdistill.run.workdir import say
from jaxdistill.tasks.labelled_images.data import fashion_mnist
from jaxdistill.tasks.scenes import reference, scenes
from jaxdistill.tasks.scenes.recognise import SCALE_IMAGES, SceneRecogniser, train_recogniser, unit
from jaxdistill.tasks.scenes.reference import Reference
from jaxdistill.tasks.scenes.scores import SceneEvaluator
from jaxdistill.tasks.settings import check_frechet
from jaxdistill.tasks.small import Batches, Sampled, SmallTask, rounded

SHAPE = (scenes.SIDE, scenes.SIDE, 3)
PICTURED = 8
"""Captions in a picture."""

COLUMNS = {
    "model": ("model", "{}"),
    "steps": ("steps", "{}"),
    "guidance": ("guidance", "{:g}"),
    "fd": ("FD ↓", "{:.3f}"),
    "fd_noise": ("± FD", "{:.3f}"),
    "ratio": ("FD / reference ↓", "{:.2f}"),
    "precision": ("precision ↑", "{:.3f}"),
    "recall": ("recall ↑", "{:.3f}"),
    "colour": ("colour ↑", "{:.3f}"),
    "garment": ("garment ↑", "{:.3f}"),
    "relation": ("relation ↑", "{:.3f}"),
    "all_right": ("all right ↑", "{:.3f}"),
    "unseen_all_right": ("unseen, all right ↑", "{:.3f}"),
    "diversity": ("diversity (real = 1)", "{:.3f}"),
    "images_per_second": ("images/s", "{:,.0f}"),
}
SHOWN = ("fd", "precision", "recall", "all_right", "diversity")
"""Columns of the picture's table."""


class SceneData:
    """Captions with their embeddings and, where there is a source, real scenes; the recogniser.

    All runs of a comparison share one. Making it reads no weights but the text encoder's.
    """

    def __init__(
        self,
        config: ConfigDict,
        folder: Path,
        *,
        base: Path | None = None,
        watch: Callable[..., Any] = iter,
    ) -> None:
        """`folder`: of what is made from the source, and of embeddings. `base`: where a recogniser
        is trained, by default there; config.base wins.
        """
        self.config = config
        self.base = Path(config.base) if config.base else base or folder
        self.encoder = sentence_encoder.load(config.text.folder)
        self.sources: Mapping[str, Any] = {}
        source = config.data.source
        if source:
            self.sources = scenes.open_scenes(source, folder / "scenes", scale=config.data.scale)
            self.captions = {
                split: [item["caption"].decode() for item in items]
                for split, items in self.sources.items()
            }
            self.references: dict[str, Reference] = {}
        else:
            self.references, self._scale = reference.load(self.base / "recogniser" / reference.FILE)
            self.captions = self._needed()
        wanted = [caption for captions in self.captions.values() for caption in captions]
        length = config.text.length
        self.embeddings = sentence_encoder.cached_embeddings(
            self.encoder, wanted, folder / "text", length=length, watch=watch
        )

    def _needed(self) -> dict[str, list[str]]:
        """The captions that a run without scenes reads: each costs the encoder time. Raises
        UserError.
        """
        ev, first, second = self.config.eval, *(self.references[s] for s in ("validation", "test"))
        count = max(ev.samples, self.config.log.health_samples)
        if count > len(first.captions):
            raise UserError(
                f"config.eval.samples and config.log.health_samples can be at most"
                f" {len(first.captions)} where config.data.source is empty, got {count}"
            )
        return {
            "train": scenes.train_captions(self.config.data.captions),
            "validation": list(first.captions[:count]),
            "test": list(second.captions[: ev.samples]),
            "unseen": list(second.unseen[: ev.unseen]),
        }

    @property
    def text(self) -> dict[str, Any]:
        """A card's "text"."""
        return {"sha256": self.encoder.hash, "length": self.config.text.length}

    @property
    def cond(self) -> dict[str, Any]:
        """Shapes of one row of conditioning."""
        length, width = self.config.text.length, self.encoder.model.hidden_size
        return {
            "tokens": jax.ShapeDtypeStruct((1, length, width), jnp.float32),
            "mask": jax.ShapeDtypeStruct((1, length), jnp.bool_),
        }

    def images(self, split: str, count: int) -> np.ndarray:
        """uint8 [count, h, w, 3], the split's first."""
        return scenes.images_of(self.sources[split], count)

    @cached_property
    def recogniser(self) -> SceneRecogniser:
        """Read from `base`, or trained there at the first need."""
        block, folder = self.config.recogniser, self.base / "recogniser"
        size: dict[str, Any] = {"channels": tuple(block.channels), "features": block.features}
        if (folder / "card.json").exists():
            params = checkpoint.load_export(folder)[0]
            if not self.sources:
                return SceneRecogniser(params, self._scale, **size)
            scaled = unit(self.images("train", SCALE_IMAGES))
            return SceneRecogniser(params, 1.0, **size).scaled(scaled)
        say("recogniser: training")
        # On every composition: one that never saw a pair would call its garment by its colour.
        garments = fashion_mnist(self.config.data.source).train
        sprites = scenes.make_sprites(garments.images, garments.labels)
        images, labels = scenes.every_composition(sprites, len(self.sources["train"]), 0)
        made = train_recogniser(
            images,
            labels,
            unit(self.images("train", SCALE_IMAGES)),
            steps=block.steps,
            batch_size=block.batch_size,
            learning_rate=block.learning_rate,
            **size,
        )
        about = {"format": "jaxdistill-export/1", "role": "recogniser", "hash": made.hash}
        checkpoint.export(folder, made.params, {**about, "recogniser": block.to_dict()})
        return made

    def reference(self, split: str) -> Reference:
        """Of real scenes of a split."""
        if split not in self.references:
            ev = self.config.eval
            self.references[split] = reference.measure(
                self.recogniser,
                self.sources,
                self.captions,
                self.config.data.source,
                split,
                diversity_captions=ev.diversity_captions,
                repeats=ev.repeats,
            )
        return self.references[split]

    def evaluator(self, split: str) -> SceneEvaluator:
        """Scores against a split of real scenes."""
        return SceneEvaluator(self.recogniser, self.reference(split))

    def conds(self, captions: Sequence[str]) -> Callable[[np.ndarray], Any]:
        """Numbers -> the conditioning of these captions, in turn."""
        return lambda rows: self.embeddings([captions[int(r) % len(captions)] for r in rows])


class SceneBatches:
    """An endless shuffled stream of {"x0" in [-1, 1], "cond"}; batch i depends on (seed, i) alone.

    Of a source without images "x0" is zeros of their shape.
    """

    def __init__(
        self, source: Any, embeddings: Any, size: int, seed: int, rows: np.ndarray | None
    ) -> None:
        self._embeddings, self._size = embeddings, size
        self._rows = range(size) if rows is None else [int(row) for row in rows]
        self._items = grain.MapDataset.source(source).shuffle(seed=seed).repeat()

    def __call__(self, i: int) -> dict[str, Any]:
        """Batch i."""
        items = [self._items[i * self._size + row] for row in self._rows]
        cond = self._embeddings([caption_of(item) for item in items])
        images = [image_of(item) for item in items]
        return {"x0": np.stack(images), "cond": cond}


def caption_of(item: Any) -> str:
    """The caption of a data source's item."""
    return item if isinstance(item, str) else item["caption"].decode()


def image_of(item: Any) -> np.ndarray:
    """The image of an item in [-1, 1], or zeros."""
    if isinstance(item, str):
        return np.zeros(SHAPE, np.float32)
    return item["image"].astype(np.float32) / 127.5 - 1.0


class Scenes(SmallTask):
    """See `SmallTask`. `data`: shared with other runs; by default made below `folder` (or, for a
    run of its own, when the run begins). Raises ValueError.
    """

    def __init__(
        self, config: ConfigDict, *, data: SceneData | None = None, share: SmallTask | None = None
    ) -> None:
        check(config)
        watch = watched("captions", lambda: None)
        self.data = data or SceneData(config, cache_folder(config), watch=watch)
        """Captions, embeddings and, where there is a source, real scenes."""
        super().__init__(
            config,
            about={"name": "scenes", "image_shape": list(SHAPE), "range": [-1.0, 1.0]},
            model=config.model.to_dict(),
            cond=self.data.cond,
            text=self.data.text,
            share=share,
        )
        steps = sorted(config.student.steps)
        check_keep_best(config.student.keep_best, ("fd", "distance"), steps)
        if share is None:
            self.distillation.check()

    @property
    def teacher_path(self) -> str:
        """Of config.teacher.path, or of config.base."""
        return self.config.teacher.path or (self.config.base and f"{self.config.base}/teacher")

    # -- conditioning and data

    def train_conds(self, numbers: np.ndarray) -> Any:
        """The train captions, in turn."""
        return self.data.conds(self.data.captions["train"])(numbers)

    def conds_key(self) -> Any:
        """The encoder and the captions."""
        return [self.data.text, self.data.captions["train"]]

    def health_conds(self, numbers: np.ndarray) -> Any:
        """The first validation captions, each twice: the same caption from two noises."""
        return self.data.conds(self.health_captions())(numbers)

    def health_captions(self) -> list[str]:
        """Of the health lines' images."""
        return list(self.data.captions["validation"])

    def health_groups(self, count: int) -> np.ndarray:
        """By what should be alike: the axis of a caption."""
        return self.data.reference("validation").labels[:count, 0]

    def image_batches(self, size: int, seed: int, rows: np.ndarray | None) -> Batches:
        """Of the train split."""
        return SceneBatches(self.data.sources["train"], self.data.embeddings, size, seed, rows)

    def noise_batches(self, size: int, seed: int, rows: np.ndarray | None) -> Batches:
        """Captions of the train split, with images where there are some."""
        source = self.data.sources.get("train") or self.data.captions["train"]
        return SceneBatches(source, self.data.embeddings, size, seed, rows)

    def quick(self, images: np.ndarray) -> dict[str, float]:
        """FD and all-right on validation."""
        return self.validation.quick(images)

    @cached_property
    def validation(self) -> SceneEvaluator:
        """Scores for the health lines."""
        return self.data.evaluator("validation")

    # -- the run

    def execute(self, run: Run) -> dict[str, Any]:
        """The whole job; returns what results.json holds, {} in processes other than the first."""
        if not self.config.base:
            self.data.base = run.workdir
        teacher = self.teacher(run)
        served = self.served(run, teacher)
        run.place.stop.release()
        return self.evaluate(run, teacher, served)

    def evaluate(self, run: Run, teacher: Any, served: Mapping[int, Any]) -> dict[str, Any]:
        """The table and its picture. All processes draw, the first one scores."""
        ev, rows = self.config.eval, list[dict[str, Any]]()
        pictures: dict[tuple[str, int], np.ndarray] = {}
        say(f"evaluation on the {ev.split} split")
        with run.timed("evaluation"):
            evaluator = self.data.evaluator(ev.split)
            for sampled in self.sampled(teacher, served):
                row, images = self.score(sampled, evaluator)
                key = {"model": sampled.model, "steps": sampled.steps}
                rows.append({**key, "guidance": sampled.guidance, **row})
                pictures[sampled.model, sampled.steps] = images
                say("  " + ", ".join(f"{k} {v}" for k, v in rows[-1].items()))
        if not distributed.is_main():
            distributed.barrier("results are written")
            return {}
        first = rows[0]
        for row in rows:
            row["ratio"] = (
                round(row["fd"] / first["fd"], 4) if first["model"] == "teacher" else None
            )
        results = run.write_results(
            {
                "rows": rows,
                "reference": first if first["model"] == "teacher" else None,
                **self.reals(evaluator),
                "protocol": self.protocol(),
            },
            title=f"Scenes, {self.config.method.name}, seed {self.config.seed}",
            notes=(
                f"FD of {ev.samples:,} samples to the real scenes of the {ev.split} split. Two"
                f" halves of these are {evaluator.reference.halves:.3f} apart. Recogniser"
                f" {self.data.recogniser.hash}."
            ),
            columns=COLUMNS,
        )
        shown = {key: COLUMNS[key] for key in SHOWN}
        captions = evaluator.reference.captions[:PICTURED]
        path = run.workdir / "results.png"
        report.results_picture(path, results, pictures, shown, captions)
        distributed.barrier("results are written")
        return results

    def reals(self, evaluator: SceneEvaluator) -> dict[str, Any]:
        """What real scenes score."""
        found = evaluator.reference
        ceiling = {k: round(v, 4) for k, v in found.ceiling.items()}
        return {"ceiling": ceiling, "floor_fd": round(found.halves, 5)}

    def protocol(self) -> dict[str, Any]:
        """What scores depend on, beside the sampler."""
        ev = self.config.eval
        return {
            "split": ev.split,
            "recogniser_sha256": self.data.recogniser.hash,
            "samples": ev.samples,
            "sampling_seed": ev.seed,
            "pixel_range": [0.0, 1.0],
        }

    def score(
        self, sampled: Sampled, evaluator: SceneEvaluator
    ) -> tuple[dict[str, Any], np.ndarray]:
        """Scores with the split's captions, and the first images."""
        ev, found = self.config.eval, evaluator.reference
        seen = self.data.conds(found.captions)
        unseen = self.data.conds(found.unseen)
        count = min(ev.samples, len(found.captions))
        first = found.captions[: min(ev.diversity_captions, found.diversity_captions, count)]
        repeated = self.data.conds([c for c in first for _ in range(found.repeats)])
        images, rate = self.timed_draw(sampled, seen, count, ev.seed)
        scores = evaluator(
            images,
            self.draw(sampled, unseen, min(count, ev.unseen, len(found.unseen)), ev.seed + 1),
            self.draw(sampled, repeated, len(first) * found.repeats, ev.seed + 2),
        )
        return {**rounded(scores._asdict()), "images_per_second": rate}, images[:PICTURED]


def cache_folder(config: ConfigDict) -> Path:
    """Of embeddings and scenes: config.data.cache, or the user's cache folder."""
    from jaxdistill.run.compilation import user_cache

    return Path(config.data.cache) if config.data.cache else user_cache() / "scenes"


def check(config: ConfigDict) -> None:
    """Raise ValueError for what only this task has."""
    choose({"validation": 0, "test": 0}, config.eval.split, "config.eval.split")
    check_frechet(config, config.recogniser.features, "eval.samples", "log.health_samples")
    if config.data.source:
        return
    about = "config.data.source is empty: a run from captions alone"
    if not config.base:
        raise ValueError(
            f"{about} needs a finished teacher and the statistics of real scenes: set"
            " config.base=pretrained/scenes"
        )
    if config.adversarial.reals != "teacher":
        raise ValueError(f"{about} has no images as reals: set config.adversarial.reals=teacher")


def watched(name: str, stopped: Callable[[], None]) -> Callable[[Iterable[int]], Iterator[int]]:
    """Hands on the steps of a long work, with a progress bar where it takes more than ten seconds;
    `stopped` raises to end it.
    """

    def watch(steps: Iterable[int]) -> Iterator[int]:
        for step in tqdm(steps, desc=name, mininterval=10, delay=10):
            stopped()
            yield step

    return watch
