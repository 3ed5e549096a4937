"""Laws of the numbers by which a guard judges a student's images."""

import numpy as np
import pytest

from jaxdistill.metrics import drift

GROUPS = np.repeat(np.arange(12), 4)


def images(channels=3, size=8, seed=0):
    random = np.random.default_rng(seed)
    return random.uniform(-0.1, 1.1, (len(GROUPS), size, size, channels)).clip(0.0, 1.0)


def test_the_teachers_own_images_have_not_drifted():
    a = images()
    found = drift.of_images(a, a, GROUPS) | drift.of_channels(a, a, GROUPS)
    for name, number in found.items():
        expected = 0.0 if name in ("brightness", "channel_mean") else 1.0
        assert number.value == pytest.approx(expected, abs=1e-9), name
        assert number.error == pytest.approx(0.0, abs=1e-9), name


def test_each_number_sees_its_own_change():
    a = images()
    mean = a.mean((1, 2, 3), keepdims=True)
    grey = a.mean(3, keepdims=True)
    changes = {
        "brightness": (a - 0.1, -0.1),
        "contrast": (mean + 1.5 * (a - mean), 1.5),
        "colour": (grey + 0.5 * (a - grey), 0.5),
        "diversity": (0.5 * a + 0.25, 0.5),
    }
    for name, (changed, value) in changes.items():
        found = drift.of_images(changed, a, GROUPS)
        assert found[name].value == pytest.approx(value, rel=1e-6), name
    moved = drift.of_images(a - 0.1, a, GROUPS)
    for name in ("contrast", "colour", "detail", "diversity"):
        assert moved[name].value == pytest.approx(1.0, rel=1e-6)


def test_saturation_is_of_either_end():
    a = 0.5 * images() + 0.25
    a[:, 0] = 1.0
    burnt = a.copy()
    burnt[:, 1:3] = 0.0
    assert drift.of_images(burnt, a, GROUPS)["saturation"].value == pytest.approx(3.0)
    assert drift.of_images(a, burnt, GROUPS)["saturation"].value == pytest.approx(1 / 3)


def test_more_groups_do_not_change_what_is_compared_with_nothing():
    """A teacher without saturation: the ratio is to the smallest that counts, of a mean."""
    grey, black = np.full((8, 4, 4, 3), 0.5), np.zeros((8, 4, 4, 3))
    for groups in (np.arange(8), np.arange(8) // 2, np.zeros(8, int)):
        assert drift.of_images(grey, grey, groups)["saturation"].value == 1.0
        found = drift.of_images(black, grey, groups)["saturation"].value
        assert found == pytest.approx(1 / drift.TINY)


def test_detail_is_of_specks_and_not_of_large_shapes():
    shapes = np.repeat(np.repeat(images(size=2), 16, 1), 16, 2)
    random = np.random.default_rng(1)
    specks = shapes + 0.05 * random.standard_normal(shapes.shape)
    blurred = (shapes + np.roll(shapes, 1, 1) + np.roll(shapes, 1, 2)) / 3
    assert drift.of_images(specks, shapes, GROUPS)["detail"].value > 1.5
    assert drift.of_images(blurred, shapes, GROUPS)["detail"].value < 0.8
    assert drift.of_images(specks, shapes, GROUPS)["contrast"].value == pytest.approx(1.0, abs=0.1)


def test_the_channel_that_differs_most_counts():
    a = images(channels=4)
    b = a.copy()
    b[..., 2] += 0.5 * a[..., 2].std()
    b[..., 1] = 0.5 + 0.25 * (b[..., 1] - 0.5)
    found = drift.of_channels(b, a, GROUPS)
    assert found["channel_mean"].value == pytest.approx(0.5, rel=1e-3)
    assert found["channel_spread"].value == pytest.approx(0.25, rel=1e-3)


def test_grey_images_have_no_colour_and_single_ones_no_diversity():
    found = drift.of_images(images(1), images(1, seed=1), GROUPS)
    assert "colour" not in found and "diversity" in found
    single = drift.of_images(images(), images(seed=1), np.arange(len(GROUPS)))
    assert "diversity" not in single


def test_one_prompt_alone_has_the_error_of_its_images():
    """Without one a guard could not tell a change from chance."""
    a, b, one = images(), images(seed=1), np.zeros(len(GROUPS), int)
    for measure in (drift.of_images, drift.of_channels):
        alone, single = measure(a, b, one), measure(a, b, np.arange(len(GROUPS)))
        assert np.isnan(alone.pop("diversity", drift.Number(1.0, np.nan)).error)
        assert alone == single and all(0 < number.error < 0.1 for number in alone.values())


def test_the_error_is_that_of_a_mean_over_groups():
    values = np.random.default_rng(0).normal(3.0, 1.0, 40)
    found = drift.jackknife(lambda total, n: total / n, [values, np.ones(40)])
    assert found.value == pytest.approx(values.mean())
    assert found.error == pytest.approx(values.std(ddof=1) / np.sqrt(40))
    assert np.isnan(drift.jackknife(lambda total: total, [values[:1]]).error)


def test_the_error_of_other_noises_covers_what_they_change():
    """Two draws of one student: their numbers lie within a few errors of 1."""
    a, b = images(), images(seed=1)
    for name, number in drift.of_images(a, b, GROUPS).items():
        expected = 0.0 if name == "brightness" else 1.0
        assert abs(number.value - expected) < 5 * number.error, name
        assert number.error < 0.1, name
