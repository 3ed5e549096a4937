"""Are the sentences short? `python tests/prose.py [PAGE ...]`, by default README.md,
CONTRIBUTING.md and all of docs/ but the tables that commands wrote.

No sentence may have more than LONGEST words, and their mean on a page must be below MEAN. Code, an
image and a heading are no prose; inline code, a formula and a number are a word each. What has no
mark at its end (a table's cell, an item of a list) is held to LONGEST only.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parent.parent
LONGEST, MEAN = 30, 18.0

CODE = "\N{OBJECT REPLACEMENT CHARACTER}"
"""Stands for what is one word whatever it holds."""
ABBREVIATIONS = ("e.g.", "i.e.", "cf.", "vs.", "al.", "approx.", "Fig.", "Eq.")
END = re.compile(r"[.!?][\"'”’)\]*]*(?=\s)|[.!?:][\"'”’)\]*]*$")


@dataclass(frozen=True)
class Sentence:
    """`ended`: by a mark."""

    line: int
    text: str
    ended: bool

    @property
    def words(self) -> int:
        return sum(CODE in word or any(map(str.isalnum, word)) for word in self.text.split())


def sentences(page: str) -> Iterator[Sentence]:
    """Those of a page in Markdown."""
    tokens = MarkdownIt("commonmark").enable("table").parse(page)
    line = 1
    for before, token in zip([None, *tokens], tokens, strict=False):
        line = token.map[0] + 1 if token.map else line
        if token.type == "inline" and before is not None and before.type != "heading_open":
            yield from _split(_text(token.children or []), line)


def _text(tokens: list[Token]) -> str:
    """What is read, with the source's line ends."""
    read = {"softbreak": "\n", "hardbreak": "\n", "code_inline": CODE}
    text = "".join(t.content if t.type == "text" else read.get(t.type, "") for t in tokens)
    return re.sub(r"\$\$?[^$\n]+\$\$?", CODE, text)


def _split(text: str, line: int) -> Iterator[Sentence]:
    start = 0
    for end in [found.end() for found in END.finditer(text) if _ends(text, found)] + [len(text)]:
        part = text[start:end]
        if part.strip():
            first = line + text[: start + len(part) - len(part.lstrip())].count("\n")
            yield Sentence(first, " ".join(part.split()), bool(END.search(part.strip())))
        start = end


def _ends(text: str, mark: re.Match[str]) -> bool:
    """Whether a mark ends a sentence: no abbreviation, initial or ellipsis does."""
    word = text[: mark.start() + 1].split()[-1].lstrip("([\"'*")
    after = text[mark.end() :].lstrip()
    initial = re.fullmatch(r"[A-Z]\.", word) is not None
    return not after or not (
        word in ABBREVIATIONS
        or initial
        or (word.endswith(("...", "etc.")) and not after[0].isupper())
    )


def pages() -> list[Path]:
    """What people wrote."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    written = ROOT / "docs" / "results"
    return [page for page in found if page.parent != written or page.name == "README.md"]


def mistakes(name: str, page: str) -> tuple[list[str], str]:
    """(a line each, the page's mean in a line)."""
    found = list(sentences(page))
    lines = [
        f"{name}:{s.line}: {s.words} words: {s.text.replace(CODE, '`...`')}"
        for s in found
        if s.words > LONGEST
    ]
    counts = [s.words for s in found if s.ended and s.words]
    mean = sum(counts) / max(1, len(counts))
    if mean >= MEAN:
        lines.append(f"{name}: a mean of {mean:.1f} words; it must be below {MEAN:g}")
    return lines, f"{mean:5.1f} words a sentence, {len(counts):4} sentences  {name}"


def main() -> None:
    wrong: list[str] = []
    for page in map(Path, sys.argv[1:]) if sys.argv[1:] else pages():
        lines, mean = mistakes(str(page).removeprefix(f"{ROOT}/"), page.read_text())
        print(mean)
        wrong += lines
    print("\n".join(wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
