"""A health line: what it prints, draws and returns."""

import numpy as np
import pytest
from PIL import Image

from jaxdistill.tasks.health import Health


def test_a_line_compares_a_student_with_its_teacher(tmp_path, capsys):
    """At one step it is its teacher, at two half as far from each group's mean."""
    groups = np.repeat([0, 1, 2], 4)
    reference = np.random.default_rng(0).uniform(0.2, 0.8, (12, 4, 4, 1))
    reference[:, 0] = 1.0  # some saturation to compare with
    means = np.stack([reference[groups == group].mean(0) for group in groups])
    shrunk = means + 0.5 * (reference - means)

    def draw(trained, steps):
        return {n: (reference if n == 1 else shrunk, None) for n in steps}

    health = Health(reference, groups, draw, tmp_path, quick=lambda images: {"fd": 7.0}, scale=1)
    found = health.of("student", (1, 2), 20)({}, 10)
    for name in ("diversity", "contrast", "saturation"):
        assert found[f"{name}_1"] == pytest.approx(1.0) and found[f"{name}_1_error"] < 1e-9
    assert found["distance_1"] == 0.0 and found["fd_2"] == 7.0
    assert found["diversity_2"] == pytest.approx(0.5) and found["contrast_2"] < 0.95
    assert found["distance_2"] == pytest.approx(np.sqrt(((reference - shrunk) ** 2).mean()))
    one, two = capsys.readouterr().out.splitlines()
    start = "health  student 10/20, 1 step: diversity 1.000, contrast 1.000, saturation 1.000"
    assert one == f"{start}, distance 0.000, fd 7.000"
    assert two.startswith("health  student 10/20, 2 steps: diversity 0.500, ")
    with Image.open(tmp_path / "student_0000010.png") as picture:
        assert picture.height >= 3 * 4  # the teacher's row and one a step count
