"""T5's tokenizer, as stock pipelines use it."""

from collections.abc import Sequence
from pathlib import Path

from jaxdistill.interop.clip_tokenizer import Tokens, check_text, opened, tokens_of
from jaxdistill.interop.diffusers_folder import FolderError
from jaxdistill.interop.torch_weights import check_pointer

FILES = ("tokenizer.json", "spiece.model")
"""One of them is enough."""


class T5Tokenizer:
    """The tokenizer of a folder that holds one of FILES. Its texts have `length` tokens, the end
    among them; a folder's own bound is of no account in stock pipelines.

    Raises FolderError where its files cannot be read.
    """

    def __init__(self, folder: Path, length: int) -> None:
        from transformers import T5Tokenizer as Library

        self.folder, self.length = folder, length
        _check_readable(folder)
        self._tokenizer = opened(folder, Library)

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Raises UserError for a prompt that is no text."""
        return tokens_of(self._tokenizer, [check_text(text) for text in texts], self.length)


def _check_readable(folder: Path) -> None:
    files = [name for name in FILES if (folder / name).is_file()]
    if not files:
        raise FolderError(
            f"{folder} has neither {' nor '.join(FILES)}; copy T5's tokenizer there again"
        )
    for name in files:
        check_pointer(folder / name)
    if files == ["spiece.model"]:
        _check_spiece(folder)


def _check_spiece(folder: Path) -> None:
    """The library asks for tiktoken where a reader is missing or the file is damaged."""
    try:
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2  # noqa: F401
    except Exception as error:  # not there, or protobuf's own where the two do not fit
        raise FolderError(
            f"{folder} has spiece.model and no tokenizer.json; to read it: pip install --upgrade"
            f" sentencepiece protobuf ({str(error).splitlines()[0]})"
        ) from None
    try:
        SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    except (OSError, RuntimeError):
        raise FolderError(
            f"{folder / 'spiece.model'} is no SentencePiece model; copy the folder again"
        ) from None
