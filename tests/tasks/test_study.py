"""Lists of runs on one task, by the smallest of labelled images: a benchmark and an ablation."""

import json

import numpy as np
import pytest
import tiny
from shell import TINY, run_command

from configs import base
from jaxdistill import ablate, benchmark
from jaxdistill.run import checkpoint
from jaxdistill.run.guard import Guard, guard_settings
from jaxdistill.run.loop import Stopped, StopSignal
from jaxdistill.run.records import read_curve
from jaxdistill.tasks.small import SmallTask

METHODS = ("imagine_flash", "step_distillation")


def tiny_list():
    """Two methods, two seeds."""
    config = tiny.get_config()
    config.student.iterations, config.methods.step_distillation.first = 12, 4
    base.compared(config, METHODS)
    config.benchmark.seeds = (0, 1)
    config.guard.lines, config.student.health_every = 1, 4
    config.guard.limits.update({name: 1e-9 for name in config.guard.limits})
    return config


def study_of(config, workdir, listing, stop=None):
    """As the commands have it."""
    workdir.mkdir(exist_ok=True)
    made = benchmark.Study(config, workdir, listing, stop or StopSignal())
    made.open()
    return made


def compared(workdir, stop=None):
    config = tiny_list()
    return study_of(config, workdir, benchmark.listed(config), stop)


def ablation(workdir, names, seeds=(0,)):
    config = tiny.get_config()
    return study_of(config, workdir, ablate.listed(config, seeds, names))


def without_rates(rows):
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


@pytest.fixture(scope="module")
def finished_list(tmp_path_factory):
    """(study, its table) of a finished benchmark."""
    made = compared(tmp_path_factory.mktemp("list") / "run")
    made.run()
    return made, made.write()


@pytest.mark.long
def test_a_benchmark_runs_a_list_of_methods_on_labelled_images(finished_list):
    study, text = finished_list
    results = json.loads((study.workdir / "results.json").read_text())
    keys = {(r["method"], r["model"], r["seed"], r["steps"]) for r in results["rows"]}
    students = {(m, "student", s, n) for m in METHODS for s in (0, 1) for n in (1, 2, 3)}
    assert keys == students | {("teacher", "teacher", 0, n) for n in (1, 2, 3, 5)}
    assert text == (study.workdir / "results.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| step_distillation |")]
    assert len(lines) == 3 and all(line.count(" ± ") == 7 for line in lines)  # every score
    mean = next(m for m in results["means"] if (m["method"], m["steps"]) == (METHODS[0], 2))
    of = [r for r in results["rows"] if (r["method"], r["steps"]) == (METHODS[0], 2)]
    assert mean["seeds"] == 2 and mean["fd"] == pytest.approx(
        np.mean([r["fd"] for r in of]), abs=1e-4
    )
    assert of[0]["ratio"] == pytest.approx(of[0]["fd"] / results["reference"]["fd"], abs=1e-4)
    assert (study.workdir / "results.png").stat().st_size > 5000


@pytest.mark.long
def test_no_guard_ends_a_run_of_a_list(finished_list):
    for seed in (0, 1):
        folder = finished_list[0].workdir / "students" / f"imagine_flash-{seed}"
        curve = read_curve(folder / "curves" / "student.jsonl")
        lines = [line for line in curve if "health/drift" in line]
        guard = Guard(guard_settings(tiny_list().guard.to_dict()))
        numbers = [{k.removeprefix("health/"): float(v) for k, v in x.items()} for x in lines]
        events = [guard.judge(0, line, last=False) for line in numbers]
        assert any(events[:-1]) and [line["step"] for line in lines] == [0, 4, 8, 12]


@pytest.mark.long
def test_a_run_of_a_list_is_that_of_the_same_config_alone(finished, finished_list):
    """The same seeds and streams, so the same scores."""
    rows = [r for r in finished_list[0].stored().values() if r["method"] in ("teacher", METHODS[0])]
    rows = [r for r in rows if r["seed"] == 0]
    alone = {(r["model"], r["steps"], r["guidance"]): r for r in finished[1]["rows"]}
    assert len(rows) == len(alone)
    for row in rows:
        expected = alone[row["model"], row["steps"], row["guidance"]]
        for key in ("fd", "accuracy", "diversity", "nearest_neighbour"):
            assert row[key] == pytest.approx(expected[key], rel=1e-3), (row, key)


@pytest.mark.long
def test_rows_alone_carry_a_list_and_none_of_it_is_made_again(finished_list, tmp_path, monkeypatch):
    first = finished_list[0]
    checkpoint.write_json(tmp_path / "rows.json", json.loads(first.rows_path.read_text()))
    monkeypatch.setattr(SmallTask, "teacher", None)
    monkeypatch.setattr(SmallTask, "served", None)
    again = compared(tmp_path)
    again.run()
    assert again.write() == finished_list[1]
    assert not (tmp_path / "teacher").exists() and not (tmp_path / "students").exists()


@pytest.mark.long
def test_a_signal_stops_a_list_and_the_same_command_goes_on(finished_list, tmp_path, monkeypatch):
    stop, trained = StopSignal(), []
    served = SmallTask.served

    def once(task, run, teacher):
        trained.append(run.workdir.name)
        stop.received = "SIGTERM" if len(trained) == 2 else None
        return served(task, run, teacher)

    monkeypatch.setattr(SmallTask, "served", once)
    with pytest.raises(Stopped):
        compared(tmp_path, stop).run()
    again = compared(tmp_path)
    again.run()
    # The second was stopped in its training; the first was not touched again.
    assert trained == [f"{m}-{s}" for m, s in MADE[:2]] + [f"{m}-{s}" for m, s in MADE[1:]]
    assert without_rates(again.rows()) == without_rates(finished_list[0].rows())


MADE = [(m, s) for s in (0, 1) for m in METHODS]
"""In the order in which one process makes them."""


@pytest.mark.long
def test_a_variant_gets_the_teacher_or_the_student_of_its_seed(tmp_path):
    names = ["endpoint", "eps model, no noise correction"]
    study = ablation(tmp_path, names, seeds=(0, 1))
    assert [entry.key for entry in study.entries if entry.seed == 1] == [
        "full-1",
        "eps-model-1",
        "eps-model-no-noise-correction-1",
        "endpoint-1",
    ]
    paths = {key: task.config.teacher.path for key, task in study.tasks.items()}
    assert paths["endpoint-1"] == str(tmp_path / "full-1" / "student")
    assert paths["eps-model-no-noise-correction-1"] == str(tmp_path / "eps-model-1" / "teacher")
    assert paths["full-1"] == paths["eps-model-0"] == ""
    # Any of them can be made first: what it is given is made before it.
    study.make(next(entry for entry in study.entries if entry.key == "endpoint-0"))
    assert list(study.stored()) == ["endpoint-0-student-1-1"]
    assert (tmp_path / "full-0/student/card.json").exists() and not (tmp_path / "full-1").exists()


@pytest.mark.long
def test_ablation_writes_one_table_and_does_not_repeat_itself(tmp_path, monkeypatch):
    study = ablation(tmp_path, ["no SRL", "endpoint"])
    study.run()
    text = study.write()
    assert text.count("| no SRL | student |") == 3 and text.count("| full | student |") == 3
    assert text.count("| endpoint | student | 1 |") == 1 and text.count("teacher, guidance") == 5
    monkeypatch.setattr(SmallTask, "teacher", None)
    monkeypatch.setattr(SmallTask, "served", None)
    fewer = ablation(tmp_path, ["no SRL"])
    fewer.run()
    text = fewer.write()
    found = json.loads((tmp_path / "ablation.json").read_text())
    assert {row["method"] for row in found["rows"]} == {"full", "no SRL"}
    assert "endpoint" not in text and found["means"][0]["ratio"] == 1.0


@pytest.mark.costly
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--variants=full,less"], "--variants = 'less' is not known; choose one of 'full', "),
        (["--seeds=one"], "--seeds=one is not a list of whole numbers"),
    ],
)
def test_a_list_that_cannot_be_is_one_line(flags, words, tmp_path):
    found = run_command("jaxdistill.ablate", f"--config={TINY}", f"--workdir={tmp_path}", *flags)
    assert found.returncode == 2 and found.stderr.startswith(f"error: {words}"), found.stderr
    assert found.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.long
def test_processes_share_an_ablation_and_end_in_the_same_rows(tmp_path):
    flags = [f"--config={TINY}", "--variants=no SRL", "--seeds=0,1"]
    for count in (1, 2):
        workdir = f"--workdir={tmp_path / str(count)}"
        found = run_command("jaxdistill.ablate", *flags, workdir, f"--processes={count}")
        assert found.returncode == 0, found.stderr[-3000:]
    one, two = (json.loads((tmp_path / n / "ablation.json").read_text()) for n in ("1", "2"))
    assert (tmp_path / "2" / "logs" / "process_1.log").exists()
    assert [r["method"] for r in one["rows"]] == [r["method"] for r in two["rows"]]
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert b["fd"] == pytest.approx(a["fd"], rel=0.02)  # the number of threads changes bits
