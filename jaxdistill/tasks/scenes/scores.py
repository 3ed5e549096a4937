"""Scores of generated scenes against real ones: do images hold what their captions say?"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxdistill.metrics.distances import (
    Gaussian,
    class_spread,
    fd_noise,
    frechet_distance,
    precision_recall,
)
from jaxdistill.tasks.scenes.recognise import SceneRecogniser, compare
from jaxdistill.tasks.scenes.reference import Reference


class SceneScores(NamedTuple):
    """Scores of one sampler; shares in [0, 1], `diversity` relative to real scenes of the same
    captions.
    """

    fd: float
    fd_noise: float
    precision: float
    recall: float
    colour: float
    garment: float
    relation: float
    all_right: float
    unseen_all_right: float
    diversity: float


class SceneEvaluator:
    """Scores images against the real scenes of one split, in a frozen recogniser's eyes."""

    def __init__(self, recogniser: SceneRecogniser, reference: Reference) -> None:
        self.recogniser, self.reference = recogniser, reference
        self._real = Gaussian(reference.mean, reference.covariance)

    def quick(self, images: np.ndarray) -> dict[str, float]:
        """FD and all_right alone, for health lines: images of the first captions."""
        found, features = self.recogniser(images)
        return {
            "fd": frechet_distance(features, self._real),
            "all_right": compare(found, self.reference.labels[: len(images)])["all_right"],
        }

    def __call__(self, images: np.ndarray, unseen: np.ndarray, repeated: np.ndarray) -> SceneScores:
        """Score images of the first captions, of the unseen ones, and `reference.repeats` in a row
        for each caption of the diversity set.
        """
        reference = self.reference
        found, features = self.recogniser(images)
        n = min(len(features), len(reference.features))
        precision, recall = precision_recall(reference.features[:n], features[:n])
        shares: Mapping[str, float] = compare(found, reference.labels[: len(images)])
        found_unseen = self.recogniser(unseen)[0]
        of_unseen = compare(found_unseen, reference.unseen_labels[: len(unseen)])
        groups = np.arange(len(repeated)) // reference.repeats
        return SceneScores(
            fd=frechet_distance(features, self._real),
            fd_noise=fd_noise(features, self._real),
            precision=precision,
            recall=recall,
            unseen_all_right=of_unseen["all_right"],
            diversity=class_spread(repeated, groups) / reference.spread,
            **shares,
        )
