"""Train Imagine Flash without each of its parts, and other methods, and compare in one table.

    python -m jaxdistill.ablate --config=configs/digits.py --workdir=runs/ablation --seeds=0,1,2

Each seed has one teacher, one full run and its variants. --variants=full,matched,endpoint compares
methods. The same command resumes an ablation that was stopped; finished runs are not repeated.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict

from jaxdistill import benchmark
from jaxdistill.errors import choose
from jaxdistill.methods import METHODS
from jaxdistill.run.cli import Command


class Variant(NamedTuple):
    """Changes to a config; the variant whose teacher it shares (None: trains its own); and what of
    that one it is given as its teacher.
    """

    changes: Mapping[str, Any]
    teacher_of: str | None = "full"
    given: str = "teacher"


EPS = {"prediction": "eps", "schedule.name": "scaled_linear", "model.time_scale": 1.0}

VARIANTS: dict[str, Variant] = {
    "full": Variant({}, None),
    "no noise correction": Variant({"methods.imagine_flash.noise_correction": False}),
    "no discriminator": Variant({"methods.imagine_flash.adversarial_weight": 0.0}),
    "no backward distillation": Variant({"methods.imagine_flash.backward": False}),
    "no SRL": Variant({"methods.imagine_flash.srl": False}),
    "SRL with fresh noise": Variant({"methods.imagine_flash.noise": "fresh"}),
    "SRL with x_T": Variant({"methods.imagine_flash.noise": "initial"}),
    "one random step": Variant({"methods.imagine_flash.whole_trajectory": False}),
    # Noise correction is the identity for v-prediction with zero terminal SNR, so an eps model
    # shows what it does.
    "eps model": Variant(EPS, None),
    "eps model, no noise correction": Variant(
        {**EPS, "methods.imagine_flash.noise_correction": False}, "eps model"
    ),
    "endpoint": Variant(
        {"method.name": "endpoint", "student.steps": (1,), "student.decay_to": 0.02},
        given="student",
    ),
    **{
        name: Variant({"method.name": name})
        for name in METHODS
        if name not in ("imagine_flash", "endpoint")
    },
}


def listed(config: ConfigDict, seeds: Sequence[int], names: Sequence[str]) -> benchmark.Listing:
    """These variants and those whose teachers they share, with each seed. Raises ValueError."""
    for name in names:
        choose(VARIANTS, name, "--variants")
    needed = [n for n in VARIANTS if n in names or any(VARIANTS[m].teacher_of == n for m in names)]
    entries: dict[tuple[str | None, int], benchmark.Entry] = {}
    for seed in seeds:
        for name in needed:
            variant = VARIANTS[name]
            origin = entries.get((variant.teacher_of, seed))
            changes = {**variant.changes, **(benchmark.SCORED if origin else {})}
            folder = benchmark.slug(name, seed)
            entry = benchmark.Entry(name, seed, changes, folder, origin, variant.given)
            entries[name, seed] = entry
    chart = {"kind": "variants"}
    return benchmark.Listing(list(entries.values()), "variant", "ablation", chart)


def define(values: flags.FlagValues) -> None:
    """The command's own flags."""
    benchmark.define(values)
    about = "N,N: seeds; each trains its own teacher"
    flags.DEFINE_list("seeds", ["0"], about, flag_values=values)
    about = "NAME,NAME: runs to compare, such as full,lcm (default: all)"
    flags.DEFINE_list("variants", None, about, flag_values=values)


def main() -> None:
    """The command."""
    command = Command(__doc__, define=define)

    def make(config: ConfigDict) -> benchmark.Listing:
        try:
            seeds = [int(seed) for seed in command.seeds]
        except ValueError:
            given = ",".join(command.seeds)
            raise ValueError(
                f"--seeds={given} is not a list of whole numbers such as 0,1,2"
            ) from None
        return listed(config, seeds, command.variants or list(VARIANTS))

    benchmark.run_list(command, make, "jaxdistill.ablate")


if __name__ == "__main__":
    main()
