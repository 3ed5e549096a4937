"""The text-to-image config made so small that a whole run takes a minute; a config file like those
in configs/.
"""

from ml_collections import ConfigDict

from configs import sd15
from jaxdistill import variants


def get_config(name: str = "") -> ConfigDict:
    config = sd15.get_config()
    config.teacher.update({"steps": 4, "guidance": 3.0})
    config.method.update({"guidance": 3.0, "teacher_steps": 1})
    config.compute.update({"dtype": "float32", "teacher_dtype": "float32", "remat": "none"})
    config.student.update(
        {
            "iterations": 6,
            "health_every": 3,
            "batch_size": 6,
            "learning_rate": 1e-3,
            "warmup": 1,
            "ema_decay": 0.5,
        }
    )
    config.adversarial.update({"width": 8, "pool": 5})
    config.export.dtype = "float32"
    config.log.update({"every": 1, "checkpoint_every": 2, "health_prompts": 1, "batch_size": 2})
    return variants.chosen(config, name, file="text_config")
