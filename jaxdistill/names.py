"""Names in configs and cards, and what they stand for."""

from collections.abc import Mapping
from typing import Any


def choose(table: Mapping[str, Any], name: str, key: str) -> Any:
    """table[name]; raises ValueError naming the key, the value and what is allowed."""
    if name not in table:
        allowed = ", ".join(map(repr, table))
        raise ValueError(f"{key} = {name!r} is not known; choose one of {allowed}")
    return table[name]
