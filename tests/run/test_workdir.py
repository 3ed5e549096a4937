"""One config a workdir: what may change between two starts, and what is refused."""

import errno
import os

import jax
import pytest
from ml_collections import ConfigDict

from jaxdistill.errors import UserError, cannot_be_used
from jaxdistill.run import compilation
from jaxdistill.run.workdir import prepare_workdir

CONFIG = {"student": {"iterations": 4, "rate": 0.1}, "export": {"dtype": "float32"}}


def start(folder, *, longer=False, **changes):
    config = ConfigDict(CONFIG)
    config.update_from_flattened_dict(changes)
    prepare_workdir(folder, config, longer=longer)
    return config


STARTS = {
    # name: (changes, longer, words of the refusal or none)
    "the same": ({}, False, ""),
    "another export": ({"export.dtype": "float16"}, False, ""),
    "more iterations of one stage": ({"student.iterations": 6}, True, ""),
    "more iterations of several": ({"student.iterations": 6}, False, "divides among stages"),
    "fewer iterations": ({"student.iterations": 2}, True, "student.iterations = 4 there, 2 here"),
    "another rate": ({"student.rate": 0.2}, True, "student.rate = 0.1 there, 0.2 here"),
    "both": ({"student.iterations": 6, "student.rate": 0.2}, True, "student.iterations = 4 there"),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_second_start_goes_on_or_says_what_differs(tmp_path, name):
    changes, longer, words = STARTS[name]
    start(tmp_path)
    if words:
        with pytest.raises(UserError) as failure:
            start(tmp_path, longer=longer, **changes)
        assert words in str(failure.value) and "choose another workdir" in str(failure.value)
        start(tmp_path)  # nothing was written
    else:
        start(tmp_path, longer=longer, **changes)
        with pytest.raises(UserError, match="another config"):
            start(tmp_path, **{**changes, "student.rate": 0.3})


@pytest.mark.parametrize(
    "error", [RuntimeError("Unable to initialize backend 'tpu': no"), AssertionError()]
)
def test_a_device_that_is_not_there_is_one_line(monkeypatch, error):
    def devices():
        raise error

    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(
        UserError, match=r"^JAX_PLATFORMS=tpu: JAX finds no such device here"
    ) as failure:
        compilation.check_devices()
    assert "\n" not in str(failure.value)


def test_a_right_that_is_missing_is_told_with_its_file_and_other_errors_are_not():
    for number in (errno.EACCES, errno.EROFS):
        text = cannot_be_used(OSError(number, os.strerror(number), "a/b.json"))
        assert text and text.startswith("a/b.json cannot be read or written")
    assert cannot_be_used(OSError(errno.ENOTEMPTY, "x", "a")) is None
