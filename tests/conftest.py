"""Runs before the package is imported: shapes of annotated arguments are checked in every test."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

from hypothesis import settings
from jaxtyping import install_import_hook

install_import_hook("jaxdistill", "beartype.beartype")
settings.register_profile("tests", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("tests")

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """(workdir, results) of one very small run from beginning to end."""
    import tiny

    from jaxdistill import main

    folder = tmp_path_factory.mktemp("finished")
    return folder, main.run(tiny.get_config(), folder)
