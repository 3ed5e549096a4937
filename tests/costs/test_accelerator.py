"""tests/benchmarks/accelerator.py: one part that fails leaves the others, and what was measured."""

import json
import sys

import pytest
from benchmarks import accelerator

CPU = {"platform": "cpu", "kind": "cpu", "count": 1, "versions": {"jax": "0"}}
GPU = {**CPU, "platform": "gpu", "kind": "NVIDIA L4"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """(exit code, the report) of some parts, whose processes give what `parts` says."""

    def started(parts, about=CPU, flags=()):
        monkeypatch.setattr(
            accelerator, "in_a_process", lambda name, quick, left: {"device": about, **parts}[name]
        )
        out = tmp_path / "report"
        monkeypatch.setattr(
            sys, "argv", ["x", f"--out={out}", f"--parts={','.join(parts)}", *flags]
        )
        code = accelerator.main()
        return code, json.loads((tmp_path / "report.json").read_text()), (tmp_path / "report.md")

    return started


def test_a_part_that_fails_is_noted_and_the_others_go_on(run):
    parts = {"parity": {"failed": "XlaRuntimeError: no"}, "digits": {"fd": {"3": 0.2}}}
    code, report, page = run(parts)
    assert code == 1 and report["parts"] == parts
    assert "failed: XlaRuntimeError: no" in page.read_text()
    assert '| fd | {"3": 0.2} |' in page.read_text() and "1 x cpu" in page.read_text()
    assert run({"digits": {"fd": 1}})[0] == 0


def test_what_a_machine_cannot_do_is_left_out_with_the_reason(run, monkeypatch):
    parts = {"full": {"seconds": 1.0}, "network_torch": {"seconds": 1.0}}
    code, report, _ = run(parts)
    assert code == 0 and all("accelerators" in part["skipped"] for part in report["parts"].values())
    assert run(parts, about=GPU)[1]["parts"] == parts
    monkeypatch.setattr(accelerator.importlib.util, "find_spec", lambda name: None)
    report = run(parts, about=GPU)[1]
    assert report["parts"]["full"] == {"seconds": 1.0}
    assert report["parts"]["network_torch"] == {"skipped": "torch or diffusers is not installed"}
    assert (
        "minutes are over"
        in run(parts, about=GPU, flags=["--minutes=0"])[1]["parts"]["full"]["skipped"]
    )


def test_a_process_that_fails_or_takes_too_long_is_a_line():
    found = accelerator.in_a_process("network_torch", True, 0.05)
    assert "not finished after 0 s" in found["failed"]


@pytest.mark.long
def test_an_exception_of_a_part_is_its_line():
    pytest.importorskip("diffusers")
    if pytest.importorskip("torch").cuda.is_available():
        pytest.skip("the part would run")
    found = accelerator.in_a_process("network_torch", True, 200)
    assert found["failed"].split(":")[0] in ("AssertionError", "RuntimeError")
