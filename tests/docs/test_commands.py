"""Commands as the documentation has them can be parsed: the program is there, its flags and the
keys of its config are known. `tests/docs_commands.py` runs those of the pages on small input.
"""

import re
import shlex
from pathlib import Path

import docs_commands
import pytest
from paths import ROOT

from jaxdistill import interop
from jaxdistill.errors import UserError
from jaxdistill.run.cli import Command

RESULTS = ROOT / "docs" / "results" / "README.md"
PLACEHOLDERS = {"SEED": "0", "METHOD": "imagine_flash"}
SETTING = r"(?:\w+=\S* )*"
PROGRAM = rf"{SETTING}(?:python (?:-m )?(?:jaxdistill|tests)[./]|launch/)\S+ "


def of_results() -> list[str]:
    """Commands in the table of results."""
    return [
        code for code in re.findall(r"`([^`]+)`", RESULTS.read_text()) if re.match(PROGRAM, code)
    ]


def of_pages() -> list[str]:
    """Those of sh blocks that start a program of ours."""
    found = [
        text
        for page in docs_commands.pages()
        for _, text in docs_commands.lines_of(page.read_text())
    ]
    return [text for text in found if re.match(PROGRAM, text)]


def words_of(command: str) -> list[str]:
    for placeholder, value in PLACEHOLDERS.items():
        command = command.replace(placeholder, value)
    return shlex.split(
        re.sub(SETTING, "", command, count=1).removeprefix("python ").removeprefix("-m ")
    )


def source_of(program: str) -> Path:
    name = program.replace(".", "/") + ".py" if program.startswith("jaxdistill.") else program
    return ROOT / name


def flags_of(source: Path) -> set[str]:
    """What a program takes, read from its code."""
    text = source.read_text()
    if re.search(r"import .*\bCommand\b", text):
        text += (ROOT / "jaxdistill" / "run" / "cli.py").read_text()
    defined = re.findall(r"(?:DEFINE_\w+\(\s*|^    )\"(\w+)\"(?:,|: \()", text, re.MULTILINE)
    if "add_flags(" in text:
        defined += ["as", *(about.get("flag", name) for name, about in interop.FLAGS.items())]
    return {*defined, *re.findall(r"(?:\"|^ {4,}|\| )--([a-z][\w-]*)", text, re.MULTILINE)}


def check(command: str) -> None:
    program, *words = words_of(command)
    source = source_of(program)
    assert source.is_file(), source
    own, run = words, []
    if "--" in words:  # of a launch script, and of the run that it starts
        own, run = words[: words.index("--")], words[words.index("--") + 1 :]
        check(shlex.join(["jaxdistill.main", *run]))
    given = [word for word in own if word.startswith("--config")]
    names = [word.removeprefix("--").partition("=")[0] for word in own if word.startswith("--")]
    unknown = {name for name in names if not name.startswith("config")} - flags_of(source)
    assert not unknown or source.name == "slurm.sh", unknown  # sbatch has them
    if given:
        load(given)


def load(flags: list[str]) -> None:
    """The config with its changes. Raises UserError for a key that it does not have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr("sys.argv", ["command", *flags])
        Command("", workdir=False).parse().given_config()


@pytest.mark.parametrize("command", sorted(set(of_results())))
def test_a_results_command_can_be_parsed(command):
    check(command)


@pytest.mark.parametrize("command", sorted(set(of_pages())))
def test_a_pages_command_can_be_parsed(command):
    check(command)


def test_there_are_commands():
    assert len(of_results()) > 20 and len(of_pages()) > 10


@pytest.mark.parametrize(
    "command",
    [
        "python -m jaxdistill.nothing --config=configs/digits.py",
        "python -m jaxdistill.main --config=configs/digits.py --config.student.steeps=3",
        "python -m jaxdistill.main --config=configs/digit.py --workdir=runs/digits",
        "python -m jaxdistill.sample --model=runs/digits/student --nums=64",
        "launch/local_pod.sh 2 --device=2 -- --config=configs/smoke.py --workdir=runs/pod",
        "launch/local_pod.sh 2 -- --config=configs/smoke.py --workdir=runs/pod --config.sead=1",
    ],
)
def test_a_mistake_is_found(command):
    with pytest.raises((AssertionError, UserError)):
        check(command)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rm -rf runs", "no command that is known"),
        (
            "python -m jaxdistill.main --config=configs/new.py --workdir=runs/new",
            "no rule that makes",
        ),
    ],
)
def test_a_command_without_a_rule_is_told(text, words):
    with pytest.raises(ValueError, match=words):
        docs_commands.small(text)


def test_a_command_is_read_over_its_lines():
    page = "```sh\n# about\npip install . && python -m a \\\n  --b\nc\n```\n\n```text\nd\n```\n"
    assert list(docs_commands.lines_of(page)) == [
        (3, "pip install ."),
        (3, "python -m a --b"),
        (5, "c"),
    ]


def test_every_public_name_is_in_the_reference():
    import jaxdistill as jd

    page = (ROOT / "docs" / "api" / "index.md").read_text()
    links = dict(re.findall(r"\[`(\w+)`\]\[([\w.]+)\]", page))
    assert sorted(links) == jd.__all__
    for name, path in links.items():
        module, _, attribute = path.rpartition(".")
        assert getattr(__import__(module, fromlist=[attribute]), attribute) is getattr(jd, name)
