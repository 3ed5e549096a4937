"""The help of every command fits one screen and has an example whose flags it takes."""

import importlib
import re
import shlex
import subprocess
import sys

import pytest
from paths import ROOT

from jaxdistill.run.cli import Command
from jaxdistill.run.help import Parser

COMMANDS = ("main", "sample", "compare", "benchmark", "ablate", "serve", "aot", "export")
COMMANDS += ("teacher_states",)
COMMANDS = tuple(f"jaxdistill.{name}" for name in (*COMMANDS, "tasks.scenes.measure"))
COMMANDS = (*COMMANDS, "jaxdistill.interop.how_to_sample")
SCRIPTS = ("gke_jobset.py", "local_pod.sh", "slurm.sh", "tpu_vm.sh", "tpu_worker.sh")


class ParsedError(Exception):
    """The flags are good, and nothing was done."""


def examples(text, start):
    """The words of the commands that a help shows, without their "python -m NAME"."""
    lines = re.sub(r" \\\n\s+", " ", text).splitlines()
    return [shlex.split(line.strip()) for line in lines if line.strip().startswith(start)]


def fits(text):
    lines = text.splitlines()
    assert len(lines) <= 40, f"{len(lines)} lines"
    assert max(map(len, lines)) <= 100, max(lines, key=len)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_help_fits_one_screen_and_its_example_parses(name, monkeypatch, capsys):
    module = importlib.import_module(name)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as left:
        module.main()
    text, said = capsys.readouterr()
    assert (left.value.code, said) == (0, "")
    assert text.startswith(f"usage: python -m {name} --")
    fits(text)
    found = examples(text, "python -m jaxdistill.")
    assert found and all(words[2] == name for words in found)

    def parsed(parse):
        def wrapped(*arguments):
            parse(*arguments)
            raise ParsedError

        return wrapped

    monkeypatch.setattr(Command, "parse", parsed(Command.parse))
    monkeypatch.setattr(Parser, "parse_args", parsed(Parser.parse_args))
    for words in found:
        monkeypatch.setattr(sys, "argv", words[2:])
        with pytest.raises(ParsedError):
            module.main()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_says_what_it_is(name, monkeypatch, capsys):
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit):
        module.main()
    flags = re.findall(r"^  (--\w+)(?:=(\S+))?(?: +(.*)|\n +(.*))$", capsys.readouterr()[0], re.M)
    assert flags
    for flag, form, *told in flags:
        assert any(told), f"{flag} has no help"
        assert form == form.upper(), f"{flag}={form}"
        assert not "".join(told).endswith("."), f"{flag} ends in a full stop"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_scripts_help_fits_one_screen_and_has_an_example(name):
    path = ROOT / "launch" / name
    runner = [sys.executable] if path.suffix == ".py" else ["bash"]
    found = subprocess.run([*runner, path, "--help"], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
    fits(found.stdout)
    told = examples(found.stdout, f"launch/{name} ")
    assert told
    for words in told if name != "tpu_worker.sh" else ():
        at = words.index("--") if "--" in words else len(words)
        words.insert(at, "--dry-run")
        done = subprocess.run([*runner, *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "--model and --out are missing; python -m jaxdistill.sample --help shows an example"),
        (["--model=m"], "--out is missing; python -m jaxdistill.sample --help shows an example"),
        (["--stepz=3"], "--stepz=3 is not a flag of this command; did you mean --steps?"),
        (["--zzz"], "--zzz is not a flag of this command; python -m jaxdistill.sample --help"),
        (["--steps=x"], "--steps=x is not a whole number"),
        (["--guidance=x"], "--guidance=x is not a number"),
        (["--grid=x"], "--grid=x is not known; choose one of trailing, leading, linspace"),
        (["--labels=x"], "--labels=x is not a list of class numbers such as 3,7"),
        (["--steps"], "--steps needs a value: --steps=VALUE"),
    ],
)
def test_a_mistake_in_the_flags_is_one_line(given, told, capsys):
    from jaxdistill import sample

    rest = ["--model=m", "--out=o.png"] if given and not given[0].startswith("--model") else []
    with pytest.raises(SystemExit) as left:
        sample.main([*rest, *given])
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.startswith(f"error: {told}") and said.count("\n") == 1
