"""Matched (ours): Imagine Flash, then TDM with its shortcut, then one step from several.

A regression blurs what is uncertain, and matching distributions sharpens it. From pure noise
everything is uncertain, and there matching finds the modes first. So one step learns from several:
while these are trained, its target is the end of their trajectory. Then a student of one step goes
on alone, towards what the student of several steps draws from fresh noises (`endpoint`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxdistill.errors import choose
from jaxdistill.methods import imagine_flash, tdm
from jaxdistill.methods.endpoint import endpoint
from jaxdistill.methods.recipe import Kit, Recipe, SamplerSpec, Stage
from jaxdistill.prediction import LossFn


@dataclass(frozen=True)
class Matching:
    """The second stage.

    Attributes:
      share: of the budget.
      grid: "listed" (`times`), "nested" (the trajectory's own) or "trailing"; also the student's.
      times: for each number of steps its times, shares of T.
      counts: steps of the trajectories that share a batch.
      shortcut: weight of the first state's distance to its trajectory's end.
      flash_weight: of Imagine Flash's loss at x_T beside the matching.
      learning_rate, fake_learning_rate, fake_updates, guidance: as of TDM.
    """

    share: float = 0.35
    grid: str = "trailing"
    times: Sequence[Sequence[float]] = ((1.0,), (1.0, 0.5), (1.0, 0.75, 0.5), (1.0, 0.75, 0.5, 0.3))
    counts: Sequence[int] = (2, 3)
    shortcut: float = 1.0
    flash_weight: float = 0.0
    learning_rate: float = 1e-4
    fake_learning_rate: float = 5e-4
    fake_updates: int = 1
    guidance: float = 1.0


@dataclass(frozen=True)
class One:
    """The third stage: a student of one step, from the one of so many; share 0 leaves it out."""

    share: float = 0.3
    steps: int = 3
    learning_rate: float = 3e-4


@dataclass(frozen=True)
class Settings:
    """The three stages; the first has what the others leave of the budget."""

    flash: imagine_flash.Settings = field(default_factory=imagine_flash.Settings)
    matching: Matching = field(default_factory=Matching)
    one: One = field(default_factory=One)


def check(kit: Kit, settings: Settings) -> None:
    """Raise ValueError for shares and counts that do not go together."""
    matching, one = settings.matching, settings.one
    if not (matching.share > 0 and one.share >= 0 and matching.share + one.share < 1):
        raise ValueError(
            "matching.share must be above 0, one.share at least 0 and their sum below 1 (the rest"
            f" is Imagine Flash's), got {matching.share:g} and {one.share:g}"
        )
    if one.share and 1 not in kit.steps:
        raise ValueError(
            f"one.share = {one.share:g} trains a student of one step, but config.student.steps ="
            f" {kit.steps} has no 1; set it to 0"
        )
    if matching.flash_weight < 0:
        raise ValueError(f"matching.flash_weight must be at least 0, got {matching.flash_weight:g}")
    several = [one.steps] if one.share else []
    counts = {
        "listed": [len(times) for times in matching.times],
        "nested": range(1, len(kit.student.times) + 1),
    }.get(matching.grid, [*matching.counts, *several])
    if lost := {*matching.counts, *several}.difference(counts):
        key = "matching.counts" if min(lost) in matching.counts else "one.steps"
        raise ValueError(
            f"{key} holds {min(lost)}, but the {matching.grid} times have no grid of that many; add"
            " one"
        )


def recipe(kit: Kit, settings: Settings) -> Recipe:
    """Three stages, or two. Raises ValueError."""
    flash, matching, one = settings.flash, settings.matching, settings.one
    correct = flash.noise_correction
    samplers = {
        "listed": SamplerSpec("ddim", "listed", tuple(matching.times), correct),
        "nested": SamplerSpec("ddim", "nested", tuple(kit.student.times), correct),
        "trailing": SamplerSpec("ddim", "trailing", (), correct),
    }
    sampler = choose(samplers, matching.grid, "matching.grid")
    check(kit, settings)
    first = imagine_flash.recipe(kit, flash).stages[0]
    losses = tdm.objectives(
        kit,
        tdm.Settings(
            learning_rate=matching.learning_rate,
            fake_learning_rate=matching.fake_learning_rate,
            fake_updates=matching.fake_updates,
            guidance=matching.guidance,
        ),
        kit.grids(sampler, matching.counts),
        shortcut=matching.shortcut,
    )
    loss = losses.loss
    if matching.flash_weight > 0:
        at_start = imagine_flash.loss_of(kit, flash, sampler, [1])
        loss = added(loss, at_start, weight=matching.flash_weight)
    stages = [
        first._replace(name="flash", share=1 - matching.share - one.share, serves=(), judged=True),
        Stage(
            "matching",
            loss,
            kit.optimizers(matching.learning_rate, fake=matching.fake_learning_rate),
            share=matching.share,
            serves=[n for n in kit.steps if n > 1 or not one.share],
            critic=losses.critic,
            critic_updates=matching.fake_updates - 1,
        ),
    ]
    if one.share:
        loss = endpoint(
            kit.network,
            grid=kit.grid(sampler, one.steps),
            correct_noise=correct,
            constrain=kit.constrain,
            unroll=kit.unroll,
        )
        optimizers = kit.optimizers(one.learning_rate)
        last = Stage("one", loss, optimizers, share=one.share, serves=[1], teacher="previous")
        stages.append(last)
    return Recipe(stages, sampler)


def added(first: LossFn, second: LossFn, *, weight: float) -> LossFn:
    """The first loss and `weight` times the second, each with a key of its own."""

    def loss(params: Any, teacher_params: Any, batch: Any, key: Any) -> tuple[Any, dict[str, Any]]:
        keys = jax.random.split(key)
        value, metrics = first(params, teacher_params, batch, keys[0])
        more, others = second(params, teacher_params, batch, keys[1])
        return value + weight * more, {**others, **metrics}

    return loss
