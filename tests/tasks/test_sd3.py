"""Stable Diffusion 3 and 3.5 end to end: folders in, images and students as stock diffusers has
them.
"""

import folders
import numpy as np
import pytest
import sd3_folders

from jaxdistill.tasks.text_to_image import pipeline


def latents(pipe, size=(32, 32), count=2):
    shape = (count, pipe.network.in_channels, *(side // sd3_folders.FACTOR for side in size))
    return np.random.default_rng(0).standard_normal(shape, np.float32)


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
