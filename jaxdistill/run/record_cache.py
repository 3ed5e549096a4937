"""Arrays computed once and streamed for ever: sharded ArrayRecord files on disk, read in shuffled
batches by Grain.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grain
import numpy as np
from array_record.python import array_record_module

from jaxdistill.errors import UserError
from jaxdistill.run import checkpoint

META = "meta.json"


class CacheError(UserError):
    """A cache that cannot be used, in one line."""


def key_of(*parts: Any) -> str:
    """The name of a cache that depends on JSON values: 12 hex digits of their SHA-256."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _name_of(dtype: np.dtype) -> str:
    """What np.dtype makes it of again; bfloat16's code stands for any two bytes."""
    return dtype.name if dtype.kind == "V" else dtype.str


class Writer:
    """Fills a folder with records, block by block. It appears whole or not at all.

    Whoever closes it before its end keeps what was written: the next one goes on after it, in the
    same blocks.
    """

    def __init__(self, folder: Path, count: int, *, block: int, shard: int = 4096) -> None:
        """Of `count` records, `block` a call of `add` (the last one's may be fewer), at most
        `shard` a file.
        """
        self._folder, self._count, self._shard = folder, count, shard
        self._temporary = folder.with_name(folder.name + ".tmp")
        self._writer: Any = None
        self._held = 0
        self._fields: dict[str, Any] = {}
        self._names: list[str] = []
        self.done = count
        """How many records there are."""
        if (folder / META).is_file():
            return
        self._temporary.mkdir(parents=True, exist_ok=True)
        try:
            known = json.loads((self._temporary / META).read_text())
            self.done, self._fields, self._names = (
                int(known["count"]),
                dict(known["fields"]),
                list(known["files"]),
            )
            if (self.done % block and self.done != count) or not all(
                (self._temporary / name).is_file() for name in self._names
            ):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError):
            shutil.rmtree(self._temporary)
            self._temporary.mkdir()
            self.done, self._fields, self._names = 0, {}, []

    def add(self, values: Mapping[str, np.ndarray]) -> None:
        """Fields [n, ...] of the next records, in all calls with the same shapes and types but for
        the first axis.
        """
        size = len(next(iter(values.values())))
        self._fields = self._fields or {
            name: {"shape": list(v.shape[1:]), "dtype": _name_of(v.dtype)}
            for name, v in sorted(values.items())
        }
        if self._held + size > self._shard:
            self._end_file()
        if self._writer is None:
            self._names.append(f"records-{len(self._names):05d}.array_record")
            self._writer = array_record_module.ArrayRecordWriter(
                str(self._temporary / self._names[-1]), "group_size:1"
            )
        for i in range(size):
            self._writer.write(
                b"".join(np.ascontiguousarray(values[name][i]).tobytes() for name in self._fields)
            )
        self.done, self._held = self.done + size, self._held + size

    def _end_file(self) -> None:
        """What is in the open file counts from now on."""
        if self._writer is not None:
            self._writer.close()
            checkpoint.write_json(
                self._temporary / META,
                {"count": self.done, "fields": self._fields, "files": self._names},
            )
        self._writer, self._held = None, 0

    def close(self) -> None:
        """Keep what was added; the folder appears where that is all."""
        self._end_file()
        if self.done == self._count and self._temporary.exists():
            checkpoint.swap_in(self._temporary, self._folder)


class Cache:
    """A written cache. `cache[i]` is record i as {field: array}."""

    def __init__(self, folder: Path) -> None:
        try:
            meta = json.loads((folder / META).read_text())
            self.fields, files = dict(meta["fields"]), list(meta["files"])
        except (OSError, ValueError, KeyError, TypeError):
            raise CacheError(
                f"{folder} holds an unfinished cache; remove it to make the cache again"
            ) from None
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise CacheError(
                f"{folder / missing[0]} is missing; remove {folder} to make the cache again"
            )
        self.source = grain.sources.ArrayRecordDataSource([str(folder / name) for name in files])
        if len(self.source) != meta["count"]:
            raise CacheError(
                f"{folder} holds {len(self.source)} of {meta['count']} records; remove it to"
                " make the cache again"
            )

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

    def batches(
        self, batch_size: int, seed: int, rows: np.ndarray | None = None
    ) -> Callable[[int], dict[str, np.ndarray]]:
        """An endless shuffled stream: i -> {field: [n, ...]}; batch i is a function of (seed, i).

        `rows` are those of a batch that are read (a process's part); all by default.
        """
        dataset = grain.MapDataset.source(self.source).shuffle(seed=seed).repeat().map(self.parse)
        wanted = range(batch_size) if rows is None else [int(row) for row in rows]

        def batch(i: int) -> dict[str, np.ndarray]:
            items = [dataset[i * batch_size + row] for row in wanted]
            return {name: np.stack([item[name] for item in items]) for name in self.fields}

        return batch
