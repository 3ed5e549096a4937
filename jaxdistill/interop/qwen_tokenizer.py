"""Qwen's tokenizer with its chat template, as Z-Image's stock pipeline uses it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill.interop.clip_tokenizer import Tokens, check_text, opened
from jaxdistill.interop.diffusers_folder import FolderError

LENGTH = 512
"""Tokens that the stock pipeline takes by default, whatever the tokenizer says of itself."""
_STRANGE = "\N{OBJECT REPLACEMENT CHARACTER}"


class QwenTokenizer:
    """A Qwen tokenizer from its folder; a prompt becomes a user's message of its chat template.

    Raises FolderError where its files cannot be read, or there is no template.
    """

    def __init__(self, folder: Path, length: int = LENGTH) -> None:
        self.folder, self.length = folder, length
        self._tokenizer = _opened(folder)
        # A prompt of one strange character: nothing of the template can be mistaken for it.
        self._ending = self._message(_STRANGE).rpartition(_STRANGE)[2]

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Raises UserError for a prompt that is no text."""
        texts = [self._message(check_text(prompt)) for prompt in prompts]
        whole = self._tokenizer(texts, truncation=False, verbose=False).input_ids
        cut = [self._tokenizer.decode(ids[self.length :]) for ids in whole]
        made = self._tokenizer(
            texts,
            padding="max_length",
            max_length=self.length,
            truncation=True,
            padding_side="right",  # positions are relative: pads in front change nothing
        )
        shape = (len(texts), self.length)
        return Tokens(
            np.asarray(made.input_ids, np.int32).reshape(shape),
            np.asarray(made.attention_mask, bool).reshape(shape),
            # Of a prompt that just fits only the template's ending is lost.
            [text.removesuffix(self._ending) or text for text in cut],
        )

    def _message(self, prompt: str) -> str:
        return _message(self._tokenizer, prompt)


def _opened(folder: Path) -> Any:
    """The library's tokenizer, its template tried once. Raises FolderError."""
    from transformers import Qwen2Tokenizer

    found = opened(folder, Qwen2Tokenizer)
    if found.chat_template is None:
        raise FolderError(
            f"the tokenizer in {folder} has no chat template, neither chat_template.jinja nor that"
            " key of tokenizer_config.json; copy the folder again"
        )
    try:
        _message(found, "a")
    except ImportError:  # of jinja2, which is no file's fault
        raise
    except Exception as error:  # whatever a template does
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise FolderError(
            f"the chat template of the tokenizer in {folder} does not work ({reason}); copy the"
            " folder again"
        ) from None
    return found


def _message(tokenizer: Any, prompt: str) -> str:
    """The prompt as a user's message, and the beginning of the answer."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=True,
    )
