"""The digits job with everything made small: it shows that all parts work, not how good they are.

    python -m jaxdistill.main --config=configs/smoke.py --workdir=runs/smoke

Used by CI. Under a minute on 2 CPU cores; the images are not meant to be good (FD about 5 for the
teacher at 20 steps, 13 for its student at 3).
"""

from ml_collections import ConfigDict

from configs import base, digits


def get_config(name: str = "") -> ConfigDict:
    """The digits config, shortened; `name` is a method's, or "one"."""
    config = digits.whole()
    config.model.update({"width": 96, "depth": 2, "cond_width": 96})
    config.teacher.update({"iterations": 300, "steps": 20, "health_every": 150})
    config.student.update({"iterations": 60, "batch_size": 32, "health_every": 30})
    config.methods.direct.pairs_steps = 20
    config.methods.step_distillation.first = 4
    config.methods.lightning.update({"first": 4, "substeps": 2, "counts": (2, 1)})
    config.adversarial.pool = 200
    config.eval.update({"samples": 720, "batch_size": 360, "extractor_steps": 150})
    config.log.update({"every": 10, "health_samples": 100, "checkpoint_every": 20})
    return base.chosen(config, name, file="smoke")
