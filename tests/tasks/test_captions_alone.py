"""Scenes distilled from captions alone: a teacher, a recogniser and stored statistics, no image."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from idx import write_fashion
from paths import TESTS
from shell import flip_bit

from configs import benchmark as config_file
from configs import scenes as scenes_config
from jaxdistill import main
from jaxdistill.errors import UserError
from jaxdistill.run import checkpoint
from jaxdistill.run.run import Run
from jaxdistill.tasks import open_task
from jaxdistill.tasks.scenes import measure, reference
from jaxdistill.tasks.scenes.task import SceneData, Scenes
from jaxdistill.tasks.small import Sampled

pytestmark = pytest.mark.long

GOLDEN = TESTS / "golden" / "bert"


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """(task on real scenes, base): its teacher is a fresh network."""
    folder = tmp_path_factory.mktemp("real")
    config = config_file.get_config("smoke")
    config.data.source = str(write_fashion(tmp_path_factory.mktemp("idx")))
    config.text.folder = str(GOLDEN)
    base = folder / "base"
    config.data.cache = str(folder)
    task = Scenes(config, data=SceneData(config, base=base))
    checkpoint.export(base / "teacher", task.first_params(), task.teacher_sampler.card)
    assert task.data.recogniser.hash  # is trained and exported
    checkpoint.write_json(base / "config.json", json.loads(config.to_json()))
    measure.measure(config.data.source, base, folder / "scenes")
    assert all(task.data.reference(split) for split in reference.SPLITS)
    shutil.rmtree(config.data.source)  # what follows has no image but those above
    return task, base


def alone(base, cache, method="imagine_flash", /, **changes):
    """The smoke config from captions alone."""
    config = config_file.get_config("smoke")
    config.base, config.text.folder, config.data.cache = str(base), str(GOLDEN), str(cache)
    config.method.name, config.data.captions = method, 40
    config.student.budget, config.adversarial.pool = 60, 20
    config.adversarial.reals = "teacher"
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def task(real, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    config = alone(real[1], cache)
    return Scenes(config, data=SceneData(config), share=real[0])


def test_stored_statistics_score_as_the_scenes_that_they_are_of(real, task):
    images = np.random.default_rng(0).uniform(size=(20, 32, 32, 3)).astype(np.float32)
    assert task.data.recogniser.hash == real[0].data.recogniser.hash
    for split in ("validation", "test"):
        scenes, stored = (t.data.evaluator(split).quick(images) for t in (real[0], task))
        assert stored == pytest.approx(scenes, rel=1e-5)


def test_the_statistics_are_in_the_recognisers_checksums(real, tmp_path):
    folder = tmp_path / "recogniser"
    shutil.copytree(real[1] / "recogniser", folder)
    before = checkpoint.load_export(folder)[1]
    assert reference.FILE in before["sha256"]
    flip_bit(folder / reference.FILE)
    with pytest.raises(checkpoint.CheckpointError, match=f"{reference.FILE} is damaged"):
        checkpoint.load_export(folder)
    (folder / reference.FILE).unlink()
    with pytest.raises(UserError, match=r"is missing; run .*measure.*config.data.source"):
        reference.load(folder / reference.FILE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": ""}, ("config.data.source is empty", "config.base=pretrained/scenes")),
        (
            {"adversarial.reals": "data"},
            ("config.data.source is empty", "config.adversarial.reals=teacher"),
        ),
        (
            {"adversarial.reals": "data", "method.name": "lcm"},
            ("config.data.source is empty", "config.adversarial.reals=teacher"),
        ),
        ({"eval.samples": 60}, ("config.eval.samples", "at most 50", "got 60")),
    ],
)
def test_what_needs_images_is_refused_in_one_line(real, tmp_path, changes, words):
    with pytest.raises(ValueError) as error:
        open_task(alone(real[1], tmp_path, **changes))
    for word in words:
        assert word in str(error.value) and "\n" not in str(error.value)


def test_batches_hold_captions_and_no_image(task):
    rows = np.arange(4)
    batches, again, others = (task.noise_batches(4, seed, rows) for seed in (0, 0, 1))
    first = batches(3)
    assert first["x0"].shape == (4, 32, 32, 3) and not first["x0"].any()
    np.testing.assert_array_equal(again(3)["cond"]["tokens"], first["cond"]["tokens"])
    assert any((others(i)["cond"]["mask"] != batches(i)["cond"]["mask"]).any() for i in range(5))
    part = task.noise_batches(4, 0, rows[2:])(3)  # another process's rows
    np.testing.assert_array_equal(part["cond"]["tokens"], first["cond"]["tokens"][2:])


class Caches(Run):
    """A run of which only the names of its caches are seen."""

    def __init__(self):
        self.keys = {}

    def cache(self, name, key, count, make, what, *, rows):
        self.keys[name] = (key, count)


def keys_of(task, teacher):
    run = Caches()
    task.prepare(run, teacher)
    return run.keys


@pytest.mark.parametrize(("method", "name"), [("imagine_flash", "pool"), ("direct", "pairs")])
def test_a_cache_is_named_by_teacher_sampler_encoder_captions_and_by_nothing_else(
    real, task, tmp_path, method, name
):
    teacher = checkpoint.load_export(real[1] / "teacher")[0]

    def made(data=task.data, **changes):
        return Scenes(alone(real[1], tmp_path, method, **changes), data=data, share=task)

    def with_data(**parts):
        data = object.__new__(SceneData)
        data.__dict__ |= task.data.__dict__ | parts
        return data

    known = keys_of(made(), teacher)
    assert list(known) == [name]
    same = {f"methods.{method}.learning_rate": 0.5, "student.ema_decay": 0.5, "eval.samples": 30}
    assert keys_of(made(**same), teacher) == known
    encoder = task.data.encoder._replace(hash="other")
    last = [*task.data.captions["train"][:-1], "a red bag above a red bag"]
    others = [
        keys_of(made(), jax.tree.map(lambda a: a + 1e-3, teacher)),
        keys_of(made(**{"teacher.guidance": 3.0}), teacher),
        keys_of(made(**{"teacher.grid": "leading"}), teacher),
        keys_of(made(with_data(encoder=encoder)), teacher),
        keys_of(made(with_data(captions={**task.data.captions, "train": last})), teacher),
        keys_of(made(seed=1), teacher),
    ]
    steps = "teacher.steps" if name == "pool" else "methods.direct.pairs_steps"
    others.append(keys_of(made(**{steps: 5}), teacher))
    keys = [known[name][0], *(other[name][0] for other in others)]
    assert len(set(keys)) == len(keys)


def test_images_a_second_cost_no_block_but_a_second_one_of_a_single(task, monkeypatch):
    calls = []

    def program(params, noise, cond, grid):
        calls.append(len(noise))
        return noise

    monkeypatch.setattr(task, "program", lambda sampler, guidance: program)
    size = task.config.eval.batch_size
    sampled = Sampled("student", 2, 1.0, task.student_sampler, {})
    for count, blocks in ((3 * size - 7, 3), (size, 2), (5, 2)):
        calls.clear()
        images, rate = task.timed_draw(sampled, lambda rows: None, count, 0)
        assert len(images) == count and rate > 0
        assert calls == [min(size, count)] * blocks
        np.testing.assert_array_equal(images, task.draw(sampled, lambda rows: None, count, 0))


def test_a_run_from_captions_alone_ends_with_a_table_and_students(real, tmp_path):
    config = alone(real[1], tmp_path / "cache", "matched")
    results = main.run(config, tmp_path / "run")
    rows = {(row["model"], row["steps"]) for row in results["rows"]}
    steps = config.student.steps
    assert rows == {("teacher", config.teacher.steps)} | {
        (model, n) for model in ("teacher", "student") for n in steps
    }
    assert all(np.isfinite([row["fd"], row["all_right"]]).all() for row in results["rows"])
    for name, shown in (("student", 2), ("student_1_step", 1)):
        about = checkpoint.load_export(tmp_path / "run" / name)[1]
        assert about["sampler"]["steps"] == shown and about["method"] == "matched"
    assert (tmp_path / "run" / "results.png").stat().st_size > 5000
    again = main.run(config, tmp_path / "run")  # evaluates the exports
    for before, after in zip(results["rows"], again["rows"], strict=True):
        assert {**before, "images_per_second": 0} == {**after, "images_per_second": 0}


def test_the_shipped_size_fits_its_blocks_and_needs_no_image():
    config = scenes_config.get_config()
    assert config.data.source == "" and config.adversarial.reals == "teacher"
    assert Path(config.base) == Path("pretrained/scenes")
    ev, size = config.eval, config.eval.batch_size
    repeated = ev.diversity_captions * ev.repeats
    counts = (ev.samples, ev.unseen, repeated, config.log.health_samples, config.adversarial.pool)
    assert [count % size for count in counts] == [0] * 5
