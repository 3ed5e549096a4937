"""The published architectures of Stable Diffusion, to plan a run without a checkpoint: no weights,
tokenizers or text encoders.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxdistill.interop.diffusers_folder import Folder, Part, unet_module, vae_module

_BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}
_LEVELS = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
_XL = {
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 128,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_HEADS = (5, 10, 20, 20)

PIPELINES: Mapping[str, Mapping[str, Any]] = {
    "sd15": {
        "unet": {**_LEVELS, "sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768},
        "scheduler": {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **_BETAS},
    },
    "sd21": {
        "unet": {
            **_LEVELS,
            "sample_size": 96,
            "attention_head_dim": _HEADS,
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
        },
        "scheduler": {
            "_class_name": "DDIMScheduler",
            "prediction_type": "v_prediction",
            "clip_sample": False,
            **_BETAS,
        },
    },
    "sdxl": {"unet": _XL, "scheduler": {"_class_name": "EulerDiscreteScheduler", **_BETAS}},
}
"""Stable Diffusion 1.5 (512 px), 2.1 (768 px, v-prediction) and SDXL base (1024 px): their UNet's
and scheduler's configs.
"""

_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 0.18215,
}


def folder(pipeline: Mapping[str, Any], **options: Any) -> Folder:
    """One of PIPELINES as a Folder that holds no weights. `options` as of `open_folder`."""
    nowhere = Path("architecture")
    common = {key: options[key] for key in ("attention", "dtype") if key in options}
    unet = dict(pipeline["unet"])
    return Folder(
        path=nowhere,
        components={},
        xl="addition_embed_type" in unet,
        unet=Part(unet_module(unet, nowhere, **options), unet, nowhere, ""),
        vae=Part(vae_module(_VAE, nowhere, **common), _VAE, nowhere, ""),
        text_encoders=(),
        tokenizers=(),
        scheduler=dict(pipeline["scheduler"]),
        zero_empty_prompt=False,
    )
