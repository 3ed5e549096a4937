"""Mistakes that would otherwise show only after the long work, as a traceback, or never."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from shell import (
    ROOT,
    TINY,
    assert_one_error_line,
    environment,
    flip_bit,
    folder_bytes,
    run_command,
    tiny_config,
)

from jaxdistill import main, sample
from jaxdistill.errors import UserError
from jaxdistill.run import checkpoint
from jaxdistill.run.workdir import prepare_workdir
from jaxdistill.tasks import open_task

# ---------------------------------------------------------------------------------- before any work


def test_a_workdir_in_a_bucket_is_refused():
    with pytest.raises(
        UserError,
        match=r"--workdir=gs:/b/x must be a folder of this machine; checkpoints may go to a bucket",
    ):
        prepare_workdir(Path("gs://b/x"), tiny_config())


POWER = {"methods.imagine_flash.shift": "power"}
TABLE = {"methods.imagine_flash.shift": "table"}
NO_DROP = {"teacher.drop_cond": 0.0, "methods.imagine_flash.guidance": 1.0}
BAD = {
    # (changes, words of the message)
    "more features than half the reference holds": (
        {"eval.features": 200, "log.health_samples": 300},
        ("eval.features", "200"),
    ),
    "a split to tune and report on": (
        {"eval.split": "train"},
        ("eval.split", "train", "validation"),
    ),
    "nothing to score": ({"eval.models": ()}, ("eval.models",)),
    "no step count": ({"student.steps": ()}, ("student.steps", "at least")),
    "no width": ({"model.width": 0}, ("model", "width")),
    "no width of the heads": ({"adversarial.width": 0}, ("adversarial.width", "0")),
    "keys of another model": ({"model.name": "unet"}, ("model", "unet", "width")),
    "empty pool of reals": (
        {"adversarial.reals": "teacher", "adversarial.pool": 0},
        ("adversarial.pool", "0"),
    ),
    "guided reference without dropped labels": (
        {**NO_DROP, "teacher.guidance": 1.5},
        ("teacher.guidance", "1.5", "drop_cond"),
    ),
    "guided row without dropped labels": (
        {**NO_DROP, "teacher.guidance": 1.0, "eval.guidances": (1.0, 2.0)},
        ("eval.guidances", "2", "drop_cond"),
    ),
    "guidance that is no number": (
        {"methods.imagine_flash.guidance": float("nan")},
        ("methods.imagine_flash.guidance", "nan"),
    ),
    "weight that is no number": (
        {"methods.imagine_flash.adversarial_weight": float("nan")},
        ("methods.imagine_flash.adversarial_weight", "nan"),
    ),
    # v x̂0 = α x - σ v gives back x_0 only where α² + σ² = 1, flow x̂0 = x - σ u only where α + σ =
    # 1.
    "flow prediction on a variance-preserving schedule": (
        {"prediction": "flow"},
        ("'flow'", "schedule"),
    ),
    "v prediction on the flow schedule": ({"schedule.name": "flow"}, ("'v'", "schedule")),
    "eps with a rescaled discrete schedule": (
        {"prediction": "eps", "schedule.name": "linear", "schedule.zero_terminal_snr": True},
        ("eps", "zero terminal SNR", "'v'"),
    ),
    "unknown student grid": (
        {"student.grid": "spiral"},
        ("student.grid", "'spiral'", "'nested'", "'trailing'"),
    ),
    "unknown teacher grid": (
        {"teacher.grid": "spiral"},
        ("teacher.grid", "'spiral'", "'trailing'"),
    ),
    "more teacher steps than discrete times": (
        {"schedule.name": "linear", "teacher.steps": 2000},
        ("steps", "2000", "1000"),
    ),
    "gamma above T": (
        {
            **TABLE,
            "methods.imagine_flash.shifts.table.times": (0.0, 1.0),
            "methods.imagine_flash.shifts.table.values": (0.1, 1.3),
        },
        ("table", "1.3", "(0, 1]"),
    ),
    "gamma at 0": (
        {
            **TABLE,
            "methods.imagine_flash.shifts.table.times": (0.0, 1.0),
            "methods.imagine_flash.shifts.table.values": (0.0, 0.5),
        },
        ("table", "0.0", "(0, 1]"),
    ),
    "gamma that falls": (
        {
            **TABLE,
            "methods.imagine_flash.shifts.table.times": (0.0, 1.0),
            "methods.imagine_flash.shifts.table.values": (0.9, 0.5),
        },
        ("table", "non-decreasing"),
    ),
    "gamma that turns": (
        {**POWER, "methods.imagine_flash.shifts.power.strength": 0.5},
        ("power", "strength=0.5", "power=3.0"),
    ),
    "discriminator's noise levels": (
        {"adversarial.low": 0.9, "adversarial.high": 0.2},
        ("low=0.9", "high=0.2", "0 <= low < high <= 1"),
    ),
    "last time at 0": ({"student.times": (1.0, 0.5, 0.0)}, ("above 0", "0.0")),
}


@pytest.mark.parametrize("name", BAD)
def test_config_is_refused_before_any_work_with_value_and_mend(name):
    changes, words = BAD[name]
    with pytest.raises(ValueError) as error:
        open_task(tiny_config(**changes))
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize(
    "changes",
    [
        POWER,
        {"methods.imagine_flash.shift": "linear"},
        {"methods.imagine_flash.shift": "none"},
        NO_DROP | {"teacher.guidance": 1.0},
    ],
)
def test_neighbouring_good_config_is_accepted(changes):
    changes = {"eval.guidances": (1.0,)} | changes
    open_task(tiny_config(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"prediction": "flow", "schedule.name": "flow"},
        {"prediction": "eps", "schedule.name": "linear", "model.time_scale": 1.0},
    ],
)
def test_pair_of_prediction_and_schedule_that_fits_is_accepted(changes):
    open_task(tiny_config(**changes))


@pytest.mark.costly
@pytest.mark.parametrize("kind", ["absent", "extractor", "other images", "other schedule"])
def test_given_teacher_that_does_not_fit_is_refused_before_any_work(finished, tmp_path, kind):
    path = tmp_path / "teacher"
    changes = {}
    if kind == "extractor":
        shutil.copytree(finished[0] / "extractor", path)
    elif kind == "other images":
        params, card = checkpoint.load_export(finished[0] / "teacher")
        checkpoint.export(
            path, params, {**card, "data": {**card["data"], "image_shape": [28, 28, 1]}}
        )
    elif kind == "other schedule":
        shutil.copytree(finished[0] / "teacher", path)
        changes = {"schedule.snr_scale": 2.0}
    with pytest.raises(UserError) as error:
        main.run(tiny_config(**{"teacher.path": str(path)}, **changes), tmp_path / "run")
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert not (tmp_path / "run" / "extractor").exists()


def test_second_config_leaves_the_folder_of_the_first_untouched(finished, tmp_path):
    folder = Path(shutil.copytree(finished[0], tmp_path / "run"))
    before = folder_bytes(folder)
    with pytest.raises(UserError) as error:
        main.run(tiny_config(**{"methods.imagine_flash.learning_rate": 0.123, "seed": 9}), folder)
    text = str(error.value)
    assert (
        "\n" not in text
        and str(folder) in text
        and "0.123 here" in text
        and "seed = 0 there, 9 here" in text
        and "workdir" in text
    )
    assert folder_bytes(folder) == before


@pytest.mark.costly
@pytest.mark.parametrize("name", ["teacher", "student", "extractor"])
def test_bit_flipped_in_an_export_of_a_run_stops_the_second_start(finished, tmp_path, name):
    folder = Path(shutil.copytree(finished[0], tmp_path / "run"))
    victim = max(
        (p for p in (folder / name / "params").rglob("*") if p.is_file()),
        key=lambda p: p.stat().st_size,
    )
    flip_bit(victim)
    with pytest.raises(UserError) as error:
        main.run(tiny_config(), folder)
    assert (
        str(victim) in str(error.value)
        and "damaged" in str(error.value)
        and "\n" not in str(error.value)
    )


def test_checkpoint_of_another_model_stops_the_run(finished, tmp_path):
    folder = Path(shutil.copytree(finished[0], tmp_path / "run"))
    for name in ("student", "config.json"):
        (shutil.rmtree if (folder / name).is_dir() else Path.unlink)(folder / name)
    with pytest.raises(UserError) as error:
        main.run(tiny_config(**{"adversarial.width": 24}), folder)
    text = str(error.value)
    assert "\n" not in text and "checkpoints" in text and "student" in text and "workdir" in text
    assert (folder / "teacher" / "card.json").exists() and not (folder / "student").exists()


# -------------------------------------------------------------------------------------- in commands


@pytest.mark.long
def test_command_answers_a_loss_that_is_no_number_in_one_line_and_keeps_what_was_there(
    finished, tmp_path
):
    folder = Path(shutil.copytree(finished[0], tmp_path / "run"))
    shutil.rmtree(folder / "student")
    shutil.rmtree(folder / "checkpoints" / "student")
    (folder / "config.json").unlink()
    before = {
        name: folder_bytes(folder / name)
        for name in ("teacher", "extractor", "checkpoints/teacher")
    }
    found = run_command(
        "jaxdistill.main",
        f"--config={TINY}",
        f"--workdir={folder}",
        "--config.methods.imagine_flash.learning_rate=1e30",
    )
    assert found.returncode > 0, found.stdout
    errors = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert (
        len(errors) == 1
        and found.stderr.endswith(errors[0] + "\n")
        and "Traceback" not in found.stderr
    ), found.stderr
    assert "student step " in errors[0] and "nan" in errors[0] and "learning rate" in errors[0]
    assert not (folder / "student").exists()
    assert {name: folder_bytes(folder / name) for name in before} == before


def test_sample_command_answers_a_flipped_bit_in_one_line_naming_the_file(finished, tmp_path):
    folder = Path(shutil.copytree(finished[0] / "student", tmp_path / "student"))
    victim = max(
        (p for p in (folder / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    flip_bit(victim)
    found = run_command("jaxdistill.sample", f"--model={folder}", f"--out={tmp_path / 'x.png'}")
    assert_one_error_line(found, str(victim), "damaged")
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seed=99999999999999999999999"], ("--seed",)),
        (["--labels=3,-1"], ("--labels", "-1", "0..9")),
        (["--labels="], ("--labels",)),
        (["--guidance=nan"], ("--guidance", "nan")),
        (["--batch_size=0"], ("--batch_size", "at least 1", "0")),
        (["--steps=two"], ("--steps", "two")),
        (["--colour=blue"], ("--colour",)),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_sample_answers_a_bad_flag_in_one_line(finished, tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit) as stopped:
        sample.main([f"--model={finished[0] / 'student'}", f"--out={tmp_path / 'x.npz'}", *flags])
    text = capsys.readouterr().err
    assert (
        stopped.value.code not in (0, None) and text.startswith("error: ") and text.count("\n") == 1
    ), text
    for word in words:
        assert word in text, text
    assert not list(tmp_path.iterdir())


@pytest.mark.costly
@pytest.mark.parametrize(
    "call",
    [
        (
            "from jaxdistill import sample; sample.main(['--model={folder}', '--prompt=a cat',"
            " '--out=x.png'])"
        ),
        (
            "sys.argv = ['main', '--config=configs/sd15.py', '--workdir={folder}/run',"
            " '--config.teacher.folder={folder}']; from jaxdistill import main; main.main()"
        ),
    ],
)
def test_without_the_extra_text_to_image_says_what_to_install(call, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    code = f"import sys; sys.modules['safetensors'] = None; {call.format(folder=tmp_path)}"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert_one_error_line(
        found,
        'safetensors is not installed; run: pip install "jaxdistill[text-to-image]"',
    )
