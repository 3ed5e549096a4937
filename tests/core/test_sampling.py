import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import TESTS

from jaxdistill.prediction import (
    Prediction,
    as_denoiser,
    eps_prediction,
    expand,
    flow_prediction,
    v_prediction,
    x0_prediction,
)
from jaxdistill.sampling import (
    ancestral,
    chain,
    check_grid,
    clip,
    ddim,
    divided_steps,
    dpm_solver_pp_2m,
    guidance,
    guided_denoiser,
    keys_of,
    leading_grid,
    linspace_grid,
    noise_correction,
    renoise,
    rollout,
    start,
    trailing_grid,
    uni_pc,
    uni_pc_start,
    with_null_rows,
)
from jaxdistill.schedule import cosine, ddpm, flow, rescale_zero_terminal_snr, scaled_linear_betas

GOLDEN = json.loads((TESTS / "golden" / "diffusers.json").read_text())
SD = ddpm(scaled_linear_betas())
SD_ZERO_SNR = ddpm(rescale_zero_terminal_snr(scaled_linear_betas()))
PARAMETERIZATIONS = {
    "epsilon": eps_prediction,
    "v_prediction": v_prediction,
    "sample": x0_prediction,
}
SOLVERS = {"ddim": ddim, "dpm_solver_pp_2m": dpm_solver_pp_2m}
both_solvers = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


def normal(seed, shape=(3, 2, 2, 1)):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def network(params, x, t, cond):
    """A small nonlinear function of everything that a network sees; t is of the order of 1."""
    return jnp.tanh(params["w"] * x + expand(t, x) * params["b"]) + 0.3 * x * params["w"]


PARAMS = {"w": jnp.float32(0.7), "b": jnp.float32(-0.4)}


def network_denoiser(params=PARAMS, schedule=None):
    return as_denoiser(
        network, params, None, schedule=schedule or cosine(), parameterization=v_prediction
    )


def point_mass_denoiser(schedule, point):
    """The exact denoiser of data that is always `point`: x̂0 = point."""

    def denoiser(x, t):
        alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
        return Prediction(jnp.broadcast_to(point, x.shape), (x - alpha * point) / sigma)

    return denoiser


MEAN, STD = 0.7, 0.5


def gaussian_denoiser(schedule):
    """The exact denoiser of data from N(MEAN, STD²): E[x_0 | x_t] and E[ε | x_t]."""

    def denoiser(x, t):
        alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
        residual = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        return Prediction(MEAN + alpha * STD**2 * residual, sigma * residual)

    return denoiser


def gaussian_flow(schedule, x, t, t_end):
    """The exact probability-flow ODE from t to t_end for that data: quantiles are kept."""
    alpha, sigma, alpha_end, sigma_end = (
        np.float64(f(s)) for s in (t, t_end) for f in (schedule.alpha, schedule.sigma)
    )
    spread = np.sqrt((alpha_end**2 * STD**2 + sigma_end**2) / (alpha**2 * STD**2 + sigma**2))
    return alpha_end * MEAN + spread * (np.asarray(x, np.float64) - alpha * MEAN)


# ---------------------------------------------------------------------------- parity with diffusers


@pytest.mark.parametrize("kind", GOLDEN["timesteps"])
def test_discrete_grids_agree_with_diffusers(kind):
    grids = {
        "trailing": lambda n: trailing_grid(n, 1000.0, discrete=True),
        "leading_offset_0": lambda n: leading_grid(n, 1000.0, discrete=True),
        "leading_offset_1": lambda n: leading_grid(n, 1000.0, discrete=True, offset=1.0),
        "linspace": lambda n: linspace_grid(n, 1000.0, discrete=True),
    }
    assert set(grids) == set(GOLDEN["timesteps"])
    for steps, timesteps in GOLDEN["timesteps"][kind].items():
        np.testing.assert_array_equal(grids[kind](int(steps)) - 1.0, timesteps)


@pytest.mark.parametrize(
    "record",
    GOLDEN["ddim_steps"]["steps"],
    ids=lambda r: f"{r['prediction_type']}-{r['t']}-{r['t_prev']}",
)
def test_single_ddim_step_agrees_with_diffusers(record):
    sample, output = (
        jnp.asarray(GOLDEN["ddim_steps"][key], jnp.float32) for key in ("sample", "output")
    )
    denoiser = as_denoiser(
        lambda *_: output,
        None,
        None,
        schedule=SD,
        parameterization=PARAMETERIZATIONS[record["prediction_type"]],
    )
    if record["clip"]:
        denoiser = clip(SD)(denoiser)
    t, t_next = record["t"] + 1.0, record["t_prev"] + 1.0
    if t_next <= 0:
        t_next = 0.0 if record["set_alpha_to_one"] else 1.0
    state = ddim(SD)(
        denoiser(sample, jnp.float32(t)), start(sample), jnp.float32(t), jnp.float32(t_next)
    )
    np.testing.assert_allclose(state.x, np.asarray(record["prev_sample"]), rtol=3e-6, atol=2e-6)


@pytest.mark.parametrize(
    "run", GOLDEN["trajectories"], ids=lambda r: f"{r['name']} {r['prediction_type']}"
)
def test_whole_trajectory_agrees_with_diffusers(run):
    c0, c1 = GOLDEN["model"]["c0"], GOLDEN["model"]["c1"]
    schedule = SD_ZERO_SNR if run["zero_snr"] else SD
    denoiser = as_denoiser(
        lambda params, x, t, cond: c0 * jnp.tanh(0.3 * x) + c1 * expand(t, x) / 1000.0,
        None,
        None,
        schedule=schedule,
        parameterization=PARAMETERIZATIONS[run["prediction_type"]],
    )
    expected = np.asarray(run["states"], np.float32)
    grid = np.asarray(run["timesteps"], np.float32) + 1.0
    final, trajectory = rollout(
        SOLVERS[run["solver"]](schedule),
        denoiser,
        start(jnp.asarray(expected[0])),
        grid,
        t_end=float(run["our_t_end"]),
    )
    got = np.concatenate([trajectory.x, final.x[None]])
    np.testing.assert_allclose(got, expected, rtol=0, atol=4e-6 * np.abs(expected).max())


# -------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("T", [1.0, 1000.0])
def test_trailing_grid_cuts_the_time_into_equal_parts_from_T(steps, T):
    grid = trailing_grid(steps, T)
    assert grid.dtype == np.float32 and grid.shape == (steps,) and grid[0] == np.float32(T)
    np.testing.assert_allclose(-np.diff(np.append(grid, 0.0)), T / steps, rtol=1e-4)
    np.testing.assert_array_equal(check_grid(grid, T), grid)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("T", [1.0, 1000.0])
def test_leading_grid_ends_at_its_offset_one_part_below_T(steps, T):
    offset = T / (2 * steps)
    grid = leading_grid(steps, T, offset=offset)
    assert grid.dtype == np.float32 and grid.shape == (steps,)
    np.testing.assert_allclose(grid[-1], offset, rtol=1e-6)
    np.testing.assert_allclose(grid[0], T - T / steps + offset, rtol=1e-6)
    np.testing.assert_allclose(-np.diff(grid), T / steps, rtol=1e-4)


@pytest.mark.parametrize("steps", [2, 3, 7, 50])
@pytest.mark.parametrize("T", [1.0, 1000.0])
def test_linspace_grid_includes_both_ends(steps, T):
    grid = linspace_grid(steps, T)
    assert grid.dtype == np.float32 and grid.shape == (steps,) and grid[0] == np.float32(T)
    np.testing.assert_allclose(grid[-1], T / 1000.0, rtol=1e-6)
    np.testing.assert_allclose(np.diff(grid), np.diff(grid).mean(), rtol=1e-4)
    assert linspace_grid(steps, T, end=0.25 * T)[-1] == np.float32(0.25 * T)
    np.testing.assert_array_equal(check_grid(grid, T), grid)


def test_leading_grid_of_continuous_time_ends_above_0_by_default():
    np.testing.assert_allclose(leading_grid(4, 1.0), [0.751, 0.501, 0.251, 0.001], rtol=1e-6)


@pytest.mark.parametrize("end", [0.0, -0.1, 1.5])
def test_linspace_grid_refuses_an_end_outside_the_schedule(end):
    with pytest.raises(ValueError, match="linspace_grid"):
        linspace_grid(4, 1.0, end=end)


@both_solvers
def test_times_of_each_example_are_each_examples_own_run(solver):
    schedule, x = cosine(), normal(3, (2, 4))
    grid = np.float32([[1.0, 0.8], [0.6, 0.5], [0.3, 0.1], [0.05, 0.04]])
    together = rollout(solver(schedule), network_denoiser(), start(x, own_times=True), grid)[0].x
    alone = [
        rollout(solver(schedule), network_denoiser(), start(x[i : i + 1]), grid[:, i])[0].x[0]
        for i in (0, 1)
    ]
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)


def test_dpm_solver_refuses_a_start_that_has_not_the_times_shape():
    grid = np.float32([[1.0, 1.0], [0.5, 0.4]])
    with pytest.raises(
        ValueError, match=r"times of shape \(2,\); start with start\(x, own_times=True\)"
    ):
        rollout(
            dpm_solver_pp_2m(cosine()),
            lambda x, t: Prediction(x, x),
            start(jnp.zeros((2, 3))),
            grid,
        )


@pytest.mark.parametrize(
    ("steps", "substeps"), [(1, 1), (3, 2), (7, 3), (50, 1), (64, 2), (128, 5)]
)
@pytest.mark.parametrize("schedule", [cosine(), SD], ids=["cosine", "sd"])
def test_divided_steps_are_the_steps_of_the_sampler_and_of_its_finer_teacher(
    schedule, steps, substeps
):
    table, discrete = divided_steps(schedule, steps, substeps), schedule.T > 1
    coarse, fine = (
        trailing_grid(n, schedule.T, discrete=discrete) for n in (steps, steps * substeps)
    )
    np.testing.assert_allclose(table[0], coarse, rtol=0 if discrete else 1e-6)
    np.testing.assert_array_equal(table[-1], np.append(table[0, 1:], 0.0))
    np.testing.assert_array_equal(table[:-1].T.ravel(), fine)


@pytest.mark.parametrize("make", [trailing_grid, leading_grid, linspace_grid])
@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("steps", [0, -1])
def test_grids_refuse_fewer_than_one_step(make, discrete, steps):
    with pytest.raises(ValueError, match="steps must be at least 1"):
        make(steps, 1000.0, discrete=discrete)


@pytest.mark.parametrize("offset", [0.0, -0.1, 0.26])
def test_leading_grid_refuses_a_time_outside_the_schedule(offset):
    with pytest.raises(ValueError, match="leading_grid"):
        leading_grid(4, 1.0, offset=offset)


@pytest.mark.parametrize(
    ("grid", "reason"),
    [
        ([], "at least one"),
        ([[1.0, 0.5]], "at least one"),
        ([0.9, 0.5], "must start at T"),
        ([1.1, 0.5], "must start at T"),
        ([1.0, 0.5, 0.5], "must decrease"),
        ([1.0, 0.4, 0.5], "must decrease"),
        ([1.0, 0.5, 0.0], "ends above 0"),
        ([1.0, 0.5, -0.1], "ends above 0"),
    ],
)
def test_check_grid_refuses_what_a_student_cannot_be_sampled_on(grid, reason):
    with pytest.raises(ValueError, match=reason):
        check_grid(np.asarray(grid), 1.0)


def test_check_grid_returns_a_good_grid_as_float32():
    grid = check_grid(np.asarray([1.0, 0.7, 0.1], np.float64), 1.0)
    assert grid.dtype == np.float32
    np.testing.assert_array_equal(grid, np.asarray([1.0, 0.7, 0.1], np.float32))
    assert check_grid(np.asarray([1000.0]), 1000.0).tolist() == [1000.0]


# ------------------------------------------------------------------------------------------ solvers


@pytest.mark.parametrize(
    ("solver", "low", "high"),
    [(ddim, 0.9, 1.1), (dpm_solver_pp_2m, 1.9, 2.2)],
    ids=["ddim is 1", "dpm_solver_pp_2m is 2"],
)
@pytest.mark.parametrize("schedule", [cosine(), flow()], ids=["cosine", "flow"])
def test_convergence_order_on_a_gaussian(solver, schedule, low, high):
    """Both ends are kept away from infinite log-SNR, where a step of fixed size in t is not small.

    On some intervals, 0.8 to 0.2 for one, the leading error terms nearly cancel and no order can be
    read; on this one they do not.
    """
    x, t, t_end, counts = normal(0), 0.95, 0.3, np.array([8, 16, 32, 64])
    exact = gaussian_flow(schedule, x, t, t_end)
    errors = []
    for steps in counts:
        grid = np.linspace(t, t_end, steps + 1)[:-1]
        final, _ = rollout(
            solver(schedule), gaussian_denoiser(schedule), start(x), grid, t_end=t_end
        )
        errors.append(np.sqrt(np.mean((np.asarray(final.x, np.float64) - exact) ** 2)))
    orders = -np.diff(np.log(errors)) / np.diff(np.log(counts))
    assert ((low < orders) & (orders < high)).all(), (orders, errors)


@pytest.mark.parametrize("linear", [False, True], ids=["bh2", "bh1"])
def test_uni_pc_is_of_third_order(linear):
    """Its corrector raises the predictor's second order by one."""
    x, t, t_end, counts = normal(0), 0.95, 0.3, np.array([4, 8, 16])
    exact, schedule, errors = gaussian_flow(cosine(), x, t, t_end), cosine(), []
    for steps in counts:
        grid = np.linspace(t, t_end, steps + 1)
        state, step = uni_pc_start(x), jax.jit(uni_pc(schedule, linear=linear))
        # The last x is corrected by the call that starts from it: one step more, of no length.
        for t_from, t_to in zip(jnp.float32(grid), jnp.float32([*grid[1:], t_end]), strict=True):
            state = step(gaussian_denoiser(schedule)(state.x, t_from), state, t_from, t_to)
        errors.append(np.sqrt(np.mean((np.asarray(state.corrected, np.float64) - exact) ** 2)))
    orders = -np.diff(np.log(errors)) / np.diff(np.log(counts))
    assert ((orders > 2.4) & (orders < 3.6)).all(), (orders, errors)


def test_ancestral_steps_are_draws_of_the_posterior():
    """Data of one point: the ε of a state is standard normal, and correlates with that of the state
    before by σ_s α_t / (α_s σ_t).
    """
    schedule, key = cosine(), jax.random.key(0)
    x = jax.random.normal(key, (20000, 1))
    point, grid = jnp.full((1,), 0.6), [1.0, 0.7, 0.4, 0.1]
    final, trajectory = rollout(
        ancestral(schedule, key), point_mass_denoiser(schedule, point), start(x), np.float32(grid)
    )
    eps = np.asarray(trajectory.eps[..., 0], np.float64)
    ratio = [float(schedule.sigma(t) / schedule.alpha(t)) for t in grid]
    for i in range(4):
        assert abs(eps[i].mean()) < 0.03 and abs(eps[i].std() - 1) < 0.03
        if i:
            assert abs(np.corrcoef(eps[i - 1], eps[i])[0, 1] - ratio[i] / ratio[i - 1]) < 0.03
    np.testing.assert_allclose(final.x, jnp.broadcast_to(point, x.shape), atol=1e-5)


@both_solvers
@pytest.mark.parametrize(
    "schedule", [cosine(), SD, SD_ZERO_SNR], ids=["cosine", "sd", "sd_zero_snr"]
)
@pytest.mark.parametrize("steps", [1, 5])
def test_point_mass_is_sampled_exactly_in_any_number_of_steps(solver, schedule, steps):
    """x̂0 and ε̂ are constant along the path then, so no solver of this kind errs."""
    point, eps = normal(1, (2, 2, 1)), normal(2)
    x = schedule.alpha(schedule.T) * point + schedule.sigma(schedule.T) * eps
    denoiser, grid = point_mass_denoiser(schedule, point), trailing_grid(steps, schedule.T)
    final, trajectory = rollout(solver(schedule), denoiser, start(x), grid)
    np.testing.assert_allclose(final.x, jnp.broadcast_to(point, x.shape), atol=1e-5)
    for t, visited in zip(grid, trajectory.x, strict=True):
        np.testing.assert_allclose(
            visited, schedule.alpha(float(t)) * point + schedule.sigma(float(t)) * eps, atol=1e-5
        )


@pytest.mark.parametrize(
    ("schedule", "steps"), [(SD, 1), (SD, 2), (SD_ZERO_SNR, 2), (SD_ZERO_SNR, 3)]
)
def test_dpm_solver_is_ddim_where_the_log_snr_step_is_infinite(schedule, steps):
    """From zero SNR the first two steps have no finite h or h_prev, and the step to 0 has none:
    three steps are all DDIM's.
    """
    x, grid = normal(3), trailing_grid(steps, schedule.T)
    finals = [
        rollout(solver(schedule), gaussian_denoiser(schedule), start(x), grid)[0].x
        for solver in (ddim, dpm_solver_pp_2m)
    ]
    np.testing.assert_allclose(finals[1], finals[0], atol=1e-6)


def test_dpm_solver_uses_its_memory_where_the_log_snr_step_is_finite():
    x, grid = normal(3), trailing_grid(3, SD.T)
    finals = [
        rollout(solver(SD), gaussian_denoiser(SD), start(x), grid)[0].x
        for solver in (ddim, dpm_solver_pp_2m)
    ]
    assert np.abs(finals[1] - finals[0]).max() > 1e-2


# --------------------------------------------------------------------------------------- transforms


def conditional_network(params, x, t, cond):
    return jnp.tanh(x * expand(cond, x) + expand(t, x))


def conditional_denoiser(cond):
    return as_denoiser(
        conditional_network, None, cond, schedule=cosine(), parameterization=v_prediction
    )


COND, NULL = jnp.asarray([0.5, -1.0, 2.0]), jnp.zeros(3)
scalar_and_batch_times = pytest.mark.parametrize(
    "t", [jnp.float32(0.4), jnp.asarray([0.9, 0.4, 0.1])], ids=["scalar t", "batch t"]
)


@scalar_and_batch_times
@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
def test_guidance_extrapolates_from_the_unconditional_prediction(t, scale):
    x = normal(4)
    guided = guidance(scale)(conditional_denoiser(with_null_rows(COND, NULL)))(x, t)
    c, u = conditional_denoiser(COND)(x, t), conditional_denoiser(NULL)(x, t)
    for field in Prediction._fields:
        expected = getattr(u, field) + scale * (getattr(c, field) - getattr(u, field))
        assert getattr(guided, field).shape == x.shape
        np.testing.assert_allclose(getattr(guided, field), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0])
def test_guided_denoisers_follow_the_formula_also_below_one(scale):
    x, t = normal(4), jnp.float32(0.4)
    options = {"schedule": cosine(), "parameterization": v_prediction}
    guided = guided_denoiser(
        conditional_network, None, COND, null_cond=jnp.zeros_like, scale=scale, **options
    )(x, t)
    c, u = conditional_denoiser(COND)(x, t), conditional_denoiser(NULL)(x, t)
    for name in Prediction._fields:
        expected = (1 - scale) * getattr(u, name) + scale * getattr(c, name)
        np.testing.assert_allclose(getattr(guided, name), expected, rtol=1e-5, atol=1e-6)


@scalar_and_batch_times
def test_guidance_of_scale_one_is_the_conditional_denoiser(t):
    x = normal(4)
    guided, plain = (
        guidance(1.0)(conditional_denoiser(with_null_rows(COND, NULL)))(x, t),
        conditional_denoiser(COND)(x, t),
    )
    np.testing.assert_allclose(guided.x0, plain.x0, atol=1e-6)
    np.testing.assert_allclose(guided.eps, plain.eps, atol=1e-6)


def test_guidance_calls_the_network_once():
    rows = []

    def apply(params, x, t, cond):
        rows.append(x.shape[0])
        return conditional_network(params, x, t, cond)

    cond = jnp.concatenate([COND, NULL])
    denoiser = as_denoiser(apply, None, cond, schedule=cosine(), parameterization=v_prediction)
    guidance(3.0)(denoiser)(normal(4), jnp.float32(0.5))
    assert rows == [6]


@scalar_and_batch_times
def test_clip_bounds_x0_and_keeps_the_pair_meeting_at_x(t):
    x = 3.0 * normal(5)
    before, after = network_denoiser()(x, t), clip(cosine(), -0.5, 0.8)(network_denoiser())(x, t)
    assert before.x0.min() < -0.5 and before.x0.max() > 0.8
    np.testing.assert_array_equal(after.x0, jnp.clip(before.x0, -0.5, 0.8))
    alpha, sigma = expand(cosine().alpha(t), x), expand(cosine().sigma(t), x)
    np.testing.assert_allclose(alpha * after.x0 + sigma * after.eps, x, atol=1e-5)


@scalar_and_batch_times
def test_clip_leaves_a_prediction_inside_the_bounds(t):
    x = normal(5)
    before, after = network_denoiser()(x, t), clip(cosine(), -50.0, 50.0)(network_denoiser())(x, t)
    np.testing.assert_array_equal(after.x0, before.x0)
    np.testing.assert_allclose(after.eps, before.eps, atol=1e-5)


def test_chain_puts_the_first_transform_nearest_the_network():
    def affine(scale, shift):
        def transform(denoiser):
            return lambda x, t: jax.tree.map(lambda p: scale * p + shift, denoiser(x, t))

        return transform

    x, t = normal(6), jnp.float32(0.5)
    chained = chain(affine(2.0, 0.0), affine(1.0, 3.0))(network_denoiser())(x, t)
    np.testing.assert_allclose(chained.x0, 2.0 * network_denoiser()(x, t).x0 + 3.0, rtol=1e-6)
    assert chain()(network) is network


# --------------------------------------------------------------------------------- noise correction


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_correction_is_the_identity_at_the_start_of_a_flow(shift):
    noise, schedule, t = normal(7), flow(shift), jnp.float32(1.0)

    def apply(params, x, t, cond):
        return jnp.sin(3.0 * x) + expand(t, x)

    plain = as_denoiser(apply, None, None, schedule=schedule, parameterization=flow_prediction)
    before, after = plain(noise, t), noise_correction(noise, schedule.T)(plain)(noise, t)
    np.testing.assert_array_equal(after.x0, before.x0)
    np.testing.assert_array_equal(after.eps, before.eps)


@pytest.mark.parametrize("schedule", [cosine(), SD_ZERO_SNR], ids=["cosine", "sd_zero_snr"])
@pytest.mark.parametrize("batch", [False, True], ids=["scalar t", "batch t"])
def test_noise_correction_is_the_identity_for_v_prediction_with_zero_terminal_snr(schedule, batch):
    noise = normal(7)
    t = jnp.full((3,), schedule.T) if batch else jnp.float32(schedule.T)
    plain = network_denoiser(schedule=schedule)
    before, after = plain(noise, t), noise_correction(noise, schedule.T)(plain)(noise, t)
    np.testing.assert_array_equal(after.x0, before.x0)
    np.testing.assert_array_equal(after.eps, before.eps)


@both_solvers
def test_noise_correction_is_the_identity_where_the_drawn_noise_is_already_predicted(solver):
    # x_T holds some of the point here (α_T > 0), so the noise that is known is ε and not x_T.
    point, eps = normal(8, (2, 2, 1)), normal(9)
    x = SD.alpha(SD.T) * point + SD.sigma(SD.T) * eps
    plain = point_mass_denoiser(SD, point)
    runs = [
        rollout(solver(SD), d, start(x), trailing_grid(3, SD.T))
        for d in (plain, noise_correction(eps, SD.T)(plain))
    ]
    for before, after in zip(*map(jax.tree.leaves, runs), strict=True):
        np.testing.assert_allclose(np.float32(after), np.float32(before), atol=1e-5)


@both_solvers
def test_noise_correction_removes_a_bias_planted_at_T(solver):
    schedule, noise = cosine(), normal(10)
    unbiased = gaussian_denoiser(schedule)

    def biased(x, t):
        prediction = unbiased(x, t)
        return prediction._replace(eps=prediction.eps + jnp.where(t == schedule.T, 0.5, 0.0))

    def sample(denoiser):
        return rollout(solver(schedule), denoiser, start(noise), trailing_grid(3, schedule.T))[0].x

    assert np.abs(sample(biased) - sample(unbiased)).max() > 0.05
    np.testing.assert_allclose(
        sample(noise_correction(noise, schedule.T)(biased)), sample(unbiased), atol=1e-6
    )


def test_noise_correction_touches_only_eps_and_only_at_T():
    x, noise, t = (
        normal(11, (4, 4, 4, 4)),
        normal(12, (4, 4, 4, 4)),
        jnp.asarray([1000.0, 999.0, 1000.0, 1.0]),
    )
    plain = network_denoiser(schedule=SD)
    before, after = plain(x, t), noise_correction(noise, SD.T)(plain)(x, t)
    np.testing.assert_array_equal(after.x0, before.x0)
    np.testing.assert_array_equal(
        after.eps, jnp.stack([noise[0], before.eps[1], noise[2], before.eps[3]])
    )
    for time, expected in ((1000.0, noise), (999.0, plain(x, jnp.float32(999.0)).eps)):
        corrected = noise_correction(noise, SD.T)(plain)(x, jnp.float32(time))
        np.testing.assert_array_equal(corrected.eps, expected)
        np.testing.assert_array_equal(corrected.x0, plain(x, jnp.float32(time)).x0)


# ------------------------------------------------------------------------------------------ rollout

GRID = np.asarray([1.0, 0.75, 0.4, 0.15], np.float32)


def hand_written_ddim(denoiser, x, grid, t_end):
    visited = []
    for t, t_next in zip(grid, [*grid[1:], t_end], strict=True):
        x0, eps = denoiser(x, jnp.float32(t))
        visited.append((x, x0, eps))
        x = np.cos(np.pi / 2 * t_next) * x0 + np.sin(np.pi / 2 * t_next) * eps
    return x, visited


@pytest.mark.parametrize("t_end", [0.0, 0.05])
def test_rollout_of_ddim_is_its_formula_in_a_python_loop(t_end):
    final, trajectory = rollout(
        ddim(cosine()), network_denoiser(), start(normal(13)), GRID, t_end=t_end
    )
    expected, visited = hand_written_ddim(network_denoiser(), normal(13), GRID.tolist(), t_end)
    np.testing.assert_allclose(final.x, expected, atol=1e-6)
    np.testing.assert_array_equal(trajectory.t, GRID)
    for i, (x, x0, eps) in enumerate(visited):
        np.testing.assert_allclose(trajectory.x[i], x, atol=1e-6)
        np.testing.assert_allclose(trajectory.x0[i], x0, atol=1e-6)
        np.testing.assert_allclose(trajectory.eps[i], eps, atol=1e-6)


@both_solvers
@pytest.mark.parametrize("stop_gradient", [False, True])
def test_rollout_is_a_python_loop_over_its_step(solver, stop_gradient):
    schedule, denoiser = SD, network_denoiser(schedule=SD)
    step, grid, state = solver(schedule), trailing_grid(5, SD.T), start(normal(14))
    final, trajectory = jax.jit(
        lambda s: rollout(step, denoiser, s, grid, t_end=2.0, stop_gradient=stop_gradient)
    )(state)
    for i, (t, t_next) in enumerate(zip(grid, [*grid[1:], 2.0], strict=True)):
        np.testing.assert_allclose(trajectory.x[i], state.x, rtol=1e-5, atol=1e-5)
        state = step(denoiser(state.x, jnp.float32(t)), state, jnp.float32(t), jnp.float32(t_next))
    np.testing.assert_allclose(final.x, state.x, rtol=1e-5, atol=1e-5)


def test_rollout_calls_the_network_once_at_each_time_of_the_grid():
    called = []

    def watched(x, t):
        jax.debug.callback(lambda time: called.append(float(time)), t, ordered=True)
        return network_denoiser()(x, t)

    rollout(ddim(cosine()), watched, start(normal(15)), GRID)
    jax.effects_barrier()
    assert called == GRID.tolist()


@pytest.mark.parametrize("steps", [1, 3])
def test_unrolled_rollout_has_no_loop_and_the_same_result(steps):
    grid = trailing_grid(steps, 1.0)

    def loss(params, unroll):
        final, trajectory = rollout(
            ddim(cosine()), network_denoiser(params), start(normal(15)), grid, unroll=unroll
        )
        return jnp.sum(final.x**2) + jnp.sum(trajectory.x0**3), trajectory

    gradients = [
        jax.jit(partial(jax.grad(loss, has_aux=True), unroll=unroll)) for unroll in (False, True)
    ]
    loops = ["while" in gradient.lower(PARAMS).as_text() for gradient in gradients]
    assert loops == [True, False]
    looped, unrolled = (gradient(PARAMS) for gradient in gradients)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), looped, unrolled)


def test_stopped_final_state_has_exactly_no_gradient():
    def loss(params, stop_gradient):
        final, _ = rollout(
            ddim(cosine()),
            network_denoiser(params),
            start(normal(16)),
            GRID,
            stop_gradient=stop_gradient,
        )
        return jnp.sum(final.x**2)

    flowing, stopped = jax.grad(loss)(PARAMS, False), jax.grad(loss)(PARAMS, True)
    assert all(abs(g) > 1e-2 for g in jax.tree.leaves(flowing))
    assert all(g == 0.0 for g in jax.tree.leaves(stopped))


@both_solvers
def test_stopped_states_of_the_trajectory_have_exactly_no_gradient(solver):
    def loss(params, stop_gradient):
        _, trajectory = rollout(
            solver(cosine()),
            network_denoiser(params),
            start(normal(16)),
            GRID,
            stop_gradient=stop_gradient,
        )
        return jnp.sum(trajectory.x**2)

    assert all(abs(g) > 1e-2 for g in jax.tree.leaves(jax.grad(loss)(PARAMS, False)))
    assert all(g == 0.0 for g in jax.tree.leaves(jax.grad(loss)(PARAMS, True)))


@both_solvers
def test_stopped_rollout_differentiates_each_prediction_through_its_own_call_only(solver):
    weights = normal(17, (2, len(GRID), 3, 2, 2, 1))

    def readings(prediction, weights):
        return jnp.stack(
            [
                jnp.sum(w * field, axis=(-4, -3, -2, -1))
                for w, field in zip(weights, prediction, strict=True)
            ]
        )

    def by_rollout(params, stop_gradient):
        _, trajectory = rollout(
            solver(cosine()),
            network_denoiser(params),
            start(normal(18)),
            GRID,
            stop_gradient=stop_gradient,
        )
        return readings((trajectory.x0, trajectory.eps), weights), trajectory.x

    stopped, states = jax.jacrev(by_rollout, has_aux=True)(PARAMS, True)
    flowing, _ = jax.jacrev(by_rollout, has_aux=True)(PARAMS, False)
    for i, t in enumerate(GRID):
        single = jax.jacrev(
            lambda p, i=i, t=t: readings(
                network_denoiser(p)(states[i], jnp.float32(t)), weights[:, i]
            )
        )(PARAMS)
        for name in PARAMS:
            np.testing.assert_allclose(stopped[name][:, i], single[name], rtol=1e-5, atol=2e-6)
            assert i == 0 or (abs(flowing[name][:, i] - single[name]) > 1e-3).all()


@pytest.mark.parametrize("t_end", [0.0, 0.1])
def test_grid_for_each_example_agrees_with_the_shared_grid(t_end):
    shared = rollout(ddim(cosine()), network_denoiser(), start(normal(19)), GRID, t_end=t_end)
    each = rollout(
        ddim(cosine()),
        network_denoiser(),
        start(normal(19)),
        np.repeat(GRID[:, None], 3, axis=1),
        t_end=t_end,
    )
    np.testing.assert_allclose(each[0].x, shared[0].x, atol=1e-6)
    np.testing.assert_array_equal(each[1].t, np.repeat(GRID[:, None], 3, axis=1))
    for got, expected in zip(each[1][1:], shared[1][1:], strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_examples_with_their_own_grids_do_not_mix():
    x, t_end = normal(20), jnp.asarray([0.0, 0.1, 0.05])
    grids = np.asarray([[1.0, 0.75, 0.4], [1.0, 0.6, 0.3], [1.0, 0.5, 0.2]], np.float32)
    final, trajectory = rollout(ddim(cosine()), network_denoiser(), start(x), grids.T, t_end=t_end)
    for i in range(3):
        one, visited = rollout(
            ddim(cosine()), network_denoiser(), start(x[i : i + 1]), grids[i], t_end=t_end[i]
        )
        np.testing.assert_allclose(final.x[i], one.x[0], atol=1e-6)
        np.testing.assert_allclose(trajectory.x[:, i], visited.x[:, 0], atol=1e-6)


@both_solvers
@pytest.mark.parametrize("length", [1, 2, 3])
def test_prefix_of_a_grid_visits_the_same_states(solver, length):
    x = normal(21)
    _, whole = rollout(solver(cosine()), network_denoiser(), start(x), GRID)
    stopped, part = rollout(
        solver(cosine()), network_denoiser(), start(x), GRID[:length], t_end=float(GRID[length])
    )
    np.testing.assert_allclose(part.x, whole.x[:length], atol=1e-6)
    np.testing.assert_allclose(part.x0, whole.x0[:length], atol=1e-6)
    np.testing.assert_allclose(stopped.x, whole.x[length], atol=1e-6)


def test_fresh_noise_of_each_image_is_drawn_for_any_number_of_images():
    """In a program that is exported for a free number of rows."""
    made = ddpm(scaled_linear_betas())
    noise = jax.random.normal(jax.random.key(0), (3, 4, 4, 1))

    def draw(noise):
        denoiser = as_denoiser(
            lambda params, x, t, cond: jnp.tanh(x),
            None,
            None,
            schedule=made,
            parameterization=x0_prediction,
        )
        grid = trailing_grid(2, made.T)
        return rollout(renoise(made, keys_of(noise)), denoiser, start(noise), grid)[0].x

    (b,) = jax.export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((b, *noise.shape[1:]), noise.dtype)
    exported = jax.export.export(jax.jit(draw))(shape)
    np.testing.assert_allclose(exported.call(noise), draw(noise), atol=1e-6)
    np.testing.assert_allclose(exported.call(noise[:1]), draw(noise)[:1], atol=1e-6)
