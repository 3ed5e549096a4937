"""Very small random pipelines of Stable Diffusion 3 and 3.5, saved by diffusers itself."""

import json
from pathlib import Path

import folders
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from transformers import (  # noqa: E402
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WORDS = ["a", "photo", "of", "dog", "cat", "at", "the", "sea"]
VARIANTS = {
    # As 3.0: no norms of queries and keys, odd widths.
    "medium": {"heads": 3, "head_dim": 8, "layers": 3, "max_size": 9},
    "no_t5": {"heads": 2, "head_dim": 12, "layers": 2, "max_size": 12, "t5": None},
    # As 3.5: dual blocks, then plain ones.
    "medium35": {
        "heads": 2,
        "head_dim": 16,
        "layers": 4,
        "max_size": 12,
        "dual": (0, 1),
        "qk_norm": "rms_norm",
        "end": 2,
    },
    # Of nobody: one latent a patch, other latents, another T5 and another shift.
    "odd": {
        "heads": 4,
        "head_dim": 7,
        "layers": 3,
        "max_size": 20,
        "dual": (0, 2),
        "qk_norm": "rms_norm",
        "patch": 1,
        "channels": 5,
        "t5": {"feed_forward_proj": "gelu", "d_kv": 6, "num_heads": 3, "num_layers": 1},
        "shift": 1.7,
    },
}
TEXT, FACTOR = 48, 4
"""Width of the text's states, and the autoencoder's factor."""


def t5_tokenizer() -> T5Tokenizer:
    """Words and letters; every word has one likeliest split."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -4.0 - 0.07 * i) for i, word in enumerate(WORDS)]
    pieces += [(letter, -6.5 - 0.013 * i) for i, letter in enumerate(letters)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=40)


def t5(vocabulary: int, **sizes: object) -> T5EncoderModel:
    given = {"d_kv": 8, "num_heads": 2, "num_layers": 2, "feed_forward_proj": "gated-gelu", **sizes}
    model = T5EncoderModel(T5Config(vocab_size=vocabulary + 5, d_model=TEXT, d_ff=32, **given))
    return shaken(model)


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights of which all count."""
    for name, value in model.named_parameters():
        noise = torch.randn_like(value)
        if "norm" in name and "linear" not in name:
            value.data = 0.2 * noise + float(name.endswith("weight"))
        elif "relative" in name or ("embed" in name and "time" not in name and value.ndim == 2):
            value.data = noise
        elif "SelfAttention.q" not in name:  # T5's own is small enough
            value.data = noise * (value[0].numel() ** -0.5 if value.ndim > 1 else 0.2)
    return model.eval()


def network(sizes: dict) -> diffusers.SD3Transformer2DModel:
    channels = sizes.get("channels", 6)
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=sizes.get("patch", 2),
        in_channels=channels,
        out_channels=channels,
        num_layers=sizes["layers"],
        attention_head_dim=sizes["head_dim"],
        num_attention_heads=sizes["heads"],
        joint_attention_dim=TEXT,
        caption_projection_dim=sizes["heads"] * sizes["head_dim"],
        pooled_projection_dim=24,
        pos_embed_max_size=sizes["max_size"],
        dual_attention_layers=sizes.get("dual", ()),
        qk_norm=sizes.get("qk_norm"),
    )
    for name, value in shaken(model).named_parameters():
        # Sharp attention over several steps with guidance amplifies rounding.
        if "qk_norm" not in sizes and ("to_q." in name or "q_proj." in name):
            value.mul_(0.4)
    return model


def make(variant: str, folder: Path) -> None:
    """Save a pipeline of random weights, a function of the variant alone."""
    torch.manual_seed(list(VARIANTS).index(variant))
    sizes = VARIANTS[variant]
    clips = {}
    for i, (pad, act) in enumerate((("<|endoftext|>", "quick_gelu"), ("!", "gelu"))):
        words, count = folders.tokenizer(folder.with_name(f"words{i}"), pad)
        config = folders.text_config(count, width=16 + 8 * i, layers=2 + i, act=act)
        if "end" in sizes:
            config.eos_token_id = sizes["end"]
        suffix = "_2" if i else ""
        clips[f"tokenizer{suffix}"] = words
        clips[f"text_encoder{suffix}"] = shaken(CLIPTextModelWithProjection(config))
    more = sizes.get("t5", {})
    words = None if more is None else t5_tokenizer()
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=32,
        latent_channels=sizes.get("channels", 6),
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    ).eval()
    diffusers.StableDiffusion3Pipeline(
        **clips,
        tokenizer_3=words,
        text_encoder_3=None if words is None else t5(len(words), **more),
        vae=vae,
        transformer=network(sizes),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=sizes.get("shift", 3.0)),
    ).save_pretrained(folder)


folder = folders.shared(make)


def load_stock(path: Path) -> diffusers.StableDiffusion3Pipeline:
    """The stock pipeline, which is told which of its parts a folder lacks."""
    index = json.loads((path / "model_index.json").read_text())
    absent = {k: None for k in ("text_encoder_3", "tokenizer_3") if index[k][0] is None}
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(
        path, local_files_only=True, dtype=torch.float32, **absent
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_images(pipe, prompts, latents, *, steps, guidance=1.0, **options):
    """What the stock pipeline draws from latents [n, c, h, w]."""
    return pipe(
        list(prompts),
        latents=torch.tensor(latents),
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="np",
        height=FACTOR * latents.shape[2],
        width=FACTOR * latents.shape[3],
        **options,
    ).images
