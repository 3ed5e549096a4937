"""Hooks of `mkdocs build`: README.md is the home page, and pages stay what they are on GitHub."""

import logging
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
LOG = logging.getLogger("mkdocs.hooks")
ELSEWHERE = re.compile(r"^(https?:|mailto:|#)")
ITEM = re.compile(r"^([-*+]|\d+\.) ")


def on_files(files: Any, *, config: Any) -> Any:
    """Add the home page."""
    text = at_home((ROOT / "README.md").read_text())
    files.append(File.generated(config, "index.md", content=text))
    return files


def at_home(readme: str) -> str:
    """README.md as a page of the docs: links into docs/ begin there. Of a link to another file of
    the repository the text stays: the site has only the docs.
    """

    def link(found: re.Match[str]) -> str:
        text, target = found.groups()
        if ELSEWHERE.match(target):
            return found[0]
        folder = ROOT / target
        if folder.is_dir() and (folder / "README.md").is_file():  # as GitHub shows a folder
            target = f"{target.rstrip('/')}/README.md"
        return f"[{text}]({target})" if target.startswith("docs/") else text

    readme = re.sub(
        r"(?<!\!)\[([^\[\]]*(?:!\[[^\]]*\]\([^)]*\))?[^\[\]]*)\]\(([^)\s]+)\)", link, readme
    )
    return re.sub(r"(\]\(|(?:src|srcset|href)=\")docs/", r"\1", readme)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """README.md is the page index.md. Warn of a list or a table that GitHub shows and this site
    would not: one that follows a paragraph without an empty line.
    """
    fenced, before = False, ""
    for number, line in enumerate(markdown.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        begins = ITEM.match(line) or line.startswith("|")
        goes_on = ITEM.match(before) or before.startswith(("|", " "))
        if begins and before.strip() and not goes_on and not fenced:
            LOG.warning(f"{page.file.src_uri}:{number}: an empty line must stand before {line!r}")
        before = line
    depth = page.file.src_uri.count("/")
    return re.sub(rf"\]\({'../' * (depth + 1)}README\.md", f"]({'../' * depth}index.md", markdown)
