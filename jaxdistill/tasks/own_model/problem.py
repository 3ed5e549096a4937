"""What a user gives to `distill`."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxdistill.adversarial import FeatureFn
from jaxdistill.errors import UserError
from jaxdistill.methods.recipe import AdversarialSettings
from jaxdistill.model import Model

Stream = Callable[[int], Any] | Iterator[Any]
"""Batches: i -> batch i, or an iterator."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is distilled.

    Attributes:
      model: the network, its schedule, and what its output means.
      params: the teacher's parameters, a pytree of arrays; used in float32.
      image_shape: of one image (or latent, or vector), without the batch.
      conds: batches of conditioning, pytrees whose leaves all have as many rows. The rows of the
        first are the batch size.
      null_cond: cond -> null conditioning of the same structure. Needed for guidance alone.
      images: batches (x0, cond) of data, x0 as the teacher was trained on. Without it, methods that
        learn from images get the teacher's own.
      features: (params, x, t, cond) -> the network's hidden states [b, ..., c], a list. Needed by
        methods with a discriminator.
    """

    model: Model
    params: Any
    image_shape: Sequence[int]
    conds: Stream
    null_cond: Callable[[Any], Any] | None = None
    images: Stream | None = None
    features: FeatureFn | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """How a student is trained, whatever the method.

    Attributes:
      steps: step counts that are served.
      iterations: of all stages together.
      seed: of all randomness.
      guidance: the teacher's scale, which methods follow where `settings` do not say.
      teacher_steps: network calls of its images: the health numbers', and those of the pool.
      pool: its images where a method learns from them.
      grid, times: of methods on a trajectory: "trailing", or "nested": the first N of `times`.
      warmup, decay_to, weight_decay, adam_b2: of AdamW. decay_to: share of the rate at its end.
      ema_decay: of the averages, which are the student.
      accumulate: micro-batches of a step.
      lora_rank: above 0: low-rank updates of `lora_targets` alone, regular expressions of the ends
        of layers' names. Needs Flax parameters {"params": ...} with kernels.
      adversarial, heads_width: of a discriminator.
      health_every: iterations between health numbers.
      unroll: programs hold a copy of the network for each step, instead of a loop.
    """

    steps: Sequence[int] = (1, 2, 3)
    iterations: int = 1000
    seed: int = 0
    guidance: float = 1.0
    teacher_steps: int = 50
    pool: int = 2048
    grid: str = "trailing"
    times: Sequence[float] = ()
    warmup: int = 50
    decay_to: float = 0.02
    weight_decay: float = 0.0
    adam_b2: float = 0.999
    ema_decay: float = 0.995
    accumulate: int = 1
    lora_rank: int = 0
    lora_targets: Sequence[str] = (".*",)
    adversarial: AdversarialSettings = dataclasses.field(default_factory=AdversarialSettings)
    heads_width: int = 128
    health_every: int = 200
    unroll: bool = False


def no_null(cond: Any) -> Any:
    """Raises UserError."""
    raise UserError("guidance other than 1 needs problem.null_cond: cond -> null conditioning")


def peeked(stream: Stream, name: str) -> tuple[Callable[[int], Any], Any]:
    """A stream as a function of i, and its first batch; an iterator goes on, whatever i is."""
    if not isinstance(stream, Iterator):
        return stream, checked(stream(0), name)
    first = checked(next(stream), name)
    source = itertools.chain([first], stream)

    def batch(i: int) -> Any:
        for item in source:
            return item
        raise UserError(
            f"problem.{name} ended too early; it must last for all iterations of all stages"
        )

    return batch, first


def checked(batch: Any, name: str) -> Any:
    """A batch that holds arrays with rows. Raises UserError."""
    if not (leaves := jax.tree.leaves(batch)) or not all(np.ndim(leaf) for leaf in leaves):
        raise UserError(f"problem.{name} must give batches of arrays with rows")
    return batch


def following(kind: Any, block: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """Settings whose `guidance`, here and in nested ones, is `scale` where they do not say."""
    found, defaults = dict(block), kind()
    for field in dataclasses.fields(kind):
        default = getattr(defaults, field.name)
        if field.name == "guidance":
            found.setdefault("guidance", scale)
        elif dataclasses.is_dataclass(default) and isinstance(found.get(field.name, {}), Mapping):
            found[field.name] = following(type(default), found.get(field.name, {}), scale)
    return found
