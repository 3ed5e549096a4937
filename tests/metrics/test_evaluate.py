import jax
import numpy as np
import pytest

from jaxdistill.metrics.distances import (
    Gaussian,
    class_spread,
    fd_noise,
    frechet_distance,
    gaussian_of,
    nearest_neighbour_distance,
    precision_recall,
    saturation,
)
from jaxdistill.tasks.labelled_images.data import Dataset, Split, digits
from jaxdistill.tasks.labelled_images.scores import (
    Evaluator,
    Extractor,
    make_extractor,
    train_extractor,
)

# --------------------------------------------------------------------------------- Fréchet distance


def with_moments(n, mean, factor, seed=0):
    """n rows whose sample mean is `mean` and whose sample covariance is factor factorᵀ, both
    exactly.
    """
    d = len(mean)
    x = np.random.default_rng(seed).normal(size=(n, d))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(x.T @ x / (n - 1))).T
    return x @ np.asarray(factor).T + mean


def rotation(d, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


def test_frechet_distance_of_axis_aligned_gaussians_is_the_closed_form():
    s_a, s_b, shift = (
        np.array([1.0, 0.5, 2.0, 0.1]),
        np.array([0.3, 0.5, 3.0, 1.5]),
        np.array([1.0, 0.0, -2.0, 0.25]),
    )
    a, b = with_moments(50, np.zeros(4), np.diag(s_a), 1), with_moments(80, shift, np.diag(s_b), 2)
    assert frechet_distance(a, b) == pytest.approx(
        ((s_a - s_b) ** 2).sum() + (shift**2).sum(), rel=1e-9
    )


def test_a_gaussian_stands_for_its_features():
    a, b = (np.random.default_rng(seed).normal(size=(30, 4)) for seed in (1, 2))
    wanted = frechet_distance(a, b)
    for left in (a, gaussian_of(a)):
        for right in (b, Gaussian(b.mean(0), np.cov(b, rowvar=False))):
            assert frechet_distance(left, right) == pytest.approx(wanted, rel=1e-12)


def test_frechet_distance_does_not_change_under_a_common_rotation():
    s_a, s_b, shift, q = (
        np.array([1.0, 0.2, 2.0]),
        np.array([0.5, 1.0, 1.0]),
        np.array([0.5, -1.0, 0.0]),
        rotation(3, 5),
    )
    a, b = (
        with_moments(40, np.zeros(3), q @ np.diag(s_a), 1),
        with_moments(40, q @ shift, q @ np.diag(s_b), 2),
    )
    assert frechet_distance(a, b) == pytest.approx(
        ((s_a - s_b) ** 2).sum() + (shift**2).sum(), rel=1e-9
    )


def test_frechet_distance_of_gaussians_with_unlike_axes_is_the_closed_form_of_two_dimensions():
    # For 2x2 matrices, tr (AB)^½ = sqrt(tr AB + 2 sqrt(det A det B)).
    f_a, f_b = rotation(2, 1) @ np.diag([2.0, 0.3]), rotation(2, 2) @ np.diag([1.0, 0.7])
    cov_a, cov_b = f_a @ f_a.T, f_b @ f_b.T
    assert np.abs(cov_a @ cov_b - cov_b @ cov_a).max() > 0.1
    cross = np.sqrt(
        np.trace(cov_a @ cov_b) + 2 * np.sqrt(np.linalg.det(cov_a) * np.linalg.det(cov_b))
    )
    a, b = (
        with_moments(30, np.array([1.0, 2.0]), f_a, 1),
        with_moments(60, np.array([0.0, 2.5]), f_b, 2),
    )
    assert frechet_distance(a, b) == pytest.approx(
        1.25 + np.trace(cov_a) + np.trace(cov_b) - 2 * cross, rel=1e-9
    )


def test_frechet_distance_of_singular_covariances_is_the_closed_form():
    s_a, s_b = np.array([1.0, 0.0, 2.0]), np.array([0.5, 3.0, 0.0])
    a, b = (
        with_moments(40, np.zeros(3), np.diag(s_a), 1),
        with_moments(40, np.zeros(3), np.diag(s_b), 2),
    )
    assert frechet_distance(a, b) == pytest.approx(((s_a - s_b) ** 2).sum(), rel=1e-6)


def test_frechet_distance_is_symmetric_and_zero_on_itself_in_any_order():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(60, 8)), rng.gamma(2.0, size=(45, 8))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, b) > 0.1
    assert frechet_distance(a, rng.permutation(a)) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("rows", [1, 7, 8])
def test_frechet_distance_of_too_few_rows_says_how_many_are_needed(rows):
    many, few = np.random.default_rng(0).normal(size=(20, 8)), np.zeros((rows, 8))
    for pair in ((few, many), (many, few)):
        with pytest.raises(ValueError, match=f"more than 8 images, got {rows}"):
            frechet_distance(*pair)


def test_a_gaussian_stands_for_its_features_on_either_side():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(60, 8)), rng.gamma(2.0, size=(45, 8))
    wanted, noise = frechet_distance(a, b), fd_noise(a, b)
    for left in (a, gaussian_of(a)):
        for right in (b, gaussian_of(b)):
            assert frechet_distance(left, right) == pytest.approx(wanted, rel=1e-12)
    assert fd_noise(a, gaussian_of(b)) == pytest.approx(noise, rel=1e-9)


def test_the_gaussian_of_features_is_their_mean_and_unbiased_covariance():
    factor = np.array([[2.0, 0.0], [1.0, 0.5]])
    found = gaussian_of(with_moments(40, np.array([1.0, -3.0]), factor))
    assert isinstance(found, Gaussian)
    np.testing.assert_allclose(found.mean, [1.0, -3.0], rtol=1e-9)
    np.testing.assert_allclose(found.covariance, factor @ factor.T, rtol=1e-9)


# ----------------------------------------------------------------------------- precision and recall


MODES = np.array([[0.0, 0.0], [20.0, 0.0], [0.0, 20.0], [20.0, 20.0]])


def cloud(modes, n, seed):
    return np.concatenate(
        [
            mode + np.random.default_rng((seed, i)).normal(size=(n, 2))
            for i, mode in enumerate(modes)
        ]
    )


def test_precision_and_recall_of_a_set_against_itself_are_one():
    real = cloud(MODES, 25, 0)
    assert precision_recall(real, np.random.default_rng(1).permutation(real)) == (1.0, 1.0)


def test_precision_and_recall_of_disjoint_sets_are_zero():
    real = cloud(MODES, 25, 0)
    assert precision_recall(real, real + 1000.0) == (0.0, 0.0)


def test_dropped_modes_lower_recall_and_keep_precision():
    real = cloud(MODES, 25, 0)
    kept = real[:50]
    jitter = np.random.default_rng(2).normal(scale=1e-3, size=(100, 2))
    precision, recall = precision_recall(real, np.concatenate([kept, kept]) + jitter)
    assert precision == 1.0
    assert recall == pytest.approx(0.5)


def test_far_outliers_lower_precision_by_their_share_and_keep_recall():
    real = cloud(MODES, 25, 0)
    fake = real.copy()
    fake[::4] = 1000.0 * (1 + np.arange(25))[:, None]
    precision, recall = precision_recall(real, fake)
    assert precision == pytest.approx(0.75)
    assert recall > 0.9  # the reals that were left out lie among the fakes


def test_radius_is_the_distance_to_the_kth_neighbour():
    real = np.array([[0.0], [1.0], [3.0], [7.0]])
    fake = np.array([[-2.5], [100.0], [200.0], [300.0]])
    # -2.5 is 2.5 from the real at 0, whose neighbours are 1, 3 and 7 away.
    assert [precision_recall(real, fake, k=k)[0] for k in (1, 2, 3)] == [0.0, 0.25, 0.25]


def test_more_fakes_than_reals_are_scored_in_blocks_of_the_reals_size():
    real = cloud(MODES, 25, 0)
    assert precision_recall(real, np.concatenate([real, real + 1000.0])) == (0.5, 0.5)
    assert precision_recall(real, np.concatenate([real, real + 1000.0, real[:99]])) == (0.5, 0.5)


def test_more_reals_than_fakes_are_cut_to_one_size():
    real = cloud(MODES, 25, 0)
    assert precision_recall(np.concatenate([real, real + 1000.0]), real) == (1.0, 1.0)


@pytest.mark.parametrize("count", [1, 3])
def test_precision_and_recall_of_too_few_images_are_refused(count):
    real = cloud(MODES, 25, 0)
    with pytest.raises(
        ValueError, match=f"need more than 3 images, got 100 real and {count} generated"
    ):
        precision_recall(real, real[:count])


# --------------------------------------------------------------------------------- pixel statistics


def images_of(n=60, seed=0):
    """Images around one centre a class, with labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    centres = rng.uniform(0.3, 0.7, (3, 4, 4, 1))
    return (centres[labels] + 0.1 * rng.normal(size=(n, 4, 4, 1))).clip(0, 1), labels


def spread_out(images, labels, factor):
    """Each class drawn away from its mean."""
    means = np.stack([images[labels == c].mean(0) for c in range(3)])[labels]
    return means + factor * (images - means)


def test_class_spread_is_the_root_mean_square_distance_of_two_images_of_a_class():
    images, labels = images_of(30)
    expected = []
    for c in range(3):
        rows = images[labels == c].reshape(10, -1)
        squares = [((a - b) ** 2).sum() for i, a in enumerate(rows) for b in rows[:i]]
        expected.append(np.sqrt(np.mean(squares)))
    assert class_spread(images, labels) == pytest.approx(np.mean(expected), rel=1e-9)


def test_class_spread_doubles_with_the_spread_and_is_zero_at_collapse():
    images, labels = images_of()
    assert class_spread(spread_out(images, labels, 2.0), labels) == pytest.approx(
        2 * class_spread(images, labels), rel=1e-9
    )
    assert class_spread(spread_out(images, labels, 0.0), labels) == pytest.approx(0.0, abs=1e-9)


def test_class_spread_does_not_see_differences_between_classes():
    images, labels = images_of()
    apart = images + labels[:, None, None, None]
    assert class_spread(apart, labels) == pytest.approx(class_spread(images, labels), rel=1e-9)


def test_nearest_neighbour_distance_is_zero_for_copies_and_the_shift_for_shifted_copies():
    train, _ = images_of()
    copies = train[[3, 3, 17]]
    assert nearest_neighbour_distance(copies, train) == pytest.approx(0.0, abs=1e-6)
    assert nearest_neighbour_distance(copies + 0.01, train) == pytest.approx(
        0.04, rel=1e-6
    )  # sqrt(16 · 0.01²)


def test_nearest_neighbour_distance_is_a_median():
    train = np.zeros((1, 2, 2, 1))
    images = np.stack([np.full((2, 2, 1), v) for v in (0.1, 0.2, 50.0)])
    assert nearest_neighbour_distance(images, train) == pytest.approx(0.4)


def test_saturation_is_the_share_of_values_at_either_end():
    values = [[0.0, 1.0, 0.5, 0.001, 0.999, 0.1], [2 / 255, 253 / 255, 0.5, 0.5, 0.5, 0.5]]
    images = np.reshape(values, (2, 2, 3, 1))
    assert saturation(images) == pytest.approx([4 / 6, 0.0])


# -------------------------------------------------------------------------- extractor and evaluator


@pytest.fixture(scope="module")
def real():
    return digits()


def train(dataset):
    return train_extractor(
        dataset, channels=(8,), features=6, steps=60, batch_size=32, learning_rate=1e-2
    )


@pytest.fixture(scope="module")
def extractor(real):
    return train(real)


def test_extractor_of_the_same_training_has_the_same_hash_and_features(real, extractor):
    again = train(real)
    assert again.hash == extractor.hash and len(again.hash) == 12
    assert np.array_equal(again.features(real.test.images), extractor.features(real.test.images))


def test_extractor_hash_changes_with_one_bit_of_the_weights(real, extractor):
    leaves, structure = jax.tree.flatten(extractor.params)
    leaves = [np.array(leaf) for leaf in leaves]
    leaves[-1].view(np.uint8).reshape(-1)[0] ^= 1
    arguments = {"num_classes": 10, "channels": (8,), "features": 6}
    changed = make_extractor(jax.tree.unflatten(structure, leaves), real.train.images, **arguments)
    same = make_extractor(extractor.params, real.train.images, **arguments)
    assert changed.hash != extractor.hash and same.hash == extractor.hash


def test_extractor_features_have_mean_variance_one_over_the_train_split(real, extractor):
    features = extractor.features(real.train.images)
    assert features.shape == (1078, 6)
    assert features.var(axis=0, dtype=np.float64).mean() == pytest.approx(1.0, rel=1e-5)
    assert features.var(axis=0).std() > 1e-3  # one constant for all, not one for each


def test_extractor_gives_an_image_the_same_features_in_any_block(real, extractor):
    images = np.concatenate([real.train.images, real.test.images])
    whole = extractor.features(images)
    assert len(whole) == 1438
    for i in (0, 999, 1000, 1437):
        assert np.allclose(extractor.features(images[i : i + 1])[0], whole[i], atol=1e-5)
    assert extractor.predict(images).shape == (1438,) and set(extractor.predict(images)) <= set(
        range(10)
    )


def test_extractor_learns_the_classes(real, extractor):
    assert (extractor.predict(real.test.images) == real.test.labels).mean() > 0.3  # chance is 0.1


def pixels(seed=0):
    """A stand-in for the classifier: two pixel sums as features, the brighter half as the class."""

    def features(x):
        return np.stack([x[:, :2].sum((1, 2, 3)), x[:, 2:].sum((1, 2, 3))], axis=1)

    return Extractor(features, lambda x: features(x).argmax(1), "0" * 12, None)


@pytest.fixture(scope="module")
def toy():
    rng = np.random.default_rng(4)

    def split(n):
        images = rng.uniform(0, 1, (n, 4, 4, 1)).astype(np.float32)
        return Split(images, pixels().predict(images).astype(np.int32))

    return Dataset("toy", split(100), split(50), split(40), ["top", "bottom"])


def test_evaluator_scores_the_reference_itself_as_perfect(toy):
    evaluator = Evaluator(toy, toy.test, pixels())
    scores = evaluator(toy.test.images, toy.test.labels)
    assert scores.fd == pytest.approx(0.0, abs=1e-8)
    assert (scores.accuracy, scores.precision, scores.recall) == (1.0, 1.0, 1.0)
    assert scores.diversity == pytest.approx(1.0) and scores.nearest_neighbour == pytest.approx(1.0)
    assert evaluator.classifier_accuracy == 1.0
    assert evaluator.quick_fd(toy.test.images) == pytest.approx(0.0, abs=1e-8)
    assert evaluator.floor_fd() > 0


def test_evaluator_measures_against_the_right_splits(toy):
    evaluator = Evaluator(toy, toy.test, pixels())
    scores = evaluator(toy.train.images, toy.train.labels)
    features = pixels().features
    assert scores.fd == pytest.approx(
        frechet_distance(features(toy.train.images), features(toy.test.images))
    )
    assert scores.fd == pytest.approx(evaluator.floor_fd_train())
    assert scores.fd_train == pytest.approx(0.0, abs=1e-8)
    assert scores.fd > 1e-3
    assert scores.nearest_neighbour == pytest.approx(0.0, abs=1e-6)  # memorised
    assert evaluator(toy.test.images, 1 - toy.test.labels).accuracy == 0.0


def test_evaluator_fd_noise_is_the_spread_of_fd_over_draws_and_halves_with_four_times_the_samples(
    toy,
):
    evaluator = Evaluator(toy, toy.test, pixels())
    rng = np.random.default_rng(0)

    def draw(n):  # darker than the reals, so that the distance is far above its bias
        return evaluator(
            rng.uniform(0, 0.8, (n, 4, 4, 1)).astype(np.float32), np.zeros(n, np.int32)
        )

    few, many = ([draw(n) for _ in range(16)] for n in (200, 800))
    for scores in (few, many):
        found = [s.fd_noise for s in scores]
        assert 0.6 < np.mean(found) / np.std([s.fd for s in scores], ddof=1) < 1.6
        assert np.std(found, ddof=1) < 0.2 * np.mean(found)  # the noise of the noise
    assert 1.6 < np.mean([s.fd_noise for s in few]) / np.mean([s.fd_noise for s in many]) < 2.5


def test_evaluator_leaves_fd_noise_open_where_less_samples_have_no_covariance(toy):
    images = np.random.default_rng(0).uniform(0, 1, (4, 4, 4, 1)).astype(np.float32)
    split = Split(images, pixels().predict(images).astype(np.int32))
    scores = Evaluator(toy, split, pixels())(images, split.labels)
    assert np.isnan(scores.fd_noise) and np.isfinite(scores.fd)
