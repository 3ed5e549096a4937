"""Fashion-MNIST at 28x28: the digits job with a small U-Net.

    python -m jaxdistill.main --config=configs/fashion.py --workdir=runs/fashion \
        --config.data.folder=FOLDER

FOLDER holds the four idx files (plain or .gz), as /usr/share/datasets/fashion-mnist of Debian's
dataset-fashion-mnist. About 45 minutes on 2 CPU cores. Expected on the test split (seed 0): FD 0.58
for the teacher at 50 steps, 0.56, 0.61 and 1.22 for the student at 3, 2 and 1 steps; accuracy 0.79
and 0.71 to 0.74. The other methods (`configs/fashion.py:matched`, ...) have not been tuned here.

50,000 images train, 10,000 validate, 10,000 test.
"""

from ml_collections import ConfigDict

from configs import base, digits


def get_config(name: str = "") -> ConfigDict:
    """The config; what is not set here is as in the digits config."""
    config = digits.whole()
    config.data.name = "fashion"
    config.model = ConfigDict(
        {"name": "unet", "channels": (32, 64), "blocks": 1, "patch": 2, "time_scale": 1000.0}
    )
    config.teacher.update(
        {"iterations": 5000, "batch_size": 64, "learning_rate": 1e-3, "guidance": 1.0}
    )
    config.student.update(
        {"iterations": 1000, "batch_size": 32, "decay_to": 0.02, "health_every": 200}
    )
    # Larger images hold more signal at a given time: the digits' times and shift move towards T.
    config.student.times = (1.0, 0.7, 0.37)
    for flash in (config.methods.imagine_flash, config.methods.matched.flash):
        flash.update({"learning_rate": 5e-4, "teacher_steps": 2, "adversarial_weight": 0.05})
        flash.shifts.table.update({"times": (0.37, 0.7, 1.0), "values": (0.6, 0.75, 0.86)})
    config.methods.endpoint.learning_rate = 5e-4
    config.compute.unroll = True
    config.eval.update(
        {
            "samples": 3000,
            "batch_size": 500,
            "guidances": (1.5,),
            "features": 64,
            "channels": (16, 32),
            "extractor_steps": 1500,
        }
    )
    config.log.update({"health_samples": 160, "checkpoint_every": 250})
    return base.chosen(config, name, file="fashion")
