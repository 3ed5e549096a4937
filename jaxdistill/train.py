"""The training step that every method shares. Pure: no flags, files or logging."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxdistill.prediction import LossFn


class TrainState(NamedTuple):
    """All that training carries, arrays only. `key` never changes: step i uses fold_in(key, i)."""

    step: Array
    params: Any
    ema_params: Any
    opt_state: Any
    key: Array


def everything(params: Any) -> Any:
    """The default `ema_of`: average all parameters."""
    return params


def init_state(
    params: Any,
    tx: optax.GradientTransformation,
    key: Array,
    *,
    ema_of: Callable[[Any], Any] = everything,
) -> TrainState:
    """The state before step 0.

    `ema_of` picks the part of params that is averaged (the student, not its discriminator).
    """
    ema = jax.tree.map(
        jnp.array, ema_of(params)
    )  # a copy: the state is donated, and may not hold one buffer twice
    return TrainState(jnp.zeros((), jnp.int32), params, ema, tx.init(params), key)


def ema_decay_at(step: Int[Array, ""], decay: float) -> Float[Array, ""]:
    """min(decay, (1 + step)/(10 + step)): early steps forget the initialisation quickly."""
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


@lru_cache(maxsize=4)
def gradient_of(loss_fn: LossFn) -> jax.stages.Wrapped:
    """(params, teacher_params, batch, key) -> ((loss, metrics), gradient), traced once for all
    programs that ask for one loss's.
    """
    return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))


def train_step(
    state: TrainState,
    batch: Any,
    teacher_params: Any,
    *,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
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
      loss_fn: the method.
      tx: the optimizer of all of params.
      ema_decay: d, in [0, 1).
      ema_of: as given to `init_state`.
      accumulate: micro-batches whose gradients are averaged before the optimizer's step; must
        divide the batch.

    Returns:
      The state at step i + 1, and the metrics with `loss` and `grad_norm` added.
    """
    key = jax.random.fold_in(state.key, state.step)
    gradient = gradient_of(loss_fn)
    if accumulate == 1:
        (loss, metrics), grads = gradient(state.params, teacher_params, batch, key)
    else:
        (loss, metrics), grads = accumulated(
            gradient, state.params, teacher_params, batch, key, accumulate
        )
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = ema_decay_at(state.step, ema_decay)
    ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema_params, ema_of(params))
    metrics = metrics | {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    return TrainState(state.step + 1, params, ema, opt_state, state.key), metrics


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
