"""What scores of scenes are made against: captions, and what a recogniser sees in real scenes.

It is stored beside the recogniser, so that a run from captions alone needs no image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from jaxdistill.errors import UserError
from jaxdistill.metrics.distances import class_spread
from jaxdistill.tasks.labelled_images.data import fashion_mnist
from jaxdistill.tasks.scenes import scenes
from jaxdistill.tasks.scenes.recognise import SceneRecogniser, compare, unit

FILE = "reference.npz"
SPLITS = ("validation", "test")
FEATURES = 2000
"""Rows of features that are kept for precision and recall. Mean and covariance are of more."""


@dataclass(frozen=True)
class Reference:
    """Real scenes of one split.

    Attributes:
      captions: of the split, in the order in which images are generated.
      labels: int [n, 5] of these captions.
      unseen: captions of unseen compositions.
      unseen_labels: int [m, 5].
      mean, covariance: of all features.
      features: [k, d] of the first.
      halves: Fréchet distance between two halves of them.
      ceiling: {name: share} of `compare` on the real scenes themselves.
      spread: `class_spread` of `repeats` real scenes for each of the first captions.
      diversity_captions, repeats: see there.
    """

    captions: Sequence[str]
    labels: np.ndarray
    unseen: Sequence[str]
    unseen_labels: np.ndarray
    mean: np.ndarray
    covariance: np.ndarray
    features: np.ndarray
    halves: float
    ceiling: Mapping[str, float]
    spread: float
    diversity_captions: int
    repeats: int


def measure(
    recogniser: SceneRecogniser,
    sources: Mapping[str, Any],
    captions: Mapping[str, Sequence[str]],
    folder: str,
    split: str,
    *,
    diversity_captions: int,
    repeats: int,
) -> Reference:
    """The reference of a split of real scenes; unseen compositions are test scenes'."""
    from jaxdistill.metrics.distances import frechet_distance

    garments = fashion_mnist(folder)
    part = garments.validation if split == "validation" else garments.test
    sprites = scenes.make_sprites(part.images, part.labels)
    rng = np.random.default_rng(1)
    parsed = [scenes.parse(caption) for caption in captions[split][:diversity_captions]]
    real = np.stack([scenes.render(s, sprites, rng) for s in parsed for _ in range(repeats)])
    images = unit(np.stack([item["image"] for item in sources[split]]))
    labels = np.stack([item["labels"] for item in sources[split]])
    found, features = recogniser(images)
    order = np.random.default_rng(0).permutation(len(features))
    half = len(order) // 2
    return Reference(
        captions=captions[split],
        labels=labels,
        unseen=captions["unseen"],
        unseen_labels=np.stack([item["labels"] for item in sources["unseen"]]),
        mean=features.mean(0),
        covariance=np.cov(features, rowvar=False),
        features=features[:FEATURES],
        halves=frechet_distance(features[order[:half]], features[order[half:]]),
        ceiling=compare(found, labels),
        spread=class_spread(unit(real), np.arange(len(real)) // repeats),
        diversity_captions=diversity_captions,
        repeats=repeats,
    )


def save(path: Path, references: Mapping[str, Reference], *, scale: float, count: int) -> None:
    """Write the references of all splits, their first `count` captions, and the scale of the
    features.
    """
    arrays: dict[str, Any] = {"scale": np.float64(scale)}
    for split, r in references.items():
        arrays |= {
            f"{split}/captions": np.asarray(r.captions[:count]),
            f"{split}/labels": r.labels[:count].astype(np.int8),
            f"{split}/unseen": np.asarray(r.unseen[:count]),
            f"{split}/unseen_labels": r.unseen_labels[:count].astype(np.int8),
            f"{split}/mean": r.mean,
            f"{split}/covariance": r.covariance,
            f"{split}/features": r.features.astype(np.float16),
            f"{split}/halves": np.float64(r.halves),
            f"{split}/ceiling": np.asarray(list(r.ceiling.values())),
            f"{split}/ceiling_names": np.asarray(list(r.ceiling)),
            f"{split}/spread": np.float64(r.spread),
            f"{split}/diversity": np.asarray([r.diversity_captions, r.repeats]),
        }
    temporary = path.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, **arrays)
    temporary.replace(path)


def load(path: Path) -> tuple[dict[str, Reference], float]:
    """({split: reference}, scale of the features). Raises UserError."""
    if not path.exists():
        raise UserError(
            f"{path} is missing; run `python -m jaxdistill.tasks.scenes.measure`, or set"
            " config.data.source to the folder of Fashion-MNIST's idx files"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}); copy it again") from None
    found = {}
    for split in {name.partition("/")[0] for name in arrays if "/" in name}:
        prefix = f"{split}/"
        part = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
        names = [str(name) for name in part["ceiling_names"]]
        found[split] = Reference(
            captions=[str(caption) for caption in part["captions"]],
            labels=part["labels"].astype(np.int32),
            unseen=[str(caption) for caption in part["unseen"]],
            unseen_labels=part["unseen_labels"].astype(np.int32),
            mean=part["mean"],
            covariance=part["covariance"],
            features=part["features"].astype(np.float32),
            halves=float(part["halves"]),
            ceiling=dict(zip(names, map(float, part["ceiling"]), strict=True)),
            spread=float(part["spread"]),
            diversity_captions=int(part["diversity"][0]),
            repeats=int(part["diversity"][1]),
        )
    return found, float(arrays["scale"])
