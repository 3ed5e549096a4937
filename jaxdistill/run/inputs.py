"""What a run is made from, by checksums: a workdir knows them, and refuses to go on with others."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jaxdistill.errors import UserError
from jaxdistill.run import checkpoint, distributed

FILE = "inputs.json"


class Input(NamedTuple):
    """One thing that a run reads.

    stamp: JSON that is cheap to take and changes where the content may have; content: () -> its
    checksum, asked for where the stamp is new.
    """

    stamp: Any
    content: Callable[[], str]


def value(found: Any) -> Input:
    """Of something in memory, as JSON."""
    text = json.dumps(found, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return Input(digest, lambda: digest)


def files(paths: Iterable[Path], content: Callable[[], str] | None = None) -> Input:
    """Of files: sizes and times, and their bytes. Raises UserError for one that cannot be read."""
    paths = [*paths]
    try:
        about = [(path, path.stat()) for path in paths]
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror})") from None
    stamp = [[path.name, stat.st_size, stat.st_mtime_ns] for path, stat in about]
    return Input(stamp, content or partial(hash_files, paths))


def hash_files(paths: Iterable[Path]) -> str:
    """Of their bytes. Raises UserError for one that cannot be read."""
    try:
        return checkpoint.hash_files(paths)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror})") from None


Records = Mapping[str, Mapping[str, Any]]
"""{name: {"stamp", "sha256"}}."""


def check(workdir: Path, inputs: Mapping[str, Input]) -> Records:
    """A run's inputs as its workdir will `keep` them, if they are those that it began with.

    A file of the size and time that it had is not read again. Raises UserError where one has
    changed since, DistributedError where processes have different ones.
    """
    stored = _read(workdir / FILE)
    found = {}
    for name, given in inputs.items():
        stamp = json.loads(json.dumps(given.stamp))
        known = stored.get(name, {})
        same = known.get("stamp") == stamp
        found[name] = {"stamp": stamp, "sha256": known["sha256"] if same else given.content()}
    sums = {name: about["sha256"] for name, about in found.items()}
    distributed.check_same({f"the checksum of {name}": digest for name, digest in sums.items()})
    before = {name: about["sha256"] for name, about in stored.items()}
    changed = [
        name for name in sorted(before.keys() | sums.keys()) if before.get(name) != sums.get(name)
    ]
    if stored and changed:
        raise UserError(
            f"--workdir={workdir} holds a run of other inputs: changed since it began:"
            f" {', '.join(changed)}; put back what was there, or choose another --workdir"
        )
    return found


def unchanged(workdir: Path, name: str, given: Input) -> bool:
    """Whether a workdir's run began with this input, or keeps nothing of that name."""
    known = _read(workdir / FILE).get(name)
    if known is None or known["stamp"] == json.loads(json.dumps(given.stamp)):
        return True
    return bool(known["sha256"] == given.content())


def keep(workdir: Path, records: Records) -> None:
    """Write them beside the run. Not before there is work to lose: a file that a first start has
    refused may be mended.
    """
    if records != _read(workdir / FILE):
        checkpoint.write_json(workdir / FILE, records)


def _read(path: Path) -> dict[str, Any]:
    """What a workdir keeps, {} at its first start. Raises UserError."""
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text())
        return {name: {"stamp": i["stamp"], "sha256": i["sha256"]} for name, i in stored.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged; choose another --workdir") from None
