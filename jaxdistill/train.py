"""The training step that every method shares. Pure: no flags, files or logging."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxdistill.prediction import LossFn

Optimizer: TypeAlias = optax.GradientTransformation | Mapping[str, optax.GradientTransformation]
"""Of the whole tree of parameters, or {network: its own}: networks without one are not trained."""


class TrainState(NamedTuple):
    """All that training carries, arrays only. `key` never changes: step i uses fold_in(key, i)."""

    step: Array
    params: Any
    ema_params: Any
    opt_state: Any
    key: Array


class Objective(NamedTuple):
    """What one step of training does.

    Attributes:
      loss: lowered once a step.
      tx: the optimizer.
      critic: a loss of the networks other than "student" alone, lowered `critic_updates` times
        before `loss` on the same batch, each with a key of its own. Needs `tx` by network.
      critic_updates: see above.
      averages: {network: (source, d)}: after the step θ_network ← d θ_network + (1 - d) θ_source.
      unroll: repeat the critic's update in the program instead of looping over it.
    """

    loss: LossFn
    tx: Optimizer
    critic: LossFn | None = None
    critic_updates: int = 0
    averages: Mapping[str, tuple[str, float]] = {}
    unroll: bool = False


def everything(params: Any) -> Any:
    """The default `ema_of`: average all parameters."""
    return params


def student_of(params: Mapping[str, Any]) -> Any:
    """The network that is averaged and exported."""
    return params["student"]


def init_state(
    params: Any, tx: Optimizer, key: Array, *, ema_of: Callable[[Any], Any] = everything
) -> TrainState:
    """The state before step 0. `ema_of` picks the part of params that is averaged."""
    # A copy: the state is donated, and may not hold one buffer twice.
    ema = jax.tree.map(jnp.array, ema_of(params))
    if isinstance(tx, Mapping):
        opt_state: Any = {name: own.init(params[name]) for name, own in tx.items()}
    else:
        opt_state = tx.init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema, opt_state, key)


def ema_decay_at(step: Int[Array, ""], decay: float) -> Float[Array, ""]:
    """min(decay, (1 + step)/(10 + step)): early steps forget the initialisation quickly."""
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


@lru_cache(maxsize=4)
def gradient_of(loss_fn: LossFn) -> jax.stages.Wrapped:
    """(params, teacher_params, batch, key) -> ((loss, metrics), gradient), traced once for all
    programs that ask for one loss's.
    """
    return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))


def critic_gradient_of(critic: LossFn) -> Callable[..., Any]:
    """As `gradient_of`, of all networks but the student."""

    def of_others(others: Any, student: Any, *rest: Any) -> Any:
        return critic({**others, "student": jax.lax.stop_gradient(student)}, *rest)

    def gradient(params: Any, *rest: Any) -> Any:
        others = {name: tree for name, tree in params.items() if name != "student"}
        return jax.value_and_grad(of_others, has_aux=True)(others, params["student"], *rest)

    return gradient


def train_step(
    state: TrainState,
    batch: Any,
    teacher_params: Any,
    *,
    objective: Objective,
    ema_decay: float,
    ema_of: Callable[[Any], Any] = everything,
    accumulate: int = 1,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step and one EMA step: θ ← tx(∇loss), θ_ema ← d θ_ema + (1 - d) θ.

    Jit it with `donate_argnums=0`; the teacher is an argument, so that it is neither donated nor a
    constant.

    Args:
      state: at step i.
      batch: what the loss takes.
      teacher_params: the frozen teacher, or None.
      objective: the method.
      ema_decay: d, in [0, 1).
      ema_of: as given to `init_state`.
      accumulate: micro-batches whose gradients are averaged before the optimizer's step; must
        divide the batch.

    Returns:
      The state at step i + 1, and the metrics with `loss` and `grad_norm` added.
    """
    key = jax.random.fold_in(state.key, state.step)
    given = (teacher_params, batch)
    params, opt_state = state.params, state.opt_state
    if objective.critic is not None and objective.critic_updates:
        params, opt_state = _critic_updates(objective, params, opt_state, given, key, accumulate)
    gradient = gradient_of(objective.loss)
    (loss, metrics), grads = _gradients(gradient, params, given, key, accumulate)
    params, opt_state = _updated(objective.tx, grads, opt_state, params)
    for name, (source, d) in objective.averages.items():
        moved = jax.tree.map(lambda a, b, d=d: d * a + (1 - d) * b, params[name], params[source])
        params = {**params, name: moved}
    decay = ema_decay_at(state.step, ema_decay)
    ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema_params, ema_of(params))
    metrics = metrics | {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    return TrainState(state.step + 1, params, ema, opt_state, state.key), metrics


CRITIC = 0x637269
"""Names the critic's stream of keys."""


def _critic_updates(
    objective: Objective, params: Any, opt_state: Any, given: Any, key: Array, accumulate: int
) -> tuple[Any, Any]:
    """Parameters and optimizer state after all updates of the critic in one step."""
    assert objective.critic is not None
    gradient = critic_gradient_of(objective.critic)
    key = jax.random.fold_in(key, CRITIC)

    def update(carry: Any, j: Array) -> tuple[Any, None]:
        params, opt_state = carry
        _, grads = _gradients(gradient, params, given, jax.random.fold_in(key, j), accumulate)
        return _updated(objective.tx, grads, opt_state, params), None

    numbers = jnp.arange(objective.critic_updates)
    if objective.unroll:
        carry = (params, opt_state)
        for j in range(objective.critic_updates):
            carry, _ = update(carry, numbers[j])
        return carry
    return jax.lax.scan(update, (params, opt_state), numbers)[0]


def _updated(tx: Optimizer, grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
    """Parameters and optimizer state after one update; networks without an optimizer stay."""
    if not isinstance(tx, Mapping):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state
    params, opt_state = dict(params), dict(opt_state)
    for name, own in tx.items():
        if name in grads:
            updates, opt_state[name] = own.update(grads[name], opt_state[name], params[name])
            params[name] = optax.apply_updates(params[name], updates)
    return params, opt_state


def _gradients(
    gradient: Callable[..., Any], params: Any, given: Any, key: Array, accumulate: int
) -> Any:
    """What `gradient` gives, or its mean over micro-batches."""
    teacher_params, batch = given
    if accumulate == 1:
        return gradient(params, teacher_params, batch, key)
    return accumulated(gradient, params, teacher_params, batch, key, accumulate)


def accumulated(
    gradient: Callable[..., Any],
    params: Any,
    teacher_params: Any,
    batch: Any,
    key: Array,
    count: int,
) -> Any:
    """The mean over `count` micro-batches of what `gradient` (a value_and_grad with metrics) gives;
    one is in memory at a time.

    Micro-batch j holds rows j, j + count, ...: with a sharded batch each device keeps its own rows.
    Raises ValueError where `count` does not divide the rows.
    """
    rows = {leaf.shape[0] for leaf in jax.tree.leaves(batch)}
    if count < 1 or any(n % count for n in rows):
        raise ValueError(
            f"accumulate = {count} must be at least 1 and divide the batch's rows"
            f" ({', '.join(map(str, sorted(rows)))})"
        )
    parts = jax.tree.map(
        lambda a: a.reshape(a.shape[0] // count, count, *a.shape[1:]).swapaxes(0, 1), batch
    )

    def add(total: Any, item: Any) -> Any:
        j, part = item
        found = gradient(params, teacher_params, part, jax.random.fold_in(key, j))
        return jax.tree.map(lambda a, b: a + b / count, total, found), None

    first = jax.tree.map(lambda a: a[0], parts)
    zero = jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype),
        jax.eval_shape(gradient, params, teacher_params, first, key),
    )
    return jax.lax.scan(add, zero, (jnp.arange(count), parts))[0]
