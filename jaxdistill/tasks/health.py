"""The health line: the student's images on fixed noises against the teacher's on the same."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxdistill.metrics import drift
from jaxdistill.run import report
from jaxdistill.run.guard import ERROR
from jaxdistill.run.loop import HealthFn
from jaxdistill.run.report import counted
from jaxdistill.run.workdir import say

SHOWN = ("diversity", "contrast", "saturation")
"""Of the numbers of `drift`, those that are printed."""


class Health(NamedTuple):
    """What the health lines of a run compare.

    Attributes:
      reference: the teacher's images [n, h, w, c] in [0, 1].
      groups: int [n], of which those of one group differ by their noise alone, or should differ.
      draw: (trainable weights, step counts) -> {steps: (images, their latents or None)} of the same
        noises.
      folder: of the pictures.
      latents: of the reference, where there are some.
      quick: images -> further numbers, as a Fréchet distance on validation.
      columns: of the picture.
      scale: of its pixels.
    """

    reference: np.ndarray
    groups: np.ndarray
    draw: Callable[[Any, Sequence[int]], Mapping[int, tuple[np.ndarray, Any]]]
    folder: Path
    latents: np.ndarray | None = None
    quick: Callable[[np.ndarray], Mapping[str, float]] = lambda images: {}
    columns: int = 20
    scale: int = 4

    def of(self, phase: str, steps: Sequence[int], last: int) -> HealthFn:
        """The line of a phase that ends at `last`: it prints, saves a picture, and returns the
        numbers as {name_steps: value} and {name_steps_error: its error}.
        """

        def line(trained: Any, step: int) -> dict[str, float]:
            numbers: dict[str, float] = {}
            pairs = self.draw(trained, steps)
            images = {n: drawn for n, (drawn, _) in pairs.items()}
            for n, (drawn, latents) in pairs.items():
                drifted = drift.of_images(drawn, self.reference, self.groups)
                found = {name: drifted[name].value for name in SHOWN if name in drifted}
                found["distance"] = float(np.sqrt(((drawn - self.reference) ** 2).mean()))
                found |= self.quick(drawn)
                text = ", ".join(f"{k} {v:.3f}" for k, v in found.items())
                say(f"health  {phase} {step}/{last}, {counted(n)}: {text}")
                numbers |= {f"{k}_{n}": v for k, v in found.items()}
                if latents is not None and self.latents is not None:
                    drifted |= drift.of_channels(latents, self.latents, self.groups)
                for name, number in drifted.items():
                    numbers |= {f"{name}_{n}": number.value, f"{name}_{n}{ERROR}": number.error}
            columns = min(self.columns, len(self.reference))
            rows = [self.reference[:columns], *(drawn[:columns] for drawn in images.values())]
            path = self.folder / f"{phase}_{step:07d}.png"
            report.save_grid(path, np.concatenate(rows), columns=columns, scale=self.scale)
            return numbers

        return line
