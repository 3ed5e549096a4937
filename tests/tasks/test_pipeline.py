"""Whole images against diffusers, from the command line as users draw them."""

import json
import shutil
from functools import partial

import flux_folders
import folders
import jax.numpy as jnp
import numpy as np
import pixart_folders
import pytest
import sd3_folders
import zimage_folders
from safetensors.numpy import load_file, save_file
from shell import assert_one_error_line, run_command
from test_distil import make_config

from jaxdistill import main, sample, sampling
from jaxdistill.errors import UserError
from jaxdistill.interop import families, torch_weights
from jaxdistill.page.engine import PipelinePainter
from jaxdistill.run import inputs
from jaxdistill.tasks.text_to_image import pipeline

SIZE = 64


@pytest.fixture(scope="module")
def pipes():
    """Loaded once: their programs are compiled once."""
    found = {}

    def get(variant):
        if variant not in found:
            found[variant] = pipeline.load(folders.folder(variant))
        return found[variant]

    return get


def latents(count=2, size=SIZE, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 4, size // 8, size // 8), np.float32)


def ours(pipe, **options):
    return pipe(folders.PROMPTS, height=SIZE, width=SIZE, **options)


@pytest.mark.costly
@pytest.mark.parametrize("variant", ["sd", "sd2", "sdxl"])
def test_images_are_diffusers(variant, pipes):
    """20 steps of the folder's own scheduler with guidance: PNDM for 1.x, DDIM with v and zero SNR
    for 2.x, Euler for XL.
    """
    start = latents()
    for steps, more in ((20, {}), (3, {"negative_prompt": "dog"})):
        negative = {k: [v] * 2 for k, v in more.items()}
        expected = folders.torch_images(
            folders.torch_pipe(variant), latents=start, steps=steps, guidance=6.0, **negative
        )
        found = ours(pipes(variant), steps=steps, guidance=6.0, latents=start, **more)
        assert found.shape == expected.shape and expected.std() > 0.05
        assert np.abs(found - expected).max() < 1 / 255


MEAN, STD = [0.1, -0.2, 0.3, 0.05], [1.5, 0.7, 1.1, 2.0]
MOVED = {"shift_factor": 0.5, "latents_mean": MEAN, "latents_std": STD}


@pytest.mark.costly
@pytest.mark.parametrize("variant", ["sd", "sdxl"])
def test_of_an_autoencoders_shifts_those_count_that_its_pipeline_looks_at(variant, tmp_path):
    """Neither pipeline looks at shift_factor, and XL's alone at the mean and std."""
    shutil.copytree(folders.folder(variant), tmp_path / variant)
    path = tmp_path / variant / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **MOVED}))
    stock, pipe = folders.load_torch(tmp_path / variant), pipeline.load(tmp_path / variant)
    once = {"latents": latents(), "steps": 1, "guidance": 1.0}
    expected = folders.torch_images(stock, **once)
    assert np.abs(ours(pipe, **once) - expected).max() < 1 / 255
    images = np.random.default_rng(0).uniform(-1, 1, (1, SIZE, SIZE, 3)).astype(np.float32)
    images_nchw = folders.torch.tensor(images.transpose(0, 3, 1, 2))
    z = stock.vae.encode(images_nchw).latent_dist.mean
    z = folders.nhwc(z * stock.vae.config.scaling_factor)
    factor = stock.vae.config.scaling_factor
    expected = (z - factor * np.array(MEAN)) / STD if variant == "sdxl" else z
    np.testing.assert_allclose(pipe.encode(images), expected, atol=1e-3)


DDIM = {"clip_sample": False, "set_alpha_to_one": False}
KARRAS = {"use_karras_sigmas": True, "timestep_spacing": "linspace"}
SCHEDULERS = [
    *((variant, "DDIMScheduler", DDIM) for variant in ("sd", "sdxl", "fresh")),
    ("freshxl", "EulerDiscreteScheduler", {}),
    ("sd", "DPMSolverMultistepScheduler", KARRAS),
    ("sdxl", "EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
]


@pytest.mark.costly
@pytest.mark.parametrize(("variant", "name", "settings"), SCHEDULERS)
def test_twenty_steps_of_other_schedulers_are_diffusers(
    variant, name, settings, tmp_path, monkeypatch
):
    """Whole images with guidance, of folders that differ in nothing but the scheduler."""
    path = folders.rescheduled(variant, tmp_path / "folder", name, **settings)
    pipe = pipeline.load(path)
    height, width = pipe.check()
    start = np.random.default_rng(0).standard_normal(
        (2, 4, height // pipe.vae.factor, width // pipe.vae.factor), np.float32
    )
    noise = jnp.asarray(start.transpose(0, 2, 3, 1))
    times = jnp.asarray(pipe.scheduler.run(20).next_times)
    folders.give_noise(
        monkeypatch,
        [
            sampling.fresh_noise(sampling.keys_of(noise), t, noise).transpose(0, 3, 1, 2)
            for t in times
        ],
    )
    theirs = folders.load_torch(path)
    assert type(theirs.scheduler).__name__ == name
    expected = folders.torch_images(theirs, latents=start, steps=20, guidance=6.0, size=height)
    found = pipe(folders.PROMPTS, steps=20, guidance=6.0, latents=start)
    assert found.shape == expected.shape and expected.std() > 0.05
    # Within 1/255 would not tell a timestep that is rounded from one that is cut: these are small
    # networks.
    assert np.abs(found - expected).max() < 0.02 / 255


def test_guidance_of_one_or_less_is_none_and_prompts_matter(pipes):
    start = latents()
    expected = folders.torch_images(folders.torch_pipe("sd"), latents=start, steps=4, guidance=1.0)
    found = ours(pipes("sd"), steps=4, guidance=1.0, latents=start)
    assert np.abs(found - expected).max() < 1 / 255
    halfway = folders.torch_images(folders.torch_pipe("sd"), latents=start, steps=4, guidance=0.5)
    assert np.array_equal(halfway, expected)
    for scale in (0.0, 0.5):
        assert np.array_equal(ours(pipes("sd"), steps=4, guidance=scale, latents=start), found)
    assert np.abs(found - ours(pipes("sd"), steps=4, guidance=6.0, latents=start)).max() > 2 / 255


@pytest.mark.long
def test_an_image_depends_on_its_seed_number_and_prompt_alone(pipes):
    options = {"height": SIZE, "width": SIZE, "steps": 2, "guidance": 6.0, "seed": 3}
    five = pipes("sd")(["a", "b", "c", "d", "e"], batch_size=2, **options)
    assert np.abs(five[3:4] - pipes("sd")(["d"], start=3, batch_size=2, **options)).max() < 1e-5
    assert np.abs(five[3] - five[2]).max() > 0.05


def test_tiles_meet_without_a_seam():
    """A decoder that works pixel by pixel gives the same whole or in tiles."""

    def decode(z):
        return jnp.repeat(jnp.repeat(z[..., :3], 8, axis=1), 8, axis=2)

    z = jnp.asarray(np.random.default_rng(0).standard_normal((1, 21, 13, 4), np.float32))
    tiled = pipeline.decode_tiled(decode, z, tile=8, overlap=2, factor=8)
    np.testing.assert_allclose(tiled, decode(z), atol=1e-5)
    with pytest.raises(ValueError, match=r"overlap must be in 1\.\.4"):
        pipeline.decode_tiled(decode, z, tile=8, overlap=5, factor=8)


def test_a_long_prompt_is_cut_and_said(pipes, capsys):
    words = "cat " * 90
    pipe = pipes("sd")
    capsys.readouterr()  # who makes the folder first writes, too
    found = pipe.text([words, "cat"])
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "more than 77 tokens" in line and "without 'cat cat" in line
    expected = folders.torch_pipe("sd").encode_prompt(words, "cpu", 1, False)[0].numpy()
    np.testing.assert_allclose(found["context"][:1], expected, atol=1e-4)


# ------------------------------------------------------------------------------------- command line


@pytest.mark.long
def test_command_draws_from_given_latents_as_diffusers_does(tmp_path, capsys):
    np.save(tmp_path / "noise.npy", latents())
    folder = folders.folder("sd")
    common = [f"--model={folder}", "--steps=3", "--guidance=6", "--height=64", "--width=64"]
    sample.main(
        [
            *common,
            "--prompt=photo",
            f"--latents={tmp_path / 'noise.npy'}",
            f"--out={tmp_path / 'x.npz'}",
        ]
    )
    found = np.load(tmp_path / "x.npz")
    expected = folders.torch_images(
        folders.torch_pipe("sd"), latents=latents(), steps=3, guidance=6.0
    )[1]
    assert found["images"].shape == (2, 64, 64, 3) and list(found["prompts"]) == ["photo", "photo"]
    assert np.abs(found["images"][1] - expected).max() < 1 / 255
    sample.main(
        [
            *common,
            "--prompt=photo",
            "--num=2",
            "--grid=trailing",
            "--solver=ddim",
            f"--out={tmp_path / 'x.png'}",
        ]
    )
    assert (tmp_path / "x.png").stat().st_size > 1000


REFUSALS = [
    ([], "draws from text; give --prompt"),
    (["--prompt=a", "--height=60"], "height must be a positive multiple of 8, got 60"),
    (["--prompt=a", "--steps=0"], "steps must be in 1..1000"),
    (["--prompt=a", "--guidance=nan"], "guidance must be a number"),
    (["--prompt=a", "--labels=1"], "--labels"),
    (["--prompt=a", "--tile=1"], "--tile must be 0 (never) or at least 2, got 1"),
    (["--prompt=a", "--num=0"], "--num must be at least 1"),
    (["--prompt=a", "--latents=missing.npy"], "--latents=missing.npy cannot be read"),
]


@pytest.mark.parametrize(("flags", "words"), REFUSALS)
def test_bad_flags_get_one_line(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit):
        sample.main([f"--model={folders.folder('sd')}", f"--out={tmp_path / 'x.png'}", *flags])
    assert words in capsys.readouterr().err


def test_latents_of_another_shape_are_refused(tmp_path, capsys):
    np.save(tmp_path / "noise.npy", latents(size=72))
    with pytest.raises(SystemExit):
        sample.main(
            [
                f"--model={folders.folder('sd')}",
                "--prompt=a",
                f"--latents={tmp_path / 'noise.npy'}",
                f"--out={tmp_path / 'x.png'}",
            ]
        )
    assert "latents must be float32 of shape [2, 4, 8, 8]" in capsys.readouterr().err


def test_an_eps_teacher_with_zero_terminal_snr_is_refused_before_its_weights_are_read(tmp_path):
    shutil.copytree(folders.folder("sd"), tmp_path / "sd")
    path = tmp_path / "sd" / "scheduler" / "scheduler_config.json"
    changes = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    (tmp_path / "sd" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    found = run_command(
        "jaxdistill.sample",
        f"--model={tmp_path / 'sd'}",
        "--prompt=a",
        f"--out={tmp_path / 'x.png'}",
    )
    assert_one_error_line(found, "zero terminal SNR", "scheduler_config.json")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--height=72"], "height must be a positive multiple of 16, got 72"),
        (["--negative_prompt=b"], "a negative prompt has no effect"),
        (["--steps=1001"], "steps must be in 1..1000, got 1001"),
        (["--guidance=-1"], "guidance must be a number of at least 0"),
        (["--latents={dir}/z.npy"], "packed latents must be of shape [1, 4, 16], got [1, 4, 9]"),
    ],
)
def test_a_call_is_refused_before_any_weights_are_read(
    flags, message, tmp_path, monkeypatch, capsys
):
    def never(*arguments, **options):
        raise AssertionError("weights are read")

    monkeypatch.setattr(torch_weights.WeightFiles, "read", never)
    np.save(tmp_path / "z.npy", np.zeros((1, 4, 9), np.float32))
    given = [f"--model={flux_folders.folder('dev')}", "--prompt=a", f"--out={tmp_path / 'x.png'}"]
    given += ["--height=32", "--width=32", *(flag.format(dir=tmp_path) for flag in flags)]
    with pytest.raises(SystemExit) as stop:
        sample.main(given)
    text = capsys.readouterr().err
    assert stop.value.code == 2 and message in text and text.count("error: ") == 1


@pytest.mark.costly
@pytest.mark.parametrize("damage", ["missing", "left over", "bin"])
@pytest.mark.parametrize("of", ["sample", "run"])
def test_a_damaged_text_encoder_is_named_before_any_weights_are_read(
    of, damage, tmp_path, monkeypatch
):
    """The network of FLUX is 24 GB."""
    shutil.copytree(flux_folders.folder("dev"), tmp_path / "dev")
    path = tmp_path / "dev" / "text_encoder_2" / "model.safetensors"
    tensors = load_file(path)
    if damage == "missing":
        tensors.popitem()
    else:
        tensors["spare"] = np.zeros(2, np.float32)
    save_file(tensors, path)
    if damage == "bin":
        path.rename(path.with_name("pytorch_model.bin"))

    def never(*arguments, **options):
        raise AssertionError("weights are read")

    monkeypatch.setattr(torch_weights.WeightFiles, "read", never)
    monkeypatch.setattr(inputs, "hash_files", never)
    wanted = "holds pytorch_model.bin only" if damage == "bin" else f"tensors {damage}: "
    with pytest.raises(UserError, match=rf"text_encoder_2 .*{wanted}") as caught:
        if of == "sample":
            pipeline.load(tmp_path / "dev")
        else:
            options = {"teacher.folder": str(tmp_path / "dev"), "data.height": 32}
            main.run(make_config(tmp_path, **options, **{"data.width": 32}), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_old_folders_of_a_small_sample_size_draw_as_diffusers_does():
    found = families.open_folder(folders.folder("sd"))
    for version, side in (("0.8.1", 64), ("0.9.0", 8), ("0.42.1", 8)):
        config = {**found.network.config, "_diffusers_version": version, "sample_size": 8}
        size = pipeline.image_size(
            found._replace(network=found.network._replace(config=config)), None, None
        )
        assert size == (side * found.vae.module.factor,) * 2, version


def test_a_tokenizer_of_another_model_is_named():
    found = families.open_folder(folders.folder("sd"))
    (part,) = found.text_encoders
    text = pipeline.TextEncoders(found)
    text.folder = found._replace(
        text_encoders=(part._replace(module=part.module.clone(vocab_size=3)),)
    )
    with pytest.raises(ValueError, match=r"tokenizer gives the token \d+, but its encoder knows 3"):
        text(["a cat"])


def test_sizes_default_to_the_checkpoints():
    assert pipeline.image_size(families.open_folder(folders.folder("sd")), None, 80) == (
        64,
        80,
    )


@pytest.mark.long
def test_the_servers_painter_draws_what_the_pipeline_draws():
    load = partial(
        pipeline.load, folders.folder("sd"), grid="trailing", solver="ddim"
    )  # starts at T, where noise correction acts
    painter, found = (
        PipelinePainter(load(), (2,), size=(48, 80)),
        {},
    )  # a teacher's, as its student's
    assert painter.max_steps == 1000  # the scheduler's own limit
    assert (painter.counts, painter.offered, painter.choice) == ((), (1, 2, 3), True)
    for correct in (False, True):
        run = painter.start(
            np.array([3]), [painter.encode("a cat")], 3, correct
        )  # filled up to two
        while run.done < run.of:
            run.advance()
        found[correct] = run.images()
        expected = load(noise_correction=correct)(["a cat"], seed=3, steps=3, height=48, width=80)
        assert found[correct].shape == (1, *painter.size, 3)
        np.testing.assert_allclose(found[correct], expected * 255.0, atol=1.0)
    assert np.abs(found[True].astype(int) - found[False]).max() > 3


TRANSFORMERS = {
    "sd3": lambda: sd3_folders.folder("medium35"),
    "pixart": lambda: pixart_folders.folder("alpha"),
    "flux": lambda: flux_folders.folder("dev"),
    "zimage": lambda: zimage_folders.folder("small"),
}


@pytest.mark.long
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_server_draws_a_student_of_a_transformer_at_its_own_steps(name):
    """As `sample` does, with what the network is told of sizes and guidance."""
    pipe = pipeline.load(TRANSFORMERS[name]())
    side = 2 * pipe.folder.family.multiple(pipe.folder)
    key = "timesteps" if name == "pixart" else "sigmas"
    pipe.settings = {"steps": 4, "height": side, "width": 2 * side, key: {"1": [], "4": []}}
    painter = PipelinePainter(pipe, (2,))
    assert (painter.offered, painter.size) == ((1, 4), (side, 2 * side))
    assert painter.choice == (name == "pixart")  # flow starts from noise alone
    run = painter.start(np.array([3]), [painter.encode("a cat")], 2, painter.correct)
    while run.done < run.of:
        run.advance()
    (found,), (expected,) = run.images(), pipe(["a cat"], seed=3, steps=2)
    np.testing.assert_allclose(found, expected * 255.0, atol=1.0)
    assert expected.std() > 0.02
