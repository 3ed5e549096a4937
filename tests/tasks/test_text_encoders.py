"""Prompts become what stock pipelines make of them, whatever the tokenizers and encoders say of
themselves.
"""

import json
import shutil

import numpy as np
import pytest

pytest.importorskip("diffusers")
import folders
import text_config
import torch

from jaxdistill.errors import UserError
from jaxdistill.interop import Beside, single_file
from jaxdistill.interop.clip_tokenizer import Tokenizer
from jaxdistill.interop.diffusers_folder import FolderError
from jaxdistill.tasks.text_to_image import pipeline
from jaxdistill.tasks.text_to_image.setup import TextSetup, open_teacher

PROMPTS = ["a cat at a dog", "a photo of <toy>, and <Toy>_1 <one>", "cat " * 90, ""]
NEGATIVE = "photo <toy>"


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def added(folder, name):
    """A textual inversion of three vectors, as diffusers leaves it, and a word of its own."""
    pipe = folders.load_torch(folder)
    end = name.removeprefix("tokenizer")
    tokenizer, encoder = getattr(pipe, name), getattr(pipe, f"text_encoder{end}")
    seeds = torch.Generator().manual_seed(1)
    vectors = torch.randn(3, encoder.config.hidden_size, generator=seeds)
    pipe.load_textual_inversion({"<toy>": vectors}, tokenizer=tokenizer, text_encoder=encoder)
    tokenizer.add_tokens(["<one>"])
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tokenizer.save_pretrained(folder / name)
    encoder.save_pretrained(folder / f"text_encoder{end}")


def both(folder, change):
    for name in ("tokenizer", "tokenizer_2"):
        if (folder / name).is_dir():
            change(folder, name)


def short(folder, name):
    edit(folder / name / "tokenizer_config.json", model_max_length=20)


def more_positions(folder, name):
    """Positions that no text of the tokenizer's length reaches, as LongCLIP's."""
    where = folder / f"text_encoder{name.removeprefix('tokenizer')}"
    encoder = type(getattr(folders.load_torch(folder), where.name))
    config = encoder.config_class.from_pretrained(where)
    config.max_position_embeddings = 248
    torch.manual_seed(0)
    encoder(config).save_pretrained(where)


def masked(folder, name):
    del name
    for where in folder.glob("text_encoder*"):
        edit(where / "config.json", use_attention_mask=True)


def old_end(folder, name):
    del name
    for where in folder.glob("text_encoder*"):
        edit(where / "config.json", eos_token_id=2)


def padded(folder, name):
    edit(folder / name / "tokenizer_config.json", pad_token="!")


CASES = {
    "plain": (),
    "other words": (added, padded),
    "other lengths": (more_positions, short, masked, old_end),
}


def made(tmp_path, variant, case):
    folder = tmp_path / variant
    shutil.copytree(folders.folder(variant), folder)
    for change in CASES[case]:
        both(folder, change)
    return folder


def check(folder, clip_skip=0):
    """Prompts, a negative prompt and the pipeline's own against diffusers."""
    opened = single_file.open_checkpoint(folder, Beside(clip_skip=clip_skip))
    ours, stock = pipeline.TextEncoders(opened), folders.load_torch(folder)
    # Under its older name, which diffusers' clip_skip asks for.
    object.__setattr__(stock.text_encoder, "text_model", stock.text_encoder)
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    for negative in (NEGATIVE, None):
        theirs = stock.encode_prompt(
            PROMPTS,
            negative_prompt=None if negative is None else [negative] * len(PROMPTS),
            clip_skip=clip_skip or None,
            **options,
        )
        names = ("context", "context", "pooled", "pooled")[: len(theirs)]
        for i, (name, expected) in enumerate(zip(names, theirs, strict=True)):
            found = ours.negative(negative) if i % 2 else ours(PROMPTS)
            expected = expected[:1] if i % 2 else expected
            np.testing.assert_allclose(found[name], expected.numpy(), atol=1e-4)


@pytest.mark.costly
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", ["sd", "sdxl"])
def test_prompts_are_encoded_as_diffusers_does(variant, case, tmp_path):
    check(made(tmp_path, variant, case))


@pytest.mark.parametrize("variant", ["sd2", "freshxl"])
def test_clip_skip_is_diffusers(variant):
    check(folders.folder(variant), clip_skip=1)


def test_a_clip_skip_that_leaves_no_layer_is_refused():
    opened = single_file.open_checkpoint(folders.folder("sd"), Beside(clip_skip=2))
    with pytest.raises(ValueError, match=r"clip_skip must be in 0\.\.1, got 2"):
        pipeline.TextEncoders(opened)


def test_a_runs_texts_have_the_tokenizers_length(tmp_path):
    folder = made(tmp_path, "sd", "plain")
    short(folder, "tokenizer")
    config = text_config.get_config()
    config.teacher.update({"folder": str(folder), "clip_skip": 1})
    opened = open_teacher(config)
    assert TextSetup(config, opened).cond_shapes(2)["context"].shape == (2, 20, 16)
    assert opened.clip_skip == 1


# ---------------------------------------------------------------------------------------- bad input


def test_texts_longer_than_an_encoder_takes_are_refused(tmp_path):
    folder = made(tmp_path, "sd", "plain")
    edit(folder / "tokenizer" / "tokenizer_config.json", model_max_length=248)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")  # not read before
    with pytest.raises(FolderError, match=r"model_max_length = 248, but .* has 77 positions"):
        pipeline.load(folder)


def test_two_tokenizers_of_different_lengths_are_refused_as_diffusers_does(tmp_path):
    folder = made(tmp_path, "sdxl", "plain")
    short(folder, "tokenizer_2")
    with pytest.raises(FolderError, match=r"tokenizer_2 gives texts of 20 tokens, but .* of 77"):
        pipeline.load(folder)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        folders.load_torch(folder).encode_prompt("a", device="cpu")


DAMAGED = {
    "not JSON": ("tokenizer.json", "{oops", "tokenizer.json: "),
    "empty": ("tokenizer.json", "", "tokenizer.json: "),
    "another object": ("tokenizer.json", "{}", "'added_tokens'"),
    "config": ("tokenizer_config.json", "{oops", "tokenizer_config.json: "),
    "list": ("tokenizer_config.json", "[]", "cannot be read"),
    "length": ("tokenizer_config.json", '{"model_max_length": "long"}', "= 'long' must be"),
    "merges": ("merges.txt", "#version\nzz qq\n", "`zz` out of vocabulary"),
    "vocabulary": ("vocab.json", "{oops", "vocab.json: "),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_tokenizer_is_one_line(case, tmp_path):
    name, text, words = DAMAGED[case]
    folder = tmp_path / "tokenizer"
    if name in ("merges.txt", "vocab.json"):
        folders.tokenizer(folder)
    else:
        shutil.copytree(folders.folder("sd") / "tokenizer", folder)
    (folder / name).write_text(text)
    with pytest.raises(FolderError) as failure:
        Tokenizer(folder, 77)
    line = str(failure.value)
    assert words in line and str(folder) in line and "\n" not in line


def test_half_a_character_is_refused_where_there_is_no_file_to_name(tmp_path):
    tokenizer = Tokenizer(folders.folder("sd") / "tokenizer", 77)
    with pytest.raises(UserError, match=r"'a \\ud83d' has half a character \(\\ud83d at 2\)"):
        tokenizer(["a \ud83d"])


def test_many_cut_prompts_are_one_line(capsys):
    text = pipeline.TextEncoders(single_file.open_checkpoint(folders.folder("sd")))
    prompts = [f"{number} " + "cat " * 90 for number in range(500)]
    capsys.readouterr()
    text.announce(prompts)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "500 prompts have more than 77 tokens" in line
    assert line.count("without") == 3
    text(prompts[:2])
    assert not capsys.readouterr().err
    for number in range(20):
        text.announce([f"{number} " + "dog " * 90])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == pipeline.LINES - 1 and lines[-1].endswith("more such prompts are not said")
