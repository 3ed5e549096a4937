"""FLUX.1 dev from a folder and prompts to a student that stock diffusers draws."""

import flux_folders
import folders
import jax.numpy as jnp
import numpy as np
import pytest
from test_distil import make_config

from configs import flux
from jaxdistill import main
from jaxdistill.interop import lora
from jaxdistill.tasks.text_to_image import pipeline
from jaxdistill.tasks.text_to_image.setup import TextSetup, open_teacher

SIZE = {"data.height": 32, "data.width": 48}


def tiny(tmp_path, variant="dev", **changes):
    """The text-to-image config of a tiny run on such a folder."""
    folder = str(flux_folders.folder(variant))
    return make_config(tmp_path, **{"teacher.folder": folder, **SIZE, **changes})


def starts():
    shape = (2, flux_folders.LATENTS, 4, 6)
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def drawn(pipe, steps, guidance):
    options = {"num_inference_steps": steps, "guidance_scale": guidance}
    return flux_folders.stock_images(pipe, folders.PROMPTS, starts(), **options)


def test_a_students_times_are_those_of_a_plain_call(tmp_path):
    """At each size its own shift, as the stock scheduler computes it from a plain call's sigmas."""
    for height, width in ((32, 48), (512, 512), (1024, 768)):
        config = tiny(tmp_path, **{"data.height": height, "data.width": width})
        setup = TextSetup(config, open_teacher(config))
        stock = folders.load_torch(flux_folders.folder("dev"))
        scheduler = stock.scheduler.from_config(setup.scheduler_config(setup.recipe.sampler))
        mu = diffusers_mu(stock, height * width // 256)
        for steps, grid in setup.grids.items():
            sigmas = np.linspace(1.0, 1 / steps, steps)
            scheduler.set_timesteps(sigmas=sigmas, mu=mu)
            found = setup.schedule.sigma(jnp.asarray(grid))
            np.testing.assert_allclose(found, scheduler.sigmas[:-1], rtol=1e-6)
            stock.scheduler.set_timesteps(sigmas=sigmas, mu=mu)
            np.testing.assert_allclose(found, stock.scheduler.sigmas[:-1], rtol=1e-6)


def diffusers_mu(pipe, tokens):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = pipe.scheduler.config
    sizes = (config.base_image_seq_len, config.max_image_seq_len)
    return calculate_shift(tokens, *sizes, config.base_shift, config.max_shift)


def test_the_published_config_names_layers_of_all_blocks(tmp_path):
    config = flux.get_config()
    config.teacher.folder = str(flux_folders.folder("dev"))
    config.update_from_flattened_dict(SIZE)
    setup = TextSetup(config, open_teacher(config))
    shapes = setup.distillation.trained_shapes
    assert {"transformer_blocks.0", "single_transformer_blocks.0:2"} == shapes.keys()
    assert len(shapes["single_transformer_blocks.0:2"]) == 3


@pytest.mark.long
def test_stock_diffusers_draws_our_students_images(tmp_path):
    """Teacher and student have one scale as an input."""
    main.run(tiny(tmp_path, **{"teacher.guidance": 3.5, "student.iterations": 3}), tmp_path / "run")
    theirs = folders.load_torch(tmp_path / "run" / "diffusers")
    ours = pipeline.load(tmp_path / "run" / "diffusers")
    assert (ours.steps, ours.guidance) == (3, 3.5)
    for steps in (1, 2, 3):
        expected = drawn(theirs, steps, 3.5)
        found = ours(folders.PROMPTS, steps=steps, latents=starts())
        assert np.abs(found - expected).max() < 1 / 255 and expected.std() > 0.02


@pytest.mark.long
def test_low_rank_updates_load_in_diffusers(tmp_path):
    """Of blocks that are trained as a loop: the teacher with the file is the student."""
    pytest.importorskip("peft")
    changes = {
        "student.lora_rank": 3,
        "student.lora_targets": flux.TARGETS,
        "compute.scan": True,
        "methods.imagine_flash.adversarial_weight": 0.0,
        "methods.imagine_flash.learning_rate": 3e-2,
    }
    config = tiny(tmp_path, "schnell", **changes)
    config.student.update({"iterations": 2, "steps": (1,)})
    main.run(config, tmp_path / "run")
    student = folders.load_torch(tmp_path / "run" / "diffusers")
    base = folders.load_torch(flux_folders.folder("schnell"))
    base.scheduler = student.scheduler
    expected, without = drawn(student, 2, 1.0), drawn(base, 2, 1.0)
    assert np.abs(without - expected).max() > 1 / 255
    base.load_lora_weights(tmp_path / "run" / "lora", weight_name=lora.FILE)
    assert np.abs(drawn(base, 2, 1.0) - expected).max() < 1 / 255
    ours = pipeline.load(tmp_path / "run" / "student")
    found = ours(folders.PROMPTS, steps=2, latents=starts())
    assert np.abs(found - expected).max() < 1 / 255
