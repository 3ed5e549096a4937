"""Writes LoRAs with PEFT and diffusers, for tests: random updates of a folder's network and text
encoders, in the forms in which they are offered.

    python tests/loras.py FOLDER FILE
"""

import sys
from pathlib import Path

import torch
import transformers.integrations.peft
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_kohya
from folders import load_torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file

from jaxdistill.interop import families, lora_names

# Transformers 5.24 asks for a PEFT that is not released; the one before it works.
transformers.integrations.peft.check_peft_version = lambda **_: None

RANK, ALPHA = 4, 6.0
UNET = (
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv_in", "conv_out", "conv"),
    *("linear_1", "linear_2"),
)
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
KINDS = (torch.nn.Linear, torch.nn.Conv2d)
PATTERNS = {
    "rank_pattern": {"attn2.to_k": 2, "conv1": 3},
    "alpha_pattern": {"attn2.to_k": 1.0, "fc1": 3.0},
}


def adapted(folder: Path, seed: int = 0, **patterns):
    """Stock diffusers' pipeline of a folder with a random LoRA, which is not merged."""
    pipe = load_torch(folder)
    generator = torch.Generator().manual_seed(seed)
    for name, part in parts(pipe).items():
        config = LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=targets(name, part), **patterns
        )
        if hasattr(part, "add_adapter"):
            part.add_adapter(config)
        else:  # PixArt's, of which diffusers loads none
            inject_adapter_in_model(config, part)
            part.peft_config = {"default": config}
        for key, value in part.named_parameters():
            if "lora_" in key:
                value.data = 0.2 * torch.randn(value.shape, generator=generator)
    return pipe


def targets(name: str, part: torch.nn.Module) -> list[str]:
    """The layers that are changed: of a transformer all."""
    if name == "transformer":
        return [layer for layer, module in part.named_modules() if isinstance(module, KINDS)]
    return [*(UNET if name == "unet" else TEXT)]


def parts(pipe) -> dict:
    """The components that a LoRA changes: the network, and CLIPs."""
    networks = {name: getattr(pipe, name, None) for name in ("unet", "transformer")}
    encoders = {name: getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")}
    found = {name: part for name, part in networks.items() if part is not None}
    return found | {k: v for k, v in encoders.items() if type(v).__name__.startswith("CLIP")}


def states(pipe) -> dict[str, torch.Tensor]:
    """PEFT's tensors, behind their component's name."""
    return {
        f"{name}.{key}": value
        for name, part in parts(pipe).items()
        for key, value in get_peft_model_state_dict(part).items()
    }


def alphas(pipe) -> dict[str, float]:
    """{layer behind its component's name: alpha}."""
    return {
        f"{name}.{layer}": module.scaling["default"] * module.r["default"]
        for name, part in parts(pipe).items()
        for layer, module in part.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "scaling")
    }


def merged(pipe) -> dict[str, torch.Tensor]:
    """The weights with the LoRA as PEFT merges it, behind their component's name."""
    found = {}
    for name, part in parts(pipe).items():
        added = {
            layer: module.get_delta_weight("default")
            for layer, module in part.named_modules()
            if hasattr(module, "get_delta_weight")
        }
        for key, value in part.state_dict().items():
            if "lora_" not in key:
                layer = key.removesuffix(".base_layer.weight")
                total = value + added[layer] if layer in added else value
                found[f"{name}.{key.replace('.base_layer', '')}"] = total
    return found


def write_diffusers(pipe, folder: Path) -> Path:
    """Diffusers' file: PEFT's names, the alphas in its metadata."""
    state = {n: get_peft_model_state_dict(part) for n, part in parts(pipe).items()}
    layers = {f"{name}_lora_layers": tensors for name, tensors in state.items()}
    pipe.save_lora_weights(folder, **layers, **_collate_lora_metadata(parts(pipe)))
    return folder / "pytorch_lora_weights.safetensors"


def write_peft(pipe, folder: Path) -> list[Path]:
    """PEFT's folders, one a component: its names, the alphas in a config."""
    for name, part in parts(pipe).items():
        (folder / name).mkdir(parents=True)
        state = get_peft_model_state_dict(part)
        state = {f"base_model.model.{key}": value.contiguous() for key, value in state.items()}
        save_file(state, folder / name / "adapter_model.safetensors")
        part.peft_config["default"].save_pretrained(folder / name)
    return [folder / name for name in parts(pipe)]


def kohya(pipe) -> dict[str, torch.Tensor]:
    """Kohya's tensors, by diffusers' converter, with an alpha for each layer."""
    state = convert_state_dict_to_kohya(states(pipe))
    for layer, alpha in alphas(pipe).items():
        name = layer.replace("text_encoder_2.", "lora_te2.").replace("text_encoder.", "lora_te1.")
        stem = name.replace("unet.", "lora_unet.", 1).replace(".", "_")
        assert f"{stem}.alpha" in state, stem
        state[f"{stem}.alpha"] = torch.tensor(alpha)
    # The trainer knows the encoders' names from before transformers 5, and a single one as "te".
    first = "lora_te1_" if "text_encoder_2" in parts(pipe) else "lora_te_"
    return {
        key.replace("_encoder_layers", "_text_model_encoder_layers")
        .replace("text_model_text_model", "text_model")
        .replace("lora_te1_", first): value
        for key, value in state.items()
    }


def original(folder: Path, state: dict, chosen=lambda stem: True) -> dict[str, torch.Tensor]:
    """Kohya's tensors with the original layout's block names for the chosen stems."""
    unet = families.open_folder(folder).network
    ours, theirs = (
        lora_names.kohya_names(unet, lora_names.UNET, original=original)
        for original in (False, True)
    )
    names = {stem: theirs[layer] for layer, stem in ours.items() if chosen(stem)}
    found = {}
    for key, value in state.items():
        stem, dot, end = key.partition(".")
        found[names.get(stem, stem) + dot + end] = value
    return found


def save(state: dict, path: Path, metadata: dict | None = None) -> Path:
    """A file of tensors."""
    save_file({key: value.contiguous() for key, value in state.items()}, path, metadata)
    return path


if __name__ == "__main__":
    save(kohya(adapted(Path(sys.argv[1]))), Path(sys.argv[2]))
