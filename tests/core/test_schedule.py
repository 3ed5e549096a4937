import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import TESTS

from jaxdistill.schedule import (
    cosine,
    cosine_betas,
    ddpm,
    flow,
    linear_betas,
    linear_ratio,
    log_snr,
    rescale_zero_terminal_snr,
    same_log_snr,
    scaled_linear_betas,
    shifted,
    training_time,
)

GOLDEN = json.loads((TESTS / "golden" / "diffusers.json").read_text())
BETAS = {
    "scaled_linear": scaled_linear_betas(),
    "linear": linear_betas(),
    "squaredcos_cap_v2": cosine_betas(),
}
BETAS |= {f"{name}_zero_snr": rescale_zero_terminal_snr(betas) for name, betas in BETAS.items()}
DISCRETE = {name: ddpm(betas) for name, betas in BETAS.items()}
SHIFTED = {
    "cosine_shifted": shifted(cosine(), 4.0),
    "flow_shifted": shifted(flow(), 0.5),
    "scaled_linear_shifted": shifted(DISCRETE["scaled_linear"], 0.25),
}
SCHEDULES = {"cosine": cosine(), "flow": flow(), **DISCRETE, **SHIFTED}
VARIANCE_PRESERVING = sorted(set(SCHEDULES) - {"flow"})
ZERO_SNR = [
    "cosine",
    "flow",
    "cosine_shifted",
    "flow_shifted",
    *(name for name in DISCRETE if name.endswith("_zero_snr")),
]


def times(schedule, count=129):
    return jnp.linspace(0.0, schedule.T, count)


@pytest.mark.parametrize("name", DISCRETE)
def test_ddpm_agrees_with_diffusers_alphas_cumprod(name):
    schedule, t = DISCRETE[name], jnp.asarray(GOLDEN["probes"], jnp.float32) + 1.0
    expected = np.asarray(GOLDEN["alphas_cumprod"][name])
    # diffusers accumulates in float32, so its own tail (values down to 1e-9) is good to some 1e-5
    # of itself only.
    np.testing.assert_allclose(
        np.asarray(schedule.alpha(t), np.float64) ** 2, expected, rtol=2e-6, atol=1e-10
    )
    np.testing.assert_allclose(
        np.asarray(schedule.sigma(t), np.float64) ** 2, 1.0 - expected, atol=1e-6
    )


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_variance_is_preserved(name):
    t = times(SCHEDULES[name], 1001)
    total = SCHEDULES[name].alpha(t) ** 2 + SCHEDULES[name].sigma(t) ** 2
    np.testing.assert_allclose(total, 1.0, atol=1e-6)


def test_flow_is_a_straight_line_from_data_to_noise():
    t = times(flow())
    np.testing.assert_allclose(flow().alpha(t) + flow().sigma(t), 1.0, atol=1e-7)
    np.testing.assert_array_equal(flow().sigma(t), t)


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_a_shift_of_flow_moves_its_log_snr_and_tells_the_network_the_new_time(shift):
    moved, t = flow(shift), times(flow())[1:-1]
    np.testing.assert_allclose(moved.alpha(t) + moved.sigma(t), 1.0, atol=1e-6)
    np.testing.assert_allclose(
        log_snr(moved, t), log_snr(flow(), t) - np.log(shift), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(moved.network_time(t), moved.sigma(t))
    assert float(moved.alpha(1.0)) == float(moved.sigma(0.0)) == 0.0 < float(moved.alpha(0.999))
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="shift must be above 0"):
            flow(bad)


CARRIED = {"cosine": cosine(), "flow": flow(), "flow 3": flow(3.0), **DISCRETE}


@pytest.mark.parametrize("source", ["cosine", "flow", "flow 3", "scaled_linear"])
@pytest.mark.parametrize("target", ["cosine", "flow 3", "scaled_linear", "linear_zero_snr"])
def test_a_time_carried_over_has_the_same_log_snr(source, target):
    source, target = CARRIED[source], CARRIED[target]
    t = times(source)[2:-2]
    there = jax.jit(same_log_snr(source, target))(t)
    inside = (there > 0.01 * target.T) & (there < 0.99 * target.T)  # both know that noise level
    assert inside.sum() > 60
    np.testing.assert_allclose(
        log_snr(source, t)[inside], log_snr(target, there)[inside], rtol=1e-4, atol=1e-4
    )
    back = same_log_snr(target, source)(there)
    np.testing.assert_allclose(back[inside], t[inside], rtol=1e-4)
    assert (np.diff(there) >= 0).all()


@pytest.mark.parametrize("name", ["cosine", "flow 3", "linear_zero_snr"])
def test_what_is_carried_over_starts_and_ends_where_the_schedule_does(name):
    ends = same_log_snr(flow(), CARRIED[name])(jnp.asarray([0.0, 1.0]))
    np.testing.assert_array_equal(ends, [0.0, CARRIED[name].T])
    # Less signal than Stable Diffusion's schedule ever has is at its end.
    assert same_log_snr(flow(), CARRIED["scaled_linear"])(0.99) == 1000.0


def test_cosine_is_a_quarter_turn():
    t = times(cosine())
    angle = np.pi / 2 * np.asarray(t, np.float64)
    np.testing.assert_allclose(cosine().alpha(t), np.cos(angle), atol=2e-7)
    np.testing.assert_allclose(cosine().sigma(t), np.sin(angle), atol=2e-7)


@pytest.mark.parametrize("name", SCHEDULES)
def test_alpha_decreases_and_sigma_increases(name):
    t = times(SCHEDULES[name])
    assert (np.diff(SCHEDULES[name].alpha(t)) < 0).all()
    assert (np.diff(SCHEDULES[name].sigma(t)) > 0).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_zero_is_clean_data_exactly(name):
    assert float(SCHEDULES[name].alpha(0.0)) == 1.0
    assert float(SCHEDULES[name].sigma(0.0)) == 0.0


@pytest.mark.parametrize("name", ZERO_SNR)
def test_terminal_snr_is_zero_exactly(name):
    schedule = SCHEDULES[name]
    assert float(schedule.alpha(schedule.T)) == 0.0
    assert float(schedule.sigma(schedule.T)) == 1.0


@pytest.mark.parametrize("name", DISCRETE)
def test_continuous_reading_is_the_table_at_integers(name):
    alpha_bar = np.concatenate([[1.0], np.cumprod(1.0 - BETAS[name])])
    t = jnp.arange(alpha_bar.size, dtype=jnp.float32)
    # Interpolation in float32 costs the last value of squaredcos_cap_v2, a thousandth of its
    # neighbour, some 1e-5 of itself.
    np.testing.assert_allclose(DISCRETE[name].alpha(t), np.sqrt(alpha_bar), rtol=2e-5)
    np.testing.assert_allclose(DISCRETE[name].alpha(t[:-1]), np.sqrt(alpha_bar[:-1]), rtol=1e-6)
    # A relative tolerance: σ(1) is 0.01 and must not come from 1 - α² in float32.
    np.testing.assert_allclose(DISCRETE[name].sigma(t), np.sqrt(1.0 - alpha_bar), rtol=1e-6)


@pytest.mark.parametrize("name", DISCRETE)
def test_continuous_reading_is_monotone_between_integers(name):
    schedule = DISCRETE[name]
    for i in (0, 1, 500, 998, 999):
        t = jnp.linspace(float(i), i + 1.0, 17)
        alpha, sigma = np.asarray(schedule.alpha(t)), np.asarray(schedule.sigma(t))
        assert (np.diff(alpha) <= 0).all() and (np.diff(sigma) >= 0).all()
        assert schedule.alpha(i + 1.0) < alpha[8] < schedule.alpha(float(i))
        halfway = (schedule.alpha(float(i)) ** 2 + schedule.alpha(i + 1.0) ** 2) / 2
        np.testing.assert_allclose(alpha[8] ** 2, halfway, rtol=1e-6)


@pytest.mark.parametrize("name", ["cosine", "scaled_linear", "flow_shifted"])
def test_batched_and_jitted_reading_equals_scalar_reading(name):
    schedule = SCHEDULES[name]
    t = times(schedule, 7)
    for read in (schedule.alpha, schedule.sigma, schedule.network_time):
        one_by_one = [read(float(time)) for time in t]
        assert all(value.shape == () for value in one_by_one)
        np.testing.assert_allclose(jax.jit(read)(t), np.stack(one_by_one), rtol=1e-6)


@pytest.mark.parametrize(
    "name", ["linear_zero_snr", "scaled_linear_zero_snr", "squaredcos_cap_v2_zero_snr"]
)
def test_rescaling_maps_alpha_affinely_and_keeps_its_first_value(name):
    before = np.sqrt(np.cumprod(1.0 - BETAS[name.removesuffix("_zero_snr")]))
    after = np.sqrt(np.cumprod(1.0 - BETAS[name]))
    assert after[-1] == 0.0
    np.testing.assert_allclose(after[0], before[0], rtol=1e-12)
    slope = (after[0] - after[-1]) / (before[0] - before[-1])
    np.testing.assert_allclose(after, before[0] + slope * (before - before[0]), atol=1e-12)
    assert ((BETAS[name] > 0) & (BETAS[name] <= 1)).all()


@pytest.mark.parametrize(
    "betas",
    [cosine_betas(), linear_betas(), scaled_linear_betas()],
    ids=["cosine", "linear", "scaled_linear"],
)
def test_discrete_alpha_is_exact_at_every_integer_time_the_last_included(betas):
    exact = np.concatenate([[1.0], np.cumprod(1.0 - betas)]) ** 0.5
    np.testing.assert_allclose(ddpm(betas).alpha(jnp.arange(len(betas) + 1.0)), exact, rtol=2e-7)


def test_cosine_betas_are_capped():
    assert cosine_betas(100).max() == 0.999
    assert cosine_betas(100, max_beta=0.5).max() == 0.5


@pytest.mark.parametrize("name", ["cosine", "flow", "scaled_linear", "linear_zero_snr"])
@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
def test_shifted_scales_alpha_over_sigma(name, scale):
    schedule = SCHEDULES[name]
    moved = shifted(schedule, scale)
    t = times(schedule)[1:-1]
    np.testing.assert_allclose(
        moved.alpha(t) / moved.sigma(t), scale * schedule.alpha(t) / schedule.sigma(t), rtol=2e-6
    )
    np.testing.assert_allclose(log_snr(moved, t) - log_snr(schedule, t), math.log(scale), atol=3e-6)
    assert moved.T == schedule.T
    np.testing.assert_array_equal(moved.network_time(t), schedule.network_time(t))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_shifted_refuses_a_scale_that_is_not_positive(scale):
    with pytest.raises(ValueError, match="snr_scale"):
        shifted(cosine(), scale)


@pytest.mark.parametrize("name", SCHEDULES)
def test_log_snr_falls_from_plus_infinity(name):
    schedule = SCHEDULES[name]
    values = np.asarray(log_snr(schedule, times(schedule)))
    assert values[0] == np.inf
    assert (values[-1] == -np.inf) == (name in ZERO_SNR)
    assert (np.diff(values[1:-1]) < 0).all()
    np.testing.assert_allclose(
        np.exp(values[1:-1]),
        (schedule.alpha(times(schedule)) / schedule.sigma(times(schedule)))[1:-1],
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    ("low", "high", "first", "last"),
    [(0.0, 1e3, 1, 1000), (20.0, 980.0, 21, 980), (0.5, 7.5, 1, 7), (3.0, 4.0, 4, 4)],
)
def test_training_times_of_a_discrete_schedule_are_its_integers_alike(low, high, first, last):
    sd = ddpm(linear_betas())
    n = 10 * (last - first + 1)
    u = jnp.asarray((np.arange(n) + 0.5) / n, jnp.float32)
    times = np.asarray(jax.jit(lambda u: training_time(sd, u, low, high))(u))
    np.testing.assert_array_equal(times, np.repeat(np.arange(first, last + 1), 10))
    ends = training_time(sd, jnp.float32([0.0, 1 - 2**-24, 1.0]), low, high)
    np.testing.assert_array_equal(ends, [first, last, last])
    other = shifted(linear_ratio(sd), 2.0)
    np.testing.assert_array_equal(training_time(other, u, low, high), times)


def test_training_times_never_leave_the_schedule_where_an_interval_holds_no_integer():
    sd = ddpm(linear_betas())
    ends = jnp.float32([0.0, 0.2, 5.0, 5.2, 1000.0]), jnp.float32([0.0, 0.7, 5.0, 5.7, 1000.0])
    for u in (0.0, 0.5, 1.0):
        found = training_time(sd, jnp.full(5, u), *ends)
        np.testing.assert_array_equal(found, [1.0, 1.0, 5.0, 5.0, 1000.0])


@pytest.mark.parametrize("made", [cosine(), flow()], ids=["cosine", "flow"])
def test_training_times_of_a_continuous_schedule_are_uniform_and_above_0(made):
    u = jnp.linspace(0.0, 1.0, 11)
    np.testing.assert_allclose(training_time(made, u)[1:], u[1:], rtol=1e-6)
    assert 0 < training_time(made, 0.0) < 1e-6
    low, high = jnp.float32([0.0, 0.2]), jnp.float32([0.3, 0.7])
    np.testing.assert_allclose(training_time(made, 0.5, low, high), [0.15, 0.45])


def test_network_time_is_the_training_step_of_a_discrete_schedule():
    t = jnp.asarray([1.0, 2.5, 1000.0])
    np.testing.assert_array_equal(DISCRETE["linear"].network_time(t), [0.0, 1.5, 999.0])
    np.testing.assert_array_equal(cosine().network_time(t), t)
    assert DISCRETE["linear"].T == 1000.0
    assert ddpm(linear_betas(10)).T == 10.0


@pytest.mark.parametrize(
    "betas",
    [
        np.array([0.1, 0.0, 0.2]),
        np.array([0.1, -0.1, 0.2]),
        np.array([0.1, 1.1]),
        np.array([0.1, np.nan]),
        np.array([[0.1, 0.2], [0.3, 0.4]]),
        np.array([0.1]),
        np.array([]),
    ],
    ids=["zero", "negative", "above one", "nan", "matrix", "single", "empty"],
)
def test_ddpm_refuses_betas_that_are_not_a_vector_in_the_unit_interval(betas):
    with pytest.raises(ValueError, match="betas must be a vector"):
        ddpm(betas)
