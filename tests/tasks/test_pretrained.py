"""What the repository ships: the scenes' teacher, recogniser and student."""

import json
from pathlib import Path

import pytest
from shell import ROOT

from configs import benchmark as config_file
from configs import scenes
from jaxdistill.interop import card
from jaxdistill.run import checkpoint
from jaxdistill.tasks.scenes import reference
from jaxdistill.tasks.scenes.task import check_base

SCENES = Path(ROOT) / "pretrained" / "scenes"


@pytest.mark.parametrize("size", ["", "tuning", "ablation", "leakage"])
def test_shipped_teacher_is_that_of_the_config(size):
    config = config_file.get_config(size)
    config.base = str(SCENES)
    check_base(config)


@pytest.mark.parametrize(
    ("role", "steps"), [("teacher", 50), ("student", 3), ("student_one_step", 1)]
)
def test_shipped_exports_are_whole_and_say_how_they_are_sampled(role, steps):
    _, about = checkpoint.load_export(SCENES / role)  # compares every file with its checksum
    sampler = card.build_sampler(about)
    assert (
        about["role"] == role.removesuffix("_one_step")
        and about["data"]["name"] == "scenes"
        and about["text"]["sha256"]
    )
    assert len(sampler.grid(steps)) == steps and about["sampler"]["steps"] == steps


def test_shipped_statistics_of_real_scenes_are_in_the_recognisers_checksums_and_serve_the_config():
    folder = SCENES / "recogniser"
    _, about = checkpoint.load_export(folder)
    assert reference.FILE in about["sha256"]
    found, scale = reference.load(folder / reference.FILE)
    config = scenes.get_config()
    assert found.keys() == {"validation", "test"} and scale > 0
    assert (folder / reference.FILE).stat().st_size < 700_000
    for part in found.values():
        assert len(part.captions) >= max(config.eval.samples, config.log.health_samples)
        assert len(part.unseen) >= config.eval.unseen
        assert part.mean.shape == (config.recogniser.features,)
    published = json.loads((ROOT / "docs" / "results" / "benchmark.json").read_text())
    assert about["hash"] == published["protocol"]["recogniser_sha256"]
    assert found["test"].halves == pytest.approx(published["floor_fd"], abs=1e-5)
    assert found["test"].ceiling == pytest.approx(published["ceiling"], abs=1e-4)


@pytest.mark.parametrize("method", ["", "imagine_flash", "dmd2", "tdm", "direct", "one"])
def test_shipped_teacher_is_that_of_the_scenes_config(method):
    config = scenes.get_config(method)
    config.base = str(SCENES)
    check_base(config)
