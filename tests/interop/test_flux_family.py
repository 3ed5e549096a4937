"""FLUX.1's folders are drawn as the stock pipeline draws them; what does not fit is refused."""

import json
import shutil

import flux_folders
import folders
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxdistill.interop import diffusers_folder, families, torch_weights
from jaxdistill.interop.diffusers_folder import FolderError
from jaxdistill.tasks.text_to_image import pipeline

PROMPTS = ["a photo of a dog", "the sea"]
INDEX, NETWORK = "model_index.json", "transformer/config.json"


def latents(height=8, width=12, rows=2):
    return np.random.default_rng(5).standard_normal(
        (rows, flux_folders.LATENTS, height, width), np.float32
    )


@pytest.fixture
def copy(tmp_path):
    """A copy of a tiny folder that may be changed."""

    def make(variant="dev"):
        return shutil.copytree(flux_folders.folder(variant), tmp_path / variant)

    return make


def change(folder, file, **values):
    where = folder / file
    where.write_text(json.dumps(json.loads(where.read_text()) | values))


@pytest.mark.costly
@pytest.mark.parametrize("variant", flux_folders.NETWORKS)
def test_images_are_the_stock_pipelines(variant):
    """Of another shift at each size, at several scales, from packed latents and others."""
    stock = folders.load_torch(flux_folders.folder(variant))
    ours = pipeline.load(flux_folders.folder(variant), scan=variant == "dev")
    assert (ours.steps, ours.guidance) == (28, 3.5)
    for steps, guidance, size in ((4, 3.5, (8, 12)), (2, 1.7, (4, 6))):
        z = latents(*size)
        expected = flux_folders.stock_images(
            stock, PROMPTS, z, num_inference_steps=steps, guidance_scale=guidance
        )
        options = {"height": 8 * size[0], "width": 8 * size[1], "steps": steps}
        for given in (z, flux_folders.packed(z)):
            found = ours(PROMPTS, guidance=guidance, latents=given, **options)
            np.testing.assert_allclose(found, expected, atol=1e-4)
    assert expected.std() > 0.02
    other = ours(PROMPTS, guidance=3.5, latents=z, **options)
    assert (np.abs(other - expected).max() > 1e-3) == (variant == "dev")


@pytest.mark.parametrize("scan", [False, True])
def test_the_tensors_come_back(scan):
    path = flux_folders.folder("dev")
    part = families.open_folder(path, scan=scan).network
    found = torch_weights.torch_tensors(diffusers_folder.load_params(part))
    expected = load_file(path / "transformer" / "diffusion_pytorch_model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_sides_divide_into_patches():
    folder = families.open_folder(flux_folders.folder("dev"))
    assert pipeline.image_size(folder, None, None) == (1024, 1024)
    assert folder.family.image_tokens(folder, 1024, 512) == 64 * 32
    with pytest.raises(ValueError, match="height must be a positive multiple of 16, got 72"):
        pipeline.image_size(folder, 72, 64)


def test_a_negative_prompt_is_refused():
    """The network is called once a step: it would have no effect."""
    ours = pipeline.load(flux_folders.folder("dev"))
    with pytest.raises(ValueError, match="negative prompt has no effect"):
        ours(PROMPTS[:1], negative_prompt="the sea", steps=1, height=32, width=32)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patch_size": 2}, "patch_size = 2 is not supported, only 1"),
        ({"out_channels": 8}, "out_channels = 8 is not supported"),
        ({"in_channels": 18}, "in_channels = 18 must divide by 4"),
        ({"in_channels": 384}, "in_channels = 384 is of inpainting"),
        ({"in_channels": 32}, "in_channels = 32 is not 4 times the VAE's 4"),
        ({"axes_dims_rope": [4, 6, 8]}, "[4, 6, 8] must be three even numbers whose sum is"),
        ({"joint_attention_dim": 8}, "joint_attention_dim is 8, but text_encoder_2 gives 24"),
        ({"pooled_projection_dim": 8}, "pooled_projection_dim is 8, but text_encoder gives 16"),
        ({"ip_adapter": True}, "the setting ip_adapter = True is not known"),
    ],
)
def test_what_does_not_fit_is_named(values, message, copy):
    folder = copy()
    change(folder, NETWORK, **values)
    with pytest.raises(FolderError) as told:
        families.open_folder(folder)
    line = str(told.value)
    assert message in line and str(folder) in line and "\n" not in line


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("FluxFillPipeline", "is of inpainting"),
        ("FluxKontextPipeline", "is of editing by instructions"),
        ("FluxImg2ImgPipeline", "save them as FluxPipeline"),
    ],
)
def test_a_pipeline_of_another_task_is_named(name, words, copy):
    folder = copy()
    change(folder, INDEX, _class_name=name)
    with pytest.raises(FolderError, match=words):
        families.open_folder(folder)
