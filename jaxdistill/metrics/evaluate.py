"""Metrics of generated images: Fréchet distance, precision and recall, accuracy, diversity, nearest
neighbours.

All take images in [0, 1]. The feature extractor is a classifier trained here on the train split,
frozen, and named by a hash of its weights: numbers of different hashes must not be compared.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import linalg
from scipy.spatial.distance import cdist

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


def weights_hash(params: Any) -> str:
    """First 12 hex digits of the SHA-256 of all weights, to name a feature space."""
    return hashlib.sha256(
        b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params))
    ).hexdigest()[:12]


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


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """‖μ_a - μ_b‖² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½) of features [n, d] (Heusel et al. 2017).

    Raises ValueError where a set has no more rows than features: its covariance would be singular.
    """
    for rows in (a, b):
        if len(rows) <= rows.shape[1]:
            raise ValueError(
                f"the Frechet distance of {rows.shape[1]} features needs more than {rows.shape[1]}"
                f" images, got {len(rows)}"
            )
    return gaussian_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))


def fd_noise(features: np.ndarray, real: np.ndarray, *, blocks: int = 50) -> float:
    """Standard error of frechet_distance(features [n, d], real) over samples; nan where n is hardly
    above d.

    A jackknife (Efron & Stein 1981): √((B-1)/B Σ (FD_b - mean)²) over B blocks, FD_b without block
    b. With 50 blocks it is known to 10 %.
    """
    parts = np.array_split(features, max(2, min(blocks, len(features) // 2)))
    if len(features) - len(parts[0]) <= features.shape[1]:
        return float("nan")
    without = [
        frechet_distance(np.concatenate(parts[:b] + parts[b + 1 :]), real)
        for b in range(len(parts))
    ]
    return float(np.sqrt((len(parts) - 1) * np.var(without)))


def gaussian_distance(
    mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray
) -> float:
    """The Fréchet distance of two Gaussians, means [d] and covariances [d, d], in the precision of
    its arguments.
    """
    # tr (Σ_a Σ_b)^½ by the symmetric form √Σ_a Σ_b √Σ_a: real and non-negative eigenvalues, no
    # sqrtm of a nearly singular product.
    values, vectors = linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def precision_recall(real: np.ndarray, fake: np.ndarray, *, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall of features (Kynkäänniemi et al. 2019), k nearest neighbours.

    The measures compare sets of one size: fakes beyond len(real) are used in blocks of that size,
    and the two numbers are means over the blocks, which has less noise than one block; of more
    reals than fakes the first are used. Raises ValueError for sets of k images or fewer.
    """
    n = min(len(real), len(fake))
    if n <= k:
        raise ValueError(
            f"precision and recall with k = {k} need more than {k} images, got {len(real)} real and"
            f" {len(fake)} generated"
        )
    real = real[:n]
    real_radius = _kth_neighbour(real, k)
    precisions, recalls = [], []
    for i in range(len(fake) // n):
        block = fake[i * n : (i + 1) * n]
        distance = cdist(real, block)
        precisions.append((distance <= real_radius[:, None]).any(0).mean())
        recalls.append((distance <= _kth_neighbour(block, k)[None, :]).any(1).mean())
    return float(np.mean(precisions)), float(np.mean(recalls))


def _neighbours(k: int) -> Any:
    """A search for the k nearest.

    Scikit-learn is imported here: it takes a second, and most commands score nothing.
    """
    from sklearn.neighbors import NearestNeighbors

    return NearestNeighbors(n_neighbors=k)


def _kth_neighbour(x: np.ndarray, k: int) -> np.ndarray:
    return _neighbours(k + 1).fit(x).kneighbors(x)[0][:, -1]


def class_spread(images: np.ndarray, labels: np.ndarray) -> float:
    """Mean over classes of the root-mean-square distance of two images of one class, in pixel
    space.
    """
    spreads = []
    for label in np.unique(labels):
        rows = images[labels == label].reshape((labels == label).sum(), -1).astype(np.float64)
        if len(rows) > 1:
            spreads.append(np.sqrt(2 * rows.var(axis=0, ddof=1).sum()))
    return float(np.mean(spreads))


def nearest_neighbour_distance(images: np.ndarray, train: np.ndarray) -> float:
    """Median L2 pixel distance to the nearest training image."""
    tree = _neighbours(1).fit(train.reshape(len(train), -1))
    return float(np.median(tree.kneighbors(images.reshape(len(images), -1))[0]))


def saturation(images: np.ndarray) -> float:
    """Share of values within 1/255 of either end of [0, 1]."""
    return float(((images < 1 / 255) | (images > 254 / 255)).mean())


def health(student: np.ndarray, teacher: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The student's images against the teacher's from the same noises, both [n, h, w, c] in [0, 1].

    diversity, contrast (standard deviation within an image) and saturation as ratios to the
    teacher's, where 1 is as the teacher; distance is the root-mean-square pixel difference.
    """
    contrast = student.std(axis=(1, 2, 3)).mean() / max(teacher.std(axis=(1, 2, 3)).mean(), 1e-6)
    return {
        "diversity": class_spread(student, labels) / max(class_spread(teacher, labels), 1e-6),
        "contrast": float(contrast),
        "saturation": saturation(student) / max(saturation(teacher), 1e-6),
        "distance": float(np.sqrt(((student - teacher) ** 2).mean())),
    }


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
