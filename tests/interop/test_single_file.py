"""A single file is the folder that it was made from, and stock converters agree on it."""

import json
import re
import shutil
from types import SimpleNamespace

import diffusers
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
    families,
    original_layout,
    torch_weights,
)
from jaxdistill.interop.diffusers_folder import FolderError
from jaxdistill.interop.original_layout import OPEN_TEXT, TEXT, UNET, VAE, XL_TEXT
from jaxdistill.interop.single_file import open_checkpoint
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
    return (found.network, found.vae, *found.text_encoders)


def assert_same_weights(found, wanted):
    loaded = map(diffusers_folder.load_params, (found, wanted))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, *loaded)))


@pytest.mark.costly
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
    unet = {**found.network.config, "class_embed_type": None, "num_class_embeds": None}
    made = [
        (found.network, stock.convert_ldm_unet_checkpoint(dict(tensors), config=unet)),
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


@pytest.mark.costly
@pytest.mark.parametrize("variant", ["ssd", "small", "lcm"])
def test_networks_of_another_shape_have_their_places(variant, tmp_path):
    """A depth for each layer and a short middle, no middle, and a guidance scale as an input."""
    folder = folders.folder(variant)
    path = original.write(folder, tmp_path / "model.safetensors", parts=("unet",))
    ours, wanted = (
        open_checkpoint(path, Beside(like=folder)).network,
        open_checkpoint(folder).network,
    )
    assert_same_weights(ours, wanted)
    if variant == "lcm":
        assert f"{UNET}time_embed.cond_proj.weight" in load_file(path)
        return  # stock converters know neither its levels nor its scale
    tensors = {k: torch.tensor(v) for k, v in load_file(path).items()}
    config = {**wanted.config, "class_embed_type": None, "num_class_embeds": None}
    made, weights = stock.convert_ldm_unet_checkpoint(tensors, config=config), wanted.weights()
    for name in weights.shapes:
        np.testing.assert_array_equal(made[name].numpy(), weights.read(name), err_msg=name)


FULL = {
    # The tensors of the published files, without buffers and layers that are not used.
    "sd15": (1130, (TEXT,), {}),
    "sd21": (1214, (OPEN_TEXT,), {"modelspec.architecture": "stable-diffusion-v2-768-v"}),
    "sd21-base": (1214, (OPEN_TEXT,), {"modelspec.prediction_type": "epsilon"}),
    "sdxl": (2513, XL_TEXT, {}),
}
UPSAMPLINGS = {
    "sd15": ("2.1", "5.2", "8.2"),
    "sd21": ("2.1", "5.2", "8.2"),
    "sd21-base": ("2.1", "5.2", "8.2"),
    "sdxl": ("2.2", "5.2"),
}
"""After an attention where the block has one; stock converters take either place."""


def full_size(name):
    """{name in the original layout: shape} of a published model, and its folder of configs."""
    found = families.open_folder(architectures.pipeline_folder(name))
    prefixes = (UNET, VAE, *FULL[name][1])
    shapes: dict[str, tuple[int, ...]] = {}
    for part, prefix in zip(parts(found), prefixes, strict=True):
        there = original_layout.origin(part.module, prefix)
        wanted = torch_weights.names_of(diffusers_folder.abstract_params(part))
        places = [there(ours) for ours in wanted]
        assert len({(place.name, place.third) for place in places}) == len(places)
        for ours, place in zip(wanted.values(), places, strict=True):
            third = place.third is not None
            whole = (3 * ours[0], *ours[1:]) if third else ours
            shapes[place.name] = place.write(np.broadcast_to(np.int8(0), whole)).shape
    return shapes, found


def write_header(path, shapes, metadata=None, dtype="F16"):
    """A file of these tensors, all zeros, that takes no room on a disk."""
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


@pytest.mark.costly
@pytest.mark.parametrize("name", FULL)
def test_at_full_size_a_file_is_told_by_itself_and_each_tensor_has_one_place(
    tmp_path, capsys, name
):
    count, prefixes, metadata = FULL[name]
    shapes, wanted = full_size(name)
    assert len(shapes) == count
    assert {f"{UNET}output_blocks.{at}.conv.weight" for at in UPSAMPLINGS[name]} <= shapes.keys()
    buffers = {"betas": (1000,), "denoiser.sigmas": (1000,), f"{prefixes[-1]}logit_scale": ()}
    path = write_header(tmp_path / "x.safetensors", {**shapes, **buffers}, metadata)
    found = open_checkpoint(path)
    assert found.path == wanted.path and found.scheduler == wanted.scheduler
    for part, published in zip(parts(found), parts(wanted), strict=True):
        needed = torch_weights.names_of(diffusers_folder.abstract_params(published))
        here = part.weights().shapes
        assert {n: here[n] for n in needed} == needed
        left = here.keys() - needed.keys()
        assert all(map(diffusers_folder._ignored(part), left)), left
    said = capsys.readouterr().err
    assert "Stable Diffusion" in said and ("predicts v" in said) == (name == "sd21")


def test_the_published_tokenizers_are_clips():
    """Ids of CLIP's own tokenizer; 2.x and XL's second one pad with "!"."""
    from transformers import CLIPTokenizer

    for name, encoders in (("sd15", [49407]), ("sd21", [0]), ("sdxl", [49407, 0])):
        root = architectures.pipeline_folder(name)
        for i, pad in enumerate(encoders):
            tokenizer = CLIPTokenizer.from_pretrained(root / f"tokenizer{'_2' * i}")
            assert (len(tokenizer), tokenizer.pad_token_id) == (49408, pad)
            found = tokenizer("a photo of a Cat", padding="max_length", max_length=9).input_ids
            assert found == [49406, 320, 1125, 539, 320, 2368, 49407, pad, pad]


@pytest.mark.long
def test_a_published_folder_is_one_that_stock_diffusers_reads(tmp_path, monkeypatch):
    """And whole again after a file is lost; elsewhere, where no cache can be written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    make = architectures.pipeline_folder.__wrapped__
    for name, pipeline in architectures.PIPELINES.items():
        if "unet" not in pipeline:
            continue  # is planned with, and never a single file
        root = make(name)
        (root / "model_index.json").unlink()
        assert make(name) == root and tmp_path in root.parents
        for part, kind in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")):
            config = getattr(diffusers, kind).load_config(root / part)
            with torch.device("meta"):
                made = getattr(diffusers, kind).from_config(config).state_dict()
            ours = getattr(families.open_folder(root), {"unet": "network"}.get(part, part))
            wanted = torch_weights.names_of(diffusers_folder.abstract_params(ours))
            assert {n: tuple(t.shape) for n, t in made.items()} == wanted
        scheduler = getattr(diffusers, pipeline["scheduler"]["_class_name"])
        assert scheduler.from_pretrained(root / "scheduler").config.steps_offset == 1
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert (make("sd15") / "model_index.json").is_file()


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
    assert "predicts v" in capsys.readouterr().err


def test_noise_and_zero_terminal_snr_disagree(tmp_path):
    spec = {"modelspec.prediction_type": "epsilon"}
    folder = folders.folder("sd")
    path = original.write(folder, tmp_path / "x.safetensors", marks=("ztsnr",), metadata=spec)
    with pytest.raises(FolderError, match=r"its key ztsnr wants v.*--prediction=eps or v_ztsnr"):
        open_checkpoint(path, Beside(like=folder))
    assert open_checkpoint(path, Beside(like=folder, prediction="v_ztsnr"))


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
    plain = open_checkpoint(path, Beside(like=folder, ema=False))
    averages = open_checkpoint(path, Beside(like=folder))
    assert "averaged" in capsys.readouterr().err
    difference = jax.tree.map(
        lambda a, b: np.abs(a - b - 1).max(),
        diffusers_folder.load_params(averages.network),
        diffusers_folder.load_params(plain.network),
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
    assert part.file is None and found.network.file is not None
    assert f"taken from {part.folder}" in capsys.readouterr().err


def test_a_student_of_a_file_is_a_folder_of_its_weights(tmp_path):
    folder = folders.folder("sd")
    path = original.write(folder, tmp_path / "x.safetensors")
    bare = shutil.copytree(folder, tmp_path / "like")  # configs alone
    for weights in bare.rglob("*.safetensors"):
        weights.unlink()
    teacher = open_checkpoint(path, Beside(like=bare))
    params = diffusers_folder.load_params(teacher.network)
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
        ("strange", "1 tensors of no known component, such as control_model.a"),
        ("lora", f"has no UNet under {UNET}"),
        ("unknown mark", "modelspec.prediction_type = 'sample' in its metadata is not supported"),
        ("two marks", "disagrees with itself"),
        ("other kind", "is Stable Diffusion 1.x or 2.x, but"),
        ("no folder", "of no published family (context of 16, without label_emb)"),
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
        diffusers_folder.load_params(open_checkpoint(path, Beside(like=like)).network)


@pytest.mark.long
def test_commands_and_configs_take_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = folders.folder("sd")
    path = original.write(folder, tmp_path / "x.safetensors")
    images = []
    for model in (["--model=~/x.safetensors", f"--like={folder}"], [f"--model={folder}"]):
        out = tmp_path / "out.npz"
        sample.main([*model, "--prompt=a cat", "--steps=2", "--height=64", f"--out={out}"])
        images.append(np.load(out)["images"])
    np.testing.assert_array_equal(*images)
    with pytest.raises(SystemExit):
        sample.main([f"--model={folder}", f"--like={folder}", "--prompt=a", f"--out={out}"])
    assert "--like goes with a .safetensors checkpoint" in capsys.readouterr().err
    config = text_config.get_config()
    config.teacher.update({"folder": str(path), "like": str(folder)})
    assert open_teacher(config).network.file == path


# ----------------------------------------------------------------- other ways to write a checkpoint


def moved(tensors, start, target=""):
    """Those whose names begin with `start`, under `target`."""
    return {target + k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}


def matrices(tensors, *, kernels):
    """1x1 convolutions as matrices, or the reverse, of the layers around attentions."""
    names = ("proj_in.weight", "proj_out.weight", "mid.attn_1.q.weight", "mid.attn_1.k.weight")
    return {
        k: v.reshape(*v.shape[:2], *((1, 1) if kernels else ())) if k.endswith(names) else v
        for k, v in tensors.items()
    }


def as_transformers(folder, tensors, prefix, target):
    """The last text encoder under transformers' names."""
    part = open_checkpoint(folder).text_encoders[-1]
    weights = part.weights()
    names = torch_weights.names_of(diffusers_folder.abstract_params(part))
    others = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
    return others | {target + name: weights.read(name) for name in names}


OTHER_WAYS = {
    "matrices": lambda f, t: matrices(t, kernels=False),
    "kernels": lambda f, t: matrices(t, kernels=True),
    "2.x under SGM's names": lambda f, t: {
        k.replace(OPEN_TEXT, "conditioner.embedders.0.model."): v for k, v in t.items()
    },
    "buffers": lambda f, t: {
        **t,
        "betas": np.ones(9),
        "denoiser.sigmas": np.ones(9),
        "model_ema.decay": np.ones(()),
        "model_ema.num_updates": np.ones(()),
        "cond_stage_model.logit_scale": np.ones(()),
        f"{VAE}loss.logvar": np.ones(()),
        f"{original.text_prefixes(open_checkpoint(f))[-1]}logit_scale": np.ones(()),
        f"{original.text_prefixes(open_checkpoint(f))[-1]}attn_mask": np.ones((77, 77)),
        f"{original.text_prefixes(open_checkpoint(f))[0]}text_projection.weight": np.ones((2, 2)),
        f"{original.text_prefixes(open_checkpoint(f))[0]}text_model.embeddings.position_ids": (
            np.ones((1, 77))
        ),
    },
    "the second encoder as transformers'": lambda f, t: as_transformers(
        f, t, XL_TEXT[1], "conditioner.embedders.1.transformer."
    ),
    "projection as a layer": lambda f, t: {
        f"{k}.weight" if k.endswith("text_projection") else k: (
            np.ascontiguousarray(v.T) if k.endswith("text_projection") else v
        )
        for k, v in t.items()
    },
}
WAYS_OF = {
    "sd": ("matrices", "buffers"),
    "sd2": ("kernels", "buffers", "2.x under SGM's names"),
    "sdxl": ("kernels", "buffers", "the second encoder as transformers'", "projection as a layer"),
}


@pytest.mark.costly
@pytest.mark.parametrize("variant, way", [(v, w) for v, ways in WAYS_OF.items() for w in ways])
def test_other_ways_to_write_a_checkpoint_are_read(tmp_path, variant, way):
    folder = folders.folder(variant)
    path = original.write(folder, tmp_path / "x.safetensors")
    before = load_file(path)
    after = OTHER_WAYS[way](folder, before)
    if way != "buffers" and way != "2.x under SGM's names":
        assert any(n not in before or before[n].shape != v.shape for n, v in after.items())
    save_file(after, path)
    found, wanted = open_checkpoint(path, Beside(like=folder)), open_checkpoint(folder)
    for ours, theirs in zip(parts(found), parts(wanted), strict=True):
        assert ours.file == path
        assert_same_weights(ours, theirs)


def loose(folder, tmp_path, kind):
    """A file of one component of a pipeline, or several, as people have them."""
    tensors = load_file(original.write(folder, tmp_path / "whole.safetensors"))
    if kind == "folder":
        return folder / "vae"
    if kind == "whole":
        return tmp_path / "whole.safetensors"
    kept = {
        "prefix": lambda: moved(tensors, VAE, VAE),
        "bare": lambda: moved(tensors, VAE),
        "diffusers": lambda: load_file(folder / "vae" / "diffusion_pytorch_model.safetensors"),
        "older diffusers": lambda: {
            re.sub(r"(attentions\.0\.)to_q", r"\1query", k): v
            for k, v in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items()
        },
    }[kind]()
    save_file(kept, tmp_path / "vae.safetensors")
    return tmp_path / "vae.safetensors"


@pytest.mark.costly
@pytest.mark.parametrize(
    "kind", ["folder", "whole", "prefix", "bare", "diffusers", "older diffusers"]
)
def test_a_vae_beside_a_checkpoint_is_taken_instead_of_its_own(tmp_path, kind):
    folder = folders.folder("sd")
    given = loose(folders.folder("sdxl"), tmp_path, kind)
    unet = original.write(folder, tmp_path / "x.safetensors", parts=["unet", "text"])
    for checkpoint in (unet, folder):
        beside = Beside(like=folder if checkpoint == unet else "", vae=str(given))
        found = open_checkpoint(checkpoint, beside)
        wanted = open_checkpoint(folders.folder("sdxl")).vae
        assert_same_weights(found.vae, wanted)
        scale = wanted if kind == "folder" else open_checkpoint(folder).vae
        assert found.vae.module.scaling_factor == scale.module.scaling_factor


def test_text_encoders_beside_a_checkpoint_are_told_by_their_width(tmp_path):
    """In any order, under transformers' and OpenCLIP's names, whole CLIPs, folders, one file."""
    folder = folders.folder("freshxl")  # 32 and 48 wide
    wanted = open_checkpoint(folder)
    unet = original.write(folder, tmp_path / "x.safetensors", parts=["unet", "vae"])
    tensors = load_file(original.write(folder, tmp_path / "whole.safetensors"))
    whole = {"logit_scale": np.ones(()), "vision_model.a": np.ones(2)}
    clip_l, clip_g, theirs = (tmp_path / f"{n}.safetensors" for n in ("l", "g", "theirs"))
    save_file(moved(tensors, XL_TEXT[0]) | whole, clip_l)
    save_file(moved(tensors, XL_TEXT[1]) | {"visual.a": np.ones(2)}, clip_g)
    save_file(as_transformers(folder, {}, "-", ""), theirs)
    for given in (
        (clip_l, clip_g),
        (theirs, clip_l),
        (folder / "text_encoder_2", folder / "text_encoder"),
        (tmp_path / "whole.safetensors",),
    ):
        text = ",".join(map(str, given))
        found = open_checkpoint(unet, Beside(like=folder, text_encoder=text))
        for ours, theirs_ in zip(found.text_encoders, wanted.text_encoders, strict=True):
            assert_same_weights(ours, theirs_)


@pytest.mark.costly
@pytest.mark.parametrize("names", ["bare", "diffusers"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_unet_alone_is_read_under_other_names(tmp_path, variant, names):
    folder = folders.folder(variant)
    tensors = load_file(original.write(folder, tmp_path / "x.safetensors", parts=["unet"]))
    if names == "diffusers":
        tensors = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(moved(tensors, UNET if names == "bare" else ""), tmp_path / "x.safetensors")
    found = open_checkpoint(tmp_path / "x.safetensors", Beside(like=folder))
    assert found.network.file is not None and found.vae.file is None
    assert_same_weights(found.network, open_checkpoint(folder).network)


# ------------------------------------------------------------------- what it predicts, by a flag


@pytest.mark.parametrize(
    ("flag", "marks", "prediction", "zero", "said"),
    [
        ("v", (), "v_prediction", False, "--prediction=v says so"),
        ("v_ztsnr", (), "v_prediction", True, "with zero terminal SNR"),
        ("v", ("ztsnr",), "v_prediction", True, "with zero terminal SNR"),
        ("eps", ("v_pred", "ztsnr"), "epsilon", False, "says so, against its key v_pred"),
    ],
)
def test_the_flag_wins_over_marks_and_says_so(
    tmp_path, capsys, flag, marks, prediction, zero, said
):
    folder = folders.folder("sdxl")
    path = original.write(folder, tmp_path / "x.safetensors", marks=marks)
    found = open_checkpoint(path, Beside(like=folder, prediction=flag)).scheduler
    assert found["prediction_type"] == prediction
    assert bool(found.get("rescale_betas_zero_snr")) == zero
    assert said in capsys.readouterr().err


def test_noise_is_never_predicted_at_zero_snr(tmp_path):
    folder = folders.folder("sd2")  # its scheduler has it
    path = original.write(folder, tmp_path / "x.safetensors")
    found = open_checkpoint(path, Beside(like=folder, prediction="eps"))
    assert diffusers_scheduler.of_folder(found).schedule.alpha(1000.0) > 0.01


@pytest.mark.costly
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_published_schedulers_draw_from_zero_snr_where_a_file_is_marked_so(tmp_path, name):
    shapes, _ = full_size(name)
    path = write_header(tmp_path / "x.safetensors", shapes | {"v_pred": (), "ztsnr": ()})
    scheduler = open_checkpoint(path).scheduler
    found = diffusers_scheduler.of_folder(open_checkpoint(path))
    theirs = getattr(diffusers, scheduler["_class_name"]).from_config(scheduler)
    theirs.set_timesteps(4)
    assert found.run(4).times[0] - 1 == theirs.timesteps[0] == 999  # ours count from 1
    assert found.schedule.alpha(found.schedule.T) < 1e-3


@pytest.mark.parametrize(("spread", "name"), [(0.05, "sd21-base"), (0.2, "sd21")])
def test_an_unmarked_file_of_2x_is_told_by_a_bias_and_the_flag_corrects_it(
    tmp_path, capsys, spread, name
):
    shapes, _ = full_size("sd21")
    path = write_header(tmp_path / "x.safetensors", shapes, dtype="F16")
    bias = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        start = json.loads(file.read(size))[bias]["data_offsets"][0]
        file.seek(8 + size + start)
        file.write((spread * np.resize([-1, 1], shapes[bias])).astype(np.float16).tobytes())
    assert open_checkpoint(path).path == architectures.pipeline_folder(name)
    assert f"spreads by {spread:.3f}" in capsys.readouterr().err
    other = {"sd21": "eps", "sd21-base": "v"}[name]
    changed = open_checkpoint(path, Beside(prediction=other)).path
    assert changed != architectures.pipeline_folder(name)


# ---------------------------------------------------------------------------- what is not supported


FILES = {
    "inpainting": ({f"{UNET}input_blocks.0.0.weight": (8, 9, 3, 3)}, "is an inpainting model"),
    "edit": ({f"{UNET}input_blocks.0.0.weight": (8, 8, 3, 3)}, "InstructPix2Pix"),
    "refiner": (
        {
            f"{UNET}label_emb.0.0.weight": (8, 8),
            f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, 1280),
        },
        "is the refiner",
    ),
    "other width": (
        {f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, 999)},
        "of no published family (context of 999, without label_emb)",
    ),
    "other sizes": (
        {f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, 768)},
        "looks like Stable Diffusion 1.x, but differs from the published model",
    ),
    "edm": ({"edm_vpred.sigma_max": ()}, "was trained on an EDM schedule"),
    "flux": ({"model.diffusion_model.double_blocks.0.a": (1,)}, "it is FLUX"),
    "sd3": ({"model.diffusion_model.joint_blocks.0.a": (1,)}, "it is Stable Diffusion 3"),
    "pixart": ({"adaln_single.a": (1,), "transformer_blocks.0.a": (1,)}, "it is PixArt"),
    "transformer": ({"transformer_blocks.0.a": (1,)}, "it is a transformer"),
    "controlnet": ({"control_model.a": (1,)}, "it is a ControlNet"),
    "lora": ({"lora_unet_a.lora_down.weight": (1,)}, "it is a LoRA"),
    "peft": ({"unet.a.lora_A.weight": (1,)}, "it is a LoRA"),
    "vae": (
        {"encoder.conv_in.weight": (1,), "decoder.conv_in.weight": (1,)},
        "it is an autoencoder (VAE): give it beside a checkpoint, with --vae",
    ),
    "text": ({"text_model.embeddings.token_embedding.weight": (1,)}, "with --text_encoder"),
    "inversion": ({"emb_params": (1,)}, "it is a textual inversion"),
}
UNET_KEYS = {f"{UNET}input_blocks.0.0.weight": (8, 4, 3, 3), f"{UNET}out.2.weight": (4, 8, 3, 3)}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_another_kind_is_named(tmp_path, kind):
    shapes, message = FILES[kind]
    if any(name.startswith((UNET, "edm")) for name in shapes) and kind not in ("flux", "sd3"):
        shapes = UNET_KEYS | shapes
    path = write_header(tmp_path / "x.safetensors", shapes)
    with pytest.raises(FolderError, match=re.escape(message)) as error:
        open_checkpoint(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "pointer of git-LFS"),
        (b"GGUF\3", "is a GGUF file"),
        (b"PK\x03\x04", "is a pickle"),
        (b"\x80\x02}", "is a pickle"),
        (b'{"_class_name": 1}', "is JSON"),
        (b"<!doctype html>", "the download has failed"),
    ],
)
def test_a_file_that_is_no_safetensors_is_told_by_its_start(tmp_path, start, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(start + b" " * 100)
    with pytest.raises(FolderError, match=re.escape(message)):
        open_checkpoint(path)


def bad_beside(tmp_path, kind):
    """What is named beside a file in vain; its message."""
    folder = folders.folder("sd")
    unet = original.write(folder, tmp_path / "x.safetensors", parts=["unet"])
    bare = shutil.copytree(folder, tmp_path / "like")  # configs alone
    for weights in bare.rglob("*.safetensors"):
        weights.unlink()
    xl = folders.folder("freshxl")
    return {
        "no vae": (unet, Beside(like=bare, text_encoder=str(folder / "text_encoder")), "--vae="),
        "no text": (unet, Beside(like=bare, vae=str(folder / "vae")), "--text_encoder="),
        "whole": (folder, Beside(vae=str(folder)), f"give {folder / 'vae'}"),
        "not there": (folder, Beside(vae="nowhere.safetensors"), "does not exist"),
        "no autoencoder": (folder, Beside(vae=str(unet)), "holds no autoencoder"),
        "no encoder": (folder, Beside(text_encoder=str(unet)), "holds no text encoder"),
        "width": (folder, Beside(text_encoder=str(xl / "text_encoder")), "of width 32"),
        "too many": (folder, Beside(text_encoder="a,b"), "names 2, but this checkpoint has 1"),
        "flag": (unet, Beside(like=folder, prediction="x"), "'x' is not known"),
        "part": (folder / "unet/diffusion_pytorch_model.safetensors", Beside(), f"that: {folder}"),
        "hub": (folder, Beside(vae="stabilityai/sd-vae-ft-mse"), "nothing is downloaded"),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        *("no vae", "no text", "whole", "not there", "no autoencoder"),
        *("no encoder", "width", "too many", "flag", "part", "hub"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_said_with_its_flag(tmp_path, kind):
    path, beside, message = bad_beside(tmp_path, kind)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        open_checkpoint(path, beside)
    assert "\n" not in str(error.value)
