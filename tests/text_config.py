"""The text-to-image config made so small that a whole run takes a minute; a config file like those
in configs/.
"""

from types import ModuleType

from ml_collections import ConfigDict

from configs import base, sd15


def get_config(name: str = "", of: ModuleType = sd15) -> ConfigDict:
    config = of.whole()
    config.teacher.update({"steps": 4, "guidance": 3.0})
    config.compute.update({"dtype": "float32", "teacher_dtype": "float32", "remat": "none"})
    config.student.update(
        {"iterations": 6, "health_every": 3, "batch_size": 6, "warmup": 1, "ema_decay": 0.5}
    )
    sd15.rates(config, 100.0)
    for flash in (config.methods.imagine_flash, config.methods.matched.flash):
        flash.teacher_steps = 1
    config.methods.direct.pairs_steps = 4
    config.methods.step_distillation.first = 4
    config.methods.lightning.update({"first": 4, "substeps": 2, "counts": (2, 1)})
    config.adversarial.update({"width": 8, "pool": 5})
    config.guard.action = "warn"  # after these few steps at this rate it may well find something
    config.export.dtype = "float32"
    config.log.update({"every": 1, "checkpoint_every": 2, "health_prompts": 1, "batch_size": 2})
    return base.chosen(config, name, file="text_config")
