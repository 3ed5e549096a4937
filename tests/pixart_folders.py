"""Very small random pipelines of PixArt, saved by diffusers itself."""

import json
from pathlib import Path

import folders
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from transformers import T5Config, T5EncoderModel, T5Tokenizer  # noqa: E402

WORDS = ["a", "photo", "of", "dog", "cat", "the", "red", "house", "by", "sea"]
TEXT = 24
"""Width of the text's states."""
NETWORKS = {
    # As α of 1024 pixels: the image's sizes are inputs.
    "alpha": {
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "num_layers": 2,
        "sample_size": 128,
    },
    # As α of 512 pixels: no sizes, coordinates as they are.
    "alpha512": {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 3,
        "sample_size": 64,
    },
    "sigma": {
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "num_layers": 3,
        "sample_size": 128,
        "interpolation_scale": 2,
        "use_additional_conditions": False,
    },
}
NEWER = ("interpolation_scale", "use_additional_conditions")
"""Keys that a config of before diffusers 0.28 need not have."""


def tokenizer() -> T5Tokenizer:
    """Words, letters and marks; every word has one likeliest split."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -4.0 - 0.07 * i) for i, word in enumerate(WORDS)]
    pieces += [(letter, -6.5 - 0.013 * i) for i, letter in enumerate(letters)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=40)


def text_encoder(vocabulary: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=vocabulary + 5,  # the published one has more rows than tokens, too
        d_model=TEXT,
        d_kv=8,
        num_heads=2,
        d_ff=32,
        num_layers=2,
        feed_forward_proj="gated-gelu",
    )
    model = T5EncoderModel(config)
    for name, value in model.named_parameters():
        if "relative" in name or "norm" in name:
            value.data = torch.randn_like(value) + float("norm" in name)
    return model.eval()


def network(variant: str, bars: torch.Tensor) -> diffusers.PixArtTransformer2DModel:
    """Random weights of which all count, and a last layer that makes of them nearly the noise: far
    from that, the latents of a few steps from t = 999 leave the decoder's range.
    """
    sizes = NETWORKS[variant]
    width = sizes["num_attention_heads"] * sizes["attention_head_dim"]
    net = diffusers.PixArtTransformer2DModel(
        **sizes, cross_attention_dim=width, caption_channels=TEXT
    ).eval()
    for name, value in net.named_parameters():
        noise = torch.randn_like(value)
        matrix = value.ndim > 1 and "table" not in name
        value.data = noise * (value[0].numel() ** -0.5 if matrix else 0.2)
    net.pos_embed.proj.weight.mul_(4.0)
    rows, side = 48, 16
    x, t = torch.randn(rows, 4, side, side), torch.randint(0, 1000, (rows,))
    told = {"resolution": torch.full((rows, 2), 64.0), "aspect_ratio": torch.ones(rows, 1)}
    seen = []
    hook = net.proj_out.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net(x, torch.randn(rows, 9, TEXT), t, told if net.use_additional_conditions else None)
    hook.remove()
    goal = x * (1 - bars[t]).sqrt()[:, None, None, None]
    goal = goal.reshape(rows, 4, side // 2, 2, side // 2, 2).permute(0, 2, 4, 3, 5, 1)
    states = torch.cat([seen[0], torch.ones_like(seen[0][..., :1])], -1).flatten(0, 1)
    found = torch.linalg.lstsq(states.double(), goal.reshape(-1, 16).double()).solution.float()
    net.proj_out.weight.view(4, 8, -1)[:, :4] = found[:-1].T.reshape(4, 4, -1)
    net.proj_out.bias.view(4, 8)[:, :4] = found[-1].reshape(4, 4)
    return net


def make(variant: str, folder: Path) -> None:
    """Save a pipeline of random weights, a function of the variant alone."""
    torch.manual_seed(list(NETWORKS).index(variant))
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_schedule="linear", beta_end=0.02)
    words = tokenizer()
    kind = diffusers.PixArtSigmaPipeline if variant == "sigma" else diffusers.PixArtAlphaPipeline
    pipe = kind(
        tokenizer=words,
        text_encoder=text_encoder(len(words)),
        vae=folders.autoencoder(0.13 if variant == "sigma" else 0.18).eval(),
        transformer=network(variant, scheduler.alphas_cumprod),
        scheduler=scheduler,
    )
    pipe.save_pretrained(folder)


folder = folders.shared(make)


def aged(source: Path) -> None:
    """Make a folder, in place, as diffusers wrote it before it had PixArt's own class."""
    index = json.loads((source / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "Transformer2DModel"]
    (source / "model_index.json").write_text(json.dumps(index))
    where = source / "transformer" / "config.json"
    config = json.loads(where.read_text())
    config |= {
        "_class_name": "Transformer2DModel",
        "_diffusers_version": "0.22.0",
        "double_self_attention": False,
        "num_vector_embeds": None,
        "only_cross_attention": False,
        "use_linear_projection": False,
    }
    if config["interpolation_scale"] is None:
        config = {key: value for key, value in config.items() if key not in NEWER}
    where.write_text(json.dumps(config))


def stock_images(pipe, prompts, latents, **options):
    """What the stock pipeline draws: captions and sizes as they are given."""
    return pipe(
        list(prompts),
        latents=torch.tensor(latents),
        use_resolution_binning=False,
        clean_caption=False,
        output_type="np",
        height=8 * latents.shape[2],
        width=8 * latents.shape[3],
        **options,
    ).images
