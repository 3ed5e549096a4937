import numpy as np
import pytest

from jaxdistill.metrics.distances import frechet_distance
from jaxdistill.tasks.scenes import reference, scenes
from jaxdistill.tasks.scenes.recognise import compare, train_recogniser, unit
from jaxdistill.tasks.scenes.reference import Reference
from jaxdistill.tasks.scenes.scores import SceneEvaluator

ASKED = np.array([[0, 1, 2, 3, 4], [1, 0, 0, 5, 7]])


def test_compare_of_what_was_asked_is_one_everywhere():
    assert set(compare(ASKED, ASKED).values()) == {1.0}


@pytest.mark.parametrize(
    ("column", "value", "wrong"),
    [
        (0, 1, {"relation"}),
        (1, 5, {"colour"}),
        (2, 7, {"garment"}),
        (3, 0, {"colour"}),
        (4, 0, {"garment"}),
    ],
)
def test_each_wrong_label_lowers_its_own_share(column, value, wrong):
    found = ASKED.copy()
    found[0, column] = value
    scores = compare(found, ASKED)
    assert scores["all_right"] == 0.5
    assert {k for k, v in scores.items() if v < 1.0} == wrong | {"all_right"}
    assert all(scores[k] == (0.5 if k == "relation" else 0.75) for k in wrong)


def test_exchanged_garments_are_a_wrong_relation():
    scores = compare(ASKED[:, [0, 3, 4, 1, 2]], ASKED)
    assert scores["relation"] == 0.0 and scores["all_right"] == 0.0


@pytest.fixture(scope="module")
def trained():
    """A recogniser of scenes whose garments are squares of different sizes."""
    sprites = {}
    for i, garment in enumerate(scenes.GARMENTS):
        sprites[garment] = np.zeros((1, scenes.SPRITE, scenes.SPRITE), np.float32)
        sprites[garment][0, : 5 + i, : 12 - i] = 1.0
    drawn = [scenes.draw_scene(np.random.default_rng(i), unseen=False) for i in range(1500)]
    images = np.stack(
        [scenes.render(s, sprites, np.random.default_rng((1, i))) for i, s in enumerate(drawn)]
    )
    labels = np.stack([s.labels() for s in drawn])
    options = {
        "channels": (16, 16, 32),
        "features": 16,
        "steps": 130,
        "batch_size": 32,
        "learning_rate": 5e-3,
    }
    return (
        train_recogniser(images[:1200], labels[:1200], unit(images[:1200]), **options),
        unit(images[1200:]),
        labels[1200:],
    )


def test_recogniser_learns_colours_places_and_axis(trained):
    recogniser, images, labels = trained
    scores = compare(recogniser(images)[0], labels)
    assert scores["colour"] > 0.9 and scores["relation"] > 0.9


def test_features_have_unit_mean_variance_and_blocks_do_not_matter(trained):
    recogniser, images, _ = trained
    found, features = recogniser(images)
    assert features.shape == (300, 16) and 0.5 < features.var(axis=0).mean() < 2.0
    np.testing.assert_array_equal(recogniser(images[:7])[0], found[:7])
    np.testing.assert_allclose(recogniser(images[:7])[1], features[:7], atol=1e-4)


def reference_of(trained, *, spread=1.0):
    """Of the images of `trained`."""
    recogniser, images, labels = trained
    found, features = recogniser(images)
    half = len(features) // 2
    captions = [f"caption {i}" for i in range(len(images))]
    return Reference(
        captions=captions,
        labels=labels,
        unseen=captions,
        unseen_labels=labels,
        mean=features.mean(0),
        covariance=np.cov(features, rowvar=False),
        features=features,
        halves=frechet_distance(features[:half], features[half:]),
        ceiling=compare(found, labels),
        spread=spread,
        diversity_captions=10,
        repeats=2,
    )


def test_evaluator_gives_reals_the_ceiling_and_noise_a_low_score(trained):
    recogniser, images, _ = trained
    real_scenes = reference_of(trained)
    evaluator = SceneEvaluator(recogniser, real_scenes)
    real = evaluator(images, images, images[:20])
    ceiling = real_scenes.ceiling["all_right"]
    assert real.fd < 1e-6 < real_scenes.halves
    assert real.all_right == ceiling == real.unseen_all_right
    assert real.precision == real.recall == 1.0
    noise = np.random.default_rng(0).uniform(size=images.shape).astype(np.float32)
    worse = evaluator(noise, noise, noise[:20])
    assert worse.fd > 10 * real_scenes.halves and worse.all_right < 0.1 and worse.recall < 0.2
    assert evaluator.quick(images)["fd"] < 1e-6


def test_diversity_is_the_spread_within_a_caption(trained):
    recogniser, images, _ = trained
    evaluator = SceneEvaluator(recogniser, reference_of(trained, spread=2.0))
    twins = np.repeat(images[:10], 2, axis=0)
    assert evaluator(images, images, twins).diversity == 0.0
    assert evaluator(images, images, images[:20]).diversity > 0.0


def test_a_stored_reference_scores_as_the_scenes_themselves(trained, tmp_path):
    recogniser, images, _ = trained
    whole, path = reference_of(trained), tmp_path / "reference.npz"
    reference.save(path, {"test": whole}, scale=recogniser.scale, count=100)
    found, scale = reference.load(path)
    assert scale == recogniser.scale and found["test"].captions == whole.captions[:100]
    noise = np.random.default_rng(0).uniform(size=(100, *images.shape[1:])).astype(np.float32)
    scores = [
        SceneEvaluator(recogniser, real)(noise, noise, noise[:20])
        for real in (whole, found["test"])
    ]
    np.testing.assert_allclose(*scores, rtol=2e-3, atol=1e-6)
