"""Prompt files, and CLIP's tokenizers."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxdistill.errors import UserError
from jaxdistill.interop.diffusers_folder import FolderError


class PromptError(UserError):
    """A prompt file that cannot be used, in one line."""


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """The prompts of a .txt file (one a line) or a .jsonl file ({"prompt" or "caption", ...} a
    line), empty lines left out.

    Raises PromptError naming the file and the line that is not UTF-8, no JSON object or without a
    prompt, or a file without prompts.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise PromptError(
            f"prompt file {path} must end in .txt (one prompt per line) or .jsonl (one object"
            ' with "prompt" per line)'
        )
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise PromptError(f"prompt file {path} cannot be read ({error.strerror})") from None
    prompts: list[dict[str, Any]] = []
    for number, line in enumerate(raw.split(b"\n"), 1):
        try:
            text = line.decode("utf-8").strip().removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            bad = f"byte {error.start + 1} is 0x{line[error.start]:02x}"
            raise PromptError(
                f"prompt file {path}, line {number} is not UTF-8 ({bad}); save it as UTF-8"
            ) from None
        if not text:
            continue
        if path.suffix == ".txt":
            prompts.append({"prompt": text})
            continue
        try:
            item = json.loads(text)
        except ValueError:
            raise PromptError(f"prompt file {path}, line {number} is not JSON") from None
        found = item.get("prompt", item.get("caption")) if isinstance(item, dict) else None
        if not isinstance(found, str):
            raise PromptError(
                f'prompt file {path}, line {number} has no text under "prompt" or "caption"'
            )
        prompts.append({**item, "prompt": found})
    if not prompts:
        raise PromptError(f"prompt file {path} has no prompts; write one per line")
    return prompts


class Tokens(NamedTuple):
    """ids int32 [n, l]; cut: for each prompt the text that did not fit ("" where all did)."""

    ids: np.ndarray
    cut: list[str]


def load_tokenizer(folder: Path, length: int) -> Callable[[Sequence[str]], Tokens]:
    """A CLIP tokenizer from its folder: prompts -> Tokens of `length`.

    Raises FolderError where its files cannot be read.
    """
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever the library raises for a damaged file
        raise FolderError(
            f"the tokenizer in {folder} cannot be read ({str(error).splitlines()[0]}); copy the"
            " folder again"
        ) from None

    def tokens(prompts: Sequence[str]) -> Tokens:
        whole = [tokenizer(p, truncation=False).input_ids for p in prompts]
        # The end token keeps its place: what is cut lies before it.
        cut = [tokenizer.decode(ids[length - 1 : -1]) if len(ids) > length else "" for ids in whole]
        ids = tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True
        ).input_ids
        return Tokens(np.asarray(ids, np.int32).reshape(len(prompts), length), cut)

    return tokens


def say_cut(prompts: Sequence[str], cut: Sequence[str], length: int) -> None:
    """A line on stderr for each distinct prompt that is longer than the encoder takes."""
    for prompt, rest in dict(zip(prompts, cut, strict=True)).items():
        if rest:
            print(
                f"warning: prompt {prompt[:40]!r}... has more than {length} tokens; this is cut"
                f" off: {rest!r}",
                file=sys.stderr,
            )
