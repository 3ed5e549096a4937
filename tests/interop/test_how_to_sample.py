"""What other programs are told of a student: the sampler it was trained for, in their terms."""

import functools
import json
from pathlib import Path

import comfyui
import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxdistill import sampling
from jaxdistill.interop import diffusers_scheduler, how_to_sample
from jaxdistill.interop.how_to_sample import Student
from jaxdistill.prediction import as_denoiser

NOISE = np.random.default_rng(0).standard_normal((2, 8, 8, 4), np.float32)
STABLE = {**folders.BETAS, "num_train_timesteps": 1000}
KINDS = {
    "eps": {},
    "v": {"prediction_type": "v_prediction"},
    "zero_snr": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}
SOLVERS = diffusers_scheduler.STUDENT_SOLVERS
STEPS = (1, 2, 3)


def student(kind="eps", solver="ddim", *, correct=False, skip=(0, 0), **changes):
    config = diffusers_scheduler.student_config(
        {**STABLE, **KINDS.get(kind, {}), **changes}, solver=solver
    )
    return Student(config, STEPS, (48, 64), correct, *skip)


def told(*arguments, **options):
    """As a reader of the file has it."""
    return json.loads(json.dumps(how_to_sample.how_to_sample(student(*arguments, **options))))


def network(x, t, library):
    """Stands for a trained network, whose output is near the noise at the start."""
    return 0.9 * x + 0.3 * library.cos(2 * x + t / 500.0)


@functools.cache
def program(config, correct):
    scheduler = diffusers_scheduler.read(
        json.loads(config), Path("scheduler_config.json"), noise_correction=correct
    )

    def apply(params, x, t, cond):
        return network(x, t[:, None, None, None], jnp)

    denoiser = as_denoiser(
        apply, None, None, schedule=scheduler.schedule, parameterization=scheduler.parameterization
    )
    return scheduler, jax.jit(functools.partial(scheduler.advance, denoiser))


def ours(about, steps):
    """The latents that this package draws of NOISE."""
    scheduler, advance = program(json.dumps(about.scheduler), about.noise_correction)
    run = scheduler.run(steps)
    state = scheduler.begin(jnp.asarray(NOISE), run)
    for t, t_next in zip(run.times, run.next_times, strict=True):
        state = advance(state, NOISE, t, t_next)
    return np.asarray(state.x)


def fresh(about, steps):
    """The noise that this package draws between the steps."""
    scheduler, _ = program(json.dumps(about.scheduler), about.noise_correction)
    times = jnp.asarray(scheduler.run(steps).next_times)
    keys = sampling.keys_of(jnp.asarray(NOISE))
    return iter([np.asarray(sampling.fresh_noise(keys, t, jnp.asarray(NOISE))) for t in times])


# -------------------------------------------------------------------------------------- diffusers


@pytest.mark.parametrize("steps", STEPS)
def test_a_plain_euler_sampler_takes_the_corrected_step_from_these_sigmas(steps):
    about = student(correct=True)
    section = told(correct=True)["diffusers"]["with_noise_correction"]
    scheduler = getattr(folders.diffusers, section["scheduler"]).from_config(
        about.scheduler, **section["from_config"]
    )
    scheduler.set_timesteps(sigmas=section["calls"][str(steps)]["sigmas"])
    x = torch.tensor(NOISE) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        out = network(scheduler.scale_model_input(x, t), float(t), torch)
        x = scheduler.step(out, t, x).prev_sample
    expected, plain = ours(about, steps), ours(student(), steps)
    np.testing.assert_allclose(scheduler.timesteps, about.timesteps(steps), atol=1e-3)
    error = np.abs(x.numpy() - expected).max()
    assert error < (1e-4 if steps == 1 else 0.02)
    assert steps == 1 or np.abs(plain - expected).max() > 30 * error


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_needs_the_folder_alone(kind):
    section = told(kind)["diffusers"]
    assert section["trust_remote_code"] is False and section["scheduler"] == "DDIMScheduler"
    for steps in STEPS:
        call = section["calls"][str(steps)]
        assert call == {
            "num_inference_steps": steps,
            "guidance_scale": 1.0,
            "height": 48,
            "width": 64,
        }
    # Only an eps network's correction has sigmas.
    assert ("with_noise_correction" in section) == (kind == "eps")


# ---------------------------------------------------------------------------------------- ComfyUI


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", [*SOLVERS, "ddim corrected"])
def test_a_workflow_draws_the_students_latents(kind, sampler):
    solver, _, corrected = sampler.partition(" ")
    about = student(kind, solver, correct=bool(corrected))
    how = how_to_sample.how_to_sample(about)
    for steps in STEPS:
        workflow = how_to_sample.comfyui_workflow(how, checkpoint="a.safetensors", steps=steps)
        comfyui.check(workflow)
        found = comfyui.run(
            workflow, functools.partial(network, library=np), NOISE, fresh(about, steps)
        )
        expected = ours(about, steps)
        # From zero SNR it starts at sigma 4519, and LCM's c_skip is 4e-6 of x/alpha. Of three DDIM
        # steps one ends a timestep beside the next one's start.
        tolerance = (1e-3 if steps < 3 else 1e-2) * max(1.0, np.abs(expected).max())
        assert np.abs(found - expected).max() < tolerance, steps


def test_correction_is_two_samplers_of_one_seed_where_it_was_trained():
    kinds = {
        correct: [node["class_type"] for node in workflow.values()]
        for correct in (False, True)
        for workflow in [
            how_to_sample.comfyui_workflow(told(correct=correct), checkpoint="a.safetensors")
        ]
    }
    assert [kinds[c].count("SamplerCustomAdvanced") for c in (False, True)] == [1, 2]
    assert [kinds[c].count("RandomNoise") for c in (False, True)] == [1, 1]
    exact = told("zero_snr", correct=True)["comfyui"]
    assert "with_noise_correction" not in exact


def test_the_lora_is_loaded_over_its_base():
    files = how_to_sample.files(told("v"), checkpoint="base", lora="few.safetensors")
    workflow = files[how_to_sample.WORKFLOW]
    comfyui.check(workflow)
    by_kind = {node["class_type"]: (name, node["inputs"]) for name, node in workflow.items()}
    assert by_kind["CheckpointLoaderSimple"][1] == {"ckpt_name": "base.safetensors"}
    name, inputs = by_kind["LoraLoaderModelOnly"]
    assert inputs["lora_name"] == "few.safetensors" and inputs["strength_model"] == 1.0
    assert by_kind["ModelSamplingDiscrete"][1]["model"] == [name, 0]
    assert by_kind["BasicGuider"][1]["model"] == [by_kind["ModelSamplingDiscrete"][0], 0]
    size = by_kind["EmptyLatentImage"][1]
    assert (size["height"], size["width"]) == (48, 64)


def test_a_teachers_styles_are_loaded_below_the_students_lora():
    how = {**told(), "loras": [{"file": "style.safetensors", "weight": 0.8, "hash": "0"}]}
    workflow = how_to_sample.comfyui_workflow(how, checkpoint="a", lora="few.safetensors")
    comfyui.check(workflow)
    by_kind = {node["class_type"]: (name, node["inputs"]) for name, node in workflow.items()}
    style, inputs = by_kind["LoraLoader"]
    assert (inputs["lora_name"], inputs["strength_clip"]) == ("style.safetensors", 0.8)
    assert by_kind["LoraLoaderModelOnly"][1]["model"] == [style, 0]
    assert by_kind["CLIPTextEncode"][1]["clip"] == [style, 1]
    merged = how_to_sample.comfyui_workflow(how, checkpoint="a").values()
    assert not [node for node in merged if "Lora" in node["class_type"]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_sigmas_are_those_of_comfyuis_table_at_the_students_timesteps(kind, solver):
    how = told(kind, solver)
    table = comfyui.table(zsnr=kind == "zero_snr")
    for steps in map(str, STEPS):
        *sigmas, end = how["comfyui"]["sigmas"][steps]
        np.testing.assert_allclose(sigmas, table[how["timesteps"][steps]], rtol=2e-5)
        nearest = np.abs(np.log(np.asarray(sigmas)[:, None] / table)).argmin(axis=1)
        assert end == 0 and list(nearest) == how["timesteps"][steps]


# ------------------------------------------------------------------------------------ A1111, Forge


def test_the_ui_schedules_are_the_students_times_or_half_a_timestep_beside():
    how = told()
    for steps in map(str, STEPS):
        n, times = int(steps), how["timesteps"][steps]
        uniform = np.linspace(999, 0, n + 1)[:-1]  # SGM Uniform
        turbo = (np.arange(1, n + 1) * (1000.0 / n) - 1)[::-1].round()
        np.testing.assert_allclose(how["a1111"]["timesteps"][steps], uniform, atol=0.05)
        np.testing.assert_array_equal(how["forge"]["timesteps"][steps], turbo)
        assert np.abs(uniform - times).max() <= 1 and list(turbo) == times
    assert (how["a1111"]["sampler"], how["a1111"]["schedule_type"]) == ("Euler", "SGM Uniform")
    assert how["forge"]["schedule_type"] == "Turbo"
    lcm = told("eps", "consistency")["forge"]
    assert (lcm["sampler"], lcm["timesteps"]["2"]) == ("LCM", [999.0, 509.0])


def test_what_a_program_cannot_draw_is_said():
    for how in (told(prediction_type="sample"), told(beta_end=0.02)):
        for ui in ("comfyui", "a1111", "forge"):
            assert set(how[ui]) == {"cannot"}
        with pytest.raises(ValueError, match=r"^ComfyUI cannot draw this student: it "):
            how_to_sample.comfyui_workflow(how, checkpoint="a.safetensors")
        assert list(how_to_sample.files(how, checkpoint="a")) == [how_to_sample.FILE]
    assert "v-prediction" in told("v", "renoise")["a1111"]["cannot"]
    assert told(correct=True)["a1111"]["without"] == ["noise correction"]


@pytest.mark.parametrize(("out", "layer"), [(0, -2), (1, -3)])
def test_clip_skip_travels(out, layer):
    """One layer less than the program's own default: 1.x takes the last, 2.x and XL the one before
    it.
    """
    how = told(skip=(1, out))
    assert how["clip_skip"] == how["diffusers"]["calls"]["1"]["clip_skip"] == 1
    assert how["a1111"]["settings"].get("Clip skip") == (None if out else 2)
    assert ("without" in how["a1111"]) == bool(out)
    workflow = how_to_sample.comfyui_workflow(how, checkpoint="a.safetensors")
    comfyui.check(workflow)
    nodes = {node["class_type"]: node["inputs"] for node in workflow.values()}
    assert nodes["CLIPSetLastLayer"]["stop_at_clip_layer"] == layer
    assert workflow[nodes["CLIPTextEncode"]["clip"][0]]["class_type"] == "CLIPSetLastLayer"


# ---------------------------------------------------------------------------------------- command


@pytest.fixture
def written(tmp_path):
    for name, value in how_to_sample.files(told(), checkpoint="base", lora="l.safetensors").items():
        (tmp_path / name).write_text(json.dumps(value))
    return tmp_path


def test_the_command_tells_and_writes(written, capsys):
    how_to_sample.main([f"--model={written}", "--ui=a1111"])
    assert json.loads(capsys.readouterr().out)["sampler"] == "Euler"
    out = written / "w.json"
    flags = [f"--model={written}", "--ui=comfyui", f"--out={out}"]
    how_to_sample.main([*flags, "--steps=2", "--checkpoint=mine.safetensors"])
    workflow = json.loads(out.read_text())
    comfyui.check(workflow)
    expected = how_to_sample.comfyui_workflow(
        told(), checkpoint="mine.safetensors", lora="l.safetensors", steps=2
    )
    assert workflow == expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ui=invoke"], "--ui=invoke is not known; choose one of diffusers, comfyui, a1111"),
        (["--ui=forge", "--out=w.json"], "only --ui=comfyui has a workflow"),
        (["--ui=a1111", "--steps=2"], "--steps is of a workflow"),
        (["--ui=comfyui", "--out=w.json", "--steps=9"], "steps = 9 is not what the student was"),
        (["--ui=comfyui", "--model=nowhere"], "has no how_to_sample.json; give the diffusers/ or"),
    ],
)
def test_bad_flags_get_one_line(flags, words, written, capsys):
    with pytest.raises(SystemExit) as left:
        how_to_sample.main([f"--model={written}", *flags])
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.startswith("error: ") and words in error
    assert error.count("\n") == 1
