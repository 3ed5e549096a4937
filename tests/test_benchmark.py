import json
import sys
from pathlib import Path

import numpy as np
import pytest
from idx import write_fashion
from shell import run_command

from jaxdistill import benchmark, main

sys.path.insert(0, str(Path(__file__).parent.parent))
from configs import benchmark as config_file

METHODS = ("imagine_flash", "step_distillation")
GOLDEN = Path(__file__).parent / "golden" / "bert"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_fashion(tmp_path_factory.mktemp("idx"))


@pytest.fixture(scope="module")
def smoke(source, tmp_path_factory):
    """(workdir, flags) of a finished smoke benchmark: the command as users give it."""
    workdir = tmp_path_factory.mktemp("benchmark") / "run"
    flags = [
        "--config=configs/benchmark.py:smoke",
        f"--config.data.source={source}",
        f"--config.text.folder={GOLDEN}",
        f"--workdir={workdir}",
        "--config.methods=('imagine_flash', 'step_distillation')",  # all of them run in .ci/run
    ]
    found = run_command("jaxdistill.benchmark", *flags, timeout=600)
    assert found.returncode == 0, found.stderr[-3000:]
    assert "| imagine_flash | 1 |" in found.stdout
    return workdir, flags


@pytest.mark.slow
def test_smoke_benchmark_scores_every_method_at_every_step_count(smoke):
    workdir, _ = smoke
    results = json.loads((workdir / "results.json").read_text())
    found = {(row["method"], row["steps"]) for row in results["rows"]}
    config = config_file.get_config("smoke")
    assert found == {(m, n) for m in METHODS for n in config.student.steps} | {("teacher", n) for n in (1, 2, 4)}
    for row in results["rows"]:
        assert np.isfinite([row[k] for k in benchmark.SHOWN]).all() and row["images_per_second"] > 0
    assert results["floor_fd"] > 0 and set(results["ceiling"]) == {"colour", "garment", "relation", "all_right"}
    assert "| step_distillation | 2 |" in (workdir / "results.md").read_text()


@pytest.mark.slow
def test_methods_spend_the_same_budget(smoke):
    workdir, _ = smoke
    config = config_file.get_config("smoke")
    for method in METHODS:
        cards = [json.loads(p.read_text()) for p in (workdir / "students").glob(f"{method}-0*/card.json")]
        spent = sum(card["calls_an_iteration"] * card["iterations"] for card in cards)
        slack = sum(card["calls_an_iteration"] for card in cards)
        assert config.student.budget - slack <= spent <= config.student.budget, method


@pytest.mark.slow
def test_second_start_repeats_nothing_and_other_settings_are_refused(smoke):
    workdir, flags = smoke
    before = {p: p.stat().st_mtime_ns for p in (workdir / "students").rglob("*")}
    rows = (workdir / "rows.json").read_bytes()
    found = run_command("jaxdistill.benchmark", *flags, timeout=300)
    assert found.returncode == 0 and {p: p.stat().st_mtime_ns for p in (workdir / "students").rglob("*")} == before
    assert (workdir / "rows.json").read_bytes() == rows
    found = run_command("jaxdistill.benchmark", *flags, "--config.eval.samples=40")
    # Libraries may warn at import (Grain does with an older jaxlib); of ours there is one line.
    errors = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert found.returncode == 2 and len(errors) == 1 and "Traceback" not in found.stderr
    assert "another config" in errors[0] and "eval.samples" in errors[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ("imagine_flash", "magic")}, ("methods", "'magic'", "'dmd2'")),
        ({"eval.samples": 5}, ("eval.samples = 5", "at least 9")),
        ({"eval.samples": 0}, ("eval.samples = 0",)),
        ({"eval.split": "train"}, ("eval.split", "'train'", "'test'")),
        ({"student.steps": (0, 1)}, ("student.steps", "at least 1")),
    ],
)
def test_bad_config_is_refused_before_any_work(changes, words):
    config = config_file.get_config("smoke")
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError) as error:
        benchmark.check(config)
    for word in words:
        assert word in str(error.value)


def test_unknown_size_of_the_config_is_refused():
    with pytest.raises(ValueError, match="huge is not known"):
        config_file.get_config("huge")


def test_stored_rows_of_another_recogniser_are_never_mixed(tmp_path, monkeypatch):
    class Fake(benchmark.Benchmark):
        def __init__(self):
            self.config, self.workdir = config_file.get_config("smoke"), tmp_path

        def recogniser(self):
            return type("R", (), {"hash": "this"})()

        def evaluator(self, recogniser, split):
            return None

        def teacher(self, evaluator):
            return None

    (tmp_path / "rows.json").write_text(json.dumps({"protocol": {"recogniser_sha256": "that"}, "rows": []}))
    with pytest.raises(main.UserError, match="another protocol"):
        Fake().run()


def test_pairs_of_noise_and_target_stay_together():
    targets = np.arange(6, dtype=np.float32).reshape(6, 1, 1, 1)
    batches = benchmark.PairBatches(targets, [str(i) for i in range(6)], lambda c: {"tokens": np.array([int(x) for x in c])}, 4, 0)
    for i in range(5):
        batch = batches(i)
        rows = batch["cond"]["tokens"]
        np.testing.assert_array_equal(batch["target"].ravel(), rows)
        np.testing.assert_array_equal(batch["noise"], benchmark.pair_noise(0, rows))
        assert len(rows) == 4
