import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from idx import write_fashion
from paths import ROOT

from jaxdistill.tasks.labelled_images import data
from jaxdistill.tasks.scenes import scenes
from jaxdistill.tasks.scenes.scenes import (
    COLOURS,
    GARMENTS,
    HELD_OUT,
    PAIRS,
    Scene,
    captions,
    draw_scene,
    parse,
    render,
)

pairs = st.sampled_from(PAIRS)
any_scene = st.builds(Scene, st.sampled_from(scenes.AXES), pairs, pairs)


@given(any_scene)
def test_every_wording_says_its_scene(scene):
    found = captions(scene)
    assert len(set(found)) == len(found) == 8
    assert {parse(caption) for caption in found} == {scene}


def test_caption_in_words():
    assert parse("a pair of red trousers to the right of a blue bag") == Scene(
        "horizontal", ("blue", "bag"), ("red", "trousers")
    )
    assert parse("In this picture, at the bottom a white boot, at the top a green coat").second == (
        "white",
        "boot",
    )


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a red bag",
        "an orange bag above a red bag",
        "a red hat above a red bag",
        "a red bag by a red bag",
    ],
)
def test_caption_outside_the_vocabulary_is_refused_in_one_line(caption):
    with pytest.raises(data.DataError) as error:
        parse(caption)
    assert (
        repr(caption) in str(error.value)
        and "red" in str(error.value)
        and "\n" not in str(error.value)
    )


def test_a_fifth_of_the_pairs_is_held_out_and_each_word_stays_known():
    assert 0.19 < len(HELD_OUT) / len(PAIRS) < 0.22
    kept = [p for p in PAIRS if p not in HELD_OUT]
    assert {c for c, _ in kept} == set(COLOURS) and {g for _, g in kept} == set(GARMENTS)
    assert {c for c, _ in HELD_OUT} == set(COLOURS) and {g for _, g in HELD_OUT} == set(GARMENTS)


@pytest.mark.parametrize("unseen", [False, True])
def test_drawn_scenes_hold_a_held_out_pair_exactly_if_asked_for(unseen):
    drawn = [draw_scene(np.random.default_rng(i), unseen=unseen) for i in range(500)]
    assert all(bool({s.first, s.second} & HELD_OUT) == unseen for s in drawn)
    assert {s.axis for s in drawn} == set(scenes.AXES)
    first, second = (
        sum(p in HELD_OUT for p in column)
        for column in zip(*((s.first, s.second) for s in drawn), strict=True)
    )
    assert not unseen or min(first, second) > 200  # either place may hold it


def test_scenes_for_the_recogniser_hold_every_pair_at_both_places():
    images, labels = scenes.every_composition(blocks(), 4000, seed=0)
    assert (
        images.shape == (4000, 32, 32, 3) and images.dtype == np.uint8 and labels.shape == (4000, 5)
    )
    for colour, garment in ((1, 2), (3, 4)):
        assert len(
            set(zip(labels[:, colour].tolist(), labels[:, garment].tolist(), strict=True))
        ) == len(PAIRS)
    again = scenes.every_composition(blocks(), 10, seed=0)
    np.testing.assert_array_equal(again[0], images[:10])
    assert (scenes.every_composition(blocks(), 10, seed=1)[1] != labels[:10]).any()


def blocks():
    """Sprites that are plain bright squares."""
    return {garment: np.ones((1, scenes.SPRITE, scenes.SPRITE), np.float32) for garment in GARMENTS}


@given(any_scene, st.integers(0, 1000))
def test_rendered_scene_has_each_colour_in_its_half(scene, seed):
    image = render(scene, blocks(), np.random.default_rng(seed)).astype(np.float32) / 255
    if scene.axis == "vertical":
        image = image.transpose(1, 0, 2)
    for half, (colour, _) in zip(
        (image[:, :16], image[:, 16:]), (scene.first, scene.second), strict=True
    ):
        lit = half[half.max(-1) > 0]
        assert len(lit) == scenes.SPRITE**2
        np.testing.assert_allclose(lit, np.broadcast_to(COLOURS[colour], lit.shape), atol=0.003)


def test_labels_name_axis_colours_and_garments():
    scene = Scene("vertical", ("blue", "bag"), ("red", "trousers"))
    axis, *rest = scene.labels()
    names = [
        list(COLOURS)[rest[0]],
        list(GARMENTS)[rest[1]],
        list(COLOURS)[rest[2]],
        list(GARMENTS)[rest[3]],
    ]
    assert scenes.AXES[axis] == "vertical" and names == ["blue", "bag", "red", "trousers"]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    source, folder = (
        write_fashion(tmp_path_factory.mktemp("idx")),
        tmp_path_factory.mktemp("scenes"),
    )
    return source, folder, scenes.open_scenes(source, folder, scale=0.004)


def test_dataset_holds_captions_labels_and_images_that_agree(opened):
    _, _, sources = opened
    assert {k: len(v) for k, v in sources.items()} == {
        "train": 200,
        "validation": 20,
        "test": 20,
        "unseen": 20,
    }
    for split, source in sources.items():
        for item in (source[i] for i in range(20)):
            scene = parse(item["caption"].decode())
            np.testing.assert_array_equal(item["labels"], scene.labels())
            assert (
                item["image"].shape == (32, 32, 3)
                and item["image"].dtype == np.uint8
                and item["image"].max() > 100
            )
            assert bool({scene.first, scene.second} & HELD_OUT) == (split == "unseen")


@pytest.mark.long
def test_runs_that_begin_together_make_the_scenes_once(opened, tmp_path):
    source, _, first = opened
    job = f"""
from jaxdistill.tasks.scenes.scenes import open_scenes
open_scenes({str(source)!r}, {str(tmp_path)!r}, scale=0.004)
"""
    jobs = [subprocess.Popen([sys.executable, "-c", job], cwd=ROOT) for _ in range(2)]
    assert [process.wait() for process in jobs] == [0, 0]
    made = scenes.open_scenes(source, tmp_path, scale=0.004)
    assert np.array_equal(made["train"][0]["image"], first["train"][0]["image"])


def test_dataset_is_the_same_from_its_seed_and_read_again_from_disk(opened, tmp_path, monkeypatch):
    source, folder, sources = opened
    made = scenes.open_scenes(source, tmp_path / "scenes", scale=0.004)
    copy = shutil.copytree(source, tmp_path / "copy")
    with monkeypatch.context() as patch:
        patch.setattr(scenes, "fashion_mnist", None)  # a second call draws nothing
        kept = scenes.open_scenes(copy, folder, scale=0.004)
    for again in (kept, made):
        for i in (0, 7, 199):
            np.testing.assert_array_equal(again["train"][i]["image"], sources["train"][i]["image"])
            assert again["train"][i]["caption"] == sources["train"][i]["caption"]


def test_other_garments_make_other_scenes_in_the_same_folder(opened, tmp_path):
    source, folder, sources = opened
    other = Path(shutil.copytree(source, tmp_path / "other"))
    labels = other / "train-labels-idx1-ubyte"
    raw = labels.read_bytes()
    labels.write_bytes(raw[:8] + bytes((value + 1) % 10 for value in raw[8:]))
    first = sources["train"][0]["image"]
    assert np.any(scenes.open_scenes(other, folder, scale=0.004)["train"][0]["image"] != first)
    again = scenes.open_scenes(source, folder, scale=0.004)["train"][0]["image"]
    np.testing.assert_array_equal(again, first)


def test_missing_idx_files_are_named(tmp_path):
    with pytest.raises(data.DataError, match="train-images-idx3-ubyte"):
        scenes.open_scenes(tmp_path, tmp_path / "scenes", scale=0.004)


def test_captions_of_a_stored_dataset_serve_as_prompts(opened):
    """Any TFDS set in array_record files, without TensorFlow and without its builder's code."""
    from jaxdistill.tasks.text_to_image.data import prompts_of

    _, folder, _ = opened
    name = "fashion_scenes"
    found = prompts_of(f"tfds:{name}:validation", str(folder))
    assert found and all(scenes.parse(caption) for caption in found)
    with pytest.raises(ValueError, match=r"no 'title' in its examples, only .*caption"):
        prompts_of(f"tfds:{name}:validation:title", str(folder))
    with pytest.raises(ValueError, match="must have the form tfds:name:split"):
        prompts_of("tfds:nothing", str(folder))
    with pytest.raises(ValueError, match="dataset nothing is not in"):
        prompts_of("tfds:nothing:train", str(folder))
    with pytest.raises(ValueError, match=f"{name}:sideways cannot be read"):
        prompts_of(f"tfds:{name}:sideways", str(folder))


def test_images_of_a_stored_dataset_serve_as_reals(opened):
    from jaxdistill.tasks.text_to_image.data import captioned_images

    _, folder, sources = opened
    found = captioned_images("tfds:fashion_scenes:validation", str(folder))
    assert len(found) == len(sources["validation"]) and found[0].stamp != found[1].stamp
    for i in (0, 3):
        item = sources["validation"][i]
        np.testing.assert_array_equal(found[i].read(), item["image"])
        assert found[i].caption == item["caption"].decode()
    with pytest.raises(ValueError, match=r"config.data.images = .* no 'title' in its examples"):
        captioned_images("tfds:fashion_scenes:validation:title", str(folder))
