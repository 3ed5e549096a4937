"""Scenes: two tinted Fashion-MNIST garments side by side or one above the other, with a caption.

Text to image on two CPU cores.

A TFDS dataset of 32x32 RGB images, made from the idx files alone (no TensorFlow). A caption names
what is there; a fifth of the (colour, garment) pairs never occurs in training, so that unseen
compositions can be asked for.
"""

import hashlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from filelock import FileLock
from PIL import Image

from jaxdistill.tasks.labelled_images.data import FASHION_FILES, DataError, fashion_mnist, find_idx

SIDE, SPRITE = 32, 14
GARMENTS = {
    "t-shirt": 0,
    "trousers": 1,
    "dress": 3,
    "coat": 4,
    "sandal": 5,
    "sneaker": 7,
    "bag": 8,
    "boot": 9,
}
"""Name -> Fashion-MNIST's class.

Pullover and shirt are left out: at 14x14 nobody tells them from coat and T-shirt.
"""
COLOURS = {
    "red": (1.0, 0.1, 0.1),
    "green": (0.1, 0.9, 0.1),
    "blue": (0.15, 0.25, 1.0),
    "yellow": (1.0, 0.9, 0.1),
    "purple": (0.8, 0.15, 0.9),
    "white": (1.0, 1.0, 1.0),
}
"""Name -> the RGB that a garment's grey values are multiplied with."""
AXES = ("horizontal", "vertical")

PAIRS = tuple(itertools.product(COLOURS, GARMENTS))
"""All (colour, garment) pairs."""
HELD_OUT = frozenset(
    (c, g)
    for (i, c), (j, g) in itertools.product(enumerate(COLOURS), enumerate(GARMENTS))
    if (i + j) % 5 == 0
)
"""The pairs that training never shows: each colour and each garment loses at least one."""

# {a} is the left or upper garment, {b} the other.
WORDINGS = {
    "horizontal": (
        "{a} to the left of {b}",
        "{b} to the right of {a}",
        "{a} on the left and {b} on the right",
        "on the right {b}, on the left {a}",
    ),
    "vertical": (
        "{a} above {b}",
        "{b} below {a}",
        "{a} at the top and {b} at the bottom",
        "at the bottom {b}, at the top {a}",
    ),
}
PREFIXES = ("", "in this picture, ")

SPLITS = {"train": 50_000, "validation": 5_000, "test": 5_000, "unseen": 5_000}
"""Scenes a split. "unseen" holds a held-out pair in each scene, the others never."""


class Scene(NamedTuple):
    """What a caption says: `first` is the left or the upper (colour, garment)."""

    axis: str
    first: tuple[str, str]
    second: tuple[str, str]

    def labels(self) -> np.ndarray:
        """int32 [5]: axis, first colour, first garment, second colour, second garment."""
        colours, garments = list(COLOURS), list(GARMENTS)
        pairs = [(colours.index(c), garments.index(g)) for c, g in (self.first, self.second)]
        return np.asarray([AXES.index(self.axis), *pairs[0], *pairs[1]], np.int32)


def phrase(colour: str, garment: str) -> str:
    """("red", "bag") -> "a red bag"."""
    return f"a pair of {colour} trousers" if garment == "trousers" else f"a {colour} {garment}"


def captions(scene: Scene) -> list[str]:
    """Every wording of a scene."""
    a, b = phrase(*scene.first), phrase(*scene.second)
    return [
        prefix + wording.format(a=a, b=b) for prefix in PREFIXES for wording in WORDINGS[scene.axis]
    ]


def parse(caption: str) -> Scene:
    """The scene that a caption of `captions` says.

    Raises DataError, naming the caption, where it is none: the recognisers know only these words.
    """
    thing = (
        rf"(?:a pair of ({'|'.join(COLOURS)}) (trousers)|a ({'|'.join(COLOURS)})"
        rf" ({'|'.join(g for g in GARMENTS if g != 'trousers')}))"
    )
    text = caption.strip().lower()
    for axis, wordings in WORDINGS.items():
        for wording in wordings:
            pattern = (
                re.escape(wording)
                .replace(r"\{a\}", "{a}")
                .replace(r"\{b\}", "{b}")
                .format(a=thing, b=thing)
            )
            match = re.fullmatch(f"(?:{'|'.join(PREFIXES)})" + pattern, text)
            if match:
                words = [w for w in match.groups() if w]
                pairs = [(words[0], words[1]), (words[2], words[3])]
                if wording.index("{b}") < wording.index("{a}"):
                    pairs.reverse()
                return Scene(axis, *pairs)
    raise DataError(
        f"caption {caption!r} is outside the vocabulary; colours {', '.join(COLOURS)}; garments"
        f" {', '.join(GARMENTS)}; wordings such as"
        f" {WORDINGS['horizontal'][0].format(a='a red bag', b='a pair of blue trousers')!r}"
    )


def draw_scene(rng: np.random.Generator, *, unseen: bool | None) -> Scene:
    """A random scene: with `unseen` at least one pair is held out, with False none is, with None
    any may be.
    """
    allowed = [p for p in PAIRS if p not in HELD_OUT] if unseen is False else PAIRS
    first, second = (allowed[rng.integers(len(allowed))] for _ in range(2))
    if unseen and not {first, second} & HELD_OUT:
        held = sorted(HELD_OUT)
        first, second = (
            (held[rng.integers(len(held))], second)
            if rng.random() < 0.5
            else (first, held[rng.integers(len(held))])
        )
    return Scene(AXES[rng.integers(2)], first, second)


def train_captions(count: int) -> list[str]:
    """Captions as training has them, without held-out pairs; caption i is a function of i."""
    found = []
    for i in range(count):
        rng = np.random.default_rng((0, len(SPLITS) + 1, i))
        wordings = captions(draw_scene(rng, unseen=False))
        found.append(wordings[rng.integers(len(wordings))])
    return found


def render(scene: Scene, sprites: dict[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """The scene's image, uint8 [32, 32, 3]: random garments of its kinds, jittered, on black."""
    canvas = np.zeros((SIDE, SIDE, 3), np.float32)
    for half, (colour, garment) in enumerate((scene.first, scene.second)):
        along, across = 16 * half + rng.integers(0, 3), 6 + rng.integers(0, 7)
        top, left = (across, along) if scene.axis == "horizontal" else (along, across)
        choices = sprites[garment]
        grey = choices[rng.integers(len(choices))]
        canvas[top : top + SPRITE, left : left + SPRITE] += grey[..., None] * np.asarray(
            COLOURS[colour], np.float32
        )
    return np.round(canvas * 255).astype(np.uint8)


def every_composition(
    sprites: dict[str, np.ndarray], count: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scenes of any pairs, held-out ones too: images uint8 [count, 32, 32, 3], labels int32 [count,
    5]. What a recogniser must know.
    """
    images, labels = [], []
    for i in range(count):
        rng = np.random.default_rng((seed, len(SPLITS), i))
        scene = draw_scene(rng, unseen=None)
        images.append(render(scene, sprites, rng))
        labels.append(scene.labels())
    return np.stack(images), np.stack(labels)


def make_sprites(images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Garments [n, 28, 28, 1] in [0, 1] halved to 14x14, each stretched to a maximum of 1: {name:
    float32 [m, 14, 14]}.
    """
    small = images[..., 0].reshape(-1, SPRITE, 2, SPRITE, 2).mean(axis=(2, 4))
    small = small / np.maximum(small.max(axis=(1, 2), keepdims=True), 1e-6)
    return {name: small[labels == label].astype(np.float32) for name, label in GARMENTS.items()}


@dataclass
class SceneConfig(tfds.core.BuilderConfig):
    """source: folder of Fashion-MNIST's idx files; scale: factor on the number of scenes (tests use
    less).
    """

    source: str = ""
    scale: float = 1.0


class FashionScenes(tfds.core.GeneratorBasedBuilder):
    """{"image" uint8 [32, 32, 3], "caption", "labels" int32 [5] as of `Scene.labels`} by seed 0;
    see the module.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(SIDE, SIDE, 3), encoding_format="png"),
                "caption": tfds.features.Text(),
                "labels": tfds.features.Tensor(shape=(5,), dtype=np.int32),
            }
        )
        return tfds.core.DatasetInfo(builder=self, description=__doc__, features=features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        garments = fashion_mnist(self.builder_config.source)
        parts = {
            "train": garments.train,
            "validation": garments.validation,
            "test": garments.test,
            "unseen": garments.test,
        }
        sprites = {name: make_sprites(part.images, part.labels) for name, part in parts.items()}
        return {name: self._generate_examples(name, sprites[name]) for name in SPLITS}

    def _generate_examples(
        self, split: str, sprites: dict[str, np.ndarray]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in range(max(1, round(SPLITS[split] * self.builder_config.scale))):
            rng = np.random.default_rng((0, list(SPLITS).index(split), i))
            scene = draw_scene(rng, unseen=split == "unseen")
            wordings = captions(scene)
            # PIL images: the writer would want TensorFlow to encode arrays.
            image = Image.fromarray(render(scene, sprites, rng))
            yield (
                i,
                {
                    "image": image,
                    "caption": wordings[rng.integers(len(wordings))],
                    "labels": scene.labels(),
                },
            )


def open_scenes(source: str | Path, folder: str | Path, *, scale: float = 1.0) -> dict[str, Any]:
    """The random-access data sources {split: [{"image", "caption", "labels"}]} in `folder`, made
    there at the first call with these garments.

    Raises DataError where the idx files in `source` are missing or damaged.
    """
    part = "whole" if scale == 1.0 else f"part_{scale:g}"
    name = f"{part}_{hash_of_files(source)}"
    config = SceneConfig(name=name, source=str(source), scale=scale)
    Path(folder).mkdir(parents=True, exist_ok=True)
    with FileLock(Path(folder, f"{name}.lock")):  # runs that begin together make them once
        builder = FashionScenes(data_dir=str(folder), config=config, file_format="array_record")
        builder.download_and_prepare()
    return {split: builder.as_data_source(split) for split in SPLITS}


def hash_of_files(source: str | Path) -> str:
    """First 12 hex digits of the SHA-256 of the idx files in a folder. Raises DataError where one
    is missing.
    """
    digest = hashlib.sha256()
    for stem, _ in FASHION_FILES.values():
        digest.update(find_idx(Path(source), stem).read_bytes())
    return digest.hexdigest()[:12]


def images_of(items: Any, count: int) -> np.ndarray:
    """uint8 [count, 32, 32, 3] of a data source's first items, or all of fewer."""
    return np.stack([items[i]["image"] for i in range(min(count, len(items)))])
