"""A workdir knows what its run was made from."""

import json
import os

import pytest

from jaxdistill.errors import UserError
from jaxdistill.run import inputs


def made_from(folder, **values):
    found = {name: inputs.value(value) for name, value in values.items()}
    return found | {"the weights": inputs.files([folder / "w"])}


def check(folder, given):
    records = inputs.check(folder, given)
    inputs.keep(folder, records)
    return {name: record["sha256"] for name, record in records.items()}


@pytest.fixture
def begun(tmp_path):
    (tmp_path / "w").write_bytes(b"abc")
    sums = check(tmp_path, made_from(tmp_path, prompts=["a cat"], config={"a": 1}))
    assert sums.keys() == {"prompts", "config", "the weights"} and len({*sums.values()}) == 3
    return tmp_path, sums


def test_the_same_inputs_are_welcome_and_a_file_is_not_read_twice(begun):
    folder, sums = begun
    given = made_from(folder, prompts=["a cat"], config={"a": 1})

    def read():
        raise AssertionError

    given["the weights"] = given["the weights"]._replace(content=read)
    assert check(folder, given) == sums


def test_a_file_that_is_only_newer_is_read_and_welcome(begun):
    folder, sums = begun
    os.utime(folder / "w", (1, 1))
    assert check(folder, made_from(folder, prompts=["a cat"], config={"a": 1})) == sums
    stamp = json.loads((folder / inputs.FILE).read_text())["the weights"]["stamp"]
    assert stamp == [["w", 3, 10**9]]


CHANGES = {
    "prompts": lambda folder: made_from(folder, prompts=["a dog"], config={"a": 1}),
    "config": lambda folder: made_from(folder, prompts=["a cat"], config={"a": 2}),
    "config, prompts": lambda folder: made_from(folder, prompts=["a dog"], config={"a": 2}),
    "more": lambda folder: made_from(folder, prompts=["a cat"], config={"a": 1}, more=1),
    "the weights": lambda folder: (
        (folder / "w").write_bytes(b"xyz") and made_from(folder, prompts=["a cat"], config={"a": 1})
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_has_changed_is_named_and_nothing_is_forgotten(begun, name):
    folder, _ = begun
    before = (folder / inputs.FILE).read_bytes()
    given = CHANGES[name](folder)
    os.utime(folder / "w", (1, 1))
    if name == "the weights":
        given = made_from(folder, prompts=["a cat"], config={"a": 1})
    with pytest.raises(UserError) as failure:
        check(folder, given)
    text = str(failure.value)
    assert f"changed since it began: {name};" in text and "--workdir" in text and "\n" not in text
    assert (folder / inputs.FILE).read_bytes() == before


def test_a_file_that_cannot_be_read_and_a_damaged_memory_are_named(begun):
    folder, _ = begun
    with pytest.raises(UserError, match=r"gone cannot be read \(No such file"):
        inputs.files([folder / "gone"])
    (folder / inputs.FILE).write_text("{")
    with pytest.raises(UserError, match=r"inputs\.json is damaged"):
        check(folder, {})


def test_a_first_start_that_is_refused_later_leaves_no_memory(tmp_path):
    inputs.check(tmp_path, {"prompts": inputs.value(["a cta"])})
    check(tmp_path, {"prompts": inputs.value(["a cat"])})
