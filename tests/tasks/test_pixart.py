"""PixArt from a folder and prompts to a student that stock diffusers draws as we do."""

import json
import signal

import folders
import numpy as np
import pixart_folders
import pytest
import text_config
from safetensors.numpy import load_file
from shell import assert_same_bits

from jaxdistill import main, partition
from jaxdistill.run import checkpoint, loop
from jaxdistill.tasks.text_to_image import pipeline

PROMPTS = ["a photo of a dog", "The sea "]
NETWORK = "transformer/diffusion_pytorch_model.safetensors"


def make_config(tmp_path, variant, **changes):
    config = text_config.get_config()
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, "cat", "a red house"]))
    config.teacher.folder = str(pixart_folders.folder(variant))
    config.data.prompts = str(tmp_path / "prompts.txt")
    config.data.update({"height": 64, "width": 96})
    config.update_from_flattened_dict({"student.iterations": 4, **changes})
    return config


def assert_drawn_alike(folder):
    """By stock diffusers, as how_to_sample.json says, and here."""
    stock, ours = folders.load_torch(folder), pipeline.load(folder)
    noise = np.random.default_rng(0).standard_normal((2, 4, 8, 12), np.float32)
    calls = json.loads((folder / "how_to_sample.json").read_text())["diffusers"]["calls"]
    for steps in (1, 2, 3, 4):
        call = {**calls["1"], "num_inference_steps": steps, "output_type": "np"}
        expected = stock(PROMPTS, latents=folders.torch.tensor(noise), **call).images
        np.testing.assert_allclose(ours(PROMPTS, steps=steps, latents=noise), expected, atol=1e-4)


@pytest.mark.long
def test_a_student_of_all_weights_is_drawn_by_stock_diffusers(tmp_path):
    main.run(make_config(tmp_path, "alpha"), tmp_path / "run")
    folder = tmp_path / "run" / "diffusers"
    assert_drawn_alike(folder)
    before, after = load_file(pixart_folders.folder("alpha") / NETWORK), load_file(folder / NETWORK)
    assert before.keys() == after.keys()
    # A bias of the keys changes nothing that softmax sees.
    still = {name for name in before if (before[name] == after[name]).all()}
    assert all(name.endswith("to_k.bias") for name in still)


@pytest.mark.long
def test_a_resumed_lora_of_scanned_blocks_has_the_bits_of_one_that_was_not(tmp_path):
    changes = {"student.lora_rank": 3, "compute.scan": True, "log.checkpoint_every": 2}
    config, put, calls = make_config(tmp_path, "sigma", **changes), partition.put_batch, []

    def put_batch(batch, mesh):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return put(batch, mesh)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(loop.Stopped):
        patch.setattr(partition, "put_batch", put_batch)
        main.run(config, tmp_path / "parts")
    runs = [tmp_path / name for name in ("parts", "whole")]
    for run in runs:
        main.run(config, run)
    assert_same_bits(*(checkpoint.load_export(run / "student")[0] for run in runs))
    assert_drawn_alike(runs[0] / "diffusers")
    assert (runs[0] / "lora" / "adapter_config.json").is_file()
