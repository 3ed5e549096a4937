from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.train import CRITIC, Objective, gradient_of, init_state, train_step


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
        train_step, objective=Objective(noisy_loss, tx), ema_decay=ema_decay, ema_of=student
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
        objective, student = Objective(loss, tx), lambda p: p["student"]
        step = partial(train_step, objective=objective, ema_decay=decay, ema_of=student)
        jax.jit(step).lower(state, jnp.zeros(3), None)
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
            state, batch, None, objective=Objective(loss, tx), ema_decay=0.5, accumulate=count
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
    found, _ = train_step(
        state, batch, None, objective=Objective(loss, tx), ema_decay=0.5, accumulate=2
    )
    key = jax.random.fold_in(jax.random.key(0), 0)
    draws = [jax.random.normal(jax.random.fold_in(key, j), (2, 2)).mean() for j in range(2)]
    np.testing.assert_allclose(found.params["w"], 1 - np.mean(draws), rtol=1e-6)


@pytest.mark.parametrize("count", [0, 5])
def test_micro_batches_that_do_not_divide_are_refused(count):
    tx, batch = optax.sgd(1.0), {"x": jnp.zeros((4, 2))}
    state = init_state({"w": jnp.float32(1.0)}, tx, jax.random.key(0))
    objective = Objective(lambda *a: (a[0]["w"], {}), tx)
    with pytest.raises(
        ValueError,
        match=rf"accumulate = {count} must be at least 1 and divide the batch's rows \(4\)",
    ):
        train_step(state, batch, None, objective=objective, ema_decay=0.5, accumulate=count)


# ------------------------------------------------------------------------------- several networks

RATES = {"student": 0.1, "fake": 0.25, "discriminator": 0.5}
KEY = jax.random.key(0)


def networks(**changes):
    return {name: jnp.full(2, 1.0 + i) for i, name in enumerate((*RATES, "target"))} | changes


def plain(names):
    return {name: optax.sgd(RATES[name]) for name in names}


def pull(*names):
    """A loss whose gradient is one for each of these networks, and which draws no noise."""

    def loss(params, teacher, batch, key):
        return sum(jnp.sum(params[name]) for name in names), {}

    return loss


def stepped(objective, params, batch=None, **options):
    """(networks, metrics) after one step with the given objective."""
    state = init_state(params, objective.tx, KEY, ema_of=lambda p: p["student"])
    options = {"ema_decay": 0.5, "ema_of": lambda p: p["student"], **options}
    step = jax.jit(partial(train_step, objective=objective, **options))
    found, metrics = step(state, jnp.zeros((4, 2)) if batch is None else batch, None)
    return {name: np.asarray(a) for name, a in found.params.items()}, metrics


def test_each_network_has_its_own_optimizer_and_one_without_stays():
    params = networks()
    found, _ = stepped(Objective(pull(*params), plain(RATES)), params)
    for name, rate in (RATES | {"target": 0.0}).items():
        np.testing.assert_allclose(found[name], params[name] - rate, rtol=1e-6, err_msg=name)


def test_an_optimizer_of_a_network_keeps_its_own_state():
    """Momentum of one, none of the other: after two steps of a gradient of one."""
    tx = {"student": optax.sgd(0.1), "fake": optax.sgd(0.1, momentum=0.5)}
    objective, params = Objective(pull("student", "fake"), tx), networks()
    state = init_state(params, tx, KEY)
    assert state.opt_state.keys() == tx.keys()
    for _ in range(2):
        state, _ = train_step(state, jnp.zeros((4, 2)), None, objective=objective, ema_decay=0.5)
    moved = {name: float((params[name] - state.params[name])[0]) for name in tx}
    assert moved == pytest.approx({"student": 0.1 * 2, "fake": 0.1 * (1 + 1.5)}, rel=1e-5)


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("updates", [1, 3])
def test_the_critic_is_updated_so_often_and_never_moves_the_student(updates, unroll):
    """Its loss reads the student, too, and the student's optimizer would take that gradient."""
    objective = Objective(
        loss=lambda params, teacher, batch, key: (0.0 * jnp.sum(params["student"]), {}),
        tx=plain(("student", "fake")),
        critic=pull("student", "fake", "discriminator"),  # of which the last has no optimizer
        critic_updates=updates,
        unroll=unroll,
    )
    params = networks()
    found, _ = stepped(objective, params)
    np.testing.assert_allclose(found["fake"], params["fake"] - 0.25 * updates, rtol=1e-6)
    for name in ("student", "discriminator", "target"):
        np.testing.assert_array_equal(found[name], params[name])


def test_the_loss_sees_the_critic_after_its_updates():
    objective = Objective(
        loss=lambda params, teacher, batch, key: (
            jnp.sum(params["student"] * jax.lax.stop_gradient(params["fake"])),
            {},
        ),
        tx=plain(("student", "fake")),
        critic=pull("fake"),
        critic_updates=2,
    )
    params = networks()
    found, _ = stepped(objective, params)
    after = params["fake"] - 0.25 * 2
    np.testing.assert_allclose(found["fake"], after, rtol=1e-6)
    np.testing.assert_allclose(found["student"], params["student"] - 0.1 * after, rtol=1e-6)


def noise_pull(name):
    """A loss whose gradient is a draw of the key."""

    def loss(params, teacher, batch, key):
        return jnp.sum(params[name] * jax.random.normal(key, (2,))), {}

    return loss


@pytest.mark.parametrize("unroll", [False, True])
def test_each_update_of_the_critic_has_a_key_of_its_own_that_is_not_the_losses(unroll):
    objective = Objective(
        loss=noise_pull("student"),
        tx=plain(("student", "fake")),
        critic=noise_pull("fake"),
        critic_updates=3,
        unroll=unroll,
    )
    params = networks()
    found, _ = stepped(objective, params)
    key = jax.random.fold_in(KEY, 0)
    keys = [jax.random.fold_in(jax.random.fold_in(key, CRITIC), j) for j in range(3)]
    draws = [np.asarray(jax.random.normal(k, (2,))) for k in (*keys, key)]
    assert len({draw.tobytes() for draw in draws}) == 4
    np.testing.assert_allclose(found["fake"], params["fake"] - 0.25 * sum(draws[:3]), rtol=1e-5)
    np.testing.assert_allclose(found["student"], params["student"] - 0.1 * draws[3], rtol=1e-5)


def test_the_critics_micro_batches_give_the_whole_batchs_updates():
    """Of losses without noise, whatever their number: also in the second update, which starts from
    the result of the first.
    """

    def error(name):
        return lambda params, teacher, batch, key: (jnp.mean((batch @ params[name]) ** 2), {})

    objective = Objective(
        loss=error("student"),
        tx=plain(("student", "fake")),
        critic=error("fake"),
        critic_updates=2,
    )
    batch = jnp.asarray(np.random.default_rng(0).normal(size=(12, 2)), jnp.float32)
    whole, *parts = [stepped(objective, networks(), batch, accumulate=n)[0] for n in (1, 2, 4)]
    assert not np.allclose(whole["fake"], networks()["fake"])
    for found in parts:
        for name, expected in whole.items():
            np.testing.assert_allclose(found[name], expected, rtol=1e-5, err_msg=name)


def test_the_critics_micro_batches_draw_noise_of_their_own():
    objective = Objective(
        loss=lambda params, teacher, batch, key: (0.0 * jnp.sum(params["student"]), {}),
        tx=plain(("student", "fake")),
        critic=noise_pull("fake"),
        critic_updates=1,
    )
    params = networks()
    found, _ = stepped(objective, params, accumulate=2)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(KEY, 0), CRITIC), 0)
    draws = [jax.random.normal(jax.random.fold_in(key, j), (2,)) for j in range(2)]
    expected = params["fake"] - 0.25 * np.mean(draws, axis=0)
    np.testing.assert_allclose(found["fake"], expected, rtol=1e-5)


def test_averages_are_the_exact_moving_average_of_their_source_after_each_step():
    """Without the warm-up of the exported average, and of the parameters after the update."""
    decay, tx = 0.9, plain(("student",))
    objective = Objective(noise_pull("student"), tx, averages={"target": ("student", decay)})
    state = init_state(networks(), tx, KEY)
    expected = np.asarray(state.params["target"])
    for _ in range(5):
        state, _ = train_step(state, jnp.zeros((4, 2)), None, objective=objective, ema_decay=0.5)
        expected = decay * expected + (1 - decay) * np.asarray(state.params["student"])
        np.testing.assert_allclose(state.params["target"], expected, rtol=1e-6)
