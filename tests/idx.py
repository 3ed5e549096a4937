"""Fashion-MNIST's four idx files with random garments, of the real sizes, for tests of what reads
them.
"""

import struct
from pathlib import Path

import numpy as np

from jaxdistill.tasks.labelled_images.data import FASHION_FILES


def write_fashion(folder: Path) -> Path:
    """A bright block whose height tells the class, on black, with noise."""
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        _, count = FASHION_FILES[f"{part}_labels"]
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = np.zeros((count, 28, 28), np.uint8)
        for label in range(10):
            images[labels == label, 2 : 6 + 2 * label, 6:22] = 180
        images[:, 2:, 6:22] += rng.integers(0, 40, (1, 26, 16), np.uint8)
        for key, array in ((f"{part}_labels", labels), (f"{part}_images", images)):
            header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (folder / FASHION_FILES[key][0]).write_bytes(header + array.tobytes())
    return folder
