import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import TESTS

from jaxdistill.prediction import (
    as_denoiser,
    check_pair,
    diffuse,
    eps_prediction,
    eps_target,
    flow_prediction,
    flow_target,
    v_prediction,
    v_target,
    x0_prediction,
    x0_target,
)
from jaxdistill.schedule import (
    cosine,
    cosine_betas,
    ddpm,
    flow,
    rescale_zero_terminal_snr,
    scaled_linear_betas,
    shifted,
)

GOLDEN = json.loads((TESTS / "golden" / "diffusers.json").read_text())
SD = ddpm(scaled_linear_betas())
SD_ZERO_SNR = ddpm(rescale_zero_terminal_snr(scaled_linear_betas()))
DIFFUSERS_NAMES = {"epsilon": eps_prediction, "v_prediction": v_prediction, "sample": x0_prediction}

# parameterization, its target, the schedule it belongs to, and the times where it is well
# conditioned.
KINDS = {
    "eps": (eps_prediction, eps_target, cosine(), (0.0, 0.95)),
    "v": (v_prediction, v_target, cosine(), (0.0, 1.0)),
    "x0": (x0_prediction, x0_target, cosine(), (0.05, 1.0)),
    "flow": (flow_prediction, flow_target, flow(), (0.0, 1.0)),
}
deterministic = settings(max_examples=30, derandomize=True, deadline=None, database=None)
seeds = st.integers(0, 2**31 - 1)
unit = st.floats(0.0, 1.0, width=32)


def at(kind, u):
    """The conversion, its target, and α and σ at the time that u in [0, 1] stands for."""
    predict, target, schedule, (low, high) = KINDS[kind]
    t = low + u * (high - low)
    return predict, target, schedule.alpha(t), schedule.sigma(t)


def normal(seed, count, shape=(2, 3)):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
@deterministic
@given(u=unit, seed=seeds)
def test_target_converts_back_to_data_and_noise(kind, u, seed):
    predict, target, alpha, sigma = at(kind, u)
    x0, eps = normal(seed, 2)
    prediction = predict(target(x0, eps, alpha, sigma), alpha * x0 + sigma * eps, alpha, sigma)
    np.testing.assert_allclose(prediction.x0, x0, atol=2e-5)
    np.testing.assert_allclose(prediction.eps, eps, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@deterministic
@given(u=unit, seed=seeds)
def test_any_output_gives_a_pair_that_meets_at_x_and_is_its_target(kind, u, seed):
    """Holds for every output, right or wrong: the pair and the output say the same about x."""
    predict, target, alpha, sigma = at(kind, u)
    output, x = normal(seed, 2)
    x0, eps = predict(output, x, alpha, sigma)
    np.testing.assert_allclose(alpha * x0 + sigma * eps, x, atol=1e-5)
    np.testing.assert_allclose(target(x0, eps, alpha, sigma), output, atol=1e-5)


@pytest.mark.parametrize(
    "record", GOLDEN["ddim_steps"]["steps"], ids=lambda r: f"{r['prediction_type']}-{r['t']}"
)
def test_denoised_sample_agrees_with_diffusers(record):
    sample, output = (
        jnp.asarray(GOLDEN["ddim_steps"][key], jnp.float32) for key in ("sample", "output")
    )
    t = record["t"] + 1.0
    x0 = DIFFUSERS_NAMES[record["prediction_type"]](output, sample, SD.alpha(t), SD.sigma(t)).x0
    if record["clip"]:
        x0 = jnp.clip(x0, -1.0, 1.0)
    np.testing.assert_allclose(x0, np.asarray(record["x0"]), rtol=2e-6, atol=1e-6)


def test_diffuse_and_velocity_agree_with_diffusers():
    golden = {
        key: np.asarray(value, np.float32) for key, value in GOLDEN["forward_process"].items()
    }
    x0, noise, t = (jnp.asarray(golden[key]) for key in ("x0", "noise", "timesteps"))
    np.testing.assert_allclose(
        diffuse(SD, x0, noise, t + 1.0), golden["noisy"], rtol=2e-6, atol=1e-6
    )
    column = (-1, 1, 1, 1)
    alpha, sigma = SD.alpha(t + 1.0).reshape(column), SD.sigma(t + 1.0).reshape(column)
    np.testing.assert_allclose(
        v_target(x0, noise, alpha, sigma), golden["velocity"], rtol=2e-6, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4, 4)], ids=str)
def test_diffuse_gives_each_example_its_own_time(shape):
    # All axes are equal, so a batch of times that lands on another axis would not raise.
    x0, eps = normal(0, 2, shape)
    t = jnp.asarray([0.0, 0.2, 0.7, 1.0])
    rows = [diffuse(cosine(), x0[i : i + 1], eps[i : i + 1], t[i]) for i in range(4)]
    np.testing.assert_allclose(diffuse(cosine(), x0, eps, t), jnp.concatenate(rows), atol=1e-6)
    np.testing.assert_array_equal(rows[0][0], x0[0])
    np.testing.assert_array_equal(rows[3][0], eps[3])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "times", [[0.6] * 4, [0.1, 0.4, 0.7, 0.9]], ids=["one time", "a time each"]
)
def test_denoiser_of_a_perfect_network_finds_data_and_noise(kind, times):
    predict, target, schedule, _ = KINDS[kind]
    x0, eps = normal(1, 2, (4, 4, 4, 4))
    t = jnp.asarray(times)
    column = (-1, 1, 1, 1)
    perfect = target(x0, eps, schedule.alpha(t).reshape(column), schedule.sigma(t).reshape(column))
    denoiser = as_denoiser(
        lambda params, x, t, cond: perfect, None, None, schedule=schedule, parameterization=predict
    )
    x = diffuse(schedule, x0, eps, t)
    for time in [t] if len(set(times)) > 1 else [t, t[0]]:
        prediction = denoiser(x, time)
        np.testing.assert_allclose(prediction.x0, x0, atol=1e-5)
        np.testing.assert_allclose(prediction.eps, eps, atol=1e-5)


@pytest.mark.parametrize(
    "t", [jnp.float32(250.0), jnp.asarray([250.0, 1.0, 1000.0])], ids=["scalar", "batch"]
)
def test_network_is_called_once_with_its_own_time_for_each_example(t):
    seen = []

    def apply(params, x, time, cond):
        seen.append((params, x, time, cond))
        return x

    params, cond, (x,) = {"w": jnp.ones(2)}, [jnp.zeros(3)], normal(2, 1, (3, 2))
    as_denoiser(apply, params, cond, schedule=SD, parameterization=v_prediction)(x, t)
    [(got_params, got_x, got_time, got_cond)] = seen
    assert got_params is params and got_cond is cond and got_x is x
    np.testing.assert_array_equal(got_time, np.broadcast_to(t - 1.0, (3,)))


@pytest.mark.parametrize(
    "shape", [(2, 8, 8, 6), (1, 8, 8, 3), (2, 8, 8)], ids=["variance", "batch", "rank"]
)
def test_denoiser_refuses_an_output_of_another_shape(shape):
    # Without the check, the last two would broadcast against x to a wrong answer or a confusing
    # error.
    denoiser = as_denoiser(
        lambda *_: jnp.zeros(shape), None, None, schedule=cosine(), parameterization=v_prediction
    )
    with pytest.raises(ValueError, match="must keep the shape"):
        denoiser(jnp.zeros((2, 8, 8, 3)), jnp.float32(0.5))


@pytest.mark.parametrize(
    "schedule",
    [cosine(), flow(), shifted(cosine(), 4.0), SD_ZERO_SNR],
    ids=["cosine", "flow", "shifted", "sd"],
)
def test_eps_with_zero_terminal_snr_is_refused(schedule):
    with pytest.raises(ValueError, match="zero terminal SNR"):
        check_pair(schedule, eps_prediction)
    check_pair(schedule, x0_prediction)


@pytest.mark.parametrize(
    ("schedule", "fits", "does_not"),
    [
        (cosine(), v_prediction, flow_prediction),
        (SD, v_prediction, flow_prediction),
        (flow(), flow_prediction, v_prediction),
    ],
    ids=["cosine", "sd", "flow"],
)
def test_output_that_the_schedule_cannot_turn_into_x0_is_refused(schedule, fits, does_not):
    check_pair(schedule, fits)
    with pytest.raises(ValueError, match="needs"):
        check_pair(schedule, does_not)


def test_eps_with_some_signal_at_the_end_is_accepted():
    check_pair(SD, eps_prediction)
    check_pair(ddpm(cosine_betas()), eps_prediction)
