"""Stable Diffusion 3 and 3.5 end to end: folders in, images and students as stock diffusers has
them.
"""

import json
import shutil

import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sd3_folders
import text_config
from safetensors.numpy import load_file

from configs import sd3
from jaxdistill import main
from jaxdistill.interop import diffusers_folder, families, lora, torch_weights
from jaxdistill.interop.diffusers_folder import FolderError
from jaxdistill.model import lora_init, lora_merge
from jaxdistill.tasks.text_to_image import pipeline


def latents(pipe, size=(32, 32), count=2):
    shape = (count, pipe.network.in_channels, *(side // sd3_folders.FACTOR for side in size))
    return np.random.default_rng(0).standard_normal(shape, np.float32)


@pytest.mark.costly
@pytest.mark.parametrize("variant", sd3_folders.VARIANTS)
def test_images_are_diffusers(variant):
    """With and without guidance, square and not, one step and several."""
    path = sd3_folders.folder(variant)
    stock, pipe = sd3_folders.load_stock(path), pipeline.load(path, scan=variant == "medium35")
    calls = (((32, 32), 4, 5.0, "dog"), ((24, 32), 1, 1.0, None))
    for size, steps, guidance, negative in calls:
        start = latents(pipe, size)
        more = {} if negative is None else {"negative_prompt": [negative] * 2}
        expected = sd3_folders.stock_images(
            stock, folders.PROMPTS, start, steps=steps, guidance=guidance, **more
        )
        found = pipe(
            folders.PROMPTS,
            height=size[0],
            width=size[1],
            steps=steps,
            guidance=guidance,
            negative_prompt=negative,
            latents=start,
        )
        assert found.shape == expected.shape and expected.std() > 0.05
        assert np.abs(found - expected).max() < 1 / 255


def assert_tensors(part, expected):
    found = torch_weights.torch_tensors(diffusers_folder.load_params(part))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.long
@pytest.mark.parametrize("variant", ["medium35", "no_t5"])
def test_a_students_folder_is_drawn_by_the_stock_pipeline(variant, tmp_path):
    """Its tensors are those that were saved, with one block after the other or as a loop; sigmas
    are all that the stock pipeline is told.
    """
    folder = families.open_folder(sd3_folders.folder(variant), scan=True)
    params, size = diffusers_folder.load_params(folder.network), (24, 24)
    config = folder.family.student_config(folder, "ddim", size)
    diffusers_folder.save_student(folder, tmp_path / "out", params, scheduler=config, size=size)
    weights = load_file(folder.network.folder / "diffusion_pytorch_model.safetensors")
    written = families.open_folder(tmp_path / "out")
    assert_tensors(written.network, weights)
    assert written.network.module == families.open_folder(folder.path).network.module
    assert written.family.native_size(written) == size
    ours = pipeline.load(tmp_path / "out", grid="trailing")
    stock = sd3_folders.load_stock(tmp_path / "out")
    start = latents(ours, size)
    for steps in (1, 2, 4):
        told = folder.family.student_times(config, steps)
        expected = sd3_folders.stock_images(stock, folders.PROMPTS, start, steps=steps, **told)
        found = ours(folders.PROMPTS, steps=steps, guidance=1.0, latents=start)
        assert np.abs(found - expected).max() < 1 / 255


@pytest.mark.parametrize("variant", ["odd", "no_t5"])
@pytest.mark.parametrize("skip", [0, 1])
def test_texts_are_encoded_as_in_the_stock_pipeline(variant, skip, tmp_path):
    """Whatever the second tokenizer says of lengths: the first is asked for both."""
    shutil.copytree(sd3_folders.folder(variant), tmp_path / "folder")
    change(tmp_path / "folder" / "tokenizer_2" / "tokenizer_config.json", model_max_length=20)
    text = pipeline.TextEncoders(families.open_folder(tmp_path / "folder"))
    prompts = ["a photo of a dog at the sea", "x" * 300]
    stock = sd3_folders.load_stock(tmp_path / "folder")
    expected, _, pooled, _ = stock.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, clip_skip=skip or None
    )
    found = text(prompts, skip=skip)
    assert found["context"].shape == (2, 77 + 256, sd3_folders.TEXT)
    np.testing.assert_allclose(found["context"], expected, atol=2e-5)
    np.testing.assert_allclose(found["pooled"], pooled, atol=2e-5)


def change(where, **values):
    where.write_text(json.dumps(json.loads(where.read_text()) | values))


NETWORK, INDEX = "transformer/config.json", "model_index.json"


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        (NETWORK, {"qk_norm": "layer_norm"}, "qk_norm = 'layer_norm' is not supported, only None"),
        (NETWORK, {"num_tokens": 7}, "the setting num_tokens = 7 is not known"),
        (NETWORK, {"caption_projection_dim": 8}, "= 8 must be num_attention_heads x"),
        (NETWORK, {"pos_embed_max_size": None}, "pos_embed_max_size = None must be a whole number"),
        (NETWORK, {"joint_attention_dim": 32}, "joint_attention_dim is 32, but text_encoder_3 giv"),
        (NETWORK, {"pooled_projection_dim": 9}, "pooled_projection_dim is 9, but text_encoder and"),
        (NETWORK, {"in_channels": 4}, "turns 4 channels into 6, but the VAE has 6"),
        (INDEX, {"text_encoder_2": [None, None]}, "names no text_encoder_2, which Sta"),
        (INDEX, {"tokenizer_3": [None, None]}, "names no tokenizer_3, which Stabl"),
        (INDEX, {"transformer": ["diffusers", "FluxTransformer2DModel"]}, "only SD3Transformer2DM"),
        ("text_encoder_3/config.json", {"feed_forward_proj": "gated-mish"}, "'gated-mish' is not"),
    ],
)
def test_what_does_not_fit_is_named(file, values, message, tmp_path):
    folder = shutil.copytree(sd3_folders.folder("medium"), tmp_path / "folder")
    change(folder / file, **values)
    with pytest.raises(FolderError) as told:
        families.open_folder(folder)
    line = str(told.value)
    assert message in line and str(folder) in line and "\n" not in line


def test_a_scheduler_of_betas_is_refused(tmp_path):
    folder = shutil.copytree(sd3_folders.folder("medium"), tmp_path / "folder")
    change(folder / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler")
    with pytest.raises(FolderError, match="'DDIMScheduler' is not of flow matching"):
        families.open_folder(folder).family.scheduler(families.open_folder(folder))


def test_a_t5_of_pickles_is_refused(tmp_path):
    folder = shutil.copytree(sd3_folders.folder("medium"), tmp_path / "folder")
    weights = folder / "text_encoder_3" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(FolderError, match=r"pytorch_model.bin only, and pickles can run code"):
        pipeline.TextEncoders(families.open_folder(folder))


def test_images_end_where_the_table_of_positions_ends():
    folder = families.open_folder(sd3_folders.folder("medium"))
    assert pipeline.image_size(folder, 72, None) == (72, 32)
    with pytest.raises(ValueError, match="height must be at most 72, where the network's positi"):
        pipeline.image_size(folder, 80, 32)
    with pytest.raises(ValueError, match="width must be a positive multiple of 8, got 36"):
        pipeline.image_size(folder, 32, 36)


def test_a_long_prompt_is_cut_where_t5_ends(capsys):
    text = pipeline.TextEncoders(families.open_folder(sd3_folders.folder("medium")))
    text.announce(["dog " * 300])
    assert "more than 256 tokens" in capsys.readouterr().err


@pytest.mark.long
def test_a_lora_is_read_by_the_stock_pipeline(tmp_path):
    """Updates of the config's layers, of blocks that are stacked."""
    path = sd3_folders.folder("medium35")
    ours = pipeline.load(path, scan=True)
    updates = lora_init(jax.random.key(0), ours.params, sd3.TARGETS, 3)
    updates = jax.tree.map(
        lambda a: a + 0.2 * jax.random.normal(jax.random.key(1), a.shape), updates
    )
    lora.save(tmp_path, updates, ours.folder)
    stock, start = sd3_folders.load_stock(path), latents(ours)
    once = {"steps": 1, "guidance": 1.0, "latents": start}
    before = ours(folders.PROMPTS, **once)
    ours.params = lora_merge(ours.params, updates)
    stock.load_lora_weights(tmp_path)
    expected = sd3_folders.stock_images(stock, folders.PROMPTS, start, steps=1)
    assert np.abs(expected - before).max() > 0.1
    assert np.abs(expected - ours(folders.PROMPTS, **once)).max() < 1 / 255


@pytest.mark.long
def test_a_run_gives_a_folder_and_a_lora_that_stock_diffusers_draws(tmp_path):
    """From prompts to a student: the config's layers, blocks as a loop, γ carried over."""
    config = text_config.get_config()
    (tmp_path / "prompts.txt").write_text("a cat\na dog at a cat\nphoto\nphoto of a dog\n")
    config.teacher.folder = str(sd3_folders.folder("medium35"))
    config.data.prompts = str(tmp_path / "prompts.txt")
    config.compute.scan = True
    config.student.update({"iterations": 2, "batch_size": 2, "steps": (1, 2), "health_every": 2})
    config.student.update({"lora_rank": 3, "lora_targets": sd3.TARGETS})
    config.methods.imagine_flash.reference = "scaled_linear"
    run = tmp_path / "run"
    main.run(config, run)
    ours = pipeline.load(run / "diffusers")
    teacher, student = (
        sd3_folders.load_stock(path) for path in (sd3_folders.folder("medium35"), run / "diffusers")
    )
    teacher.load_lora_weights(run / "lora")
    teacher.scheduler = student.scheduler
    start = latents(ours)
    for steps in (1, 2):
        told = {"steps": steps, "sigmas": np.linspace(1.0, 1.0 / steps, steps).tolist()}
        found = ours(folders.PROMPTS, steps=steps, latents=start)
        for stock in (student, teacher):
            images = sd3_folders.stock_images(stock, folders.PROMPTS, start, **told)
            assert np.abs(found - images).max() < 1 / 255


def test_t5_is_held_in_the_type_it_computes_in():
    folder = families.open_folder(sd3_folders.folder("medium"), dtype=jnp.bfloat16)
    text = pipeline.TextEncoders(folder)
    kinds = [{leaf.dtype for leaf in jax.tree.leaves(params)} for params in text.params]
    assert kinds == [{jnp.dtype("float32")}] * 2 + [{jnp.dtype("bfloat16")}]
    assert np.isfinite(text(["a photo"])["context"]).all()
