"""SDXL base, 1024x1024, to one, two and three steps.

    python -m jaxdistill.main --config=configs/sdxl.py --workdir=runs/sdxl \
        --config.teacher.folder=FOLDER --config.data.prompts=prompts.txt

As configs/sd15.py, with low-rank updates by default: student, fake score and target are small trees
over one copy of the teacher. Not run at full size yet.
"""

from ml_collections import ConfigDict

from configs import base, sd15


def get_config(name: str = "") -> ConfigDict:
    """The config; `name` is a method's, or "one"."""
    return base.chosen(whole(), name, file="sdxl")


def whole() -> ConfigDict:
    """The 1.x config with XL's guidance, LoRA and a loop over the blocks of a level."""
    config = sd15.whole()
    config.teacher.guidance = 5.0
    config.compute.scan = True
    config.student.update({"batch_size": 12, "lora_rank": 64})
    sd15.rates(config, 10.0)
    config.data.update({"height": 1024, "width": 1024})
    return config
