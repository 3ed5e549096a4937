"""Runs before the package is imported: shapes of annotated arguments are checked in every test."""

import gc
import json
import os
import shutil
import sys
import tempfile
from collections import Counter

import quick

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

# Workers, commands and restarts compile the same programs, down to single operations: one cache for
# all, new each time where none is given.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="jax-cache-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ.update(quick.VARIABLES)

# Two workers whose XLA has threads on both cores get in each other's way: each has its own share of
# the cores, as have its commands.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    _worker, _workers = (
        int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")),
        int(os.environ["PYTEST_XDIST_WORKER_COUNT"]),
    )
    _cores = sorted(os.sched_getaffinity(0))[_worker::_workers]
    if _cores:
        os.sched_setaffinity(0, _cores)

import jax
from filelock import FileLock
from hypothesis import settings
from jaxtyping import install_import_hook

jax.devices()  # has read them; commands that want them ask (shell.quick)
for name in quick.VARIABLES:
    os.environ.pop(name, None)

install_import_hook("jaxdistill", "beartype.beartype")
settings.register_profile("tests", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("tests")

import pytest  # noqa: E402

_tried = set()


def pytest_itemcollected(item):
    """Of a costly law the first case is for every run, and the others are long."""
    law = item.parent.nodeid, item.originalname
    if item.get_closest_marker("costly") and law in _tried:
        item.add_marker(pytest.mark.long)
    _tried.add(law)


@pytest.hookimpl(trylast=True)  # of what is left
def pytest_collection_modifyitems(items):
    """Files with the most costly tests first: a worker that begins one of them last leaves the
    other idle. What needs a GPU is skipped where JAX has none.
    """
    if jax.default_backend() != "gpu":
        why = "JAX has no GPU here; with one: JAX_PLATFORMS=cuda,cpu pytest -m gpu -n 0"
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=why))
    costly = Counter(
        item.path
        for item in items
        if item.get_closest_marker("costly") or item.get_closest_marker("long")
    )
    items.sort(key=lambda item: -costly[item.path])


def pytest_collection_finish():
    """What is imported stays: the garbage collector need not walk it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def settled():
    """Nor what JAX keeps of a file's programs: in the last files a walk would take seconds."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """(workdir, results) of one very small run from beginning to end; trained once, each worker has
    a copy.
    """
    import tiny

    from jaxdistill import main

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with FileLock(shared / "finished.lock"):
        if not (shared / "finished" / "results.json").exists():
            main.run(tiny.get_config(), shared / "finished")
    folder = shutil.copytree(shared / "finished", tmp_path_factory.mktemp("copy") / "finished")
    return folder, json.loads((folder / "results.json").read_text())


@pytest.fixture
def call(monkeypatch, capsys):
    """(command, its arguments) -> (exit code, stdout, stderr)."""

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        code = 0
        try:
            module.main()
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return run
