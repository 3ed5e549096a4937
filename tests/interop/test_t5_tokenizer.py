"""T5's tokenizer gives SentencePiece's ids, from either of its files."""

import shutil
import sys

import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.interop import t5_tokenizer
from jaxdistill.interop.diffusers_folder import FolderError
from jaxdistill.interop.t5_tokenizer import T5Tokenizer

transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")

TEXTS = ["a photo of a dog", "", "  Ein Café,  ﬁne   Ⅷ!\n", "zebra 日本 <extra_id_3> x</s>y"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same tokenizer as spiece.model alone and as tokenizer.json alone."""
    root = tmp_path_factory.mktemp("t5")
    words = "a photo of dog cat red house by the sea fine café painting small boat zebra ein !,.08"
    lines = root / "lines.txt"
    lines.write_text("\n".join(" ".join(words.split()[i : i + 5]) for i in range(12)) * 20)
    old, new = root / "old", root / "new"
    old.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(lines),
        model_prefix=str(old / "spiece"),
        vocab_size=60,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (old / "spiece.vocab").unlink()
    transformers.T5Tokenizer.from_pretrained(old).save_pretrained(new)
    (new / "spiece.model").unlink(missing_ok=True)
    return old, new


def test_ids_are_sentencepieces_then_the_end_then_padding(folders):
    model = sentencepiece.SentencePieceProcessor(model_file=str(folders[0] / "spiece.model"))
    for folder in folders:
        found = T5Tokenizer(folder, 40)(TEXTS)
        assert found.ids.shape == (4, 40) and found.ids.dtype == np.int32
        assert found.cut == [""] * 4
        for text, ids, mask in zip(TEXTS[:3], found.ids, found.mask, strict=False):
            expected = [*model.encode(text), 1]
            assert ids.tolist() == expected + [0] * (40 - len(expected))
            assert mask.tolist() == [True] * len(expected) + [False] * (40 - len(expected))


def test_both_files_give_the_ids_of_the_stock_pipelines_call(folders):
    for length in (8, 40):
        for folder in folders:
            stock = transformers.T5Tokenizer.from_pretrained(folder)(
                TEXTS, padding="max_length", max_length=length, truncation=True
            )
            found = T5Tokenizer(folder, length)(TEXTS)
            np.testing.assert_array_equal(found.ids, stock.input_ids)
            np.testing.assert_array_equal(found.mask, stock.attention_mask)


def test_what_does_not_fit_is_given_back(folders):
    texts = ["a dog by the sea", "a dog by the sea red house"]
    whole = T5Tokenizer(folders[0], 40)(texts)
    length = int(whole.mask[0].sum())
    tokens = T5Tokenizer(folders[0], length)(texts)
    assert tokens.cut == ["", "red house"] and tokens.mask.all()
    np.testing.assert_array_equal(tokens.ids[0], tokens.ids[1])
    np.testing.assert_array_equal(tokens.ids[0], whole.ids[0, :length])


def test_half_a_character_is_refused(folders):
    with pytest.raises(UserError, match="half a character"):
        T5Tokenizer(folders[0], 4)(["a \ud83d"])


def test_spiece_alone_without_its_readers_says_what_to_install(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(FolderError, match="pip install --upgrade sentencepiece protobuf"):
        T5Tokenizer(folders[0], 4)
    T5Tokenizer(folders[1], 4)


@pytest.mark.parametrize("name", t5_tokenizer.FILES)
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "has neither tokenizer.json nor spiece.model"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a git-lfs pointer"),
        (b"{", "cannot be read|is no SentencePiece model"),
    ],
)
def test_a_file_that_is_not_whole_is_one_line(folders, tmp_path, name, content, says):
    root = tmp_path / "tokenizer"
    shutil.copytree(folders[1 - t5_tokenizer.FILES.index(name)], root)
    if content is None:
        (root / name).unlink()
    else:
        (root / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        T5Tokenizer(root, 4)
    assert "\n" not in str(caught.value) and str(root) in str(caught.value)
