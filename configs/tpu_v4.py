"""Stable Diffusion 1.5 at 512x512 on TPU v4, to one, two and three steps.

    python -m jaxdistill.main --config=configs/tpu_v4.py --distributed --workdir=runs/sd15 \
        --config.teacher.folder=FOLDER --config.data.prompts=prompts.txt

`configs/tpu_v4.py:v5e` and `:v6e` are the same job on those chips; `:sdxl` is SDXL base at
1024x1024 on a slice that divides its parameters. A method's name chooses it, alone or after the
size: `configs/tpu_v4.py:matched`, `:sdxl-matched`. Whether a slice is large enough is told, without
a TPU and without a checkpoint, by

    python -m jaxdistill.aot --config=configs/tpu_v4.py --topology=v4:2x2x2

What it said of Imagine Flash at full size (docs/results/aot_*_step.json), before the networks of
all methods were stored by one rule; each is bound by compute but for :v6e, which is by memory:

    config  slice     rows a  GiB a chip  of them      FLOPs /   ms a  images a second
                      chip                temporaries  analytic  step  a chip, at most
            v4:2x2x2  8       29.7 of 32  14.6         1.10      520   15.4
    :v5e    v5e:4x4   4       15.0 of 16  10.7         1.13      392   10.2
    :v6e    v6e:4x4   8       29.8 of 32  14.6         1.07      267   30.0
    :sdxl   v4:2x2x4  4       24.4 of 32  21.3         1.12      2434  1.6

Those of v5e and SDXL were compiled before upsampling and guidance were made cheaper: by count a
step of 1.5 has 5.7 % fewer FLOPs now, one of XL 1.8 % (docs/results/flops.json).

Nothing here has been run on a TPU yet: rates are a start, not a result.
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
    config = base.chosen(whole(size), method, file="tpu_v4")
    student, matching = config.student, config.methods.matched.matching
    # That share a micro-batch: a chip must have rows of each.
    grids = {"matched": len(matching.counts), "tdm": len(student.steps)}.get(config.method.name, 1)
    parts = max(1, student.batch_size // CHIPS // grids)
    student.batch_size = parts * grids * CHIPS
    student.accumulate = min(student.accumulate, parts)
    return config


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
