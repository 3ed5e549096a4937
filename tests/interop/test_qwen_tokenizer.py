"""Qwen's tokenizer and chat template against transformers' own, on tokenizers of a few tokens."""

import json
import shutil

import pytest

from jaxdistill.errors import UserError
from jaxdistill.interop.diffusers_folder import FolderError
from jaxdistill.interop.qwen_tokenizer import QwenTokenizer

transformers = pytest.importorskip("transformers")

TEMPLATE = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    "{%- if not enable_thinking %}{{- '<think></think>' }}{%- endif %}"
)
ENDING = "<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = ["a dog", "", "eine Möwe\nam Meer 海 🐦", "a " * 700]


@pytest.fixture(scope="module", params=["jinja", "json"])
def folder(request, tmp_path_factory):
    """A saved tokenizer of single bytes, its template in either of the two places."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    path = tmp_path_factory.mktemp("tokenizer")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate([*bytes_to_unicode().values(), "as", *special])}
    made = transformers.Qwen2Tokenizer(
        vocab=vocab,
        merges=[("a", "s")],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        model_max_length=64,
    )
    made.chat_template = TEMPLATE
    made.save_pretrained(path)
    assert (path / "chat_template.jinja").is_file()
    if request.param == "json":
        (path / "chat_template.jinja").unlink()
        config = path / "tokenizer_config.json"
        settings = json.loads(config.read_text()) | {"chat_template": TEMPLATE}
        config.write_text(json.dumps(settings))
    return path


def test_ids_and_mask_are_the_stock_pipelines(folder):
    ours, theirs = QwenTokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    texts = [
        theirs.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=True,
        )
        for prompt in PROMPTS
    ]
    assert texts[0] == f"<|im_start|>user\na dog{ENDING}"
    wanted = theirs(texts, padding="max_length", max_length=512, truncation=True)
    ids, mask, cut = ours(PROMPTS)
    assert ours.length == 512 and ours.folder == folder
    assert ids.tolist() == wanted.input_ids and mask.astype(int).tolist() == wanted.attention_mask
    # "<|im_start|>user\n" is 6 tokens.
    assert cut[:3] == ["", "", ""] and cut[3] == ("a " * 700)[506:]


def test_where_only_the_templates_ending_is_lost_that_is_said(folder):
    cut = QwenTokenizer(folder)(["b" * 506, "b" * 507, "b" * 400]).cut
    assert cut == [ENDING, "b", ""]


def test_a_folder_that_cannot_be_used_is_named(folder, tmp_path):
    other = tmp_path / "tokenizer"
    shutil.copytree(folder, other)
    (other / "chat_template.jinja").write_text("{% for m in %}")
    with pytest.raises(FolderError, match=r"template of .* does not work \(.*\); copy"):
        QwenTokenizer(other)
    (other / "chat_template.jinja").unlink()
    settings = json.loads((other / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(FolderError, match="has no chat template, neither"):
        QwenTokenizer(other)
    (other / "tokenizer.json").write_text("{")
    with pytest.raises(FolderError, match=r"tokenizer cannot be read \(tokenizer.json: "):
        QwenTokenizer(other)


def test_half_a_character_is_no_prompt(folder):
    with pytest.raises(UserError, match="half a character"):
        QwenTokenizer(folder)(["a \ud83d"])
