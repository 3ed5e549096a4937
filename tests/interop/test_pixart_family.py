"""PixArt's folders are drawn as the stock pipelines draw them; what does not fit is refused."""

import json
import shutil

import folders
import numpy as np
import pixart_folders
import pytest
from safetensors.numpy import load_file, save_file

from jaxdistill.interop import diffusers_folder, families, torch_weights
from jaxdistill.interop.diffusers_folder import FolderError
from jaxdistill.tasks.text_to_image import pipeline

PROMPTS = ["  A Photo of a dog", "the sea"]
VARIANTS = pytest.mark.parametrize("variant", pixart_folders.NETWORKS)
INDEX, NETWORK = "model_index.json", "transformer/config.json"


def latents(height=8, width=12, rows=2):
    return np.random.default_rng(5).standard_normal((rows, 4, height, width), np.float32)


@pytest.fixture
def copy(tmp_path):
    """A copy of a tiny folder that may be changed."""

    def make(variant="alpha"):
        return shutil.copytree(pixart_folders.folder(variant), tmp_path / variant)

    return make


def change(folder, file, **values):
    where = folder / file
    where.write_text(json.dumps(json.loads(where.read_text()) | values))


def assert_tensors(part, expected):
    found = torch_weights.torch_tensors(diffusers_folder.load_params(part))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.costly
@VARIANTS
def test_images_are_the_stock_pipelines(variant):
    stock = folders.load_torch(pixart_folders.folder(variant))
    ours = pipeline.load(pixart_folders.folder(variant), scan=variant == "sigma")
    assert (ours.steps, ours.guidance) == (20, 4.5)
    z = latents()
    for steps, guidance, negative in ((4, 1.0, None), (5, 4.5, None), (2, 3.0, "a red house")):
        expected = pixart_folders.stock_images(
            stock,
            PROMPTS,
            z,
            num_inference_steps=steps,
            guidance_scale=guidance,
            negative_prompt=[negative or ""] * 2,
        )
        found = ours(
            PROMPTS,
            steps=steps,
            guidance=guidance,
            negative_prompt=negative,
            height=64,
            width=96,
            latents=z,
        )
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("variant", ["alpha", "sigma"])
def test_a_folder_of_before_the_class_is_the_same(variant, copy):
    folder = copy(variant)
    pixart_folders.aged(folder)
    # What such a network saw in place of a caption is in the published files, and unused.
    where = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(where)
    seen = np.ones((120, pixart_folders.TEXT), np.float32)
    save_file({**tensors, "caption_projection.y_embedding": seen}, where)
    old, new = (families.open_folder(f) for f in (folder, pixart_folders.folder(variant)))
    assert old.network.module == new.network.module
    assert_tensors(old.network, tensors)
    assert type(folders.load_torch(folder).transformer).__name__ == "PixArtTransformer2DModel"


def test_the_size_of_an_image_is_told_to_alpha_of_1024_alone():
    for variant, told in (("alpha", True), ("alpha512", False), ("sigma", False)):
        folder = families.open_folder(pixart_folders.folder(variant))
        found = folder.family.at_size(folder, 640, 512)
        assert bool(found) == told
        if told:
            assert found["resolution"].tolist() == [640.0, 512.0]
            assert found["aspect_ratio"].tolist() == [1.25]


def test_sides_divide_into_patches():
    folder = families.open_folder(pixart_folders.folder("alpha"))
    assert pipeline.image_size(folder, None, None) == (1024, 1024)
    with pytest.raises(ValueError, match="height must be a positive multiple of 16, got 72"):
        pipeline.image_size(folder, 72, 64)


def test_the_students_config_keeps_its_positions():
    """Sample_size says more than a default size: another one is another network."""
    folder = families.open_folder(pixart_folders.folder("alpha"))
    assert folder.family.sized_config(folder, (512, 512)) == folder.network.config


def test_a_prompt_is_cut_after_the_tokens_of_the_stock_call():
    for variant, length in (("alpha", 120), ("sigma", 300)):
        folder = families.open_folder(pixart_folders.folder(variant))
        (tokenizer,) = folder.family.open_tokenizers(folder)
        found = tokenizer(["dog " * 400, "Dog", " dog "])
        assert found.ids.shape == (3, length) and found.mask[0].all()
        assert found.cut[0] and not found.cut[1]
        assert found.ids[1].tolist() == found.ids[2].tolist()


@pytest.mark.parametrize(
    ("variant", "values", "message"),
    [
        ("alpha", {"norm_type": "ada_norm_zero"}, "norm_type = 'ada_norm_zero' is not supported"),
        ("alpha", {"activation_fn": "geglu"}, "activation_fn = 'geglu' is not supported"),
        ("alpha", {"caption_channels": 8}, "caption_channels is 8, but the text encoder gives 24"),
        ("alpha", {"cross_attention_dim": 8}, "cross_attention_dim = 8 must be"),
        ("alpha", {"out_channels": 5}, "out_channels = 5 must be 4, or 8"),
        ("alpha", {"in_channels": 8, "out_channels": 8}, "in_channels is 8, but the VAE has 4"),
        ("alpha", {"attention_head_dim": 5}, "= 15 must be a multiple of 12"),
        ("alpha", {"sample_size": 64}, "use_additional_conditions is on, but only"),
        ("sigma", {"use_additional_conditions": True}, "use_additional_conditions is on, but only"),
        ("sigma", {"num_tokens": 7}, "the setting num_tokens = 7 is not known"),
    ],
)
def test_what_does_not_fit_is_named(variant, values, message, copy):
    folder = copy(variant)
    change(folder, NETWORK, **values)
    if values.get("sample_size"):
        change(folder, NETWORK, use_additional_conditions=True)
    with pytest.raises(FolderError) as told:
        families.open_folder(folder)
    line = str(told.value)
    assert message in line and str(folder) in line and "\n" not in line


def test_a_folder_without_its_text_side_is_refused(copy):
    folder = copy()
    for file in ("tokenizer.json", "spiece.model"):
        (folder / "tokenizer" / file).unlink(missing_ok=True)
    with pytest.raises(FolderError, match=r"neither tokenizer.json nor spiece.model"):
        families.open_folder(folder)
    change(folder, INDEX, text_encoder=[None, None])
    with pytest.raises(FolderError, match="names no text_encoder, which PixArtAlphaPipeline needs"):
        families.open_folder(folder)


def test_clip_skip_is_not_of_t5():
    folder = families.open_folder(pixart_folders.folder("alpha"))._replace(clip_skip=1)
    with pytest.raises(ValueError, match="clip_skip must be 0"):
        folder.family.open_tokenizers(folder)


def test_a_loop_over_blocks_holds_the_same_tensors():
    path = pixart_folders.folder("sigma")
    found = families.open_folder(path, scan=True).network
    assert_tensors(found, load_file(path / "transformer" / "diffusion_pytorch_model.safetensors"))
