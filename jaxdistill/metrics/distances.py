"""Distances between sets of images: Fréchet distance, precision and recall, diversity, health.

Images are in [0, 1].
"""

import hashlib
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import linalg
from scipy.spatial.distance import cdist


def weights_hash(params: Any) -> str:
    """First 12 hex digits of the SHA-256 of all weights, to name a feature space."""
    return hashlib.sha256(
        b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params))
    ).hexdigest()[:12]


class Gaussian(NamedTuple):
    """Features by their mean [d] and covariance [d, d]."""

    mean: np.ndarray
    covariance: np.ndarray


def gaussian_of(features: np.ndarray) -> Gaussian:
    """Of features [n, d]. Raises ValueError where n is at most d: it would be singular."""
    n, d = features.shape
    if n <= d:
        raise ValueError(
            f"the Frechet distance of {d} features needs more than {d} images, got {n}"
        )
    return Gaussian(features.mean(0), np.cov(features, rowvar=False))


def frechet_distance(a: np.ndarray | Gaussian, b: np.ndarray | Gaussian) -> float:
    """‖μ_a - μ_b‖² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½) of features [n, d] or of their Gaussians
    (Heusel et al. 2017).

    Raises ValueError where a set has no more rows than features: its covariance would be singular.
    """
    left, right = (x if isinstance(x, Gaussian) else gaussian_of(x) for x in (a, b))
    return gaussian_distance(*left, *right)


def fd_noise(features: np.ndarray, real: np.ndarray | Gaussian, *, blocks: int = 50) -> float:
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
    groups = [images[labels == label] for label in np.unique(labels)]
    return float(np.mean([spread(rows) for rows in groups if len(rows) > 1]))


def spread(images: np.ndarray) -> float:
    """Root-mean-square distance of two of several images, in pixel space."""
    rows = images.reshape(len(images), -1).astype(np.float64)
    return float(np.sqrt(2 * rows.var(axis=0, ddof=1).sum()))


def nearest_neighbour_distance(images: np.ndarray, train: np.ndarray) -> float:
    """Median L2 pixel distance to the nearest training image."""
    tree = _neighbours(1).fit(train.reshape(len(train), -1))
    return float(np.median(tree.kneighbors(images.reshape(len(images), -1))[0]))


def saturation(images: np.ndarray) -> np.ndarray:
    """Share [n] of an image's values within 1/255 of either end of [0, 1]."""
    return ((images < 1 / 255) | (images > 254 / 255)).mean((1, 2, 3))
