"""One training of a run: from its description to compiled programs, and through the loop."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import optax

from jaxdistill import partition
from jaxdistill.run.guard import DRIFT, GuardSettings
from jaxdistill.run.loop import HealthFn, Loop, Place, Trained, train_loop
from jaxdistill.train import Objective, TrainState, everything, init_state, train_step


@dataclasses.dataclass(frozen=True)
class Training:
    """One training.

    Attributes:
      name: of the phase; its curves and checkpoints have it.
      objective: losses and optimizers.
      params: () -> the first parameters; not called where there is a checkpoint.
      shapes: of the parameters (or any arrays like them).
      key: of its randomness.
      batches: i -> this process's rows of batch i, on the host.
      given: the loss's second argument, or its shapes where only programs are wanted.
      health: (averages, step) -> numbers. The averages are arrays of this process alone.
      steps: of training.
      health_every: steps.
      ema_decay: of the averages.
      ema_of: the part that is averaged.
      accumulate: micro-batches of a step.
      keep_best, guard, rank, mend, advice, examples, flops: as of `Loop`.
    """

    name: str
    objective: Objective
    params: Callable[[], Any]
    shapes: Any
    key: jax.Array
    batches: Callable[[int], Any]
    given: Any
    health: HealthFn
    steps: int
    health_every: int
    ema_decay: float
    ema_of: Callable[[Any], Any] = everything
    accumulate: int = 1
    keep_best: str = ""
    guard: GuardSettings | None = None
    rank: str = DRIFT
    mend: str = ""
    advice: str = ""
    examples: int = 0
    flops: float = 0.0


class Programs(NamedTuple):
    """What a phase compiles, and the shapes of its arguments with their places.

    start: (params, key=) -> state, each array made where it lives. step: (state, batch, given) ->
    (state, metrics).
    """

    start: Callable[..., TrainState]
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    state: TrainState
    given: Any


def programs(training: Training, layout: partition.Layout) -> Programs:
    """The jitted programs of a training on a mesh: what a run trains with and a plan compiles."""
    init = partial(init_state, tx=training.objective.tx, ema_of=training.ema_of)
    shapes = jax.eval_shape(init, training.shapes, key=jax.random.key(0))
    state = layout.describe(shapes)
    given = None if training.given is None else layout.describe(training.given)
    state_places, given_places = (jax.tree.map(lambda a: a.sharding, t) for t in (state, given))
    step = partial(
        train_step,
        objective=training.objective,
        ema_decay=training.ema_decay,
        ema_of=training.ema_of,
        accumulate=training.accumulate,
    )
    jitted = partition.jit_train_step(step, layout.mesh, state_places, given_places)
    return Programs(jax.jit(init, out_shardings=state_places), jitted, state, given)


def slowed(training: Training, rate: float) -> Training:
    """The training with `rate` of its learning rates; its state is the same."""

    def slower(tx: Any) -> Any:
        if isinstance(tx, Mapping):
            return {name: slower(own) for name, own in tx.items()}

        def update(grads: Any, state: Any, params: Any = None) -> Any:
            updates, state = tx.update(grads, state, params)
            return jax.tree.map(lambda a: rate * a, updates), state

        return optax.GradientTransformation(tx.init, update)

    objective = training.objective._replace(tx=slower(training.objective.tx))
    return dataclasses.replace(training, objective=objective)


def train(training: Training, place: Place) -> Trained:
    """Train on the mesh, from `training.params()` or the newest checkpoint.

    The averages of the result are arrays of this process alone: on its first device, or on the
    devices of `place.own`. Raises as `train_loop`.
    """
    layout, made = place.layout, programs(training, place.layout)
    local = partial(partition.local, mesh=place.own.mesh if place.own else None)
    loop = Loop(
        name=training.name,
        first=lambda: made.start(layout.place(training.params()), key=training.key),
        like=made.state,
        step=made.step,
        batches=lambda i: partition.put_batch(training.batches(i), layout.mesh),
        given=None if training.given is None else layout.place(training.given),
        health=lambda averages, step: training.health(local(averages), step),
        steps=training.steps,
        health_every=training.health_every,
        keep_best=training.keep_best,
        guard=training.guard,
        rank=training.rank,
        mend=training.mend,
        slower=lambda rate: programs(slowed(training, rate), layout).step,
        advice=training.advice,
        examples=training.examples,
        flops=training.flops,
    )
    found = train_loop(loop, place)
    return found._replace(state=found.state._replace(ema_params=local(found.state.ema_params)))
