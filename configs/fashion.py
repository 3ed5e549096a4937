"""Fashion-MNIST at 28x28: the digits job with a small U-Net.

    python -m jaxdistill.main --config=configs/fashion.py --config.data.folder=FOLDER
    --workdir=runs/fashion

FOLDER holds the four idx files (plain or .gz), e.g. /usr/share/datasets/fashion-mnist of Debian's
dataset-fashion-mnist. About 45 minutes on 2 CPU cores. Expected on the test split (seed 0): FD 0.58
for the teacher at 50 steps, 0.56, 0.61 and 1.22 for the student at 3, 2 and 1 steps; accuracy 0.79
and 0.71 to 0.74. `configs/fashion.py:one` (not run yet) is what the digits config says.

50,000 images train, 10,000 validate, 10,000 test.
"""

from ml_collections import ConfigDict

from configs import digits
from jaxdistill import variants


def get_config(name: str = "") -> ConfigDict:
    """The config; what is not set here is as in the digits config."""
    config = digits.get_config()
    config.data.name = "fashion"
    config.model = ConfigDict(
        {"name": "unet", "channels": (32, 64), "blocks": 1, "patch": 2, "time_scale": 1000.0}
    )

    config.teacher.iterations = 5000
    config.teacher.batch_size = 64
    config.teacher.learning_rate = 1e-3
    config.teacher.guidance = 1.0

    config.student.iterations = 1000
    config.student.batch_size = 32
    config.student.learning_rate = 5e-4
    config.student.decay_to = 0.02

    # Larger images hold more signal at a given time: the digits' times and shift move towards T.
    config.student.times = (1.0, 0.7, 0.37)
    config.shifts.table.times = (0.37, 0.7, 1.0)
    config.shifts.table.values = (0.6, 0.75, 0.86)

    config.method.teacher_steps = 2
    config.method.guidance = 1.0
    config.method.unroll = True
    config.adversarial.weight = 0.05

    config.eval.samples = 3000
    config.eval.batch_size = 500
    config.eval.guidances = (1.5,)
    config.eval.features = 64
    config.eval.channels = (16, 32)
    config.eval.extractor_steps = 1500

    config.teacher.health_every = 1000
    config.student.health_every = 200
    config.log.health_samples = 160
    config.log.teacher_steps = 20
    config.log.checkpoint_every = 250
    return variants.chosen(config, name, file="fashion")
