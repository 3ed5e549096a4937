"""What is distilled and how it is judged: one folder a task."""

import importlib
from typing import Any

from ml_collections import ConfigDict

from jaxdistill.errors import choose

TASKS = {
    "labelled_images": ("jaxdistill.tasks.labelled_images.task", "LabelledImages"),
    "scenes": ("jaxdistill.tasks.scenes.task", "Scenes"),
    "text_to_image": ("jaxdistill.tasks.text_to_image.task", "TextToImageTask"),
}
"""Name in a config -> module and class. Imported on demand: their libraries differ."""


def open_task(config: ConfigDict, *, share: Any = None) -> Any:
    """The task of a config, checked; nothing heavy is computed, nothing is written. `share`:
    another one whose data and programs serve as well (see `tasks.small`).

    Raises ValueError in one line for what cannot be, ModuleNotFoundError where an extra is not
    installed.
    """
    make = _class_of(config)
    return make(config) if share is None else make(config, share=share)


def plan_task(config: ConfigDict, devices: Any = None) -> Any:
    """The same for its cost alone, as if on other devices: so many, or those.

    Raises as `open_task`.
    """
    return _class_of(config).planned(config, devices)


def _class_of(config: ConfigDict) -> Any:
    module, name = choose(TASKS, config.get("task", ""), "config.task")
    return getattr(importlib.import_module(module), name)
