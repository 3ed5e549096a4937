"""Several processes as one run: who they are, what they must agree on, and who writes files."""

import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxdistill.errors import UserError

HEARTBEAT_SECONDS = 20
"""A process that has not been heard of for so long is taken for dead, and ends the others."""

_own_folder = False


class DistributedError(UserError):
    """Processes that cannot work together, in one line."""


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    detect: bool = False,
    timeout: int = 300,
) -> None:
    """Join the other processes; must come before any array. Does nothing for a single process.

    Args:
      coordinator: HOST:PORT of process 0.
      processes: their number.
      process: this one's, in 0..processes-1.
      detect: leave the three to JAX: Cloud TPU, GKE, SLURM, Open MPI.
      timeout: seconds to wait for the others.

    Raises:
      DistributedError: flags that do not fit together, or a coordinator that does not answer.
    """
    given = {"--coordinator": coordinator, "--num_processes": processes, "--process_id": process}
    missing = [name for name, value in given.items() if value is None]
    if detect and len(missing) < 3:
        raise DistributedError(
            "--distributed finds the processes itself; leave out --coordinator, --num_processes and"
            " --process_id"
        )
    if not detect and len(missing) == 3:
        return
    options: dict[str, Any] = {
        "initialization_timeout": timeout,
        "heartbeat_timeout_seconds": HEARTBEAT_SECONDS,
    }
    if detect and (gpus := slurm_gpus(os.environ)) is not None:
        options["local_device_ids"] = gpus
    if not detect:
        if missing:
            raise DistributedError(
                f"{missing[0]} is missing; give --coordinator=HOST:PORT, --num_processes and"
                " --process_id together"
            )
        assert coordinator is not None and processes is not None and process is not None
        host, port = _address(coordinator, processes, process)
        if process:
            _wait_for(host, port, timeout)
        options |= {
            "coordinator_address": coordinator,
            "num_processes": processes,
            "process_id": process,
        }
    elif there := _detected(timeout):
        _wait_for(*there, timeout)
    try:
        jax.distributed.initialize(**options)
    except (RuntimeError, ValueError) as error:
        found = f"the coordinator {coordinator}" if coordinator else "the other processes"
        mend = (
            ""
            if coordinator
            else (
                "; outside a TPU pod, GKE or SLURM give --coordinator, --num_processes and"
                " --process_id"
            )
        )
        raise DistributedError(
            f"{found} could not be joined within {timeout} s ({str(error).splitlines()[0]}){mend}"
        ) from None


def slurm_gpus(environ: Mapping[str, str]) -> list[int] | None:
    """Which of the GPUs that it sees a process of SLURM takes: its part of its node's, or all where
    SLURM has bound it to some. None where there are none, or JAX_LOCAL_DEVICE_IDS says it.

    JAX would give each process one, and leave the others idle. Raises DistributedError where the
    parts are not equal.
    """
    count, rank = environ.get("SLURM_GPUS_ON_NODE", ""), environ.get("SLURM_LOCALID", "")
    if not (count.isdigit() and rank.isdigit()) or "JAX_LOCAL_DEVICE_IDS" in environ:
        return None
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    visible = len(listed.split(",")) if listed else int(count)
    tasks: list[int] = []  # of each node, written as 8(x2),4
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        number, _, times = part.rstrip(")").partition("(x")
        tasks += [int(number)] * int(times or 1)
    node = int(environ.get("SLURM_NODEID", "0"))
    share, left = divmod(visible, tasks[node])
    if visible < int(count):
        return list(range(visible))
    if left or not share:
        raise DistributedError(
            f"{tasks[node]} processes of this node cannot have equal parts of its {visible} GPUs;"
            f" start one a GPU (--ntasks-per-node={visible}) or one for all (--ntasks-per-node=1)"
        )
    return list(range(int(rank) * share, (int(rank) + 1) * share))


def _address(coordinator: str, processes: int, process: int) -> tuple[str, int]:
    """Host and port of process 0. Raises DistributedError for flags that cannot be."""
    if not 0 <= process < processes:
        raise DistributedError(
            f"--process_id={process} must be in 0..{processes - 1} (--num_processes={processes})"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise DistributedError(f"--coordinator={coordinator} must have the form HOST:PORT")
    return host, int(port)


def _detected(timeout: int) -> tuple[str, int] | None:
    """Host and port of another process 0 that JAX finds by itself; None where this is process 0 or
    nothing is found.
    """
    try:
        from jax._src.clusters import ClusterEnv  # there is no public way to ask without joining

        address, _, process, _ = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, timeout
        )
    except Exception:  # joining will say what is wrong
        return None
    host, _, port = (os.environ.get("JAX_COORDINATOR_ADDRESS") or address or "").rpartition(":")
    return (host, int(port)) if process and host and port.isdigit() else None


def _wait_for(host: str, port: int, timeout: int) -> None:
    """Until something listens there: JAX's own client ends the process without a word where nothing
    does.
    """
    end, problem = time.monotonic() + timeout, ""
    while time.monotonic() < end:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            problem = error.strerror or str(error)
            time.sleep(0.5)
    raise DistributedError(
        f"the coordinator {host}:{port} does not answer after {timeout} s ({problem}); is process 0"
        " running there?"
    )


def count() -> int:
    """Of the processes."""
    return jax.process_count()


def is_main() -> bool:
    """Whether this process speaks for all."""
    return jax.process_index() == 0


def writes() -> bool:
    """Whether this process writes files: process 0, or each one that has a folder of its own."""
    return is_main() or _own_folder


def barrier(name: str) -> None:
    """Until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def least(value: int) -> int:
    """The smallest of the processes' values, which must all ask."""
    return (
        value
        if jax.process_count() == 1
        else int(np.min(multihost_utils.process_allgather(np.array(value))))
    )


def everyone(holds: bool) -> bool:
    """Whether it holds in all processes, which must all ask."""
    return (
        holds
        if jax.process_count() == 1
        else bool(np.all(multihost_utils.process_allgather(np.array([holds]))))
    )


def divided(count: int, make: Callable[[int], np.ndarray]) -> list[np.ndarray]:
    """[make(0), ..., make(count - 1)], arrays of one shape, each made by one process and then held
    by all, who must all call this.
    """
    return list(
        divided_rows(
            0, count, lambda first, last: {"": np.stack([make(i) for i in range(first, last)])}
        )[""]
    )


def divided_rows(
    first: int, last: int, make: Callable[[int, int], Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """`make(first, last)`, fields [last - first, ...]: each process makes the rows of its part, all
    get all. All must call this.

    The parts are of one size but for the last ones, of which some may be empty; what a row is must
    not depend on its part.
    """
    if jax.process_count() == 1:
        return dict(make(first, last))
    size = -(-(last - first) // jax.process_count())
    begin = min(first + jax.process_index() * size, last - 1)
    # All must gather the same shapes: where rows are missing the last one stands for them, and is
    # cut off again.
    mine = make(begin, min(begin + size, last))
    filled = {name: rows[np.minimum(np.arange(size), len(rows) - 1)] for name, rows in mine.items()}
    return {
        name: np.asarray(rows)[: last - first]
        for name, rows in multihost_utils.process_allgather(filled, tiled=True).items()
    }


SHARED_SECONDS = 10
"""How long a process looks for a file that process 0 has written before its folder counts as
another one: network filesystems show a new file late.
"""


def _appears(path: Path, text: str) -> bool:
    """Whether the file with this text is there, or comes within SHARED_SECONDS."""
    end = time.monotonic() + SHARED_SECONDS
    while True:
        # The listing first: it makes a network filesystem ask again for what it knows as missing.
        listed = path.parent.is_dir() and path.name in os.listdir(path.parent)
        if listed and path.read_text() == text:
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.2)


def share_folder(folder: Path) -> bool:
    """Whether all processes see the same folder, which must exist for process 0.

    Decides who `writes`. Takes SHARED_SECONDS where they do not.
    """
    global _own_folder
    if jax.process_count() == 1:
        return True
    token = folder / ".shared"
    mine = str(time.time_ns()) if is_main() else ""
    stamp = broadcast(mine.encode()).decode()
    if is_main():
        token.write_text(stamp)
    barrier("token written")
    shared = everyone(_appears(token, stamp))
    if is_main():
        token.unlink()
    _own_folder = not shared
    return shared


def broadcast(text: bytes) -> bytes:
    """Process 0's bytes, on all."""
    length = int(multihost_utils.broadcast_one_to_all(np.array(len(text))))
    buffer = np.zeros(length, np.uint8)
    if is_main():
        buffer[:] = np.frombuffer(text, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(buffer), np.uint8).tobytes()


def agreed(numbers: Mapping[str, float]) -> dict[str, float]:
    """Process 0's numbers, on all, to the bit."""
    if jax.process_count() == 1:
        return dict(numbers)
    sent = json.dumps({name: repr(float(value)) for name, value in numbers.items()})
    return {name: float(text) for name, text in json.loads(broadcast(sent.encode())).items()}


def check_same(values: Mapping[str, Any]) -> None:
    """Raise DistributedError on all processes, naming what differs and where, unless all hold the
    same JSON values.
    """
    if jax.process_count() == 1:
        return
    first: dict[str, Any] = json.loads(broadcast(json.dumps(values, sort_keys=True).encode()))
    mine = json.loads(json.dumps(values))
    different = [
        key for key in sorted(first.keys() | mine.keys()) if first.get(key) != mine.get(key)
    ]
    text = (
        f"{different[0]} is {mine.get(different[0])!r} there, {first.get(different[0])!r} in"
        " process 0"
        if different
        else ""
    )
    message = np.zeros(400, np.uint8)
    raw = text.encode()[: len(message)]
    message[: len(raw)] = np.frombuffer(raw, np.uint8)
    for process, found in enumerate(np.asarray(multihost_utils.process_allgather(message))):
        if found.any():
            said = bytes(found[found > 0]).decode(errors="replace")
            raise DistributedError(
                f"process {process} differs from process 0: {said}; start all with the same config"
                " at the same commit"
            )


LEAVE_SECONDS = 10
"""How long a process that leaves for a mistake waits for the others to leave, too."""


def leave(line: str, code: int, *, wait: float = LEAVE_SECONDS) -> NoReturn:
    """One line on stderr and out.

    Where all processes make one mistake they leave together, and after `wait` seconds this one
    alone.

    A plain exit would wait for minutes, and end in an abort.
    """
    print(line, file=sys.stderr, flush=True)
    if not jax.distributed.is_initialized():
        sys.exit(code)
    if wait:
        together = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        together.start()
        together.join(wait)
    sys.stdout.flush()
    os._exit(code)


AGAIN = "start all processes again; they resume at the newest checkpoint"

OWN_FAULTS = ("INVALID_ARGUMENT", "UNIMPLEMENTED", "NOT_FOUND", "FAILED_PRECONDITION")
"""Of the devices' errors those that no other process can cause: the next start would end in the
same way.
"""


@contextmanager
def device_errors_are_one_line() -> Iterator[None]:
    """Leave with one line where the devices raise: too little memory (exit code 2), a peer that has
    died or cannot be reached (3).

    A single process's other errors pass through.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if "RESOURCE_EXHAUSTED" in str(error):
            leave(
                f"error: the devices have too little memory ({said}); make"
                " config.student.batch_size smaller or config.mesh.fsdp larger; python -m"
                " jaxdistill.aot tells in advance what fits a slice",
                2,
            )
        if jax.process_count() == 1:
            raise
        if said.startswith(OWN_FAULTS):
            leave(
                f"error: process {jax.process_index()}: the devices refuse the program ({said})", 2
            )
        leave(
            f"error: process {jax.process_index()} cannot go on: another one has died or cannot be"
            f" reached ({said}); {AGAIN}",
            3,
            wait=0,
        )


HANG_SECONDS = 60
"""Of several processes: no step may take longer, or else ten times the longest so far.

A process that hangs still sends its heartbeat.
"""


class Watchdog:
    """Ends this process with one line where its steps do not come any more.

    Armed once two steps have ended: the first one compiles.
    """

    def __init__(self, limit: float | None = None) -> None:
        """`limit`: seconds, HANG_SECONDS by default."""
        self._limit, self._longest, self._last, self._armed, self._ended = (
            HANG_SECONDS if limit is None else limit,
            0.0,
            0.0,
            False,
            0,
        )
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def step(self) -> None:
        """A step has ended on the devices."""
        now = time.monotonic()
        if self._armed or self._ended == 1:
            self._longest = max(self._longest, now - self._last)
        self._ended += 1
        self._last, self._armed = now, self._ended > 1

    def pause(self) -> None:
        """What comes now may take its time; the next step goes on."""
        self._armed = False

    def close(self) -> None:
        """No step will come."""
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(1.0):
            limit = max(self._limit, 10 * self._longest)
            if self._armed and time.monotonic() - self._last > limit:
                said = (
                    f"error: process {jax.process_index()}: no step has ended for {limit:.0f} s:"
                    " this process or another one hangs"
                )
                print(f"{said}; {AGAIN}", file=sys.stderr, flush=True)
                os._exit(3)


def code_hash() -> str:
    """First 12 hex digits of the SHA-256 of this package's source."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
