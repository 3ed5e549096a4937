"""Z-Image, 1024x1024, to one, two and three steps.

    python -m jaxdistill.main --config=configs/zimage.py --workdir=runs/zimage \
        --config.teacher.folder=FOLDER --config.data.prompts=prompts.txt

As configs/sd15.py, with low-rank updates: student, fake score and target are small trees over one
copy of the teacher's six billion weights. Guidance is the stock pipeline's: c + guidance (c - u),
so that 0 is none. Of Z-Image-Turbo, a student of 8 steps without guidance already, give
--config.teacher.guidance=0 --config.teacher.steps=8. Not run at full size yet.
"""

from ml_collections import ConfigDict

from configs import base, sd15


def get_config(name: str = "") -> ConfigDict:
    """The config; `name` is a method's, or "one"."""
    return base.chosen(whole(), name, file="zimage")


def whole() -> ConfigDict:
    """The 1.x config with Z-Image's guidance, LoRA and loops over the blocks."""
    config = sd15.whole()
    config.teacher.guidance = 5.0
    config.compute.scan = True
    targets = ("to_q", "to_k", "to_v", "to_out.0", "feed_forward.w[123]")
    config.student.update({"batch_size": 8, "lora_rank": 64, "lora_targets": targets})
    sd15.rates(config, 10.0)
    sd15.flow(config)
    config.data.update({"height": 1024, "width": 1024})
    config.export.dtype = "bfloat16"
    return config
