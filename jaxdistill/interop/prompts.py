"""Files of prompts and captions."""

import codecs
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxdistill.errors import UserError, missing_extra

KEYS = ("prompt", "caption", "text")
"""Under which a row holds its prompt, the first of them that it has, in any case."""

LFS = b"version https://git-lfs.github.com"
"""The beginning of a file that stands for one that git-lfs has not fetched."""

Rows = Iterator[tuple[int, Mapping[str, Any]]]


class PromptError(UserError):
    """A prompt file that cannot be used, in one line."""


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a .txt file (a prompt a line, empty ones left out), or of a .jsonl, .csv, .tsv or
    .parquet file with a prompt under one of KEYS; all but the last also with .gz behind.

    Every row has its prompt under "prompt". Text is UTF-8, or UTF-16 with its mark. Half of a
    character, as cut captions have it, becomes U+FFFD, which is said on stderr.

    Raises PromptError naming the file, and the line that is not such a row.
    """
    path = Path(path).expanduser()
    ending = _ending(path)
    if ending not in READERS:
        raise PromptError(
            f"prompt file {path} must end in .txt (a prompt a line), .jsonl, .csv, .tsv or .parquet"
            f" (rows with {_listed(KEYS, 'or')})"
        )
    found, halves = [], list[str]()
    for number, row in READERS[ending](path):
        whole = {key: _whole(value) for key, value in row.items()}
        if whole != row:
            halves.append(f"line {number}")
        found.append({**whole, "prompt": prompt_of(whole, f"prompt file {path}, line {number}")})
    _say_halves(path, halves)
    if not found:
        raise PromptError(f"prompt file {path} has no prompts; write one per line")
    return found


def prompt_of(row: Mapping[str, Any], where: str) -> str:
    """Raises PromptError for a row without a text under one of KEYS."""
    keys = {str(key).lower(): key for key in row}
    for name in KEYS:
        if name in keys and isinstance(row[keys[name]], str):
            return str(row[keys[name]])
    has = _listed([str(key) for key in row], "and") if row else "nothing"
    raise PromptError(f"{where} has no text under {_listed(KEYS, 'or')}, but {has}")


def _listed(names: Any, word: str) -> str:
    *first, last = [f'"{name}"' for name in names]
    return f"{', '.join(first)} {word} {last}" if first else last


def _ending(path: Path) -> str:
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix if not name.endswith(".parquet.gz") else ""


def mended(captions: Sequence[str], where: str) -> list[str]:
    """Captions that did not come by `read_prompts`, with U+FFFD for halves of characters."""
    found = [str(_whole(caption)) for caption in captions]
    changed = [old for old, new in zip(captions, found, strict=True) if old != new]
    _say_halves(where, [f"the caption {caption[:40]!a}" for caption in changed])
    return found


def _say_halves(path: str | Path, places: Sequence[str]) -> None:
    if places:
        more = f", and {len(places) - 1} more have" if len(places) > 1 else ""
        print(
            f"warning: {path}, {places[0]} has half of a character{more}; it is read as U+FFFD",
            file=sys.stderr,
        )


def _whole(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# ------------------------------------------------------------------------------------------ readers


def _bytes(path: Path) -> bytes:
    """The content. Raises PromptError."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.name.lower().endswith(".gz") else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise PromptError(f"prompt file {path} is damaged ({error}); copy it again") from None
    except OSError as error:
        raise PromptError(f"prompt file {path} cannot be read ({error.strerror})") from None
    if raw.startswith(LFS):
        raise PromptError(f"prompt file {path} is a git-lfs pointer; run: git lfs pull")
    return raw


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines, with their ends. Raises PromptError."""
    raw = _bytes(path)
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            raw = raw.decode("utf-16").encode()
        except UnicodeDecodeError as error:
            raise PromptError(
                f"prompt file {path} is not UTF-16, as its mark says ({error.reason} at byte"
                f" {error.start + 1}); save it as UTF-8"
            ) from None
    for number, line in enumerate(raw.removeprefix(codecs.BOM_UTF8).splitlines(keepends=True), 1):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            bad = f"byte {error.start + 1} is 0x{line[error.start]:02x}"
            raise PromptError(
                f"prompt file {path}, line {number} is not UTF-8 ({bad}); save it as UTF-8"
            ) from None
        if "\0" in text:
            raise PromptError(
                f"prompt file {path}, line {number} has a NUL character, which no text has; save"
                " it as UTF-8"
            )
        yield number, text


def _txt(path: Path) -> Rows:
    for number, line in _lines(path):
        if text := line.strip():
            yield number, {"prompt": text}


def _jsonl(path: Path) -> Rows:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise PromptError(f"prompt file {path}, line {number} is not JSON") from None
        if not isinstance(row, dict):
            raise PromptError(
                f"prompt file {path}, line {number} is no JSON object; write"
                f" {{{_listed(KEYS, 'or')}: ...}}"
            )
        yield number, row


def _csv(path: Path, delimiter: str = ",") -> Rows:
    text = io.StringIO("".join(line for _, line in _lines(path)), newline="")
    rows = csv.DictReader(text, delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        names = [name.strip() for name in rows.fieldnames or ()]
        rows.fieldnames = names
        if not any(name.lower() in KEYS for name in names):
            has = _listed(names, "and") if names else "nothing"
            raise PromptError(
                f"prompt file {path}, line 1 names {has}; one column must be {_listed(KEYS, 'or')}"
            )
        for row in rows:
            if None in row or None in row.values():
                count = len([v for v in row.values() if isinstance(v, str)]) + len(
                    row.get(None, ())
                )
                raise PromptError(
                    f"prompt file {path}, line {rows.line_num} has {count} fields, but line 1 names"
                    f' {len(names)}; put a text with commas in "quotes"'
                )
            yield rows.line_num, row
    except csv.Error as error:
        raise PromptError(
            f"prompt file {path}, line {rows.reader.line_num} is not CSV ({error})"
        ) from None


def _tsv(path: Path) -> Rows:
    return _csv(path, "\t")


def _parquet(path: Path) -> Rows:
    """The columns of texts and numbers; pictures, lists and the like are not read."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise PromptError(missing_extra(error) or str(error)) from None
    plain = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer)
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            names = [field.name for field in schema if any(is_(field.type) for is_ in plain)]
            number = 0
            for batch in file.iter_batches(columns=names or None):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise PromptError(f"prompt file {path} cannot be read ({reason[:200]})") from None


READERS = {".txt": _txt, ".jsonl": _jsonl, ".csv": _csv, ".tsv": _tsv, ".parquet": _parquet}
