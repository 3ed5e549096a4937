"""python tests/same_run.py WORKDIR WORKDIR: whether two text-to-image runs have the same losses and
the same student. Used by .ci/run.
"""

import sys
from pathlib import Path

import jax
import numpy as np

from jaxdistill.run import checkpoint, records

one, other = (Path(folder) for folder in sys.argv[1:])
losses = [
    {
        r["step"]: r["loss"]
        for r in records.read_curve(folder / "curves" / "student.jsonl")
        if "loss" in r
    }
    for folder in (one, other)
]
assert losses[0].keys() == losses[1].keys() and len(losses[0]) > 1
values = [np.array(list(found.values())) for found in losses]
assert np.ptp(values[0]) > 0.01 * values[0].mean(), values
np.testing.assert_allclose(values[1], values[0], rtol=1e-4)
students = [
    jax.tree.leaves(checkpoint.load_export(folder / "student")[0]) for folder in (one, other)
]
worst = max(float(np.abs(a - b).max()) for a, b in zip(*students, strict=True))
assert worst < 1e-4, worst
print(
    f"{other}: the losses of {one} to {np.abs(values[1] / values[0] - 1).max():.1g}, its student to"
    f" {worst:.1g}"
)
