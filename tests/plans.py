"""python tests/plans.py REPORT.json ...: what every report of `jaxdistill.aot` on a train step must
say. Used by .ci/run.
"""

import json
import re
import sys
from pathlib import Path

from jaxdistill.costs.chips import CHIPS
from jaxdistill.tasks.text_to_image import plan

for name in sys.argv[1:]:
    report = json.loads(Path(name).read_text())
    rows = report["rows"]
    assert report["compiled"] == "step" and report["fits"] and report["unknown_loops"] == 0, name
    assert (
        rows == report["rows_a_chip"] * report["chips"]
        and 0 < report["memory_gib"]["needed"] < report["memory_gib"]["chip"]
    ), name
    # Over the loss and its gradient as they are written. The compilers spare some products of this
    # tiny net (v4: 0.98) and do others twice (v6e: 1.08).
    assert 0.9 < report["flops_ratio"] < 1.15, (name, report["flops_ratio"])
    # No activations: nothing with a batch's rows in front, or those of N states or of two guided
    # calls.
    front = "|".join(str(n * rows) for n in (1, 2, 3))
    assert not [g for g in report["gathered"] if re.match(rf"\w+\[({front}),", g["shape"])], (
        name,
        report["gathered"],
    )
    assert report["bound"] in report["roofline_ms"] and report["step_ms_at_least"] == max(
        report["roofline_ms"].values()
    ), name
    assert report["memory_gib"]["chip"] * 2**30 == CHIPS[report["topology"].split(":")[0]].hbm, name
    text = plan.text_of(report)
    assert (
        f"{report['topology']}: step, {report['chips']} chips, {rows} rows,"
        f" {rows // report['chips']} per chip" in text
    ), name
    assert f"of {report['memory_gib']['chip']:g}: fits" in text, name
    print(f"{name}: as it must be")
