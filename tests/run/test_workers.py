"""Processes that share a machine's cores."""

import os
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
from shell import wait_until

from jaxdistill.run import loop, workers

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system has no core affinity"
)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_the_cores_are_divided_and_given_back(tmp_path, monkeypatch):
    asked, kept = [], os.sched_getaffinity(0)
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda pid: {0, 1, 2, 5, 7})
    monkeypatch.setattr(
        workers.os, "sched_setaffinity", lambda pid, group: asked.append(list(group))
    )
    assert workers.run(python("print('here')"), 2, tmp_path / "logs", loop.StopSignal()) == [0, 0]
    assert asked == [[0, 2, 7], [1, 5], [0, 1, 2, 5, 7]]
    assert [p.name for p in (tmp_path / "logs").iterdir()] == ["process_1.log"]
    assert (tmp_path / "logs" / "process_1.log").read_text() == "here\n"
    monkeypatch.undo()
    assert os.sched_getaffinity(0) == kept


def test_a_process_inherits_its_cores_and_one_more_process_than_cores_has_all(tmp_path):
    mine = workers.cores()
    code = (
        f"import os, pathlib; pathlib.Path(r'{tmp_path}',"
        " str(os.getpid())).write_text(str(sorted(os.sched_getaffinity(0))))"
    )
    assert workers.run(python(code), len(mine) + 1, tmp_path / "logs", loop.StopSignal()) == [0] * (
        len(mine) + 1
    )
    found = sorted(p.read_text() for p in tmp_path.iterdir() if p.is_file())
    assert found == sorted([*(str([core]) for core in mine), str(mine)])


def test_one_that_fails_leaves_the_others_going(tmp_path):
    code = (
        f"import os, sys, time\ntry: os.mkdir(r'{tmp_path / 'first'}')\nexcept OSError:"
        " time.sleep(0.5)\nelse: sys.exit(3)"
    )
    assert sorted(workers.run(python(code), 2, tmp_path / "logs", loop.StopSignal())) == [0, 3]


def test_a_signal_reaches_each_once(tmp_path):
    """A second one would end a process before it has saved."""
    code = f"""
import os, pathlib, signal, time
got = []
signal.signal(signal.SIGTERM, lambda *_: got.append(1))
pathlib.Path(r'{tmp_path}', f'up{{os.getpid()}}').touch()
while not got: time.sleep(0.01)
time.sleep(0.5)
raise SystemExit(10 * len(got))
"""
    stop = loop.StopSignal()

    def send():
        wait_until(lambda: len(list(tmp_path.glob("up*"))) == 2, seconds=30, what="both processes")
        stop.received = "SIGTERM"

    threading.Thread(target=send).start()
    assert workers.run(python(code), 2, tmp_path / "logs", stop) == [10, 10]


def claims(folder):
    """Of one process."""
    return workers.Claims(folder, loop.StopSignal())


def test_processes_leave_each_other_their_tasks_and_take_over_what_is_left(tmp_path):
    one, two, done = claims(tmp_path), claims(tmp_path), []
    begun, leave = threading.Event(), threading.Event()

    def other():
        with one.claim("a") as mine:
            assert mine
            begun.set()
            leave.wait(20)  # and dies without having done it

    def do(name):
        if name not in done:
            done.append(name)
        if name == "b":
            leave.set()

    thread = threading.Thread(target=other)
    thread.start()
    begun.wait(20)
    two.share({name: partial(do, name) for name in "abc"})
    thread.join()
    assert done == ["b", "c", "a"]


def test_a_signal_ends_the_wait_for_another_process(tmp_path):
    one, two = claims(tmp_path), claims(tmp_path)
    two._stop.received = "SIGTERM"
    with (
        one.claim("teacher"),
        pytest.raises(loop.Stopped, match="SIGTERM; the same command resumes it"),
        two.claim("teacher"),
    ):
        pass
    with two.claim("teacher", wait=False) as mine:
        assert mine


def test_a_helper_ends_with_the_process_it_helps(tmp_path):
    child = f"""
import os, pathlib, time
from jaxdistill.run import workers
workers.end_with(os.getppid(), every=0.05)
pathlib.Path(r'{tmp_path}', 'pid').write_text(str(os.getpid()))
time.sleep(60)
"""
    parent = subprocess.Popen(
        python(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])")
    )
    pid = int(
        wait_until(
            lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(),
            seconds=60,
            what="the helper",
        )
    )
    time.sleep(0.3)
    os.kill(pid, 0)  # it is there as long as its parent
    parent.kill()
    parent.wait()

    def gone():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        return "Z" in open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1][:3]

    wait_until(gone, seconds=20, what="the helper's end")
