"""What the repository ships: the scenes' teacher, recogniser and student."""

from pathlib import Path

import pytest
from shell import ROOT

from configs import benchmark as config_file
from jaxdistill import benchmark
from jaxdistill.interop import card
from jaxdistill.run import checkpoint

SCENES = Path(ROOT) / "pretrained" / "scenes"


@pytest.mark.parametrize("size", ["", "tuning", "ablation", "leakage"])
def test_shipped_teacher_is_that_of_the_config(size):
    config = config_file.get_config(size)
    config.base, config.data.source = str(SCENES), "somewhere"
    benchmark.check_all(config)


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
