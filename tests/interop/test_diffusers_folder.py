"""The networks against torch's, weights in and out, and what a damaged folder is told."""

import json
import shutil
from functools import partial
from pathlib import Path

import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as torch_load_file

from jaxdistill.interop import architectures, diffusers_folder, families, torch_weights
from jaxdistill.interop.diffusers_folder import FolderError
from jaxdistill.interop.families import stable_diffusion
from jaxdistill.interop.torch_weights import WeightsError

VARIANTS = ("sd", "sd2", "sdxl")


def error(ours, theirs) -> float:
    """Largest difference, relative to the largest value."""
    theirs = np.asarray(theirs)
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def apply(part, params, *inputs, **options):
    return jax.jit(partial(part.module.apply, **options))(params, *inputs)


@pytest.fixture
def copy(tmp_path):
    """A copy of a tiny folder that may be changed."""

    def make(variant="sd"):
        shutil.copytree(folders.folder(variant), tmp_path / variant)
        return tmp_path / variant

    return make


def inputs(variant, size=(8, 8)):
    r = np.random.default_rng(0)
    cond = {
        "context": r.standard_normal(
            (2, 5, folders.UNETS[variant]["cross_attention_dim"]), np.float32
        )
    }
    added = {}
    if variant == "lcm":
        cond["guidance"] = np.float32([1.5, 8.0])
        embed = folders.torch_pipe(variant).get_guidance_scale_embedding
        added = {"timestep_cond": embed(torch.tensor(cond["guidance"]) - 1, embedding_dim=24)}
    if variant in ("sdxl", "ssd"):
        cond |= {
            "pooled": r.standard_normal((2, 12), np.float32),
            "time_ids": np.float32([[64, 48, 3, 5, 64, 64]] * 2),
        }
        added = {
            "added_cond_kwargs": {
                "text_embeds": torch.tensor(cond["pooled"]),
                "time_ids": torch.tensor(cond["time_ids"]),
            }
        }
    x, t = r.standard_normal((2, *size, 4), np.float32), np.float32([3.0, 901.0])
    return *jax.tree.map(jnp.asarray, (x, t, cond)), added


def torch_unet(variant, x, t, cond, added):
    x, t, context = (
        torch.tensor(np.asarray(a)) for a in (x.transpose(0, 3, 1, 2), t, cond["context"])
    )
    return folders.nhwc(folders.torch_pipe(variant).unet(x, t, context, **added).sample)


@pytest.mark.costly
@pytest.mark.parametrize("variant", ["deep", "sd", "sdxl", "ssd", "small", "lcm"])
def test_unet_is_torchs(variant):
    part = families.open_folder(folders.folder(variant)).network
    params = diffusers_folder.load_params(part)
    x, t, cond, added = inputs(variant, (8, 12))
    assert error(apply(part, params, x, t, cond), torch_unet(variant, x, t, cond, added)) < 1e-4


def test_unet_takes_sides_that_do_not_halve():
    part = families.open_folder(folders.folder("sd2")).network
    x, t, cond, added = inputs("sd2", (9, 7))
    found = apply(part, diffusers_folder.load_params(part), x, t, cond)
    assert error(found, torch_unet("sd2", x, t, cond, added)) < 1e-4


@pytest.mark.long
@pytest.mark.parametrize(
    ("variant", "layer"),
    [("sdxl", "mid_block.attentions.0"), ("ssd", "down_blocks.1.attentions.1")],
)
def test_scanned_blocks_remat_and_looped_attention_change_nothing(variant, layer):
    path = folders.folder(variant)
    x, t, cond, _ = inputs(variant, (16, 16))
    plain = families.open_folder(path, attention="plain").network
    expected = apply(plain, diffusers_folder.load_params(plain), x, t, cond)
    part = families.open_folder(path, scan=True, remat="full", attention="looped").network
    params = diffusers_folder.load_params(part)
    kernel = params["params"][layer]["transformer_blocks.0:2"]["attn1"]["to_q"]["kernel"]
    assert kernel.shape == (2, 16, 16)
    assert error(apply(part, params, x, t, cond), expected) < 1e-5


@pytest.mark.parametrize(("variant", "states"), [("sd", 3), ("ssd", 3), ("small", 2)])
def test_features_are_those_of_the_levels_and_of_a_middle_if_there_is_one(variant, states):
    part = families.open_folder(folders.folder(variant)).network
    x, t, cond, _ = inputs(variant)
    params = diffusers_folder.abstract_params(part)
    found = jax.eval_shape(partial(part.module.apply, features=True), params, x, t, cond)
    assert [state.shape for state in found] == [(2, 8, 8, 8), *[(2, 4, 4, 16)] * (states - 1)]


SHORT = {**architectures.PIPELINES["sdxl"]["unet"], "mid_block_type": "UNetMidBlock2D"}
DEPTH, DEPTH_UP = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
PUBLISHED = {
    # Millions of weights; the authors say 1.3 and 0.74 billion.
    "SSD-1B": (1331, {DEPTH: [1, [2, 2], [4, 4]], DEPTH_UP: [[4, 4, 10], [2, 1, 1], 1]}),
    "Vega": (745, {DEPTH: [1, [1, 1], [2, 2]], DEPTH_UP: [[2, 2, 2], [1, 1, 1], 1]}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_of_another_shape_have_their_size(name):
    millions, depths = PUBLISHED[name]
    config = {**SHORT, **depths}
    module = stable_diffusion.unet_module(config, Path(name))
    part = diffusers_folder.Part(module, config, Path(name), "")
    leaves = jax.tree.leaves(diffusers_folder.abstract_params(part))
    assert round(sum(a.size for a in leaves) / 1e6) == millions


def test_bfloat16_computes_near_float32_with_float32_parameters():
    part = families.open_folder(folders.folder("sd"), dtype=jnp.bfloat16).network
    params = diffusers_folder.load_params(part)
    x, t, cond, added = inputs("sd")
    out = apply(part, params, x, t, cond)
    assert out.dtype == jnp.float32 and params["params"]["conv_in"]["kernel"].dtype == jnp.float32
    assert 1e-4 < error(out, torch_unet("sd", x, t, cond, added)) < 5e-2


@pytest.mark.costly
@pytest.mark.parametrize("variant", VARIANTS)
def test_autoencoder_and_text_encoders_are_torchs(variant):
    found, pipe, r = (
        families.open_folder(folders.folder(variant)),
        folders.torch_pipe(variant),
        np.random.default_rng(1),
    )
    params = diffusers_folder.load_params(found.vae)
    images = r.uniform(-1, 1, (2, 32, 48, 3)).astype(np.float32)
    encoded = pipe.vae.encode(torch.tensor(images.transpose(0, 3, 1, 2))).latent_dist
    mean, log_variance = apply(found.vae, params, jnp.asarray(images), method="moments")
    assert (
        error(mean, folders.nhwc(encoded.mean)) < 1e-4
        and error(log_variance, folders.nhwc(encoded.logvar)) < 1e-4
    )
    z = r.standard_normal((2, 4, 6, 4), np.float32)
    decoded = pipe.vae.decode(
        torch.tensor(z.transpose(0, 3, 1, 2)) / pipe.vae.config.scaling_factor
    ).sample
    assert (
        error(apply(found.vae, params, jnp.asarray(z), method="decode"), folders.nhwc(decoded))
        < 1e-4
    )
    for number, part in enumerate(found.text_encoders):
        theirs, tokenizer = (
            (pipe.text_encoder, pipe.tokenizer)
            if number == 0
            else (pipe.text_encoder_2, pipe.tokenizer_2)
        )
        ids = tokenizer(
            folders.PROMPTS, padding="max_length", max_length=77, return_tensors="np"
        ).input_ids
        states, expected = (
            apply(part, diffusers_folder.load_params(part), jnp.asarray(ids)),
            theirs(torch.tensor(ids), output_hidden_states=True),
        )
        assert error(states.last, expected.last_hidden_state) < 1e-4
        assert error(states.penultimate, expected.hidden_states[-2]) < 1e-4
        assert (
            error(states.pooled, expected.text_embeds if number else expected.pooler_output) < 1e-4
        )


# -------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(("variant", "scan"), [("sd", False), ("sdxl", True)])
def test_weights_come_back_as_they_were(variant, scan, copy, tmp_path):
    found = families.open_folder(copy(variant), scan=scan)
    params = diffusers_folder.load_params(found.network)
    diffusers_folder.save_student(
        found, tmp_path / "out", params, scheduler=found.scheduler, extra={"more.json": {"a": 1}}
    )
    source, target = found.path, tmp_path / "out"
    before, after = (
        load_file(p / "unet" / "diffusion_pytorch_model.safetensors") for p in (source, target)
    )
    assert before.keys() == after.keys()
    assert all(
        before[k].dtype == after[k].dtype and np.array_equal(before[k], after[k]) for k in before
    )
    for path in source.rglob("*"):
        if (
            path.is_file()
            and path.parent.name not in ("unet", "scheduler")
            and path.name != "model_index.json"
        ):
            assert (target / path.relative_to(source)).read_bytes() == path.read_bytes()
    assert json.loads((target / "more.json").read_text()) == {"a": 1}
    assert families.open_folder(target).components == found.components


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=str)
def test_weights_of_two_bytes_come_back_as_they_were(kind, tmp_path):
    """By the writer's word: in the type of the parameters, or in the one it is given.

    Through float32 and back no bit is lost.
    """
    source, stem = tmp_path / "source", "diffusion_pytorch_model.safetensors"
    folders.load_torch(folders.folder("sd"), torch_dtype=kind).save_pretrained(source)
    found, dtype = families.open_folder(source), jnp.dtype(str(kind).removeprefix("torch."))
    before = torch_load_file(source / "unet" / stem)
    for name, read, written in (("own", dtype, None), ("through32", np.float32, dtype)):
        params = diffusers_folder.load_params(found.network, dtype=read)
        diffusers_folder.save_student(
            found, tmp_path / name, params, scheduler=found.scheduler, dtype=written
        )
        after = torch_load_file(tmp_path / name / "unet" / stem)
        assert before.keys() == after.keys()
        assert all(
            before[k].dtype == after[k].dtype == kind and torch.equal(before[k], after[k])
            for k in before
        )
        for path in (p for part in ("vae", "text_encoder") for p in (source / part).iterdir()):
            assert (tmp_path / name / path.relative_to(source)).read_bytes() == path.read_bytes()


def test_shards_halves_and_old_names_read_the_same(copy):
    root = copy("sd")
    expected = {
        name: diffusers_folder.load_params(getattr(families.open_folder(root), name))
        for name in ("network", "vae")
    }
    tensors = load_file(root / "unet" / "diffusion_pytorch_model.safetensors")
    (root / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch_weights.save(root / "unet", "diffusion_pytorch_model", tensors, shard_bytes=40_000)
    assert len(list((root / "unet").glob("*-of-*.safetensors"))) > 1
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    vae = {}
    for name, tensor in load_file(root / "vae" / "diffusion_pytorch_model.safetensors").items():
        for new, was in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{was}.")
        vae[name] = tensor
    assert any("proj_attn" in name for name in vae)
    save_file(vae, root / "vae" / "diffusion_pytorch_model.safetensors")
    text = load_file(root / "text_encoder" / "model.safetensors")
    prefixed = {
        name if name.startswith("text_model.") else f"text_model.{name}": t.astype(np.float16)
        for name, t in text.items()
    }
    prefixed["text_model.embeddings.position_ids"] = np.arange(77)[None]
    (root / "text_encoder" / "model.safetensors").unlink()
    save_file(prefixed, root / "text_encoder" / "model.fp16.safetensors")
    found = families.open_folder(root)
    for name, params in expected.items():
        again = diffusers_folder.load_params(getattr(found, name))
        assert not [
            k
            for k, v in folders_flat(params).items()
            if not np.array_equal(v, folders_flat(again)[k])
        ]
    half = diffusers_folder.load_params(found.text_encoders[0])
    assert all(v.dtype == np.float32 for v in folders_flat(half).values())


def test_a_variant_in_shards_is_read_and_its_student_needs_no_variant(copy, tmp_path):
    """As diffusers writes them; what is not read, and not there, does not stop stock diffusers from
    loading the student.
    """
    root, pipe = copy("sd"), folders.torch_pipe("sd")
    expected = folders_flat(diffusers_folder.load_params(families.open_folder(root).network))
    for name in ("unet", "vae", "text_encoder"):
        shutil.rmtree(root / name)
        getattr(pipe, name).save_pretrained(root / name, variant="fp16", max_shard_size="40KB")
    assert (
        list((root / "unet").glob("*fp16-*-of-*.safetensors"))
        and not (root / "unet" / "diffusion_pytorch_model.safetensors").exists()
    )
    (root / "checker").mkdir()
    (root / "checker" / "pytorch_model.bin").write_bytes(b"pickle")
    change_json(
        root / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        checker=["more", "Checker"],
    )
    found = families.open_folder(root)
    params = diffusers_folder.load_params(found.network)
    assert not [k for k, v in folders_flat(params).items() if not np.array_equal(v, expected[k])]
    diffusers_folder.save_student(found, tmp_path / "out", params, scheduler=found.scheduler)
    assert (tmp_path / "out" / "checker" / "pytorch_model.bin").read_bytes() == b"pickle"
    assert not list((tmp_path / "out").rglob("*fp16*"))
    shutil.rmtree(tmp_path / "out" / "checker")
    change_json(tmp_path / "out" / "model_index.json", checker=[None, None])
    again = type(pipe).from_pretrained(tmp_path / "out")
    for name in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(again, name).state_dict(), getattr(pipe, name).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert again.safety_checker is None


def test_what_says_nothing_of_the_network_is_taken(copy):
    root = copy("sd")
    plain = families.open_folder(root).network.module
    average = {
        "decay": 0.9999,
        "inv_gamma": 1.0,
        "min_decay": 0.0,
        "optimization_step": 9,
        "power": 0.7,
        "update_after_step": 0,
    }
    change_json(
        root / "unet" / "config.json",
        **average,
        use_ema_warmup=False,
        only_cross_attention=[False, False],
    )
    assert families.open_folder(root).network.module == plain


def test_a_tensor_in_two_shards_is_named(copy):
    root = copy("sd")
    tensors = load_file(root / "unet" / "diffusion_pytorch_model.safetensors")
    (root / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch_weights.save(root / "unet", "diffusion_pytorch_model", tensors, shard_bytes=40_000)
    shards = sorted((root / "unet").glob("*-of-*.safetensors"))
    stale = load_file(shards[0])
    name = next(iter(stale))
    save_file({**load_file(shards[1]), name: stale[name]}, shards[1])
    with pytest.raises(WeightsError, match=f"both hold {name}"):
        diffusers_folder.load_params(families.open_folder(root).network)


def folders_flat(params):
    from flax.traverse_util import flatten_dict

    return {"/".join(k): np.asarray(v) for k, v in flatten_dict(params).items()}


def test_every_tensor_is_used_exactly_once(copy):
    root = copy("sd")
    path = root / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["surplus.weight"] = np.zeros(1, np.float32)
    del tensors["conv_in.bias"]
    tensors["conv_out.weight"] = tensors["conv_out.weight"][:, :2].copy()
    save_file(tensors, path)
    part = families.open_folder(root).network
    with pytest.raises(WeightsError) as failure:
        diffusers_folder.load_params(part)
    for words in (
        "missing: conv_in.bias",
        "left over: surplus.weight",
        "conv_out.weight is [4, 2, 3, 3], the config wants [4, 8, 3, 3]",
    ):
        assert words in str(failure.value)


def change_json(path, **values):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **values}))


def with_channels(root, given, made=4):
    change_json(root / "unet" / "config.json", in_channels=given, out_channels=made)


def of_class(name, **more):
    return lambda root: change_json(root / "model_index.json", _class_name=name, **more)


REFUSALS = {
    "inpainting": (of_class("StableDiffusionInpaintPipeline"), "is of inpainting; it is not"),
    "instructions": (of_class("StableDiffusionInstructPix2PixPipeline"), "editing by instruct"),
    "upscaling": (of_class("StableDiffusionUpscalePipeline"), "is of upscaling"),
    "ControlNet": (of_class("StableDiffusionControlNetPipeline"), "a control image"),
    "refiner": (
        of_class("StableDiffusionXLImg2ImgPipeline", text_encoder=[None, None]),
        "XL's refiner",
    ),
    "from pictures": (
        of_class("StableDiffusionImg2ImgPipeline"),
        "then save them as StableDiffusionPipeline",
    ),
    "inpainting network": (
        lambda root: with_channels(root, 9),
        "9 input channels is of inpainting",
    ),
    "instructions network": (lambda root: with_channels(root, 8), "editing by instructions"),
    "depth network": (lambda root: with_channels(root, 5), "pictures from depth"),
    "network of another VAE": (lambda root: with_channels(root, 16, 16), "but the VAE has 4"),
    "no folder": (lambda root: shutil.rmtree(root), "does not exist"),
    "no pipeline": (lambda root: (root / "model_index.json").unlink(), "no model_index.json"),
    "other pipeline": (
        lambda root: change_json(root / "model_index.json", _class_name="SanaPipeline"),
        "'SanaPipeline' is not supported",
    ),
    "custom pipeline": (
        lambda root: change_json(
            root / "model_index.json", _class_name=["mine", "StableDiffusionPipeline"]
        ),
        "['mine', 'StableDiffusionPipeline'] is not supported",
    ),
    "other encoder": (
        lambda root: change_json(root / "unet" / "config.json", cross_attention_dim=20),
        "the unet's cross_attention_dim is 20, but the text encoder gives",
    ),
    "heads": (
        lambda root: change_json(root / "unet" / "config.json", attention_head_dim=3),
        "[3, 3] heads do not divide",
    ),
    "depth": (
        lambda root: change_json(
            root / "unet" / "config.json",
            transformer_layers_per_block=[[0], [1]],
            reverse_transformer_layers_per_block=[[1], [1, 1]],
        ),
        "transformer_layers_per_block = [[0], [1]] must hold positive whole numbers",
    ),
    "depths of layers, and none going up": (
        lambda root: change_json(
            root / "unet" / "config.json", transformer_layers_per_block=[[1], [1]]
        ),
        "lists layers, and reverse_transformer_layers_per_block is missing",
    ),
    "too few depths going up": (
        lambda root: change_json(
            root / "unet" / "config.json", reverse_transformer_layers_per_block=[1, [1]]
        ),
        "reverse_transformer_layers_per_block = [1, [1]] lists 1 layers of a level that has 2",
    ),
    "other component": (
        lambda root: change_json(
            root / "model_index.json", unet=["diffusers", "SD3Transformer2DModel"]
        ),
        "unet is of class 'SD3Transformer2DModel'; only UNet2DConditionModel",
    ),
    "damaged index": (
        lambda root: (root / "model_index.json").write_text("{"),
        "model_index.json is damaged",
    ),
    "unsupported setting": (
        lambda root: change_json(root / "unet" / "config.json", class_embed_type="timestep"),
        "class_embed_type = 'timestep' is not supported, only None",
    ),
    "unknown setting": (
        lambda root: change_json(root / "unet" / "config.json", future=3),
        "the setting future = 3 is not known",
    ),
    "unknown block": (
        lambda root: change_json(
            root / "unet" / "config.json", down_block_types=["AttnDownBlock2D", "DownBlock2D"]
        ),
        "the block 'AttnDownBlock2D' is not known",
    ),
    "activation": (
        lambda root: change_json(root / "text_encoder" / "config.json", hidden_act="relu"),
        "hidden_act = 'relu'",
    ),
    "tokenizer": (
        lambda root: shutil.rmtree(root / "tokenizer"),
        "neither tokenizer.json nor vocab.json",
    ),
    "no scheduler": (
        lambda root: shutil.rmtree(root / "scheduler"),
        "scheduler_config.json is missing",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_folder_that_cannot_be_used_is_named(case, copy):
    root = copy("sd")
    spoil, words = REFUSALS[case]
    spoil(root)
    with pytest.raises(FolderError) as failure:
        families.open_folder(root)
    assert words in str(failure.value) and "\n" not in str(failure.value)


def test_weights_that_cannot_be_read_are_named(copy):
    root = copy("sd")
    path = root / "unet" / "diffusion_pytorch_model.safetensors"
    part, raw = families.open_folder(root).network, path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(
        WeightsError, match=r"diffusion_pytorch_model\.safetensors cannot be read .* truncated"
    ):
        diffusers_folder.load_params(part)
    path.rename(root / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(
        FolderError, match=r"holds diffusion_pytorch_model\.bin only, and pickles can run code"
    ):
        diffusers_folder.load_params(part)
    index = path.with_name(f"{path.name}.index.json")
    index.write_text(json.dumps({"weight_map": {"a": "shard-1.safetensors"}}))
    with pytest.raises(FolderError, match=r"shard-1\.safetensors is missing"):
        diffusers_folder.load_params(part)
    index.unlink()
    shard = f"{path.stem}-00001-of-00002.safetensors"
    path.with_suffix(".bin").rename(path.with_name(shard))
    with pytest.raises(FolderError, match=rf"holds {shard}, but no {index.name} that names all"):
        diffusers_folder.load_params(part)


def test_weights_that_are_no_checkpoint_of_their_own_are_told_for_what_they_are(copy):
    root = copy("sd")
    path, part = (
        root / "unet" / "diffusion_pytorch_model.safetensors",
        families.open_folder(root).network,
    )
    tensors, name = load_file(path), "conv_in"
    adapted = {n.replace(f"{name}.", f"{name}.base_layer."): t for n, t in tensors.items()}
    save_file(adapted | {f"{name}.lora_A.default.weight": np.zeros(1, np.float32)}, path)
    with pytest.raises(WeightsError, match=r"adapter beside its own .*; merge|fuse_lora"):
        diffusers_folder.load_params(part)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n")
    with pytest.raises(WeightsError, match=r"is a git-lfs pointer, .* git lfs pull"):
        diffusers_folder.load_params(part)
    path.unlink()
    path.symlink_to(root / "blobs" / "ab")
    with pytest.raises(FolderError, match=r"is a link to .*blobs/ab, which does not exist"):
        diffusers_folder.load_params(part)


def test_a_student_is_never_written_over_something_else(copy, tmp_path):
    found = families.open_folder(copy("sd"))
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("x")
    with pytest.raises(FolderError, match="precious exists and is not a pipeline folder"):
        diffusers_folder.save_student(found, tmp_path / "precious", {"params": {}}, scheduler={})
    assert (tmp_path / "precious" / "thesis.tex").read_text() == "x"
