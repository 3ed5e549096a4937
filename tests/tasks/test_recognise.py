import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.metrics.distances import class_spread, frechet_distance
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


@pytest.mark.long
def test_recogniser_learns_colours_places_and_axis(trained):
    recogniser, images, labels = trained
    scores = compare(recogniser(images)[0], labels)
    assert scores["colour"] > 0.9 and scores["relation"] > 0.9


@pytest.mark.long
def test_features_have_unit_mean_variance_and_blocks_do_not_matter(trained):
    recogniser, images, _ = trained
    found, features = recogniser(images)
    assert features.shape == (300, 16) and 0.5 < features.var(axis=0).mean() < 2.0
    np.testing.assert_array_equal(recogniser(images[:7])[0], found[:7])
    np.testing.assert_allclose(recogniser(images[:7])[1], features[:7], atol=1e-4)


def reference_of(recogniser, images, labels, *, spread):
    """Of these scenes, which stand for the unseen ones as well."""
    found, features = recogniser(images)
    return Reference(
        captions=[f"caption {i}" for i in range(len(images))],
        labels=labels,
        unseen=[f"unseen {i}" for i in range(len(images))],
        unseen_labels=labels,
        mean=features.mean(0),
        covariance=np.cov(features, rowvar=False),
        features=features,
        halves=frechet_distance(features[::2], features[1::2]),
        ceiling=compare(found, labels),
        spread=spread,
        diversity_captions=10,
        repeats=2,
    )


@pytest.mark.long
def test_evaluator_gives_reals_the_ceiling_and_noise_a_low_score(trained):
    recogniser, images, labels = trained
    known = reference_of(recogniser, images, labels, spread=1.0)
    evaluator, ceiling, floor = SceneEvaluator(recogniser, known), known.ceiling, known.halves
    real = evaluator(images, images, images[:20])
    assert (
        real.fd < 1e-6 < floor and real.all_right == ceiling["all_right"] == real.unseen_all_right
    )
    assert real.precision == real.recall == 1.0
    noise = np.random.default_rng(0).uniform(size=images.shape).astype(np.float32)
    worse = evaluator(noise, noise, noise[:20])
    assert worse.fd > 10 * floor and worse.all_right < 0.1 and worse.recall < 0.2
    assert evaluator.quick(images)["fd"] < 1e-6


@pytest.mark.long
def test_a_stored_reference_scores_as_the_scenes_themselves(trained, tmp_path):
    recogniser, images, labels = trained
    known = reference_of(recogniser, images, labels, spread=2.0)
    other = reference_of(recogniser, images[:200], labels[:200], spread=1.0)
    path = tmp_path / reference.FILE
    stored = {"validation": other, "test": known}
    reference.save(path, stored, scale=recogniser.scale, count=len(images))
    found, scale = reference.load(path)
    assert scale == recogniser.scale and found.keys() == {"validation", "test"}
    assert found["test"].captions == known.captions and found["test"].unseen == known.unseen
    noise = np.random.default_rng(0).normal(size=images.shape)
    worse = np.clip(images + 0.1 * noise, 0.0, 1.0).astype(np.float32)
    for split, before in stored.items():
        expected, scores = (
            SceneEvaluator(recogniser, r)(worse[:200], worse[:50], worse[:20])
            for r in (before, found[split])
        )
        for name, value in expected._asdict().items():
            # Features are stored in half precision, for precision and recall alone.
            off = 0.02 if name in ("precision", "recall") else 1e-6
            assert getattr(scores, name) == pytest.approx(value, abs=off), (split, name)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=f"{reference.FILE} cannot be read"):
        reference.load(path)


@pytest.mark.long
def test_diversity_is_the_spread_within_a_caption(trained):
    recogniser, images, labels = trained
    known = reference_of(recogniser, images, labels, spread=2.0)
    evaluator = SceneEvaluator(recogniser, known)
    twins = np.repeat(images[:10], 2, axis=0)
    assert evaluator(images, images, twins).diversity == 0.0
    assert evaluator(images, images, images[:20]).diversity > 0.0
    assert evaluator(images, images, images[:20]).diversity == pytest.approx(
        class_spread(images[:20], np.arange(20) // 2) / 2.0
    )
