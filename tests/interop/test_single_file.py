"""A single file is the folder that it was made from, and stock converters agree on it."""

import json
import re
import shutil
from types import SimpleNamespace

import diffusers.loaders.single_file_utils as stock
import folders
import jax
import numpy as np
import original
import pytest
import text_config
import torch
from safetensors.numpy import load_file, save_file

from jaxdistill import sample
from jaxdistill.interop import (
    Beside,
    architectures,
    diffusers_folder,
    diffusers_scheduler,
    original_layout,
    torch_weights,
)
from jaxdistill.interop.diffusers_folder import FolderError
from jaxdistill.interop.original_layout import OPEN_TEXT, TEXT, UNET, VAE, XL_TEXT
from jaxdistill.interop.single_file import open_checkpoint
from jaxdistill.models.text.clip import CLIPText
from jaxdistill.tasks.text_to_image.setup import open_teacher

VARIANTS = ("sd", "sd2", "sdxl")


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """A folder, and its file."""
    folder = folders.folder(request.param)
    return folder, original.write(
        folder, tmp_path_factory.mktemp("file") / f"{request.param}.safetensors"
    )


def parts(found):
    return (found.unet, found.vae, *found.text_encoders)


def assert_same_weights(found, wanted):
    loaded = map(diffusers_folder.load_params, (found, wanted))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, *loaded)))


def test_every_weight_of_the_file_is_the_folders(pair):
    folder, path = pair
    ours, theirs = open_checkpoint(path, Beside(like=folder)), open_checkpoint(folder)
    for found, wanted in zip(parts(ours), parts(theirs), strict=True):
        assert found.files() == [path]
        assert_same_weights(found, wanted)


def test_stock_converters_make_the_folders_weights_of_the_file(pair):
    folder, path = pair
    found = open_checkpoint(folder)
    tensors = {k: torch.tensor(v) for k, v in load_file(path).items()}
    unet = {**found.unet.config, "class_embed_type": None, "num_class_embeds": None}
    made = [
        (found.unet, stock.convert_ldm_unet_checkpoint(dict(tensors), config=unet)),
        (found.vae, stock.convert_ldm_vae_checkpoint(dict(tensors), config=found.vae.config)),
    ]
    open_clip = {OPEN_TEXT, XL_TEXT[1]}
    for part, prefix in zip(found.text_encoders, original.text_prefixes(found), strict=True):
        if prefix in open_clip:
            size = SimpleNamespace(hidden_size=part.module.hidden_size)
            state = stock.convert_open_clip_checkpoint(
                SimpleNamespace(config=size), dict(tensors), prefix=prefix
            )
            made.append((part, state))
        else:
            made.append(
                (part, stock.convert_ldm_clip_checkpoint(dict(tensors), remove_prefix=prefix))
            )
    for part, state in made:
        weights = part.weights()
        names = torch_weights.names_of(diffusers_folder.abstract_params(part))
        assert names.keys() <= state.keys()
        for name in names:
            np.testing.assert_array_equal(state[name].numpy(), weights.read(name), err_msg=name)


@pytest.mark.parametrize("variant", ["ssd", "small", "lcm"])
def test_networks_of_another_shape_have_their_places(variant, tmp_path):
    """A depth for each layer and a short middle, no middle, and a guidance scale as an input."""
    folder = folders.folder(variant)
    path = original.write(folder, tmp_path / "model.safetensors", parts=("unet",))
    ours, wanted = open_checkpoint(path, Beside(like=folder)).unet, open_checkpoint(folder).unet
    assert_same_weights(ours, wanted)
    if variant == "lcm":
        assert f"{UNET}time_embed.cond_proj.weight" in load_file(path)
        return  # stock converters know neither its levels nor its scale
    tensors = {k: torch.tensor(v) for k, v in load_file(path).items()}
    config = {**wanted.config, "class_embed_type": None, "num_class_embeds": None}
    made, weights = stock.convert_ldm_unet_checkpoint(tensors, config=config), wanted.weights()
    for name in weights.shapes:
        np.testing.assert_array_equal(made[name].numpy(), weights.read(name), err_msg=name)


SIZES = {
    # The tensors of the published files, without buffers.
    "sd15": (1130, [(TEXT, CLIPText(49408, 768, 3072, 12, 12))]),
    "sdxl": (
        2513,
        [
            (XL_TEXT[0], CLIPText(49408, 768, 3072, 12, 12)),
            (XL_TEXT[1], CLIPText(49408, 1280, 5120, 32, 20, projection=1280)),
        ],
    ),
}


UPSAMPLINGS = {"sd15": ("2.1", "5.2", "8.2"), "sdxl": ("2.2", "5.2")}
"""After an attention where the block has one; stock converters take either place."""


@pytest.mark.parametrize("name", SIZES)
def test_at_full_size_each_tensor_has_one_place_of_its_shape(name):
    count, encoders = SIZES[name]
    folder = architectures.folder(architectures.PIPELINES[name])
    tokens = jax.ShapeDtypeStruct((1, 2), np.int32)
    shapes = [
        (UNET, folder.unet.module, diffusers_folder.abstract_params(folder.unet)),
        (VAE, folder.vae.module, diffusers_folder.abstract_params(folder.vae)),
        *((p, m, jax.eval_shape(m.init, jax.random.key(0), tokens)) for p, m in encoders),
    ]
    places: dict[str, list] = {}
    for prefix, module, abstract in shapes:
        origin = original_layout.origin(module, prefix)
        for ours, shape in torch_weights.names_of(abstract).items():
            there = origin(ours)
            places.setdefault(there.name, []).append((there.third, there, shape))
    assert len(places) == count
    assert {f"{UNET}output_blocks.{at}.conv.weight" for at in UPSAMPLINGS[name]} <= places.keys()
    for found in places.values():
        assert sorted(third for third, _, _ in found if third is not None) in ([], [0, 1, 2])
        assert len(found) in (1, 3)
        for third, there, shape in found:
            whole = np.zeros(shape if third is None else (3 * shape[0], *shape[1:]), np.int8)
            assert there.shape(there.write(whole).shape) == tuple(shape)


@pytest.mark.parametrize(
    ("marks", "metadata", "changes"),
    [
        (("v_pred",), None, {"prediction_type": "v_prediction"}),
        ((), {"modelspec.prediction_type": "v"}, {"prediction_type": "v_prediction"}),
        (
            ("v_pred", "ztsnr"),
            {"modelspec.prediction_type": "v"},
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        ),
    ],
)
def test_the_files_marks_say_what_it_predicts(tmp_path, capsys, marks, metadata, changes):
    folder = folders.folder("sd")
    path = original.write(folder, tmp_path / "x.safetensors", marks=marks, metadata=metadata)
    found = open_checkpoint(path, Beside(like=folder))
    assert found.scheduler == {**open_checkpoint(folder).scheduler, **changes}
    assert "prediction_type = v_prediction" in capsys.readouterr().err


def test_a_marked_file_is_drawn_as_the_folder_whose_config_says_the_same(tmp_path):
    folder = folders.folder("sd2")  # v prediction, zero terminal SNR
    path = original.write(folder, tmp_path / "x.safetensors", marks=("v_pred", "ztsnr"))
    plain = shutil.copytree(folder, tmp_path / "plain")
    config = plain / "scheduler" / "scheduler_config.json"
    kept = json.loads(config.read_text()) | {"prediction_type": "epsilon"}
    config.write_text(json.dumps({**kept, "rescale_betas_zero_snr": False}))
    found, wanted = open_checkpoint(path, Beside(like=plain)), open_checkpoint(folder)
    assert diffusers_scheduler.of_folder(found).schedule.alpha(500.0) == pytest.approx(
        float(diffusers_scheduler.of_folder(wanted).schedule.alpha(500.0))
    )
    assert found.scheduler == wanted.scheduler


def test_averaged_weights_are_taken_where_there_are_some(tmp_path, capsys):
    folder = folders.folder("sd")
    path = original.write(folder, tmp_path / "x.safetensors")
    tensors = load_file(path)
    beside = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): value + 1
        for name, value in tensors.items()
        if name.startswith(UNET)
    }
    save_file({**tensors, **beside, "model_ema.decay": np.zeros(())}, path)
    plain = open_checkpoint(path, Beside(like=folder), ema=False)
    averages = open_checkpoint(path, Beside(like=folder))
    assert "averaged" in capsys.readouterr().err
    difference = jax.tree.map(
        lambda a, b: np.abs(a - b - 1).max(),
        diffusers_folder.load_params(averages.unet),
        diffusers_folder.load_params(plain.unet),
    )
    assert max(jax.tree.leaves(difference)) < 1e-6


def test_other_ways_to_write_a_text_encoder_are_read(tmp_path):
    """Without `text_model.`, as new transformers; with the layer after 2.x's last, and buffers."""
    for variant in ("sd", "sd2"):
        folder = folders.folder(variant)
        path = original.write(folder, tmp_path / f"{variant}.safetensors")
        tensors = {k.replace(f"{TEXT}text_model.", TEXT): v for k, v in load_file(path).items()}
        if variant == "sd2":
            last = {k: v for k, v in tensors.items() if ".resblocks.2." in k}
            tensors |= {k.replace(".resblocks.2.", ".resblocks.3."): v for k, v in last.items()}
            tensors |= {f"{OPEN_TEXT}logit_scale": np.ones(()), "betas": np.ones(3)}
            tensors |= {f"{OPEN_TEXT}text_projection": np.ones((16, 16), np.float32)}
        else:
            tensors[f"{TEXT}embeddings.position_ids"] = np.zeros((1, 77), np.int64)
        save_file(tensors, path)
        (part,) = open_checkpoint(path, Beside(like=folder)).text_encoders
        (wanted,) = open_checkpoint(folder).text_encoders
        assert part.file == path
        assert_same_weights(part, wanted)


@pytest.mark.parametrize("lacking", ["vae", "text"])
def test_what_the_file_lacks_is_the_folders(tmp_path, capsys, lacking):
    folder = folders.folder("sd")
    kept = [name for name in ("unet", "vae", "text") if name != lacking]
    found = open_checkpoint(
        original.write(folder, tmp_path / "x.safetensors", parts=kept), Beside(like=folder)
    )
    part = found.vae if lacking == "vae" else found.text_encoders[0]
    assert part.file is None and found.unet.file is not None
    assert f"taken from {part.folder}" in capsys.readouterr().err


def test_a_student_of_a_file_is_a_folder_of_its_weights(tmp_path):
    folder = folders.folder("sd")
    path = original.write(folder, tmp_path / "x.safetensors")
    bare = shutil.copytree(folder, tmp_path / "like")  # configs alone
    for weights in bare.rglob("*.safetensors"):
        weights.unlink()
    teacher = open_checkpoint(path, Beside(like=bare))
    params = diffusers_folder.load_params(teacher.unet)
    diffusers_folder.save_student(
        teacher, tmp_path / "student", params, scheduler=dict(teacher.scheduler)
    )
    student = open_checkpoint(tmp_path / "student")
    for found, wanted in zip(parts(student), parts(open_checkpoint(folder)), strict=True):
        assert_same_weights(found, wanted)


def damaged(tmp_path, kind):
    """A path and the folder `like` that do not go together."""
    folder = folders.folder("sd")
    path = original.write(folder, tmp_path / "x.safetensors")
    if kind == "pickle":
        return path.rename(tmp_path / "x.ckpt"), folder
    if kind == "missing":
        return tmp_path / "y.safetensors", folder
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    if kind == "strange":
        save_file({**load_file(path), "control_model.a": np.zeros(1)}, path)
    if kind == "lora":
        save_file({"lora_unet_a.lora_down.weight": np.zeros(1)}, path)
    if kind == "tensor":
        tensors = load_file(path)
        del tensors[f"{UNET}out.0.weight"]
        save_file(tensors, path)
    if kind == "unknown mark":
        save_file(load_file(path), path, {"modelspec.prediction_type": "sample"})
    if kind == "two marks":
        save_file(
            load_file(path) | {"v_pred": np.zeros(1)},
            path,
            {"modelspec.prediction_type": "epsilon"},
        )
    return path, {"other kind": folders.folder("sdxl"), "no folder": ""}.get(kind, folder)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pickle", "is a pickle"),
        ("missing", "does not exist"),
        ("truncated", "cannot be read as safetensors"),
        ("strange", "tensors of no known component, such as control_model.a"),
        ("lora", f"has no UNet under {UNET}"),
        ("unknown mark", "modelspec.prediction_type = 'sample' in its metadata is not supported"),
        ("two marks", "disagrees with itself"),
        ("other kind", "is Stable Diffusion 1.x or 2.x, but"),
        ("no folder", "--like=FOLDER"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(tmp_path, kind, message):
    path, like = damaged(tmp_path, kind)
    with pytest.raises(FolderError, match=re.escape(message)) as error:
        open_checkpoint(path, Beside(like=like))
    assert "\n" not in str(error.value) and path.name in str(error.value)


def test_a_tensor_that_is_missing_is_named(tmp_path):
    path, like = damaged(tmp_path, "tensor")
    with pytest.raises(torch_weights.WeightsError, match=r"missing: conv_norm_out\.weight"):
        diffusers_folder.load_params(open_checkpoint(path, Beside(like=like)).unet)


def test_commands_and_configs_take_a_file(tmp_path, capsys):
    folder = folders.folder("sd")
    path = original.write(folder, tmp_path / "x.safetensors")
    images = []
    for model in ([f"--model={path}", f"--like={folder}"], [f"--model={folder}"]):
        out = tmp_path / "out.npz"
        sample.main([*model, "--prompt=a cat", "--steps=2", "--height=64", f"--out={out}"])
        images.append(np.load(out)["images"])
    np.testing.assert_array_equal(*images)
    with pytest.raises(SystemExit):
        sample.main([f"--model={folder}", f"--like={folder}", "--prompt=a", f"--out={out}"])
    assert "--like goes with a .safetensors checkpoint" in capsys.readouterr().err
    config = text_config.get_config()
    config.teacher.update({"folder": str(path), "like": str(folder)})
    assert open_teacher(config).unet.file == path
