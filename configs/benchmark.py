"""Few-step methods side by side on scenes: 32x32 text to image with composition.

    python -m jaxdistill.benchmark --config=configs/benchmark.py --workdir=runs/benchmark \
        --config.data.source=FOLDER

FOLDER holds Fashion-MNIST's four idx files. `configs/benchmark.py:smoke` is the same in a few
minutes, on little data. On that benchmark's teacher, with `--config.base=runs/benchmark`: `:tuning`
tries settings of ours and scores them on validation, `:search` the competitors' learning rates,
`:updates` how many fake-score updates DMD2 and TDM want, `:ablation` takes Imagine Flash apart, and
`:leakage` trains it forward and backward at times of more and less signal. `:digits` compares the
methods on the digits, without FOLDER. `:flow` and `:flow_scenes` try settings of Imagine Flash on a
flow-matching teacher, scored on validation: on the digits, and on scenes with FOLDER.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from configs import base, digits, scenes
from jaxdistill.methods import METHODS

COMPARED = (
    "imagine_flash",
    "matched",
    "direct",
    "step_distillation",
    "lcm",
    "add",
    "lightning",
    "dmd2",
    "dmd2_faithful",
    "tdm",
)


def get_config(size: str = "") -> ConfigDict:
    """The config; `size` is a key of SIZES or FLOWS, or "digits"."""
    names = (*SIZES, "digits", *FLOWS)
    if size not in names:
        known = ", ".join("configs/benchmark.py" + (f":{name}" if name else "") for name in names)
        raise ValueError(f"configs/benchmark.py:{size} is not known; choose one of {known}")
    if size == "digits":
        config = digits.whole()
        config.student.update({"iterations": 0, "budget": 28_000})  # some 1,090 of Imagine Flash
        base.compared(config, [name for name in METHODS if name != "endpoint"])
        return config
    if size in FLOWS:
        return FLOWS[size]()
    config = scenes.whole()
    # The paper's five updates of fake score and discriminator for one of the student, at the rate
    # that validation chose (`updates`).
    rate = 3.0 * config.methods.dmd2.learning_rate
    variant(config, "dmd2_faithful", "dmd2", {"fake_updates": 5, "learning_rate": rate})
    base.compared(config, COMPARED)
    SIZES[size](config)
    return config


def variant(config: ConfigDict, name: str, of: str, changes: Mapping[str, Any]) -> str:
    """Add a method's settings under another name, with changes of dotted keys; the name."""
    block = ConfigDict({"method": of, **config.methods[of].to_dict()})
    guided = [block]
    if of == "matched":
        guided = []
        scenes.matched(config, block)
    for part in guided:
        base.follow(config, part)
    for key, value in changes.items():
        *path, last = key.split(".")
        where = block
        for part in path:
            where = where[part]
        where[last] = value
    config.methods[name] = block
    return name


def on_validation(config: ConfigDict) -> None:
    """One seed, scored on validation."""
    config.benchmark.seeds = (0,)
    config.eval.update(
        {"split": "validation", "samples": 1000, "unseen": 100, "diversity_captions": 25}
    )


def tuning(config: ConfigDict) -> None:
    """Settings of ours."""
    on_validation(config)
    guidance = config.teacher.get_oneway_ref("guidance")
    two = {
        "one.share": 0.0,
        "matching.share": 0.5,
        "flash.guidance": guidance,
        "matching.guidance": guidance,
    }
    all_counts = two | {"matching.counts": (2, 3, 4, 2)}
    guided = {"one.share": 0.0, "matching.share": 0.5}
    one_state = {"flash.whole_trajectory": False}
    plain = {"flash.guidance": guidance, "matching.guidance": guidance}
    nested = {"matching.grid": "nested", "matching.shortcut": 0.0, "matching.flash_weight": 4.0}
    ours: dict[str, Mapping[str, Any]] = {
        "matched_nested": all_counts | nested,
        "matched_trailing": all_counts | {"matching.grid": "trailing"},
        "matched_listed": all_counts,
        "matched_rate_3": all_counts | {"matching.learning_rate": 3e-4},
        "matched_counts": two,
        "matched_share": two | {"matching.share": 0.75},
        "matched_one_state": two | one_state,
        "matched_guidance": guided,
        "matched_one": guided | {"matching.counts": (1, 2, 3, 2)},
        "matched_shortcut": guided | {"matching.shortcut": 4.0},
        "matched_three": plain,
        "matched_three_one_state": plain | one_state | {"matching.share": 0.5},
        "matched_three_guidance": {},
    }
    flash: dict[str, Mapping[str, Any]] = {
        "if_k2": {},
        "if_k3": {"teacher_steps": 3},
        "if_k4": {"teacher_steps": 4},
        "if_adversary_4": {"adversarial_weight": 0.2},
    }
    rates = {"lightning_rate_1": 1e-5, "lightning_rate_3": 3e-5}
    config.benchmark.methods = (
        *(variant(config, name, "matched", changes) for name, changes in ours.items()),
        *(
            variant(config, name, "lightning", {"adversarial_learning_rate": rate})
            for name, rate in rates.items()
        ),
        *(variant(config, name, "imagine_flash", changes) for name, changes in flash.items()),
    )


def rates_of(config: ConfigDict, method: str, factor: float) -> dict[str, float]:
    """A method's learning rates, times a factor."""
    block = config.methods[method]
    return {key: block[key] * factor for key in block if key.endswith("learning_rate")}


def search(config: ConfigDict) -> None:
    """Are the competitors held back by their rates, or by the guidance? At half of the budget."""
    on_validation(config)
    config.student.budget //= 2
    found = []
    for factor, suffix in ((3.0, "_faster"), (1 / 3, "_slower"), (1.0, "_same")):
        for method in ("tdm", "dmd2", "step_distillation", "direct", "lcm", "add"):
            changes = rates_of(config, method, factor)
            found.append(variant(config, method + suffix, method, changes))
    for method in ("tdm", "dmd2"):  # the two that come near, at the guidance that `matched` has
        guided = {"guidance": scenes.stronger(config)}
        found.append(variant(config, f"{method}_guided", method, guided))
    config.benchmark.methods = tuple(found)


def updates(config: ConfigDict) -> None:
    """DMD2's fake-score updates for one of the student, each at three rates of the student. At half
    of the budget.
    """
    on_validation(config)
    config.student.budget //= 2
    rate = config.methods.dmd2.learning_rate
    config.benchmark.methods = tuple(
        variant(
            config,
            f"dmd2_{count}{suffix}",
            "dmd2",
            {"fake_updates": count, "learning_rate": rate * factor},
        )
        for count in (1, 2, 5)
        for factor, suffix in ((1.0, ""), (3.0, "_faster"), (10.0, "_fastest"))
    )


def ablation(config: ConfigDict) -> None:
    """Imagine Flash without each of its parts."""
    config.benchmark.chart.kind = "variants"
    config.student.budget //= 2
    guidance = config.teacher.get_oneway_ref("guidance")
    changes: dict[str, Mapping[str, Any]] = {
        "full": {},
        "forward": {"backward": False},
        "no_srl": {"srl": False},
        "no_noise_correction": {"noise_correction": False},
        "no_discriminator": {"adversarial_weight": 0.0},
        "one_state": {"whole_trajectory": False},
        "noise_initial": {"noise": "initial"},
        "noise_fresh": {"noise": "fresh"},
        "shift_none": {"shift": "none"},
        "shift_power": {"shift": "power"},
        "k_1": {"teacher_steps": 1},
        "k_4": {"teacher_steps": 4},
        "guidance_less": {"guidance": 0.5 + 0.5 * guidance},
        "guidance_more": {"guidance": 1.5 * guidance - 0.5},
    }
    config.benchmark.methods = tuple(
        variant(config, name, "imagine_flash", change) for name, change in changes.items()
    )


def leakage(config: ConfigDict) -> None:
    """The paper's argument alone: a plain target from the state itself, no discriminator. Names
    give the ratio of α/σ in percent.
    """
    label = "α/σ of the student's times, in % of the trailing grid's"
    config.benchmark.chart.update({"kind": "axis", "axis": "snr", "label": label})
    config.student.steps = (3,)
    config.student.budget //= 2
    config.benchmark.methods = tuple(
        variant(
            config,
            f"{way}_snr_{100 * scale:g}",
            "imagine_flash",
            {
                "srl": False,
                "adversarial_weight": 0.0,
                "backward": way == "backward",
                "times": at_snr(scale),
            },
        )
        for scale in (0.25, 0.5, 1.0, 2.0, 4.0)
        for way in ("forward", "backward")
    )


def at_snr(scale: float, steps: int = 3) -> tuple[float, ...]:
    """Times of the cosine schedule that have α/σ `scale` times that of the trailing grid's times.

    The networks know the noise by their time, so a schedule of shifted log-SNR is this one at other
    times: the teacher stays exact, and α = 0 at the first time.
    """
    even = [1.0 - i / steps for i in range(1, steps)]
    return (1.0, *(2 / math.pi * math.atan(math.tan(math.pi / 2 * t) / scale) for t in even))


def flow(config: ConfigDict) -> None:
    """What of a task's settings carries over to a flow-matching teacher? At half of the budget.

    γ and the k teacher steps at the cosine schedule's log-SNR or at the same shares of T, other γ,
    grids and rates.
    """
    config.schedule.name, config.prediction = "flow", "flow"
    config.student.grid = "listed"
    nested = config.student.times
    config.student.times = listed((1.0, *(as_flow(t) for t in nested[1:])))
    block = config.methods.imagine_flash
    guidance, rate = block.guidance, block.learning_rate
    cosine, counts = {"reference": "cosine"}, len(nested)

    def flat(share: float) -> dict[str, Any]:
        """A constant γ."""
        return {"shifts.table.values": (share,) * len(block.shifts.table.times)}

    changes: dict[str, Mapping[str, Any]] = {
        "same_times": {"times": listed(nested)},
        "same_snr": cosine,
        **{f"gamma_{round(100 * share)}": cosine | flat(share) for share in (0.5, 0.65, 0.9)},
        "snr_190": cosine | {"reference_snr": 1.9},
        "snr_360": cosine | {"reference_snr": 3.6},
        "shift_3": cosine | {"times": grids_of_shift(3.0, counts)},
        "trailing": cosine | {"times": grids_of_shift(1.0, counts)},
        "rate_half": cosine | {"learning_rate": rate / 2},
        "rate_double": cosine | {"learning_rate": rate * 2},
    }
    for name, change in changes.items():
        variant(config, name, "imagine_flash", {"guidance": guidance} | change)
    base.compared(config, list(changes))
    config.benchmark.chart.kind = "variants"


def flow_digits() -> ConfigDict:
    """`flow` on the digits."""
    config = digits.whole()
    config.eval.update({"split": "validation", "samples": 10_000})
    config.student.update({"iterations": 550, "health_every": 550})
    flow(config)
    return config


def flow_scenes() -> ConfigDict:
    """`flow` on scenes, with half of the teacher's training and a quarter of the budget; fewer
    settings, by what the digits said.
    """
    config = scenes.whole()
    config.teacher.iterations //= 2
    flow(config)
    on_validation(config)
    config.student.budget //= 4
    config.benchmark.seeds = (0, 1, 2)
    config.benchmark.methods = ("same_times", "same_snr", "snr_190", "snr_360", "rate_half")
    return config


def as_flow(t: float) -> float:
    """The time of the flow schedule that has the log-SNR of this one of the cosine schedule."""
    ratio = math.tan(math.pi / 2 * t)  # σ/α
    return round(ratio / (1.0 + ratio), 3)


def listed(times: Sequence[float]) -> tuple[tuple[float, ...], ...]:
    """Nested times as a list for each number of steps."""
    return tuple(tuple(times[:n]) for n in range(1, len(times) + 1))


def grids_of_shift(shift: float, counts: int) -> tuple[tuple[float, ...], ...]:
    """The times of 1 to `counts` steps of a flow-matching scheduler with a static shift."""
    return tuple(
        tuple(shift * s / (1 + (shift - 1) * s) for s in (1 - i / n for i in range(n)))
        for n in range(1, counts + 1)
    )


def smoke(config: ConfigDict) -> None:
    """Everything small: it shows that all parts work, not how good they are."""
    config.benchmark.seeds = (0,)
    config.data.scale = 0.01
    config.model.update({"channels": (8,), "patch": 4})
    config.teacher.update({"iterations": 30, "batch_size": 16, "steps": 4, "health_every": 30})
    config.recogniser.update({"channels": (8, 8, 16), "features": 8, "steps": 30, "batch_size": 32})
    config.student.update({"budget": 120, "batch_size": 8, "steps": (1, 2)})
    config.methods.step_distillation.first = 2
    config.methods.direct.pairs_steps = 4
    config.methods.matched.matching.counts = (2,)
    config.methods.matched.one.steps = 2
    config.methods.lightning.update({"first": 2, "substeps": 2, "counts": (1,)})
    config.eval.update(
        {"samples": 50, "unseen": 50, "diversity_captions": 10, "repeats": 4, "batch_size": 50}
    )
    config.log.update({"health_samples": 50, "teacher_steps": 4})


FLOWS = {"flow": flow_digits, "flow_scenes": flow_scenes}
SIZES = {
    "": lambda config: None,
    "smoke": smoke,
    "tuning": tuning,
    "search": search,
    "updates": updates,
    "ablation": ablation,
    "leakage": leakage,
}
