"""Checksums of a pipeline's weights: of its files, and of the LoRAs that are added to them."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jaxdistill.interop.diffusers_folder import Part
from jaxdistill.run import inputs
from jaxdistill.run.record_cache import key_of


class Checksums:
    """Of components; each file is read once."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], str] = {}

    def of(self, part: Part) -> str:
        """Of a component's weights, with what is added to them. Raises UserError."""
        if not part.updates:
            return self._of_files(part.files())
        if (key := _sources(part)) not in self._known:
            added = [[self._of_files(update.files), update.weight] for update in part.updates]
            self._known[key] = key_of(self._of_files(part.files()), added)
        return self._known[key]

    def input(self, part: Part) -> inputs.Input:
        """The same as something that a run reads."""
        files = [*part.files(), *(path for update in part.updates for path in update.files)]
        stamp = [inputs.files(files).stamp, [update.weight for update in part.updates]]
        return inputs.Input(stamp, partial(self.of, part))

    def know(self, part: Part, digest: str) -> None:
        """Take a component's checksum from where it is kept."""
        self._known[_sources(part)] = digest

    def _of_files(self, files: Sequence[Path]) -> str:
        if (name := tuple(files)) not in self._known:
            self._known[name] = inputs.hash_files(files)
        return self._known[name]


def weights_of(name: str) -> str:
    """What a run's inputs call the weights of the teacher's component."""
    return f"the teacher's {name} weights"


def _sources(part: Part) -> tuple[Any, ...]:
    """What a component is read from: its files, and LoRAs with their weights."""
    return (*part.files(), *((*update.files, update.weight) for update in part.updates))
