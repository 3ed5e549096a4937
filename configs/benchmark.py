"""Few-step methods side by side on scenes: 32x32 text to image with composition.

    python -m jaxdistill.benchmark --config=configs/benchmark.py --config.data.source=FOLDER --workdir=runs/benchmark

FOLDER holds Fashion-MNIST's four idx files. `configs/benchmark.py:smoke` is the same in three minutes, on little data.
"""

from ml_collections import ConfigDict


def get_config(size: str = "") -> ConfigDict:
    """The config; `size` is "" or "smoke"."""
    if size not in ("", "smoke"):
        raise ValueError(f"configs/benchmark.py:{size} is not known; use configs/benchmark.py or configs/benchmark.py:smoke")
    config = ConfigDict()
    config.seeds = (0, 1, 2)  # of the students; the teacher is trained once, with seed 0

    config.data = ConfigDict({"source": "", "scale": 1.0})  # folder of the idx files; factor on the number of scenes
    config.text = ConfigDict({"folder": "", "length": 32})  # folder of a MiniLM ("": the installed package's); tokens a caption

    config.model = ConfigDict(
        {"name": "text_unet", "channels": (32, 64, 96), "blocks": 1, "patch": 2, "text_width": 128, "time_scale": 1000.0}
    )
    config.schedule = ConfigDict({"name": "cosine", "snr_scale": 1.0, "zero_terminal_snr": False, "num_train_steps": 1000})
    config.prediction = "v"

    config.teacher = ConfigDict(
        {
            "iterations": 7000,
            "batch_size": 64,
            "learning_rate": 1e-3,
            "warmup": 200,
            "weight_decay": 0.0,
            "adam_b2": 0.99,
            "ema_decay": 0.999,
            "drop_cond": 0.1,
            "grid": "trailing",
            "steps": 50,
            "guidance": 2.0,  # of the reference sampler
            "health_every": 1000,
        }
    )
    config.recogniser = ConfigDict({"channels": (16, 32, 64), "features": 64, "steps": 2000, "batch_size": 128, "learning_rate": 2e-3})
    config.methods = ("imagine_flash", "direct", "step_distillation", "lcm", "add", "dmd2")
    config.student = ConfigDict(
        {
            "budget": 12_000,  # network calls on a batch that each method may spend, backward counts two
            "batch_size": 32,
            "ema_decay": 0.99,
            "steps": (1, 2, 3, 4),
            "times": (1.0, 0.75, 0.5, 0.3),  # nested grid of the trajectory methods, shares of T
        }
    )
    config.adversarial = ConfigDict({"loss": "hinge", "learning_rate": 1e-3, "width": 128, "low": 0.0, "high": 1.0})
    # What each method's paper recommends; tuned on validation where a comment says so.
    guidance = config.teacher.guidance
    config.method_settings = ConfigDict(
        {
            "imagine_flash": {
                "learning_rate": 5e-4,
                "guidance": guidance,
                "backward": True,
                "whole_trajectory": True,
                "noise_correction": True,
                "srl": True,
                "noise": "trajectory",
                "shift": "table",
                "shift_settings": {"times": (0.3, 0.5, 0.75, 1.0), "values": (0.52, 0.65, 0.77, 0.87)},
                "teacher_steps": 2,
                "adversarial_weight": 0.05,
            },
            "direct": {"learning_rate": 5e-4, "pairs_share": 0.5},
            "step_distillation": {"learning_rate": 3e-4, "guidance": guidance, "first": 16},
            "lcm": {"learning_rate": 3e-4, "guidance": guidance, "intervals": 50, "huber": 0.001, "target_decay": 0.95},
            "add": {"learning_rate": 3e-4, "guidance": guidance, "distillation_weight": 2.5, "adversarial_weight": 0.05},
            "dmd2": {"learning_rate": 1e-4, "fake_learning_rate": 5e-4, "guidance": guidance, "adversarial_weight": 0.003},
        }
    )
    config.eval = ConfigDict(
        {
            "split": "test",  # test | validation; tune on validation only
            "samples": 2000,
            "unseen": 1000,
            "diversity_captions": 100,
            "repeats": 8,  # images a caption for the diversity
            "batch_size": 250,
            "seed": 12345,
        }
    )
    config.log = ConfigDict({"every": 50, "checkpoint_every": 250, "health_samples": 250, "teacher_steps": 20})

    if size == "smoke":
        config.seeds = (0,)
        config.data.scale = 0.01
        config.model.channels = (8,)
        config.model.patch = 4
        config.teacher.iterations = 30
        config.teacher.steps = 4
        config.teacher.health_every = 30
        config.recogniser.update({"channels": (8, 8, 16), "features": 8, "steps": 30})
        config.student.update({"budget": 200, "batch_size": 8, "steps": (1, 2)})
        config.method_settings.step_distillation.first = 2
        config.eval.update({"samples": 50, "unseen": 50, "diversity_captions": 10, "repeats": 4, "batch_size": 50})
        config.log.update({"health_samples": 50, "teacher_steps": 4})
    return config
