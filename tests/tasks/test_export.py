"""`python -m jaxdistill.export`: a student as one file or as a LoRA, and what it refuses."""

import json
import os

import folders
import jax
import numpy as np
import original
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from shell import assert_same_bits

from jaxdistill import export
from jaxdistill.interop import Beside, card, diffusers_folder, families, lora
from jaxdistill.interop.diffusers_folder import FolderError
from jaxdistill.interop.original_layout import UNET
from jaxdistill.interop.single_file import open_checkpoint
from jaxdistill.model import lora_init, lora_merge
from jaxdistill.run import checkpoint, inputs
from jaxdistill.tasks.text_to_image import pipeline, take_away
from jaxdistill.tasks.text_to_image.checksums import Checksums, weights_of

SETTINGS = {"steps": 2, "guidance": 1.0, "timesteps": {"1": [999], "2": [999, 499]}}


def make_run(workdir, params, *, updates=None):
    """A workdir as a finished run leaves it, of a student with these parameters and a teacher in
    one file; with LoRA, of these updates.
    """
    folder = folders.folder("sd")
    workdir.mkdir()
    teacher = original.write(folder, workdir.parent / "teacher.safetensors", marks=("betas",))
    source = open_checkpoint(teacher, Beside(like=folder))
    scheduler = {**source.scheduler, "timestep_spacing": "trailing"}
    extra = {pipeline.SETTINGS: SETTINGS}
    diffusers_folder.save_student(
        source, workdir / "diffusers", params, scheduler=scheduler, extra=extra
    )
    about = {"format": card.FORMAT, "role": "text-to-image student", "sampler": SETTINGS}
    checkpoint.export(workdir / "student", params, {**about, "components": "../diffusers"})
    config = {"teacher": {"folder": str(teacher), "like": str(folder)}, "data": {"prompts": ""}}
    (workdir / "config.json").write_text(json.dumps(config))
    if updates is not None:
        lora.save(workdir / "lora", updates, source)
    return workdir


def teacher_params():
    return diffusers_folder.load_params(families.open_folder(folders.folder("sd")).network)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A student whose layers have moved, and no biases or norms."""

    def moved(path, value):
        noise = np.random.default_rng(len(path)).standard_normal(value.shape)
        return value + 0.05 * noise.astype(np.float32) if path[-1].key == "kernel" else value

    params = jax.tree_util.tree_map_with_path(moved, teacher_params())
    return make_run(tmp_path_factory.mktemp("export") / "run", params)


def called(*flags):
    export.main([f"--{flag}" for flag in flags])


def metadata(path):
    with safe_open(path, "numpy") as file:
        return file.metadata()


def test_a_run_knows_what_its_student_was_made_from(run, tmp_path):
    """student/ and diffusers/ give one file: the UNet, and the rest of the teacher's file."""
    files = [tmp_path / f"{name}.safetensors" for name in ("student", "diffusers")]
    for path in files:
        called(f"model={run / path.stem}", f"out={path}", "dtype=float32")
    assert files[0].read_bytes() == files[1].read_bytes()
    made, given = load_file(files[0]), load_file(run.parent / "teacher.safetensors")
    assert made.keys() == given.keys() and "betas" in made
    rest = [name for name in given if not name.startswith(UNET)]
    assert all(made[name].tobytes() == given[name].tobytes() for name in rest)
    found = open_checkpoint(files[0], Beside(like=folders.folder("sd")))
    wanted = families.open_folder(run / "diffusers")
    assert_same_bits(*map(diffusers_folder.load_params, (found.network, wanted.network)))
    told = metadata(files[0])
    assert told["modelspec.title"] == "teacher in 2 steps"
    assert told["modelspec.usage_hint"].startswith("1 or 2 steps, CFG 1")
    assert told["modelspec.resolution"] == "64x64"


@pytest.mark.long
def test_a_lora_of_full_rank_makes_the_teacher_the_student(run, tmp_path, capsys):
    path = tmp_path / "lora.safetensors"
    options = ("format=kohya", "dtype=float32", "num=2")
    called(f"model={run / 'student'}", f"out={path}", "rank=32", *options)
    told = capsys.readouterr().out
    assert "kept: 100.0% of the squared difference of all weights" in told
    assert "a LoRA cannot hold: 0.0%" in told and ": 0.0% is left" in told
    assert metadata(path)["ss_network_dim"] == "32"
    pipe = folders.load_torch(folders.folder("sd"))
    pipe.load_lora_weights(tmp_path, weight_name=path.name)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    state = pipe.unet.state_dict()
    student = families.open_folder(run / "diffusers").network.weights()
    for name in student.shapes:
        np.testing.assert_allclose(state[name], student.read(name), atol=1e-5, err_msg=name)
    called(f"model={run / 'student'}", f"out={tmp_path / 'small.safetensors'}", "rank=1", *options)
    kept = capsys.readouterr().out.partition("kept: ")[2].partition("%")[0]
    assert 10 < float(kept) < 90


@pytest.mark.long
def test_a_student_that_was_trained_as_a_lora_gives_that(tmp_path, capsys):
    params = teacher_params()
    updates = lora_init(jax.random.key(0), params, ("to_q", "conv1"), 3)
    updates = jax.tree.map(lambda a: a + 0.1, updates)
    run = make_run(tmp_path / "run", lora_merge(params, updates), updates=updates)
    for form in lora.FORMATS:
        path = tmp_path / f"{form}.safetensors"
        called(f"model={run / 'student'}", f"out={path}", f"format={form}", "dtype=float32")
    found, wanted = load_file(path), load_file(run / "lora" / lora.FILE)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    kohya = load_file(tmp_path / "kohya.safetensors")
    assert {float(v) for n, v in kohya.items() if n.endswith(".alpha")} == {3.0}
    assert len(kohya) * 2 == len(wanted) * 3
    capsys.readouterr()
    with pytest.raises(SystemExit):
        called(
            f"model={run / 'student'}",
            f"out={tmp_path / 'x.safetensors'}",
            f"format={form}",
            "rank=2",
        )
    assert "--rank: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["out={dir}/there.safetensors"], "there.safetensors exists; choose another name"),
        (["out={dir}/x.ckpt"], "must end in .safetensors"),
        (["rank=4"], "--rank is of a LoRA; add --format=kohya"),
        (["format=kohya", "others=float16"], "a LoRA has no VAE"),
        (["format=kohya", "dtype=keep"], "a LoRA has no source"),
        (["format=kohya", "rank=33"], "--rank=33 must be in 1..32, the width of"),
        (["format=kohya", "num=-1"], "--num must be at least 0"),
        (["format=kohya", "prompts=/no.txt"], "/no.txt"),
        (["format=kohya", "teacher={xl}"], "has another UNet than"),
        (["teacher=/no"], "/no does not exist"),
        (["vae=/no"], "--vae goes with --teacher"),
        (["format=kohya", "lora=/no"], "--lora goes with --teacher"),
        (["model={sd}", "format=kohya"], "names no teacher; give --teacher=PATH"),
        (["model={teacher}"], "is a file already"),
        (["model={dir}"], "is not a pipeline folder"),
    ],
)
def test_a_mistake_is_told_in_one_line_and_leaves_no_file(run, tmp_path, capsys, flags, message):
    (tmp_path / "there.safetensors").touch()
    places = {name: folders.folder(name) for name in ("sd",)} | {"xl": folders.folder("sdxl")}
    places |= {"dir": tmp_path, "teacher": run.parent / "teacher.safetensors"}
    given = [flag.format(**places) for flag in flags]
    defaults = [f"model={run / 'student'}", f"out={tmp_path / 'x.safetensors'}"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        called(*defaults, *given)
    told = capsys.readouterr().err
    assert left.value.code == 2 and told.startswith("error: ") and told.count("\n") == 1, told
    assert message in told
    assert [path.name for path in tmp_path.iterdir()] == ["there.safetensors"]


def test_a_teacher_that_was_moved_is_told(run, tmp_path, capsys):
    config = json.loads((run / "config.json").read_text())
    config["teacher"]["folder"] = str(tmp_path / "gone.safetensors")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "diffusers").symlink_to(run / "diffusers")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        called(f"model={tmp_path / 'run' / 'diffusers'}", f"out={tmp_path / 'x.safetensors'}")
    assert "gone.safetensors, the teacher of" in capsys.readouterr().err


def test_a_teacher_that_has_changed_is_told(tmp_path):
    run = make_run(tmp_path / "run", teacher_params())
    student = take_away.open_student(run / "diffusers")
    teacher = take_away.open_teacher(student, "")
    parts = {"unet": teacher.network, "vae": teacher.vae}
    began = {weights_of(name): Checksums().input(part) for name, part in parts.items()}
    inputs.keep(run, inputs.check(run, began))
    file = tmp_path / "teacher.safetensors"
    os.utime(file)  # a copy of the same bytes
    assert take_away.open_teacher(student, "").file == file
    tensors = load_file(file)
    tensors["model.diffusion_model.out.2.bias"] += 1.0
    save_file(tensors, file)
    with pytest.raises(FolderError, match=r"weights \(.*\) have changed since .* give --teacher="):
        take_away.open_teacher(student, "")
    like = Beside(like=folders.folder("sd"))
    assert take_away.open_teacher(student, str(file), like) is not None
