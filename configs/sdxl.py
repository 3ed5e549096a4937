"""SDXL base, 1024x1024, to one, two and three steps.

    python -m jaxdistill.main --config=configs/sdxl.py --workdir=runs/sdxl \
        --config.teacher.folder=FOLDER --config.data.prompts=prompts.txt

As configs/sd15.py, with low-rank updates by default. Not run at full size yet.
"""

from ml_collections import ConfigDict

from configs import sd15
from jaxdistill import variants


def get_config(name: str = "") -> ConfigDict:
    """The 1.x config with XL's guidance, LoRA and a loop over the blocks of a level."""
    config = sd15.get_config()
    config.teacher.guidance = 5.0
    config.method.guidance = 5.0
    config.compute.scan = True
    config.student.batch_size = 12
    config.student.learning_rate = 1e-4
    config.student.lora_rank = 64
    config.data.height = 1024
    config.data.width = 1024
    return variants.chosen(config, name, file="sdxl")
