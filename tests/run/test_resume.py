"""Killed with SIGKILL in both phases and once with SIGTERM, a run ends in the bits of one that was
never stopped.
"""

import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from paths import ROOT
from shell import quick


def start(workdir):
    command = [
        sys.executable,
        "-m",
        "jaxdistill.main",
        "--config=tests/tiny.py",
        f"--workdir={workdir}",
        "--config.teacher.iterations=120",
        "--config.student.iterations=120",
        "--config.log.checkpoint_every=20",
        "--config.student.health_every=60",
    ]
    environment = quick(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def stop_at_first_new_checkpoint(process, folder, number):
    """Send the signal once a checkpoint newer than those of now is whole."""
    old = set(folder.glob("[0-9]*")) if folder.exists() else set()
    deadline = time.monotonic() + 180
    while not (folder.exists() and {p for p in folder.glob("[0-9]*") if p.name.isdigit()} - old):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.01)
    process.send_signal(number)
    return process.communicate(timeout=180)[0], process.returncode


def leaves(folder, phase):
    steps = sorted(int(p.name) for p in (folder / "checkpoints" / phase).glob("[0-9]*"))
    state = ocp.StandardCheckpointer().restore(
        folder / "checkpoints" / phase / str(steps[-1]) / "state"
    )
    return steps[-1], jax.tree.leaves(state)


@pytest.mark.long
def test_a_stopped_run_ends_in_the_same_bits(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    text, _ = (process := start(whole)).communicate(timeout=300)
    assert process.returncode == 0, text
    stop_at_first_new_checkpoint(start(broken), broken / "checkpoints/teacher", signal.SIGKILL)
    stop_at_first_new_checkpoint(start(broken), broken / "checkpoints/student", signal.SIGKILL)
    text, code = stop_at_first_new_checkpoint(
        start(broken), broken / "checkpoints/student", signal.SIGTERM
    )
    assert (
        code == 0
        and "stopped by SIGTERM and saved at step" in text
        and "the same command resumes it" in text
    )
    assert "student: resumes at step" in text and not (broken / "student").exists()
    text, _ = (process := start(broken)).communicate(timeout=300)
    assert process.returncode == 0 and "student: resumes at step" in text, text
    for phase in ("teacher", "student"):
        (step_a, a), (step_b, b) = leaves(whole, phase), leaves(broken, phase)
        assert step_a == step_b == 120 and len(a) == len(b) > 20
        for x, y in zip(a, b, strict=True):
            x, y = (
                jax.random.key_data(v) if jax.dtypes.issubdtype(v.dtype, jax.dtypes.prng_key) else v
                for v in (x, y)
            )
            np.testing.assert_array_equal(x, y)
