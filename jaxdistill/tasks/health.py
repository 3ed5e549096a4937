"""The health line: the student's images on fixed noises against the teacher's on the same."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxdistill.metrics import distances
from jaxdistill.run import report
from jaxdistill.run.loop import HealthFn
from jaxdistill.run.report import counted
from jaxdistill.run.workdir import flatten, say

COLLAPSE = 0.8
"""A diversity below this share of the teacher's is told."""


def mend(config: ConfigDict) -> str:
    """What there is to change, of the method's own settings, where a student collapses."""
    name = config.method.name
    settings = flatten(config.methods.to_dict().get(name, {}))
    flat = {f"config.methods.{name}.{k}": v for k, v in settings.items()}
    found = [f"{k}=trajectory" for k, v in flat.items() if k.endswith(".noise") and v == "fresh"]
    found += [f"a lower {k}" for k, v in flat.items() if k.endswith("adversarial_weight") and v]
    found = found or [f"a lower {k}" for k in flat if k.endswith(".learning_rate")]
    return " or ".join(found) or "a lower learning rate"


class Health(NamedTuple):
    """What the health lines of a run compare.

    Attributes:
      reference: the teacher's images [n, h, w, c] in [0, 1].
      groups: int [n], of which those of one group differ by their noise alone, or should differ.
      draw: (trainable weights, step counts) -> {steps: images} of the same noises.
      folder: of the pictures.
      mend: what to change where the diversity falls.
      quick: images -> further numbers, as a Fréchet distance on validation.
      columns: of the picture.
      scale: of its pixels.
    """

    reference: np.ndarray
    groups: np.ndarray
    draw: Callable[[Any, Sequence[int]], Mapping[int, np.ndarray]]
    folder: Path
    mend: str
    quick: Callable[[np.ndarray], Mapping[str, float]] = lambda images: {}
    columns: int = 20
    scale: int = 4

    def of(self, phase: str, steps: Sequence[int], last: int) -> HealthFn:
        """The line of a phase that ends at `last`: it prints, warns of a collapse, saves a picture,
        and returns the numbers as {name_steps: value}.
        """
        before: dict[int, float] = {}

        def line(trained: Any, step: int) -> dict[str, float]:
            numbers: dict[str, float] = {}
            images = self.draw(trained, steps)
            for n, drawn in images.items():
                found = distances.health(drawn, self.reference, self.groups)
                found |= self.quick(drawn)
                text = ", ".join(f"{k} {v:.3f}" for k, v in found.items())
                say(f"health  {phase} {step}/{last}, {counted(n)}: {text}")
                numbers |= {f"{k}_{n}": v for k, v in found.items()}
            diversity = {n: numbers[f"diversity_{n}"] for n in images}
            if low := falling(diversity, before, ended=step >= last):
                warn(f"{phase} {step}/{last}", low, self.mend)
            before.update(diversity)
            columns = min(self.columns, len(self.reference))
            rows = [self.reference[:columns], *(drawn[:columns] for drawn in images.values())]
            path = self.folder / f"{phase}_{step:07d}.png"
            report.save_grid(path, np.concatenate(rows), columns=columns, scale=self.scale)
            return numbers

        return line


def falling(
    diversity: Mapping[int, float], before: Mapping[int, float], *, ended: bool
) -> dict[int, float]:
    """Of each step count's diversity, as a share of the teacher's, those that are low and do not
    rise, or low where training has ended.

    Few steps of the teacher are blurred, and so is the student at its start: while it recovers it
    is no collapse.
    """
    return {
        n: value
        for n, value in diversity.items()
        if value < COLLAPSE and (ended or value < before.get(n, 0.0) + 0.02)
    }


def warn(phase: str, low: Mapping[int, float], mend: str) -> None:
    """Tell of a diversity that is low. `phase`: with its step."""
    where = ", ".join(f"{counted(n)} ({value:.2f})" for n, value in low.items())
    say(
        f"warning: {phase}: diversity is below {COLLAPSE} of the teacher's at {where}; if it stays"
        f" low the student collapses: try {mend}"
    )
