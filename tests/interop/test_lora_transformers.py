"""LoRAs of transformers: what is written stock diffusers loads (PixArt's PEFT), and what these
write is read.
"""

import flux_folders
import folders
import jax
import loras
import numpy as np
import peft
import pixart_folders
import pytest
import sd3_folders
import torch
import zimage_folders
from safetensors.torch import load_file

from jaxdistill.interop import Beside, diffusers_folder, families, lora, lora_names
from jaxdistill.interop.single_file import open_checkpoint
from jaxdistill.interop.torch_weights import TreeWeights
from jaxdistill.model import lora_init, lora_layers, lora_merge

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
