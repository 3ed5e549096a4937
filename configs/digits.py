"""8x8 digits, the whole job: teacher, student, evaluation, exports.

    python -m jaxdistill.main --config=configs/digits.py --workdir=runs/digits

About 4 minutes on 2 CPU cores. Expected on the test split (seeds 0-2): FD 0.182 for the teacher at
50 steps, 0.167, 0.183 and 0.198 for the student at 3, 2 and 1 steps; accuracy 0.998 or more.

    python -m jaxdistill.main --config=configs/digits.py:one
    --config.teacher.path=runs/digits/student --workdir=runs/one

then trains a student of one step alone on where that one's three steps end: a minute more, FD 0.180
at one step.

The data are the 1,797 real digits of scikit-learn (1,078 to train, 359 to validate, 360 to test).
"""

from ml_collections import ConfigDict

from jaxdistill import variants


def get_config(name: str = "") -> ConfigDict:
    """The config, or its variant `name`; every key can be set as --config.key=value."""
    config = ConfigDict()
    config.seed = 0  # of parameters, batches and noise; not of the splits or the feature extractor

    config.data = ConfigDict(
        {"name": "digits", "folder": ""}
    )  # name: digits | fashion; folder: of fashion's idx files

    # One constructor of jaxdistill.models: "mlp" (width, depth, cond_width) or "unet" (channels,
    # blocks, patch).
    config.model = ConfigDict(
        {"name": "mlp", "width": 384, "depth": 3, "cond_width": 128, "time_scale": 1000.0}
    )

    config.schedule = ConfigDict(
        {
            "name": "cosine",  # cosine | flow | linear | scaled_linear | cosine_betas
            "snr_scale": 1.0,  # factor on alpha/sigma, > 0
            "zero_terminal_snr": False,  # rescale the discrete schedules; the continuous ones have it
            "num_train_steps": 1000,  # of the discrete schedules
        }
    )
    config.prediction = "v"  # eps | v | x0 | flow

    config.teacher = ConfigDict(
        {
            "path": "",  # teacher/ folder of another run: used instead of training one
            "iterations": 6000,
            "health_every": 1000,  # steps between health lines and sample grids
            "batch_size": 128,
            "learning_rate": 2e-3,
            "warmup": 200,  # steps
            "weight_decay": 0.0,
            "adam_b2": 0.999,
            "ema_decay": 0.999,
            "drop_cond": 0.1,  # share of labels dropped, for guidance
            "solver": "ddim",  # ddim | dpm_solver_pp_2m
            "grid": "trailing",  # trailing | leading | linspace
            "steps": 50,  # network calls of the reference sampler
            "guidance": 1.25,  # of the reference sampler; the best of 1, 1.25 and 1.5 by FD on validation
        }
    )

    # Devices: the batch is divided by data x fsdp, parameters of at least `smallest` elements by
    # fsdp and tensor; -1: all that are left.
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1, "smallest": 65536, "rules": ()})
    config.student = ConfigDict(
        {
            "iterations": 1100,
            "health_every": 220,
            "keep_best": "",  # a health number, such as fd_3 or distance_1: export the averages of the step where it was lowest
            "batch_size": 128,
            "learning_rate": 4e-3,
            "warmup": 20,
            "decay_to": 1.0,  # share of the rate at which its cosine ends: no decay
            "weight_decay": 0.0,
            "adam_b2": 0.999,
            "ema_decay": 0.995,
            "steps": (1, 2, 3),  # step counts that one student serves
            "grid": "nested",  # nested (the first N of times) | trailing | linspace
            "times": (1.0, 0.5, 0.2),  # shares of T, decreasing from 1
        }
    )

    config.method = ConfigDict(
        {
            "name": "imagine_flash",  # imagine_flash | endpoint: ours, one step from another student's several (:one)
            "backward": True,  # False: forward distillation on data
            "whole_trajectory": True,  # False: one random state an example
            "noise_correction": True,
            "unroll": False,  # True: one copy of the network a step in the program; faster for convolutions on CPU
            "srl": True,  # False: the teacher starts from the student's own state
            "noise": "trajectory",  # SRL's noise: trajectory | initial | fresh
            "shift": "table",  # SRL's gamma: none | power | linear | table, with its arguments in config.shifts
            "weight_power": 0.0,  # w(t) = (t/T)^power
            "shortcut": 0.0,  # ours: weight of the first state's distance to the end of its trajectory
            "teacher_steps": 3,  # k
            "teacher_solver": "ddim",  # ddim | dpm_solver_pp_2m
            "guidance": 1.0,  # scale of the teacher that is distilled; the shift narrows as much as 1.25 does
        }
    )
    config.shifts = ConfigDict(
        {
            "power": {"strength": 0.3, "power": 3.0},
            "linear": {"low": 0.1, "high": 0.9},
            "table": {
                "times": (0.2, 0.5, 1.0),
                "values": (0.8, 0.8, 0.8),
            },  # tuned, as k and the guidance
        }
    )

    config.adversarial = ConfigDict(
        {
            "weight": 0.025,  # 0 switches it off
            "loss": "hinge",  # hinge | non_saturating
            "learning_rate": 1e-3,
            "width": 128,  # of a head
            "low": 0.0,  # noise levels, shares of T
            "high": 1.0,
            "reals": "data",  # data | teacher
            "pool": 2000,  # teacher images that stand for reals
        }
    )

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

    config.log = ConfigDict(
        {
            "every": 50,  # steps between losses in the curve
            "health_samples": 500,
            "teacher_steps": 20,  # network calls of the teacher's own health samples
            "checkpoint_every": 500,
        }
    )
    return variants.chosen(config, name, file="digits")
