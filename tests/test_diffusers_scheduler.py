"""Schedulers against diffusers' own, on a network with a formula."""

import json
from pathlib import Path

import folders
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxdistill.interop import diffusers_scheduler
from jaxdistill.interop.diffusers_folder import FolderError
from jaxdistill.prediction import as_denoiser

WHERE = Path("scheduler_config.json")
LEADING = {**folders.BETAS, "steps_offset": 1, "timestep_spacing": "leading"}
V_ZERO = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
DDIM, PNDM, EULER, DPM = "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"
CASES = [
    *((name, {"timestep_spacing": spacing}) for name in (DDIM, PNDM, EULER, DPM) for spacing in ("leading", "trailing", "linspace")),
    *((name, {"timestep_spacing": "trailing", **V_ZERO}) for name in (DDIM, EULER, DPM)),
    (DDIM, {"set_alpha_to_one": True, "clip_sample": True, "beta_schedule": "squaredcos_cap_v2"}),
    (DDIM, {"prediction_type": "sample", "beta_schedule": "linear"}),
    (EULER, {"prediction_type": "v_prediction"}),
    (DPM, {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
]
NOISE = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 4, 4), np.float32))


def network(x, t, library):
    """Nothing linear, and different at every time."""
    return 0.6 * x + 0.3 * library.cos(3 * x) + t / 2000.0


def config_of(name, changes):
    extra = {PNDM: {"skip_prk_steps": True}, DDIM: {"clip_sample": False, "set_alpha_to_one": False}}.get(name, {})
    made = getattr(folders.diffusers, name)(**{**LEADING, **extra, **changes})
    return made, json.loads(made.to_json_string())


def ours(config, steps, **options):
    found = diffusers_scheduler.read(config, WHERE, **options)
    run = found.run(steps)

    def apply(params, x, t, cond):
        return network(x, t[:, None, None, None], jnp)

    denoiser = as_denoiser(apply, None, None, schedule=found.schedule, parameterization=found.parameterization)
    denoiser, state = found.transform(denoiser, NOISE), found.start(NOISE * run.scale)
    for t, t_next in zip(jnp.asarray(run.times), jnp.asarray(run.next_times), strict=True):
        state = found.step(denoiser(state.x, t), state, t, t_next)
    return state.x


def theirs(scheduler, steps):
    scheduler.set_timesteps(steps)
    x = torch.tensor(np.asarray(NOISE)) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), float(t), torch), t, x).prev_sample
    return x.numpy()


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_a_run_is_diffusers(name, changes):
    scheduler, config = config_of(name, changes)
    for steps in (20, 3, 1):
        found, expected = ours(config, steps, xl=True), theirs(scheduler, steps)
        # From a sigma of 4096 float32 keeps fewer digits.
        tolerance = 5e-4 if name in (EULER, DPM) and "rescale_betas_zero_snr" in changes else 2e-5
        assert np.abs(found - expected).max() < tolerance * np.abs(expected).max(), steps


def test_stable_diffusions_pipeline_corrects_old_configs():
    _, old = config_of(DDIM, {"steps_offset": 0, "clip_sample": True})
    scheduler, _ = config_of(DDIM, {})
    np.testing.assert_allclose(ours(old, 5), theirs(scheduler, 5), atol=2e-5)
    assert np.abs(ours(old, 5, xl=True) - theirs(scheduler, 5)).max() > 1e-2


def test_grid_and_solver_may_be_chosen():
    _, config = config_of(DDIM, {})
    np.testing.assert_allclose(ours(config, 4, grid="trailing"), theirs(config_of(DDIM, {"timestep_spacing": "trailing"})[0], 4), atol=2e-5)
    np.testing.assert_allclose(ours(config, 4, solver="dpm_solver_pp_2m"), theirs(config_of(DPM, {})[0], 4), atol=2e-5)


def test_noise_correction_is_the_class_that_travels_with_a_student(tmp_path, monkeypatch):
    (tmp_path / f"{diffusers_scheduler.NOISE_CORRECTION_MODULE}.py").write_text(diffusers_scheduler.NOISE_CORRECTION_CODE)
    monkeypatch.syspath_prepend(tmp_path)
    module = __import__(diffusers_scheduler.NOISE_CORRECTION_MODULE)
    for predicts in ("epsilon", "v_prediction", "sample"):
        config = diffusers_scheduler.student_config({**LEADING, "prediction_type": predicts}, noise_correction=True)
        scheduler = getattr(module, diffusers_scheduler.NOISE_CORRECTION).from_config(config)
        plain = ours(config, 3, noise_correction=False)
        for steps in (1, 2, 3):
            np.testing.assert_allclose(ours(config, steps), theirs(scheduler, steps), atol=3e-5)
        assert np.abs(ours(config, 3) - plain).max() > 1e-3


REFUSALS = [
    ({"_class_name": "UniPCMultistepScheduler"}, "'UniPCMultistepScheduler' is not supported, only DDIMScheduler"),
    ({"use_karras_sigmas": True}, "use_karras_sigmas = True is not supported"),
    ({"_class_name": DPM, "algorithm_type": "sde-dpmsolver++"}, "algorithm_type = 'sde-dpmsolver++'"),
    ({"_class_name": PNDM, "skip_prk_steps": False}, "skip_prk_steps = False"),
    ({"_class_name": PNDM, "skip_prk_steps": True, "prediction_type": "v_prediction"}, "PNDM with prediction_type"),
    ({"beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid' is not supported"),
    ({"prediction_type": "flow"}, "prediction_type = 'flow' is not supported"),
    ({"timestep_spacing": "karras"}, "timestep spacing 'karras' is not known"),
    ({"rescale_betas_zero_snr": True}, "'eps' cannot start from zero terminal SNR"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSALS)
def test_what_is_not_supported_is_named(changes, words):
    with pytest.raises(FolderError) as failure:
        diffusers_scheduler.read({"_class_name": DDIM, **LEADING, **changes}, WHERE)
    assert words in str(failure.value) and "\n" not in str(failure.value)


def test_a_last_step_of_first_order_that_is_not_there_is_refused():
    found = diffusers_scheduler.read({"_class_name": DPM, "final_sigmas_type": "sigma_min"}, Path("x"))
    assert found.run(15) and found.run(1)
    with pytest.raises(ValueError, match="'sigma_min' with 14 steps is not supported; take 15 or more"):
        found.run(14)


def test_a_chosen_solver_clips_only_where_the_folder_says_so():
    for config, clip in (({}, 0.0), ({"clip_sample": True}, 1.0), ({"clip_sample": False}, 0.0)):
        given = {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear", **config}
        assert diffusers_scheduler.read(given, Path("x"), xl=True, solver="ddim").clip == clip


def test_too_many_or_few_steps_are_refused():
    found = diffusers_scheduler.read({"_class_name": DDIM, **LEADING}, WHERE)
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=r"steps must be in 1\.\.1000"):
            found.run(steps)
