"""What is at a path that is no checkpoint, and what to give instead."""

import json

import pytest

from jaxdistill.interop import explain_path


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))


THERE = {
    # name: (files, path, words)
    "a file": (["x.txt"], "x.txt", ["is a file"]),
    "a network": (
        ["sd/model_index.json", "sd/unet/config.json"],
        "sd/unet",
        ["one network (UNet2DConditionModel)", "give", "/sd"],
    ),
    "a workdir": (["run/diffusers/x"], "run", ["workdir", "run/diffusers"]),
    "a folder around": (["a/b/model_index.json"], "a", ["holds one", "a/b"]),
    "a small export": (["e/card.json"], "e", ["reads no text"]),
    "a LoRA": (["l/adapter_config.json"], "l", ["holds a LoRA"]),
    "single files": (["m/nice.safetensors"], "m", ["m/nice.safetensors"]),
    "nothing": (["n/readme"], "n", ["no model_index.json"]),
}


@pytest.mark.parametrize("name", THERE)
def test_what_is_there_is_named_with_what_to_give(tmp_path, name):
    files, path, words = THERE[name]
    touch(tmp_path, *files)
    text = explain_path(tmp_path / path)
    assert "\n" not in text and str(tmp_path / path) in text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("~/models/sd", "the shell did not replace ~"),
        ("someone/some-model-v1.5", "hf download someone/some-model-v1.5"),
        ("/nowhere/sd", "/nowhere/sd does not exist"),
        ("nowhere.safetensors", "nowhere.safetensors does not exist"),
    ],
)
def test_a_path_where_nothing_is_tells_of_its_likely_meaning(path, word):
    assert word in explain_path(path)


def test_a_link_to_nowhere_names_both_ends(tmp_path):
    (tmp_path / "sd").symlink_to(tmp_path / "gone")
    assert "gone, which does not exist" in explain_path(tmp_path / "sd")
