"""Checks of a config that all tasks share, before any work."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxdistill.errors import choose
from jaxdistill.interop import card
from jaxdistill.methods.recipe import AdversarialSettings, StudentSettings
from jaxdistill.run.workdir import flatten

COUNTS = (
    "teacher.iterations",
    "teacher.steps",
    "student.health_every",
    "student.accumulate",
    "eval.samples",
    "eval.batch_size",
    "eval.unseen",
    "eval.diversity_captions",
    "log.every",
    "teacher.health_every",
    "log.checkpoint_every",
    "log.health_samples",
    "log.health_prompts",
    "log.batch_size",
    "log.teacher_steps",
    "adversarial.width",
    "adversarial.pool",
)
"""Keys whose values must be at least 1."""

REALS = "the teacher's images for the discriminator"
"""A cache that some tasks have, by its name for people."""

RATES = ("teacher.learning_rate", "adversarial.learning_rate")


def changed(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A locked copy of the config with dotted keys set, after references are resolved.

    Raises KeyError for a key that is not there.
    """
    copy = ConfigDict(config.to_dict())
    copy.lock()
    copy.update_from_flattened_dict(dict(changes))
    return copy


def check_config(config: ConfigDict) -> None:
    """Raise ValueError, in one line, for a number that cannot be."""
    flat = flatten(config.to_dict())
    for name, value in flat.items():
        if isinstance(value, float) and not np.isfinite(value):
            raise ValueError(f"config.{name} must be a finite number, got {value}")
    for name in ("seed", "eval.seed"):
        if name in flat and not 0 <= flat[name] < 2**32:
            raise ValueError(f"config.{name} must be in 0..{2**32 - 1}, got {flat[name]}")
    for name in COUNTS:
        if name in flat and flat[name] < 1:
            raise ValueError(f"config.{name} must be at least 1, got {flat[name]}")
    if flat.get("eval.repeats", 2) < 2:
        raise ValueError(
            f"config.eval.repeats must be at least 2, got {flat['eval.repeats']}: diversity is the"
            " distance of two images of one caption"
        )
    for name in RATES:
        if name in flat and not flat[name] > 0:
            raise ValueError(f"config.{name} must be above 0, got {flat[name]}")
    for name in ("teacher.ema_decay", "student.ema_decay"):
        if name in flat and not 0 <= flat[name] < 1:
            raise ValueError(f"config.{name} must be in [0, 1), got {flat[name]}")
    _check_student(config.student)
    _check_guidance(flat)
    low, high = config.adversarial.low, config.adversarial.high
    if not 0 <= low < high <= 1:
        raise ValueError(
            "config.adversarial needs 0 <= low < high <= 1 (shares of T), got"
            f" low={low:g}, high={high:g}"
        )
    choose({"data": 0, "teacher": 0}, config.adversarial.reals, "config.adversarial.reals")
    choose({"all": 0, "one": 0}, config.adversarial.states, "config.adversarial.states")


def _check_student(student: ConfigDict) -> None:
    """Raise ValueError for a student's block."""
    if not student.steps or min(student.steps) < 1:
        raise ValueError(
            f"config.student.steps must hold step counts of at least 1, got {tuple(student.steps)}"
        )
    if not 0 <= student.decay_to <= 1:
        raise ValueError(
            f"config.student.decay_to must be in [0, 1] (1: no decay), got {student.decay_to:g}"
        )
    if (student.iterations > 0) == (student.budget > 0):
        raise ValueError(
            "one of config.student.iterations and config.student.budget (in network calls) must be"
            f" above 0 and the other 0, got {student.iterations} and {student.budget}"
        )
    if student.batch_size % student.accumulate:
        raise ValueError(
            f"config.student.accumulate = {student.accumulate} must divide"
            f" config.student.batch_size = {student.batch_size}"
        )
    if student.lora_rank < 0:
        raise ValueError(
            "config.student.lora_rank must be at least 0 (0: train all weights), got"
            f" {student.lora_rank}"
        )


def _check_guidance(flat: Mapping[str, Any]) -> None:
    """Raise ValueError for a scale that cannot be, or that the teacher was not trained for."""
    drop_cond = flat.get("teacher.drop_cond", 1.0)  # a given teacher knows the null conditioning
    if not 0 <= drop_cond <= 1:
        raise ValueError(f"config.teacher.drop_cond must be in [0, 1], got {drop_cond}")
    chosen = f"methods.{flat['method.name']}."
    scales = [("teacher.guidance", flat["teacher.guidance"])]
    scales += [("eval.guidances", scale) for scale in flat.get("eval.guidances", ())]
    scales += [(k, v) for k, v in flat.items() if k.startswith(chosen) and k.endswith(".guidance")]
    for name, scale in scales:
        if scale < 0:
            raise ValueError(f"config.{name} must be at least 0 (1 = none), got {scale:g}")
        if scale != 1.0 and drop_cond == 0:
            raise ValueError(
                f"config.{name} = {scale:g} needs a teacher trained with config.teacher.drop_cond"
                " > 0"
            )


def student_settings(student: ConfigDict) -> StudentSettings:
    """What the methods know of config.student."""
    return StudentSettings(
        steps=tuple(student.steps),
        grid=student.grid,
        times=tuple(student.times),
        warmup=student.warmup,
        decay_to=student.decay_to,
        weight_decay=student.weight_decay,
        adam_b2=student.adam_b2,
    )


def adversarial_settings(block: ConfigDict) -> AdversarialSettings:
    """What the methods know of config.adversarial."""
    return AdversarialSettings(
        loss=block.loss,
        learning_rate=block.learning_rate,
        low=block.low,
        high=block.high,
        states=block.states,
    )


def check_frechet(config: ConfigDict, features: int, *names: str) -> None:
    """Raise ValueError where a count of images is too small for a distance of so many features."""
    for name in names:
        block, key = name.split(".")
        if config[block][key] <= features:
            raise ValueError(
                f"config.{name} = {config[block][key]} is too few for a Frechet distance of"
                f" {features} features; at least {features + 1} are needed"
            )


def check_grids(config: ConfigDict) -> None:
    """Raise ValueError for a grid that is not known, or one without its lists of times."""
    for phase, extra in (("teacher", ()), ("student", ("nested", "listed"))):
        known = dict.fromkeys((*extra, *card.GRIDS))
        choose(known, config[phase].grid, f"config.{phase}.grid")
    times = config.student.times
    if config.student.grid == "listed" and not all(isinstance(t, (list, tuple)) for t in times):
        raise ValueError(
            f"config.student.times = {times} with the grid 'listed' must hold a list for each"
            " number of steps, as ((1.0,), (1.0, 0.5))"
        )
