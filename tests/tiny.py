"""The smoke config made so small that a whole run takes seconds; a config file like those in
configs/.
"""

from ml_collections import ConfigDict

from configs import smoke


def get_config() -> ConfigDict:
    config = smoke.get_config()
    config.model.width = 32
    config.model.depth = 1
    config.model.cond_width = 32
    config.teacher.iterations = 40
    config.teacher.warmup = 5
    config.teacher.steps = 5
    config.teacher.guidance = 1.25
    config.student.iterations = 12
    config.student.warmup = 2
    config.student.batch_size = 12
    config.student.steps = (1, 2, 3)
    config.student.grid = "nested"
    config.methods.imagine_flash.teacher_steps = 1
    config.methods.imagine_flash.guidance = 1.25
    config.adversarial.width = 16
    config.eval.samples = 400
    config.eval.batch_size = 200
    config.eval.guidances = (1.0,)
    config.eval.features = 16
    config.eval.channels = (8, 16)
    config.eval.extractor_steps = 30
    config.log.every = 4
    config.teacher.health_every = 12
    config.student.health_every = 12
    config.log.health_samples = 40
    config.log.teacher_steps = 4
    config.log.checkpoint_every = 4
    return config
