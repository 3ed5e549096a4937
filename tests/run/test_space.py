"""The disk that a cache takes is said before it is made, and must be there."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.run.run import check_space

ROWS = {
    "context": np.zeros((16, 77, 2048), np.float16),
    "pooled": np.zeros((16, 1280), np.float16),
}


def test_the_disk_that_a_cache_takes_is_said_and_must_be_free(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=4 * 10**9))
    check_space(tmp_path / "c", "encoding prompts", ROWS, 10_000)
    line = capsys.readouterr().out
    assert line == f"encoding prompts: 10000 x 318 kB = 3.18 GB in {tmp_path / 'c'}\n"
    with pytest.raises(UserError, match=r"take 6\.36 GB in .*, where 4 GB is free; make room"):
        check_space(tmp_path / "c", "encoding prompts", ROWS, 20_000)
