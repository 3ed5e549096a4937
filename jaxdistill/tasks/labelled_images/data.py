"""Datasets: labelled images in [0, 1], split into train, validation and test, and a deterministic
stream of batches.
"""

import gzip
import hashlib
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxdistill.errors import UserError


class Split(NamedTuple):
    """images float32 [n, h, w, c] in [0, 1]; labels int32 [n]."""

    images: np.ndarray
    labels: np.ndarray


class Dataset(NamedTuple):
    """Three disjoint splits, fixed for all runs whatever their seed."""

    name: str
    train: Split
    validation: Split
    test: Split
    class_names: Sequence[str]


class DataError(UserError):
    """A data file that is missing or damaged, or a dataset that cannot be, in one line."""


def checked(dataset: Dataset) -> Dataset:
    """The dataset itself. Raises DataError unless images are float32 [n, h, w, c] in [0, 1] and
    labels [n] number the classes.
    """
    classes = len(dataset.class_names)
    for name in ("train", "validation", "test"):
        where, (images, labels) = f"{dataset.name}'s {name} split", getattr(dataset, name)
        if images.ndim != 4 or images.dtype != np.float32:
            raise DataError(
                f"{where} holds images {images.dtype} {list(images.shape)}; they must be float32"
                " [n, h, w, c]"
            )
        if not (images.min() >= 0 and images.max() <= 1):  # not a number is refused, too
            raise DataError(
                f"{where} holds pixels from {images.min():g} to {images.max():g}; they must be in"
                " [0, 1]"
            )
        if labels.shape != images.shape[:1] or not np.isin(labels, np.arange(classes)).all():
            raise DataError(
                f"{where} holds labels {list(labels.shape)} from {labels.min()} to {labels.max()};"
                f" they must be whole numbers [{len(images)}] of 0..{classes - 1}"
            )
    return dataset


def digits() -> Dataset:
    """The 1,797 real 8x8 digits of scikit-learn: a stratified 60/20/20 split, pixels 0..16 scaled
    to [0, 1].
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    images = (raw.images[..., None] / 16.0).astype(np.float32)
    labels = raw.target.astype(np.int32)
    train, rest = train_test_split(
        np.arange(len(labels)), test_size=0.4, random_state=0, stratify=labels
    )
    validation, test = train_test_split(rest, test_size=0.5, random_state=0, stratify=labels[rest])
    parts = [Split(images[i], labels[i]) for i in (train, validation, test)]
    return Dataset("digits", parts[0], parts[1], parts[2], [str(i) for i in range(10)])


FASHION_FILES = {
    "train_images": ("train-images-idx3-ubyte", 60_000),
    "train_labels": ("train-labels-idx1-ubyte", 60_000),
    "test_images": ("t10k-images-idx3-ubyte", 10_000),
    "test_labels": ("t10k-labels-idx1-ubyte", 10_000),
}
FASHION_CLASSES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


def fashion_mnist(folder: str | Path) -> Dataset:
    """Fashion-MNIST from a folder of its four idx files, plain or .gz: 50,000 / 10,000 / 10,000
    images of 28x28.

    Raises DataError naming the file where one is missing, truncated or of another size.
    """
    if not str(folder):
        raise DataError(
            "config.data.folder is empty; set it to the folder of Fashion-MNIST's idx files, e.g."
            " --config.data.folder=/usr/share/datasets/fashion-mnist (Debian package"
            " dataset-fashion-mnist)"
        )
    arrays = {}
    for key, (stem, count) in FASHION_FILES.items():
        array = read_idx(find_idx(Path(folder), stem))
        shape = (28, 28) if key.endswith("images") else ()
        if array.shape[1:] != shape:
            raise DataError(
                f"{stem} in {folder} holds items of shape {array.shape[1:]}, expected {shape}; are"
                " the files swapped?"
            )
        if len(array) != count:
            raise DataError(
                f"{stem} in {folder} holds {len(array)} items, Fashion-MNIST's has {count};"
                " download it again"
            )
        arrays[key] = array
    images = (arrays["train_images"][..., None] / 255.0).astype(np.float32)
    labels = arrays["train_labels"].astype(np.int32)
    test = Split(
        (arrays["test_images"][..., None] / 255.0).astype(np.float32),
        arrays["test_labels"].astype(np.int32),
    )
    return Dataset(
        "fashion",
        Split(images[:50_000], labels[:50_000]),
        Split(images[50_000:], labels[50_000:]),
        test,
        FASHION_CLASSES,
    )


def find_idx(folder: Path, stem: str) -> Path:
    """`folder/stem` or `folder/stem.gz`. Raises DataError if neither is there."""
    for path in (folder / stem, folder / f"{stem}.gz"):
        if path.is_file():
            return path
    raise DataError(
        f"{folder / stem}[.gz] is missing; config.data.folder must hold "
        f"{', '.join(s for s, _ in FASHION_FILES.values())} (plain or .gz)"
    )


def read_idx(path: Path) -> np.ndarray:
    """An idx file of unsigned bytes as uint8 [n, ...].

    Raises DataError if it is damaged, with expected and found size.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            raw = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read ({error}); it may be truncated; download it again"
        ) from None
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise DataError(
            f"{path} is not an idx file of unsigned bytes: it starts with"
            f" {raw[:4].hex() or 'nothing'}"
        )
    if raw[3] < 1:
        raise DataError(f"{path} is damaged: its header names no dimension; download it again")
    header = 4 + 4 * raw[3]
    if len(raw) < header:
        raise DataError(
            f"{path} is truncated: expected a header of {header} bytes, found {len(raw)};"
            " download it again"
        )
    shape = struct.unpack(f">{raw[3]}I", raw[4:header])
    expected = header + int(np.prod(shape))
    if len(raw) != expected:
        raise DataError(
            f"{path} is damaged: expected {expected} bytes for shape {shape}, found {len(raw)};"
            " download it again"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def fingerprint(split: Split) -> str:
    """First 12 hex digits of the SHA-256 of a split's bytes, to name a reference set."""
    return hashlib.sha256(split.images.tobytes() + split.labels.tobytes()).hexdigest()[:12]


class Batches:
    """An endless shuffled stream: batch i is a pure function of (seed, i), so a step number is the
    data position.

    Items are {"x0": float32 [b, h, w, c] in [-1, 1], "cond": int32 [b]}; each epoch has its own
    order. `rows` are those of a batch that are wanted (a process's part); all by default.
    """

    def __init__(
        self, split: Split, batch_size: int, seed: int, rows: np.ndarray | None = None
    ) -> None:
        self._x0, self._labels = split.images * 2.0 - 1.0, split.labels
        self._batch, self._seed = batch_size, seed
        self._rows = np.arange(batch_size) if rows is None else rows
        self._orders: dict[int, np.ndarray] = {}

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            # A batch spans two epochs at most while it is no larger than the set; older orders are
            # not needed.
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = np.random.default_rng((self._seed, epoch)).permutation(
                len(self._labels)
            )
        return self._orders[epoch]

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        epochs, offsets = np.divmod(i * self._batch + self._rows, len(self._labels))
        rows = np.concatenate(
            [self._order(int(e))[offsets[epochs == e]] for e in np.unique(epochs)]
        )
        return {"x0": self._x0[rows], "cond": self._labels[rows]}
