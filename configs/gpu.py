"""Stable Diffusion 1.5 and XL on NVIDIA GPUs, to one, two and three steps.

    python -m jaxdistill.main --config=configs/gpu.py:sd15_lora --workdir=runs/sd15 \
        --config.teacher.folder=FOLDER --config.data.prompts=prompts.txt

`:sd15_lora` is 1.5 with LoRA on one card of 24 GB, `:sd15` all its weights on one of 80 GB, and
`:sdxl_lora` XL with LoRA on one of 80 GB. With _x8 behind it is the same job on eight such cards,
which divide the batch: `configs/gpu.py:sd15_lora_x8`. A method's name chooses it, alone or after
the size: `configs/gpu.py:sd15-matched`. `auto` takes cuDNN's fused attention.

The batches are estimates, and nobody has run them on a GPU: what a run keeps (the same on every
device) and the temporaries that the TPU's compiler plans with its own kernel (docs/gpu.md) stay
below the three quarters of the memory that JAX takes by default. Rates are a start, not a result.
"""

from ml_collections import ConfigDict

from configs import base, sd15, sdxl

ROWS = {"sd15_lora": 8, "sd15": 16, "sdxl_lora": 12}
"""Size -> images a card."""


def get_config(name: str = "sd15_lora") -> ConfigDict:
    """The config; `name` is a size, with _xN for N cards, a method's, or both joined by "-"."""
    first, _, rest = name.partition("-")
    size, _, cards = first.partition("_x")
    known = size in ROWS and (not cards or (cards.isdigit() and int(cards) > 0))
    size, count, method = (size, int(cards or 1), rest) if known else ("sd15_lora", 1, name)
    config = base.chosen(whole(size), method, file="gpu", sizes=tuple(ROWS))
    return base.divided(config, ROWS[size], count)


def whole(size: str) -> ConfigDict:
    """The config of a size, with the settings of all methods."""
    config = sdxl.whole() if size == "sdxl_lora" else sd15.whole()
    config.teacher.architecture = size.removesuffix("_lora")
    if size == "sd15_lora":
        sd15.rates(config, 10.0)
        config.student.lora_rank = 64
    return config
