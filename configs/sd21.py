"""Stable Diffusion 2.x (v-prediction at 768x768, or eps at 512x512 as the folder says) to one, two
and three steps.

    python -m jaxdistill.main --config=configs/sd21.py --workdir=runs/sd21 \
        --config.teacher.folder=FOLDER --config.data.prompts=prompts.txt

As configs/sd15.py. Not run at full size yet.
"""

from ml_collections import ConfigDict

from configs import sd15
from jaxdistill import variants


def get_config(name: str = "") -> ConfigDict:
    """The 1.x config with a smaller batch."""
    config = sd15.get_config()
    config.student.batch_size = 24
    return variants.chosen(config, name, file="sd21")
