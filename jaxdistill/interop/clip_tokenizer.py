"""CLIP's tokenizers, as stock pipelines use them."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from jaxdistill.errors import UserError
from jaxdistill.interop.diffusers_folder import FolderError

SHOWN = 3
"""Examples in a line about many prompts."""


class Tokens(NamedTuple):
    """ids int32 [n, l]; mask bool [n, l], False on padding; cut: for each prompt the text that did
    not fit ("" where all did).
    """

    ids: np.ndarray
    mask: np.ndarray
    cut: list[str]


@runtime_checkable
class TextTokenizer(Protocol):
    """A folder's tokenizer, whose texts have `length` tokens."""

    folder: Path
    length: int

    def __call__(self, prompts: Sequence[str], /) -> Tokens:
        """Raises UserError for a prompt that is no text."""


class Tokenizer:
    """A CLIP tokenizer from its folder. `length` is its own, or else the encoder's.

    Raises FolderError where its files cannot be read, or its texts are longer than its encoder
    takes.
    """

    def __init__(self, folder: Path, positions: int) -> None:
        from transformers import CLIPTokenizer

        self.folder = folder
        self._tokenizer = opened(folder, CLIPTokenizer)
        own = self._tokenizer.model_max_length
        if not isinstance(own, int) or own < 3:
            raise FolderError(
                f"{folder / 'tokenizer_config.json'}: model_max_length = {own!r} must be a whole"
                f" number of 3 to {positions}"
            )
        # A folder that says nothing has the library's 1e30.
        self.length = positions if own > 10**9 else own
        if self.length > positions:
            raise FolderError(
                f"{folder / 'tokenizer_config.json'}: model_max_length = {own}, but the text"
                f" encoder has {positions} positions; set it to {positions}"
            )
        added = self._tokenizer.added_tokens_encoder
        self._vectors = {token: _vectors(token, added) for token in added if f"{token}_1" in added}

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Raises UserError for a prompt that is no text."""
        texts = [self._converted(check_text(prompt)) for prompt in prompts]
        return tokens_of(self._tokenizer, texts, self.length)

    def _converted(self, prompt: str) -> str:
        """A textual inversion's token stands for all its vectors, as in diffusers' pipelines."""
        if self._vectors:
            for token in dict.fromkeys(self._tokenizer.tokenize(prompt)):
                if token in self._vectors:
                    prompt = prompt.replace(token, self._vectors[token])
        return prompt


def tokens_of(tokenizer: Any, texts: Sequence[str], length: int) -> Tokens:
    """What the library's tokenizer makes of texts, cut and padded to `length`."""
    whole = tokenizer(texts, truncation=False, verbose=False).input_ids
    # The end token keeps its place: what is cut lies before it.
    lost = [ids[length - 1 : -1] if len(ids) > length else [] for ids in whole]
    cut = [tokenizer.decode(ids) if ids else "" for ids in lost]
    made = tokenizer(texts, padding="max_length", max_length=length, truncation=True)
    shape = (len(texts), length)
    ids = np.asarray(made.input_ids, np.int32).reshape(shape)
    return Tokens(ids, np.asarray(made.attention_mask, bool).reshape(shape), cut)


def opened(folder: Path, kind: Any) -> Any:
    """The library's tokenizer of a class `kind`, tried once. Raises FolderError."""
    try:
        found = kind.from_pretrained(str(folder), local_files_only=True)
        found(["a"], padding="max_length", max_length=3, truncation=True)
    except Exception as error:  # whatever the library raises for a damaged file
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise FolderError(
            f"the tokenizer in {folder} cannot be read ({_damaged(folder)}{reason}); copy the"
            " folder again"
        ) from None
    return found


def _damaged(folder: Path) -> str:
    """The file that the library's exception does not name."""
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return f"{path.name}: "
    return ""


def _vectors(token: str, added: Any) -> str:
    """`token token_1 token_2 ...`, as far as they are there."""

    def names() -> Iterator[str]:
        yield token
        number = 1
        while (name := f"{token}_{number}") in added:
            yield name
            number += 1

    return " ".join(names())


def check_text(prompt: str) -> str:
    """The prompt. Raises UserError for half of a character, which is no text."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        bad = prompt[error.start]
        raise UserError(
            f"the prompt {prompt[:60]!a} has half a character ({ascii(bad)[1:-1]} at"
            f" {error.start}); write it whole, or leave it out"
        ) from None
    return prompt


def say_cut(lost: Mapping[str, str], length: int, *, whose: str = "", more: str = "") -> None:
    """One line on stderr on prompts that are longer than the encoder takes, and what each loses.
    `whose`: the encoders that it is of; `more` ends the line.
    """
    examples = [f"{p[:40]!r}... without {r[:60]!r}" for p, r in list(lost.items())[:SHOWN]]
    many = f"{len(lost)} prompts have" if len(lost) > 1 else "a prompt has"
    others = ", ..." if len(lost) > SHOWN else ""
    print(
        f"warning: {many} more than {length} tokens, and the rest is cut off{whose}:"
        f" {'; '.join(examples)}{others}{more}",
        file=sys.stderr,
    )
