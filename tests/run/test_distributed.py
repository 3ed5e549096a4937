"""Several processes as one run: the same results, a dead peer, a stop, what they must agree on."""

import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pod_job
import pytest
from shell import ROOT, quick, wait_until

from jaxdistill.run import distributed, records


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def begin(workdir, i, devices, *command, **variables):
    """One process with so many CPU devices; its output goes to a file."""
    env = quick(
        f"--xla_force_host_platform_device_count={devices}",
        PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}",
        **variables,
    )
    with (workdir.parent / f"log-{workdir.name}-{i}").open("a") as file:
        return subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env=env,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def start(workdir, count, devices=4, **variables):
    """The small training on so many devices of one or several processes."""
    coordinator = (f"127.0.0.1:{free_port()}", count)
    return [
        begin(
            workdir,
            i,
            devices // count,
            "tests/pod_job.py",
            workdir,
            *((*coordinator, i) if count > 1 else ()),
            **variables,
        )
        for i in range(count)
    ]


def log_of(workdir, i):
    return (workdir.parent / f"log-{workdir.name}-{i}").read_text()


def finish(workdir, processes, codes):
    end = time.monotonic() + 240
    for i, process in enumerate(processes):
        assert process.wait(timeout=max(1, end - time.monotonic())) in codes, log_of(workdir, i)[
            -3000:
        ]


def saved(workdir, phase="student"):
    folder = workdir / "checkpoints" / phase
    return (
        sorted(int(p.name) for p in folder.glob("[0-9]*") if p.name.isdigit())
        if folder.exists()
        else []
    )


def losses(workdir):
    return {
        r["step"]: r["loss"]
        for r in records.read_curve(workdir / "curves" / "student.jsonl")
        if "loss" in r
    }


@pytest.mark.long
def test_two_processes_are_one_run_and_survive_each_other(tmp_path):
    """2 x 2 devices against 1 x 4: the same losses and weights; killed, stopped, and gone on with
    by one process.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    finish(one, start(one, 1), {0})

    # A peer is killed: the other ends by itself, and says why.
    processes = start(two, 2)
    wait_until(lambda: saved(two), seconds=120, what="the first checkpoint")
    processes[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    assert processes[0].wait(timeout=90) != 0 and time.monotonic() - began < 60
    assert "another one has died" in log_of(two, 0) or "heartbeat" in log_of(two, 0).lower(), (
        log_of(two, 0)[-2000:]
    )
    assert not (two / "student.npz").exists()

    # Both again; one of them gets SIGTERM: both save at the same step and leave with 0.
    processes = start(two, 2)
    wait_until(
        lambda: "student: resumes" in log_of(two, 0), seconds=120, what="the training to go on"
    )
    processes[1].send_signal(signal.SIGTERM)
    finish(two, processes, {0})
    assert "student stopped by SIGTERM" in log_of(two, 0) and not (two / "student.npz").exists()

    # One process with four devices finishes it.
    finish(two, start(two, 1), {0})
    ours, theirs = losses(two), losses(one)
    assert ours.keys() == theirs.keys() and max(ours) == pod_job.STEPS
    np.testing.assert_allclose(
        [ours[k] for k in sorted(ours)], [theirs[k] for k in sorted(theirs)], rtol=1e-5
    )
    found, expected = np.load(two / "student.npz"), np.load(one / "student.npz")
    for name in expected.files:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5)


@pytest.mark.long
def test_layouts_of_processes_and_devices_train_alike(tmp_path):
    """One process with eight devices against 2 x 4 and 4 x 1: only the order of sums differs.

    What they draw together is the same.
    """
    found, alone = {}, None
    for count, devices in ((1, 8), (2, 8), (4, 4)):
        workdir = tmp_path / f"{count}-{devices}"
        finish(workdir, start(workdir, count, devices, POD_STEPS="10"), {0})
        found[count, devices] = losses(workdir), np.load(workdir / "student.npz")
        drawn = [np.load(workdir / f"drawn-{i}.npz") for i in range(count)]
        made = [set(part["made"].tolist()) for part in drawn]
        assert set().union(*made) == set(range(5)) and max(
            len(part["made"]) for part in drawn
        ) == -(-5 // count)
        alone = drawn[0]["drawn"] if count == 1 else alone
        assert all(np.array_equal(part["drawn"], alone) for part in drawn)
    expected, weights = found.pop((1, 8))
    assert sorted(expected) == [5, 10] and expected[5] != expected[10]
    for ours, theirs in found.values():
        np.testing.assert_allclose([ours[k] for k in expected], list(expected.values()), rtol=1e-6)
        for name in weights.files:
            np.testing.assert_allclose(theirs[name], weights[name], atol=1e-6)


@pytest.mark.long
def test_processes_of_different_configs_do_not_start(tmp_path):
    workdir, coordinator = tmp_path / "run", f"127.0.0.1:{free_port()}"
    flags = (
        "-m",
        "jaxdistill.main",
        "--config=tests/tiny.py",
        f"--workdir={workdir}",
        f"--coordinator={coordinator}",
        "--num_processes=2",
    )
    key = "methods.imagine_flash.learning_rate"
    rates = [f"--config.{key}={rate}" for rate in (0.001, 0.002)]
    finish(
        workdir,
        [begin(workdir, i, 1, *flags, f"--process_id={i}", rates[i]) for i in range(2)],
        {2},
    )
    differs = f"process 1 differs from process 0: config.{key} is 0.002 there, 0.001"
    for i in range(2):
        lines = [line for line in log_of(workdir, i).splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and differs in lines[0]
    assert not workdir.exists()


LATE = """
import os, sys
from pathlib import Path
from jaxdistill.run import distributed
distributed.start(sys.argv[1], 2, int(sys.argv[2]), timeout=60)
listdir, folder, calls = os.listdir, Path(sys.argv[3]), []
if sys.argv[2] == "1":  # a network filesystem that knows nothing of the file at first
    os.listdir = lambda path: calls.append(path) or (listdir(path) if len(calls) > 5 else [])
print("shared", distributed.share_folder(folder), distributed.writes(), flush=True)
assert sys.argv[2] == "1" or not listdir(folder)  # process 0 has taken its file away
distributed.SHARED_SECONDS = 1
if sys.argv[2] == "1":
    os.listdir = lambda path: []
print("shared", distributed.share_folder(folder), distributed.writes(), flush=True)
"""


@pytest.mark.long
def test_a_folder_that_shows_files_late_is_shared_and_all_agree_on_it(tmp_path):
    workdir, coordinator = tmp_path / "run", f"127.0.0.1:{free_port()}"
    workdir.mkdir()
    processes = [begin(workdir, i, 1, "-c", LATE, coordinator, i, workdir) for i in range(2)]
    finish(workdir, processes, {0})
    for i in range(2):
        lines = [line for line in log_of(workdir, i).splitlines() if line.startswith("shared")]
        assert lines == [f"shared True {i == 0}", "shared False True"]


ALONE = """
import sys
from jaxdistill.run import distributed
from jaxdistill.run import cli
distributed.start(sys.argv[1], 2, int(sys.argv[2]), timeout=60)
with distributed.device_errors_are_one_line():
    if sys.argv[2] == sys.argv[3]:
        cli.fail("my own mistake")
    distributed.barrier("the other never comes")
"""


@pytest.mark.long
@pytest.mark.parametrize("mistaken", [0, 1])
def test_a_mistake_of_one_process_ends_both_within_a_minute(tmp_path, mistaken):
    workdir, coordinator = tmp_path / "run", f"127.0.0.1:{free_port()}"
    processes = [begin(workdir, i, 1, "-c", ALONE, coordinator, i, mistaken) for i in range(2)]
    wait_until(
        lambda: "my own mistake" in log_of(workdir, mistaken), seconds=120, what="the mistake"
    )
    began = time.monotonic()
    assert processes[mistaken].wait(timeout=60) == 2
    assert processes[1 - mistaken].wait(timeout=60) not in (0, 2) and time.monotonic() - began < 60


PREPARING = """
import sys, time
from jaxdistill.run import distributed, loop
distributed.start(sys.argv[1], 2, int(sys.argv[2]), timeout=60)
def work():
    try:
        while True:
            print("at work", flush=True)
            time.sleep(0.1)
            assert distributed.everyone(True)
            yield
    finally:
        print("closed", flush=True)
with loop.StopSignal().installed() as stop:
    loop.prepare("short", range(3), stop)
    try:
        loop.prepare("drawing", work(), stop)
    except loop.Stopped as stopped:
        print(stopped, flush=True)
"""


@pytest.mark.long
def test_a_signal_to_one_process_ends_the_preparation_of_all(tmp_path):
    """Both are at work together, and one of them is told to stop: they do after the same block."""
    workdir, coordinator = tmp_path / "run", f"127.0.0.1:{free_port()}"
    processes = [begin(workdir, i, 1, "-c", PREPARING, coordinator, i) for i in range(2)]
    wait_until(lambda: "at work" in log_of(workdir, 0), seconds=120, what="the work")
    processes[1].send_signal(signal.SIGTERM)
    finish(workdir, processes, {0})
    for i in range(2):
        assert "drawing: stopped by SIGTERM; the same command resumes it" in log_of(workdir, i)
    assert log_of(workdir, 0).index("closed") < log_of(workdir, 0).index("drawing: stopped")
    assert log_of(workdir, 0).count("at work") == log_of(workdir, 1).count("at work")


STUCK = """
import sys, time
from jaxdistill.run import distributed, loop
distributed.start(sys.argv[1], 2, int(sys.argv[2]), timeout=60)
distributed.HANG_SECONDS = 3
def work():
    for i in range(9):
        if sys.argv[2] == "1" and i == 4:
            print("stuck", flush=True)
            time.sleep(100)
        assert distributed.everyone(True)
        yield
loop.prepare("drawing", work(), loop.StopSignal())
"""


@pytest.mark.long
def test_a_process_that_hangs_in_the_preparation_ends_all(tmp_path):
    workdir, coordinator = tmp_path / "run", f"127.0.0.1:{free_port()}"
    processes = [begin(workdir, i, 1, "-c", STUCK, coordinator, i) for i in range(2)]
    wait_until(lambda: "stuck" in log_of(workdir, 1), seconds=120, what="the hang")
    began = time.monotonic()
    assert [process.wait(timeout=60) for process in processes] == [
        3,
        3,
    ] and time.monotonic() - began < 40
    assert "no step has ended for 3 s" in log_of(workdir, 0) + log_of(workdir, 1)


HANGING = """
import time
from jaxdistill.run.distributed import Watchdog
dog = Watchdog(2)
time.sleep(4)  # the first step compiles
dog.step()
time.sleep(0.5)
dog.step()
dog.pause()
time.sleep(4)  # a health line
dog.step()
print("armed", flush=True)
time.sleep(60)
"""


@pytest.mark.long
def test_steps_that_do_not_come_any_more_end_the_process(tmp_path):
    process = begin(tmp_path / "run", 0, 1, "-c", HANGING)
    wait_until(lambda: "armed" in log_of(tmp_path / "run", 0), seconds=60, what="the last step")
    began = time.monotonic()
    assert process.wait(timeout=30) == 3 and time.monotonic() - began > 1
    # Ten times the longest step before, half a second.
    assert "no step has ended for 5 s: this process or another one hangs" in log_of(
        tmp_path / "run", 0
    )


def test_too_little_memory_is_no_dead_peer(capsys):
    with pytest.raises(SystemExit) as left, distributed.device_errors_are_one_line():
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm"
        )
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.count("\n") == 1
    assert (
        "too little memory (RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm)" in said
        and "jaxdistill.aot" in said
    )


def test_a_single_processs_other_errors_pass():
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
        distributed.device_errors_are_one_line(),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: mine")


def test_a_coordinator_that_the_environment_names_is_waited_for(monkeypatch):
    for name, value in {
        "JOB_ID": 1,
        "STEP_NODELIST": "localhost",
        "NTASKS": 2,
        "PROCID": 1,
        "LOCALID": 0,
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("JAX_COORDINATOR_PORT", str(free_port()))
    with pytest.raises(
        distributed.DistributedError,
        match=r"the coordinator localhost:\d+ does not answer after 1 s",
    ):
        distributed.start(detect=True, timeout=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("127.0.0.1:1", 2, None), "--process_id is missing"),
        ((None, 2, 0), "--coordinator is missing"),
        (("127.0.0.1:1", 2, 2), r"--process_id=2 must be in 0\.\.1"),
        (("nowhere", 2, 1), "--coordinator=nowhere must have the form HOST:PORT"),
        (
            ("127.0.0.1:1", 2, 1),
            r"the coordinator 127\.0\.0\.1:1 does not answer after 1 s \(Connection refused\)",
        ),
    ],
)
def test_flags_that_cannot_join_are_refused(arguments, message):
    with pytest.raises(distributed.DistributedError, match=message):
        distributed.start(*arguments, timeout=1)


def test_found_and_given_processes_exclude_each_other():
    with pytest.raises(distributed.DistributedError, match="leave out --coordinator"):
        distributed.start("127.0.0.1:1", 2, 1, detect=True)


def test_one_process_needs_nothing():
    distributed.start()
    distributed.barrier("alone")
    distributed.check_same({"a": 1})
    assert distributed.is_main() and distributed.writes() and os.getpid() > 0
