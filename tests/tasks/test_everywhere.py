"""Every method on tiny folders, of an UNet and of a transformer, all weights and LoRA by turns:
what it exports is what stock diffusers draws. `tests/benchmarks/methods_everywhere.py` has all
cases.
"""

import everywhere
import pytest

from jaxdistill.methods import METHODS

QUICK = ("sd", "lcm", 2)
"""The first: fresh noise, a target that follows the student, and LoRA in one."""

TRANSFORMERS = {
    "imagine_flash": "flux",
    "endpoint": "flux",  # from imagine_flash's student
    "lcm": "flux",  # fresh noise, packed
    "matched": "sd3",
    "step_distillation": "sd3",
    "lightning": "sd3",
    "add": "pixart",
    "direct": "pixart",
    "dmd2": "zimage",
    "tdm": "zimage",
}
CASES = [("sd", method, 2 * (i % 2)) for i, method in enumerate(METHODS)]
CASES += [(TRANSFORMERS[method], method, 2 - lora) for _, method, lora in CASES]
assert QUICK in CASES
CASES.sort(key=QUICK.__ne__)

FRESH_NOISE = ("lcm", "add", "dmd2")


def scheduler_of(task, method):
    """The class that diffusers draws such a student with."""
    if task in ("flux", "sd3", "zimage"):
        return "FlowMatchEulerDiscreteScheduler"
    return "LCMScheduler" if method in FRESH_NOISE else "DDIMScheduler"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("everywhere")


@pytest.mark.costly
@pytest.mark.parametrize(("task", "method", "lora"), CASES)
def test_a_methods_student_is_drawn_by_stock_diffusers(task, method, lora, root):
    row = everywhere.run_case(task, method, lora, root)
    assert row["difference"] < min(0.1, 0.05 * row["moved"])
    assert row["scheduler"] == scheduler_of(task, method)
    first = 1000 if row["scheduler"].startswith("FlowMatch") else 999
    assert all(len(t) == int(n) and t[0] == first for n, t in row["timesteps"].items())
