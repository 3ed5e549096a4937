"""Files: training checkpoints that resume to the same bits, and exports with checksums."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from jaxdistill.errors import UserError
from jaxdistill.run import distributed

FULL = "the disk is full"
KEPT = 2
"""Checkpoints of a training."""

T = TypeVar("T")


class CheckpointError(UserError):
    """A checkpoint or export that cannot be used, in one line."""


def disk_is_full(error: BaseException) -> bool:
    """Whether a failed write says that there is no space: as the system's error, or as the text
    that Orbax makes of it.
    """
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(
        os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)
    )


def told(error: BaseException) -> str:
    """What an error says, in one line; those of a bucket name the missing right in their second."""
    return " ".join(str(error).split())[:400] or type(error).__name__


def not_written(what: str, error: BaseException, then: str = "") -> CheckpointError:
    """A failed write as the error that says why, and what to do."""
    reason = FULL if disk_is_full(error) else told(error)
    return CheckpointError(
        f"cannot {what} ({reason}); fix this and run the same command again{then}"
    )


def not_opened(name: str, error: BaseException) -> CheckpointError:
    """A bucket that cannot be opened as the error that says why, and what to do."""
    mend = (
        'pip install ".[tpu]"'
        if isinstance(error, ImportError)
        else "check the bucket's name and this machine's rights to it"
    )
    return CheckpointError(f"{name} cannot be opened ({told(error)}); {mend}")


class Checkpoints:
    """Asynchronous Orbax checkpoints of a TrainState with JSON metadata, the newest `keep` kept.

    A manifest of checksums is written beside each finished one: Orbax restores flipped bits without
    a word. A checkpoint that was finished in the very moment of a kill has none, and is taken as it
    is.
    """

    def __init__(self, folder: str | Path, *, keep: int = KEPT) -> None:
        import orbax.checkpoint as ocp  # takes long, and who reads an export needs none of it

        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, create=True
        )
        remote = "://" in str(folder)
        if remote:
            reach(f"{folder}-objects", str(folder), orbax=True)
        try:
            self._manager = ocp.CheckpointManager(
                str(folder) if remote else Path(folder).absolute(), options=options
            )
        except Exception as error:  # a bucket's library has many
            if not remote:
                raise
            raise not_opened(str(folder), error) from None
        self._remote = remote
        self._folder = str(folder) if remote else str(self._manager.directory)
        self._manifests = manifests_of(self._folder)
        self._summing: threading.Thread | None = None

    @property
    def latest(self) -> int | None:
        """The newest whole step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Start saving; returns when the arrays are copied, writes in the background."""
        if step == self.latest:
            return
        import orbax.checkpoint as ocp

        self.wait()
        self._sum()
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(dict(meta))
                ),
            )

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]]:
        """The newest state, placed as the arrays (or ShapeDtypeStructs) of `like`, and its
        metadata.

        Raises CheckpointError where shapes or structure differ from `like`.
        """
        import orbax.checkpoint as ocp

        self._verify()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore()
        )
        try:
            restored = self._manager.restore(self.latest, args=args)
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise CheckpointError(
                f"checkpoint {self.latest} in {self._manager.directory} does not fit this run "
                f"({str(error).splitlines()[0]}); use a new workdir"
            ) from None
        except Exception as error:  # a bucket's library has many
            if not self._remote or isinstance(error, jax.errors.JaxRuntimeError):
                raise
            raise CheckpointError(
                f"checkpoint {self.latest} in {self._folder} cannot be read ({told(error)}); fix"
                " this and run the same command again"
            ) from None
        return restored.state, restored.meta

    def drop(self, first: int) -> None:
        """Remove the checkpoints from this step on. Raises CheckpointError."""
        self.wait()
        with self._writing():
            for step in self._manager.all_steps():
                if step >= first:
                    self._manager.delete(step)

    def wait(self) -> None:
        """Until everything is on disk. Raises CheckpointError where it could not be written."""
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A failed write as one line.

        The checkpoints before it are whole: Orbax renames a finished one into its place, or marks
        it.
        """
        try:
            yield
        except Exception as error:
            # A bucket's library has many. A peer that has died is told elsewhere.
            if not isinstance(error, (OSError, ValueError)) and (
                not self._remote or isinstance(error, jax.errors.JaxRuntimeError)
            ):
                raise
            kept = (
                "starts again from the beginning"
                if self.latest is None
                else f"resumes at step {self.latest}, which is kept"
            )
            raise not_written(f"save in {self._folder}", error, f": it {kept}") from None

    def close(self) -> None:
        """Wait and release the background threads."""
        self.wait()
        self._sum()
        if self._summing is not None:
            self._summing.join()
        with self._writing():
            self._manager.close()

    def _sum(self) -> None:
        """Start writing the manifests of finished checkpoints that have none, and drop those of
        deleted ones.
        """
        if self._summing is not None:
            self._summing.join()
        if not (distributed.is_main() if self._remote else distributed.writes()):
            return
        steps = {str(step) for step in self._manager.all_steps()}

        def work() -> None:
            try:
                self._manifests.keep(steps)
            except Exception as error:  # a bucket's library has many
                if not disk_is_full(error):  # of which the next save tells
                    print(
                        f"warning: {self._folder}: checkpoints have no checksums ({told(error)});"
                        " damage to them will not be noticed",
                        file=sys.stderr,
                        flush=True,
                    )

        self._summing = threading.Thread(target=work, daemon=True)
        self._summing.start()

    def _verify(self) -> None:
        """Raise CheckpointError where a file of the newest checkpoint is not what was saved."""
        step, folder = self.latest, f"{self._folder}/{self.latest}"
        try:
            bad = self._manifests.differing(str(step))
        except Exception as error:  # a bucket's library has many
            raise CheckpointError(
                f"{folder} cannot be compared with its checksums ({told(error)}); fix this and"
                " run the same command again"
            ) from None
        if bad:
            older = sorted(s for s in self._manager.all_steps() if step is not None and s < step)
            back = (
                f"the run then resumes at step {older[-1]}"
                if older
                else "the run then starts again from the beginning"
            )
            name, state = next(iter(bad.items()))
            raise CheckpointError(
                f"{folder}/{name} {state}: it does not match its checksum; remove {folder}: {back}"
            )


REACH_SECONDS = 60
"""A bucket that has not answered for so long is told; its libraries go on for many minutes."""


def store(url: str) -> tuple[Any, str]:
    """The fsspec file system of a path or a URL, and the path in it."""
    import fsspec

    logging.getLogger("gcsfs").setLevel(
        logging.CRITICAL
    )  # what it logs with a traceback it also raises
    return fsspec.core.url_to_fs(url)


def within(work: Callable[[], T]) -> T:
    """`work()`.

    Raises TimeoutError where it takes more than REACH_SECONDS, and leaves it behind.
    """
    found: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    if failed:
        raise failed[0]
    if not found:
        raise TimeoutError(f"no answer within {REACH_SECONDS} s")
    return found[0]


def reach(folder: str, name: str, *, orbax: bool = False) -> None:
    """Write an object in a folder of a bucket and remove it.

    `orbax`: ask for the bucket, too, as Orbax does to remove a checkpoint.

    Raises CheckpointError, which names it `name`: a missing right is told at the start, and not at
    the first or the third save.
    """

    def work() -> None:
        files, path = store(folder)
        if orbax and folder.startswith("gs://"):
            from google.cloud import storage

            retry = storage.retry.DEFAULT_RETRY.with_timeout(REACH_SECONDS / 2)
            storage.Client().get_bucket(path.partition("/")[0], retry=retry)
        files.makedirs(path, exist_ok=True)
        probe = f"{path}/.write-test-{jax.process_index()}"
        files.pipe_file(probe, b"test")
        files.rm_file(probe)

    try:
        within(work)
    except Exception as error:  # a bucket's library has many
        raise not_opened(name, error) from None


class Manifests:
    """Checksums of checkpoints, a JSON file a step in a folder beside theirs, in a file system of
    fsspec.

    `sums`: the path of a checkpoint -> {name of a file in it: what must stay as it is}.
    """

    def __init__(
        self, files: Any, checkpoints: str, folder: str, sums: Callable[[str], Mapping[str, Any]]
    ) -> None:
        self._files, self._checkpoints, self._folder, self._sums = files, checkpoints, folder, sums

    def keep(self, steps: set[str]) -> None:
        """Write the manifests of these checkpoints that have none, and drop those of others."""
        self._files.invalidate_cache()
        self._files.makedirs(self._folder, exist_ok=True)
        known = {
            path.rpartition("/")[2].removesuffix(".json")
            for path in self._files.glob(f"{self._folder}/*.json")
        }
        for step in known - steps:
            self._files.rm_file(f"{self._folder}/{step}.json")
        for step in sorted(steps - known):
            sums = self._sums(f"{self._checkpoints}/{step}")
            put_whole(
                self._files, f"{self._folder}/{step}.json", json.dumps(sums, indent=2).encode()
            )

    def differing(self, step: str) -> dict[str, str]:
        """{name: what is wrong} of the files of a checkpoint that are not as they were; {} where it
        has no manifest.
        """
        self._files.invalidate_cache()
        try:  # `exists` would take a bucket that may not be read for one that has none
            manifest = self._files.cat_file(f"{self._folder}/{step}.json")
        except FileNotFoundError:
            return {}
        found = json.loads(json.dumps(self._sums(f"{self._checkpoints}/{step}")))
        try:
            expected = dict(json.loads(manifest))
        except (ValueError, TypeError):
            expected = dict.fromkeys(
                found
            )  # the manifest itself was hit: every file counts as damaged
        names = sorted(
            name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
        )
        return {name: "is damaged" if name in found else "is missing" for name in names}


def manifests_of(checkpoints: str) -> Manifests:
    """SHA-256 of what is on a disk; of what is in a bucket, whose bytes would have to travel, the
    sums that the store keeps itself.
    """
    files, path = store(checkpoints)
    if "://" in checkpoints:
        return Manifests(files, path, f"{path}-objects", partial(object_sums, files))
    return Manifests(files, path, f"{path}-sha256", lambda folder: _hashes(Path(folder)))


def put_whole(files: Any, path: str, content: bytes) -> None:
    """Write a file of an fsspec file system, so that a reader never sees half of it.

    An object appears whole by itself. To move it would take a request that not every store knows.
    """
    from fsspec.implementations.local import LocalFileSystem

    if isinstance(files, LocalFileSystem):
        files.pipe_file(f"{path}.tmp", content)
        files.mv(f"{path}.tmp", path)
    else:
        files.pipe_file(path, content)


def object_sums(files: Any, folder: str) -> dict[str, dict[str, Any]]:
    """{name: {"size", and the store's own checksum} of each object} below a folder of an fsspec
    file system.

    MD5 before CRC32C: many files of an Orbax checkpoint end in their own CRC32C, so that the
    store's is one number for all of them. A checksum of the bytes where there is one: an ETag also
    changes where nothing but an object's labels did.
    """
    found = {}
    for path, info in files.find(folder, detail=True).items():
        kind = next(
            (kind for kind in ("md5Hash", "crc32c", "etag", "ETag") if info.get(kind)), None
        )
        found[path.removeprefix(folder).lstrip("/")] = {"size": info["size"]} | (
            {kind: info[kind]} if kind else {}
        )
    return found


def write_json(path: Path, value: Any) -> None:
    """Replace the file at once, so that a reader never sees half of it.

    Of many processes one writes.
    """
    if not distributed.writes():
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


def export(folder: str | Path, params: Any, card: Mapping[str, Any]) -> None:
    """Write `folder/params` (plain Orbax, host arrays) and `folder/card.json` with a SHA-256 of
    every file.

    Readable without this package: `orbax.checkpoint.StandardCheckpointer().restore(folder /
    "params")`. The folder appears whole or not at all, and replaces an older export. Of many
    processes one writes.
    """
    if not distributed.writes():
        return
    folder = Path(folder).absolute()
    # Host arrays carry no device topology, so that any machine restores them without a target tree.
    host = jax.tree.map(np.asarray, params)
    with made_whole(folder) as temporary:
        try:
            with _alone() as checkpointer:
                checkpointer.save(temporary / "params", host)
        except ValueError as error:  # Orbax's, of a full disk
            raise not_written(f"write {folder}", error) from None
        leaves = jax.tree.leaves(host)
        parameters = {
            "path": "params",
            "count": int(sum(a.size for a in leaves)),
            "dtype": str(leaves[0].dtype),
        }
        whole = {**card, "parameters": parameters, "sha256": _hashes(temporary)}
        write_json(temporary / "card.json", {**whole, "card_sha256": _card_hash(whole)})


def sign(folder: Path, name: str) -> None:
    """Add a file that was put into an export to its card's checksums."""
    card = json.loads((folder / "card.json").read_text())
    card["sha256"][name] = _hashes(folder)[name]
    write_json(folder / "card.json", {**card, "card_sha256": _card_hash(card)})


def _alone() -> Any:
    """A StandardCheckpointer that does not wait for other processes."""
    import orbax.checkpoint as ocp

    me = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
    )
    return (
        ocp.StandardCheckpointer(multiprocessing_options=options)
        if jax.process_count() > 1
        else ocp.StandardCheckpointer()
    )


def check_space(folder: Path, size: int, what: str) -> None:
    """Raise CheckpointError where a folder's disk has less than `size` bytes for what comes."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise CheckpointError(
            f"{folder} has {free / 1e9:.2f} GB of free disk, but {what} will need"
            f" {size / 1e9:.2f} GB; free some, or choose another folder"
        )


def clear(folder: Path) -> None:
    """Remove a folder of ours, also one that was copied with the modes of read-only files. Does
    nothing where there is none. Raises CheckpointError.
    """
    if not folder.exists():
        return
    try:
        folder.chmod(0o700)
        for root, names, _ in os.walk(folder):
            for path in (Path(root, name) for name in names):
                if not path.is_symlink():
                    path.chmod(0o700)
        shutil.rmtree(folder)
    except OSError as error:
        raise CheckpointError(
            f"{folder} is left from an earlier start and cannot be removed ({error.strerror});"
            " remove it and run the same command again"
        ) from None


@contextlib.contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """A folder to fill, which then takes the place of `folder`; of one that fails nothing is left.

    Raises CheckpointError where it cannot be written.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    clear(temporary)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        swap_in(temporary, folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise not_written(f"write {folder}", error) from None
        raise


def swap_in(temporary: Path, folder: Path) -> None:
    """Put a finished folder in the place of `folder`, which comes back if that fails."""
    older = folder.with_name(folder.name + ".old")
    clear(older)
    if folder.exists():
        os.rename(folder, older)
    try:
        os.replace(temporary, folder)
    except BaseException:
        if older.exists():
            os.rename(older, folder)
        raise
    clear(older)


def tree_hash(tree: Any) -> str:
    """First 12 hex digits of the SHA-256 of all arrays of a tree, in order."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:12]


def hash_files(paths: Iterable[Path]) -> str:
    """First 12 hex digits of the SHA-256 of the files' bytes, in order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:12]


def _card_hash(card: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in card.items() if key != "card_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "card.json")
    found = {}
    for path in files:
        with path.open(
            "rb"
        ) as file:  # in pieces: a file of a checkpoint may be larger than the memory that is left
            found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def load_export(folder: str | Path) -> tuple[Any, dict[str, Any]]:
    """(params as host arrays, card) of an export, after checking every file against its checksum.

    Raises CheckpointError naming the file that is missing or was changed, or the array that is not
    finite.
    """
    folder = Path(folder).absolute()
    if not (folder / "card.json").is_file():
        missing = "it is not a folder" if folder.exists() else "it does not exist"
        why = "it has no card.json" if folder.is_dir() else missing
        raise CheckpointError(
            f"{folder} is not an export: {why}; give the teacher/ or student/ folder of a run's"
            " workdir"
        )
    try:
        card = json.loads((folder / "card.json").read_text())
        if card["card_sha256"] != _card_hash(card):
            raise ValueError
        expected = dict(card["sha256"])
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{folder / 'card.json'} is damaged: it does not match its own checksum; copy the"
            " export again"
        ) from None
    found = _hashes(folder)
    for name in sorted(expected):
        if name not in found:
            raise CheckpointError(f"{folder / name} is missing; copy the export again")
        if found[name] != expected[name]:
            raise CheckpointError(
                f"{folder / name} is damaged: its SHA-256 starts with {found[name][:12]}, the card"
                f" says {expected[name][:12]}; copy the export again"
            )
    params = _read_params(folder / "params")
    if bad := not_finite(params):
        raise CheckpointError(
            f"{folder / 'params'}: {bad} has values that are not finite (NaN or infinite); the"
            " training that wrote it has failed: give another export"
        )
    return params, card


def not_finite(params: Any) -> str:
    """The path of the first array of a tree with a value that is no finite number; "" where there
    is none.
    """
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        if jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact) and not np.isfinite(leaf).all():
            return "/".join(str(getattr(part, "key", part)) for part in path)
    return ""


def _read_params(folder: Path) -> Any:
    """Host arrays of what `export` wrote: by tensorstore, with which Orbax reads, too, and which is
    there in a tenth of the time; by Orbax where there is more than dicts of arrays.
    """
    about = json.loads((folder / "_METADATA").read_text())
    entries = about["tree_metadata"].values()
    arrays = all(
        entry["value_metadata"]["value_type"] == "np.ndarray"
        and all(part["key_type"] == DICT_KEY for part in entry["key_metadata"])
        for entry in entries
    )
    if not (arrays and about.get("use_ocdbt")):
        with _alone() as checkpointer:
            return checkpointer.restore(folder)
    import tensorstore as ts

    driver = "zarr3" if about.get("use_zarr3") else "zarr"
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}
    paths = [tuple(part["key"] for part in entry["key_metadata"]) for entry in entries]
    opened = [
        ts.open({"driver": driver, "kvstore": {**store, "path": f"{'.'.join(path)}/"}}, read=True)
        for path in paths
    ]
    read = [array.result().read() for array in opened]
    found = {path: array.result() for path, array in zip(paths, read, strict=True)}
    return unflatten_dict(found)


DICT_KEY = 2
"""Orbax's number of a key of a dict."""
