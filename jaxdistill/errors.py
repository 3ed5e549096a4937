"""What a user can mend."""

import errno
from collections.abc import Mapping
from typing import Any


class UserError(ValueError):
    """One clear line: the value, what is allowed, the mend. Commands print it and leave with 2."""


class NotFinite(UserError):
    """Values that are no finite numbers, with the component that gives them, in one line."""


def choose(table: Mapping[str, Any], name: str, key: str) -> Any:
    """table[name]; raises ValueError naming the key, the value and what is allowed."""
    if name not in table:
        allowed = ", ".join(map(repr, table))
        raise ValueError(f"{key} = {name!r} is not known; choose one of {allowed}")
    return table[name]


EXTRAS = {
    "tensorflow_datasets": "benchmark",
    "tokenizers": "text-to-image",
    "transformers": "text-to-image",
    "safetensors": "text-to-image",
    "fastapi": "serve",
    "uvicorn": "serve",
    "gcsfs": "tpu",
    "pyarrow": "parquet",
}
"""Module -> the extra that brings it."""


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """What to install for a library that is not there, in one line; None where it is a bug."""
    extra = EXTRAS.get((error.name or "").partition(".")[0])
    if extra is None:
        return None
    return (
        f'{error.name} is not installed; run: pip install "jaxdistill[{extra}]" (".[{extra}]" in a'
        " checkout)"
    )


def cannot_be_used(error: OSError) -> str | None:
    """A file that this user may not read or write, in one line; None where it is another error."""
    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not error.filename:
        return None
    return f"{error.filename} cannot be read or written ({error.strerror}); change its rights"
