"""Scores of class-conditional images, in the features of a classifier that is trained here.

It is trained on the train split, frozen, and named by a hash of its weights: numbers of different
hashes must not be compared. Images are in [0, 1].
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdistill.metrics.distances import (
    class_spread,
    fd_noise,
    frechet_distance,
    nearest_neighbour_distance,
    precision_recall,
    weights_hash,
)
from jaxdistill.models.vision.classifier import ConvClassifier
from jaxdistill.tasks.labelled_images.data import Dataset, Split


class Extractor(NamedTuple):
    """A frozen classifier.

    `features` and `predict` map images [n, h, w, c] in [0, 1] to [n, d] and int [n].
    """

    features: Callable[[np.ndarray], np.ndarray]
    predict: Callable[[np.ndarray], np.ndarray]
    hash: str
    params: Any


def make_extractor(
    params: Any,
    train_images: np.ndarray,
    *,
    num_classes: int,
    channels: tuple[int, ...],
    features: int,
) -> Extractor:
    """Wrap classifier parameters as an Extractor; images are run in blocks of 1,000.

    Features are divided by one constant, so that their mean variance over the train split is 1.
    """
    model = ConvClassifier(num_classes, channels, features)
    apply = jax.jit(model.apply)

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n, outs = len(images), []
        for i in range(0, n, 1000):
            block = np.asarray(images[i : i + 1000], np.float32)
            padded = np.concatenate(
                [block, np.zeros((1000 - len(block), *block.shape[1:]), np.float32)]
            )
            outs.append([np.asarray(o)[: len(block)] for o in apply(params, padded)])
        return np.concatenate([o[0] for o in outs]), np.concatenate([o[1] for o in outs])

    scale = np.sqrt(run(train_images)[1].var(axis=0, dtype=np.float64).mean())
    return Extractor(
        lambda x: run(x)[1] / scale, lambda x: run(x)[0].argmax(-1), weights_hash(params), params
    )


def train_extractor(
    dataset: Dataset,
    *,
    channels: tuple[int, ...],
    features: int,
    steps: int,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    noise: float = 0.2,
) -> Extractor:
    """Train the classifier on the train split, with Gaussian pixel noise of up to `noise` as
    augmentation.

    The seed is fixed, so that all runs of one dataset share one extractor (and one hash, on one
    kind of machine).
    """
    num_classes = len(dataset.class_names)
    model = ConvClassifier(num_classes, channels, features)
    images, labels = jnp.asarray(dataset.train.images), jnp.asarray(dataset.train.labels)
    params = model.init(jax.random.key(0), images[:1])
    tx = optax.adamw(optax.cosine_decay_schedule(learning_rate, steps), weight_decay=1e-2)

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x)[0], y).mean()

    # The dataset is an argument: closed over, it would become a constant of the program.
    @partial(jax.jit, donate_argnums=0)
    def update(state: Any, images: jax.Array, labels: jax.Array, i: jax.Array) -> Any:
        params, opt_state = state
        key, key_level, key_noise = jax.random.split(jax.random.fold_in(jax.random.key(1), i), 3)
        rows = jax.random.randint(key, (batch_size,), 0, len(labels))
        level = noise * jax.random.uniform(key_level, (batch_size, 1, 1, 1))
        x = images[rows] + level * jax.random.normal(key_noise, (batch_size, *images.shape[1:]))
        updates, opt_state = tx.update(
            jax.grad(loss_fn)(params, x, labels[rows]), opt_state, params
        )
        return optax.apply_updates(params, updates), opt_state

    state = (params, tx.init(params))
    for i in range(steps):
        state = update(state, images, labels, jnp.asarray(i))
    return make_extractor(
        state[0],
        dataset.train.images,
        num_classes=num_classes,
        channels=channels,
        features=features,
    )


class Metrics(NamedTuple):
    """Scores of one set of generated images.

    fd, fd_validation and fd_train are Fréchet distances to the reference, the validation and the
    train split, fd_noise is the standard error of fd; `diversity` and `nearest_neighbour` (distance
    to the train split) are relative to the reference images (1 = as real).
    """

    fd: float
    fd_noise: float
    fd_validation: float
    fd_train: float
    accuracy: float
    precision: float
    recall: float
    diversity: float
    nearest_neighbour: float


class Evaluator:
    """Scores images against one reference split; what belongs to the reals is computed once."""

    def __init__(self, dataset: Dataset, reference: Split, extractor: Extractor) -> None:
        self.reference, self.extractor, self._train = reference, extractor, dataset.train
        self._real = extractor.features(reference.images)
        self._real_validation = extractor.features(dataset.validation.images)
        self._real_train = extractor.features(dataset.train.images)
        self._spread = class_spread(reference.images, reference.labels)
        self._neighbour = nearest_neighbour_distance(reference.images, dataset.train.images)
        self.classifier_accuracy = float(
            (extractor.predict(reference.images) == reference.labels).mean()
        )

    def floor_fd(self) -> float:
        """FD between two halves of the reference: what finite samples alone give."""
        order = np.random.default_rng(0).permutation(len(self._real))
        half = len(order) // 2
        return frechet_distance(self._real[order[:half]], self._real[order[half:]])

    def floor_fd_train(self) -> float:
        """FD of the train split to the reference: what a perfect copy of the training set would
        score.
        """
        return frechet_distance(self._real_train, self._real)

    def quick_fd(self, images: np.ndarray) -> float:
        """FD alone, for the health line."""
        return frechet_distance(self.extractor.features(images), self._real)

    def __call__(self, images: np.ndarray, labels: np.ndarray) -> Metrics:
        """Images float32 [n, h, w, c] in [0, 1], labels int [n]."""
        features = self.extractor.features(images)
        precision, recall = precision_recall(self._real, features)
        return Metrics(
            fd=frechet_distance(features, self._real),
            fd_noise=fd_noise(features, self._real),
            fd_validation=frechet_distance(features, self._real_validation),
            fd_train=frechet_distance(features, self._real_train),
            accuracy=float((self.extractor.predict(images) == labels).mean()),
            precision=precision,
            recall=recall,
            diversity=class_spread(images, labels) / self._spread,
            nearest_neighbour=nearest_neighbour_distance(images[:2000], self._train.images)
            / self._neighbour,
        )
