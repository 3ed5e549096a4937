"""Very small random pipelines, saved by diffusers itself: what the tests of the text-to-image side
read.
"""

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from diffusers.schedulers import (  # noqa: E402
    scheduling_euler_ancestral_discrete,
    scheduling_flow_match_euler_discrete,
    scheduling_lcm,
)
from transformers import (  # noqa: E402
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

torch.set_grad_enabled(False)
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()

PROMPTS = ["a cat at a dog", "photo"]
MERGES = ("a t</w>", "c at</w>", "d o", "do g</w>")
OTHER_MERGES = (
    "a t</w>",
    "c at</w>",
    "o g</w>",
    "d og</w>",
    "p h",
    "ph o",
    "t o</w>",
    "pho to</w>",
    "o f</w>",
)


def tokenizer(
    folder: Path, pad: str = "<|endoftext|>", merges: tuple[str, ...] = MERGES
) -> tuple[CLIPTokenizer, int]:
    """A byte-level CLIP vocabulary with a few merges; (tokenizer, its size)."""
    folder.mkdir(parents=True, exist_ok=True)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]
    words = [
        *letters,
        *(c + "</w>" for c in letters),
        *("".join(m.split()) for m in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77, pad_token=pad
    ), len(words)


def text_config(
    size: int, *, width: int = 16, layers: int = 2, act: str = "quick_gelu", **more: int
) -> CLIPTextConfig:
    ids = {"bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
    sizes = {
        "hidden_size": width,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "projection_dim": 12,
        **more,
    }
    return CLIPTextConfig(
        vocab_size=size,
        num_hidden_layers=layers,
        max_position_embeddings=77,
        hidden_act=act,
        **sizes,
        **ids,
    )


def autoencoder(scale: float) -> "diffusers.AutoencoderKL":
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=64,
        scaling_factor=scale,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
UNETS = {
    # As 1.x: 1x1 convolutions around the transformers, one number of heads, the last level without
    # attention.
    "sd": {
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    # As 2.x: linear projections, heads by level.
    "sd2": {
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "attention_head_dim": (1, 2),
        "cross_attention_dim": 16,
        "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    # Three levels, two blocks each, for the network alone.
    "deep": {
        "layers_per_block": 2,
        "block_out_channels": (8, 16, 24),
        "attention_head_dim": (1, 2, 3),
        "cross_attention_dim": 16,
        "use_linear_projection": True,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
    # As XL: no attention at full resolution, two blocks below, text and time ids added to the time.
    "sdxl": {
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "attention_head_dim": (1, 2),
        "cross_attention_dim": 32,
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 12 + 6 * 8,
    },
}
UNETS |= {
    # As SSD-1B: XL with one residual block as its middle, and a depth for each layer.
    "ssd": {
        **UNETS["sdxl"],
        "mid_block_type": "UNetMidBlock2D",
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, (1, 2)),
        "reverse_transformer_layers_per_block": ((2, 1, 3), 1),
    },
    # As the small and tiny 1.x: no middle.
    "small": {**UNETS["sd"], "mid_block_type": None},
    # As LCM's whole checkpoints: the guidance scale is an input. Levels of unequal length.
    "lcm": {**UNETS["sd"], "time_cond_proj_dim": 24, "layers_per_block": (1, 2)},
}


# Tiny pipelines as others build them: two levels of 16 and 32, an autoencoder of factor 2, fresh
# weights.
FRESH = {
    "fresh": {
        "attention_head_dim": 4,
        "cross_attention_dim": 32,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "freshxl": {
        "attention_head_dim": (2, 4),
        "cross_attention_dim": 32 + 48,
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
}


def make_fresh(variant: str, folder: Path) -> None:
    """Save a pipeline of FRESH."""
    torch.manual_seed(0)
    common = {"layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 8}
    unet = diffusers.UNet2DConditionModel(sample_size=16, **common, **FRESH[variant])
    first, size = tokenizer(folder.with_name(f"{folder.name}-tokens"), merges=OTHER_MERGES)
    vae = diffusers.AutoencoderKL(
        sample_size=32,
        scaling_factor=0.13025 if variant == "freshxl" else 0.18215,
        **common,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    text = text_config(
        size, width=32, intermediate_size=64, num_attention_heads=4, projection_dim=32
    )
    parts = {
        "unet": unet.eval(),
        "vae": vae.eval(),
        "tokenizer": first,
        "text_encoder": CLIPTextModel(text).eval(),
    }
    leading = {**BETAS, "steps_offset": 1, "timestep_spacing": "leading"}
    if variant == "freshxl":
        second, _ = tokenizer(
            folder.with_name(f"{folder.name}-tokens2"), pad="!", merges=OTHER_MERGES
        )
        wide = text_config(
            size,
            width=48,
            act="gelu",
            intermediate_size=96,
            num_attention_heads=4,
            projection_dim=24,
        )
        parts |= {"tokenizer_2": second, "text_encoder_2": CLIPTextModelWithProjection(wide).eval()}
        pipe = diffusers.StableDiffusionXLPipeline(
            **parts, scheduler=diffusers.EulerDiscreteScheduler(**leading)
        )
    else:
        scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **leading)
        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = diffusers.StableDiffusionPipeline(**parts, scheduler=scheduler, **none)
    pipe.save_pretrained(folder)


def make(variant: str, folder: Path) -> None:
    """Save a pipeline of random weights, a function of the variant alone."""
    if variant in FRESH:
        return make_fresh(variant, folder)
    torch.manual_seed(list(UNETS).index(variant))
    xl = "addition_embed_type" in UNETS[variant]
    unet = diffusers.UNet2DConditionModel(sample_size=8, norm_num_groups=4, **UNETS[variant])
    for (
        parameter
    ) in unet.parameters():  # fresh networks end in tiny outputs: make every weight count
        parameter.add_(0.05 * torch.randn_like(parameter))
    first, size = tokenizer(folder.with_name(f"{folder.name}-tokens"))
    common = {
        "unet": unet.eval(),
        "vae": autoencoder(0.13 if xl else 0.18).eval(),
        "tokenizer": first,
    }
    if xl:
        second, _ = tokenizer(folder.with_name(f"{folder.name}-tokens2"), pad="!")
        pipe = diffusers.StableDiffusionXLPipeline(
            **common,
            tokenizer_2=second,
            text_encoder=CLIPTextModel(text_config(size)).eval(),
            text_encoder_2=CLIPTextModelWithProjection(text_config(size, act="gelu")).eval(),
            scheduler=diffusers.EulerDiscreteScheduler(
                **BETAS, steps_offset=1, timestep_spacing="leading"
            ),
        )
    else:
        zero_snr = {
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        }
        scheduler = (
            diffusers.DDIMScheduler(
                **BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, **zero_snr
            )
            if variant == "sd2"
            else diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1)
        )
        text = text_config(
            size,
            layers=3 if variant == "sd2" else 2,
            act="gelu" if variant == "sd2" else "quick_gelu",
        )
        pipe = diffusers.StableDiffusionPipeline(
            **common,
            text_encoder=CLIPTextModel(text).eval(),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.save_pretrained(folder)


def shaken(module, *, norms, tables, seed: int = 0):
    """A module with random weights: matrices scaled by their fan-in; norms, for whose names `norms`
    is true, around 1; biases and what has `tables` in its name large enough to matter.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        if norms(name):
            noise = 1 + 0.3 * noise
        elif value.ndim < 2 or tables in name:
            noise = 0.3 * noise
        else:
            noise = noise * value[0].numel() ** -0.5
        value.data = noise
    return module.eval().requires_grad_(False)


def shared(make: Callable[[str, Path], None]) -> Callable[[str], Path]:
    """(variant) -> the pipeline that `make` saves, shared by all tests of a process: copy it before
    changing anything.
    """

    @functools.cache
    def folder(variant: str) -> Path:
        root = Path(tempfile.mkdtemp(prefix="folders-"))
        make(variant, root / variant)
        return root / variant

    return folder


folder = shared(make)


def rescheduled(variant: str, target: Path, name: str, **settings) -> Path:
    """A copy of the variant's folder with another scheduler, on leading times unless its settings
    say otherwise.
    """
    shutil.copytree(folder(variant), target)
    scheduler = getattr(diffusers, name)(
        **{**BETAS, "steps_offset": 1, "timestep_spacing": "leading", **settings}
    )
    scheduler.save_pretrained(target / "scheduler")
    index = json.loads((target / "model_index.json").read_text())
    (target / "model_index.json").write_text(
        json.dumps({**index, "scheduler": ["diffusers", name]})
    )
    return target


def give_noise(monkeypatch, drawn) -> None:
    """Diffusers' steps take these arrays, one a step, instead of fresh noise of their own."""
    rest = iter([torch.tensor(np.array(noise)) for noise in drawn])
    modules = (
        scheduling_euler_ancestral_discrete,
        scheduling_flow_match_euler_discrete,
        scheduling_lcm,
    )
    for module in modules:
        monkeypatch.setattr(module, "randn_tensor", lambda *shape, **more: next(rest))


@functools.cache
def torch_pipe(variant: str) -> "diffusers.DiffusionPipeline":
    return load_torch(folder(variant))


def load_torch(path: Path, **options) -> "diffusers.DiffusionPipeline":
    pipe = diffusers.DiffusionPipeline.from_pretrained(path, local_files_only=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def torch_images(pipe, *, latents, steps, guidance, size=64, **options):
    """Images [n, h, w, 3] in [0, 1] of diffusers, from NCHW starts."""
    made = pipe(
        PROMPTS,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=torch.tensor(latents),
        height=size,
        width=size,
        output_type="np",
        **options,
    )
    return made.images


def nhwc(tensor):
    return tensor.numpy().transpose(0, 2, 3, 1)


if __name__ == "__main__":
    import sys

    make(sys.argv[1], Path(sys.argv[2]))
