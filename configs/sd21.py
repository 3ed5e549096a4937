"""Stable Diffusion 2.x, 768x768, v-prediction, to one, two and three steps.

    python -m jaxdistill.main --config=configs/sd21.py --workdir=runs/sd21 \
        --config.teacher.folder=FOLDER --config.data.prompts=prompts.txt

As configs/sd15.py; the prediction type is read from the folder. Not run at full size yet.
"""

from ml_collections import ConfigDict

from configs import base, sd15


def get_config(name: str = "") -> ConfigDict:
    """The 1.x config with a batch for larger images; `name` is a method's, or "one"."""
    config = sd15.whole()
    config.student.batch_size = 24
    return base.chosen(config, name, file="sd21")
