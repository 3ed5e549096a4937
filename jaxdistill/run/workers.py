"""Several processes of one command on one machine, each on cores of its own.

XLA's CPU backend gains little from a second core on small networks: two processes with a core each
get through almost twice the work.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax
from filelock import FileLock, Timeout

from jaxdistill.errors import UserError
from jaxdistill.run.loop import StopSignal
from jaxdistill.run.workdir import say


class Claims:
    """Shared work: who does what, among processes that see one folder. A signal that `stop`
    receives ends a wait.
    """

    def __init__(self, folder: Path, stop: StopSignal) -> None:
        self._folder, self._stop = folder, stop

    @contextmanager
    def claim(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """Whether this process has `name` to itself inside the block: at once, or with `wait` as
        soon as no other has it.

        The system ends the claim of a process that dies. Raises Stopped.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        lock, told = FileLock(self._folder / f"{name}.lock"), False
        while not lock.is_locked:
            try:
                lock.acquire(timeout=1.0 if wait else 0.0)
            except Timeout:
                if not wait:
                    yield False
                    return
                self._stop.heed()
                if not told:
                    say(f"{name}: waiting for another process")
                    told = True
        try:
            yield True
        finally:
            lock.release()

    def share(self, tasks: Mapping[str, Callable[[], None]]) -> None:
        """Do the tasks that no other process is at; then all again, to wait for the others and to
        do what they have left. A task that is done does nothing.
        """
        for wait in (False, True):
            for name, task in tasks.items():
                with self.claim(name, wait=wait) as mine:
                    if mine:
                        task()


MOST = 4
"""Processes that are started where nobody says how many: each holds data and programs of its own.
"""


def cores() -> list[int]:
    """The cores that this process may use."""
    return (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(os.cpu_count() or 1))
    )


def count_of(wanted: int) -> int:
    """How many processes --processes asks for. Raises UserError where that cannot be."""
    cpu = jax.default_backend() == "cpu"
    if wanted > 1 and not cpu:
        raise UserError(
            f"--processes = {wanted} shares the cores of a CPU; a {jax.default_backend()} takes one"
            " process: leave it out"
        )
    return wanted or (min(len(cores()), MOST) if cpu else 1)


def run(command: Sequence[str], count: int, logs: Path, stop: StopSignal) -> list[int]:
    """Run `count` processes of a command to their end; their exit codes.

    The cores are divided among them, the i-th and every `count`-th after it. The first writes where
    this process does, the others into logs/process_1.log and so on. A signal that `stop` receives
    is handed on once, as SIGTERM; one of the terminal's does not reach them directly. A process
    that ends by itself leaves the others going.
    """
    mine, started = cores(), list[subprocess.Popen[bytes]]()
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as files:
        try:
            for i in range(count):
                log = files.enter_context((logs / f"process_{i}.log").open("ab")) if i else None
                if hasattr(os, "sched_setaffinity"):
                    os.sched_setaffinity(0, mine[i::count] or mine)  # which a process hands down
                started.append(
                    subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
                )
        finally:
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, mine)
        told = False
        while any(process.poll() is None for process in started):
            if stop.received and not told:
                told = True
                for process in started:
                    process.terminate()
            time.sleep(0.1)
    return [process.wait() for process in started]


def end_with(parent: int, every: float = 1.0) -> None:
    """SIGTERM to this process as soon as `parent` is its parent no longer, so that none outlives
    the command that started it.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(every)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
