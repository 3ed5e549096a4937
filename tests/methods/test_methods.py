"""The competing methods on data with a known answer: x_0 ~ N(0, s²) in each element, whose exact
denoiser and flow are linear.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import compiled, make, make_adversary

from jaxdistill import schedule as schedules
from jaxdistill.adversarial import adversary, uniform_time
from jaxdistill.methods import add as adversarial_distillation
from jaxdistill.methods import direct as direct_module
from jaxdistill.methods import dmd2 as distribution_matching
from jaxdistill.methods import endpoint as endpoint_module
from jaxdistill.methods import lcm as consistency
from jaxdistill.methods import step_distillation as step_module
from jaxdistill.methods import tdm as trajectory_matching
from jaxdistill.methods.denoising import denoising
from jaxdistill.methods.dmd2 import matching_gradient
from jaxdistill.methods.imagine_flash import Reconstruction, imagine_flash
from jaxdistill.methods.lightning import lightning
from jaxdistill.methods.tdm import diffuse_on
from jaxdistill.model import Model
from jaxdistill.prediction import (
    Prediction,
    flow_prediction,
    v_prediction,
    x0_prediction,
    x0_target,
)
from jaxdistill.sampling import (
    boundary_function,
    consistency_function,
    renoise,
    rollout,
    start,
    trailing_grid,
)
from jaxdistill.schedule import cosine, flow
from jaxdistill.train import Objective, init_state, train_step


def loss_of(method):
    """The loss of a method that has a critic beside it."""
    return lambda *networks, **options: method(*networks, **options).loss


dmd2, tdm = map(compiled, map(loss_of, (distribution_matching.dmd2, trajectory_matching.tdm)))
add, direct = map(compiled, (adversarial_distillation.add, direct_module.direct))
step_distillation, endpoint = map(
    compiled, (step_module.step_distillation, endpoint_module.endpoint)
)
consistency_distillation = compiled(consistency.consistency_distillation)
COSINE = schedules.cosine()
S = 0.7
KEY = jax.random.key(3)
GRIDS = [np.asarray((1.0, 0.6, 0.3)[:n], np.float32) for n in (1, 2, 3)]


def expand(value):
    return value[:, None]


def exact(params, x, t, cond):
    """E[x_0 | x_t] = α s² x / (α² s² + σ²)."""
    a, sigma = expand(COSINE.alpha(t)), expand(COSINE.sigma(t))
    return a * S**2 * x / (a**2 * S**2 + sigma**2)


def flow_end(x, t):
    """Where the probability flow of x_t ends: x s / √(α² s² + σ²)."""
    a, sigma = (
        level if jnp.ndim(t) == 0 else expand(level) for level in (COSINE.alpha(t), COSINE.sigma(t))
    )
    return x * S / jnp.sqrt(a**2 * S**2 + sigma**2)


TEACHER = Model(exact, COSINE, x0_prediction)


def gaussian_batch(size=64):
    return {
        "x0": S * jax.random.normal(jax.random.key(1), (size, 8)),
        "cond": jnp.zeros(size, jnp.int32),
    }


def null(cond):
    return jnp.full_like(cond, 1)


def network(apply):
    return Model(apply, COSINE, x0_prediction)


# ------------------------------------------------------------------------------------------- direct


def test_direct_is_zero_for_a_student_that_draws_the_targets():
    noise = jax.random.normal(jax.random.key(2), (16, 8))
    batch = {"noise": noise, "target": 0.4 * noise, "x0": noise, "cond": jnp.zeros(16, jnp.int32)}
    # On the way x_t = (0.4 α + σ) x_T, so this student knows x_T at every state.
    right = network(lambda p, x, t, c: p * x / expand(0.4 * COSINE.alpha(t) + COSINE.sigma(t)))
    loss = direct(right, grids=GRIDS)
    assert float(loss({"student": jnp.float32(0.4)}, None, batch, KEY)[0]) < 1e-12
    value, gradient = jax.value_and_grad(lambda p: loss({"student": p}, None, batch, KEY)[0])(
        jnp.float32(0.5)
    )
    assert value > 1e-3 and gradient > 0


def test_direct_trains_each_state_without_a_gradient_through_the_way_there():
    noise = jax.random.normal(jax.random.key(2), (16, 8))
    batch = {"noise": noise, "target": 0.4 * noise, "x0": noise, "cond": jnp.zeros(16, jnp.int32)}
    student = network(lambda p, x, t, c: p * x)
    loss, p = direct(student, grids=GRIDS), jnp.float32(0.5)

    def by_hand(q):
        x, total = noise, 0.0
        for i, t in enumerate(jnp.asarray(GRIDS[-1])):
            total += jnp.mean((q * jax.lax.stop_gradient(x) - batch["target"]) ** 2)
            a, sigma = COSINE.alpha(t), COSINE.sigma(t)
            eps = noise if i == 0 else (x - a * p * x) / sigma
            if i < 2:
                s = jnp.asarray(GRIDS[-1])[i + 1]
                x = COSINE.alpha(s) * p * x + COSINE.sigma(s) * eps
        return total / 3

    np.testing.assert_allclose(
        jax.grad(lambda q: loss({"student": q}, None, batch, KEY)[0])(p),
        jax.grad(by_hand)(p),
        rtol=1e-5,
    )


# -------------------------------------------------------------------------------- step distillation


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_step_distillation_is_zero_for_the_student_that_takes_two_steps_in_one(steps):
    def ddim_factor(t, s):
        a = COSINE.alpha(t) * S**2 / (COSINE.alpha(t) ** 2 * S**2 + COSINE.sigma(t) ** 2)
        return COSINE.alpha(s) * a + COSINE.sigma(s) * (1 - COSINE.alpha(t) * a) / COSINE.sigma(t)

    def two_in_one(scale, x, t, cond):
        s = jnp.maximum(t - 1 / steps, 0.0)
        middle = t - 0.5 / steps
        x_s = ddim_factor(t, middle) * ddim_factor(middle, s)
        ratio = COSINE.sigma(s) / COSINE.sigma(t)
        return expand(scale * (x_s - ratio) / (COSINE.alpha(s) - ratio * COSINE.alpha(t))) * x

    loss = step_distillation(network(two_in_one), TEACHER, steps=steps, null_cond=null)
    values = [
        float(loss({"student": jnp.float32(scale)}, None, gaussian_batch(), KEY)[0])
        for scale in (1.0, 0.9, 1.1)
    ]
    assert values[0] < 1e-6 < 1e-4 < min(values[1:])


def test_step_distillation_guides_its_first_teacher():
    def conditional(params, x, t, cond):
        return expand(jnp.where(cond == 0, 0.5, 0.2)) * x

    def student(scale, x, t, cond):
        return scale * x

    # One step, one substep: x̃ is the teacher's own guided x̂0 = (0.2 + 2 (0.5 - 0.2)) x.
    loss = step_distillation(
        network(student),
        network(conditional),
        steps=1,
        substeps=1,
        null_cond=null,
        guidance_scale=2.0,
    )
    assert float(loss({"student": jnp.float32(0.8)}, None, gaussian_batch(), KEY)[0]) < 1e-10
    assert float(loss({"student": jnp.float32(0.5)}, None, gaussian_batch(), KEY)[0]) > 1e-3


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 1, "substeps": 0}])
def test_step_distillation_refuses_no_steps(options):
    with pytest.raises(ValueError, match="at least one step"):
        step_distillation(TEACHER, TEACHER, null_cond=null, **options)


# -------------------------------------------------------------------------------------- consistency


def test_consistency_function_is_the_identity_at_0_and_the_network_elsewhere():
    x = jnp.ones((2, 8))
    f = consistency_function(1.0)(lambda x, t: Prediction(0.3 * x, x))
    np.testing.assert_allclose(f(x, jnp.zeros(2)).x0, x)
    np.testing.assert_allclose(f(x, jnp.full(2, 0.5)).x0, 0.3 * x, rtol=1e-5)


def test_a_flow_networks_x0_is_a_consistency_function_as_it_is():
    x, t = jnp.ones((2, 8)), jnp.asarray([0.0, 0.5])

    def denoiser(x, t):
        return flow_prediction(jnp.sin(x + 1.0), x, 1.0 - t[:, None], t[:, None])

    f = boundary_function(flow(3.0), flow_prediction)(denoiser)
    np.testing.assert_array_equal(f(x, t).x0, denoiser(x, t).x0)
    np.testing.assert_array_equal(f(x, t).x0[0], x[0])  # the boundary condition
    other = boundary_function(cosine(), v_prediction)(denoiser)(x, t).x0
    np.testing.assert_array_equal(other, consistency_function(1.0)(denoiser)(x, t).x0)


def test_consistency_loss_vanishes_for_the_end_of_the_teachers_flow_as_intervals_shrink():
    student = network(lambda scale, x, t, cond: scale * flow_end(x, t))
    losses = {}
    for intervals in (10, 40, 160):
        loss = consistency_distillation(
            student, TEACHER, null_cond=null, guidance_scale=1.0, intervals=intervals, huber=0.0
        )
        params = {"student": jnp.float32(1.0), "target": jnp.float32(1.0)}
        losses[intervals] = float(loss(params, None, gaussian_batch(512), KEY)[0])
    # A DDIM step is off by O(1/n²).
    assert losses[10] / losses[40] > 8 and losses[40] / losses[160] > 8
    wrong = network(lambda scale, x, t, cond: scale * exact(None, x, t, cond))
    loss = consistency_distillation(
        wrong, TEACHER, null_cond=null, guidance_scale=1.0, intervals=160, huber=0.0
    )
    assert float(loss(params, None, gaussian_batch(512), KEY)[0]) > 20 * losses[160]


def test_consistency_target_is_the_moving_average_of_the_student():
    student = network(lambda p, x, t, cond: p * x)
    loss = consistency_distillation(student, TEACHER, null_cond=null, guidance_scale=1.0)
    tx = {"student": optax.sgd(0.1)}
    objective = Objective(loss, tx, averages={"target": ("student", 0.9)})
    state = init_state({"student": jnp.float32(0.2), "target": jnp.float32(0.8)}, tx, KEY)
    step = jax.jit(partial(train_step, objective=objective, ema_decay=0.9))
    for _ in range(3):
        before = state.params
        state, metrics = step(state, gaussian_batch(), None)
        assert state.params["student"] != before["student"]
        np.testing.assert_allclose(
            state.params["target"],
            0.9 * before["target"] + 0.1 * state.params["student"],
            rtol=1e-6,
        )
        np.testing.assert_allclose(metrics["loss"], metrics["consistency"], rtol=1e-6)


def test_consistency_loss_pulls_on_the_student_alone():
    loss = consistency_distillation(
        network(lambda p, x, t, cond: p * x), TEACHER, null_cond=null, guidance_scale=1.0
    )
    params = {"student": jnp.float32(0.2), "target": jnp.float32(0.8)}
    gradient = jax.grad(lambda p: loss(p, None, gaussian_batch(), KEY)[0])(params)
    assert float(gradient["target"]) == 0 != float(gradient["student"])


@pytest.mark.parametrize("options", [{"intervals": 1}, {"huber": -1.0}])
def test_consistency_refuses_settings_out_of_range(options):
    with pytest.raises(ValueError, match="needs intervals >= 2"):
        consistency_distillation(TEACHER, TEACHER, null_cond=null, guidance_scale=1.0, **options)


# ---------------------------------------------------------------------------- distribution matching


def moved(m):
    """The exact denoiser of N(m, s²)."""

    def apply(params, x, t, cond):
        mean = m if params is None else params
        a, sigma = expand(COSINE.alpha(t)), expand(COSINE.sigma(t))
        return mean + a * S**2 * (x - a * mean) / (a**2 * S**2 + sigma**2)

    return apply


def dmd2_gradient(student_mean, fake_mean, **options):
    def apply(params, x, t, cond):
        # One network serves as generator (a mean and a spread) and, told by its parameters, as the
        # fake score.
        generated = params["mean"] + S * x
        return jnp.where(params["score"] > 0, moved(0.0)(params["mean"], x, t, cond), generated)

    student = network(apply)
    loss = dmd2(
        student,
        network(moved(0.0)),
        grid=trailing_grid(1, 1.0),
        null_cond=null,
        guidance_scale=1.0,
        **options,
    )
    params = {
        "student": {"mean": jnp.float32(student_mean), "score": jnp.float32(0)},
        "fake": {"mean": jnp.float32(fake_mean), "score": jnp.float32(1)},
    }
    return jax.grad(lambda p: loss(p, None, gaussian_batch(512), KEY)[0])(params)


def test_dmd2_pulls_the_students_mean_to_the_teachers():
    assert float(dmd2_gradient(0.5, 0.5)["student"]["mean"]) > 0.05
    assert float(dmd2_gradient(-0.5, -0.5)["student"]["mean"]) < -0.05


def test_dmd2_leaves_a_student_alone_whose_fake_score_is_the_teachers():
    assert abs(float(dmd2_gradient(0.0, 0.0)["student"]["mean"])) < 1e-6


def test_dmd2s_fake_score_follows_the_student_and_nothing_else():
    for student, fake in ((0.5, 0.0), (-0.5, 0.0)):
        assert np.sign(float(dmd2_gradient(student, fake)["fake"]["mean"])) == np.sign(
            fake - student
        )
    assert abs(float(dmd2_gradient(0.5, 0.5)["fake"]["mean"])) < 0.05


def test_matching_gradient_is_scaled_by_the_students_error():
    x0, real, fake = jnp.full((2, 4), 3.0), jnp.full((2, 4), 1.0), jnp.full((2, 4), 2.0)
    np.testing.assert_allclose(matching_gradient(x0, real, fake), 0.5)


def test_dmd2s_backward_simulation_visits_the_students_own_states():
    seen = []

    def apply(params, x, t, cond):
        if isinstance(params, dict):
            seen.append(x)
        return 0.0 * x + (params["level"] if isinstance(params, dict) else 0.0)

    grid = np.float32([1.0, 0.5])
    loss = loss_of(distribution_matching.dmd2)(
        network(apply), network(apply), grid=grid, null_cond=null, guidance_scale=1.0
    )
    params = {"student": {"level": jnp.float32(5.0)}, "fake": {"level": jnp.float32(0.0)}}
    loss(params, None, gaussian_batch(4000), KEY)
    # The second call of the student is on states at random times: x_T, or 5 α + σ ε.
    states = np.asarray(seen[1])
    late = states[np.abs(states.mean(1)) > 1.7]
    assert 0.4 < len(late) / len(states) < 0.6
    np.testing.assert_allclose(late.mean(), 5 * COSINE.alpha(0.5), rtol=0.02)
    np.testing.assert_allclose(late.std(), COSINE.sigma(0.5), rtol=0.02)


def test_dmd2_refuses_a_bad_range():
    with pytest.raises(ValueError, match="0 <= low < high <= 1"):
        dmd2(
            TEACHER,
            TEACHER,
            grid=trailing_grid(1, 1.0),
            null_cond=null,
            guidance_scale=1.0,
            low=0.9,
            high=0.1,
        )


# ---------------------------------------------------------------------------------------------- add


def test_add_is_its_two_terms_each_pulling_on_its_own_player():
    model, teacher = make()
    adversary, heads = make_adversary(model, weight=0.3)
    network = Model(model.apply, COSINE, v_prediction)
    _, student = make(seed=4)
    batch = {"x0": jax.random.normal(jax.random.key(9), (6, 4, 4, 1)), "cond": jnp.arange(6) % 10}
    params = {"student": student, "discriminator": heads}
    grid = trailing_grid(4, 1.0)

    def run(distillation_weight):
        loss = add(
            network,
            network,
            grid=grid,
            adversary=adversary,
            null_cond=model.null_cond,
            distillation_weight=distillation_weight,
        )
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
            params, teacher, batch, KEY
        )

    ((with_term, metrics), (gradient, to_teacher)), ((without, _), (adversarial_only, _)) = (
        run(2.5),
        run(0.0),
    )
    np.testing.assert_allclose(with_term - without, 2.5 * metrics["distillation"], rtol=1e-4)
    assert metrics["distillation"] > 0
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(to_teacher))
    for a, b in zip(
        jax.tree.leaves(gradient["discriminator"]),
        jax.tree.leaves(adversarial_only["discriminator"]),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-7)
    assert (
        max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(adversarial_only["student"])) > 0
    )


def test_adds_distillation_is_the_alpha_weighted_error_to_the_teachers_guess():
    student = network(lambda p, x, t, cond: 0.0 * x + p)
    guess = network(lambda p, x, t, cond: 0.0 * x + 0.25)

    def silent(head_params, teacher_params, fake, fake_cond, real, real_cond, key):
        from jaxdistill.adversarial import AdversarialTerms

        return AdversarialTerms(jnp.zeros(()), jnp.zeros(()), {})

    loss = add(
        student,
        guess,
        grid=trailing_grid(1, 1.0),
        adversary=silent,
        null_cond=null,
        distillation_weight=1.0,
    )
    value, _ = loss(
        {"student": jnp.float32(1.25), "discriminator": {}}, None, gaussian_batch(4096), KEY
    )
    # E α_t over t uniform in [0.02, 1] for α = cos(π t / 2), times (1.25 - 0.25)².
    np.testing.assert_allclose(value, 2 / np.pi * (1 - np.sin(np.pi * 0.01)) / 0.98, rtol=0.02)


# ------------------------------------------------------------------------------------------ renoise


def test_renoising_sampler_draws_the_exact_marginals_from_an_exact_consistency_function():
    x_T = jax.random.normal(jax.random.key(5), (20_000, 4))
    denoiser = lambda x, t: Prediction(flow_end(x, t), x)  # noqa: E731
    state, trajectory = rollout(renoise(COSINE, KEY), denoiser, start(x_T), trailing_grid(4, 1.0))
    for t, x in zip(trajectory.t, trajectory.x, strict=True):
        np.testing.assert_allclose(
            x.std(), np.sqrt(COSINE.alpha(t) ** 2 * S**2 + COSINE.sigma(t) ** 2), rtol=0.02
        )
    np.testing.assert_allclose(state.x.std(), S, rtol=0.02)
    # Fresh each step: what is left of x_T in the result is small.
    assert abs(np.corrcoef(np.asarray(state.x).ravel(), np.asarray(x_T).ravel())[0, 1]) < 0.5
    again, _ = rollout(renoise(COSINE, KEY), denoiser, start(x_T), trailing_grid(4, 1.0))
    np.testing.assert_array_equal(state.x, again.x)


def test_renoise_with_a_key_a_row_draws_each_row_alone():
    keys = jax.random.split(KEY, 3)
    x_T = jax.random.normal(jax.random.key(5), (3, 4))

    def run(keys, x):
        denoiser = lambda x, t: Prediction(flow_end(x, t), x)  # noqa: E731
        return rollout(renoise(COSINE, keys), denoiser, start(x), trailing_grid(3, 1.0))[0].x

    whole = run(keys, x_T)
    np.testing.assert_allclose(run(keys[1:2], x_T[1:2]), whole[1:2], rtol=1e-6)
    np.testing.assert_allclose(run(keys[1], x_T[1:2]), whole[1:2], rtol=1e-6)
    assert not np.allclose(run(keys[0], x_T[1:2]), whole[1:2])


def test_renoise_refuses_times_of_each_example():
    with pytest.raises(ValueError, match="one time for the whole batch"):
        rollout(
            renoise(COSINE, KEY),
            lambda x, t: Prediction(x, x),
            start(jnp.zeros((2, 3))),
            np.float32([[1.0, 1.0], [0.5, 0.4]]),
        )


# ---------------------------------------------------------------------------------------------- tdm


def tdm_loss(grids=(2,), **options):
    def apply(params, x, t, cond):
        # A generator that knows its mean (x0 = m + s x at every time), or by its parameters a
        # score.
        return jnp.where(
            params["score"] > 0, moved(0.0)(params["mean"], x, t, cond), params["mean"] + S * x
        )

    student = network(apply)
    grids = [trailing_grid(n, 1.0) for n in grids]
    return tdm(
        student, network(moved(0.0)), grids=grids, null_cond=null, guidance_scale=1.0, **options
    )


def tdm_params(student_mean, fake_mean):
    return {
        "student": {"mean": jnp.float32(student_mean), "score": jnp.float32(0)},
        "fake": {"mean": jnp.float32(fake_mean), "score": jnp.float32(1)},
    }


def tdm_gradient(student_mean, fake_mean, grids=(2,), **options):
    loss = tdm_loss(grids, **options)
    return jax.grad(lambda p: loss(p, None, gaussian_batch(512), KEY)[0])(
        tdm_params(student_mean, fake_mean)
    )


@pytest.mark.costly
@pytest.mark.parametrize("grids", [(1,), (2,), (4,), (1, 2, 4, 4)])
def test_tdm_pulls_the_students_mean_to_the_teachers(grids):
    assert float(tdm_gradient(0.5, 0.5, grids)["student"]["mean"]) > 0.01
    assert float(tdm_gradient(-0.5, -0.5, grids)["student"]["mean"]) < -0.01


def test_tdm_leaves_a_student_alone_whose_fake_score_is_the_teachers():
    assert abs(float(tdm_gradient(0.3, 0.0)["student"]["mean"])) < 1e-6


def test_diffusing_on_ends_in_the_marginal_of_diffusing_at_once():
    x0, n = 0.8, 200_000
    s, tau = jnp.full(n, 0.3), jnp.full(n, 0.7)
    eps, more = jax.random.normal(jax.random.key(0), (2, n, 1))
    x_s = expand(COSINE.alpha(s)) * x0 + expand(COSINE.sigma(s)) * eps
    x_tau, b = diffuse_on(COSINE, x_s, more, s, tau)
    np.testing.assert_allclose(x_tau.mean(), COSINE.alpha(0.7) * x0, atol=0.01)
    np.testing.assert_allclose(x_tau.std(), COSINE.sigma(0.7), rtol=0.01)
    assert 0 < float(b[0, 0]) < float(COSINE.sigma(0.7))
    np.testing.assert_array_equal(diffuse_on(COSINE, x_s, more, s, s)[0], x_s)


def test_tdms_fake_score_is_best_where_it_is_the_score_of_the_trajectorys_own_states():
    """x_s ~ N(m, v) is Gaussian, so its x_τ has the score -(x_τ - a m) / (a² v + b²): any other
    slope or mean is worse.
    """
    grid = trailing_grid(2, 1.0)
    spread = 0.4

    def apply(params, x, t, cond):
        s = jnp.where(t > 0.5, 0.5, 0.0)
        at_s, sigma_s = COSINE.alpha(s), COSINE.sigma(s)
        at_t, sigma_t = COSINE.alpha(t), COSINE.sigma(t)
        a = at_t / at_s
        b2 = sigma_t**2 - (a * sigma_s) ** 2
        # The student: x0 = spread x, so from x_T at the first state v = (α spread + σ)², the second
        # state follows.
        first = (COSINE.alpha(0.5) * spread + COSINE.sigma(0.5)) ** 2
        v = jnp.where(t > 0.5, first, spread**2 * first)
        score = -x / expand(a**2 * v + b2)
        exact_fake = (x + expand(sigma_t**2) * params["slope"] * score) / expand(at_t)
        return jnp.where(params["score"] > 0, exact_fake + params["mean"], spread * x)

    loss = tdm(
        network(apply), network(moved(0.0)), grids=[grid], null_cond=null, guidance_scale=1.0
    )

    def fake_loss(slope, mean):
        fake = {"slope": jnp.float32(slope), "mean": jnp.float32(mean), "score": jnp.float32(1)}
        student = {"slope": jnp.float32(1), "mean": jnp.float32(0), "score": jnp.float32(0)}
        return float(
            loss({"student": student, "fake": fake}, None, gaussian_batch(2**14), KEY)[1]["fake"]
        )

    best = fake_loss(1.0, 0.0)
    assert best < min(
        fake_loss(0.9, 0.0), fake_loss(1.1, 0.0), fake_loss(1.0, 0.1), fake_loss(1.0, -0.1)
    )


def test_tdm_never_looks_at_data():
    loss, params = tdm_loss(), tdm_params(0.5, 0.1)
    batch = gaussian_batch()
    other = {**batch, "x0": batch["x0"] + 7.0}
    assert float(loss(params, None, batch, KEY)[0]) == float(loss(params, None, other, KEY)[0])


@pytest.mark.costly
@pytest.mark.parametrize("grids", [(2,), (1, 2), (2, 2, 1, 1)])
def test_tdms_shortcut_pulls_the_first_state_to_the_end_of_its_trajectory(grids):
    """x̂0 = p x at T and 0.3 x after: the end of two steps is 0.3 (α p + σ) x_T, and p = 0.3 σ / (1
    - 0.3 α) draws it at once.
    """
    a, sigma = float(COSINE.alpha(0.5)), float(COSINE.sigma(0.5))

    def apply(params, x, t, cond):
        return jnp.where(expand(t) >= 1.0, params * x, 0.3 * x)

    def gradient(p, shortcut):
        kept = [trailing_grid(n, 1.0) for n in grids]
        loss = tdm(
            network(apply),
            TEACHER,
            grids=kept,
            null_cond=null,
            guidance_scale=1.0,
            shortcut=shortcut,
        )
        params = {"student": jnp.float32(p), "fake": jnp.float32(0.1)}
        return float(
            jax.grad(lambda q: loss(q, None, gaussian_batch(2**12), KEY)[0])(params)["student"]
        )

    there = 0.3 * sigma / (1 - 0.3 * a)
    for p in (0.1, there, 0.6):
        expected = 2 * (p - 0.3 * (a * p + sigma))  # E x_T² = 1, and no gradient through the end
        np.testing.assert_allclose(
            gradient(p, 1.5) - gradient(p, 0.0), 1.5 * expected, rtol=0.06, atol=1e-5
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"low": 0.0}, "0 < low"),
        ({"high": 1.0}, "high < 1"),
        ({"grids": ()}, "at least one grid"),
        ({"shortcut": -1.0}, "shortcut must be at least 0"),
        ({"grids": (1,), "shortcut": 1.0}, "needs a grid of several steps"),
    ],
)
def test_tdm_refuses_what_it_cannot_train(options, words):
    with pytest.raises(ValueError, match=words):
        tdm_gradient(0.1, 0.1, **options)


# ----------------------------------------------------------------------------------------- endpoint


def switch(params, x, t, cond):
    """x̂0 = p x at T and 0.3 x after it."""
    return jnp.where(expand(t) >= 1.0, params * x, 0.3 * x)


@pytest.mark.parametrize("steps", [2, 3])
def test_endpoint_learns_the_map_from_noise_to_the_frozen_students_end(steps):
    """On an even grid from x_T = ε, with x̂0 = p x first: each state is a multiple of x_T, and so
    is the end.
    """
    grid, first = trailing_grid(steps, 1.0), 0.8
    at, x0, eps = 1.0, first, 1.0  # multiples of x_T; noise correction holds ε̂ = x_T at T
    for s in map(float, grid[1:]):
        at = float(COSINE.alpha(s)) * x0 + float(COSINE.sigma(s)) * eps
        x0 = 0.3 * at
        eps = (at - float(COSINE.alpha(s)) * x0) / float(COSINE.sigma(s))
    loss, batch = endpoint(network(switch), grid=grid), gaussian_batch(2**12)

    def value(p):
        return loss({"student": jnp.float32(p)}, jnp.float32(first), batch, KEY)[0]

    assert float(value(x0)) < 1e-12
    np.testing.assert_allclose(float(value(x0 + 0.5)), 0.25, rtol=0.06)  # E x_T² = 1
    np.testing.assert_allclose(float(jax.grad(value)(x0 + 0.5)), 1.0, rtol=0.06)


def test_endpoint_draws_a_fresh_noise_for_each_key_and_never_looks_at_data():
    loss, batch = endpoint(network(switch), grid=trailing_grid(2, 1.0)), gaussian_batch()
    found = [
        float(
            loss(
                {"student": jnp.float32(0.9)},
                jnp.float32(0.8),
                {**batch, "x0": batch["x0"] + shift},
                key,
            )[0]
        )
        for key, shift in ((KEY, 0.0), (KEY, 7.0), (jax.random.key(4), 0.0))
    ]
    assert found[0] == found[1] != found[2]


def test_endpoint_refuses_a_single_step():
    with pytest.raises(ValueError, match=r"needs a grid of several steps, got \[1.0\]"):
        endpoint(network(switch), grid=trailing_grid(1, 1.0))


# ---------------------------------------------------------------------------------------- lightning


def lightning_parts(keep_flow, student=0.3, head=0.0, **options):
    """A student x0 = p x, its teacher x0 = 0.5 x, features that are the input itself, one linear
    head.
    """
    seen = []

    def features(params, x, t, cond):
        seen.append(x)
        return [params * x]

    def heads(params, states, cond):
        assert states[0].shape[-1] == (16 if keep_flow else 8)
        return params * jnp.mean(states[0], axis=-1, keepdims=True)

    network_p = network(lambda p, x, t, cond: p * x)
    loss = lightning(
        network_p,
        network_p,
        steps=2,
        features=features,
        heads=heads,
        keep_flow=keep_flow,
        **options,
    )
    params = {"student": jnp.float32(student), "discriminator": jnp.float32(head)}
    teachers = {"previous": jnp.float32(0.5), "original": jnp.float32(1.0)}
    return loss, params, teachers, seen


def test_lightning_starts_at_the_coin_toss_and_gives_each_player_its_own_term():
    loss, params, teachers, _ = lightning_parts(keep_flow=True, student=0.3, head=0.2)
    gradient = jax.grad(lambda p, q: loss(p, q, gaussian_batch(), KEY)[0], argnums=(0, 1))(
        params, teachers
    )
    assert (
        float(jnp.abs(gradient[0]["student"])) > 0
        and float(jnp.abs(gradient[0]["discriminator"])) > 0
    )
    assert all(float(leaf) == 0 for leaf in jax.tree.leaves(gradient[1]))
    loss, params, teachers, _ = lightning_parts(keep_flow=True, head=0.0)
    np.testing.assert_allclose(
        loss(params, teachers, gaussian_batch(), KEY)[0], 3 * np.log(2), rtol=1e-5
    )


def test_lightnings_discriminator_sees_the_jump_only_where_the_flow_is_kept():
    for keep_flow, calls in ((True, 3), (False, 2)):
        loss, params, teachers, seen = lightning_parts(keep_flow)
        loss(params, teachers, gaussian_batch(), KEY)
        assert len(seen) == calls
    # Real and fake get the same noise: a student that jumps as its teacher does cannot be told from
    # it.
    loss, params, teachers, seen = lightning_parts(False, student=0.5, substeps=1)
    assert float(loss(params, teachers, gaussian_batch(), KEY)[1]["distance"]) < 1e-12
    np.testing.assert_allclose(seen[0], seen[1], atol=1e-6)


def test_lightnings_regression_is_the_squared_distance_of_the_jumps_ends():
    (plain, params, teachers, _), (with_term, *_) = (
        lightning_parts(True),
        lightning_parts(True, regression=2.0),
    )
    value, metrics = plain(params, teachers, gaussian_batch(), KEY)
    assert metrics["distance"] > 1e-3
    np.testing.assert_allclose(
        with_term(params, teachers, gaussian_batch(), KEY)[0] - value,
        2 * metrics["distance"],
        rtol=1e-4,
    )


@pytest.mark.parametrize("options", [{"substeps": 0}, {"spread": 1.5}, {"regression": -1.0}])
def test_lightning_refuses_settings_out_of_range(options):
    with pytest.raises(ValueError, match="lightning needs at least one step"):
        lightning_parts(True, **options)


# ------------------------------------------------------------------------------- discrete schedules


DISCRETE = schedules.ddpm(schedules.linear_betas(10, 0.02, 0.6))
TRAILING = [trailing_grid(n, 10.0, discrete=True) for n in (1, 2, 3)]


class Asked:
    """A model x0 = p x on a discrete schedule, with features, that remembers the times that its
    network is told, and the x of each.
    """

    def __init__(self):
        self.told = []
        self.model = Model(self.apply, DISCRETE, x0_prediction)
        self.adversary = adversary(
            lambda params, x, t, cond: [self.apply(params, x, t, cond)],
            lambda heads, states, cond: heads * states[0],
            schedule=DISCRETE,
            weight=0.1,
            noise_time=uniform_time(DISCRETE),
        )

    def apply(self, params, x, t, cond):
        jax.debug.callback(lambda t: self.told.extend(np.ravel(t)), t)
        return params * x


def flash_of(asked, shift=lambda t: 0.1 * t, **options):
    # Both gamma(t) and t/k are below 1 at the lowest time of the grid.
    reconstruction = Reconstruction(shift, steps=3, guidance_scale=2.0)
    return imagine_flash(
        asked.model,
        asked.model,
        grids=TRAILING,
        null_cond=null,
        reconstruction=reconstruction,
        adversary=asked.adversary,
        **options,
    )


GUIDED = {"null_cond": null, "guidance_scale": 2.0}
ON_INTEGERS = {
    "denoising": lambda a: denoising(
        a.apply, schedule=DISCRETE, target=x0_target, null_cond=null, time_skew=1.5
    ),
    "step_distillation": lambda a: step_module.step_distillation(
        a.model, a.model, steps=3, **GUIDED
    ),
    "lightning": lambda a: lightning(
        a.model,
        a.model,
        steps=3,
        features=lambda params, x, t, cond: [a.apply(params, x, t, cond)],
        heads=lambda heads, states, cond: heads * states[0],
    ),
    "lcm": lambda a: consistency.consistency_distillation(a.model, a.model, intervals=4, **GUIDED),
    "add": lambda a: adversarial_distillation.add(
        a.model, a.model, grid=TRAILING[-1], adversary=a.adversary, **GUIDED
    ),
    "dmd2": lambda a: loss_of(distribution_matching.dmd2)(
        a.model, a.model, grid=TRAILING[-1], adversary=a.adversary, **GUIDED
    ),
    "tdm": lambda a: loss_of(trajectory_matching.tdm)(a.model, a.model, grids=TRAILING, **GUIDED),
    "direct": lambda a: direct_module.direct(a.model, grids=TRAILING),
    "endpoint": lambda a: endpoint_module.endpoint(a.model, grid=TRAILING[-1]),
}
BETWEEN = {"imagine_flash": flash_of, "forward": partial(flash_of, backward=False)}


@pytest.mark.costly
@pytest.mark.parametrize("name", [*ON_INTEGERS, *BETWEEN])
def test_no_method_asks_a_discrete_network_at_times_it_was_not_trained_at(name):
    """The network is told t - 1, its training step. Imagine Flash's teacher alone is also asked
    between the steps.
    """
    asked = Asked()
    loss = {**ON_INTEGERS, **BETWEEN}[name](asked)
    size = 60
    batch = {**gaussian_batch(size), "noise": jnp.ones((size, 8)), "target": jnp.ones((size, 8))}
    names = ("student", "fake", "target", "discriminator")
    params = {name: jnp.float32(0.5) for name in names}
    teachers = {"previous": jnp.float32(0.5), "original": jnp.float32(0.5)}
    if name != "lightning":
        teachers = jnp.float32(0.5)
    if name == "denoising":
        params = jnp.float32(0.5)
    values = [jax.jit(loss)(params, teachers, batch, jax.random.key(seed))[0] for seed in range(10)]
    jax.effects_barrier()
    told = np.asarray(asked.told)
    assert np.isfinite(values).all() and len(told) and told.min() >= 0 and told.max() <= 9
    if name in ON_INTEGERS:
        np.testing.assert_array_equal(told, np.round(told))
    if name in ("denoising", "add", "dmd2", *BETWEEN):
        assert set(range(10)) <= set(told.tolist())


def test_a_shift_below_the_first_training_time_is_that_time():
    params = {name: jnp.float32(0.5) for name in ("student", "discriminator")}
    values = [
        jax.jit(flash_of(Asked(), shift))(params, jnp.float32(0.4), gaussian_batch(60), KEY)[0]
        for shift in (lambda t: 0.1 * t, lambda t: jnp.maximum(0.1 * t, 1.0))
    ]
    assert values[0] == values[1]


def test_times_with_substeps_are_refused_where_a_discrete_schedule_has_too_few():
    model = Model(exact, DISCRETE, x0_prediction)
    with pytest.raises(ValueError, match="steps must be at most 10, the times of a discrete"):
        step_module.step_distillation(model, model, steps=4, substeps=3, null_cond=null)
