"""The Python blocks of a page of documentation."""

import re
from typing import Any

from paths import ROOT


def blocks(page: str, section: str = "") -> list[str]:
    """Those of a page, or of its section of this title alone."""
    text = (ROOT / page).read_text()
    if section:
        text = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def executed(sources: list[str]) -> dict[str, Any]:
    """Names after all blocks, one after the other."""
    names: dict[str, Any] = {"__name__": "snippet"}
    for source in sources:
        exec(compile(source, "snippet", "exec"), names)
    return names
