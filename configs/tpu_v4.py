"""Stable Diffusion 1.5 at 512x512 on TPU v4, to one, two and three steps.

    python -m jaxdistill.main --config=configs/tpu_v4.py --distributed --workdir=runs/sd15 \
        --config.teacher.folder=FOLDER --config.data.prompts=prompts.txt

`configs/tpu_v4.py:v5e` and `:v6e` are the same job on those chips, `configs/tpu_v4.py:sdxl` is SDXL
base at 1024x1024 on a slice that divides its parameters. Whether a slice is large enough is told,
without a TPU and without a checkpoint, by

    python -m jaxdistill.aot --config=configs/tpu_v4.py --topology=v4:2x2x2

What it says at full size (docs/results/aot_*_step.json), each bound by compute but for :v6e, which
is by memory:

    config  slice     rows a chip  GiB a chip    of them temporaries  FLOPs / analytic  ms a step
    images a second a chip, at most
            v4:2x2x2  8            29.7 of 32    14.6                 1.10              520
            15.4
    :v5e    v5e:4x4   4            15.0 of 16    10.7                 1.13              392
    10.2 :v6e    v6e:4x4   8            29.8 of 32    14.6                 1.07              267
    30.0 :sdxl   v4:2x2x4  4            24.4 of 32    21.3                 1.12              2434
    1.6

Those of v5e and SDXL were compiled before upsampling and guidance were made cheaper: by count a
step of 1.5 has 5.7 % fewer FLOPs now, one of XL 1.8 % (docs/results/flops.json). Of v4's compiled
step 2.8 % were left of it, with 9 % more bytes: 520 ms at least, 535 before.

The first reduces 3.4 GiB of gradients a step and gathers nothing. :v5e, in groups of 4 chips,
gathers 3.2 GiB of parameters and reduces 1.6; :sdxl, over all 16, gathers 9.6 and reduces 51.7, as
each of its four micro-batches reduces its gradients: 219 ms of interconnect beside 2434 of compute.
:v6e reduces 3.4 GiB and gathers nothing; its chips compute in 151 ms, and move what they need in
267. It took an hour and 20 minutes to compile (65 of a core, 18.9 GiB), and jaxlib 0.10.2 cannot
read what libtpu 0.0.52 makes of it: the report is counted from the compiler's own text.

Nothing here has been run on a TPU yet: rates are a start, not a result.
"""

from ml_collections import ConfigDict

from configs import sd15, sdxl

CHIPS = 16
"""Of a v4-32.

The batch is for so many; other slices set --config.student.batch_size to rows a chip times their
chips.
"""

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
    config.compute.attention = (
        "flash"  # with XLA's own, 8 rows need 32.15 GiB of temporaries where 30.75 are free
    )
    rows = {"": 8, "v5e": 4, "v6e": 8}[size]
    config.student.batch_size = rows * CHIPS
    if size == "v5e":
        # 16 GiB a chip: the average and the optimizer's state do not fit beside the activations on
        # every chip.
        config.mesh.data, config.mesh.fsdp = -1, 4
    return config
