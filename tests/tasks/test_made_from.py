"""What a text-to-image run is made from: all that it reads is remembered, and in the keys of its
caches.
"""

import json
import shutil
from types import SimpleNamespace

import folders
import numpy as np
import pytest
import text_config
from PIL import Image
from safetensors.numpy import load_file, save_file

from jaxdistill.errors import UserError
from jaxdistill.run import inputs
from jaxdistill.run.run import Run
from jaxdistill.tasks.text_to_image import task as tasks
from jaxdistill.tasks.text_to_image.pipeline import TextToImage
from jaxdistill.tasks.text_to_image.task import TextToImageTask


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def weights(folder, name, stem="diffusion_pytorch_model"):
    path = folder / "sd" / name / f"{stem}.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).reshape(-1)[0] += 1.0
    save_file(tensors, path)


def image(folder, value):
    Image.fromarray(np.full((16, 16, 3), value, np.uint8)).save(folder / "images" / "a.png")


CHANGES = {
    # what: (the change, the cache whose keys change with it)
    "the teacher's unet weights": (lambda f: weights(f, "unet"), "teacher"),
    "the teacher's unet config": (
        lambda f: edit(f / "sd/unet/config.json", norm_eps=1e-6),
        "teacher",
    ),
    "the teacher's vae weights": (lambda f: weights(f, "vae"), "images"),
    "the teacher's vae config": (
        lambda f: edit(f / "sd/vae/config.json", scaling_factor=0.5),
        "images",
    ),
    "the teacher's text_encoder weights": (
        lambda f: weights(f, "text_encoder", "model"),
        "prompts images teacher",
    ),
    "the teacher's text_encoder config": (
        lambda f: edit(f / "sd/text_encoder/config.json", layer_norm_eps=1e-6),
        "prompts images teacher",
    ),
    "the teacher's tokenizer": (
        lambda f: (f / "sd/tokenizer/more.txt").write_text("x"),
        "prompts images teacher",
    ),
    "the teacher's scheduler": (
        lambda f: edit(f / "sd/scheduler/scheduler_config.json", beta_end=0.013),
        "teacher",
    ),
    "the prompts (config.data.prompts)": (
        lambda f: (f / "p.txt").write_text("a dog\n"),
        "prompts teacher",
    ),
    "the images (config.data.images)": (lambda f: image(f, 200), "images"),
}


@pytest.fixture
def place(tmp_path):
    shutil.copytree(folders.folder("sd"), tmp_path / "sd")
    (tmp_path / "p.txt").write_text("a cat\n")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "metadata.jsonl").write_text('{"file_name": "a.png", "prompt": "a"}\n')
    image(tmp_path, 100)
    (tmp_path / "run").mkdir()
    return tmp_path


def opened(folder, reals="data"):
    config = text_config.get_config()
    config.teacher.folder, config.data.prompts = str(folder / "sd"), str(folder / "p.txt")
    config.data.images, config.adversarial.reals = str(folder / "images"), reals
    return TextToImageTask(config)


def read(folder):
    """{cache: key} of both sources of images, and what the run is made from."""
    found = {}
    run, pipe = Run.__new__(Run), TextToImage.__new__(TextToImage)
    run.cache = lambda name, key, *rest, **kw: found.update({name: key})
    nothing = {"negative": lambda prompt: {}, "announce": lambda prompts: None}
    pipe.text, pipe.layout = SimpleNamespace(**nothing), None
    for reals in ("teacher", "data"):
        task = opened(folder, reals)
        task.open_data(run, pipe)
    return found, task.made_from()


@pytest.mark.costly
@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_is_named_and_leaves_no_cache_that_depends_on_it(place, name):
    before, given = read(place)
    inputs.keep(place / "run", inputs.check(place / "run", given))
    change, caches = CHANGES[name]
    change(place)
    after, given = read(place)
    with pytest.raises(UserError) as failure:
        inputs.check(place / "run", given)
    assert f"changed since it began: {name};" in str(failure.value)
    assert {cache for cache in after if after[cache] != before[cache]} == {*caches.split()}


def test_a_key_has_the_content_of_files_beside_the_teacher_and_not_their_path(place, monkeypatch):
    """As a LoRA with its scale."""
    monkeypatch.setattr(tasks, "FLAGS", ("styles",))

    def key(name, content):
        (place / name).write_bytes(content)
        task = opened(place)
        with task.config.unlocked():
            task.config.teacher.styles = (f"{place / name}:0.8",)
        assert task.beside_files() == [place / name]
        return task.beside_key

    first = key("a.safetensors", b"a")
    assert first == key("b.safetensors", b"a") != key("b.safetensors", b"b")
