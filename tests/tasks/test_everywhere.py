"""Every method on a tiny folder, all weights and LoRA by turns: what it exports is what stock
diffusers draws. `tests/benchmarks/methods_everywhere.py` has all pairs, and the other tasks.
"""

import everywhere
import pytest

from jaxdistill.methods import METHODS

QUICK = ("sd", "lcm", 2)
"""Fresh noise, a target that follows the student, and LoRA in one."""

CASES = [("sd", method, 2 * (i % 2)) for i, method in enumerate(METHODS)]
assert QUICK in CASES

SCHEDULERS = {
    "lcm": "LCMScheduler",
    "add": "LCMScheduler",
    "dmd2": "LCMScheduler",
}
"""Of the students that stock DDIM does not draw."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("everywhere")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "method", "lora"),
    [pytest.param(*case, marks=[] if case == QUICK else pytest.mark.long) for case in CASES],
)
def test_a_methods_student_is_drawn_by_stock_diffusers(task, method, lora, root):
    row = everywhere.run_case(task, method, lora, root)
    assert row["difference"] < 1
    assert row["scheduler"] == SCHEDULERS.get(method, "DDIMScheduler")
    assert all(len(times) == n and times[0] == 999 for n, times in row["timesteps"].items())
