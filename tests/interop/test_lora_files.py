"""A LoRA in a file changes the weights as PEFT does, in whatever form it comes."""

import functools
import json
import re

import folders
import loras
import numpy as np
import pytest
import text_config
import torch
from safetensors.torch import load_file

from jaxdistill import sample
from jaxdistill.interop import (
    Beside,
    architectures,
    beside,
    diffusers_folder,
    lora_files,
    lora_names,
)
from jaxdistill.interop.lora_files import LoraError
from jaxdistill.interop.single_file import open_checkpoint
from jaxdistill.interop.torch_weights import torch_tensors
from jaxdistill.models.text.clip import CLIPText
from jaxdistill.tasks.text_to_image import pipeline
from jaxdistill.tasks.text_to_image.setup import open_teacher
from jaxdistill.tasks.text_to_image.task import TextToImageTask

VARIANTS = ("sd", "sdxl")


@pytest.fixture(scope="module", params=VARIANTS)
def style(request):
    """A folder, and its pipeline in torch with a LoRA of several ranks and alphas."""
    folder = folders.folder(request.param)
    return folder, loras.adapted(folder, **loras.PATTERNS)


@functools.cache
def kohya(variant, seed=0):
    """Kohya's tensors of a variant's LoRA, of one rank and alpha."""
    return loras.kohya(loras.adapted(folders.folder(variant), seed))


def components(found):
    return lora_names.components(found).items()


def weights(found):
    """Every tensor that is read, by torch's names behind the component's."""
    tensors = {}
    for name, part in components(found):
        read = part.weights()
        for layer, leaves in lora_names.layers(part).items():
            for leaf in leaves:
                tensors[f"{name}.{layer}.{leaf}"] = read.read(f"{layer}.{leaf}")
    return tensors


def assert_equal(found, wanted):
    """Ours and torch's, whose text encoders may have the names of transformers 5."""
    found, wanted = (
        {k.replace("text_model.", ""): v for k, v in tensors.items()} for tensors in (found, wanted)
    )
    assert found.keys() <= wanted.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, np.asarray(wanted[name]), atol=2e-6, err_msg=name)


def old_names(state, alphas):
    """Diffusers' before PEFT: `attn1.processor.to_q_lora.down`, `lora_linear_layer`; no alpha."""
    found = {}
    for key, value in state.items():
        layer = key.partition(".lora_")[0]
        up = ".lora_B." in key
        key = key.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")
        key = re.sub(r"(attn[12])\.(to_[qkv])\.lora", r"\1.processor.\2_lora", key)
        key = re.sub(r"(attn[12])\.to_out\.0\.lora", r"\1.processor.to_out_lora", key)
        if key.startswith("text"):
            key = key.replace(".lora.", ".lora_linear_layer.")
            key = re.sub(r"q_proj\.lora_linear_layer", "to_q_lora", key)
        found[key] = value * alphas[layer] / value.shape[1] if up else value
    return found


def forms(folder, pipe, root):
    """{form: what to give}."""
    kohya = loras.kohya(pipe)
    alphas = loras.alphas(pipe)
    dotted = {f"{layer}.alpha": torch.tensor(alpha) for layer, alpha in alphas.items()}
    some = lambda stem: "down_blocks" in stem  # noqa: E731
    states = {
        "kohya": kohya,
        "original": loras.original(folder, kohya),
        "mixed": loras.original(folder, kohya, some),
        "old": old_names(loras.states(pipe), alphas),
        "alphas": loras.states(pipe) | dotted,
    }
    files = {name: [loras.save(t, root / f"{name}.safetensors")] for name, t in states.items()}
    files["diffusers"] = [loras.write_diffusers(pipe, root / "x")]
    files["folder"] = [root / "x"]
    files["peft"] = loras.write_peft(pipe, root / "peft")
    return files


@pytest.mark.costly
def test_every_form_of_a_lora_is_merged_as_peft_does(style, tmp_path):
    folder, pipe = style
    wanted = loras.merged(pipe)
    for paths in forms(folder, pipe, tmp_path).values():
        found = open_checkpoint(folder, Beside(loras=tuple(map(str, paths))))
        assert_equal(weights(found), wanted)
    plain = weights(open_checkpoint(folder))
    changed = [n for n, v in weights(found).items() if not np.array_equal(v, plain[n])]
    assert len(changed) == len(loras.alphas(pipe))


@pytest.mark.costly
@pytest.mark.parametrize("variant", VARIANTS)
def test_images_are_those_of_stock_diffusers(variant, tmp_path):
    """One file, read by both: Kohya's of 1.x; of XL with the original layout's block names."""
    folder = folders.folder(variant)
    pipe = loras.adapted(folder)
    state = loras.kohya(pipe)
    if variant == "sdxl":
        state = loras.original(folder, state)
    path = loras.save(state, tmp_path / "style.safetensors")
    options = {"latents": np.random.default_rng(0).standard_normal((2, 4, 8, 8), np.float32)}
    options |= {"steps": 2, "guidance": 4.0}
    stock = folders.load_torch(folder)
    plain = folders.torch_images(stock, **options)
    stock.load_lora_weights(tmp_path, weight_name=path.name)
    stock.fuse_lora(lora_scale=0.7)
    wanted = folders.torch_images(stock, **options)
    ours = pipeline.load(folder, beside=Beside(loras=(f"{path}:0.7",)))
    found = ours(folders.PROMPTS, height=64, width=64, **options)
    assert np.abs(found - wanted).max() < 1 / 255 < 0.05 < np.abs(plain - wanted).max()
    # In diffusers' form it is the same weights, and so the same images.
    other = loras.write_diffusers(pipe, tmp_path / "x")
    found, again = (
        weights(open_checkpoint(folder, Beside(loras=(str(p),)))) for p in (path, other)
    )
    for name, value in found.items():
        np.testing.assert_allclose(value, again[name], atol=1e-6, err_msg=name)


def test_several_loras_and_weights_add_up(tmp_path):
    folder = folders.folder("sd")
    files = []
    for seed in (0, 1):
        files.append(loras.save(kohya("sd", seed), tmp_path / f"{seed}.safetensors"))
    plain = weights(open_checkpoint(folder))
    first, second = (weights(open_checkpoint(folder, Beside(loras=(str(f),)))) for f in files)
    both = weights(open_checkpoint(folder, Beside(loras=(f"{files[0]}:0.5", f"{files[1]}:-1.5"))))
    for name, value in plain.items():
        wanted = value + 0.5 * (first[name] - value) - 1.5 * (second[name] - value)
        np.testing.assert_allclose(both[name], wanted, atol=1e-5, err_msg=name)


def test_stacked_blocks_take_their_own_updates(tmp_path):
    folder = folders.folder("sdxl")
    path = loras.save(kohya("sdxl"), tmp_path / "style.safetensors")
    plain, scanned = (
        open_checkpoint(folder, Beside(loras=(str(path),)), scan=scan) for scan in (False, True)
    )
    found = diffusers_folder.load_params(scanned.network)
    wanted = torch_tensors(diffusers_folder.load_params(plain.network))
    for name, value in torch_tensors(found).items():
        np.testing.assert_array_equal(value, wanted[name], err_msg=name)


def test_cores_and_full_differences_are_added(tmp_path):
    """LyCORIS: `lora_mid` between two 1x1 convolutions; `diff`, `diff_b`, `w_norm`, `b_norm`.
    PEFT: a bias of the update, which has its scale.
    """
    folder = folders.folder("sd")
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    conv, norm, linear = "mid_block_resnets_0_conv1", "conv_norm_out", "time_embedding_linear_1"
    plain = weights(open_checkpoint(folder))
    width = plain["unet.conv_norm_out.weight"].shape[0]
    out, inner = plain["unet.mid_block.resnets.0.conv1.weight"].shape[:2]
    state = {
        f"lora_unet_{conv}.lora_down.weight": draw(3, inner, 1, 1),
        f"lora_unet_{conv}.lora_mid.weight": draw(2, 3, 3, 3),
        f"lora_unet_{conv}.lora_up.weight": draw(out, 2, 1, 1),
        f"lora_unet_{conv}.alpha": torch.tensor(1.5),
        f"lora_unet_{norm}.w_norm": draw(width),
        f"lora_unet_{norm}.b_norm": draw(width),
        f"lora_unet_{linear}.diff": draw(*plain["unet.time_embedding.linear_1.weight"].shape),
        f"lora_unet_{linear}.diff_b": draw(*plain["unet.time_embedding.linear_1.bias"].shape),
    }
    state |= {
        "unet.conv_out.lora_A.weight": torch.zeros(2, width, 3, 3),
        "unet.conv_out.lora_B.weight": torch.zeros(4, 2, 1, 1),
        "unet.conv_out.lora_B.bias": draw(4),
        "unet.conv_out.alpha": torch.tensor(3.0),
    }
    path = loras.save(state, tmp_path / "style.safetensors")
    found = weights(open_checkpoint(folder, Beside(loras=(f"{path}:0.5",))))
    added = {name: 2 * (value - plain[name]) for name, value in found.items()}
    # The three convolutions one after the other are the one that is added.
    down, mid, up = (state[f"lora_unet_{conv}.lora_{p}.weight"] for p in ("down", "mid", "up"))
    x = draw(1, inner, 5, 5)
    steps = torch.conv2d(torch.conv2d(torch.conv2d(x, down), mid), up) * 1.5 / 3
    at_once = torch.conv2d(x, torch.tensor(added["unet.mid_block.resnets.0.conv1.weight"]))
    np.testing.assert_allclose(at_once, steps, atol=1e-4)
    for layer, leaves in ((norm, ("w_norm", "b_norm")), (linear, ("diff", "diff_b"))):
        name = layer.replace("_linear", ".linear")
        for leaf, end in zip(("weight", "bias"), leaves, strict=True):
            wanted = state[f"lora_unet_{layer}.{end}"].numpy()
            np.testing.assert_allclose(added[f"unet.{name}.{leaf}"], wanted, atol=1e-5)
    changed = {n for n, v in added.items() if np.abs(v).max() > 0}
    bias = state["unet.conv_out.lora_B.bias"].numpy()
    np.testing.assert_allclose(added["unet.conv_out.bias"], bias * 3 / 2, atol=1e-5)
    assert len(changed) == 6


def test_a_rank_stabilised_lora_is_scaled_by_the_root(tmp_path):
    folder = folders.folder("sd")
    pipe = loras.adapted(folder, use_rslora=True)
    paths = loras.write_peft(pipe, tmp_path / "peft")
    found = open_checkpoint(folder, Beside(loras=tuple(map(str, paths))))
    assert_equal(weights(found), loras.merged(pipe))


TEXTS = {
    "sd15": (CLIPText(49408, 768, 3072, 12, 12),),
    "sdxl": (
        CLIPText(49408, 768, 3072, 12, 12),
        CLIPText(49408, 1280, 5120, 32, 20, projection=1280),
    ),
}
MODULES = {
    # Linear layers and convolutions of the published networks, without their text encoders.
    "sd15": 282,
    "sdxl": 794,
}


@pytest.mark.costly
@pytest.mark.parametrize("name", TEXTS)
def test_at_full_size_each_layer_has_one_stem(name):
    plan = architectures.folder(architectures.PIPELINES[name])
    encoders = tuple(
        diffusers_folder.Part(module, {}, plan.path, "model") for module in TEXTS[name]
    )
    names = tuple(plan.family.encoders)
    folder = plan._replace(text_encoders=encoders, encoder_names=names)
    kernels = [
        layer
        for layer, leaves in lora_names.layers(folder.network).items()
        if len(leaves["weight"]) > 1
    ]
    assert len(kernels) == MODULES[name]
    prefixes = (lora_names.TEXT,) if name == "sd15" else lora_names.XL_TEXT
    for original in (False, True):
        stems = dict(lora_names.kohya_names(folder.network, lora_names.UNET, original=original))
        for part, prefix in zip(encoders, prefixes, strict=True):
            found = lora_names.kohya_names(part, prefix, original=original)
            stems |= {f"{prefix}{layer}": stem for layer, stem in found.items()}
        assert len({*stems.values()}) == len(stems)
    known = lora_names.known_stems(folder)
    assert {*stems.values()} <= known.keys()
    # Only the bare names of XL's encoders are of two components.
    for stem, places in known.items():
        assert len(places) == 1 or stem.removeprefix("base_model.model.").startswith(
            ("text_model.", "encoder.", "embeddings.", "final_layer_norm")
        ), stem
    # Names from files in use.
    published = {
        "sd15": (
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj",
            "lora_unet_mid_block_attentions_0_proj_in",
            "lora_te_text_model_encoder_layers_11_mlp_fc2",
        ),
        "sdxl": (
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
            "lora_unet_input_blocks_3_0_op",
            "lora_unet_middle_block_1_transformer_blocks_9_ff_net_2",
            "lora_unet_output_blocks_2_2_conv",
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
            "lora_unet_label_emb_0_2",
            "lora_unet_time_embed_0",
            "lora_unet_out_2",
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
            "lora_te2_text_model_encoder_layers_31_self_attn_out_proj",
            "lora_te2_text_projection",
        ),
    }
    assert {*published[name]} <= known.keys()


# --------------------------------------------------------------------------------------- bad input

Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def damaged(kind, tmp_path):
    """A LoRA that cannot be used."""
    folder = folders.folder("sd")
    path = tmp_path / "style.safetensors"
    state = dict(kohya("sd"))
    down, up = f"{Q}.lora_down.weight", f"{Q}.lora_up.weight"
    if kind == "missing":
        return path
    if kind == "other base":
        state = kohya("sdxl")
    if kind == "other width":
        state = {down: torch.zeros(2, 7), up: torch.zeros(16, 2)}
    if kind == "up without down":
        del state[down]
    if kind == "ranks":
        state[up] = torch.zeros(16, 5)
    if kind == "alpha alone":
        state = {**state, "lora_unet_conv_norm_out.alpha": torch.tensor(1.0)}
    if kind == "alpha list":
        state[f"{Q}.alpha"] = torch.ones(2)
    if kind == "strange":
        state["bundle_emb.cat.string_to_param.*"] = torch.zeros(1)
    if kind == "core":
        state[f"{Q}.lora_mid.weight"] = torch.zeros(4, 4)
    if kind == "twice":
        again = loras.original(folder, {k: v for k, v in state.items() if k.startswith(Q)})
        state |= {k: v.clone() for k, v in again.items()}
    if kind == "loha":
        state[f"{Q}.hada_w1_a"] = torch.zeros(2, 2)
    if kind == "dora":
        state[f"{Q}.dora_scale"] = torch.zeros(2, 2)
    if kind == "quantised":
        state[down] = torch.ones_like(state[down], dtype=torch.int8)
    if kind == "nan":
        state[down] = torch.full_like(state[down], torch.nan)
    if kind == "checkpoint":
        state = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2)}
    if kind == "other tensors":
        state = {"clip_l": torch.zeros(2)}
    metadata = {"lora_adapter_metadata": "{"} if kind == "metadata" else None
    loras.save(state, path, metadata)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    if kind == "pickle":
        path = path.rename(tmp_path / "style.pt")
    if kind == "peft without config":
        path = path.rename(tmp_path / "adapter_model.safetensors")
    if kind == "empty folder":
        (tmp_path / "style").mkdir()
        path = tmp_path / "style"
    return f"{path}:high" if kind == "weight" else path


MESSAGES = {
    "missing": "does not exist",
    "truncated": "cannot be read as safetensors",
    "pickle": "is a pickle",
    "weight": "'high' is no weight; give FILE or FILE:0.8",
    "other base": "it looks like one for SDXL",
    "other width": "0 of its 2 keys fit sd, but " + Q + " is [16, 7], the layer [16, 16]",
    "up without down": f"is damaged: {Q} has alpha and up without down",
    "ranks": "parts of different ranks: down [4, 16], up [16, 5]",
    "core": "has a mid of shape [4, 4]",
    "alpha alone": "lora_unet_conv_norm_out has alpha without down",
    "alpha list": "alpha of shape [2]",
    "strange": "bundle_emb.cat.string_to_param.* is unknown",
    "twice": "for one layer",
    "loha": "is a LoHa",
    "dora": "is a DoRA",
    "quantised": f"{Q}.lora_down.weight is int8: quantised LoRAs are not read",
    "nan": f"{Q}.lora_down.weight has values that are not finite",
    "checkpoint": "is a whole checkpoint or component",
    "other tensors": "has none of a LoRA's keys (it has clip_l, ...)",
    "metadata": "lora_adapter_metadata in its metadata is damaged",
    "peft without config": "needs adapter_config.json beside it",
    "empty folder": "is a folder without adapter_model.safetensors or pytorch_lora_weights",
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_lora_that_cannot_be_used_is_refused_in_one_line(kind, tmp_path):
    path = damaged(kind, tmp_path)
    with pytest.raises(ValueError, match=re.escape(MESSAGES[kind])) as error:
        found = open_checkpoint(folders.folder("sd"), Beside(loras=(str(path),)))
        diffusers_folder.load_params(found.network)
    assert "\n" not in str(error.value) and "style" in str(error.value) + "style" * (
        kind == "peft without config"
    )


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors:-2", "a.safetensors", -2.0),
        (r"C:\a.safetensors", r"C:\a.safetensors", 1.0),
        (r"C:\a.safetensors:.5", r"C:\a.safetensors", 0.5),
        ("folder", "folder", 1.0),
        ("~/a.safetensors:0.8", "/home/me/a.safetensors", 0.8),
    ],
)
def test_a_weight_follows_the_last_colon(text, path, weight, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    found, number = lora_files.parse(text)
    assert (str(found), number) == (path, weight)


# ------------------------------------------------------------------------------------------ its use


def test_a_student_holds_its_teachers_style_and_takes_it_once(tmp_path, capsys):
    """Text encoders too, in the type that they are stored in."""
    folder = folders.folder("sd")
    path = loras.save(kohya("sd"), tmp_path / "style.safetensors")
    teacher = open_checkpoint(folder, Beside(loras=(f"{path}:0.8",)))
    held = {"loras": lora_files.record(teacher)}
    params = diffusers_folder.load_params(teacher.network)
    target = tmp_path / "student"
    diffusers_folder.save_student(
        teacher,
        target,
        params,
        scheduler={**teacher.scheduler, diffusers_folder.KEY: held},
    )
    student = open_checkpoint(target, Beside(loras=(f"{path}:0.8",)))
    assert "holds" in capsys.readouterr().err
    wanted = weights(teacher)
    for name, value in weights(student).items():
        np.testing.assert_array_equal(value, wanted[name], err_msg=name)
    assert lora_files.record(student) == held["loras"]
    with pytest.raises(LoraError, match=r"with the weight 0\.8 already, not 1;"):
        open_checkpoint(target, Beside(loras=(str(path),)))


def test_checksums_tell_styles_apart(tmp_path):
    """By the bytes of a LoRA and by its weight; only those of the components that it changes."""
    folder = folders.folder("sd")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    layer = "lora_unet_conv_in.diff_b"
    style, other = (
        loras.save({layer: torch.full((8,), value)}, tmp_path / f"{value}.safetensors")
        for value in (1.0, 2.0)
    )

    def checksums(*given):
        config = text_config.get_config()
        config.teacher.update({"folder": str(folder), "loras": given})
        config.data.prompts = str(tmp_path / "prompts.txt")
        task = TextToImageTask(config)
        return [
            task.checksums.of(part) for part in (task.folder.network, *task.folder.text_encoders)
        ]

    found = [checksums(*given) for given in ((), (f"{style}",), (f"{style}:0.5",), (f"{other}",))]
    assert len({unet for unet, _ in found}) == 4
    assert len({text for _, text in found}) == 1


def test_half_precision_encoders_stay_so(tmp_path):
    folder = tmp_path / "half"
    folders.load_torch(folders.folder("sd"), torch_dtype=torch.float16).save_pretrained(folder)
    path = loras.save(kohya("sd"), tmp_path / "style.safetensors")
    found = open_checkpoint(folder, Beside(loras=(str(path),)))
    diffusers_folder.copy_part(found, "text_encoder", tmp_path / "text_encoder")
    state = load_file(tmp_path / "text_encoder" / "model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float16}
    wanted = weights(found)
    for name, value in state.items():
        near = np.asarray(wanted[f"text_encoder.{name}"], np.float16)
        np.testing.assert_array_equal(value, near, err_msg=name)


def test_commands_and_configs_take_loras(tmp_path, capsys):
    folder = folders.folder("sd")
    path = loras.save(kohya("sd"), tmp_path / "style.safetensors")
    needed = ["--model=x", "--out=x.png"]
    for flags in (["--lora=a:0.5,b"], ["--lora=a:0.5", "--lora=b"]):
        args = sample.parser().parse_args([*needed, *flags])
        assert beside(args, args.model) == Beside(loras=("a:0.5", "b"))
    assert beside(sample.parser().parse_args(needed)) == Beside()
    config = text_config.get_config()
    config.teacher.update({"folder": str(folder), "loras": (f"{path}:0.5",)})
    (update,) = open_teacher(config).network.updates
    assert (update.files, update.weight) == ((path,), 0.5)
    (tmp_path / "card.json").write_text(json.dumps({"role": "student"}))
    with pytest.raises(SystemExit):
        sample.main([f"--model={tmp_path}", f"--lora={path}", f"--out={tmp_path / 'x.png'}"])
    assert "goes with a pipeline folder or a single file" in capsys.readouterr().err
