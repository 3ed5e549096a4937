"""A fine-tune in one file and a style LoRA in; a file, LoRAs and words for other programs out."""

import json
from pathlib import Path

import diffusers
import folders
import loras
import numpy as np
import original
import pytest
import text_config

from jaxdistill import main
from jaxdistill.interop import Beside, families, how_to_sample, lora
from jaxdistill.tasks.text_to_image import pipeline

START = np.random.default_rng(0).standard_normal((2, 4, 8, 8), np.float32)
STEPS = (1, 2, 3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The base, the style and the finished run of a LoRA."""
    place, base = tmp_path_factory.mktemp("round"), folders.folder("sd")
    teacher = original.write(base, place / "fine-tune.safetensors")
    style = loras.save(loras.kohya(loras.adapted(base)), place / "style.safetensors")
    (place / "prompts.txt").write_text("a cat\na dog at a cat\n")
    config = text_config.get_config()
    config.teacher.update({"folder": str(teacher), "like": str(base), "loras": (f"{style}:0.8",)})
    config.data.prompts = str(place / "prompts.txt")
    config.methods.imagine_flash.update({"adversarial_weight": 0.0, "learning_rate": 3e-2})
    config.student.update({"iterations": 2, "health_every": 2, "lora_rank": 4, "steps": STEPS})
    main.run(config, place / "run")
    return base, style, place / "run"


def drawn(pipe, how, steps):
    """Of a stock pipeline, called as the student's own file says."""
    call = how["diffusers"]["calls"][str(steps)]
    assert call == {
        "num_inference_steps": steps, "guidance_scale": 1.0, "height": 64, "width": 64
    }  # fmt: skip
    return folders.torch_images(pipe, latents=START, steps=steps, guidance=1.0)


@pytest.mark.long
@pytest.mark.parametrize("form", ["folder", "file", "diffusers' LoRA", "Kohya's LoRA"])
def test_stock_diffusers_draws_what_a_run_leaves_as_ours(made, form):
    base, style, run = made
    folder = run / "diffusers"
    how = json.loads((folder / how_to_sample.FILE).read_text())
    ours, theirs = pipeline.load(folder), folders.load_torch(folder)
    if form == "file":
        options = {"config": str(folder), "local_files_only": True}
        file = diffusers.StableDiffusionPipeline.from_single_file(
            str(run / "student.safetensors"), scheduler=theirs.scheduler, **options
        )
        theirs = file
        # What it was made for and holds is in the file: the style is not added again.
        beside = Beside(like=base, loras=(f"{style}:0.8",))
        ours = pipeline.load(run / "student.safetensors", beside=beside)
        assert (ours.steps, ours.guidance) == (3, 1.0)
        (run.parent / "other").mkdir()
        with pytest.raises(ValueError, match="holds another version of style"):
            other = loras.save(
                loras.kohya(loras.adapted(base, 1)), run.parent / "other" / style.name
            )
            pipeline.load(
                run / "student.safetensors", beside=Beside(like=base, loras=(str(other),))
            )
    elif form != "folder":
        name = lora.FILE if form == "diffusers' LoRA" else lora.KOHYA_FILE
        styled = folders.load_torch(base)
        styled.load_lora_weights(style.parent, weight_name=style.name)
        styled.fuse_lora(lora_scale=0.8)
        styled.unload_lora_weights()
        styled.load_lora_weights(run / "lora", weight_name=name)
        styled.scheduler, theirs = theirs.scheduler, styled
    for steps in STEPS:
        expected = drawn(theirs, how, steps)
        found = ours(folders.PROMPTS, steps=steps, latents=START)
        assert expected.std() > 0.02
        np.testing.assert_allclose(found, expected, atol=1 / 255)


@pytest.mark.long
def test_no_code_travels_and_every_file_is_there(made):
    _, style, run = made
    assert not [*run.glob("**/*.py")]
    for path in ("diffusers", "lora"):
        assert (run / path / how_to_sample.FILE).is_file()
        assert (run / path / how_to_sample.WORKFLOW).is_file()
    nodes = json.loads((run / "lora" / how_to_sample.WORKFLOW).read_text()).values()
    named = [node["inputs"]["lora_name"] for node in nodes if "lora_name" in node["inputs"]]
    assert named[-1] == lora.KOHYA_FILE and (run / "lora" / named[-1]).is_file()
    held = pipeline.made_for(run / "diffusers")["loras"]
    assert [(Path(found["file"]).name, found["weight"]) for found in held] == [(style.name, 0.8)]
    teacher = families.open_folder(made[0])
    styled = families.open_folder(run / "diffusers")
    encoders = [f.text_encoders[0].weights() for f in (teacher, styled)]
    name = "text_model.encoder.layers.0.self_attn.q_proj.weight"
    assert np.abs(encoders[0].read(name) - encoders[1].read(name)).max() > 1e-3
