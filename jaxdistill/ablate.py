"""`python -m jaxdistill.ablate --config=configs/digits.py --workdir=DIR --seeds=0,1,2`: Imagine
Flash without each of its parts, and other methods beside it.

One full run and its variants a seed, all distilled from one teacher; one table of means over the
seeds. `--variants=full,matched,endpoint` compares methods. A killed ablation goes on where it
stopped; finished runs are not repeated.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from jaxdistill import main as job
from jaxdistill.errors import UserError
from jaxdistill.methods import METHODS
from jaxdistill.run import checkpoint, report
from jaxdistill.run.cli import Command, one_line_errors
from jaxdistill.tasks.labelled_images.scores import Metrics
from jaxdistill.tasks.labelled_images.task import COLUMNS


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


def changed(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A locked copy of the config with dotted keys set.

    Raises KeyError for a key that is not there.
    """
    copy = ConfigDict(config.to_dict())
    copy.lock()
    copy.update_from_flattened_dict(dict(changes))
    return copy


def slug(name: str, seed: int) -> str:
    """Folder name of one run."""
    return f"{name.replace(' ', '-').replace(',', '')}-{seed}"


def summary(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[list[dict[str, Any]], str]:
    """Mean and standard deviation over seeds of each variant, model, guidance and step count, as
    rows and as a table.
    """
    grouped: dict[tuple[str, str, float, int], list[Mapping[str, Any]]] = {}
    for name, runs in results.items():
        for run in runs:
            for cell in run["rows"]:
                grouped.setdefault(
                    (name, cell["model"], cell["guidance"], cell["steps"]), []
                ).append(cell)
    rows = []
    for (name, model, guidance, steps), cells in grouped.items():
        row: dict[str, Any] = {
            "variant": name,
            "model": model,
            "guidance": guidance,
            "steps": steps,
            "seeds": len(cells),
        }
        for key in (*Metrics._fields, "ratio"):
            values = [cell[key] for cell in cells if cell[key] is not None]
            row[key] = round(float(np.mean(values)), 4) if values else None
            row[f"{key}_sd"] = round(float(np.std(values, ddof=1)), 4) if len(values) > 1 else None
        rows.append(row)
    keys = ("fd", "ratio", "accuracy", "precision", "recall", "diversity", "nearest_neighbour")
    columns = {key: (key, "{}") for key in ("variant", "model", "steps")}
    columns |= {key: (COLUMNS[key][0], "{}") for key in keys}

    def shown_of(row: Mapping[str, Any], key: str) -> str:
        spread = row[f"{key}_sd"]
        return f"{row[key]:.3f}" + (f" ± {spread:.3f}" if spread is not None else "")

    shown = [
        {
            "variant": row["variant"],
            "model": f"teacher, guidance {row['guidance']:g}"
            if row["model"] == "teacher"
            else "student",
            "steps": row["steps"],
            **{key: shown_of(row, key) for key in keys},
        }
        for row in rows
    ]
    return rows, report.markdown_table(shown, columns)


def ablate(config: ConfigDict, workdir: Path, seeds: Sequence[int], names: Sequence[str]) -> str:
    """Run what is missing and write ablation.json and ablation.md; returns the table.

    Raises UserError.
    """
    for name in names:
        if name not in VARIANTS:
            raise UserError(
                f"--variants: {name!r} is not known; choose from {', '.join(map(repr, VARIANTS))}"
            )
    needed = [n for n in VARIANTS if n in names or any(VARIANTS[m].teacher_of == n for m in names)]
    results: dict[str, list[dict[str, Any]]] = {}
    table = ""
    for seed in seeds:
        references: dict[str, Any] = {}
        for name in needed:
            variant, folder = VARIANTS[name], workdir / slug(name, seed)
            changes = {**variant.changes, "seed": seed}
            if variant.teacher_of is not None:
                source = workdir / slug(variant.teacher_of, seed)
                given = str(source / variant.given)
                changes |= {"teacher.path": given, "eval.models": ("student",)}
                if not (folder / "extractor").exists():
                    shutil.copytree(source / "extractor", folder / "extractor")
            path = folder / "results.json"
            print(f"\n== {name}, seed {seed}{' (done)' if path.exists() else ''}", flush=True)
            run = read_results(path) if path.exists() else job.run(changed(config, changes), folder)
            shared = references.get(variant.teacher_of or name)
            references[name] = run["reference"]["fd"] if run["reference"] else shared
            for row in run["rows"]:
                row["ratio"] = row["fd"] / references[name]
            results.setdefault(name, []).append(run)
            table = write(workdir, results, seeds)
    return table


PROTOCOL = ("reference_set", "reference_sha256", "extractor_sha256", "samples", "sampling_seed")


def write(
    workdir: Path, results: Mapping[str, Sequence[Mapping[str, Any]]], seeds: Sequence[int]
) -> str:
    """ablation.json and ablation.md of the runs that there are; the table."""
    rows, table = summary(results)
    runs = [run for found in results.values() for run in found]
    about = {
        "rows": rows,
        "seeds": list(seeds),
        "protocol": {key: runs[-1]["protocol"][key] for key in PROTOCOL},
        "seconds": {name: [run["seconds"] for run in found] for name, found in results.items()},
        "config": runs[0]["config"],
        "versions": runs[-1]["versions"],
    }
    checkpoint.write_json(workdir / "ablation.json", about)
    (workdir / "ablation.md").write_text(heading(about) + table)
    return table


def heading(about: Mapping[str, Any]) -> str:
    """What stands above the table."""
    protocol, seeds = about["protocol"], about["seeds"]
    spread = "mean ± standard deviation over seeds" if len(seeds) > 1 else "one seed"
    return (
        f"# {protocol['reference_set']}, seeds"
        f" {', '.join(map(str, seeds))}\n\n{protocol['samples']:,} samples a row, {spread}; ratio:"
        " FD over that of the teacher's reference sampler, of the same seed; feature extractor"
        f" {protocol['extractor_sha256']}.\n\n"
    )


def read_results(path: Path) -> dict[str, Any]:
    """A results.json. Raises UserError if it is damaged."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except ValueError:
        raise UserError(f"{path} is damaged; remove it and run again") from None
    return found


def define(values: flags.FlagValues) -> None:
    """The command's own flags."""
    about = "Seeds, comma-separated; each trains its own teacher."
    flags.DEFINE_list("seeds", ["0"], about, flag_values=values)
    flags.DEFINE_list("variants", None, "Names of variants; default: all.", flag_values=values)


def main() -> None:
    """The command."""
    with one_line_errors():
        command = Command(__doc__, define=define).parse()
        config = command.given_config()
        try:
            seeds = [int(seed) for seed in command.seeds]
        except ValueError:
            given = ",".join(command.seeds)
            raise UserError(f"--seeds={given} is no list of whole numbers") from None
        print(ablate(config, command.folder(), seeds, command.variants or list(VARIANTS)))


if __name__ == "__main__":
    main()
