"""8x8 digits, the whole job: teacher, student, evaluation, exports.

    python -m jaxdistill.main --config=configs/digits.py --workdir=runs/digits

About 4 minutes on 2 CPU cores. Expected on the test split (seeds 0-2): FD 0.176 for the teacher at
50 steps, 0.160, 0.175 and 0.194 for the student at 3, 2 and 1 steps; accuracy 0.998 or more.

Any method by name: `configs/digits.py:matched`, `:dmd2`, ... A student of one step alone, which
learns where that one's three steps end:

    python -m jaxdistill.main --config=configs/digits.py:one --workdir=runs/one \
        --config.teacher.path=runs/digits/student

The data are the 1,797 real digits of scikit-learn: 1,078 train, 359 validate, 360 test.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(name: str = "") -> ConfigDict:
    """The config; `name` is a method's, or "one"."""
    return base.chosen(whole(), name, file="digits")


def whole() -> ConfigDict:
    """The config with the settings of all methods."""
    config = base.base("labelled_images", guidance=1.25)  # the best of 1, 1.25, 1.5 on validation
    config.data.update({"name": "digits", "folder": ""})  # digits | fashion; folder of its files

    base.small_teacher(config, iterations=6000, batch_size=128, learning_rate=2e-3)
    # "mlp" (width, depth, cond_width) or "unet" (channels, blocks, patch).
    config.model = ConfigDict(
        {"name": "mlp", "width": 384, "depth": 3, "cond_width": 128, "time_scale": 1000.0}
    )

    config.student.update(
        {
            "iterations": 1100,
            "health_every": 220,
            "batch_size": 128,
            "warmup": 20,
            "decay_to": 1.0,
            "grid": "nested",
            "times": (1.0, 0.5, 0.2),
        }
    )
    config.methods.imagine_flash.update(
        {
            "learning_rate": 4e-3,
            "teacher_steps": 3,  # k
            "guidance": 1.0,  # the shift narrows as much as 1.25 does
            "adversarial_weight": 0.025,
        }
    )
    # Tuned, as k and the guidance.
    config.methods.imagine_flash.shifts.table = ConfigDict(
        {"times": (0.2, 0.5, 1.0), "values": (0.8, 0.8, 0.8)}
    )
    config.methods.endpoint.learning_rate = 4e-3
    config.methods.matched.flash = ConfigDict(config.methods.imagine_flash.to_dict())
    # Chosen on validation (docs/results/tuning_matched_digits.md); it does not reach Imagine Flash.
    config.methods.matched.matching.update(
        {"grid": "nested", "share": 0.1, "guidance": 1.0, "learning_rate": 3e-5}
    )
    config.methods.matched.one.update({"share": 0.2, "learning_rate": 2e-3})

    config.eval = ConfigDict(
        {
            "split": "test",  # test | validation; tune on validation only
            "samples": 18_000,  # FD is then known to 3 %
            "batch_size": 2000,
            "models": ("teacher", "student"),  # what to score; the ratios need the teacher
            "seed": 12345,  # of the sampling noise
            "guidances": (),  # further guidance scales of the teacher to report
            "features": 32,  # dimensions of the feature space
            "channels": (32, 64),  # of the feature extractor's convolutions
            "extractor_steps": 600,
        }
    )
    return config
