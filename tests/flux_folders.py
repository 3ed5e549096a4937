"""Very small random pipelines of FLUX.1, saved by diffusers itself."""

from pathlib import Path
from typing import Any

import folders
import numpy as np
import pixart_folders
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from transformers import CLIPTextModel  # noqa: E402

DYNAMIC = {"shift": 3.0, "use_dynamic_shifting": True}
POOLED = 16
"""Width of CLIP's states."""
NETWORKS: dict[str, dict[str, Any]] = {
    "dev": {
        "num_attention_heads": 2,
        "axes_dims_rope": (4, 6, 6),
        "num_layers": 1,
        "num_single_layers": 2,
        "guidance_embeds": True,
    },
    "schnell": {
        "num_attention_heads": 3,
        "axes_dims_rope": (2, 4, 2),
        "num_layers": 2,
        "num_single_layers": 1,
    },
}
LATENTS = 4


def network(variant: str) -> "diffusers.FluxTransformer2DModel":
    """Random weights of which all count."""
    sizes = NETWORKS[variant]
    net = diffusers.FluxTransformer2DModel(
        **sizes,
        in_channels=4 * LATENTS,
        attention_head_dim=sum(sizes["axes_dims_rope"]),
        joint_attention_dim=pixart_folders.TEXT,
        pooled_projection_dim=POOLED,
    ).eval()
    for value in net.parameters():
        noise = torch.randn_like(value)
        value.data = noise * (value.shape[1] ** -0.5 if value.ndim > 1 else 0.2)
    for name, value in net.named_parameters():
        if ".norm_" in name and "linear" not in name:
            value.data += 1.0
    return net


def make(variant: str, folder: Path) -> None:
    """Save a pipeline of random weights, a function of the variant alone."""
    torch.manual_seed(list(NETWORKS).index(variant))
    clip, size = folders.tokenizer(folder.with_name("clip"))
    words = pixart_folders.tokenizer()
    vae = folders.autoencoder(0.36)
    vae.register_to_config(shift_factor=0.12)
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            **(DYNAMIC if variant == "dev" else {"shift": 1.0})
        ),
        transformer=network(variant),
        vae=vae.eval(),
        text_encoder=CLIPTextModel(folders.text_config(size, width=POOLED)).eval(),
        tokenizer=clip,
        text_encoder_2=pixart_folders.text_encoder(len(words)),
        tokenizer_2=words,
    )
    pipe.save_pretrained(folder)


folder = folders.shared(make)


def packed(latents: np.ndarray) -> np.ndarray:
    """[n, c, h, w] as the stock pipeline takes them."""
    n, c, h, w = latents.shape
    return diffusers.FluxPipeline._pack_latents(torch.tensor(latents), n, c, h, w).numpy()


def stock_images(pipe: Any, prompts: Any, latents: np.ndarray, **options: Any) -> np.ndarray:
    """What the stock pipeline draws from latents [n, c, h, w]."""
    size = {"height": 8 * latents.shape[2], "width": 8 * latents.shape[3]}
    start = torch.tensor(packed(latents))
    return pipe(list(prompts), latents=start, output_type="np", **size, **options).images
