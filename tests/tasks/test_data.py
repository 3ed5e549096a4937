import gzip
import struct

import numpy as np
import pytest

from jaxdistill.tasks.labelled_images import data
from jaxdistill.tasks.labelled_images.data import (
    Batches,
    DataError,
    Split,
    digits,
    fashion_mnist,
    read_idx,
)


@pytest.fixture(scope="module")
def real():
    return digits()


# ------------------------------------------------------------------------------------------- digits


def rows_of(split):
    return [
        (*image.ravel().tolist(), int(label))
        for image, label in zip(split.images, split.labels, strict=True)
    ]


def test_digits_splits_divide_the_whole_set_and_share_no_image(real):
    from sklearn.datasets import load_digits

    raw = load_digits()
    whole = Split((raw.images[..., None] / 16).astype(np.float32), raw.target)
    train, validation, test = (rows_of(s) for s in (real.train, real.validation, real.test))
    assert (len(train), len(validation), len(test)) == (1078, 359, 360)
    assert sorted(train + validation + test) == sorted(rows_of(whole))
    assert (
        not set(train) & set(validation)
        and not set(train) & set(test)
        and not set(validation) & set(test)
    )


def test_digits_splits_hold_each_class_in_its_share(real):
    splits = [real.train, real.validation, real.test]
    counts = np.stack([np.bincount(s.labels, minlength=10) for s in splits])
    expected = counts.sum(0) * counts.sum(1, keepdims=True) / counts.sum()
    assert np.abs(counts - expected).max() <= 1.0


def test_digits_are_floats_in_the_unit_range_that_reach_both_ends(real):
    for split in (real.train, real.validation, real.test):
        assert split.images.dtype == np.float32 and split.images.shape[1:] == (8, 8, 1)
        assert split.labels.dtype == np.int32 and split.images.shape[:1] == split.labels.shape
        assert split.images.min() == 0.0 and split.images.max() == 1.0
    assert list(real.class_names) == [str(i) for i in range(10)]


def test_digits_are_the_same_at_every_call(real):
    np.random.seed(1)
    again = digits()
    for name in ("train", "validation", "test"):
        assert data.fingerprint(getattr(real, name)) == data.fingerprint(getattr(again, name))
    assert (
        len({data.fingerprint(getattr(real, name)) for name in ("train", "validation", "test")})
        == 3
    )


def test_fingerprint_changes_with_one_pixel_and_with_one_label(real):
    image, label = real.test.images.copy(), real.test.labels.copy()
    image[3, 2, 1, 0] += 1 / 16
    label[0] += 1
    prints = {
        data.fingerprint(s)
        for s in (real.test, Split(image, real.test.labels), Split(real.test.images, label))
    }
    assert len(prints) == 3


# ------------------------------------------------------------------------------------------ batches


def numbered(n):
    """A split in which image and label say their row."""
    return Split(
        np.arange(n, dtype=np.float32)[:, None, None, None] / n, np.arange(n, dtype=np.int32)
    )


def test_batch_is_a_pure_function_of_seed_and_index_in_any_order_of_access():
    split = numbered(10)
    forward = Batches(split, 4, seed=3)
    wanted = [forward[i] for i in range(12)]
    for order in (list(range(11, -1, -1)), [5, 0, 11, 5, 2, 7], [9]):
        fresh = Batches(split, 4, seed=3)
        for i in order:
            found = fresh[i]
            assert np.array_equal(found["cond"], wanted[i]["cond"]) and np.array_equal(
                found["x0"], wanted[i]["x0"]
            )


@pytest.mark.parametrize("batch_size", [1, 4, 10, 7, 25], ids=lambda b: f"batch-{b}")
def test_each_epoch_visits_each_image_once_in_an_order_of_its_own(batch_size):
    n = 10
    batches = Batches(numbered(n), batch_size, seed=0)
    stream = np.concatenate([batches[i]["cond"] for i in range(-(-5 * n // batch_size))])[: 5 * n]
    epochs = stream.reshape(5, n)
    assert np.array_equal(np.sort(epochs, axis=1), np.broadcast_to(np.arange(n), (5, n)))
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_another_seed_gives_another_order():
    split = numbered(50)
    first, second = (
        np.concatenate([Batches(split, 10, seed)[i]["cond"] for i in range(5)]) for seed in (0, 1)
    )
    assert not np.array_equal(first, second)
    assert np.array_equal(np.sort(first), np.sort(second))


def test_batches_scale_images_to_the_networks_range_and_keep_their_labels(real):
    batch = Batches(real.train, 32, seed=5)[7]
    assert (
        batch["x0"].shape == (32, 8, 8, 1)
        and batch["x0"].dtype == np.float32
        and batch["cond"].dtype == np.int32
    )
    assert batch["x0"].min() == -1.0 and batch["x0"].max() == 1.0
    pairs = set(rows_of(real.train))
    assert all(row in pairs for row in rows_of(Split((batch["x0"] + 1) / 2, batch["cond"])))


# ------------------------------------------------------------------------------------ Fashion-MNIST


def idx(array):
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write(path, raw):
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


endings = pytest.mark.parametrize("ending", ["", ".gz"], ids=["plain", "gz"])
SMALL = {"train_images": 9, "train_labels": 9, "test_images": 4, "test_labels": 4}


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """Writes a folder of four small files with the right names; counts are checked against the
    small ones.
    """
    monkeypatch.setattr(
        data,
        "FASHION_FILES",
        {key: (stem, SMALL[key]) for key, (stem, _) in data.FASHION_FILES.items()},
    )
    rng = np.random.default_rng(0)
    arrays = {
        stem: (
            rng.integers(0, 256, (count, 28, 28), np.uint8)
            if "images" in key
            else rng.integers(0, 10, count, np.uint8)
        )
        for key, (stem, count) in data.FASHION_FILES.items()
    }

    def make(ending=""):
        for stem, array in arrays.items():
            write(tmp_path / f"{stem}{ending}", idx(array))
        return tmp_path, arrays

    return make


def one_line(error, *words):
    text = str(error.value)
    assert "\n" not in text and text.strip(), text
    for word in words:
        assert str(word) in text, text


@endings
@pytest.mark.parametrize("shape", [(5,), (3, 4, 2)], ids=["labels", "images"])
def test_idx_file_reads_back_what_was_written(tmp_path, ending, shape):
    array = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    path = tmp_path / f"some-ubyte{ending}"
    write(path, idx(array))
    found = read_idx(path)
    assert found.dtype == np.uint8 and np.array_equal(found, array)


@endings
def test_fashion_mnist_reads_plain_and_compressed_files_and_keeps_the_pairs(fashion, ending):
    folder, arrays = fashion(ending)
    found = fashion_mnist(folder)
    images = np.concatenate([found.train.images, found.validation.images])
    labels = np.concatenate([found.train.labels, found.validation.labels])
    assert images.shape == (9, 28, 28, 1) and images.dtype == np.float32
    assert (
        np.allclose(images[..., 0] * 255, arrays["train-images-idx3-ubyte"])
        and images.min() >= 0
        and images.max() <= 1
    )
    assert np.array_equal(labels, arrays["train-labels-idx1-ubyte"])
    assert np.allclose(found.test.images[..., 0] * 255, arrays["t10k-images-idx3-ubyte"])
    assert np.array_equal(found.test.labels, arrays["t10k-labels-idx1-ubyte"])
    assert len(found.class_names) == 10


def test_empty_folder_setting_names_the_key_and_an_example():
    with pytest.raises(DataError) as error:
        fashion_mnist("")
    one_line(error, "config.data.folder", "--config.data.folder=")


@pytest.mark.parametrize("place", ["empty", "absent"])
def test_folder_without_files_names_the_first_missing_file_and_all_that_are_needed(tmp_path, place):
    folder = tmp_path if place == "empty" else tmp_path / "nowhere"
    with pytest.raises(DataError) as error:
        fashion_mnist(folder)
    one_line(
        error,
        folder / "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    )


def test_one_missing_file_is_named(fashion):
    folder, _ = fashion()
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError) as error:
        fashion_mnist(folder)
    one_line(error, "missing", folder / "t10k-labels-idx1-ubyte")


def test_truncated_file_is_named_with_expected_and_found_size(tmp_path):
    raw = idx(np.zeros((3, 4, 2), np.uint8))
    path = tmp_path / "some-ubyte"
    for found in (len(raw) - 1, 20, 9):
        write(path, raw[:found])
        with pytest.raises(DataError) as error:
            read_idx(path)
        expected = len(raw) if found >= 16 else 16
        one_line(error, path, expected, found)


def test_file_with_too_many_bytes_is_refused(tmp_path):
    raw = idx(np.zeros((3, 2), np.uint8))
    write(tmp_path / "some-ubyte", raw + b"\0")
    with pytest.raises(DataError) as error:
        read_idx(tmp_path / "some-ubyte")
    one_line(error, tmp_path / "some-ubyte", len(raw), len(raw) + 1)


def test_truncated_gz_is_named(tmp_path):
    path = tmp_path / "some-ubyte.gz"
    raw = gzip.compress(idx(np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8)))
    for length in (len(raw) - 1, len(raw) // 2, 12, 3):
        path.write_bytes(raw[:length])
        with pytest.raises(DataError) as error:
            read_idx(path)
        one_line(error, path, "truncated")


def test_flipped_bit_anywhere_in_a_gz_is_a_data_error_or_changes_nothing(tmp_path):
    path = tmp_path / "some-ubyte.gz"
    array = np.random.default_rng(0).integers(0, 4, (20, 4, 4), np.uint8)
    raw = gzip.compress(idx(array))
    refused = 0
    for position in range(len(raw)):
        for bit in (0, 3, 7):
            damaged = bytearray(raw)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                assert np.array_equal(
                    read_idx(path), array
                )  # time stamp and file name are not data
            except DataError as error:
                assert str(path) in str(error) and "\n" not in str(error)
                refused += 1
    assert refused > 2 * len(raw)


@endings
@pytest.mark.parametrize(
    "raw",
    [b"", b"\x89PNG\r\n\x1a\n" + b"x" * 40, struct.pack(">4BI", 0, 0, 13, 1, 1) + b"\0" * 4],
    ids=["empty", "png", "float-idx"],
)
def test_wrong_magic_is_named_with_what_was_found(tmp_path, ending, raw):
    path = tmp_path / f"some-ubyte{ending}"
    write(path, raw)
    with pytest.raises(DataError) as error:
        read_idx(path)
    one_line(error, path, "idx", raw[:4].hex() or "nothing")


def test_plain_file_under_the_name_gz_is_refused(tmp_path):
    path = tmp_path / "some-ubyte.gz"
    path.write_bytes(idx(np.zeros((3, 2), np.uint8)))
    with pytest.raises(DataError) as error:
        read_idx(path)
    one_line(error, path)


def test_wrong_count_is_named_with_expected_and_found(fashion):
    folder, arrays = fashion()
    write(folder / "t10k-images-idx3-ubyte", idx(arrays["t10k-images-idx3-ubyte"][:3]))
    with pytest.raises(DataError) as error:
        fashion_mnist(folder)
    one_line(error, "t10k-images-idx3-ubyte", folder, 3, 4)


def test_shipped_counts_are_those_of_fashion_mnist():
    assert {stem: count for stem, count in data.FASHION_FILES.values()} == {
        "train-images-idx3-ubyte": 60_000,
        "train-labels-idx1-ubyte": 60_000,
        "t10k-images-idx3-ubyte": 10_000,
        "t10k-labels-idx1-ubyte": 10_000,
    }


def test_swapped_image_and_label_files_are_refused(fashion):
    folder, arrays = fashion()
    write(folder / "train-images-idx3-ubyte", idx(arrays["train-labels-idx1-ubyte"]))
    write(folder / "train-labels-idx1-ubyte", idx(arrays["train-images-idx3-ubyte"]))
    with pytest.raises(DataError) as error:
        fashion_mnist(folder)
    one_line(error, "train-images-idx3-ubyte")


def test_file_without_dimensions_is_refused(fashion):
    folder, _ = fashion()
    write(folder / "train-images-idx3-ubyte", b"\0\0\x08\0" + b"\7")
    with pytest.raises(DataError) as error:
        fashion_mnist(folder)
    one_line(error, "train-images-idx3-ubyte")
