"""A LoRA file: the nearest updates to a difference, and the names by which others read them."""

import re

import folders
import jax
import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.interop import architectures, diffusers_folder, families, lora, single_file_out
from jaxdistill.interop.torch_weights import TreeWeights

VARIANTS = ("sd", "sd2", "sdxl")


def pair(variant, scale=0.05):
    """A folder, the weights of its UNet, and others near to them."""
    folder = families.open_folder(folders.folder(variant))
    params = diffusers_folder.load_params(folder.network)
    leaves, tree = jax.tree.flatten(params)
    random = np.random.default_rng(1)
    moved = [a + scale * random.standard_normal(a.shape).astype(np.float32) for a in leaves]
    return folder, TreeWeights(params), TreeWeights(jax.tree.unflatten(tree, moved))


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (6, 5, 3, 3), (4, 16, 1, 1)])
def test_the_nearest_updates_are_those_of_an_svd(shape):
    difference = np.random.default_rng(0).standard_normal(shape)
    matrix = difference.reshape(shape[0], -1)
    values = np.linalg.svd(matrix, compute_uv=False)
    for rank in range(1, min(matrix.shape) + 3):
        down, up = lora.nearest(difference, rank)
        assert down.shape == (rank, *shape[1:]) and up.shape[:2] == (shape[0], rank)
        product = up.reshape(len(up), -1) @ down.reshape(rank, -1)
        left = np.sum(np.square(matrix - product)) ** 0.5
        np.testing.assert_allclose(left, np.linalg.norm(values[rank:]), atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(down), np.linalg.norm(up), rtol=0.5)


def test_at_full_rank_the_teacher_with_the_lora_is_the_student_but_for_biases_and_norms():
    folder, teacher, student = pair("sdxl")
    rank = max(lora.layer_widths(folder).values())
    found = lora.truncated(student, teacher, folder, rank)
    merged = lora.Merged(teacher, found.factors)
    rest = 0.0
    for name in teacher.shapes:
        if name.rpartition(".")[0] in found.factors and name.endswith(".weight"):
            np.testing.assert_allclose(merged.read(name), student.read(name), atol=1e-6)
        else:
            np.testing.assert_array_equal(merged.read(name), teacher.read(name))
            rest += np.sum(np.square(student.read(name) - teacher.read(name)))
    assert found.rest == pytest.approx(rest)
    assert found.share == pytest.approx(1 - found.rest / found.total)


def test_the_share_that_is_kept_is_that_of_the_largest_singular_values():
    folder, teacher, student = pair("sd")
    found = lora.truncated(student, teacher, folder, 4)
    whole = kept = 0.0
    for name in teacher.shapes:
        d = student.read(name) - teacher.read(name)
        whole += np.sum(np.square(d))
        if d.ndim > 1:
            values = np.linalg.svd(d.reshape(len(d), -1), compute_uv=False)
            kept += np.sum(np.square(values[:4]))
    assert found.share == pytest.approx(kept / whole, rel=1e-5)
    shares = dict(found.worst(len(found.squares)))
    assert shares["conv_out"] == pytest.approx(1.0)  # four channels
    assert shares["mid_block.resnets.0.conv1"] < 0.6


def test_ranks_that_no_layer_has_and_equal_weights_are_refused():
    folder, teacher, _ = pair("sd")
    for rank in (0, 33):
        with pytest.raises(UserError, match=rf"--rank={rank} must be in 1\.\.32, the width of "):
            lora.check_rank(folder, rank)
    assert "conv_out" in lora.check_rank(folder, 8)
    with pytest.raises(UserError, match="are its teacher's: there is nothing to write"):
        lora.truncated(teacher, teacher, folder, 2)


@pytest.mark.costly
@pytest.mark.parametrize("form", lora.FORMATS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_stock_diffusers_adds_either_form_to_every_layer(variant, form, tmp_path):
    """Of several ranks' worth of layers, with convolutions and embeddings."""
    folder, teacher, student = pair(variant)
    found = lora.truncated(student, teacher, folder, 10)
    path = tmp_path / "lora.safetensors"
    tensors = lora.entries(found.factors, folder, dtype="float32", form=form)
    single_file_out.write(path, tensors, {})
    pipe = folders.load_torch(folders.folder(variant))
    pipe.load_lora_weights(tmp_path, weight_name=path.name)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    merged = lora.Merged(teacher, found.factors)
    state = {k.replace(".base_layer.", "."): v for k, v in pipe.unet.state_dict().items()}
    for name in teacher.shapes:
        np.testing.assert_allclose(state[name], merged.read(name), atol=1e-6, err_msg=name)
    assert len(found.factors) == sum(len(shape) > 1 for shape in teacher.shapes.values())


# What UIs accept, in their own terms: a depth of transformers for each block going down and up.
UNETS = {
    "sd15": ([1, 1, 1, 1, 1, 1, 0, 0], 1, [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
    "sdxl": ([0, 0, 2, 2, 10, 10], 10, [10, 10, 10, 2, 2, 2, 0, 0, 0]),
}
RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
BLOCK = (
    *(f"attn{i}.to_{x}" for i in (1, 2) for x in ("q", "k", "v", "out.0")),
    "ff.net.0.proj",
    "ff.net.2",
)
ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def layers_of_a_ui(name):
    """{diffusers' name of a layer: the original layout's}, as ComfyUI counts its blocks (facts of
    its comfy/utils.py).
    """
    down, middle, up = UNETS[name]
    found = dict(ENDS)

    def block(ours, level, j, theirs, depth):
        found.update(
            {f"{ours}.{level}.resnets.{j}.{a}": f"{theirs}.0.{b}" for a, b in RESNET.items()}
        )
        attention(f"{ours}.{level}.attentions.{j}", f"{theirs}.1", depth)

    def attention(ours, theirs, depth):
        inner = [f"transformer_blocks.{t}.{x}" for t in range(depth) for x in BLOCK]
        for layer in ("proj_in", "proj_out", *inner) if depth else ():
            found[f"{ours}.{layer}"] = f"{theirs}.{layer}"

    for i, depth in enumerate(down):
        block("down_blocks", i // 2, i % 2, f"input_blocks.{1 + i // 2 * 3 + i % 2}", depth)
    for level in range(len(down) // 2 - 1):
        found[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{3 * level + 3}.0.op"
    attention("mid_block.attentions.0", "middle_block.1", middle)
    for j in (0, 1):
        for a, b in RESNET.items():
            found[f"mid_block.resnets.{j}.{a}"] = f"middle_block.{2 * j}.{b}"
    for i, depth in enumerate(up):
        block("up_blocks", i // 3, i % 3, f"output_blocks.{i}", depth)
        if i % 3 == 2 and i < len(up) - 1:
            part = 2 if depth else 1
            found[f"up_blocks.{i // 3}.upsamplers.0.conv"] = f"output_blocks.{i}.{part}.conv"
    return found


def a1111(stem, modules):
    """The module that A1111 finds for a stem (facts of its extensions-builtin/Lora/networks.py)."""
    inner = {a: b.replace(".", "_") for a, b in RESNET.items()}
    name = stem.replace("lora_unet", "diffusion_model")
    if stem.startswith(("lora_unet_conv_in", "lora_unet_conv_out")):
        name = "diffusion_model_" + ENDS[stem.removeprefix("lora_unet_")].replace(".", "_")
    if m := re.match(r"lora_unet_time_embedding_linear_(\d)", stem):
        name = f"diffusion_model_time_embed_{2 * int(m[1]) - 2}"
    if m := re.match(r"lora_unet_(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", stem):
        at = int(m[2]) * 3 + int(m[4]) + (m[1] == "down")
        kind = {"down": "input", "up": "output"}[m[1]]
        rest = inner.get(m[5], m[5]) if m[3] == "resnets" else m[5]
        name = f"diffusion_model_{kind}_blocks_{at}_{int(m[3] == 'attentions')}_{rest}"
    if m := re.match(r"lora_unet_mid_block_(attentions|resnets)_(\d+)_(.+)", stem):
        at = 1 if m[1] == "attentions" else 2 * int(m[2])
        rest = inner.get(m[3], m[3]) if m[1] == "resnets" else m[3]
        name = f"diffusion_model_middle_block_{at}_{rest}"
    if m := re.match(r"lora_unet_down_blocks_(\d+)_downsamplers_0_conv", stem):
        name = f"diffusion_model_input_blocks_{3 + int(m[1]) * 3}_0_op"
    if m := re.match(r"lora_unet_up_blocks_(\d+)_upsamplers_0_conv", stem):
        part = 2 if int(m[1]) > 0 else 1
        name = f"diffusion_model_output_blocks_{2 + int(m[1]) * 3}_{part}_conv"
    return modules.get(name)


@pytest.mark.costly
@pytest.mark.parametrize("name", UNETS)
def test_uis_find_the_layer_of_every_key_at_full_size(name):
    folder = architectures.folder(architectures.PIPELINES[name])
    stems, widths = lora.kohya_stems(folder), lora.layer_widths(folder)
    theirs = layers_of_a_ui(name)
    comfy = {"lora_unet_" + layer.replace(".", "_"): layer for layer in theirs.values()}
    comfy |= {"lora_unet_" + ours.replace(".", "_"): layer for ours, layer in theirs.items()}
    modules = {"diffusion_model_" + layer.replace(".", "_"): layer for layer in theirs.values()}
    for layer in widths:
        assert comfy.get(stems[layer]) == theirs[layer], stems[layer]
        assert a1111(stems[layer], modules) == theirs[layer], stems[layer]
    assert len({stems[layer] for layer in widths}) == len(widths)
    # As many as Kohya's trainer makes with convolutions (278, 788), and the embeddings and ends.
    assert len(widths) == {"sd15": 282, "sdxl": 794}[name]


def test_the_metadata_name_the_family_as_uis_look_for_it():
    spec = {"modelspec.architecture": "stable-diffusion-v2-768-v", "modelspec.prediction_type": "v"}
    folder = families.open_folder(folders.folder("sd2"))
    factors = {"conv_in": (np.zeros((3, 4)), np.zeros((8, 3)))}
    found = lora.metadata(folder, factors, spec)
    assert found["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert (found["ss_v2"], found["ss_base_model_version"]) == ("True", "sd_v2_v")
    assert found["ss_network_dim"] == found["ss_network_alpha"] == "3"
    folder = families.open_folder(folders.folder("sdxl"))
    spec = {
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.prediction_type": "",
    }
    assert lora.metadata(folder, factors, spec)["ss_base_model_version"].startswith("sdxl_")
