from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.train import gradient_of, init_state, train_step


def noisy_loss(params, teacher, batch, key):
    value = jnp.sum((params["student"] - batch - 0.1 * jax.random.normal(key)) ** 2) + jnp.sum(
        params["discriminator"] ** 2
    )
    return value, {}


def make(ema_decay=0.9):
    tx = optax.adam(0.1)
    params = {"student": jnp.ones(3), "discriminator": jnp.ones(2)}
    student = lambda p: p["student"]  # noqa: E731
    state = init_state(params, tx, jax.random.key(0), ema_of=student)
    return state, partial(
        train_step, loss_fn=noisy_loss, tx=tx, ema_decay=ema_decay, ema_of=student
    )


def test_ema_is_of_the_student_alone_and_warms_up():
    state, step = make()
    expected = np.asarray(state.params["student"])
    for i in range(30):
        state, _ = step(state, jnp.zeros(3), None)
        decay = min(0.9, (1 + i) / (10 + i))
        expected = decay * expected + (1 - decay) * np.asarray(state.params["student"])
    assert state.ema_params.shape == (3,)
    np.testing.assert_allclose(state.ema_params, expected, rtol=1e-5)


def test_programs_that_take_the_gradient_of_one_loss_trace_it_once():
    traced = []

    def loss(*inputs):
        traced.append(1)
        return noisy_loss(*inputs)

    (state, _), tx = make(), optax.adam(0.1)
    gradient_of(loss).lower(state.params, None, jnp.zeros(3), state.key)
    for decay in (0.5, 0.9):
        jax.jit(
            partial(train_step, loss_fn=loss, tx=tx, ema_decay=decay, ema_of=lambda p: p["student"])
        ).lower(state, jnp.zeros(3), None)
    assert len(traced) == 1


def test_each_step_has_its_own_noise_and_repeats_bit_for_bit():
    state, step = make()
    step = jax.jit(step)
    first, second = step(state, jnp.zeros(3), None), step(state, jnp.zeros(3), None)
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool((a == b).all()), first[0].params, second[0].params)
    )
    frozen = first[0]._replace(params=state.params, opt_state=state.opt_state)
    assert step(frozen, jnp.zeros(3), None)[1]["loss"] != first[1]["loss"]


def test_the_state_may_be_donated():
    state, step = make()
    step = jax.jit(step, donate_argnums=0)
    for _ in range(3):
        state, metrics = step(state, jnp.zeros(3), None)
    assert int(state.step) == 3 and np.isfinite(float(metrics["grad_norm"]))


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    """For a loss that draws no noise the mean over micro-batches is the whole batch's step,
    whatever their number.
    """

    def loss(params, teacher, batch, key):
        error = batch["x"] @ params["w"] - batch["y"]
        return jnp.mean(error**2), {"first": batch["x"][0, 0]}

    r = np.random.default_rng(0)
    batch = {
        "x": jnp.asarray(r.standard_normal((12, 3)), jnp.float32),
        "y": jnp.asarray(r.standard_normal(12), jnp.float32),
    }
    tx = optax.sgd(0.1)
    states = []
    for count in (1, 2, 4):
        state = init_state({"w": jnp.ones(3)}, tx, jax.random.key(0))
        state, metrics = train_step(
            state, batch, None, loss_fn=loss, tx=tx, ema_decay=0.5, accumulate=count
        )
        states.append((state.params["w"], metrics["loss"], metrics["grad_norm"]))
        np.testing.assert_allclose(
            metrics["first"], np.mean(batch["x"][:count, 0]), rtol=1e-5
        )  # micro-batch j holds rows j, j + count, ...
    for found in states[1:]:
        for a, b in zip(found, states[0], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)


def test_micro_batches_draw_noise_of_their_own():
    def loss(params, teacher, batch, key):
        return params["w"] * jnp.mean(jax.random.normal(key, batch["x"].shape)), {}

    tx, batch = optax.sgd(1.0), {"x": jnp.zeros((4, 2))}
    state = init_state({"w": jnp.float32(1.0)}, tx, jax.random.key(0))
    found, _ = train_step(state, batch, None, loss_fn=loss, tx=tx, ema_decay=0.5, accumulate=2)
    key = jax.random.fold_in(jax.random.key(0), 0)
    draws = [jax.random.normal(jax.random.fold_in(key, j), (2, 2)).mean() for j in range(2)]
    np.testing.assert_allclose(found.params["w"], 1 - np.mean(draws), rtol=1e-6)


@pytest.mark.parametrize("count", [0, 5])
def test_micro_batches_that_do_not_divide_are_refused(count):
    tx, batch = optax.sgd(1.0), {"x": jnp.zeros((4, 2))}
    state = init_state({"w": jnp.float32(1.0)}, tx, jax.random.key(0))
    with pytest.raises(
        ValueError,
        match=rf"accumulate = {count} must be at least 1 and divide the batch's rows \(4\)",
    ):
        train_step(
            state,
            batch,
            None,
            loss_fn=lambda *a: (a[0]["w"], {}),
            tx=tx,
            ema_decay=0.5,
            accumulate=count,
        )
