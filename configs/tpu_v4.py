"""Stable Diffusion 1.5 at 512x512 on TPU v4, to one, two and three steps.

    python -m jaxdistill.main --config=configs/tpu_v4.py --distributed --workdir=runs/sd15 \
        --config.teacher.folder=FOLDER --config.data.prompts=prompts.txt

`configs/tpu_v4.py:v5e` and `:v6e` are the same job on those chips; `:sdxl` is SDXL base at
1024x1024 on a slice that divides its parameters. A method's name chooses it, alone or after the
size: `configs/tpu_v4.py:matched`, `:sdxl-matched`. Whether a slice is large enough is told, without
a TPU and without a checkpoint, by

    python -m jaxdistill.aot --config=configs/tpu_v4.py --topology=v4:2x2x4

docs/plans.md has what it said of all four. Nothing here has been run on a TPU yet: rates are a
start, not a result.
"""

from ml_collections import ConfigDict

from configs import base, sd15, sdxl

CHIPS = 16
"""Of a v4-32. The batch is for so many; other slices set --config.student.batch_size to rows a chip
times their chips.
"""

SIZES = ("v5e", "v6e", "sdxl")


def get_config(name: str = "") -> ConfigDict:
    """The config; `name` is one of SIZES, a method's, or both joined by "-"."""
    first, _, rest = name.partition("-")
    size, method = (first, rest) if first in SIZES else ("", name)
    config = base.chosen(whole(size), method, file="tpu_v4", sizes=SIZES)
    return base.divided(config, config.student.batch_size // CHIPS, CHIPS)


def whole(size: str) -> ConfigDict:
    """The config of a size, with the settings of all methods."""
    if size == "sdxl":
        config = sdxl.whole()
        config.teacher.architecture = "sdxl"
        # All weights, not LoRA: master weights, average and optimizer are divided over the slice.
        sd15.rates(config, 0.5)
        config.student.update({"lora_rank": 0, "batch_size": 4 * CHIPS, "accumulate": 4})
        config.mesh.update({"data": 1, "fsdp": -1})
        config.compute.attention = "flash"
        return config
    config = sd15.whole()
    config.teacher.architecture = "sd15"
    # With XLA's own, 8 rows need 32.15 GiB of temporaries where 30.75 are free.
    config.compute.attention = "flash"
    config.student.batch_size = (4 if size == "v5e" else 8) * CHIPS
    if size == "v5e":
        # 16 GiB a chip: the average and the optimizer's state do not fit beside the activations.
        config.mesh.fsdp = 4
    return config
