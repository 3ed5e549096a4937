"""LoRAs of transformers: stock diffusers loads what is written (of PixArt PEFT does), and what they
write is read.
"""

import functools

import flux_folders
import folders
import jax
import loras
import numpy as np
import peft
import pixart_folders
import pytest
import sd3_folders
import text_config
import torch
import zimage_folders
from safetensors.torch import load_file

from jaxdistill.errors import UserError
from jaxdistill.interop import (
    Beside,
    diffusers_folder,
    families,
    lora,
    lora_names,
    recognise,
)
from jaxdistill.interop.diffusers_folder import FolderError
from jaxdistill.interop.lora_files import LoraError
from jaxdistill.interop.single_file import open_checkpoint
from jaxdistill.interop.torch_weights import TreeWeights
from jaxdistill.model import lora_init, lora_layers, lora_merge
from jaxdistill.tasks.text_to_image import pipeline, take_away
from jaxdistill.tasks.text_to_image.setup import TextSetup, open_teacher

FOLDERS = {
    "sd3": lambda: sd3_folders.folder("medium35"),
    "pixart": lambda: pixart_folders.folder("alpha"),
    "flux": lambda: flux_folders.folder("dev"),
    "zimage": lambda: zimage_folders.folder("small"),
}
TARGETS = {
    "sd3": ("to_[qkv]", "to_out.0", "add_[qkv]_proj", "to_add_out", "net.0.proj", "net.2"),
    "pixart": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
    "flux": (
        *("to_[qkv]", "to_out.0", "add_[qkv]_proj", "to_add_out", "net.0.proj", "net.2"),
        *("proj_mlp", "single_transformer_blocks.*proj_out"),
    ),
    "zimage": ("to_q", "to_k", "to_v", "to_out.0", "feed_forward.w[123]"),
}


def stock(name, **more):
    pipe = folders.load_torch(FOLDERS[name](), dtype=torch.float32, **more)
    for part in loras.parts(pipe).values():
        part.requires_grad_(False)
    return pipe


def updated(folder, targets, rank=3):
    """A network's parameters and random updates of it."""
    params = diffusers_folder.load_params(folder.network)
    fresh = lora_init(jax.random.key(0), params, targets, rank)
    leaves, tree = jax.tree.flatten(fresh)
    random = np.random.default_rng(0)
    moved = [0.2 * random.standard_normal(a.shape).astype(np.float32) for a in leaves]
    return params, jax.tree.unflatten(tree, moved)


def with_lora(name, path):
    """The stock pipeline with a run's LoRA in its weights."""
    pipe = stock(name)
    if name == "pixart":
        assert not hasattr(pipe, "load_lora_weights")
        model = peft.PeftModel.from_pretrained(pipe.transformer, path)
        pipe.transformer = model.merge_and_unload()
        return pipe
    pipe.load_lora_weights(path, weight_name=lora.FILE)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return pipe


@pytest.mark.costly
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_written_is_loaded_into_every_layer(name, scan, tmp_path):
    folder = families.open_folder(FOLDERS[name](), scan=scan)
    params, updates = updated(folder, (".*",))
    lora.save(tmp_path, updates, folder)
    state = with_lora(name, tmp_path).transformer.state_dict()
    merged = TreeWeights(lora_merge(params, updates))
    plain = TreeWeights(params)
    changed = 0
    for tensor in merged.shapes:
        value = merged.read(tensor)
        np.testing.assert_allclose(state[tensor], value, atol=3e-6, err_msg=tensor)
        changed += not np.array_equal(value, plain.read(tensor))
    factors = lora.read(tmp_path / lora.FILE, folder.family)
    assert changed == len(factors) == len(lora.layer_widths(folder))
    assert {key.partition(".")[0] for key in load_file(tmp_path / lora.FILE)} == {"transformer"}


@pytest.mark.parametrize("name", FOLDERS)
def test_the_default_targets_are_the_layers_of_the_blocks(name):
    folder = families.open_folder(FOLDERS[name](), scan=True)
    abstract = diffusers_folder.abstract_params(folder.network)
    found = {".".join(path) for path in lora_layers(abstract, TARGETS[name])}
    layers = {".".join(path) for path in lora_layers(abstract, (".*",))}
    others = "embed|refiner|norm|modulation|time_text|adaln|caption|final"
    inside = {path for path in layers if "blocks." in path or path.startswith("layers.")}
    assert found >= {p for p in inside if not any(o in p for o in others.split("|"))}
    assert not any("embed" in path or "norm" in path for path in found)


@functools.cache
def adapted(name):
    """The stock pipeline with a random LoRA that is not merged."""
    return loras.adapted(FOLDERS[name](), rank_pattern={"to_k": 2}, alpha_pattern={"to_v": 1.5})


def weights(found):
    """Every tensor that is read, by torch's names behind the component's."""
    return {
        f"{name}.{layer}.{leaf}": part.weights().read(f"{layer}.{leaf}")
        for name, part in lora_names.components(found).items()
        for layer, leaves in lora_names.layers(part).items()
        for leaf in leaves
    }


def forms(name, pipe, root):
    """{form: what to give}."""
    state, alphas = loras.states(pipe), loras.alphas(pipe)
    dotted = {f"{layer}.alpha": torch.tensor(alpha) for layer, alpha in alphas.items()}
    old = {
        key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): value
        for key, value in (state | dotted).items()
    }
    kohya = {}
    for key, value in (state | dotted).items():
        layer, dot, end = key.partition(".lora_" if ".lora_" in key else ".alpha")
        component, _, inner = layer.partition(".")
        stem = {"transformer": "lora_unet_", "text_encoder": "lora_te1_"}.get(component)
        end = {"A.weight": "down.weight", "B.weight": "up.weight"}.get(end, end)
        kohya[(stem or "lora_te2_") + inner.replace(".", "_") + dot + end] = value
    named = {"alphas": state | dotted, "old": old, "kohya": kohya}
    files = {k: [loras.save(v, root / f"{k}.safetensors")] for k, v in named.items()}
    files["peft"] = loras.write_peft(pipe, root / "peft")
    if name != "pixart":
        files["diffusers"] = [loras.write_diffusers(pipe, root / "x")]
    return files


@pytest.mark.costly
@pytest.mark.parametrize("name", FOLDERS)
def test_every_form_is_merged_as_peft_does(name, tmp_path):
    pipe = adapted(name)
    wanted = {k.replace("text_model.", ""): v for k, v in loras.merged(pipe).items()}
    changed = set()
    for form, paths in forms(name, pipe, tmp_path).items():
        found = open_checkpoint(FOLDERS[name](), Beside(loras=tuple(map(str, paths))))
        for tensor, value in weights(found).items():
            tensor = tensor.replace("text_model.", "")
            if tensor in wanted:
                near = {"atol": 3e-6, "err_msg": f"{form}: {tensor}"}
                np.testing.assert_allclose(value, np.asarray(wanted[tensor]), **near)
                changed.add(tensor)
        updates = [u for _, part in lora_names.components(found).items() for u in part.updates]
        assert sum(len(u.names) for u in updates) == len(loras.alphas(pipe))
    assert changed >= {f"{k}.weight".replace("text_model.", "") for k in loras.alphas(pipe)}


def zimage_images(pipe, prompts, latents, **options):
    size = {"height": 8 * latents.shape[2], "width": 8 * latents.shape[3]}
    start = torch.tensor(latents)
    return pipe(list(prompts), latents=start, output_type="np", **size, **options).images


def sd3_images(pipe, prompts, latents, *, num_inference_steps, guidance_scale):
    options = {"steps": num_inference_steps, "guidance": guidance_scale}
    return sd3_folders.stock_images(pipe, prompts, latents, **options)


STOCK = {
    "sd3": (sd3_images, sd3_folders.FACTOR),
    "pixart": (pixart_folders.stock_images, 8),
    "flux": (flux_folders.stock_images, 8),
    "zimage": (zimage_images, 8),
}


@pytest.mark.costly
@pytest.mark.parametrize("name", ["flux", "sd3", "pixart", "zimage"])
def test_images_are_those_of_the_stock_pipeline_with_the_lora(name, tmp_path):
    folder = families.open_folder(FOLDERS[name](), scan=True)
    _, updates = updated(folder, TARGETS[name])
    lora.save(tmp_path, jax.tree.map(lambda a: 0.5 * a, updates), folder)
    draw, factor = STOCK[name]
    channels = folder.vae.module.latent_channels
    start = np.random.default_rng(0).standard_normal((1, channels, 8, 8), np.float32)
    options = {"num_inference_steps": 2, "guidance_scale": 3.0}
    wanted = draw(with_lora(name, tmp_path), ["a cat"], start, **options)
    plain = draw(stock(name), ["a cat"], start, **options)
    ours = pipeline.load(folder.path, beside=Beside(loras=(str(tmp_path / lora.FILE),)))
    size = {"height": 8 * factor, "width": 8 * factor}
    found = ours(["a cat"], latents=start, steps=2, guidance=3.0, **size)
    assert np.abs(found - wanted).max() < 1 / 255 < 0.02 < np.abs(plain - wanted).max()


@pytest.mark.costly
@pytest.mark.parametrize("name", ["flux", "pixart"])
def test_the_nearest_lora_of_a_student_of_all_weights_is_loaded(name, tmp_path):
    folder = families.open_folder(FOLDERS[name]())
    params, updates = updated(folder, (".*",), rank=12)
    teacher = TreeWeights(params)
    student = take_away.trained(tmp_path, folder, lora_merge(params, updates), {"steps": 2})
    found = lora.truncated(student.unet, teacher, folder, 5)
    assert 0.3 < found.share < 1.0
    out = tmp_path / (lora.ADAPTER if name == "pixart" else lora.FILE)
    take_away.check_format(student, "diffusers", out)
    take_away.write_lora(student, found.factors, out, dtype="float32", form="diffusers")
    state = with_lora(name, tmp_path).transformer.state_dict()
    merged = lora.Merged(teacher, found.factors)
    for tensor in teacher.shapes:
        np.testing.assert_allclose(state[tensor], merged.read(tensor), atol=3e-6, err_msg=tensor)
    if name == "pixart":
        with pytest.raises(UserError, match=r"adapter_config\.json exists already; give --out "):
            take_away.check_format(student, "diffusers", out)
        with pytest.raises(UserError, match=r"only PEFT does, from a folder; give --out=x/adapter"):
            take_away.check_format(student, "diffusers", type(out)("x.safetensors"))


@pytest.mark.parametrize("name", FOLDERS)
def test_other_formats_are_refused(name, tmp_path):
    folder = families.open_folder(FOLDERS[name]())
    abstract = diffusers_folder.abstract_params(folder.network)
    student = take_away.trained(tmp_path, folder, abstract, {})
    for form in ("kohya", "checkpoint"):
        with pytest.raises(UserError, match=f"--format={form}: of {folder.family.name} no "):
            take_away.check_format(student, form, tmp_path / "x.safetensors")
    config = text_config.get_config()
    config.teacher.folder = str(folder.path)
    config.export.single_file = "always"
    with pytest.raises(UserError, match=r"^config\.export\.single_file = 'always': "):
        TextSetup(config, open_teacher(config))


@pytest.mark.parametrize("name", FOLDERS)
def test_a_file_of_a_transformer_is_told_to_be_given_as_a_folder(name):
    folder = families.open_folder(FOLDERS[name]())
    names = diffusers_folder.names_of(folder.network)
    with pytest.raises(FolderError, match="give the diffusers folder"):
        recognise.check_other("x", {f"model.diffusion_model.{n}": s for n, s in names.items()})


def test_what_does_not_fit_is_named(tmp_path):
    state = loras.states(adapted("flux"))
    key = "transformer.proj_out.lora_A.weight"
    wide = {**state, key: torch.zeros(4, 999)}
    path = loras.save(wide, tmp_path / "wide.safetensors")
    with pytest.raises(LoraError, match=r"but transformer\.proj_out is \["):
        open_checkpoint(FOLDERS["flux"](), Beside(loras=(str(path),)))
    path = loras.save(state, tmp_path / "flux.safetensors")
    with pytest.raises(LoraError, match="it looks like one for Flux"):
        open_checkpoint(FOLDERS["pixart"](), Beside(loras=(str(path),)))


def test_fluxs_own_names_are_read_with_queries_keys_and_values_in_one(tmp_path):
    """As Kohya's trainer writes them, and ComfyUI."""
    folder = families.open_folder(FOLDERS["flux"]())
    shapes, random = lora_names.layers(folder.network), np.random.default_rng(0)
    state, wanted = {}, {}
    for stem, layers in lora_names.fused_stems(folder).items():
        if not stem.startswith("lora_unet_"):
            continue
        sizes = [shapes[layer]["weight"][0] for layer in layers]
        down = random.standard_normal((2, shapes[layers[0]]["weight"][1]), np.float32)
        up = random.standard_normal((sum(sizes), 2), np.float32)
        state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        state[f"{stem}.alpha"] = np.float32(3.0)
        for layer, rows in zip(layers, np.split(up, np.cumsum(sizes)[:-1]), strict=True):
            wanted[f"{layer}.weight"] = 1.5 * rows @ down
    path = loras.save({k: torch.tensor(v) for k, v in state.items()}, tmp_path / "x.safetensors")
    found = open_checkpoint(folder.path, Beside(loras=(str(path),))).network
    plain = folder.network.weights()
    for name in plain.shapes:
        value = plain.read(name) + wanted.pop(name, 0.0)
        np.testing.assert_allclose(found.weights().read(name), value, atol=1e-5, err_msg=name)
    assert not wanted
    linear = [k for k, leaves in shapes.items() if len(leaves["weight"]) > 1]
    assert {*linear} - {*found.updates[0].names} >= {"norm_out.linear"}
    assert len(found.updates[0].names) == len(linear) - 1
    stems = {"lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear1"}
    assert stems <= lora_names.fused_stems(folder).keys()
