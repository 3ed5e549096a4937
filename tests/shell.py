"""What the tests of files and commands share: the tiny config, and commands as subprocesses."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # configs/ is not installed

import jax  # noqa: E402
import tiny  # noqa: E402
from quick import VARIABLES  # noqa: E402

TINY = Path(tiny.__file__)


def tiny_config(**changes):
    """The tiny config with dotted keys set: tiny_config(**{"method.srl": False})."""
    config = tiny.get_config()
    config.update_from_flattened_dict(changes)
    return config


def environment(**more: str) -> dict[str, str]:
    """For a command: one CPU device, whatever this process was given."""
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    return env | {"JAX_PLATFORMS": "cpu", "MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1"} | more


def quick(*flags: str, **more: str) -> dict[str, str]:
    """`environment` where XLA compiles in half of the time, as in this process; `flags` are XLA's
    own.
    """
    return environment(
        **{**VARIABLES, "XLA_FLAGS": " ".join((VARIABLES["XLA_FLAGS"], *flags))}, **more
    )


def command(module: str, *arguments: object) -> list[str]:
    """`python -m module arguments`."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def run_command(
    module: str, *arguments: object, timeout: float = 200
) -> subprocess.CompletedProcess:
    """Run a command of the package from the repository's root, as a user does."""
    env = environment() if module == "jaxdistill.aot" else quick()
    return subprocess.run(
        command(module, *arguments),
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run_script(code: str, *arguments: object, timeout: float = 200) -> subprocess.CompletedProcess:
    """Run code in a process of its own, in which jaxdistill is never imported (and fails if it
    was).
    """
    guarded = (
        code
        + "\nimport sys\nassert not [m for m in sys.modules if m.split('.')[0] == 'jaxdistill'],"
        " 'imported jaxdistill'\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", guarded, *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert found.returncode == 0, found.stderr
    return found


def assert_one_error_line(found: subprocess.CompletedProcess, *words: str) -> str:
    """Exit code != 0, one line on stderr that starts with "error: " and holds the words, and no
    traceback.
    """
    assert found.returncode != 0, found.stdout
    assert "Traceback" not in found.stderr + found.stdout, found.stderr
    lines = found.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), found.stderr
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


def wait_until(condition, *, seconds: float, what: str):
    """Poll until the condition holds; its value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited {seconds} s for {what}")


def host(tree):
    """The leaves by path, as host arrays; typed keys by their data."""

    def array(leaf):
        return np.asarray(
            jax.random.key_data(leaf)
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else leaf
        )

    return {
        jax.tree_util.keystr(path): array(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_same_bits(a, b) -> None:
    """The two trees hold the same paths, types, shapes and bits."""
    a, b = host(a), host(b)
    assert a.keys() == b.keys()
    for path, x in a.items():
        y = b[path]
        assert (x.dtype, x.shape) == (y.dtype, y.shape), path
        assert x.tobytes() == y.tobytes(), path


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def flip_bit(path: Path, position: int | None = None) -> None:
    """Flip the lowest bit of one byte, the middle one by default."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2 if position is None else position] ^= 1
    path.write_bytes(raw)
