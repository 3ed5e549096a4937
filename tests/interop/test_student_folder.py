"""A student's folder as it is written, drawn by stock diffusers: whole images."""

import json

import folders
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import sample, sampling
from jaxdistill.interop import diffusers_folder, diffusers_scheduler, families, how_to_sample
from jaxdistill.interop.diffusers_folder import FolderError
from jaxdistill.run import checkpoint
from jaxdistill.tasks.text_to_image import pipeline

START = np.random.default_rng(0).standard_normal((2, 4, 8, 8), np.float32)


@pytest.mark.costly
@pytest.mark.parametrize("solver", diffusers_scheduler.STUDENT_SOLVERS)
@pytest.mark.parametrize("variant", ["sd", "sd2", "sdxl"])
def test_stock_diffusers_draws_a_students_images(variant, solver, tmp_path, monkeypatch):
    """1.x with eps, 2.x with v from zero terminal SNR, XL with eps: N steps without guidance, with
    nothing said of the timesteps.
    """
    source = families.open_folder(folders.folder(variant))
    config = diffusers_scheduler.student_config(source.scheduler, solver=solver)
    target = tmp_path / "student"
    diffusers_folder.save_student(
        source, target, diffusers_folder.load_params(source.network), scheduler=config
    )
    pipe, theirs = pipeline.load(target), folders.load_torch(target)
    assert type(theirs.scheduler).__name__ == config["_class_name"]
    noise = jnp.asarray(START.transpose(0, 2, 3, 1))
    for steps in (1, 2, 3, 4):
        times = diffusers_scheduler.student_grid(solver, steps, pipe.scheduler.schedule.T)
        # One array a step but the last, after which nothing is drawn.
        folders.give_noise(
            monkeypatch,
            [
                sampling.fresh_noise(sampling.keys_of(noise), t, noise).transpose(0, 3, 1, 2)
                for t in jnp.asarray(times[1:])
            ],
        )
        expected = folders.torch_images(theirs, latents=START, steps=steps, guidance=1.0)
        found = pipe(folders.PROMPTS, steps=steps, guidance=1.0, latents=START, height=64, width=64)
        np.testing.assert_array_equal(theirs.scheduler.timesteps.numpy() + 1, times)
        assert found.shape == expected.shape and expected.std() > 0.05
        assert np.abs(found - expected).max() < 1e-5, steps


# ------------------------------------------------------------------- what it was made for travels


MADE_FOR = {"steps": 2, "guidance": 1.0, "height": 48, "width": 80, "clip_skip": 0}
MADE_FOR["timesteps"] = {"1": [999], "2": [999, 499]}


def written(target, variant="sd", size=(48, 80), **settings):
    """A student's folder as a run writes it, whose network is its teacher's."""
    source = families.open_folder(folders.folder(variant))
    config = diffusers_scheduler.student_config(source.scheduler)
    made_for = {**MADE_FOR, "height": size[0], "width": size[1]}
    diffusers_folder.save_student(
        source,
        target,
        diffusers_folder.load_params(source.network),
        scheduler={**config, pipeline.KEY: made_for},
        size=size,
        extra={pipeline.SETTINGS: {**made_for, **settings}},
    )
    return target


@pytest.mark.costly
@pytest.mark.parametrize(
    ("variant", "size", "default"),
    [
        ("sd", (48, 80), (48, 80)),
        ("sd2", (128, 128), (128, 128)),
        ("sdxl", (128, 128), (128, 128)),
        # XL's pipeline reads one number: the size is in how_to_sample.json, and is ours.
        ("sdxl", (48, 80), (64, 64)),
    ],
)
def test_the_size_is_diffusers_default_too(variant, size, default, tmp_path):
    target = written(tmp_path / "student", variant, size)
    theirs = folders.load_torch(target)
    drawn = theirs("a cat", num_inference_steps=1, guidance_scale=1.0, output_type="np").images
    assert drawn.shape[1:3] == default
    folder = families.open_folder(target)
    assert folder.family.native_size(folder) == default
    assert pipeline.made_for(target)["height"] == size[0]


def test_a_size_of_the_checkpoint_leaves_its_config(tmp_path):
    target = written(tmp_path / "student", size=(64, 64))
    configs = [root / "unet" / "config.json" for root in (target, folders.folder("sd"))]
    assert json.loads(configs[0].read_text()) == json.loads(configs[1].read_text())


@pytest.mark.long
def test_what_diffusers_saves_again_draws_as_before(tmp_path, monkeypatch):
    """In half precision, too, and nothing of the package is in the way."""
    target, again = written(tmp_path / "student"), tmp_path / "again"
    folders.load_torch(target).to(folders.torch.float16).save_pretrained(again)
    assert not (again / pipeline.SETTINGS).exists()
    assert pipeline.made_for(again) == MADE_FOR
    monkeypatch.setenv("HOME", str(again.parent))
    assert pipeline.made_for(f"~/{again.name}") == MADE_FOR
    start = np.random.default_rng(0).standard_normal((2, 4, 6, 10), np.float32)
    pipe = pipeline.load(again)
    found = pipe(folders.PROMPTS, latents=start)
    theirs = (
        folders.load_torch(again)
        .to(folders.torch.float32)(
            folders.PROMPTS,
            num_inference_steps=2,
            guidance_scale=1.0,
            latents=folders.torch.tensor(start),
            output_type="np",
        )
        .images
    )
    assert found.shape == theirs.shape == (2, 48, 80, 3)
    assert np.abs(found - theirs).max() < 1e-5


@pytest.mark.long
def test_sigmas_give_stock_diffusers_the_noise_correction(tmp_path):
    """As docs/your_ui.md says it: within 1/255 of ours at 1, 2 and 3 steps."""
    target = written(tmp_path / "student", size=(64, 64), noise_correction=True)
    how = how_to_sample.how_to_sample(
        how_to_sample.Student(
            json.loads((target / "scheduler" / "scheduler_config.json").read_text()),
            (1, 2, 3),
            (64, 64),
            noise_correction=True,
        )
    )
    section = how["diffusers"]["with_noise_correction"]
    ours, plain = pipeline.load(target), pipeline.load(target, noise_correction=False)
    theirs = folders.load_torch(target)
    theirs.scheduler = getattr(folders.diffusers, section["scheduler"]).from_config(
        theirs.scheduler.config, **section["from_config"]
    )
    for steps in (1, 2, 3):
        call, latents = section["calls"][str(steps)], folders.torch.tensor(START)
        expected = theirs(folders.PROMPTS, **call, latents=latents, output_type="np").images
        found = ours(folders.PROMPTS, steps=steps, latents=START)
        assert np.abs(found - expected).max() < 0.2 / 255
        if steps > 1:
            other = plain(folders.PROMPTS, steps=steps, latents=START)
            assert np.abs(other - expected).max() > 1 / 255


@pytest.mark.long
def test_a_call_that_a_student_was_not_made_for_is_said(tmp_path, capsys):
    target = written(tmp_path / "student")
    settings = pipeline.made_for(target)
    made = {"steps": 2, "guidance": None, "size": (48, 80)}
    assert pipeline.unlike(settings, **made) == ""
    assert pipeline.unlike({}, steps=9, guidance=7.5, size=(8, 8)) == ""
    other = {"steps": 9, "guidance": 7.5, "size": (64, 64)}
    assert pipeline.unlike(settings, **other) == (
        "made for 1 or 2 steps, not 9; guidance 1, not 7.5 (it is distilled in); 48x80 pixels"
        " (height, width), not 64x64"
    )
    flags = [f"--model={target}", "--prompt=a cat", f"--out={tmp_path / 'x.npz'}"]
    sample.main(flags)
    assert np.load(tmp_path / "x.npz")["images"].shape == (1, 48, 80, 3)
    assert "warning" not in capsys.readouterr().err
    sample.main([*flags, "--steps=3"])
    error = capsys.readouterr().err
    assert error == f"warning: {target} was made for 1 or 2 steps, not 3\n"


def test_an_export_without_its_neighbour_is_told(tmp_path):
    target = tmp_path / "student"
    card = {"components": "../diffusers", "sampler": {"steps": 2}}
    checkpoint.export(target, {"w": jnp.zeros(2)}, {**card, "format": "jaxdistill-export/1"})
    with pytest.raises(FolderError, match=r"network alone, .* are not at .*/diffusers; copy that"):
        pipeline.load(target)
    written(tmp_path / "diffusers", clip_skip=1)
    assert pipeline.made_for(target)["width"] == 80
    assert pipeline.load(tmp_path / "diffusers").folder.clip_skip == 1
