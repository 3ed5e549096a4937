"""Z-Image from a folder: what stock diffusers draws, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import zimage_folders
from safetensors.numpy import load_file, save_file
from zimage_folders import diffusers, torch

from configs import zimage
from jaxdistill.interop import diffusers_folder, families
from jaxdistill.interop.diffusers_folder import FolderError
from jaxdistill.interop.torch_weights import torch_tensors
from jaxdistill.tasks.text_to_image import pipeline

PROMPTS = ["a dog", "a gull by the sea, oil on wood"]
"""With the template's tokens they are in different multiples of 32."""
HEIGHT, WIDTH = 64, 96


def stock(folder, **options):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def starts(pipe, seed=0):
    shape = (
        2,
        pipe.transformer.in_channels,
        *(n // pipe.vae_scale_factor for n in (HEIGHT, WIDTH)),
    )
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def images(pipe, latents, negative=None, **options):
    """Of the stock pipeline."""
    return pipe(
        list(PROMPTS),
        negative_prompt=None if negative is None else [negative] * 2,
        latents=torch.tensor(latents),
        height=HEIGHT,
        width=WIDTH,
        output_type="np",
        **options,
    ).images


@pytest.mark.costly
@pytest.mark.parametrize("variant", zimage_folders.NETWORKS)
def test_images_are_the_stock_pipelines(variant):
    folder = zimage_folders.folder(variant)
    theirs, ours = stock(folder), pipeline.load(folder)
    z, size = starts(theirs), {"height": HEIGHT, "width": WIDTH}
    for steps, guidance, negative in ((1, 0.0, None), (3, 4.0, None), (2, 0.5, "blurry " * 9)):
        wanted = images(theirs, z, negative, num_inference_steps=steps, guidance_scale=guidance)
        got = ours(
            PROMPTS, negative_prompt=negative, latents=z, steps=steps, guidance=guidance, **size
        )
        assert np.abs(got - wanted).max() < 0.1 / 255 and wanted.std() > 0.05
    assert (ours.steps, ours.guidance, ours.check()) == (50, 5.0, (1024, 1024))


def edited(source, target, component, **changes):
    """A copy of the folder with other settings in a component's config; None takes one out."""
    shutil.copytree(source, target)
    path = target / component / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target


def test_a_folder_of_transformers_4_and_the_whole_language_model_is_the_same(tmp_path):
    source = zimage_folders.folder("other")
    old = edited(
        source,
        tmp_path / "old",
        "text_encoder",
        rope_parameters=None,
        rope_theta=5e4,
        rope_scaling=None,
    )
    path = old / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    save_file(
        {
            **{f"model.{name}": value for name, value in tensors.items()},
            "lm_head.weight": tensors["embed_tokens.weight"],
        },
        path,
    )
    index = json.loads((old / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "Qwen3ForCausalLM"]
    (old / "model_index.json").write_text(json.dumps(index))
    found = [pipeline.TextEncoders(families.open_folder(path))(PROMPTS) for path in (source, old)]
    for name in ("context", "mask"):
        np.testing.assert_array_equal(*(cond[name] for cond in found))
    assert found[0]["mask"].sum(axis=1).tolist() == [20.0, 45.0]


def test_a_network_is_written_as_it_was_read(tmp_path):
    part = families.open_folder(zimage_folders.folder("small"), scan=True).network
    written = torch_tensors(diffusers_folder.load_params(part))
    (file,) = part.files()
    tensors = load_file(file)
    assert written.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(written[name], value)


@pytest.mark.parametrize(
    ("component", "changes", "says"),
    [
        ("transformer", {"all_patch_size": [2, 4]}, r"all_patch_size = \[2, 4\] is not supported"),
        ("transformer", {"siglip_feat_dim": 8}, "siglip_feat_dim = 8 is not supported"),
        ("transformer", {"n_heads": 3}, "n_heads = 3 do not divide dim = 32"),
        ("transformer", {"axes_dims": [4, 4, 6]}, "axes_dims = .* head's width, .* = 16"),
        ("transformer", {"cap_feat_dim": 99}, "cap_feat_dim is 99, but the text encoder gives 24"),
        ("transformer", {"in_channels": 4}, "in_channels is 4, but the VAE has 16"),
        ("transformer", {"something": 1}, "setting something = 1 is not known"),
        ("text_encoder", {"model_type": "qwen2"}, "model_type = 'qwen2' is not supported, only"),
        ("text_encoder", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("text_encoder", {"num_key_value_heads": 3}, "num_key_value_heads = 3 do not divide"),
        ("text_encoder", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type = 'yarn'"),
        ("text_encoder", {"layer_types": ["sliding_attention"]}, "layer_types has .*sliding"),
    ],
)
def test_a_config_that_is_not_supported_is_one_line(tmp_path, component, changes, says):
    folder = edited(zimage_folders.folder("small"), tmp_path / "f", component, **changes)
    with pytest.raises(FolderError, match=says) as caught:
        families.open_folder(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_sizes_and_layers_that_there_are_not():
    folder = families.open_folder(zimage_folders.folder("small"))
    for side, says in ((72, "multiple of 16, got 72"), (2064, "at most 2048")):
        with pytest.raises(ValueError, match=says):
            pipeline.image_size(folder, side, 64)
    with pytest.raises(ValueError, match=r"clip_skip must be 0 of Z-Image \(Qwen3\), got 1"):
        folder.family.open_tokenizers(folder._replace(clip_skip=1))


def test_the_config_of_a_run_names_layers_of_the_network():
    from jaxdistill.model import lora_layers

    config = zimage.get_config()
    assert config.teacher.guidance == config.methods.dmd2.guidance == 5.0
    part = families.open_folder(zimage_folders.folder("small"), scan=True).network
    targets = config.student.lora_targets
    layers = lora_layers(diffusers_folder.abstract_params(part), targets)
    assert {path[0] for path in layers} == {
        "noise_refiner.0:2", "context_refiner.0:2", "layers.0:2"
    }  # fmt: skip
    assert len(layers) == 3 * 7
