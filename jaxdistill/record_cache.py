"""Arrays computed once and streamed for ever: sharded ArrayRecord files on disk, read in shuffled batches by Grain."""

import hashlib
import json
import shutil
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import grain
import numpy as np
from array_record.python import array_record_module

from jaxdistill import checkpoint

META = "meta.json"


class CacheError(ValueError):
    """A cache that cannot be used, in one line."""


def key_of(*parts: Any) -> str:
    """First 12 hex digits of the SHA-256 of JSON values: the name of a cache that depends on them."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def write(
    folder: Path,
    count: int,
    make: Callable[[int, int], Mapping[str, np.ndarray]],
    *,
    block: int,
    shard: int,
) -> Generator[int, None, None]:
    """Fill `folder` with `count` records; yields their number after each block. It appears whole or not at all.

    Whoever closes the iterator before its end keeps what was written: the next one goes on after it, in the same blocks.

    Args:
      folder: of the cache.
      count: number of records.
      make: (first, last) -> fields [last - first, ...] of these records; all calls with the same shapes and types but for the first axis.
      block: records a call.
      shard: records a file, at most.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        known = json.loads((temporary / META).read_text())
        done, fields, names = int(known["count"]), dict(known["fields"]), list(known["files"])
        if (done % block and done != count) or not all((temporary / name).is_file() for name in names):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        shutil.rmtree(temporary)
        temporary.mkdir()
        done, fields, names = 0, {}, []
    writer: Any = None
    held = 0

    def close() -> None:
        """What is in the open file counts from now on."""
        nonlocal writer, held
        if writer is not None:
            writer.close()
            checkpoint.write_json(temporary / META, {"count": done, "fields": fields, "files": names})
        writer, held = None, 0

    try:
        while done < count:
            size = min(block, count - done)
            values = make(done, done + size)
            fields = fields or {name: {"shape": list(v.shape[1:]), "dtype": v.dtype.str} for name, v in sorted(values.items())}
            if held + size > shard:
                close()
            if writer is None:
                names.append(f"records-{len(names):05d}.array_record")
                writer = array_record_module.ArrayRecordWriter(str(temporary / names[-1]), "group_size:1")
            for i in range(size):
                writer.write(b"".join(np.ascontiguousarray(values[name][i]).tobytes() for name in fields))
            done, held = done + size, held + size
            yield done
    except GeneratorExit:
        close()
        raise
    close()
    checkpoint.write_json(temporary / META, {"count": count, "fields": fields, "files": names})
    checkpoint.swap_in(temporary, folder)


class Cache:
    """A written cache. `cache[i]` is record i as {field: array}."""

    def __init__(self, folder: Path) -> None:
        try:
            meta = json.loads((folder / META).read_text())
            self.fields, files = dict(meta["fields"]), list(meta["files"])
        except (OSError, ValueError, KeyError, TypeError):
            raise CacheError(f"{folder} holds no whole cache; remove it, and it is made again") from None
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise CacheError(f"{folder / missing[0]} is missing; remove {folder}, and it is made again")
        self.source = grain.sources.ArrayRecordDataSource([str(folder / name) for name in files])
        if len(self.source) != meta["count"]:
            raise CacheError(f"{folder} holds {len(self.source)} of {meta['count']} records; remove it, and it is made again")

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return self.parse(self.source[i])

    def parse(self, record: bytes) -> dict[str, np.ndarray]:
        """The fields of one record."""
        found, at = {}, 0
        for name, field in self.fields.items():
            dtype, count = np.dtype(field["dtype"]), int(np.prod(field["shape"]))
            found[name] = np.frombuffer(record, dtype, count, at).reshape(field["shape"])
            at += count * dtype.itemsize
        return found

    def batches(self, batch_size: int, seed: int, rows: np.ndarray | None = None) -> Callable[[int], dict[str, np.ndarray]]:
        """An endless shuffled stream: i -> {field: [n, ...]}; batch i is a function of (seed, i).

        `rows` are those of a batch that are read (a process's part); all by default.
        """
        dataset = grain.MapDataset.source(self.source).shuffle(seed=seed).repeat().map(self.parse)
        wanted = range(batch_size) if rows is None else [int(row) for row in rows]

        def batch(i: int) -> dict[str, np.ndarray]:
            items = [dataset[i * batch_size + row] for row in wanted]
            return {name: np.stack([item[name] for item in items]) for name in self.fields}

        return batch


def writing(
    folder: Path, count: int, make: Callable[[int, int], Mapping[str, np.ndarray]], *, block: int = 16, shard: int = 4096
) -> Generator[int, None, None]:
    """As `write` where the cache is not there, else nothing."""
    if not (folder / META).is_file():
        yield from write(folder, count, make, block=block, shard=shard)


def cached(folder: Path, count: int, make: Callable[[int, int], Mapping[str, np.ndarray]], *, block: int = 16, shard: int = 4096) -> Cache:
    """The cache in `folder`, written first if it is not there. Arguments as of `write`."""
    for _ in writing(folder, count, make, block=block, shard=shard):
        pass
    return Cache(folder)
