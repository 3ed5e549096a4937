"""Scenes as a task: captions in, 32x32 pictures of two garments out.

With config.data.source, the folder of Fashion-MNIST's files, there are real scenes: to train a
teacher and a recogniser, and as the methods' data. Without it a finished teacher is distilled from
captions alone, and scored against statistics of real scenes that are stored beside the recogniser.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxdistill.errors import UserError, choose
from jaxdistill.interop import sentence_encoder
from jaxdistill.run import checkpoint, compilation, inputs
from jaxdistill.run.loop import tqdm
from jaxdistill.run.run import Run
from jaxdistill.run.workdir import flatten, say
from jaxdistill.tasks.labelled_images.data import fashion_mnist
from jaxdistill.tasks.scenes import reference, scenes
from jaxdistill.tasks.scenes.recognise import SCALE_IMAGES, SceneRecogniser, train_recogniser, unit
from jaxdistill.tasks.scenes.reference import Reference
from jaxdistill.tasks.scenes.scores import SceneEvaluator, SceneScores
from jaxdistill.tasks.settings import check_config, check_frechet
from jaxdistill.tasks.small import Batches, Sampled, SmallTask

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

SHARED = ("data.scale", "text.length", "model", "schedule", "prediction", "teacher", "recogniser")
"""Parts of the config that a run and its base must have in common."""

FREE = ("guidance", "steps", "grid", "health_every", "path", "solver", "time_skew")
"""Keys of the teacher that may differ: how it is sampled and watched, not what it is."""


class SceneData:
    """Captions with their embeddings and, where there is a source, real scenes; the recogniser.

    All runs of a comparison share one. Making it reads no weights but the text encoder's; scenes
    and embeddings are made, or read, where they are first asked for. Raises UserError.
    """

    def __init__(self, config: ConfigDict, *, base: Path | None = None) -> None:
        """`base`: where a recogniser is trained, by default in the run; config.base wins."""
        self.config = config
        self.base = Path(config.base) if config.base else base
        self.encoder = sentence_encoder.load(config.text.folder)
        self.references: dict[str, Reference] = {}
        self._evaluators: dict[str, SceneEvaluator] = {}
        self._watch: Callable[..., Any] = iter
        if not config.data.source:
            path = Path(config.base, "recogniser", reference.FILE)
            self.references, self._scale = reference.load(path)
            self._check_counts()

    def _check_counts(self) -> None:
        """Raise UserError where more captions are asked for than are stored."""
        most = len(self.references["validation"].captions)
        count = max(self.config.eval.samples, self.config.log.health_samples)
        if count > most:
            raise UserError(
                f"config.eval.samples and config.log.health_samples can be at most {most} where"
                f" config.data.source is empty, got {count}"
            )

    def made_from(self) -> dict[str, inputs.Input]:
        """What it is made from, by name. Raises UserError."""
        block, base = self.config.data, self.config.base
        found = {"the text encoder": inputs.value([self.encoder.hash, self.encoder.about])}
        if block.source:
            found["the garments (config.data.source)"] = inputs.value(
                scenes.hash_of_files(block.source)
            )
        else:
            path = Path(base, "recogniser", reference.FILE)
            found["the reference (config.base)"] = inputs.files([path])
        if base and (card_file := Path(base, "recogniser", "card.json")).is_file():
            found["the recogniser (config.base)"] = inputs.files([card_file])
        return found

    def open(self, run: Run) -> None:
        """Make what is missing for the scores; the run's signals end it. A run without a base has
        its recogniser in its own folder.
        """
        self.base = self.base or run.workdir
        self._watch = watched("captions", run.place.stop.heed)
        self.embeddings  # noqa: B018
        self.evaluator("validation")
        self.evaluator(self.config.eval.split)

    @cached_property
    def folder(self) -> Path:
        """Of embeddings and scenes: config.data.cache, or the user's cache folder."""
        cache = self.config.data.cache
        return Path(cache) if cache else compilation.user_cache() / "scenes"

    @cached_property
    def sources(self) -> Mapping[str, Any]:
        """{split: real scenes}, {} where there is no source."""
        block = self.config.data
        if not block.source:
            return {}
        return scenes.open_scenes(block.source, self.folder / "scenes", scale=block.scale)

    @cached_property
    def captions(self) -> dict[str, list[str]]:
        """{split: captions}; without scenes those that a run reads, as each costs the encoder
        time.
        """
        if self.sources:
            return {
                split: [item["caption"].decode() for item in items]
                for split, items in self.sources.items()
            }
        ev, first, second = self.config.eval, *(self.references[s] for s in ("validation", "test"))
        count = max(ev.samples, self.config.log.health_samples)
        return {
            "train": scenes.train_captions(self.config.data.captions),
            "validation": list(first.captions[:count]),
            "test": list(second.captions[: ev.samples]),
            "unseen": list(second.unseen[: ev.unseen]),
        }

    @cached_property
    def embeddings(self) -> sentence_encoder.Embeddings:
        """Of all captions."""
        return sentence_encoder.cached_embeddings(
            self.encoder,
            [caption for captions in self.captions.values() for caption in captions],
            self.folder / "text",
            length=self.config.text.length,
            watch=self._watch,
        )

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
        assert self.base is not None, "open the data first"
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
        if split not in self._evaluators:
            self._evaluators[split] = SceneEvaluator(self.recogniser, self.reference(split))
        return self._evaluators[split]

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
    """See `SmallTask`. `data`: shared with other runs. Raises ValueError."""

    columns, shown = COLUMNS, SHOWN
    charted = MappingProxyType({"fd": "Fréchet distance ↓", "all_right": "caption all right ↑"})

    def __init__(
        self,
        config: ConfigDict,
        *,
        data: SceneData | None = None,
        share: "Scenes | None" = None,
        devices: int | None = None,
    ) -> None:
        check(config)
        self.data = data or (share.data if share else SceneData(config))
        super().__init__(
            config,
            about={"name": "scenes", "image_shape": list(SHAPE), "range": [-1.0, 1.0]},
            model=config.model.to_dict(),
            cond=self.data.cond,
            text=self.data.text,
            share=share,
            devices=devices,
        )

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
        return self.data.evaluator("validation").quick(images)

    # -- the table

    @property
    def evaluator(self) -> SceneEvaluator:
        """Scores against the split of config.eval."""
        return self.data.evaluator(self.config.eval.split)

    def drawn(self, sampled: Sampled) -> tuple[tuple[np.ndarray, ...], float]:
        """Of the split's captions, of unseen ones, and several of a caption."""
        ev, found = self.config.eval, self.evaluator.reference
        conds = self.data.conds
        count = min(ev.samples, len(found.captions))
        first = found.captions[: min(ev.diversity_captions, found.diversity_captions, count)]
        repeated = [caption for caption in first for _ in range(found.repeats)]
        unseen = min(count, ev.unseen, len(found.unseen))
        images, rate = self.timed_draw(sampled, conds(found.captions), count, ev.seed)
        more = (
            self.draw(sampled, conds(found.unseen), unseen, ev.seed + 1),
            self.draw(sampled, conds(repeated), len(repeated), ev.seed + 2),
        )
        return (images, *more), rate

    @property
    def scored(self) -> int:
        """As many as are asked for; of some there may be fewer."""
        ev = self.config.eval
        return int(ev.samples + ev.unseen + ev.diversity_captions * ev.repeats)

    def scores(self, *images: np.ndarray) -> SceneScores:
        """Against real scenes."""
        return self.evaluator(*images)

    def captions(self) -> Sequence[str]:
        """The first of the scored split."""
        return self.evaluator.reference.captions[: min(PICTURED, self.config.eval.samples)]

    def reals(self) -> dict[str, Any]:
        """What real scenes score."""
        found = self.evaluator.reference
        ceiling = {k: round(v, 4) for k, v in found.ceiling.items()}
        return {"ceiling": ceiling, "floor_fd": round(found.halves, 5)}

    def protocol(self) -> dict[str, Any]:
        """With the recogniser."""
        return {**super().protocol(), "recogniser_sha256": self.data.recogniser.hash}

    def notes(self) -> str:
        """Below the table of results.md."""
        ev, reals = self.config.eval, self.reals()
        ceiling = ", ".join(f"{k} {v:.3f}" for k, v in reals["ceiling"].items())
        return (
            f"FD of {ev.samples:,} samples to the real scenes of the {ev.split} split. Two halves"
            f" of these are {reals['floor_fd']:.3f} apart; they score {ceiling}. Recogniser"
            f" {self.data.recogniser.hash}."
        )


def check(config: ConfigDict) -> None:
    """Raise ValueError for what can be known before the text encoder is read."""
    check_config(config)
    choose({"validation": 0, "test": 0}, config.eval.split, "config.eval.split")
    check_frechet(config, config.recogniser.features, "eval.samples", "log.health_samples")
    check_base(config)
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
                f"config.base = {config.base} was made with {key} = {there[key]}, but here it is"
                f" {here[key]}; use the same value"
            )


def watched(name: str, stopped: Callable[[], None]) -> Callable[[Iterable[int]], Iterator[int]]:
    """Hands on the steps of a long work, with a progress bar where it takes more than ten seconds;
    `stopped` raises to end it.
    """

    def watch(steps: Iterable[int]) -> Iterator[int]:
        for step in tqdm(steps, desc=name, mininterval=10, delay=10):
            stopped()
            yield step

    return watch
