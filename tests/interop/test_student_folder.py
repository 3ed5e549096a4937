"""A student's folder as it is written, drawn by stock diffusers: whole images."""

import folders
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import sampling
from jaxdistill.interop import diffusers_folder, diffusers_scheduler
from jaxdistill.tasks.text_to_image import pipeline

START = np.random.default_rng(0).standard_normal((2, 4, 8, 8), np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("solver", diffusers_scheduler.STUDENT_SOLVERS)
@pytest.mark.parametrize("variant", ["sd", "sd2", "sdxl"])
def test_stock_diffusers_draws_a_students_images(variant, solver, tmp_path, monkeypatch):
    """1.x with eps, 2.x with v from zero terminal SNR, XL with eps: N steps without guidance, with
    nothing said of the timesteps.
    """
    source = diffusers_folder.open_folder(folders.folder(variant))
    config = diffusers_scheduler.student_config(source.scheduler, solver=solver)
    target = tmp_path / "student"
    diffusers_folder.save_student(
        source, target, diffusers_folder.load_params(source.unet), scheduler=config
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
