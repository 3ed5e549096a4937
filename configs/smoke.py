"""The digits job with everything made small: it shows that all parts work, not how good they are.

Used by CI.

python -m jaxdistill.main --config=configs/smoke.py --workdir=runs/smoke

Under a minute on 2 CPU cores; the images are not meant to be good (FD about 4 for the teacher, 9 at
3 steps).
"""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
    """The digits config, shortened."""
    config = digits.get_config()
    config.model.width = 96
    config.model.depth = 2
    config.model.cond_width = 96
    config.teacher.iterations = 300
    config.teacher.steps = 20
    config.student.iterations = 60
    config.student.batch_size = 32
    config.eval.samples = 720
    config.eval.batch_size = 360
    config.eval.extractor_steps = 150
    config.log.every = 10
    config.teacher.health_every = 150
    config.student.health_every = 30
    config.log.health_samples = 100
    config.log.checkpoint_every = 20
    return config
