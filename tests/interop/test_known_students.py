"""Published students: their samplers against stock diffusers, called as their model cards say."""

import json
from functools import partial

import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_diffusers_scheduler import NOISE, network, theirs

from jaxdistill import interop, sampling
from jaxdistill.interop import Beside, families, how_to_sample
from jaxdistill.interop.diffusers_folder import FolderError
from jaxdistill.interop.known_students import KINDS, Known, known, of
from jaxdistill.prediction import as_denoiser
from jaxdistill.tasks.text_to_image import pipeline

TRAILING = {"timestep_spacing": "trailing"}
CARDS = {
    # As written in the cards: the class, what `from_config` is given, and what the call is.
    "lcm": ("LCMScheduler", {}, {}),
    "turbo": ("EulerAncestralDiscreteScheduler", TRAILING, {}),
    "lightning:2": ("EulerDiscreteScheduler", TRAILING, {}),
    "lightning:4": ("EulerDiscreteScheduler", TRAILING, {}),
    "lightning:8": ("EulerDiscreteScheduler", TRAILING, {}),
    "lightning:1": ("EulerDiscreteScheduler", {**TRAILING, "prediction_type": "sample"}, {}),
    "hyper:2": ("DDIMScheduler", TRAILING, {}),
    "hyper:8": ("DDIMScheduler", TRAILING, {}),
    "dmd2": ("LCMScheduler", {}, {"timesteps": [999, 749, 499, 249]}),
    "dmd2:1": ("LCMScheduler", {}, {"timesteps": [399]}),
}


def stock(name, config):
    kind, changes, call = CARDS[name]
    return getattr(folders.diffusers, kind).from_config(config, **changes), call


def give_noise(monkeypatch, kind, times, noise, order=(0, 1, 2, 3)):
    """Diffusers gets our fresh noise; after its last step LCM draws none."""
    keys = sampling.keys_of(noise)
    ends = [t for t in times if t > 0 or kind != "LCMScheduler"]
    drawn = [sampling.fresh_noise(keys, jnp.float32(t), noise).transpose(order) for t in ends]
    folders.give_noise(monkeypatch, drawn)


def scheduler_config(variant):
    """With what the published ones hold beside their own class's settings."""
    path = folders.folder(variant) / "scheduler/scheduler_config.json"
    return {**json.loads(path.read_text()), "clip_sample": False, "set_alpha_to_one": False}


@pytest.mark.parametrize("variant", ["sd", "sd2", "sdxl"])
@pytest.mark.parametrize("name", CARDS)
def test_a_known_students_run_is_that_of_its_card(name, variant, monkeypatch):
    """From the scheduler of the base that it was made of: PNDM, DDIM with v, Euler."""
    student, config = known(name), scheduler_config(variant)
    folder = families.open_folder(folders.folder(variant))._replace(scheduler=config)
    found = student.scheduler(folder)

    def apply(params, x, t, cond):
        return network(x, t[:, None, None, None], jnp)

    denoiser = as_denoiser(
        apply, None, None, schedule=found.schedule, parameterization=found.parameterization
    )
    advance = jax.jit(partial(found.advance, denoiser))
    for steps in {student.counts[0], student.steps, student.counts[-1]}:
        scheduler, call = stock(name, config)
        run = found.run(steps)
        give_noise(monkeypatch, CARDS[name][0], run.next_times, NOISE)
        if call:
            monkeypatch.setattr(
                scheduler, "set_timesteps", partial(scheduler.set_timesteps, **call)
            )
        state = found.begin(NOISE, run)
        for t, t_next in zip(run.times, run.next_times, strict=True):
            state = advance(state, NOISE, t, t_next)
        expected = theirs(scheduler, None if call else steps)
        # Euler carries x/alpha, of which float32 keeps less from zero terminal SNR.
        near = 1e-3 if variant == "sd2" else 2e-5
        assert np.abs(state.x - expected).max() < near * np.abs(expected).max(), steps


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "variant", "steps", "guidance"),
    [
        ("lcm", "lcm", 4, 8.0),
        ("turbo", "small", 2, 0.0),
        ("lightning:1", "ssd", 1, 0.0),
        ("dmd2", "sdxl", 4, 0.0),
    ],
)
def test_images_of_known_students_are_diffusers(name, variant, steps, guidance, monkeypatch):
    """By our defaults, and as the card calls diffusers."""
    pipe = pipeline.load(folders.folder(variant), known=known(name))
    start = np.random.default_rng(0).standard_normal((2, 4, 8, 8), np.float32)
    theirs = folders.load_torch(folders.folder(variant))
    theirs.scheduler, call = stock(name, theirs.scheduler.config)
    assert pipe.steps in ((1, 4) if name == "turbo" else (steps,))
    times = pipe.scheduler.run(steps).next_times
    noise = jnp.asarray(start.transpose(0, 2, 3, 1))
    give_noise(monkeypatch, CARDS[name][0], times, noise, order=(0, 3, 1, 2))
    expected = folders.torch_images(theirs, latents=start, steps=steps, guidance=guidance, **call)
    found = pipe(folders.PROMPTS, steps=steps, height=64, width=64, latents=start)
    assert expected.std() > 0.02 and np.abs(found - expected).max() < 1 / 255
    if variant == "lcm":
        # The scale is an input, and a negative prompt has no say.
        other = pipe(folders.PROMPTS, guidance=1.0, height=64, width=64, latents=start)
        assert np.abs(other - found).max() > 1e-3
        negative = pipe(folders.PROMPTS, negative_prompt="dog", height=64, width=64, latents=start)
        assert np.array_equal(negative, found)


def test_what_is_asked_for_stands_and_the_rest_is_the_kinds():
    folder = families.open_folder(folders.folder("sd"))
    assert known("dmd2").settings(folder) == {"steps": 4, "guidance": 1.0}
    assert known("lightning", [2]) == Known("lightning", 2) == known("lightning:2", [2])
    assert known("lcm", [2, 8]).counts == tuple(range(1, 9)) and known("lcm:2").steps == 2
    assert known(None) is None
    # A grid or solver that is chosen stands instead of the kind's.
    run = known("dmd2").scheduler(folder, grid="trailing").run(4)
    assert list(run.times) == [1000, 750, 500, 250]
    run = known("dmd2:1").scheduler(folder, solver="ddim").run(1)
    assert (run.times, run.next_times) == (400, 1)  # where the base ends


@pytest.mark.parametrize(
    ("text", "counts", "words"),
    [
        ("pcm", (), "--as=pcm is not known; choose one of lcm, turbo, lightning, hyper, dmd2"),
        ("lightning", (), "say which, as in --as=lightning:4"),
        ("lightning", (2, 4), "each of its files is for one number of steps"),
        ("lightning:3", (), "--as=lightning has 1, 2, 4 or 8 steps, not 3"),
        ("turbo", (5,), "--as=turbo has 1, 2, 3 or 4 steps, not 5"),
        ("dmd2:four", (), "--as=dmd2 has 1 or 4 steps, not four"),
    ],
)
def test_what_no_known_student_is_is_refused(text, counts, words):
    with pytest.raises(FolderError) as failure:
        known(text, counts)
    assert words in str(failure.value)


def test_a_count_that_it_does_not_have_is_refused_by_its_run():
    folder = families.open_folder(folders.folder("sd"))
    for name, steps, words in (("dmd2", 1, "must be 4, got 1"), ("turbo", 9, "2, 3 or 4, got 9")):
        with pytest.raises(ValueError, match=words):
            known(name).scheduler(folder).run(steps)


def test_the_flags_help_names_every_kind():
    assert all(name in interop.AS["help"] for name in KINDS)


def test_a_lora_of_few_steps_is_drawn_as_the_file_beside_it_says(tmp_path):
    scheduler = {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"}
    told = how_to_sample.how_to_sample(how_to_sample.Student(scheduler, (1, 3), (16, 24)))
    for name in ("few", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / how_to_sample.FILE).write_text(json.dumps(told))
    few, other = (str(tmp_path / name / "a.safetensors") for name in ("few", "other"))
    style = str(tmp_path / "style.safetensors")
    found = of(None, (), Beside(loras=(style, f"{few}:0.9")))
    assert found.content == json.loads(json.dumps(told))
    assert of(None, (), Beside(loras=(style,))) is None
    assert of("lcm", (), Beside(loras=(few,))) == Known("lcm", 4)
    with pytest.raises(FolderError, match="are of two students"):
        of(None, (), Beside(loras=(few, other)))
    for name in ("timesteps", "diffusers"):
        cut = {key: value for key, value in told.items() if key != name}
        (tmp_path / "few" / how_to_sample.FILE).write_text(json.dumps(cut))
        with pytest.raises(FolderError, match=rf"it lacks {name}"):
            of(None, (), Beside(loras=(few,)))
