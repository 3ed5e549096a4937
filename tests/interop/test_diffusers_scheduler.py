"""Schedulers against diffusers' own, on a network with a formula."""

import functools
import json
from pathlib import Path

import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxdistill import sampling
from jaxdistill.interop import diffusers_scheduler
from jaxdistill.interop.diffusers_folder import FolderError
from jaxdistill.prediction import Prediction, as_denoiser
from jaxdistill.sampling import consistency_function

WHERE = Path("scheduler_config.json")
LEADING = {**folders.BETAS, "steps_offset": 1, "timestep_spacing": "leading"}
V, V_ZERO = (
    {"prediction_type": "v_prediction"},
    {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
    },
)
DDIM, PNDM, EULER, ANCESTRAL = (
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
)
DPM, UNIPC, LCM = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "LCMScheduler"
BY_RATIO = tuple(diffusers_scheduler.RATIOS)
LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
COSINE, MIN = {"beta_schedule": "squaredcos_cap_v2"}, {"final_sigmas_type": "sigma_min"}
SIGMAS = (EULER, ANCESTRAL, DPM, UNIPC)
CASES = [
    *(
        (name, {"timestep_spacing": spacing})
        for name in (DDIM, PNDM, *SIGMAS)
        for spacing in ("leading", "trailing", "linspace")
    ),
    *((name, {"timestep_spacing": "trailing", **V_ZERO}) for name in (DDIM, *SIGMAS)),
    *((name, {"timestep_spacing": "linspace", **V}) for name in (PNDM, *SIGMAS)),
    *((name, {key: True}) for name in (EULER, DPM, UNIPC) for key in BY_RATIO),
    *(
        (name, {key: True, "timestep_spacing": "trailing", **V})
        for name in (EULER, DPM, UNIPC)
        for key in BY_RATIO[:1]
    ),
    *(
        (name, {key: True, "timestep_spacing": "trailing", **V_ZERO})
        for name in (EULER, DPM, UNIPC)
        for key in BY_RATIO[:1]
    ),
    *((DPM, {key: True, **LINEAR}) for key in BY_RATIO),
    *((name, {BY_RATIO[0]: True, **MIN}) for name in (DPM, UNIPC)),
    (DDIM, {"set_alpha_to_one": True, "clip_sample": True, "beta_schedule": "squaredcos_cap_v2"}),
    (DDIM, {"prediction_type": "sample", "beta_schedule": "linear"}),
    (DPM, MIN),
    (DPM, {**MIN, "euler_at_final": True}),
    (DPM, {**MIN, "lower_order_final": False}),
    (DPM, {"euler_at_final": True}),
    (UNIPC, {**MIN, "timestep_spacing": "linspace"}),
    (UNIPC, {**MIN, "lower_order_final": False}),
    *(
        (UNIPC, {**MIN, "solver_type": "bh1", **more})
        for more in ({}, {**V, "timestep_spacing": "trailing"})
    ),
    *((LCM, more) for more in ({}, V, V_ZERO, {"prediction_type": "sample"})),
    (LCM, {"clip_sample": True, "set_alpha_to_one": False, "original_inference_steps": 20}),
    # c_skip counts: 0.2 at the first timestep, 0.99 at the last.
    (LCM, {"timestep_scaling": 1e-3, **COSINE}),
]
NOISE = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 4, 4), np.float32))


def network(x, t, library):
    """Nothing linear, and different at every time."""
    return 0.6 * x + 0.3 * library.cos(3 * x) + t / 2000.0


def config_of(name, changes):
    extra = {
        PNDM: {"skip_prk_steps": True},
        DDIM: {"clip_sample": False, "set_alpha_to_one": False},
    }.get(name, {})
    made = getattr(folders.diffusers, name)(**{**LEADING, **extra, **changes})
    return made, json.loads(made.to_json_string())


@functools.cache
def program(config, options):
    """The scheduler and its compiled step, one for all numbers of steps."""
    found = diffusers_scheduler.read(json.loads(config), WHERE, **dict(options))

    def apply(params, x, t, cond):
        return network(x, t[:, None, None, None], jnp)

    denoiser = as_denoiser(
        apply, None, None, schedule=found.schedule, parameterization=found.parameterization
    )
    return found, jax.jit(functools.partial(found.advance, denoiser))


def ours(config, steps, noise=NOISE, **options):
    found, advance = program(json.dumps(config), tuple(options.items()))
    run = found.run(steps)
    state = found.begin(noise, run)
    for t, t_next in zip(run.times, run.next_times, strict=True):
        state = advance(state, noise, t, t_next)
    return state.x


def theirs(scheduler, steps):
    scheduler.set_timesteps(steps)
    x = torch.tensor(np.asarray(NOISE)) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(
            network(scheduler.scale_model_input(x, t), float(t), torch), t, x
        ).prev_sample
    return x.numpy()


@pytest.fixture
def same_noise(monkeypatch):
    """Gives diffusers the fresh noise of a run of ours."""

    def give(config, steps, **options):
        keys, times = (
            sampling.keys_of(NOISE),
            diffusers_scheduler.read(config, WHERE, **options).run(steps).next_times,
        )
        folders.give_noise(
            # Nothing is drawn after LCM's last step: one array too many would be missing here.
            monkeypatch,
            [
                sampling.fresh_noise(keys, t, NOISE)
                for t in jnp.asarray(times)
                if t > 0 or config["_class_name"] != LCM
            ],
        )

    return give


@pytest.mark.costly
@pytest.mark.parametrize(("name", "changes"), CASES)
def test_a_run_is_diffusers(name, changes, same_noise):
    scheduler, config = config_of(name, changes)
    for steps in (20, 5, 3, 2, 1):
        if name in (ANCESTRAL, LCM):
            same_noise(config, steps, xl=True)
        found, expected = ours(config, steps, xl=True), theirs(scheduler, steps)
        # Diffusers' Euler carries x/alpha, of which float32 keeps fewer digits where sigma/alpha
        # begins at 4096.
        tolerance = (
            1e-3 if name in (EULER, ANCESTRAL) and "rescale_betas_zero_snr" in changes else 2e-5
        )
        assert np.abs(found - expected).max() < tolerance * np.abs(expected).max(), steps


@pytest.mark.parametrize("name", [EULER, DPM, UNIPC])
@pytest.mark.parametrize("key", BY_RATIO)
def test_steps_even_in_sigma_have_diffusers_sigmas_and_timesteps(name, key):
    scheduler, config = config_of(name, {key: True})
    found = diffusers_scheduler.read(config, WHERE, xl=True)
    for steps in (1, 2, 7, 50):
        scheduler.set_timesteps(steps)
        times = jnp.asarray(found.run(steps).times)
        np.testing.assert_allclose(
            found.schedule.network_time(times), scheduler.timesteps.numpy(), atol=1e-3
        )
        ratios = found.schedule.sigma(times) / found.schedule.alpha(times)
        np.testing.assert_allclose(ratios, scheduler.sigmas[:-1].numpy(), rtol=1e-4)


def test_stable_diffusions_pipeline_corrects_old_configs():
    _, old = config_of(DDIM, {"steps_offset": 0, "clip_sample": True})
    scheduler, _ = config_of(DDIM, {})
    np.testing.assert_allclose(ours(old, 5), theirs(scheduler, 5), atol=2e-5)
    assert np.abs(ours(old, 5, xl=True) - theirs(scheduler, 5)).max() > 1e-2


def test_grid_and_solver_may_be_chosen():
    _, config = config_of(DDIM, {})
    np.testing.assert_allclose(
        ours(config, 4, grid="trailing"),
        theirs(config_of(DDIM, {"timestep_spacing": "trailing"})[0], 4),
        atol=2e-5,
    )
    np.testing.assert_allclose(
        ours(config, 4, solver="dpm_solver_pp_2m"), theirs(config_of(DPM, {})[0], 4), atol=2e-5
    )


def test_folders_of_the_class_that_once_travelled_are_drawn_with_noise_correction():
    for predicts in ("epsilon", "v_prediction", "sample"):
        config = diffusers_scheduler.student_config({**LEADING, "prediction_type": predicts})
        assert config["_class_name"] == DDIM
        old = {**config, "_class_name": diffusers_scheduler.NOISE_CORRECTION}
        for steps in (1, 2, 3):
            expected = ours(config, steps, noise_correction=True)
            np.testing.assert_array_equal(ours(old, steps), expected)
        np.testing.assert_array_equal(ours(old, 3, noise_correction=False), ours(config, 3))
        assert np.abs(ours(old, 3) - ours(config, 3)).max() > 1e-3


# --------------------------------------------------------------------------------------- students

STUDENTS = diffusers_scheduler.STUDENT_SOLVERS


def stock(config):
    """Diffusers' own scheduler of a student's config."""
    return getattr(folders.diffusers, config["_class_name"]).from_config(config)


@pytest.mark.parametrize("T", [1000, 100, 1024, 20])
@pytest.mark.parametrize("solver", STUDENTS)
def test_a_students_times_are_those_that_stock_diffusers_takes(solver, T):
    config = diffusers_scheduler.student_config(
        {**LEADING, "num_train_timesteps": T}, solver=solver
    )
    scheduler = stock(config)
    for steps in range(1, 9):
        scheduler.set_timesteps(steps)
        expected = scheduler.timesteps.tolist()
        assert expected[0] == T - 1
        assert diffusers_scheduler.student_timesteps(config, steps) == expected
        grid = diffusers_scheduler.student_grid(solver, steps, float(T))
        assert grid.dtype == np.float32
        np.testing.assert_array_equal(grid, np.asarray(expected) + 1)


@pytest.mark.parametrize("solver", STUDENTS)
def test_a_student_ends_at_clean_images(solver):
    config = diffusers_scheduler.student_config(LEADING, solver=solver)
    run = diffusers_scheduler.read(config, WHERE).run
    # Diffusers' DDIM steps 1000 // N: of 6 and 7 steps the last ends at its timestep 0.
    clean = [steps for steps in range(1, 9) if run(steps).next_times[-1] == 0]
    assert clean == ([1, 2, 3, 4, 5, 8] if solver == "ddim" else list(range(1, 9)))


@pytest.mark.parametrize("more", [{}, V, V_ZERO], ids=["eps", "v", "zero_snr"])
@pytest.mark.parametrize("solver", STUDENTS)
def test_a_student_is_sampled_by_stock_diffusers(solver, more, same_noise):
    config = diffusers_scheduler.student_config({**LEADING, **more}, solver=solver)
    scheduler = stock(config)
    for steps in (1, 2, 3, 4):
        same_noise(config, steps)
        found, expected = ours(config, steps), theirs(scheduler, steps)
        assert np.abs(found - expected).max() < 1e-5 * max(1.0, np.abs(expected).max()), steps


def student_denoiser(solver):
    """A student's transform of a denoiser without meaning, at 8 times; (x̂0 before, x, times)."""
    config = diffusers_scheduler.student_config(LEADING, solver=solver)
    found = diffusers_scheduler.read(config, WHERE)
    x0 = jnp.asarray(np.random.default_rng(1).standard_normal((8, 4, 4, 4), np.float32))
    x, times = jnp.flip(x0), jnp.asarray(diffusers_scheduler.student_grid(solver, 8, 1000.0))
    return found.transform(lambda x, t: Prediction(x0, x), x)(x, times).x0, x0, x, times


def test_renoise_takes_the_networks_own_x0():
    found, x0, _, _ = student_denoiser("renoise")
    np.testing.assert_allclose(found, x0, rtol=3e-7)
    # To the last bit in diffusers' own arithmetic.
    scheduler = stock(diffusers_scheduler.student_config(LEADING, solver="renoise"))
    for t in torch.arange(1, 1000):
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(t)
        assert out == 1.0 and skip < 1e-12


@pytest.mark.parametrize("T", [1000, 100])
def test_consistency_is_the_function_that_was_trained(T):
    """`lcm.consistency_function`, whose time is a fraction of T."""
    config = diffusers_scheduler.student_config(
        {**LEADING, "num_train_timesteps": T}, solver="consistency"
    )
    assert config["timestep_scaling"] == 10.0 * 1000 / T
    x, x0 = NOISE[:1], NOISE[1:]
    for t in diffusers_scheduler.student_grid("consistency", 8, float(T)):
        of_time = [
            f(lambda *_: Prediction(x0, x))(x, jnp.float32(t)).x0
            for f in (
                consistency_function(float(T)),
                diffusers_scheduler.boundary_condition(config["timestep_scaling"]),
            )
        ]
        np.testing.assert_allclose(*of_time, atol=1e-5)


@pytest.mark.parametrize("solver", STUDENTS)
@pytest.mark.parametrize("name", [DDIM, LCM])
def test_a_student_has_the_betas_that_its_teachers_class_has_by_default(name, solver):
    config = diffusers_scheduler.student_config({"_class_name": name}, solver=solver)
    teacher = getattr(folders.diffusers, name)()
    np.testing.assert_array_equal(stock(config).betas, teacher.betas)
    np.testing.assert_allclose(
        diffusers_scheduler.betas_of({"_class_name": name}, WHERE), teacher.betas, atol=1e-7
    )


def test_what_a_student_cannot_have_is_refused():
    for call in (
        lambda: diffusers_scheduler.student_config(LEADING, solver="euler"),
        lambda: diffusers_scheduler.student_grid("euler", 1, 1000.0),
    ):
        with pytest.raises(ValueError, match="choose one of ddim, renoise, consistency"):
            call()
    for steps in (0, 51):
        with pytest.raises(ValueError, match=r"must be in 1\.\.50"):
            diffusers_scheduler.student_grid("renoise", steps, 1000.0)
    config = diffusers_scheduler.student_config(LEADING, solver="renoise")
    with pytest.raises(ValueError, match=r"steps must be in 1\.\.50"):
        diffusers_scheduler.student_timesteps(config, 51)
    # A grid that is chosen instead has as many times as the training.
    found = diffusers_scheduler.read(config, WHERE, grid="trailing")
    np.testing.assert_array_equal(found.run(100).times, np.arange(1000, 0, -10))


REFUSALS = [
    (
        {"_class_name": "DPMSolverSinglestepScheduler"},
        "'DPMSolverSinglestepScheduler' is not supported, only DDIMScheduler",
    ),
    ({"use_karras_sigmas": True}, "use_karras_sigmas = True is not supported"),
    (
        {"_class_name": ANCESTRAL, "use_karras_sigmas": True},
        "use_karras_sigmas = True is not supported",
    ),
    (
        {"_class_name": EULER, "use_karras_sigmas": True, "use_beta_sigmas": True},
        "use_karras_sigmas and use_beta_sigmas exclude each other",
    ),
    ({"_class_name": EULER, "euler_at_final": True}, "euler_at_final = True is not supported"),
    (
        {"_class_name": EULER, "final_sigmas_type": "sigma_min"},
        "final_sigmas_type = 'sigma_min' is not supported, only 'zero'",
    ),
    ({"_class_name": DPM, "use_lu_lambdas": True}, "use_lu_lambdas = True is not supported"),
    ({"_class_name": DPM, "sigma_max": 10.0}, "sigma_max = 10.0 is not supported"),
    (
        {"_class_name": DPM, "algorithm_type": "sde-dpmsolver++"},
        "algorithm_type = 'sde-dpmsolver++'",
    ),
    ({"_class_name": UNIPC, "solver_order": 3}, "solver_order = 3 is not supported, only 2"),
    ({"_class_name": UNIPC, "predict_x0": False}, "predict_x0 = False is not supported, only True"),
    ({"_class_name": UNIPC, "disable_corrector": [0]}, "disable_corrector = [0] is not supported"),
    (
        {"_class_name": UNIPC, "solver_type": "bh1"},
        "solver_type = 'bh1' cannot step to final_sigmas_type = 'zero'; set 'sigma_min'",
    ),
    (
        {"_class_name": UNIPC, "lower_order_final": False},
        "lower_order_final = False cannot step to final_sigmas_type = 'zero'",
    ),
    (
        {"_class_name": ANCESTRAL, "prediction_type": "sample"},
        "EulerAncestralDiscreteScheduler with prediction_type = 'sample'",
    ),
    ({"_class_name": PNDM, "skip_prk_steps": False}, "skip_prk_steps = False"),
    (
        {"_class_name": PNDM, "skip_prk_steps": True, "prediction_type": "sample"},
        "PNDMScheduler with prediction_type = 'sample'",
    ),
    (
        {"_class_name": PNDM, "skip_prk_steps": True, **V_ZERO},
        "diffusers' PNDM ignores rescale_betas_zero_snr = True",
    ),
    (
        {"_class_name": LCM, "original_inference_steps": 2000},
        "original_inference_steps must be in 1..1000, the timesteps of the training, got 2000",
    ),
    ({"_class_name": LCM, "timestep_scaling": 0.0}, "timestep_scaling must be above 0"),
    ({"_class_name": LCM, "thresholding": True}, "thresholding = True is not supported"),
    (
        {"_class_name": LCM, "rescale_betas_zero_snr": True},
        "'eps' cannot start from zero terminal SNR",
    ),
    ({"beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid' is not supported"),
    ({"prediction_type": "flow"}, "DDIMScheduler says that the network is of flow matching"),
    ({"prediction_type": "x"}, "prediction_type = 'x' is not supported"),
    ({"timestep_spacing": "karras"}, "timestep spacing 'karras' is not known"),
    ({"rescale_betas_zero_snr": True}, "'eps' cannot start from zero terminal SNR"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSALS)
def test_what_is_not_supported_is_named(changes, words):
    with pytest.raises(FolderError) as failure:
        diffusers_scheduler.read({"_class_name": DDIM, **LEADING, **changes}, WHERE)
    assert words in str(failure.value) and "\n" not in str(failure.value)


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
PROCESSES = {
    "EDMEulerScheduler": {"sigma_data": 0.5, "prediction_type": "epsilon"},
    "EDMDPMSolverMultistepScheduler": {"sigma_data": 1.0, "prediction_type": "v_prediction"},
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0},
    "FlowMatchHeunDiscreteScheduler": {},
    UNIPC: {**LEADING, "use_flow_sigmas": True},
    DPM: {**LEADING, **FLOW},
    EULER: {**LEADING, "timestep_type": "continuous", "prediction_type": "v_prediction"},
    DDIM: {**LEADING, "prediction_type": "flow_prediction"},
    "CogVideoXDDIMScheduler": {**LEADING, "snr_shift_scale": 3.0},
    "IPNDMScheduler": {"trained_betas": None, "num_train_timesteps": 1000},
    "SomebodysScheduler": {},
}


@pytest.mark.parametrize("solver", [None, *diffusers_scheduler.SOLVERS])
@pytest.mark.parametrize("name", PROCESSES)
def test_a_network_of_another_process_is_refused_whatever_the_solver(name, solver):
    config = {"_class_name": name, **PROCESSES[name]}
    with pytest.raises(FolderError, match="whatever the solver") as failure:
        diffusers_scheduler.read(config, WHERE, solver=solver)
    assert name in str(failure.value) and "--solver" not in str(failure.value)
    with pytest.raises(FolderError, match="whatever the solver"):
        diffusers_scheduler.student_config(config)


def test_a_hint_to_another_solver_is_given_only_where_that_draws():
    """Each refusal that names --solver is gone with it."""
    hints = 0
    for changes, _ in REFUSALS:
        config = {"_class_name": DDIM, **LEADING, **changes}
        with pytest.raises(FolderError) as failure:
            diffusers_scheduler.read(config, WHERE)
        if "--solver" in str(failure.value):
            hints += 1
            for solver in diffusers_scheduler.SOLVERS:
                diffusers_scheduler.read(config, WHERE, solver=solver)
    assert hints > 10


def test_a_grid_that_is_given_stands_instead_of_karras():
    plain, karras = (
        config_of(DPM, {"use_karras_sigmas": value, "timestep_spacing": "trailing"})[1]
        for value in (False, True)
    )
    np.testing.assert_array_equal(ours(karras, 4, grid="trailing"), ours(plain, 4))
    assert np.abs(ours(karras, 4) - ours(plain, 4)).max() > 1e-2


def test_fresh_noise_is_of_an_images_own_start_and_of_each_step():
    _, config = config_of(ANCESTRAL, {})
    both = ours(config, 5)
    for i in (0, 1):
        np.testing.assert_allclose(ours(config, 5, noise=NOISE[i : i + 1])[0], both[i], atol=1e-5)
    # Twice the same image, were the noise not its start's alone; and no step's noise is another's.
    twice = ours(config, 5, noise=jnp.concatenate([NOISE[:1], NOISE[:1]]))
    np.testing.assert_array_equal(twice[0], twice[1])
    drawn = [
        sampling.fresh_noise(sampling.keys_of(NOISE), jnp.float32(t), NOISE) for t in (800.0, 600.0)
    ]
    assert np.abs(np.corrcoef(np.ravel(drawn[0]), np.ravel(drawn[1]))[0, 1]) < 0.3


def test_a_chosen_solver_clips_only_where_the_folder_says_so():
    for config, clip in (({}, 0.0), ({"clip_sample": True}, 1.0), ({"clip_sample": False}, 0.0)):
        given = {
            "_class_name": "EulerDiscreteScheduler",
            "beta_schedule": "scaled_linear",
            **config,
        }
        assert diffusers_scheduler.read(given, Path("x"), xl=True, solver="ddim").clip == clip


@pytest.mark.parametrize("name, most", [(DDIM, 1000), ("LCMScheduler", 50)])
def test_too_many_or_few_steps_are_refused(name, most):
    found = diffusers_scheduler.read({"_class_name": name, **LEADING}, WHERE)
    assert found.run.most == most and len(found.run(most).times) == most
    for steps in (0, most + 1):
        with pytest.raises(ValueError, match=rf"steps must be in 1\.\.{most}"):
            found.run(steps)
