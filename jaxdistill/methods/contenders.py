"""The few-step methods as the benchmark trains them: which loss, in which stages, with which
optimizers and sampler.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from jaxdistill import adversarial, sampling
from jaxdistill.interop import card
from jaxdistill.methods import imagine_flash as flash
from jaxdistill.methods.add import add
from jaxdistill.methods.direct import direct
from jaxdistill.methods.dmd2 import dmd2
from jaxdistill.methods.endpoint import endpoint
from jaxdistill.methods.lcm import consistency_distillation
from jaxdistill.methods.lightning import lightning
from jaxdistill.methods.step_distillation import step_distillation
from jaxdistill.methods.tdm import tdm
from jaxdistill.models.discriminator import FeatureHeads
from jaxdistill.prediction import LossFn
from jaxdistill.schedule import NoiseSchedule
from jaxdistill.tasks.labelled_images.experiment import (
    GAN_LOSSES,
    NOISE_SOURCES,
    SHIFTS,
    make_optimizer,
)


class Stage(NamedTuple):
    """One training of a student. `serves` are the step counts that its result is evaluated at.

    `teacher` is "teacher", "previous" or "both" (a dict "original", "previous"): what is passed as
    teacher_params. `data` is "scenes" or "pairs". With `pair_states` the discriminator sees the
    states of two inputs.
    """

    name: str
    loss: LossFn
    serves: Sequence[int]
    tx: optax.GradientTransformation
    share: float
    groups: Sequence[str] = ("student",)
    teacher: str = "teacher"
    data: str = "scenes"
    pair_states: bool = False


class Pairs(NamedTuple):
    """Teacher images from stored noises: the share of the budget that makes them, and the teacher's
    solver and steps.
    """

    share: float
    solver: str
    steps: int


def pairs_of(block: ConfigDict) -> Pairs:
    """The pairs of a method's settings. Raises ValueError."""
    if not 0 < block.pairs_share < 1:
        raise ValueError(f"pairs_share must be above 0 and below 1, got {block.pairs_share:g}")
    return Pairs(block.pairs_share, block.pairs_solver, block.pairs_steps)


class Method(NamedTuple):
    """Stages in order, each starting from the result of the one before, and how the student is
    sampled.
    """

    stages: Sequence[Stage]
    sampler: card.Sampler
    pairs: Pairs | None = None


class Setting:
    """What the contenders share: the networks, the grids, the adversarial term and the optimizers
    of one benchmark.
    """

    def __init__(
        self,
        config: ConfigDict,
        model: nn.Module,
        schedule: NoiseSchedule,
        parameterization: Any,
        constrain: sampling.Constrain,
        *,
        image_shape: Sequence[int],
        text: Mapping[str, Any],
    ) -> None:
        self.config, self.model, self.schedule, self.constrain = config, model, schedule, constrain
        self.image_shape, self.text = tuple(image_shape), dict(text)  # for the cards
        built: Any = model
        # Jitted, so that a loss of many calls traces the network once.
        self.network = flash.Model(jax.jit(built.apply), schedule, parameterization)
        self.null_cond: Any = built.null_cond
        self.features = jax.jit(partial(built.apply, features=True))
        self.heads = FeatureHeads(config.adversarial.width)
        self.steps = tuple(config.student.steps)

    def optimizer(
        self,
        block: ConfigDict,
        iterations: int,
        *,
        learning_rate: float | None = None,
        **others: optax.GradientTransformation,
    ) -> optax.GradientTransformation:
        """The student's AdamW with warm-up and cosine decay from `learning_rate` (the block's),
        beside other groups' optimizers.
        """
        rate = block.learning_rate if learning_rate is None else learning_rate
        schedule = {
            "iterations": iterations,
            "learning_rate": rate,
            "warmup": min(50, iterations // 10),
        }
        groups = {
            "student": make_optimizer({**schedule, "weight_decay": 0.0, "adam_b2": 0.999}),
            **others,
        }
        return optax.multi_transform(groups, {name: name for name in groups})

    def adversary(self, weight: float) -> Any:
        """The adversarial term that the methods share."""
        block = self.config.adversarial
        return adversarial.adversary(
            self.features,
            self.heads.apply,
            schedule=self.schedule,
            weight=weight,
            noise_time=adversarial.uniform_time(self.schedule, block.low, block.high),
            loss=card.choose(GAN_LOSSES, block.loss, "adversarial.loss"),
            constrain=self.constrain,
        )

    def discriminator_optimizer(self) -> optax.GradientTransformation:
        """Of the heads, in every method that has them."""
        return optax.adam(self.config.adversarial.learning_rate, b1=0.5)

    def fake_optimizer(self, block: ConfigDict) -> optax.GradientTransformation:
        """Of the fake score, in the methods that match distributions."""
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(block.fake_learning_rate))

    def trailing(self, steps: int) -> np.ndarray:
        """The trailing grid."""
        return sampling.trailing_grid(steps, self.schedule.T, discrete=self.schedule.discrete)

    def nested(self, block: ConfigDict) -> dict[str, Any]:
        """A sampler's grid whose N steps are the first N of the method's `times` (default:
        config.student.times).
        """
        return {"grid": "nested", "times": list(block.get("times", self.config.student.times))}

    def sampler(
        self, *, solver: str = "ddim", correct_noise: bool = False, **grid: Any
    ) -> card.Sampler:
        """A student's sampler with its card, by default on the trailing grid: 3 steps, or the most
        that it is trained for.
        """
        steps = max((n for n in self.steps if n <= 3), default=min(self.steps))
        block = {
            "solver": solver,
            "grid": "trailing",
            **grid,
            "steps": steps,
            "guidance": 1.0,
            "noise_correction": correct_noise,
        }
        return card.build_sampler(self.export_card("student", block))

    def export_card(self, role: str, sampler: Mapping[str, Any]) -> dict[str, Any]:
        """What an export says of itself."""
        config = self.config
        return {
            "format": card.FORMAT,
            "role": role,
            "model": config.model.to_dict(),
            "schedule": config.schedule.to_dict(),
            "prediction": config.prediction,
            "data": {"name": "scenes", "image_shape": list(self.image_shape), "range": [-1.0, 1.0]},
            "text": self.text,
            "sampler": dict(sampler),
        }


def flash_loss(
    setting: Setting,
    block: ConfigDict,
    sampler: card.Sampler,
    steps: Sequence[int],
    adversary: Any,
    *,
    shortcut: float = 0.0,
) -> LossFn:
    """Imagine Flash's loss for these step counts, with every part a setting."""
    shift = card.choose(SHIFTS, block.shift, "shift")(
        setting.schedule.T, **block.shift_settings.to_dict()
    )
    noise = card.choose(NOISE_SOURCES, block.noise, "noise") if block.srl else None
    return flash.imagine_flash(
        setting.network,
        setting.network,
        grids=[sampler.grid(n) for n in steps],
        null_cond=setting.null_cond,
        reconstruction=flash.Reconstruction(
            shift=shift,
            noise_source=noise,
            steps=block.teacher_steps,
            guidance_scale=block.guidance,
        ),
        backward=block.backward,
        whole_trajectory=block.whole_trajectory,
        correct_noise=block.noise_correction,
        adversary=adversary,
        adversary_states=block.adversary_states,
        shortcut=shortcut,
        constrain=setting.constrain,
        unroll=True,
    )


def imagine_flash_method(setting: Setting, block: ConfigDict, iterations: int) -> Method:
    """Imagine Flash."""
    sampler = setting.sampler(correct_noise=block.noise_correction, **setting.nested(block))
    adversary = (
        setting.adversary(block.adversarial_weight) if block.adversarial_weight > 0 else None
    )
    loss = flash_loss(setting, block, sampler, setting.steps, adversary, shortcut=block.shortcut)
    groups = ("student", "discriminator") if adversary else ("student",)
    others = {"discriminator": setting.discriminator_optimizer()} if adversary else {}
    stage = Stage(
        "", loss, setting.steps, setting.optimizer(block, iterations, **others), 1.0, groups
    )
    return Method([stage], sampler)


def direct_method(setting: Setting, block: ConfigDict, iterations: int) -> Method:
    """Direct distillation; half of the budget makes the pairs."""
    sampler = setting.sampler(correct_noise=True, **setting.nested(block))
    loss = direct(
        setting.network,
        grids=[sampler.grid(n) for n in setting.steps],
        constrain=setting.constrain,
        unroll=True,
    )
    stage = Stage("", loss, setting.steps, setting.optimizer(block, iterations), 1.0, data="pairs")
    return Method([stage], sampler, pairs_of(block))


def step_distillation_method(setting: Setting, block: ConfigDict, iterations: int) -> Method:
    """Halving from `block.first` steps down to 1; a step count that is no power of two is served by
    the next larger student.
    """
    wanted = setting.steps
    counts = [block.first]
    while counts[-1] > 1:
        counts.append(counts[-1] // 2)
    stages = []
    for i, count in enumerate(counts):
        loss = step_distillation(
            setting.network,
            setting.network,
            steps=count,
            null_cond=setting.null_cond,
            guidance_scale=block.guidance if i == 0 else 1.0,
            constrain=setting.constrain,
            unroll=True,
        )
        serves = [n for n in wanted if count // 2 < n <= count]
        stages.append(
            Stage(
                f"{count}",
                loss,
                serves,
                setting.optimizer(block, iterations),
                1 / len(counts),
                teacher="teacher" if i == 0 else "previous",
            )
        )
    return Method(stages, setting.sampler())


def consistency_method(setting: Setting, block: ConfigDict, iterations: int) -> Method:
    """LCM."""
    loss = consistency_distillation(
        setting.network,
        setting.network,
        null_cond=setting.null_cond,
        guidance_scale=block.guidance,
        intervals=block.intervals,
        huber=block.huber,
        target_decay=block.target_decay,
        constrain=setting.constrain,
    )
    tx = setting.optimizer(block, iterations, target=optax.sgd(1 - block.target_decay))
    return Method(
        [Stage("", loss, setting.steps, tx, 1.0, ("student", "target"))],
        setting.sampler(solver="consistency"),
    )


def add_method(setting: Setting, block: ConfigDict, iterations: int) -> Method:
    """ADD."""
    loss = add(
        setting.network,
        setting.network,
        grid=setting.trailing(max(setting.steps)),
        adversary=setting.adversary(block.adversarial_weight),
        null_cond=setting.null_cond,
        guidance_scale=block.guidance,
        distillation_weight=block.distillation_weight,
        constrain=setting.constrain,
    )
    tx = setting.optimizer(block, iterations, discriminator=setting.discriminator_optimizer())
    return Method(
        [Stage("", loss, setting.steps, tx, 1.0, ("student", "discriminator"))],
        setting.sampler(solver="renoise"),
    )


def dmd2_method(setting: Setting, block: ConfigDict, iterations: int) -> Method:
    """DMD2."""
    loss = dmd2(
        setting.network,
        setting.network,
        grid=setting.trailing(max(setting.steps)),
        null_cond=setting.null_cond,
        guidance_scale=block.guidance,
        adversary=(
            setting.adversary(block.adversarial_weight) if block.adversarial_weight > 0 else None
        ),
        constrain=setting.constrain,
    )
    others = {"fake": setting.fake_optimizer(block)}
    if block.adversarial_weight > 0:
        others["discriminator"] = setting.discriminator_optimizer()
    tx = setting.optimizer(block, iterations, **others)
    return Method(
        [Stage("", loss, setting.steps, tx, 1.0, ("student", *others))],
        setting.sampler(solver="renoise"),
    )


def lightning_method(setting: Setting, block: ConfigDict, iterations: int) -> Method:
    """SDXL-Lightning: squared error with guidance down to `block.first` steps, then adversarial
    stages of `block.counts` steps.

    Each adversarial stage has a half that keeps the flow and a relaxed one.
    """
    wanted = setting.steps
    first = step_distillation(
        setting.network,
        setting.network,
        steps=block.first,
        null_cond=setting.null_cond,
        guidance_scale=block.guidance,
        substeps=block.substeps,
        constrain=setting.constrain,
        unroll=True,
    )
    counts, rest = tuple(block.counts), 1 - block.first_share
    stages = [
        Stage(f"{block.first}", first, (), setting.optimizer(block, iterations), block.first_share)
    ]
    for i, count in enumerate(counts):
        larger = block.first if i == 0 else counts[i - 1]
        smaller = counts[i + 1] if i + 1 < len(counts) else 0
        served = [n for n in wanted if smaller < n and (n <= count or i == 0)]
        for keep_flow in (True, False):
            loss = lightning(
                setting.network,
                setting.network,
                steps=count,
                features=setting.features,
                heads=setting.heads.apply,
                substeps=larger // count,
                keep_flow=keep_flow,
                regression=block.regression,
                constrain=setting.constrain,
                unroll=True,
            )
            others = {"discriminator": setting.discriminator_optimizer()}
            tx = setting.optimizer(
                block, iterations, learning_rate=block.adversarial_learning_rate, **others
            )
            share = rest / (2 * len(counts))
            name = f"{count}-{'flow' if keep_flow else 'relaxed'}"
            serves = () if keep_flow else served
            stages.append(
                Stage(
                    name,
                    loss,
                    serves,
                    tx,
                    share,
                    ("student", "discriminator"),
                    "both",
                    pair_states=keep_flow,
                )
            )
    return Method(stages, setting.sampler())


def tdm_loss(
    setting: Setting, block: ConfigDict, grids: Sequence[np.ndarray], *, shortcut: float = 0.0
) -> LossFn:
    """TDM's loss on these grids."""
    return tdm(
        setting.network,
        setting.network,
        grids=grids,
        null_cond=setting.null_cond,
        guidance_scale=block.guidance,
        shortcut=shortcut,
        constrain=setting.constrain,
        unroll=True,
    )


def tdm_method(setting: Setting, block: ConfigDict, iterations: int) -> Method:
    """TDM."""
    loss = tdm_loss(setting, block, [setting.trailing(n) for n in setting.steps])
    tx = setting.optimizer(block, iterations, fake=setting.fake_optimizer(block))
    return Method([Stage("", loss, setting.steps, tx, 1.0, ("student", "fake"))], setting.sampler())


def matched_method(setting: Setting, block: ConfigDict, iterations: int) -> Method:
    """Ours: Imagine Flash, for `block.matching.share` of the budget TDM with its shortcut, and for
    `block.one.share` one step from several.

    A regression leaves soft what is uncertain, and matching distributions sharpens it; but where
    all is uncertain, in one step, matching finds the modes first. So one step learns from several.
    While these are trained its target is the end of their trajectory, `block.matching.shortcut`
    times (or as before it Imagine Flash's, `block.matching.flash_weight` times). Then a student of
    one step alone goes on from there, towards what the student of `block.one.steps` steps draws of
    fresh noises.
    """
    method, matching, one = (
        imagine_flash_method(setting, block, iterations),
        block.matching,
        block.one,
    )
    if not (matching.share > 0 and one.share >= 0 and matching.share + one.share < 1):
        raise ValueError(
            "matching.share must be above 0, one.share at least 0 and their sum below 1 (the rest"
            f" is Imagine Flash's), got {matching.share:g} and {one.share:g}"
        )
    if one.share and 1 not in setting.steps:
        raise ValueError(
            f"one.share = {one.share:g} trains a student of one step, but config.student.steps ="
            f" {setting.steps} has no 1; set it to 0"
        )
    if matching.flash_weight < 0:
        raise ValueError(f"matching.flash_weight must be at least 0, got {matching.flash_weight:g}")
    nested, listed = setting.nested(block), [list(times) for times in matching.times]
    # A sampler's grid, and the step counts that it has times for.
    grids: dict[str, tuple[dict[str, Any], Sequence[int]]] = {
        "listed": ({"grid": "listed", "times": listed}, [len(times) for times in listed]),
        "nested": (nested, range(1, len(nested["times"]) + 1)),
        "trailing": ({"grid": "trailing"}, matching.counts),
    }
    grid, there = card.choose(grids, matching.grid, "matching.grid")
    several = [one.steps] if one.share else []
    if lost := {*matching.counts, *several}.difference(there):
        key = "matching.counts" if min(lost) in matching.counts else "one.steps"
        raise ValueError(
            f"{key} holds {min(lost)}, but the {matching.grid} times have no grid of that many;"
            " add one"
        )
    sampler = setting.sampler(correct_noise=block.noise_correction, **grid)
    loss = tdm_loss(
        setting, matching, [sampler.grid(n) for n in matching.counts], shortcut=matching.shortcut
    )
    if matching.flash_weight > 0:
        loss = added(
            loss, flash_loss(setting, block, sampler, [1], None), weight=matching.flash_weight
        )
    tx = setting.optimizer(matching, iterations, fake=setting.fake_optimizer(matching))
    stages = [
        method.stages[0]._replace(name="flash", share=1 - matching.share - one.share, serves=()),
        Stage(
            "matching",
            loss,
            [n for n in setting.steps if n > 1 or not one.share],
            tx,
            matching.share,
            ("student", "fake"),
        ),
    ]
    if one.share:
        loss = endpoint(
            setting.network,
            grid=sampler.grid(one.steps),
            correct_noise=block.noise_correction,
            constrain=setting.constrain,
            unroll=True,
        )
        stages.append(
            Stage(
                "one", loss, [1], setting.optimizer(one, iterations), one.share, teacher="previous"
            )
        )
    return method._replace(sampler=sampler, stages=stages)


def added(first: LossFn, second: LossFn, *, weight: float) -> LossFn:
    """The first loss and `weight` times the second, each with a key of its own."""

    def loss(params: Any, teacher_params: Any, batch: Any, key: Any) -> tuple[Any, dict[str, Any]]:
        keys = jax.random.split(key)
        value, metrics = first(params, teacher_params, batch, keys[0])
        more, others = second(params, teacher_params, batch, keys[1])
        return value + weight * more, {**others, **metrics}

    return loss


METHODS: dict[str, Callable[[Setting, ConfigDict, int], Method]] = {
    "imagine_flash": imagine_flash_method,
    "matched": matched_method,
    "direct": direct_method,
    "step_distillation": step_distillation_method,
    "lcm": consistency_method,
    "add": add_method,
    "lightning": lightning_method,
    "dmd2": dmd2_method,
    "tdm": tdm_method,
}
