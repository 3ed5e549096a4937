from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdistill.train import init_state, train_step


def noisy_loss(params, teacher, batch, key):
    value = jnp.sum((params["student"] - batch - 0.1 * jax.random.normal(key)) ** 2) + jnp.sum(params["discriminator"] ** 2)
    return value, {}


def make(ema_decay=0.9):
    tx = optax.adam(0.1)
    params = {"student": jnp.ones(3), "discriminator": jnp.ones(2)}
    student = lambda p: p["student"]  # noqa: E731
    state = init_state(params, tx, jax.random.key(0), ema_of=student)
    return state, partial(train_step, loss_fn=noisy_loss, tx=tx, ema_decay=ema_decay, ema_of=student)


def test_ema_is_of_the_student_alone_and_warms_up():
    state, step = make()
    expected = np.asarray(state.params["student"])
    for i in range(30):
        state, _ = step(state, jnp.zeros(3), None)
        decay = min(0.9, (1 + i) / (10 + i))
        expected = decay * expected + (1 - decay) * np.asarray(state.params["student"])
    assert state.ema_params.shape == (3,)
    np.testing.assert_allclose(state.ema_params, expected, rtol=1e-5)


def test_each_step_has_its_own_noise_and_repeats_bit_for_bit():
    state, step = make()
    step = jax.jit(step)
    first, second = step(state, jnp.zeros(3), None), step(state, jnp.zeros(3), None)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), first[0].params, second[0].params))
    frozen = first[0]._replace(params=state.params, opt_state=state.opt_state)
    assert step(frozen, jnp.zeros(3), None)[1]["loss"] != first[1]["loss"]


def test_the_state_may_be_donated():
    state, step = make()
    step = jax.jit(step, donate_argnums=0)
    for _ in range(3):
        state, metrics = step(state, jnp.zeros(3), None)
    assert int(state.step) == 3 and np.isfinite(float(metrics["grad_norm"]))
