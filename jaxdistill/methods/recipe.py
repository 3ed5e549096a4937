"""What a method is beyond its loss: stages, optimizers, and how its student is sampled."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import optax

from jaxdistill import adversarial
from jaxdistill.adversarial import Adversary, FeatureFn, HeadsFn
from jaxdistill.errors import choose
from jaxdistill.model import Model, trained
from jaxdistill.prediction import LossFn
from jaxdistill.sampling import Constrain, SamplerSpec, TimeGrid, unconstrained

GAN_LOSSES = {"hinge": adversarial.hinge, "non_saturating": adversarial.non_saturating}

Optimizers = Callable[[int], dict[str, optax.GradientTransformation]]
"""Iterations of a stage -> the optimizer of each network that it trains."""


# ------------------------------------------------------------------------------------------ recipes


class Stage(NamedTuple):
    """One training of a student.

    Attributes:
      name: within its method; "" for the only one.
      loss: (params, teacher_params, batch, key) -> (loss, metrics), params {network: parameters}.
      optimizers: of the networks that it trains: "student", "fake", "discriminator".
      share: of the budget that is left for training, in (0, 1].
      serves: the step counts that its result is for.
      judged: whether its health lines, at the most steps, say how good its result is, though that
        serves none: it may end, or be taken, by them.
      teacher: what the loss gets as teacher_params: "teacher", "previous" (the student of the stage
        before) or "both" ({"original", "previous"}).
      data: "noise" ("x0" gives the shape alone), "images" ("x0" is data) or "pairs" ("noise" and
        "target" beside "x0").
      critic: a loss of the other networks alone, lowered `critic_updates` times before `loss`.
      critic_updates: see above.
      averages: {network: (source, decay)}: networks that follow others.
      pair_states: the discriminator sees the hidden states of two inputs side by side.
    """

    name: str
    loss: LossFn
    optimizers: Optimizers
    share: float = 1.0
    serves: Sequence[int] = ()
    judged: bool = False
    teacher: str = "teacher"
    data: str = "noise"
    critic: LossFn | None = None
    critic_updates: int = 0
    averages: Mapping[str, tuple[str, float]] = {}
    pair_states: bool = False

    def seen(self, states: Sequence[Any]) -> Sequence[Any]:
        """Hidden states of one input as its discriminator sees them, for their shapes."""
        return adversarial.pair_states(states, states) if self.pair_states else states

    @property
    def networks(self) -> tuple[str, ...]:
        """All that the loss wants parameters of."""
        return (*self.optimizers(1), *self.averages)

    @property
    def reals(self) -> bool:
        """Whether a batch needs "real" and "real_cond" beside its noise."""
        return self.data == "noise" and "discriminator" in self.networks


class Pairs(NamedTuple):
    """Teacher images from stored noises: the share of a budget in network calls that makes them
    (or their `number`, if it is above 0), the teacher's solver and steps.
    """

    share: float
    number: int
    solver: str
    steps: int


class Recipe(NamedTuple):
    """Stages in order, each starting from the result of the one before; how the student is sampled.

    `learns_from`: the steps of the student that stands in the teacher's place, 0 for a teacher.
    """

    stages: Sequence[Stage]
    sampler: SamplerSpec
    pairs: Pairs | None = None
    learns_from: int = 0


def check_recipe(found: Any, steps: Sequence[int]) -> Recipe:
    """The recipe itself, where it can be trained for these step counts. Raises ValueError."""
    stages = found.stages if isinstance(found, Recipe) else None
    if not isinstance(stages, (list, tuple)) or not all(isinstance(s, Stage) for s in stages):
        raise ValueError(
            f"a recipe must return Recipe([Stage(...), ...], SamplerSpec(...)), got {found!r:.80}"
        )
    for stage in stages:
        where = f"Stage({stage.name!r})."
        choose(dict.fromkeys(("noise", "images", "pairs")), stage.data, f"{where}data")
        choose(dict.fromkeys(("teacher", "previous", "both")), stage.teacher, f"{where}teacher")
        if "student" not in stage.networks:
            raise ValueError(f"{where}optimizers must hold one of 'student'")
    if lost := set(steps).difference(*(stage.serves for stage in stages)):
        raise ValueError(
            f"no stage serves {min(lost)} steps; name them in Stage.serves (kit.steps: all)"
        )
    return found


# ------------------------------------------------------------------------ what a task offers to all


@dataclasses.dataclass(frozen=True)
class StudentSettings:
    """Of every method's student. `times` and `grid`: of the methods that train on a trajectory."""

    steps: Sequence[int] = (1, 2, 3)
    grid: str = "trailing"
    times: Sequence[Any] = ()
    warmup: int = 50
    decay_to: float = 0.02
    weight_decay: float = 0.0
    adam_b2: float = 0.999


@dataclasses.dataclass(frozen=True)
class AdversarialSettings:
    """Of every method's discriminator. low, high: its noise levels, shares of T. states: of a row's
    states, which it judges: "all", or "one" at random.
    """

    loss: str = "hinge"
    learning_rate: float = 1e-3
    low: float = 0.0
    high: float = 1.0
    states: str = "all"


@dataclasses.dataclass(frozen=True)
class Kit:
    """What a task offers to the methods: its network and what they share.

    Attributes:
      network: student, teacher and fake score are this one with their own parameters.
      null_cond: cond -> null conditioning of the same structure.
      grid: (sampler, steps) -> the times of a student; raises ValueError for what it cannot serve.
      features: the network's hidden states, for discriminators.
      heads: (head_params, states, cond) -> logits; their module is the task's.
      student: settings.
      adversarial: settings.
      constrain: sharding constraint of random batches.
      unroll: programs hold a copy of the network for each step, instead of a loop.
    """

    network: Model
    null_cond: Callable[[Any], Any]
    grid: Callable[[SamplerSpec, int], TimeGrid]
    features: FeatureFn
    heads: HeadsFn
    student: StudentSettings = StudentSettings()
    adversarial: AdversarialSettings = AdversarialSettings()
    constrain: Constrain = unconstrained
    unroll: bool = False

    @property
    def steps(self) -> tuple[int, ...]:
        """The step counts that a student serves."""
        return tuple(sorted(self.student.steps))

    def trajectory(self, *, noise_correction: bool, times: Sequence[Any] = ()) -> SamplerSpec:
        """The sampler of a method that trains on the student's own trajectory; `times` instead of
        the nested ones that all share.
        """
        student = self.student
        shared = tuple(times or student.times)
        return SamplerSpec("ddim", student.grid, shared, noise_correction)

    def grids(self, sampler: SamplerSpec, steps: Sequence[int] = ()) -> list[np.ndarray]:
        """The sampler's grids of these numbers of steps, by default of all that are served."""
        return [self.grid(sampler, n) for n in steps or self.steps]

    def adversary(self, weight: float) -> Adversary | None:
        """The adversarial term that the methods share; None for weight 0. Raises ValueError."""
        block = self.adversarial
        loss = choose(GAN_LOSSES, block.loss, "adversarial.loss")
        if weight < 0:
            raise ValueError(f"adversarial_weight must be at least 0 (0: off), got {weight:g}")
        if not weight:
            return None
        return adversarial.adversary(
            self.features,
            self.heads,
            schedule=self.network.schedule,
            weight=weight,
            noise_time=adversarial.uniform_time(self.network.schedule, block.low, block.high),
            loss=loss,
            constrain=self.constrain,
        )

    def adamw(self, learning_rate: float) -> Callable[[int], optax.GradientTransformation]:
        """Iterations -> the student's AdamW: clipped, warmed up, with a cosine decay.

        Raises ValueError for a rate that is not above 0.
        """
        if not learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {learning_rate:g}")
        student = self.student

        def optimizer(iterations: int) -> optax.GradientTransformation:
            warmup = min(student.warmup, iterations // 10)
            return adamw(
                learning_rate,
                iterations,
                warmup=warmup,
                decay_to=student.decay_to,
                b2=student.adam_b2,
                weight_decay=student.weight_decay,
            )

        return optimizer

    def optimizers(
        self, learning_rate: float, *, fake: float = 0.0, discriminator: bool = False
    ) -> Optimizers:
        """Of the student, and where asked of a fake score (its rate) and of the discriminator."""
        student = self.adamw(learning_rate)

        def make(iterations: int) -> dict[str, optax.GradientTransformation]:
            made = {"student": student(iterations)}
            if fake:
                made["fake"] = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(fake))
            if discriminator:
                made["discriminator"] = optax.adam(self.adversarial.learning_rate, b1=0.5)
            return made

        return make


def adamw(
    learning_rate: float,
    iterations: int,
    *,
    warmup: int,
    decay_to: float = 1 / 50,
    b2: float = 0.999,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW with gradients clipped at norm 1, a linear warm-up, and a cosine to `decay_to` of the
    rate.
    """
    length = max(iterations, warmup + 1)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, warmup, length, decay_to * learning_rate
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=b2, weight_decay=weight_decay, mask=trained),
    )


# ----------------------------------------------------------------------------------------- settings


def settings_from(kind: Any, block: Mapping[str, Any], where: str) -> Any:
    """A settings dataclass from a config's block; nested dataclasses from nested blocks.

    Raises ValueError for a key that it does not have, naming those it has, and for a field without
    a default.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    missing = dataclasses.MISSING
    for name, field in fields.items():
        if field.default is missing and field.default_factory is missing:
            raise ValueError(f"{where}: {kind.__module__}.{kind.__name__}.{name} needs a default")
    if unknown := [key for key in block if key not in fields]:
        raise ValueError(f"{where} has no setting {unknown[0]!r}; it has {', '.join(fields)}")
    values = {}
    for key, value in block.items():
        default = getattr(kind(), key)
        nested = dataclasses.is_dataclass(default)
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        values[key] = settings_from(type(default), value, f"{where}.{key}") if nested else value
    return kind(**values)


def settings_block(settings: Any) -> dict[str, Any]:
    """A settings dataclass as a config's block."""
    return dataclasses.asdict(settings)
