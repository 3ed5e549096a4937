"""Stock diffusers and this package draw the same images from a student's folder: `python
tests/against_diffusers.py FOLDER`.

One to three steps, from given noise, with nothing said of the sampler; exit code 1 where any pixel
is 1/255 apart.
"""

import sys

import folders
import numpy as np

from jaxdistill.tasks.text_to_image import pipeline


def main(folder: str) -> None:
    pipe, theirs = pipeline.load(folder), folders.load_torch(folder)
    start = np.random.default_rng(0).standard_normal((2, 4, 8, 8), np.float32)
    for steps in (1, 2, 3):
        expected = folders.torch_images(theirs, latents=start, steps=steps, guidance=1.0)
        error = np.abs(
            pipe(folders.PROMPTS, height=64, width=64, steps=steps, latents=start) - expected
        ).max()
        print(
            f"{type(theirs).__name__} with {type(theirs.scheduler).__name__}, {steps} steps:"
            f" {255 * error:.4f}/255 apart"
        )
        if not error < 1 / 255 or expected.std() < 0.02:
            sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
