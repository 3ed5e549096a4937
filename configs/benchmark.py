"""Few-step methods side by side on scenes: 32x32 text to image with composition.

    python -m jaxdistill.benchmark --config=configs/benchmark.py --config.data.source=FOLDER
    --workdir=runs/benchmark

FOLDER holds Fashion-MNIST's four idx files. `configs/benchmark.py:smoke` is the same in a few
minutes, on little data. With `--config.base=runs/benchmark`, on that benchmark's teacher:
`configs/benchmark.py:tuning` tries settings of Imagine Flash and scores them on validation,
`configs/benchmark.py:search` the competitors' learning rates, `configs/benchmark.py:ablation` takes
Imagine Flash apart, and `configs/benchmark.py:leakage` trains it forward and backward at times of
more and less signal.
"""

import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

SIZES = ("", "smoke", "tuning", "search", "ablation", "leakage")


def get_config(size: str = "") -> ConfigDict:
    """The config; `size` is one of SIZES."""
    if size not in SIZES:
        known = ", ".join("configs/benchmark.py" + (f":{name}" if name else "") for name in SIZES)
        raise ValueError(f"configs/benchmark.py:{size} is not known; use one of {known}")
    config = ConfigDict()
    config.seeds = (0, 1, 2)  # of the students; the teacher is trained once, with seed 0
    config.base = (
        ""  # workdir of another benchmark, to use its scenes, embeddings, recogniser and teacher
    )
    config.optimize = True  # False: without XLA's costly passes, for programs that take longer to compile than to run

    config.data = ConfigDict(
        {"source": "", "scale": 1.0}
    )  # folder of the idx files; factor on the number of scenes
    config.text = ConfigDict(
        {"folder": "", "length": 32}
    )  # folder of a MiniLM ("": the installed package's); tokens a caption

    config.model = ConfigDict(
        {
            "name": "text_unet",
            "channels": (24, 48, 96),
            "blocks": 1,
            "patch": 2,
            "text_width": 128,
            "time_scale": 1000.0,
        }
    )
    config.schedule = ConfigDict(
        {"name": "cosine", "snr_scale": 1.0, "zero_terminal_snr": False, "num_train_steps": 1000}
    )
    config.prediction = "v"

    config.teacher = ConfigDict(
        {
            "iterations": 8000,
            "batch_size": 64,
            "learning_rate": 1e-3,
            "warmup": 200,
            "weight_decay": 0.0,
            "adam_b2": 0.99,
            "ema_decay": 0.999,
            "drop_cond": 0.1,
            "time_skew": 2.0,  # more of the batch near T: where a caption's garments go is decided there
            "grid": "trailing",
            "steps": 50,
            "guidance": 2.0,  # of the reference sampler
            "health_every": 1000,
        }
    )
    config.recogniser = ConfigDict(
        {
            "channels": (16, 32, 64),
            "features": 64,
            "steps": 3000,
            "batch_size": 128,
            "learning_rate": 2e-3,
        }
    )
    config.methods = (
        "imagine_flash",
        "matched",
        "direct",
        "step_distillation",
        "lcm",
        "add",
        "lightning",
        "dmd2",
        "tdm",
    )
    config.student = ConfigDict(
        {
            "budget": 12_000,  # network calls on a batch that each method may spend, backward counts two
            "batch_size": 16,
            "ema_decay": 0.99,
            "steps": (1, 2, 3, 4),
            "times": (1.0, 0.75, 0.5, 0.3),  # nested grid of the trajectory methods, shares of T
        }
    )
    config.adversarial = ConfigDict(
        {"loss": "hinge", "learning_rate": 1e-3, "width": 128, "low": 0.0, "high": 1.0}
    )
    # What each method's paper recommends; tuned on validation where a comment says so.
    follow = config.teacher.get_oneway_ref  # the teacher's value, unless the method's own is set
    config.method_settings = ConfigDict(
        {
            "imagine_flash": {
                "learning_rate": 1e-3,  # tuned
                "guidance": follow("guidance"),
                "backward": True,
                "whole_trajectory": True,
                "noise_correction": True,
                "srl": True,
                "noise": "trajectory",
                "shift": "table",
                "shift_settings": {
                    "times": (0.3, 0.5, 0.75, 1.0),
                    "values": (0.52, 0.65, 0.77, 0.87),
                },
                "teacher_steps": 2,
                "adversarial_weight": 0.05,
                "shortcut": 0.0,  # ours: weight of the first state's distance to the end of its trajectory
                "adversary_states": "all",  # of the student's states, which the discriminator judges: all | one a row
            },
            "direct": {
                "learning_rate": 1e-3,
                "pairs_share": 0.5,
                "pairs_solver": "ddim",
                "pairs_steps": follow("steps"),
            },
            "step_distillation": {
                "learning_rate": 5e-4,
                "guidance": follow("guidance"),
                "first": 16,
            },
            "lcm": {
                "learning_rate": 5e-4,
                "guidance": follow("guidance"),
                "intervals": 50,
                "huber": 0.001,
                "target_decay": 0.95,
            },
            "add": {
                "learning_rate": 5e-4,
                "guidance": follow("guidance"),
                "distillation_weight": 2.5,
                "adversarial_weight": 0.05,
            },
            "lightning": {
                "learning_rate": 3e-4,
                "adversarial_learning_rate": 1e-5,  # of the stages after the first; tuned
                "guidance": follow("guidance"),
                "first": 16,
                "substeps": 4,
                "first_share": 0.25,
                "counts": (4, 2, 1),
                "regression": 0.0,
            },
            "dmd2": {
                "learning_rate": 1e-4,
                "fake_learning_rate": 5e-4,
                "guidance": follow("guidance"),
                "adversarial_weight": 0.003,
            },
            "tdm": {
                "learning_rate": 1e-4,
                "fake_learning_rate": 5e-4,
                "guidance": follow("guidance"),
            },
        }
    )
    matching = settings_of(config, "tdm") | {
        "share": 0.35,  # of the budget, after Imagine Flash
        "grid": "listed",  # listed | nested (Imagine Flash's times) | trailing
        "times": ((1.0,), (1.0, 0.5), (1.0, 0.75, 0.5), (1.0, 0.75, 0.5, 0.3)),  # tuned
        "counts": (2, 3),  # steps of the trajectories that share a batch; tuned
        "shortcut": 1.0,
        "flash_weight": 0.0,  # of Imagine Flash's loss at x_T, beside the matching
    }
    one = {
        "share": 0.3,
        "steps": 3,
        "learning_rate": 3e-4,
    }  # a student of one step, from the one of so many
    more = {
        "guidance": 1.5 * follow("guidance") - 0.5
    }  # of the two stages that ask the teacher; tuned
    three_stages = {"method": "matched", "one": one}
    shipped = {**three_stages, **more, "matching": matching | more}
    variants(config, {"matched": shipped})
    config.eval = ConfigDict(
        {
            "split": "test",  # test | validation; tune on validation only
            "guidances": (),  # of more teacher rows
            "samples": 2000,
            "unseen": 1000,
            "diversity_captions": 100,
            "repeats": 8,  # images a caption for the diversity
            "batch_size": 250,
            "seed": 12345,
        }
    )
    config.log = ConfigDict(
        {"every": 50, "checkpoint_every": 250, "health_samples": 250, "teacher_steps": 20}
    )
    # Of results.png: methods against steps | variants against the first one | by an axis, for
    # methods named CURVE_AXIS_VALUE.
    config.chart = ConfigDict({"kind": "methods", "axis": "", "label": ""})

    if size == "tuning":
        config.seeds = (0,)
        config.eval.update(
            {"split": "validation", "samples": 1000, "unseen": 100, "diversity_captions": 25}
        )
        halves = matching | {"share": 0.5}
        all_counts = halves | {"counts": (2, 3, 4, 2)}
        stronger = halves | more
        two_stages = three_stages | {"one": one | {"share": 0.0}}
        lightning = settings_of(config, "lightning")
        config.methods = variants(
            config,
            {
                "matched_nested": {
                    **two_stages,
                    "matching": all_counts
                    | {"grid": "nested", "shortcut": 0.0, "flash_weight": 4.0},
                },
                "matched_trailing": {**two_stages, "matching": all_counts | {"grid": "trailing"}},
                "matched_listed": {**two_stages, "matching": all_counts},
                "matched_rate_3": {**two_stages, "matching": all_counts | {"learning_rate": 3e-4}},
                "matched_counts": {**two_stages, "matching": halves},
                "matched_share": {**two_stages, "matching": halves | {"share": 0.75}},
                "matched_one_state": {**two_stages, "whole_trajectory": False, "matching": halves},
                "matched_guidance": {**two_stages, **more, "matching": stronger},
                "matched_one": {
                    **two_stages,
                    **more,
                    "matching": stronger | {"counts": (1, 2, 3, 2)},
                },
                "matched_shortcut": {
                    **two_stages,
                    **more,
                    "matching": stronger | {"shortcut": 4.0},
                },
                "matched_three": {**three_stages, "matching": matching},
                "matched_three_one_state": {
                    **three_stages,
                    "whole_trajectory": False,
                    "matching": matching | {"share": 0.5},
                },
                "matched_three_guidance": shipped,
                "lightning_rate_1": {"method": "lightning", **lightning},
                "lightning_rate_3": {
                    "method": "lightning",
                    **lightning,
                    "adversarial_learning_rate": 3e-5,
                },
                "if_k2": {},
                "if_k3": {"teacher_steps": 3},
                "if_k4": {"teacher_steps": 4},
                "if_adversary_4": {"adversarial_weight": 0.2},
            },
        )
    if size == "search":
        # Are the competitors held back by their learning rates, or by the guidance? On validation,
        # at half of the budget.
        config.seeds = (0,)
        config.student.budget //= 2
        config.eval.update(
            {"split": "validation", "samples": 1000, "unseen": 100, "diversity_captions": 25}
        )
        found: list[str] = []
        for factor, suffix in ((3.0, "_faster"), (1 / 3, "_slower"), (1.0, "")):
            for method in ("tdm", "dmd2", "step_distillation", "direct", "lcm", "add"):
                given = settings_of(config, method)
                rates = {
                    key: value * factor
                    for key, value in given.items()
                    if key.endswith("learning_rate")
                }
                config.method_settings[method + suffix] = ConfigDict(
                    {"method": method, **given, **rates}
                )
                found.append(method + suffix)
        for method in ("tdm", "dmd2"):  # the two that come near, at the guidance that `matched` has
            config.method_settings[method + "_guided"] = ConfigDict(
                {"method": method, **settings_of(config, method), **more}
            )
            found.append(method + "_guided")
        config.methods = tuple(found)
    if size == "ablation":
        config.chart.kind = "variants"
        config.student.budget //= 2
        config.methods = variants(
            config,
            {
                "full": {},
                "forward": {"backward": False},
                "no_srl": {"srl": False},
                "no_noise_correction": {"noise_correction": False},
                "no_discriminator": {"adversarial_weight": 0.0},
                "one_state": {"whole_trajectory": False},
                "noise_initial": {"noise": "initial"},
                "noise_fresh": {"noise": "fresh"},
                "shift_none": {"shift": "none", "shift_settings": {}},
                "shift_power": {"shift": "power", "shift_settings": {}},
                "k_1": {"teacher_steps": 1},
                "k_4": {"teacher_steps": 4},
                "guidance_less": {"guidance": 0.5 + 0.5 * follow("guidance")},
                "guidance_more": {"guidance": 1.5 * follow("guidance") - 0.5},
            },
        )
    if size == "leakage":
        # The paper's argument alone: a plain target from the state itself, no discriminator. Names
        # give the SNR ratio in percent (of α/σ).
        plain = {"srl": False, "adversarial_weight": 0.0}
        config.chart = ConfigDict(
            {
                "kind": "axis",
                "axis": "snr",
                "label": "α/σ of the student's times, in % of the trailing grid's",
            }
        )
        config.student.steps = (3,)
        config.student.budget //= 2
        config.methods = variants(
            config,
            {
                f"{way}_snr_{100 * scale:g}": {
                    **plain,
                    "backward": way == "backward",
                    "times": at_snr(scale),
                }
                for scale in (0.25, 0.5, 1.0, 2.0, 4.0)
                for way in ("forward", "backward")
            },
        )
    if size == "smoke":
        config.seeds = (0,)
        config.optimize = False
        config.data.scale = 0.01
        config.model.channels = (8,)
        config.model.patch = 4
        config.teacher.iterations = 30
        config.teacher.batch_size = 16
        config.teacher.steps = 4
        config.teacher.health_every = 30
        config.recogniser.update(
            {"channels": (8, 8, 16), "features": 8, "steps": 30, "batch_size": 32}
        )
        config.student.update({"budget": 120, "batch_size": 8, "steps": (1, 2)})
        config.method_settings.step_distillation.first = 2
        config.method_settings.matched.matching.counts = (2,)
        config.method_settings.matched.one.steps = 2
        config.method_settings.lightning.update({"first": 2, "substeps": 2, "counts": (1,)})
        config.eval.update(
            {"samples": 50, "unseen": 50, "diversity_captions": 10, "repeats": 4, "batch_size": 50}
        )
        config.log.update({"health_samples": 50, "teacher_steps": 4})
    return config


def settings_of(config: ConfigDict, method: str) -> dict[str, Any]:
    """A method's settings, to change; what follows the teacher still does."""
    block = config.method_settings[method]
    return block.to_dict() | {
        key: block.get_oneway_ref(key) for key in ("guidance", "pairs_steps") if key in block
    }


def variants(config: ConfigDict, changes: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Add settings of Imagine Flash with these `changes`; their names."""
    full = settings_of(config, "imagine_flash")
    for name, change in changes.items():
        config.method_settings[name] = ConfigDict({"method": "imagine_flash", **full, **change})
    return tuple(changes)


def at_snr(scale: float, steps: int = 3) -> tuple[float, ...]:
    """Times of the cosine schedule that have α/σ `scale` times that of the trailing grid's times.

    The networks know the noise by their time, so a schedule of shifted log-SNR is this one at other
    times: the teacher stays exact, and α = 0 at the first time.
    """
    even = [1.0 - i / steps for i in range(1, steps)]
    return (1.0, *(2 / math.pi * math.atan(math.tan(math.pi / 2 * t) / scale) for t in even))
