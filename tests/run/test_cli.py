"""What commands with a config share: a mistake is one line and exit code 2, a bug its traceback."""

import json
import re
import sys

import pytest
from shell import TINY, tiny_config

from jaxdistill import ablate, aot, benchmark, main
from jaxdistill.errors import UserError
from jaxdistill.methods.recipe import Recipe, SamplerSpec
from jaxdistill.run import cli
from jaxdistill.run.loop import NonFiniteError, Stopped
from jaxdistill.tasks.estimate import Estimate

ONE_PROCESS = {"benchmark": benchmark, "ablate": ablate, "aot": aot}
PROCESS_FLAGS = {
    "--distributed": "--distributed",
    "--nodistributed": "--distributed",
    "--coordinator=h:1": "--coordinator",
    "--num_processes=2": "--num_processes",
    "-process_id": "--process_id",
}
"""A flag -> as it is named."""


def assert_refused(found, *words):
    code, out, err = found
    assert code == 2 and out == "", found
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err, err


# -------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--config.adversarial.weight=0", "--config.methods.imagine_flash.adversarial_weight=0"),
        (
            "-config.shifts.power.exponent=2",
            "-config.methods.imagine_flash.shifts.power.exponent=2",
        ),
        ("--config.adversarial.width=0", "--config.adversarial.width=0"),
        ("--config.adversarial.weights=0", "--config.adversarial.weights=0"),
        ("config.shifts", "config.shifts"),
    ],
)
def test_keys_that_moved_still_do_and_are_said(old, new, capsys):
    assert cli.renamed(old) == new
    assert bool(capsys.readouterr().err) == (old != new)


def test_a_key_that_moved_sets_what_it_set(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", f"--config={TINY}", "--config.adversarial.weight=0.75"])
    config = cli.Command("x", workdir=False).parse().given_config()
    assert config.methods.imagine_flash.adversarial_weight == 0.75
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("flag", PROCESS_FLAGS)
@pytest.mark.parametrize("name", ONE_PROCESS)
def test_a_command_of_one_process_refuses_the_flags_of_several(call, name, flag, tmp_path):
    found = call(ONE_PROCESS[name], f"--config={TINY}", f"--workdir={tmp_path / 'run'}", flag)
    assert_refused(found, f"error: {PROCESS_FLAGS[flag]}: this command is one process")
    assert not (tmp_path / "run").exists()


def test_a_value_that_is_called_as_such_a_flag_is_a_value(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command", "--workdir", "coordinator", "--config", str(TINY)])
    assert cli.Command("").parse().folder().name == "coordinator"


def test_the_command_of_several_processes_takes_them(monkeypatch):
    flags = ["--coordinator=h:1", "--num_processes=2", "--process_id=1"]
    monkeypatch.setattr(sys, "argv", ["command", *flags])
    found = cli.Command("", processes=True).parse()
    assert (found.coordinator, found.num_processes, found.process_id) == ("h:1", 2, 1)
    assert found.distributed is False


BAD = {
    "unknown key": (["--config.studnt.steps=1"], "config.studnt; did you mean config.student?\n"),
    "unknown key in a block": (
        ["--config.seed=1", "--config.student.stepz=1"],
        "unknown config key: config.student.stepz; did you mean config.student.steps?\n",
    ),
    "a key that is like no other": (
        ["--config.methods.lcm.lr=1"],
        "unknown config key: config.methods.lcm.lr; config.methods.lcm has guidance, huber, ",
    ),
    "a key below a value": (["--config.seed.x=1"], "unknown config key: config.seed.x\n"),
    "unknown flag": (["--wrkdir=x"], "wrkdir"),
    "wrong type": (["--config.seed=a"], "config.seed=a"),
    "no flag": (["runs/x"], "unexpected argument 'runs/x'; flags look like --config="),
    "a width that is another model's": (["--config.model.name=unet"], "unet"),
    "times that rise": (["--config.student.times=(1.0,0.2,0.5)"], "must decrease"),
    "no folder of data": (["--config.data.name=fashion"], "config.data.folder is empty"),
    "a folder without data": (
        ["--config.data.name=fashion", "--config.data.folder=nowhere"],
        "is missing; config.data.folder must hold",
    ),
    "no config of that name": (["--config=configs/nope.py"], "--config cannot be loaded"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_in_a_flag_or_a_value_is_one_line_and_writes_nothing(call, name, tmp_path):
    flags, message = BAD[name]
    found = call(main, f"--config={TINY}", f"--workdir={tmp_path / 'run'}", *flags)
    assert_refused(found, message)
    assert not (tmp_path / "run").exists()


def test_missing_flags_are_named(call, tmp_path):
    assert_refused(
        call(main, f"--config={TINY}"), "--config and --workdir are needed", "--workdir=runs/digits"
    )
    assert_refused(
        call(main, f"--workdir={tmp_path}"), "--config and --workdir are needed", "--config="
    )
    assert_refused(call(aot, "--topology=v4:2x2x2"), "--config is missing")


def test_a_workdir_that_cannot_be_made_is_named(call, tmp_path):
    (tmp_path / "file").write_text("")
    found = call(main, f"--config={TINY}", f"--workdir={tmp_path / 'file' / 'run'}")
    assert_refused(found, "file/run cannot be written", "choose another folder")


@pytest.fixture
def own_config(call, tmp_path):
    """How the command ends with a config file of this text."""

    def run(text):
        (tmp_path / "mine.py").write_text(text)
        return call(main, f"--config={tmp_path / 'mine.py'}", f"--workdir={tmp_path / 'run'}")

    return run


def test_what_a_config_file_refuses_is_one_line(own_config):
    """Without the traceback that the library puts into its message."""
    text = "def get_config():\n    raise ValueError('mine.py:two is not known')\n"
    assert_refused(own_config(text), "error: --config cannot be loaded: mine.py:two is not known\n")
    text = "def get_config():\n    return 1 + 'a'\n"
    assert_refused(own_config(text), "error: --config cannot be loaded: TypeError: unsupported")
    text = "def get_config():\n    return {}['b']\n"
    found = own_config(text)
    assert_refused(found, "error: --config cannot be loaded: KeyError: 'b' (", "mine.py, line 2)")


def test_a_name_after_the_colon_that_the_config_does_not_know_is_one_line(call, tmp_path):
    found = call(main, "--config=configs/digits.py:nope", f"--workdir={tmp_path / 'run'}")
    assert_refused(found, "cannot be loaded: configs/digits.py:nope is not known; choose one of")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("def get_config(:\n", SyntaxError),
        ("def get_config():\n    raise RuntimeError('a bug')\n", RuntimeError),
    ],
)
def test_a_bug_in_a_config_file_keeps_its_traceback(own_config, text, error):
    with pytest.raises(error):
        own_config(text)


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("module", [main, *ONE_PROCESS.values()], ids=lambda m: m.__name__)
def test_help_says_an_example_and_all_flags_and_does_nothing_else(call, module, flag, tmp_path):
    code, out, err = call(module, f"--config={tmp_path / 'nowhere.py'}", flag)
    assert (code, err) == (0, "")
    first, *_ = out.splitlines()
    assert first.startswith(f"usage: python -m {module.__name__} --config=")
    assert f"\n    python -m {module.__name__} --config=configs/" in out
    own = {
        "main": ["coordinator"],
        "benchmark": ["processes"],
        "ablate": ["seeds", "variants", "processes"],
    }
    wanted = own.get(module.__name__.rpartition(".")[2], ["topology", "search"])
    for name in ("config", *wanted):
        assert re.search(rf"\n  --{name}(=\S+)?  ", out)
    assert ("--coordinator" in out) == (module is main)


# ------------------------------------------------------------------------------ mistakes and bugs


class Failing:
    """A task whose work raises."""

    layout, recipe = None, Recipe((), SamplerSpec())

    def __init__(self, error):
        self.error = error

    def execute(self, run):
        raise self.error


@pytest.fixture
def ends_with(call, monkeypatch, tmp_path):
    """How the real command ends where the task's work raises this error."""

    def run(error):
        monkeypatch.setattr(main, "Run", lambda *arguments: None)
        monkeypatch.setattr(main, "open_task", lambda config: Failing(error))
        monkeypatch.setattr(main, "estimate", lambda *arguments: Estimate([], ""))
        return call(main, f"--config={TINY}", f"--workdir={tmp_path / 'run'}")

    return run


@pytest.mark.parametrize("error", [ValueError, TypeError, KeyError, OSError, RuntimeError])
def test_a_bug_in_a_tasks_work_keeps_its_traceback(ends_with, error):
    with pytest.raises(error, match="a bug") as found:
        ends_with(error("a bug"))
    assert "execute" in [entry.name for entry in found.traceback]


def test_a_module_that_no_extra_brings_is_a_bug(ends_with):
    with pytest.raises(ModuleNotFoundError):
        ends_with(ModuleNotFoundError("No module named 'numpi'", name="numpi"))


@pytest.mark.parametrize("error", [UserError, NonFiniteError])
def test_what_a_user_can_mend_is_one_line(ends_with, error):
    assert_refused(ends_with(error("lower the rate")), "error: lower the rate\n")


def test_a_library_of_an_extra_is_one_line_with_the_command_that_brings_it(ends_with):
    error = ModuleNotFoundError("No module named 'tokenizers'", name="tokenizers")
    assert_refused(ends_with(error), 'pip install "jaxdistill[text-to-image]"')


def test_a_stop_is_no_error(ends_with):
    assert ends_with(Stopped("stopped by SIGTERM")) == (0, "stopped by SIGTERM\n", "")


def test_a_value_that_a_task_refuses_when_it_is_made_is_one_line(call, monkeypatch, tmp_path):
    def refuse(config):
        raise ValueError("config.seed must be so")

    monkeypatch.setattr(main, "open_task", refuse)
    found = call(main, f"--config={TINY}", f"--workdir={tmp_path / 'run'}")
    assert_refused(found, "error: config.seed must be so\n")


def test_a_flag_sets_its_key_and_leaves_the_others(monkeypatch, tmp_path):
    flags = ["--config.student.steps=(1,2)", "--config.methods.imagine_flash.srl=False"]
    monkeypatch.setattr(
        sys, "argv", ["command", f"--config={TINY}", f"--workdir={tmp_path}", *flags]
    )
    changes = {"student.steps": (1, 2), "methods.imagine_flash.srl": False}
    found = cli.Command("").parse().given_config()
    assert json.loads(found.to_json()) == json.loads(tiny_config(**changes).to_json())
