"""docs/plans.md and docs/results/plans.* hold what the reports of the compiler say."""

import copy
import json

import pytest
from benchmarks import plans_table as table


def test_page_and_results_are_what_the_command_writes():
    page = table.PAGE.read_text()
    assert page.count(table.BEGIN) == 1
    for path, text in table.outputs(page).items():
        assert path.read_text() == text, f"run {table.COMMAND}: {path} is older than the reports"


def test_every_report_is_a_row():
    rows = table.collected()
    reports = {p.name for p in table.RESULTS.glob("aot_*")}
    methods = json.loads((table.RESULTS / "methods_memory.json").read_text())["rows"]
    assert {row["file"] for row in rows} == reports | {"methods_memory.json"}
    assert len(rows) == len(reports) + len(methods)
    text = table.PAGE.read_text()
    for row in rows:
        assert f"(results/{row['file']})" in text


def test_a_new_row_of_methods_is_taken_with_or_without_its_times(tmp_path):
    known = json.loads((table.RESULTS / "methods_memory.json").read_text())
    new = copy.deepcopy(known["rows"][0])
    new |= {"method": "tdm"}
    for key in ("roofline_ms", "bound", "flops_ratio"):
        new.pop(key)
    path = tmp_path / "methods_memory.json"
    path.write_text(json.dumps({**known, "rows": [*known["rows"], new]}))
    row = table.rows_of_methods(path)[-1]
    cells = table.cells_of(row, "results/")
    assert "1.5, 512²: TDM, LoRA of rank 64" in cells["job and report"]
    assert cells["GiB per chip"] == "9.4 of 95: fits" and cells["bound by"] == ""


@pytest.mark.parametrize(
    ("topology", "name"),
    [("v4:2x2x4", "v4-32"), ("v5e:4x4", "v5e-16"), ("v5p:2x2x1", "v5p-8"), ("v6e:4x4", "v6e-16")],
)
def test_slices_have_the_names_of_cloud_tpu(topology, name):
    assert table.slice_of(topology) == name
