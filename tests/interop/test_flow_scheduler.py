"""Flow-matching schedulers against diffusers' own, on a network with a formula."""

import inspect
import json
from pathlib import Path

import folders
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from jaxdistill import sampling
from jaxdistill import schedule as schedules
from jaxdistill.interop import diffusers_scheduler, families, flow_scheduler
from jaxdistill.interop.diffusers_folder import FolderError
from jaxdistill.interop.families.family import FlowFamily
from jaxdistill.prediction import as_denoiser, flow_prediction

WHERE = Path("scheduler_config.json")
NOISE = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 4, 4), np.float32))
Euler = folders.diffusers.FlowMatchEulerDiscreteScheduler
STATIC = [{"shift": shift} for shift in (1.0, 1.15, 3.0, 6.5, 0.7)]
DYNAMIC = [
    {"use_dynamic_shifting": True, "shift": 3.0},
    {"use_dynamic_shifting": True, "base_shift": 0.4, "max_shift": 1.16},
    {"use_dynamic_shifting": True, "base_image_seq_len": 64, "max_image_seq_len": 8192},
    {"use_dynamic_shifting": True, "time_shift_type": "linear"},
]
SPACED = [
    {"shift": 3.0, key: True, **more}
    for key in diffusers_scheduler.RATIOS
    for more in ({}, {"use_dynamic_shifting": True})
]
ENDED = [
    {"shift_terminal": 0.1, "shift": 2.0},
    {"shift_terminal": 0.02, "use_dynamic_shifting": True},
    {"shift_terminal": 0.05, "use_karras_sigmas": True},
]
COUNTED = [{"num_train_timesteps": 500, "shift": 3.0}, {"num_train_timesteps": 37}]
CASES = [*STATIC, *DYNAMIC, *SPACED, *ENDED, *COUNTED]


def network(x, t, library):
    """Nothing linear, and different at every time."""
    return 0.6 * x + 0.3 * library.cos(3 * x) + t / 2000.0


def made(changes):
    scheduler = Euler(**changes)
    return scheduler, json.loads(scheduler.to_json_string())


def read(config, sigmas="linspace", **options):
    return flow_scheduler.read(
        config, WHERE, network_time=lambda t: 1000.0 * t, sigmas=sigmas, **options
    )


def set_timesteps(scheduler, steps, sigmas, tokens):
    """As the pipelines do it."""
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(tokens, *(scheduler.config[name] for name in names))
    dynamic = {"mu": mu} if scheduler.config.use_dynamic_shifting else {}
    if sigmas == "scheduler":
        scheduler.set_timesteps(steps, **dynamic)
    else:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), **dynamic)


def ours(found, steps, tokens):
    def apply(params, x, t, cond):
        return network(x, t[:, None, None, None], jnp)

    denoiser = as_denoiser(
        apply, None, None, schedule=found.schedule, parameterization=found.parameterization
    )
    run = found.run(steps, tokens)
    state = found.begin(NOISE, run)
    for t, t_next in jnp.stack([run.times, run.next_times], axis=1):
        state = found.advance(denoiser, state, NOISE, t, t_next)
    return np.asarray(state.x)


def theirs(scheduler):
    x = torch.tensor(np.asarray(NOISE))
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, float(t), torch), t, x).prev_sample
    return x.numpy()


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_sigmas_and_timesteps_are_those_of_diffusers(changes):
    scheduler, config = made(changes)
    for sigmas in flow_scheduler.GIVEN:
        found = read(config, sigmas)
        for steps in (1, 2, 3, 4, 7, 28):
            if steps == 1 and config["shift_terminal"]:
                continue  # neither side can end one step there
            for tokens in (1, 64, 1024, 4096, 6003):
                set_timesteps(scheduler, steps, sigmas, tokens)
                run = found.run(steps, tokens)
                times = np.append(run.times, run.next_times[-1:])
                np.testing.assert_array_max_ulp(times, scheduler.sigmas.numpy(), 1)
                told = np.asarray(found.schedule.network_time(jnp.asarray(run.times)))
                np.testing.assert_array_max_ulp(told, scheduler.timesteps.numpy(), 2)
                assert (run.next_times[:-1] == run.times[1:]).all() and run.scale == 1.0


@pytest.mark.parametrize("changes", [STATIC[2], DYNAMIC[0], ENDED[0]], ids=str)
def test_images_are_those_of_diffusers(changes):
    scheduler, config = made(changes)
    for sigmas in flow_scheduler.GIVEN:
        set_timesteps(scheduler, 5, sigmas, 300)
        image = ours(read(config, sigmas), 5, 300)
        np.testing.assert_allclose(image, theirs(scheduler), atol=2e-6)


def test_stochastic_sampling_is_a_step_to_fresh_noise(monkeypatch):
    scheduler, config = made({"stochastic_sampling": True, "shift": 3.0})
    found, keys = read(config), sampling.keys_of(NOISE)
    noises = [sampling.fresh_noise(keys, t, NOISE) for t in jnp.asarray(found.run(4).next_times)]
    folders.give_noise(monkeypatch, noises)
    set_timesteps(scheduler, 4, "linspace", 0)
    np.testing.assert_allclose(ours(found, 4, 0), theirs(scheduler), atol=2e-6)


def test_euler_is_the_ddim_step():
    x, u = NOISE, jnp.flip(NOISE, axis=0)
    for t, s in ((1.0, 0.75), (0.6, 0.2), (0.3, 0.0)):
        prediction = flow_prediction(u, x, jnp.float32(1.0 - t), jnp.float32(t))
        step = sampling.ddim(schedules.flow())
        found = step(prediction, sampling.start(x), jnp.float32(t), jnp.float32(s)).x
        np.testing.assert_allclose(found, x + (s - t) * u, atol=1e-6)


def test_dpm_solver_is_diffusers_on_flow_sigmas():
    config = made({"shift": 3.0})[1]
    scheduler = folders.diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True
    )
    found = read(config, solver="dpm_solver_pp_2m")
    run = found.run(6)
    scheduler.set_timesteps(6)
    scheduler.sigmas = torch.tensor(np.append(run.times, np.float32(0.0)))
    x = torch.tensor(np.asarray(NOISE))
    for t, sigma in zip(scheduler.timesteps, run.times, strict=True):
        x = scheduler.step(network(x, 1000.0 * float(sigma), torch), t, x).prev_sample
    np.testing.assert_allclose(ours(found, 6, 0), x.numpy(), atol=2e-6)


@pytest.mark.parametrize("solver", diffusers_scheduler.STUDENT_SOLVERS)
@pytest.mark.parametrize("changes", [*STATIC, *DYNAMIC, *ENDED[:1]], ids=str)
def test_stock_diffusers_calls_a_student_at_its_grid(changes, solver):
    teacher = made(changes)[1]
    shift = flow_scheduler.shift_of(teacher, 1024)
    config = flow_scheduler.student_config(teacher, solver=solver, shift=shift)
    scheduler = Euler.from_config(config)
    assert scheduler.config.stochastic_sampling == (solver != "ddim")
    for steps in (1, 2, 3, 4, 8):
        scheduler.set_timesteps(sigmas=flow_scheduler.student_sigmas(steps))
        grid = flow_scheduler.student_grid(solver, steps, shift)
        np.testing.assert_array_equal(grid, scheduler.sigmas.numpy()[:-1])
        np.testing.assert_array_equal(read(config).run(steps).times, grid)
        trailing = read(config, "scheduler", grid="trailing").run(steps).times
        np.testing.assert_array_equal(trailing, grid)


@pytest.mark.parametrize("changes", [STATIC[2], DYNAMIC[0], COUNTED[0]], ids=str)
def test_a_student_is_trained_at_times_that_follow_its_shift(changes):
    teacher = made(changes)[1]
    shift = flow_scheduler.shift_of(teacher, 1024)
    schedule = flow_scheduler.training_schedule(
        teacher, network_time=lambda t: 1000.0 * t, shift=shift
    )
    stock = Euler.from_config(flow_scheduler.student_config(teacher, solver="ddim", shift=shift))
    stock.set_timesteps(sigmas=flow_scheduler.student_sigmas(4))
    grid = jnp.asarray(sampling.trailing_grid(4, schedule.T))
    np.testing.assert_array_equal(grid, flow_scheduler.student_grid("ddim", 4, 1.0))
    np.testing.assert_allclose(schedule.sigma(grid), stock.sigmas[:-1], rtol=1e-6)
    np.testing.assert_allclose(schedule.network_time(grid), stock.timesteps, rtol=1e-6)


@pytest.mark.parametrize("family", [f for f in families.FAMILIES if isinstance(f, FlowFamily)])
def test_a_family_trains_where_its_students_scheduler_calls(family):
    config = flow_scheduler.student_config(made(STATIC[2])[1], solver="ddim", shift=3.0)
    scheduler = flow_scheduler.read(
        config, WHERE, network_time=family.network_time, sigmas=family.sigmas, grid="trailing"
    )
    schedule = family.training_schedule(config, scheduler.schedule)
    grid = jnp.asarray(family.student_grid(config, "ddim", 4, schedule))
    times = jnp.asarray(scheduler.run(4).times)
    np.testing.assert_allclose(schedule.sigma(grid), times, rtol=1e-6)
    told = scheduler.schedule.network_time(times)
    np.testing.assert_allclose(schedule.network_time(grid), told, rtol=1e-6, atol=1e-6)


def test_a_students_shift_is_its_teachers_at_its_size():
    for changes in DYNAMIC:
        teacher = made(changes)[1]
        for tokens in (64, 1024, 4096):
            shift = flow_scheduler.shift_of(teacher, tokens)
            static = flow_scheduler.student_grid("ddim", 4, shift)
            np.testing.assert_allclose(read(teacher).run(4, tokens).times, static, rtol=1e-6)


def test_noise_correction_changes_nothing():
    config = made({"shift": 3.0})[1]
    plain, corrected = (ours(read(config, noise_correction=on), 4, 0) for on in (False, True))
    np.testing.assert_array_equal(plain, corrected)
    prediction = flow_prediction(jnp.ones_like(NOISE), NOISE, jnp.float32(0.0), jnp.float32(1.0))
    np.testing.assert_array_equal(prediction.eps, NOISE)


def test_our_defaults_are_those_of_diffusers():
    signature = inspect.signature(Euler.__init__).parameters
    for key, value in flow_scheduler.DEFAULTS.items():
        assert signature[key].default == value
    # So SD 3's pipeline, which would take 1.16 where there is no max_shift, never does.
    assert Euler.from_config({"use_dynamic_shifting": True}).config.max_shift == 1.15


BAD = [
    ({"_class_name": "DDIMScheduler"}, "not of flow matching"),
    ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "choose --solver=ddim"),
    ({"invert_sigmas": True}, "invert_sigmas"),
    ({"time_shift_type": "cubic"}, "'cubic' is not known, only exponential and linear"),
    ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "exclude each other"),
    ({"shift": 0.0}, "shift must be above 0"),
    ({"shift": None}, "shift must be above 0"),
    ({"num_train_timesteps": 0}, "num_train_timesteps"),
    ({"shift_terminal": 1.5}, "shift_terminal"),
    ({"use_dynamic_shifting": True, "max_shift": None}, "max_shift must be a number"),
    ({"use_dynamic_shifting": True, "base_image_seq_len": 4096}, "are both 4096"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=str)
def test_what_is_not_supported_is_refused(changes, message):
    with pytest.raises(FolderError, match=message) as failure:
        read({"_class_name": flow_scheduler.EULER, **changes})
    assert "\n" not in str(failure.value) and str(WHERE) in str(failure.value)


def test_what_a_run_cannot_have_is_refused():
    config = made({"shift_terminal": 0.1})[1]
    dynamic = made(DYNAMIC[0])[1]
    with pytest.raises(ValueError, match="not finite"):
        read(config).run(1)
    with pytest.raises(ValueError, match="number of image tokens"):
        read(dynamic).run(2)
    assert read(dynamic, tokens=64).run(2).times[1] == read(dynamic).run(2, 64).times[1]
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=r"1\.\.1000"):
            read(config).run(steps)
    with pytest.raises(FolderError, match="timestep spacing 'leading'"):
        read(config, grid="leading")
    with pytest.raises(FolderError, match="choose one of ddim"):
        read(config, solver="heun")
    with pytest.raises(ValueError, match="shift must be above 0"):
        flow_scheduler.student_config(config, solver="ddim", shift=0.0)
    with pytest.raises(ValueError, match="not known"):
        flow_scheduler.student_grid("euler", 2, 3.0)
