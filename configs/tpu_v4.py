"""Stable Diffusion 1.5 at 512x512 on TPU v4, to one, two and three steps.

    python -m jaxdistill.main --config=configs/tpu_v4.py --distributed --workdir=runs/sd15 \
        --config.teacher.folder=FOLDER --config.data.prompts=prompts.txt

`configs/tpu_v4.py:v5e` and `:v6e` are the same job on those chips, `configs/tpu_v4.py:sdxl` is SDXL base at 1024x1024 on a slice that
divides its parameters. Whether a slice is large enough is told, without a TPU and without a checkpoint, by

    python -m jaxdistill.aot --config=configs/tpu_v4.py --topology=v4:2x2x2

What it says of this config there, at 8 rows a chip (docs/results/aot_v4_step.json): 29.5 of 32 GiB a chip, of which the student, its
average and the optimizer 12.8, the teacher 1.6, temporaries 14.5; FLOPs 1.07 times the analytic count; bound by compute, 535 ms a step, at
most 15 images a second a chip; it reduces 3.2 GiB of gradients and gathers nothing. The other three have no report at full size: their
rows are guesses.

Nothing here has been run on a TPU yet: rates are a start, not a result.
"""

from ml_collections import ConfigDict

from configs import sd15, sdxl

CHIPS = 16
"""Of a v4-32. The batch is for so many; other slices set --config.student.batch_size to rows a chip times their chips."""

SIZES = ("", "v5e", "v6e", "sdxl")


def get_config(size: str = "") -> ConfigDict:
    """The config; `size` is one of SIZES."""
    if size not in SIZES:
        known = ", ".join("configs/tpu_v4.py" + (f":{name}" if name else "") for name in SIZES)
        raise ValueError(f"configs/tpu_v4.py:{size} is not known; use one of {known}")
    if size == "sdxl":
        config = sdxl.get_config()
        config.teacher.architecture = "sdxl"
        # All weights, not LoRA: master weights, average and optimizer are divided over the slice.
        config.student.lora_rank = 0
        config.student.learning_rate = 5e-6
        config.mesh.data, config.mesh.fsdp = 1, -1
        config.student.batch_size = 4 * CHIPS
        config.student.accumulate = 4
        config.compute.attention = "flash"
        return config
    config = sd15.get_config()
    config.teacher.architecture = "sd15"
    config.compute.attention = "flash"  # with XLA's own, 8 rows need 32.15 GiB of temporaries where 30.75 are free
    rows = {"": 8, "v5e": 2, "v6e": 8}[size]
    config.student.batch_size = rows * CHIPS
    if size == "v5e":
        # 16 GiB a chip: the average and the optimizer's state do not fit beside the activations on every chip.
        config.mesh.data, config.mesh.fsdp = -1, 4
    return config
