from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from small import COSINE, NESTED, SHAPE, batch, compiled, ddim_step, make, make_adversary, predict

from jaxdistill import sampling, schedule
from jaxdistill.adversarial import AdversarialTerms
from jaxdistill.methods import imagine_flash as flash_module
from jaxdistill.methods import trajectories
from jaxdistill.methods.imagine_flash import (
    Reconstruction,
    fresh_noise,
    initial_noise,
    trajectory_noise,
)
from jaxdistill.model import Model
from jaxdistill.prediction import (
    Prediction,
    as_denoiser,
    expand,
    flow_prediction,
    v_prediction,
    x0_prediction,
)

KEY = jax.random.key(5)
flash = compiled(small.flash)


def drawn_noise(size=6):
    return jax.random.normal(jax.random.split(KEY, 4)[0], (size, *SHAPE))


def teacher_by_hand(model, teacher, x, t, cond, k, scale):
    """k DDIM steps over t, t(k-1)/k, ..., t/k; the last gives x0."""
    times = [t * j / k for j in range(k, 0, -1)]
    for i, time in enumerate(times):
        x0, eps = predict(model, teacher, x, time, cond)
        if scale != 1.0:
            null_x0, null_eps = predict(model, teacher, x, time, model.null_cond(cond))
            x0, eps = null_x0 + scale * (x0 - null_x0), null_eps + scale * (eps - null_eps)
        if i + 1 < k:
            x = ddim_step(x0, eps, times[i + 1])
    return x0


def loss_by_hand(model, student, teacher, data, *, grid, shift, source, k, scale):
    """Backward distillation with SRL as the paper's equations say it, in Python loops."""
    noise = drawn_noise(len(data["x0"]))
    x, losses, visited = noise, [], []
    for i, t in enumerate(grid):
        x0, eps = predict(model, student, jax.lax.stop_gradient(x), t, data["cond"])
        visited.append((x, x0, eps))
        if i + 1 < len(grid):
            x = ddim_step(x0, noise if i == 0 else eps, grid[i + 1])
    fresh = jax.random.normal(
        jax.random.fold_in(jax.random.split(KEY, 4)[2], 0), (len(grid), *noise.shape)
    )
    for i, t in enumerate(grid):
        x, x0, eps = visited[i]
        with jax.ensure_compile_time_eval():
            gamma = float(shift(jnp.asarray(t)))
        if source is None:
            start, gamma = x, t
        else:
            start = ddim_step(
                x0,
                {"trajectory": noise if i == 0 else eps, "initial": noise, "fresh": fresh[i]}[
                    source
                ],
                gamma,
            )
        target = teacher_by_hand(model, teacher, start, gamma, data["cond"], k, scale)
        losses.append(jnp.mean((jax.lax.stop_gradient(target) - x0) ** 2))
    return sum(losses) / len(losses)


@pytest.mark.costly
@pytest.mark.parametrize("source", [None, "trajectory", "initial", "fresh"])
@pytest.mark.parametrize(("k", "scale"), [(1, 1.0), (3, 1.0), (2, 1.5)])
def test_loss_and_gradient_equal_the_equations_written_out(source, k, scale):
    model, teacher = make()
    _, student = make(seed=4)
    shift = flash_module.power_shift(1.0, strength=0.3, power=2.0)
    sources = {
        None: None,
        "trajectory": trajectory_noise,
        "initial": initial_noise,
        "fresh": fresh_noise,
    }
    loss_fn = flash(model, reconstruction=Reconstruction(shift, sources[source], k, scale))
    ours = jax.value_and_grad(lambda p: loss_fn({"student": p}, teacher, batch(), KEY)[0])(student)
    grid = [float(t) for t in NESTED[-1]]
    expected = partial(loss_by_hand, model, grid=grid, shift=shift, source=source, k=k, scale=scale)
    by_hand = jax.jit(jax.value_and_grad(expected))(student, teacher, batch())
    np.testing.assert_allclose(ours[0], by_hand[0], rtol=2e-5)
    for a, b in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(by_hand[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4 * float(jnp.abs(b).max()) + 1e-7)


def as_flow(model, flow):
    """The same denoiser in a flow schedule: the same (x0, eps) at the same log-SNR."""
    time = schedule.same_log_snr(flow, COSINE)
    flow = flow._replace(network_time=lambda t: jnp.asarray(t, jnp.float32))

    def apply(params, x, t, cond):
        norm = expand(jnp.sqrt(flow.alpha(t) ** 2 + flow.sigma(t) ** 2), x)
        v = model.apply(params, x / norm, time(t), cond)
        alpha, sigma = expand(COSINE.alpha(time(t)), x), expand(COSINE.sigma(time(t)), x)
        x0, eps = v_prediction(v, x / norm, alpha, sigma)
        return eps - x0

    return Model(apply, flow, flow_prediction)


@pytest.mark.costly
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_same_prediction_at_the_same_log_snr_has_the_same_target_on_any_schedule(shift):
    model, teacher = make()
    _, student = make(seed=4)
    power = flash_module.power_shift(1.0, strength=0.3, power=2.0)
    flow = schedule.flow(shift)
    carry = schedule.same_log_snr(COSINE, flow)
    grids = [np.asarray(carry(jnp.asarray(grid))) for grid in NESTED]

    def loss(network, grids, **options):
        reconstruction = Reconstruction(power, steps=3, **options)
        loss_fn = flash_module.imagine_flash(
            network, network, grids=grids, null_cond=model.null_cond, reconstruction=reconstruction
        )
        return float(jax.jit(loss_fn)({"student": student}, teacher, batch(), KEY)[0])

    expected = loss(small.network(model), NESTED)
    carried = loss(as_flow(model, flow), grids, reference=COSINE)
    np.testing.assert_allclose(carried, expected, rtol=1e-4)
    own = loss(as_flow(model, flow), grids)
    assert abs(own - expected) > 2e-3 * expected  # the same shares of T are other noise levels


def test_a_reference_is_chosen_by_name_and_has_the_runs_own_result_on_itself():
    found = flash_module.reconstruction_of(flash_module.Settings(reference="cosine"), 1.0)
    plain = flash_module.reconstruction_of(flash_module.Settings(), 1.0)
    t = jnp.linspace(0.05, 1.0, 20)
    same = found.carried(COSINE, found.shift)(t)
    np.testing.assert_allclose(same, plain.shift(t), rtol=1e-5)
    # Stable Diffusion's gamma(T) = 0.87 T as a flow time: where alpha/sigma is that of its t = 870.
    sd = flash_module.reconstruction_of(flash_module.Settings(reference="scaled_linear"), 1.0)
    (at,) = sd.carried(schedule.flow(), sd.shift)(jnp.ones(1))
    ddpm = schedule.ddpm(schedule.scaled_linear_betas())
    np.testing.assert_allclose((1 - at) / at, ddpm.alpha(870.0) / ddpm.sigma(870.0), rtol=1e-4)
    # A shift of 3 and a third of the signal: gamma is at the same share of the shifted schedule.
    settings = flash_module.Settings(reference="scaled_linear", reference_snr=1 / 3)
    moved = flash_module.reconstruction_of(settings, 1.0)
    shifted = moved.carried(schedule.flow(3.0), moved.shift)(t)
    np.testing.assert_allclose(shifted, sd.carried(schedule.flow(), sd.shift)(t), rtol=1e-4)
    with pytest.raises(ValueError, match="reference"):
        flash_module.reconstruction_of(flash_module.Settings(reference="edm"), 1.0)
    with pytest.raises(ValueError, match="snr_scale must be above 0"):
        flash_module.reconstruction_of(settings.__class__(reference="flow", reference_snr=0.0), 1.0)


def test_a_second_order_teacher_comes_nearer_to_its_own_limit():
    model, teacher = make()
    _, student = make(seed=4)

    def loss(k, solver=sampling.ddim):
        reconstruction = Reconstruction(lambda t: 0.8 * t, steps=k, solver=solver)
        return float(
            flash(model, grids=[NESTED[0]], reconstruction=reconstruction)(
                {"student": student}, teacher, batch(), KEY
            )[0]
        )

    limit = loss(200)
    assert abs(loss(8, sampling.dpm_solver_pp_2m) - limit) < 0.3 * abs(loss(8) - limit)


def test_one_random_step_agrees_with_the_whole_trajectory():
    model, teacher = make()
    _, student = make(seed=4)
    params = {"student": student}
    single = [np.asarray([1.0], np.float32)]
    options = {"reconstruction": Reconstruction(steps=2)}
    whole, one = (
        flash(model, grids=single, whole_trajectory=w, **options)(params, teacher, batch(), KEY)[0]
        for w in (True, False)
    )
    np.testing.assert_allclose(whole, one, rtol=1e-6)
    whole, one = flash(model, **options), flash(model, whole_trajectory=False, **options)
    keys = jax.random.split(jax.random.key(0), 400)
    means = [
        np.mean([float(f(params, teacher, batch(), k)[0]) for k in keys]) for f in (whole, one)
    ]
    np.testing.assert_allclose(means[1], means[0], rtol=0.05)


def test_teacher_gets_no_gradient_from_any_term():
    model, teacher = make()
    _, student = make(seed=4)
    adversary, heads = make_adversary(model)
    loss_fn = flash(model, adversary=adversary)
    grads = jax.grad(
        lambda t: loss_fn({"student": student, "discriminator": heads}, t, batch(), KEY)[0]
    )(teacher)
    assert all(not np.any(g) for g in jax.tree.leaves(grads))


def test_no_shift_with_the_trajectory_noise_is_no_srl():
    model, teacher = make()
    _, student = make(seed=4)
    plain, shifted = (
        flash(model, reconstruction=Reconstruction(noise_source=s, steps=3))
        for s in (None, trajectory_noise)
    )
    values = [f({"student": student}, teacher, batch(), KEY)[0] for f in (plain, shifted)]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-4)


def test_students_x0_along_a_nested_grid_is_each_shorter_samplers_image():
    model, params = make()
    noise = drawn_noise()
    denoiser = as_denoiser(
        model.apply, params, batch()["cond"], schedule=COSINE, parameterization=v_prediction
    )
    step = sampling.ddim(COSINE)
    visited = sampling.rollout(step, denoiser, sampling.start(noise), NESTED[-1])[1].x0
    for n, grid in enumerate(NESTED):
        np.testing.assert_allclose(
            sampling.rollout(step, denoiser, sampling.start(noise), grid)[0].x,
            visited[n],
            atol=1e-6,
        )


def test_prefixes_cost_nothing_and_other_grids_divide_the_batch():
    assert [len(g) for g in trajectories.unique_grids(NESTED)] == [3]
    trailing = [sampling.trailing_grid(n, 1.0) for n in (1, 2, 3)]
    assert [len(g) for g in trajectories.unique_grids(trailing)] == [3, 2]
    model, teacher = make()
    with pytest.raises(ValueError, match="batch size 5 must be a multiple of the 2 grids"):
        flash(model, grids=trailing)({"student": teacher}, teacher, batch(5), KEY)


def test_weight_scales_and_forward_distillation_reads_the_data():
    model, teacher = make()
    _, student = make(seed=4)
    one, two = (
        flash(model, weight=w)
        for w in (flash_module.uniform_weight, lambda t: 2.0 * jnp.ones_like(t))
    )
    params = {"student": student}
    np.testing.assert_allclose(
        2 * one(params, teacher, batch(), KEY)[0], two(params, teacher, batch(), KEY)[0], rtol=1e-6
    )
    other = batch() | {"x0": batch()["x0"] + 1.0}
    assert one(params, teacher, other, KEY)[0] == one(params, teacher, batch(), KEY)[0]
    forward = flash(model, backward=False)
    assert forward(params, teacher, other, KEY)[0] != forward(params, teacher, batch(), KEY)[0]


def test_regression_reaches_the_teachers_own_answer():
    """A student free at T learns the teacher's k-step image of the same noise: known for an exact
    Gaussian teacher.
    """
    mean, spread = 0.4, 0.5

    def exact(params, x, t, cond):
        a, s = COSINE.alpha(t)[:, None], COSINE.sigma(t)[:, None]
        x0 = mean + a * spread**2 / (a**2 * spread**2 + s**2) * (x - a * mean)
        return (a * x - x0) / jnp.maximum(s, 1e-6)

    def affine(params, x, t, cond):  # x0 = -v at T
        return -(params["scale"] * x + params["offset"])

    teacher_model = Model(exact, COSINE, v_prediction)
    student_model = teacher_model._replace(apply=affine)
    k, grid = 4, [np.asarray([1.0], np.float32)]
    plain = Reconstruction(noise_source=None, steps=k)
    loss_fn = flash_module.imagine_flash(
        student_model, teacher_model, grids=grid, null_cond=lambda c: c, reconstruction=plain
    )
    params = {"student": {"scale": jnp.zeros(()), "offset": jnp.zeros(())}}
    data = {"x0": jnp.zeros((256, 2)), "cond": jnp.zeros(256, jnp.int32)}
    gradient = jax.jit(jax.grad(lambda p, key: loss_fn(p, {}, data, key)[0]))
    for i in range(300):
        params = jax.tree.map(lambda p, g: p - 0.2 * g, params, gradient(params, jax.random.key(i)))
    denoiser = as_denoiser(
        exact, {}, None, schedule=COSINE, parameterization=teacher_model.parameterization
    )
    x = jnp.asarray([[0.0, 1.0]])
    answer = sampling.rollout(
        sampling.ddim(COSINE), denoiser, sampling.start(x), sampling.trailing_grid(k, 1.0)
    )[0].x[0]
    np.testing.assert_allclose(params["student"]["offset"], answer[0], atol=0.02)
    np.testing.assert_allclose(params["student"]["scale"], answer[1] - answer[0], atol=0.02)


@pytest.mark.parametrize(
    "shift",
    [
        flash_module.power_shift(1.0),
        flash_module.linear_shift(1.0),
        flash_module.table_shift(1.0, times=(0.2, 1.0), values=(0.4, 0.7)),
        flash_module.no_shift,
    ],
)
def test_shifts_are_monotone_jittable_and_inside(shift):
    t = jnp.linspace(0.01, 1.0, 50)
    values = np.asarray(jax.jit(shift)(t))
    assert (np.diff(values) >= 0).all() and values.min() > 0 and values.max() <= 1
    flash_module.check_shift(shift, NESTED[-1], 1.0)


@pytest.mark.parametrize(
    "make_shift",
    [
        lambda: flash_module.power_shift(1.0, strength=1.5),
        lambda: flash_module.linear_shift(1.0, high=1.2),
        lambda: flash_module.table_shift(1.0, times=(0.2, 1.0), values=(0.7, 0.4)),
        lambda: flash_module.mixed_noise(2.0),
    ],
)
def test_bad_plug_in_arguments_are_refused(make_shift):
    with pytest.raises(ValueError, match="needs"):
        make_shift()


@pytest.mark.parametrize(
    ("shift", "message"),
    [(lambda t: 2 * t, "must map times to"), (lambda t: 1.1 - t, "must not fall")],
)
def test_a_shift_that_leaves_the_range_or_falls_is_refused(shift, message):
    with pytest.raises(ValueError, match=message):
        flash(make()[0], reconstruction=Reconstruction(shift))


def test_one_compile_serves_all_steps():
    import optax

    from jaxdistill.train import Objective, init_state, train_step

    model, teacher = make()
    traces = []
    inner = flash(model)
    loss_fn = lambda *args: (traces.append(1), inner(*args))[1]  # noqa: E731
    tx = optax.adam(1e-3)
    state = init_state({"student": teacher}, tx, KEY)
    step = jax.jit(partial(train_step, objective=Objective(loss_fn, tx), ema_decay=0.9))
    losses = []
    for _ in range(4):
        state, metrics = step(state, batch(), teacher)
        losses.append(float(metrics["loss"]))
    assert len(traces) == 1
    assert len(set(losses)) == 4


def test_what_a_grid_may_not_hold():
    with pytest.raises(ValueError, match="must be finite"):
        sampling.check_grid(np.asarray([1.0, np.nan]), 1.0)
    assert sampling.check_grid(np.asarray([999.9995, 500.0]), 1000.0)[0] == 1000.0
    with pytest.raises(ValueError, match="at most 1000"):
        sampling.trailing_grid(2001, 1000.0, discrete=True)


def test_a_multistep_rollout_keeps_the_states_type():
    state = sampling.start(jnp.ones((2, 2), jnp.bfloat16))
    denoiser = lambda x, t: Prediction(jnp.ones((2, 2)), jnp.ones((2, 2)))  # noqa: E731
    final, _ = sampling.rollout(
        sampling.dpm_solver_pp_2m(COSINE), denoiser, state, sampling.trailing_grid(3, 1.0)
    )
    assert final.x.dtype == jnp.bfloat16


def test_guidance_takes_a_scale_for_each_example():
    x, scale = jnp.ones((3, 2, 3)), jnp.asarray([1.0, 2.0, 3.0])
    denoiser = lambda x, t: Prediction(jnp.arange(6.0).reshape(6, 1, 1) * jnp.ones_like(x), x)  # noqa: E731
    got = sampling.guidance(scale)(denoiser)(x, jnp.asarray(0.5)).x0
    np.testing.assert_allclose(
        got[:, 0, 0], [0.0, 1.0, 2.0]
    )  # 1 - 1, 3 - 2, 5 - 3: each row's null stands behind it


def test_grids_that_share_a_batch_walk_in_one_loop():
    """Each row visits its own grid's times in turn from fresh noise; the loss is the mean of the
    same states taken one by one.
    """
    grids = [np.asarray(g, np.float32) for g in ((1.0, 0.7, 0.2), (1.0, 0.5))]
    slots = trajectories.slots_of(grids, 6)
    np.testing.assert_array_equal(slots.t[:, :2].T, np.float32([[1.0, 0.7, 0.2], [1.0, 0.5, 1.0]]))
    np.testing.assert_array_equal(
        slots.t_next[:, :2].T, np.float32([[0.7, 0.2, 0.0], [0.5, 0.0, 0.5]])
    )
    np.testing.assert_array_equal(
        slots.restart[:, :2].T, [[True, False, False], [True, False, True]]
    )
    np.testing.assert_array_equal(slots.t[:, 2:4], slots.t[:, :2])

    model, params = make()
    teacher = make(seed=5)[1]
    key, data = jax.random.key(0), batch(6)
    reconstruction = Reconstruction(
        steps=1, noise_source=flash_module.trajectory_noise, shift=lambda t: 0.8 * t
    )
    loss_fn = flash(model, grids=grids, reconstruction=reconstruction)
    value, metrics = loss_fn({"student": params}, teacher, data, key)
    noise = jax.random.normal(jax.random.split(key, 4)[0], (3, 6, *data["x0"].shape[1:]))
    errors = {}
    for row in range(6):
        cond, x = data["cond"][row : row + 1], None
        x_T = None
        for s in range(3):
            t, t_next = float(slots.t[s, row]), float(slots.t_next[s, row])
            x_T = noise[s, row : row + 1] if slots.restart[s, row] else x_T
            x = x_T if slots.restart[s, row] else x
            x0, eps = predict(model, params, x, t, cond)
            eps = x_T if t == 1.0 else eps
            chi = ddim_step(x0, eps, 0.8 * t)
            errors[s, row] = float(
                jnp.mean((predict(model, teacher, chi, 0.8 * t, cond)[0] - x0) ** 2)
            )
            x = ddim_step(x0, eps, t_next)
    np.testing.assert_allclose(value, np.mean(list(errors.values())), rtol=1e-4)
    np.testing.assert_allclose(
        metrics["reconstruction/2_2"], np.mean([errors[1, r] for r in (1, 3, 5)]), rtol=1e-4
    )


def test_the_adversary_may_judge_one_state_of_each_row():
    model, params = make()
    adversary, heads = make_adversary(model)
    seen = []

    def spy(head_params, teacher_params, fake, *rest):
        seen.append(fake.shape[0])
        return adversary(head_params, teacher_params, fake, *rest)

    for states in ("all", "one"):
        loss_fn = flash(model, adversary=spy, adversary_states=states)
        value, _ = loss_fn(
            {"student": params, "discriminator": heads}, params, batch(6), jax.random.key(0)
        )
        assert np.isfinite(value)
    assert seen == [18, 6]
    with pytest.raises(ValueError, match="adversary_states must be 'all' or 'one'"):
        flash(model, adversary_states="some")


@pytest.mark.costly
@pytest.mark.parametrize(
    "grids",
    [[(1.0, 0.5)], [(1.0, 0.7, 0.2), (1.0, 0.5), (1.0,)], [(1.0, 0.7, 0.5, 0.2), (1.0, 0.3)]],
)
def test_the_shortcut_pulls_first_states_to_the_ends_of_their_trajectories(grids):
    """x̂0 = p x at T and p x / 2 after: the ends are known multiples of x_T, and every trajectory
    that has an end counts once.
    """

    def apply(params, x, t, cond):
        return jnp.where(expand(t, x) >= 1.0, params * x, 0.5 * params * x)

    def end_of(grid, p):
        x, x0 = 1.0, p
        for t, s in pairwise(grid):
            eps = (x - float(COSINE.alpha(t)) * x0) / float(COSINE.sigma(t))
            x = float(COSINE.alpha(s)) * x0 + float(COSINE.sigma(s)) * eps
            x0 = 0.5 * p * x
        return x0

    def gradient(p, shortcut):
        network = Model(apply, COSINE, x0_prediction)
        kept = [np.asarray(grid, np.float32) for grid in grids]
        loss = flash_module.imagine_flash(
            network, network, grids=kept, null_cond=lambda cond: cond, shortcut=shortcut
        )
        data = {"x0": jnp.zeros((2**12, *SHAPE)), "cond": jnp.zeros((2**12,))}
        return float(
            jax.grad(lambda q: loss({"student": q}, jnp.float32(p), data, KEY)[0])(jnp.float32(p))
        )

    kept = [grid for grid in grids if len(grid) > 1]
    slots = max(map(len, kept))
    for p in (0.1, 0.6):
        ends = [end_of(grid, p) for grid in kept for _ in range(slots // len(grid))]
        expected = 2 * (p - np.mean(ends))  # E x_T² = 1, and no gradient through the ends
        np.testing.assert_allclose(
            gradient(p, 1.5) - gradient(p, 0.0), 1.5 * expected, rtol=0.02, atol=1e-5
        )


@pytest.mark.parametrize(
    "options",
    [
        {"shortcut": -1.0},
        {"shortcut": 1.0, "grids": NESTED[:1]},
        {"shortcut": 1.0, "backward": False},
        {"shortcut": 1.0, "whole_trajectory": False},
    ],
)
def test_a_shortcut_needs_trajectories_with_an_end(options):
    with pytest.raises(ValueError, match="the shortcut must be at least 0"):
        small.flash(make()[0], **options)


SOLVERS = {"ddim": sampling.ddim, "dpm_solver_pp_2m": sampling.dpm_solver_pp_2m}
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
SD = schedule.ddpm(schedule.linear_betas())  # above zero SNR at T: a history counts from the start
SHARED = [np.float32(grid) for grid in ((1000, 800, 600, 300), (1000, 700, 400), (1000, 500))]


def on_discrete_times(model):
    return Model(model.apply, SD, v_prediction)


def states_of(model, student, size, **options):
    """The student's x̂0 at all states, and the gradient of a fixed weighting of them."""

    def judge(head_params, teacher_params, fake, *rest):
        weights = jax.random.normal(jax.random.key(2), fake.shape)
        return AdversarialTerms(jnp.sum(weights * fake), jnp.zeros(()), {"x0": fake})

    network = on_discrete_times(model)
    options = {"null_cond": model.null_cond, "weight": jnp.zeros_like, **options}
    loss = flash_module.imagine_flash(network, network, adversary=judge, **options)
    params = {"student": student, "discriminator": {}}
    (_, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        params, student, batch(size), KEY
    )
    return metrics["x0"], gradient["student"]


@pytest.mark.costly
@every_solver
def test_grids_that_share_a_batch_are_each_rolled_out_as_alone(solver):
    """Also by a solver with a history: a row that starts anew has none, and no gradient of the
    row before.
    """
    size, model = len(SHARED), make()[0]
    _, student = make(seed=4)
    found, gradient = states_of(model, student, size, grids=SHARED, solver=solver(SD))
    slots = trajectories.slots_of(SHARED, size)
    noise = jax.random.normal(jax.random.split(KEY, 4)[0], (len(slots.t), size, *SHAPE))

    def alone(params):
        """Each row's trajectories one after the other: [b, S, ...]."""
        rows = []
        for row in range(size):
            grid, cond = SHARED[row % len(SHARED)], batch(size)["cond"][row : row + 1]
            x0 = []
            for s in np.flatnonzero(slots.restart[:, row]):
                x_T = noise[s, row : row + 1]
                network = on_discrete_times(model).denoiser(params, cond)
                denoiser = sampling.noise_correction(x_T, SD.T)(network)
                state = sampling.start(x_T)
                x0.append(
                    sampling.rollout(solver(SD), denoiser, state, grid, stop_gradient=True)[1].x0
                )
            rows.append(jnp.concatenate(x0)[: len(slots.t), 0])
        return jnp.concatenate(rows)

    weights = jax.random.normal(jax.random.key(2), found.shape)
    np.testing.assert_allclose(found, jax.jit(alone)(student), rtol=1e-4, atol=1e-5)
    expected = jax.jit(jax.grad(lambda p: jnp.sum(weights * alone(p))))(student)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()) + 1e-6)


@pytest.mark.costly
@every_solver
def test_one_random_state_is_one_of_the_whole_trajectorys(solver):
    model, size = make()[0], 12
    _, student = make(seed=4)
    options = {"grids": SHARED[:1], "solver": solver(SD)}
    whole, _ = states_of(model, student, size, **options)
    one, _ = states_of(model, student, size, whole_trajectory=False, **options)
    apart = jnp.max(jnp.abs(whole.reshape(size, 4, -1) - one.reshape(size, 1, -1)), axis=-1)
    np.testing.assert_allclose(apart.min(1), 0.0, atol=1e-5)
    assert len(set(np.argmin(apart, 1).tolist())) > 2


@pytest.mark.costly
@every_solver
def test_the_teachers_answer_is_its_own_rollout_from_each_state(solver):
    model, teacher = make()
    _, student = make(seed=4)
    k, grid, network = 3, SHARED[0], on_discrete_times(model)
    reconstruction = Reconstruction(noise_source=None, steps=k, solver=solver)
    loss = flash_module.imagine_flash(
        network, network, grids=[grid], null_cond=model.null_cond, reconstruction=reconstruction
    )
    data, x_T = batch(), drawn_noise()
    value, _ = jax.jit(loss)({"student": student}, teacher, data, KEY)
    of_student, of_teacher = (network.denoiser(p, data["cond"]) for p in (student, teacher))
    corrected = sampling.noise_correction(x_T, SD.T)(of_student)
    _, visited = sampling.rollout(sampling.ddim(SD), corrected, sampling.start(x_T), grid)
    answers = [
        sampling.rollout(
            solver(SD), of_teacher, sampling.start(x), t * np.float32([1, 2 / 3, 1 / 3])
        )[0].x
        for x, t in zip(visited.x, grid, strict=True)
    ]
    np.testing.assert_allclose(value, jnp.mean((jnp.stack(answers) - visited.x0) ** 2), rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "step"),
    {
        "plms": sampling.plms(SD),
        "uni_pc": sampling.uni_pc(SD),
        "ancestral": sampling.ancestral(SD, KEY),
        "renoise": sampling.renoise(SD, KEY),
        "last_by": sampling.last_by(sampling.dpm_solver_pp_2m(SD), sampling.ddim(SD)),
    }.items(),
)
def test_a_solver_of_one_time_for_the_whole_batch_is_refused_by_name(name, step):
    words = f"^{name} takes one time for the whole batch, got one for each example; use ddim or"
    for options in (
        {"solver": step},
        {"reconstruction": Reconstruction(solver=lambda schedule: step)},
    ):
        with pytest.raises(ValueError, match=words):
            small.flash(make()[0], **options)


def test_a_multistep_solver_survives_a_step_of_no_length():
    x, point = jax.random.normal(KEY, (2, 3)), 0.4

    def denoiser(x, t):
        return Prediction(
            point * jnp.tanh(x), (x - SD.alpha(t) * point * jnp.tanh(x)) / SD.sigma(t)
        )

    def run(*grid):
        step, state = sampling.dpm_solver_pp_2m(SD), sampling.start(x)
        return sampling.rollout(step, denoiser, state, np.float32(grid))[0].x

    np.testing.assert_allclose(run(900, 400, 400, 400, 1), run(900, 400, 1), rtol=0.05)
