"""Very small random pipelines of Z-Image, saved by diffusers itself."""

from pathlib import Path

import folders
import pytest

torch = pytest.importorskip("torch")
torch.set_grad_enabled(False)
diffusers = pytest.importorskip("diffusers")
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model  # noqa: E402
from transformers.convert_slow_tokenizer import bytes_to_unicode  # noqa: E402

TEMPLATE = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    "{%- if not enable_thinking %}{{- '<think></think>' }}{%- endif %}"
)
NETWORKS = {
    "small": {"dim": 32, "n_heads": 2, "axes_dims": [4, 6, 6], "n_layers": 2, "cap_feat_dim": 24},
    # More of one thing, less of another; latents of 4 channels and 4 pixels.
    "other": {
        "dim": 72,
        "n_heads": 3,
        "axes_dims": [8, 8, 8],
        "n_layers": 3,
        "n_refiner_layers": 1,
        "qk_norm": False,
        "norm_eps": 1e-3,
        "rope_theta": 100.0,
        "t_scale": 500.0,
        "in_channels": 4,
        "cap_feat_dim": 40,
    },
}
TEXTS = {
    "small": {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
    "other": {
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
    },
}
SCHEDULERS = {"small": {"shift": 3.0}, "other": {"use_dynamic_shifting": True}}


def shaken(module):
    """Random weights of which all count: matrices scaled by their fan-in, norms around 1."""
    for name, value in module.named_parameters():
        noise = torch.randn_like(value)
        if "norm" in name or name == "cap_embedder.0.weight":
            value.data = 1 + 0.2 * noise
        elif value.ndim < 2 or "pad_token" in name:
            value.data = 0.3 * noise
        else:
            value.data = noise * value[0].numel() ** -0.5
    return module.eval()


def tokenizer() -> Qwen2Tokenizer:
    """Bytes and a few merges."""
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [*bytes_to_unicode().values(), "as", "us", "user", "er", *marks]
    made = Qwen2Tokenizer(
        vocab={word: i for i, word in enumerate(words)},
        merges=[("a", "s"), ("u", "s"), ("e", "r"), ("us", "er")],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        model_max_length=64,
    )
    made.chat_template = TEMPLATE
    return made


def make(variant: str, folder: Path) -> None:
    """Save a pipeline of random weights, a function of the variant alone."""
    torch.manual_seed(list(NETWORKS).index(variant))
    words, sizes = tokenizer(), NETWORKS[variant]
    network = diffusers.ZImageTransformer2DModel(
        **sizes, n_kv_heads=sizes["n_heads"], axes_lens=[600, 128, 128]
    )
    text = Qwen3Config(
        vocab_size=len(words) + 5,  # the published one has more rows than tokens, too
        hidden_size=sizes["cap_feat_dim"],
        intermediate_size=48,
        head_dim=8,
        **TEXTS[variant],
    )
    channels = (8, 16, 16, 16) if variant == "small" else (8, 16, 16)
    vae = diffusers.AutoencoderKL(
        block_out_channels=channels,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        latent_channels=sizes.get("in_channels", 16),
        scaling_factor=0.36,
        shift_factor=0.12,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    shaken(vae).decoder.conv_out.weight.mul_(0.3)  # most pixels are inside [0, 1]
    diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULERS[variant]),
        vae=vae,
        text_encoder=shaken(Qwen3Model(text)),
        tokenizer=words,
        transformer=shaken(network),
    ).save_pretrained(folder)


folder = folders.shared(make)
