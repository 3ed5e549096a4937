"""Writes LoRAs with PEFT and diffusers, for tests: random updates of a folder's network and text
encoders, in the forms in which they are offered.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers.integrations.peft
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_kohya
from folders import load_torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

# Transformers 5.24 asks for a PEFT that is not released; the one before it works.
transformers.integrations.peft.check_peft_version = lambda **_: None
RANK, ALPHA = 4, 6.0
UNET = (
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv_in", "conv_out", "conv"),
    *("linear_1", "linear_2"),
)
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def adapted(folder: Path, seed: int = 0, *, size: float = 0.3):
    """Stock diffusers' pipeline of a folder with a random LoRA, not merged."""
    pipe = load_torch(folder)
    generator = torch.Generator().manual_seed(seed)
    for name, part in parts(pipe).items():
        targets = UNET if name == "unet" else TEXT
        config = LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=[*targets],
            rank_pattern={"attn2.to_k": 2},
            alpha_pattern={"attn2.to_k": 1.0, "fc1": 3.0},
        )
        part.add_adapter(config)
        for key, value in part.named_parameters():
            if "lora_" in key:
                value.data = size * torch.randn(value.shape, generator=generator)
    return pipe


def parts(pipe) -> dict:
    """The components that a LoRA changes."""
    names = ("unet", "text_encoder", "text_encoder_2")
    return {name: part for name in names if (part := getattr(pipe, name, None)) is not None}


def states(pipe) -> dict[str, torch.Tensor]:
    """PEFT's tensors, behind their component's name."""
    return {
        f"{name}.{key}": value
        for name, part in parts(pipe).items()
        for key, value in get_peft_model_state_dict(part).items()
    }


def write_diffusers(pipe, folder: Path) -> Path:
    """Diffusers' file: PEFT's names, the alphas in its metadata."""
    state = {n: get_peft_model_state_dict(part) for n, part in parts(pipe).items()}
    layers = {f"{name}_lora_layers": tensors for name, tensors in state.items()}
    pipe.save_lora_weights(folder, **layers, **_collate_lora_metadata(parts(pipe)))
    return folder / "pytorch_lora_weights.safetensors"


def alphas(pipe) -> dict[str, float]:
    """{layer behind its component's name: alpha}."""
    return {
        f"{name}.{layer}": module.scaling["default"] * module.r["default"]
        for name, part in parts(pipe).items()
        for layer, module in part.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "scaling")
    }


def write_kohya(pipe, path: Path) -> Path:
    """Kohya's file, by diffusers' converter: with an alpha for each layer."""
    state = convert_state_dict_to_kohya(states(pipe))
    for layer, alpha in alphas(pipe).items():
        name = layer.replace("text_encoder_2.", "lora_te2.").replace("text_encoder.", "lora_te1.")
        stem = name.replace("unet.", "lora_unet.", 1).replace(".", "_")
        assert f"{stem}.alpha" in state, stem
        state[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path


if __name__ == "__main__":
    write_kohya(adapted(Path(sys.argv[1])), Path(sys.argv[2]))
