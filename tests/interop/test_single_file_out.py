"""A pipeline as one file: bit for bit what was not trained, and drawn by stock diffusers."""

import json
import re

import diffusers
import folders
import jax
import jax.numpy as jnp
import numpy as np
import original
import pytest
from safetensors.numpy import load_file, save_file

from jaxdistill.errors import UserError
from jaxdistill.interop import Beside, diffusers_folder, single_file_out, torch_weights
from jaxdistill.interop.original_layout import OPEN_TEXT, TEXT, UNET, VAE
from jaxdistill.interop.single_file import open_checkpoint
from jaxdistill.interop.single_file_out import KEEP

VARIANTS = ("sd", "sd2", "sdxl")
EXTRA = {
    "sd": {f"{TEXT}text_model.embeddings.position_ids": np.arange(77)[None]},
    "sd2": {
        "v_pred": np.zeros(0, np.float32),
        "ztsnr": np.zeros(0, np.float32),
        f"{OPEN_TEXT}logit_scale": np.ones((), np.float16),
        f"{OPEN_TEXT}transformer.resblocks.3.ln_1.weight": np.ones(16, np.float16),
    },
    "sdxl": {"conditioner.embedders.1.model.logit_scale": np.full((), 4.6, np.float32)},
}
"""Tensors that no module of ours has, as published files hold them."""
MARKS = {"sd": (), "sd2": ("v_pred", "ztsnr"), "sdxl": ()}
TYPES = {UNET: np.float16, VAE: np.float32}


def write(path, folder, unet, **options):
    given = {"dtype": KEEP, **options}
    single_file_out.write(path, single_file_out.entries(folder, unet, **given), {})
    return load_file(path)


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """A folder, and its file in several dtypes, with extra tensors and averages."""
    folder = folders.folder(request.param)
    path = tmp_path_factory.mktemp("out") / f"{request.param}.safetensors"
    tensors = load_file(original.write(folder, path))
    for name, value in tensors.items():
        dtype = next((t for start, t in TYPES.items() if name.startswith(start)), jnp.bfloat16)
        tensors[name] = value.astype(dtype)
    average = {"model_ema.decay": np.zeros(()), "model_ema.num_updates": np.zeros((), np.int32)}
    save_file(tensors | EXTRA[request.param] | average, path)
    return folder, path


def same_bits(a, b):
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def test_a_file_that_nothing_was_done_to_comes_out_bit_for_bit(pair, tmp_path):
    folder, path = pair
    teacher = open_checkpoint(path, Beside(like=folder))
    made = write(tmp_path / "out.safetensors", teacher, teacher.network.weights())
    wanted = {k: v for k, v in load_file(path).items() if not k.startswith("model_ema.")}
    assert made.keys() == wanted.keys()
    assert [name for name in made if not same_bits(made[name], wanted[name])] == []


@pytest.mark.costly
def test_only_the_unet_of_a_students_file_differs_from_its_teachers(pair, tmp_path):
    """The rest is the teacher's, not what the student's folder made of it."""
    folder, path = pair
    teacher = open_checkpoint(path, Beside(like=folder))
    params = diffusers_folder.load_params(teacher.network)
    moved = jax.tree.map(lambda a: a + 0.5, params)
    student = teacher._replace(file=None)
    unet = torch_weights.TreeWeights(moved)
    made = write(tmp_path / "o.safetensors", student, unet, dtype="float32", teacher=teacher)
    given = load_file(path)
    for name, value in made.items():
        if name.startswith(UNET):
            np.testing.assert_array_equal(value, given[name].astype(np.float32) + np.float32(0.5))
        else:
            assert same_bits(value, given[name]), name


@pytest.mark.costly
def test_what_is_cast_of_a_file_keeps_the_tensors_that_no_module_has(pair, tmp_path):
    folder, path = pair
    teacher = open_checkpoint(path, Beside(like=folder))
    unet = teacher.network.weights()
    made = write(tmp_path / "out.safetensors", teacher, unet, others="float16")
    given = load_file(path)
    assert made.keys() == {name for name in given if not name.startswith("model_ema.")}
    for name in made.keys() - EXTRA[folder.name].keys():
        assert same_bits(made[name], given[name].astype(np.float16)), name
    for name in EXTRA[folder.name]:
        assert same_bits(made[name], given[name]), name


@pytest.mark.costly
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_our_reader_finds_the_folder_in_its_file(pair, tmp_path, dtype):
    folder, _ = pair
    source = open_checkpoint(folder)
    path = tmp_path / "out.safetensors"
    made = write(path, source, source.network.weights(), dtype=dtype)
    dtypes = {str(value.dtype) for name, value in made.items() if name.startswith(UNET)}
    assert dtypes == {dtype}
    assert {"v_pred", "ztsnr"} & made.keys() == set(MARKS[folder.name])
    found = open_checkpoint(path, Beside(like=folder))
    assert found.scheduler == source.scheduler
    for theirs, ours in (
        (source.vae, found.vae),
        *zip(source.text_encoders, found.text_encoders, strict=True),
    ):
        weights = map(diffusers_folder.load_params, (theirs, ours))
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, *weights)))
    close = jax.tree.map(
        lambda a, b: bool(np.abs(a - b).max() <= 2**-8 * np.abs(a).max()),
        *map(diffusers_folder.load_params, (source.network, found.network)),
    )
    assert all(jax.tree.leaves(close))


def stock(path, folder, **options):
    """Images of stock diffusers: of a folder, or of a file with the folder's configs."""
    kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    pipeline = getattr(diffusers, kind)
    pipe = (
        pipeline.from_pretrained(folder, local_files_only=True)
        if path is None
        else pipeline.from_single_file(str(path), config=str(folder), local_files_only=True)
    )
    pipe.set_progress_bar_config(disable=True)
    latents = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    return folders.torch_images(pipe, latents=latents, steps=2, guidance=3.0, **options)


@pytest.mark.costly
def test_stock_diffusers_draws_the_file_as_the_folder(wide, tmp_path):
    folder, path = wide, tmp_path / "out.safetensors"
    source = open_checkpoint(folder)
    write(path, source, source.network.weights())
    wanted = stock(None, folder)
    np.testing.assert_allclose(stock(path, folder), wanted, atol=1e-5)
    write(path, source, source.network.weights(), dtype="float16", others="float16")
    np.testing.assert_allclose(stock(path, folder), wanted, atol=2 / 255)


@pytest.fixture(scope="module", params=VARIANTS)
def wide(request, tmp_path_factory):
    """A folder; of XL one whose encoders differ in width, by which stock converters tell them."""
    if request.param != "sdxl":
        return folders.folder(request.param)
    config, path = folders.text_config, tmp_path_factory.mktemp("wide") / "sdxl"

    def wider(size, **options):
        return config(size, **{"width": 24, **options} if options.get("act") == "gelu" else options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "text_config", wider)
        unet = {**folders.UNETS["sdxl"], "cross_attention_dim": 16 + 24}
        patch.setitem(folders.UNETS, "sdxl", unet)
        folders.make("sdxl", path)
    return path


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7e4, "the tensor conv_in.weight has values up to 7e+04, but float16 ends at 6.55e+04"),
        (np.nan, "the tensor conv_in.weight has 288 of 288 values that are not finite"),
    ],
)
def test_a_value_that_a_dtype_cannot_hold_is_told_with_its_tensor(tmp_path, value, message):
    source = open_checkpoint(folders.folder("sd"))
    weights = torch_weights.TreeWeights(diffusers_folder.load_params(source.network))
    read = weights.read
    bad = "conv_in.weight"
    weights.read = lambda name: np.full_like(read(name), value) if name == bad else read(name)
    path = tmp_path / "out.safetensors"
    with pytest.raises(UserError, match=re.escape(message)):
        write(path, source, weights, dtype="float16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("there.safetensors", "exists; choose another name"),
        ("x.ckpt", "must end in .safetensors"),
        ("no/x.safetensors", "the folder"),
    ],
)
def test_a_target_that_cannot_be_made_is_refused(tmp_path, name, message):
    (tmp_path / "there.safetensors").touch()
    with pytest.raises(UserError, match=message):
        single_file_out.check_target(tmp_path / name)


def test_the_metadata_follow_modelspec_and_the_teachers_own(tmp_path):
    folder = folders.folder("sd2")
    path = original.write(
        folder, tmp_path / "x.safetensors", metadata={"modelspec.license": "MIT", "other": "x"}
    )
    source, teacher = open_checkpoint(folder), open_checkpoint(path, Beside(like=folder))
    made = single_file_out.modelspec(source, teacher, title="x", size=(48, 64), hint="CFG 1")
    assert made["modelspec.architecture"] == "stable-diffusion-v2-768-v"
    assert made["modelspec.resolution"] == "64x48" and made["modelspec.prediction_type"] == "v"
    assert made["modelspec.license"] == "MIT" and "other" not in made
    assert all(f"modelspec.{k}" in made for k in ("sai_model_spec", "implementation", "title"))


def test_an_encoder_under_other_names_is_written_once(tmp_path):
    """As the newest transformers writes them, and OpenCLIP's projection as a linear layer."""
    for variant, old, new in (
        ("sd", f"{TEXT}text_model.", TEXT),
        ("sdxl", "embedders.1.model.text_projection", "embedders.1.model.text_projection.weight"),
    ):
        folder, path = folders.folder(variant), tmp_path / f"{variant}.safetensors"
        tensors = load_file(original.write(folder, path))
        for name in [name for name in tensors if old in name]:
            value = tensors.pop(name)
            value = value.T if new.endswith(".weight") else value
            tensors[name.replace(old, new)] = np.ascontiguousarray(value)
        save_file(tensors, path)
        teacher = open_checkpoint(path, Beside(like=folder))
        out = tmp_path / f"{variant}-out.safetensors"
        made = write(out, teacher, teacher.network.weights(), others="float16")
        assert len(made) == len(tensors)
        again = open_checkpoint(out, Beside(like=folder))
        for found, wanted in zip(again.text_encoders, teacher.text_encoders, strict=True):
            ours, theirs = map(diffusers_folder.load_params, (found, wanted))
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-2), ours, theirs)


@pytest.mark.parametrize(
    ("variant", "prediction", "marks", "metadata"),
    [
        ("sd", "eps", ("v_pred", "ztsnr"), {"modelspec.prediction_type": "v"}),
        ("sd2", "v", (), {"modelspec.architecture": "stable-diffusion-v2-512"}),
    ],
)
def test_a_students_file_says_what_the_student_predicts(
    tmp_path, variant, prediction, marks, metadata
):
    """Where a flag has won over the teacher's marks."""
    folder, out = folders.folder(variant), tmp_path / "out.safetensors"
    path = original.write(folder, tmp_path / "x.safetensors", marks=marks, metadata=metadata)
    teacher = open_checkpoint(path, Beside(like=folder, prediction=prediction))
    made = single_file_out.entries(teacher, teacher.network.weights(), dtype=KEEP)
    spec = single_file_out.modelspec(teacher, teacher, title="x", size=(64, 64), hint="")
    single_file_out.write(out, made, spec)
    again = open_checkpoint(out, Beside(like=folder))
    keys = ("prediction_type", "rescale_betas_zero_snr")
    found, wanted = (
        [bool(f.scheduler.get(k)) and f.scheduler[k] for k in keys] for f in (again, teacher)
    )
    assert found == wanted
