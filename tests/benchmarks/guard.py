"""Does the guard see what goes wrong, in time, and nothing where nothing does?

    python tests/benchmarks/guard.py --workdir=runs/guard --out=docs/results

Imagine Flash on digits, scenes and a tiny random 1.x folder, with four planted failures: a learning
rate 30 times too high, fresh noise in the shifted reconstruction, a discriminator 20 times too
strong, and three times the guidance, each with a guard that only warns and with one that stops.
Then the shipped configs, three seeds each, and every method on digits and scenes: nothing may be
found in them. Only their evaluation is smaller than shipped. Each finished row is written at once,
and started again it goes on where it was.
"""

import argparse
import itertools
import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from ml_collections import ConfigDict  # noqa: E402

from configs import digits, fashion, scenes, smoke  # noqa: E402
from jaxdistill import main as run  # noqa: E402
from jaxdistill.methods import METHODS  # noqa: E402
from jaxdistill.run import checkpoint, records, report  # noqa: E402
from jaxdistill.run.loop import NonFiniteError  # noqa: E402

COLUMNS = {
    "task": ("task", "{}"),
    "run": ("run", "{}"),
    "seed": ("seed", "{}"),
    "lines": ("health lines", "{}"),
    "failed": ("line worse than the best by half", "{}"),
    "found": ("line of the guard's event", "{}"),
    "number": ("its number farthest off", "{}"),
    "ended": ("line at which it stops", "{}"),
    "by": ("measured by", "{}"),
    "best": ("best line", "{:.3g}"),
    "exported": ("exported", "{:.3g}"),
    "last": ("last line without a guard", "{:.3g}"),
    "test_exported": ("exported, FD on test", "{:.3g}"),
    "test_last": ("without a guard, FD on test", "{:.3g}"),
}
FASHION = "/usr/share/datasets/fashion-mnist"


def failures(config: ConfigDict) -> dict[str, dict[str, Any]]:
    """{name: changes} of the method's settings."""
    block = config.methods.imagine_flash
    guidance = max(block.guidance, 1.0)
    return {
        "rate x 30": {"learning_rate": 30 * block.learning_rate},
        "fresh noise": {"noise": "fresh"},
        "adversary x 20": {"adversarial_weight": 20 * block.adversarial_weight},
        "guidance x 3": {"guidance": 3 * guidance},
    }


def tiny_sd(root: Path) -> ConfigDict:
    """A random folder: its teacher draws noise, but a student of it can go wrong like any."""
    import folders
    import text_config

    config = text_config.get_config()
    teacher = root / "sd"
    if not teacher.is_dir():
        shutil.copytree(folders.folder("sd"), teacher)
    config.teacher.folder = str(teacher)
    prompts = root / "prompts.txt"
    prompts.write_text("a cat\na dog at a cat\nphoto\nphoto of a dog\n")
    config.data.prompts = str(prompts)
    config.student.update({"iterations": 50, "health_every": 5})
    config.methods.imagine_flash.learning_rate = 3e-3  # so that something happens in 50
    config.log.health_prompts = 4
    return config


def task_config(task: str, root: Path) -> ConfigDict:
    """Imagine Flash with ten health lines. The scores at its end are of few images: nobody reads
    them.
    """
    if task == "digits":
        config = digits.get_config()
        config.student.health_every = 110
        config.eval.samples = 2000
        teacher = root / "digits-clean-0" / "teacher"
        config.teacher.path = str(teacher) if teacher.is_dir() else ""
    elif task == "scenes":
        config = scenes.get_config("imagine_flash")
        config.student.health_every = 10
        config.eval.update({"samples": 100, "unseen": 20, "diversity_captions": 4})
    else:
        config = tiny_sd(root)
    return config


def shipped(root: Path, fashion_folder: str) -> dict[str, ConfigDict]:
    """The configs as they are, but for a short evaluation."""
    found = {"smoke": smoke.get_config(), "digits": digits.get_config()}
    found["scenes"] = scenes.get_config()
    if Path(fashion_folder).is_dir():
        found["fashion"] = fashion.get_config()
        found["fashion"].data.folder = fashion_folder
    for name in ("digits", "fashion"):
        teacher = root / f"{name}-shipped-0" / "teacher"
        if name in found and teacher.is_dir():
            found[name].teacher.path = str(teacher)
    for config in found.values():
        short(config)
    return found


def short(config: ConfigDict) -> None:
    """Nobody reads the scores of a run that shows only whether the guard is silent."""
    config.eval.samples = min(config.eval.samples, 500)
    config.eval.guidances = ()
    if "unseen" in config.eval:
        config.eval.update({"unseen": 20, "diversity_captions": 4, "samples": 100})


def lines_of(folder: Path) -> dict[str, list[dict[str, float]]]:
    """The health lines of each training of a run's student, in their order."""
    files = (folder / "curves").glob("student*.jsonl")
    return {
        path.stem: [r for r in records.read_curve(path) if "health/drift" in r]
        for path in sorted(files, key=lambda path: path.stat().st_mtime)
    }


def measured(folder: Path, results: dict[str, Any]) -> dict[str, Any]:
    """What a run's files say of it: of its last training, or of the first that has an event."""
    trainings = lines_of(folder)
    name = next(iter(results["guard"]), list(trainings)[-1])
    lines, events = trainings[name], results["guard"].get(name, [])
    keys = [k for k in lines[0] if k.startswith("health/fd_") and not k.endswith("_error")]
    key = max(keys, default="health/drift")
    ends = [event["step"] for event in events if event["action"] == "stop"]
    student = [row for row in results["rows"] if row.get("model") == "student" and "fd" in row]
    values = [line[key] for line in lines]
    best = min(values)
    failed = [i for i, value in enumerate(values) if value > 1.5 * best and i > values.index(best)]

    def index(step: int) -> int:
        """Of the first line that there could be after it."""
        return sum(line["step"] < step for line in lines)

    first = [event for event in events if event["step"] == events[0]["step"]]
    worst = max(first, key=lambda event: event["far"] or float("inf"), default={"number": None})
    return {
        # The first of each is that of the untrained student.
        "lines": sum(max(len(found) - 1, 0) for found in trainings.values()),
        "failed": failed[0] if failed else None,
        "found": index(events[0]["step"]) if events else None,
        "number": worst["number"],
        "ended": index(ends[0]) if ends else None,
        "by": key.removeprefix("health/"),
        "best": best,
        "last": values[-1] if results["rows"] else float("nan"),
        "test_last": max(student, key=lambda row: row["steps"], default={}).get("fd"),
    }


def case(root: Path, name: str, config: ConfigDict) -> tuple[Path, dict[str, Any]]:
    """A run, or its results where it is finished; no rows where its loss is no number."""
    folder = root / name
    if (folder / "results.json").exists():
        return folder, json.loads((folder / "results.json").read_text())
    try:
        return folder, run.run(config, folder)
    except NonFiniteError as error:
        print(error, file=sys.stderr)
        return folder, {"guard": {}, "rows": []}


def planted(task: str, root: Path) -> Iterator[dict[str, Any]]:
    """Rows of a task: as it is, and each failure with and without the guard."""
    plain = task_config(task, root)
    for name, changes in {"clean": {}, **failures(plain)}.items():
        label = name.replace(" ", "").replace("x", "")
        row: dict[str, Any] = {"task": task, "run": name, "seed": plain.seed}
        for action in ("warn", "stop"):
            if action == "stop" and row["found"] is None and not math.isnan(row["last"]):
                # Nothing was found, and all were numbers: the same run.
                row |= {"exported": row["last"], "test_exported": row["test_last"]}
                continue
            config = task_config(task, root)
            config.methods.imagine_flash.update(changes)
            config.guard.action = action
            if action == "warn" and name == "clean":
                label = "clean-0"
            folder, results = case(
                root, f"{task}-{label}-{action}".replace("-0-warn", "-0"), config
            )
            found = measured(folder, results)
            if action == "warn":
                row |= found
            else:
                row |= {key: found[key] for key in ("found", "number", "ended")}
                row["test_exported"] = found["test_last"]
                row["exported"] = found["last" if found["ended"] is None else "best"]
        yield row


def alarms(root: Path, fashion_folder: str) -> Iterator[dict[str, Any]]:
    """Rows of the shipped configs; those of Fashion-MNIST, which take an hour, are the last."""
    names = sorted(shipped(root, fashion_folder), key="fashion".__eq__)
    for name, seed in itertools.product(names, (0, 1, 2)):
        config = shipped(root, fashion_folder)[name]
        config.seed = seed
        folder, results = case(root, f"{name}-shipped-{seed}", config)
        yield {"task": name, "run": "as shipped", "seed": seed, **measured(folder, results)}


def methods(task: str, root: Path) -> Iterator[dict[str, Any]]:
    """Rows of each method with its shipped settings."""
    for name in (name for name in METHODS if name != "endpoint"):  # it has a student as teacher
        config = {"digits": digits, "scenes": scenes}[task].get_config(name)
        short(config)
        teacher = root / "digits-shipped-0" / "teacher"
        if task == "digits" and teacher.is_dir():
            config.teacher.path = str(teacher)
        folder, results = case(root, f"{task}-method-{name}", config)
        yield {"task": task, "run": name, "seed": 0, **measured(folder, results)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--parts", default="sd,digits,scenes,digits-methods,scenes-methods,shipped")
    parser.add_argument("--fashion", default=FASHION, help="folder of Fashion-MNIST's idx files")
    args = parser.parse_args()
    root = Path(args.workdir).resolve()
    for folder in (root, Path(args.out)):
        folder.mkdir(parents=True, exist_ok=True)
    command, machine = shlex.join(["python", *sys.argv]), f"{os.cpu_count()} CPU cores"
    about = str(__doc__).split("\n\n")[2]
    rows = []
    for part in args.parts.split(","):
        task, _, every = part.partition("-")
        if part == "shipped":
            found = alarms(root, args.fashion)
        else:
            found = methods(task, root) if every else planted(task, root)
        for row in found:
            rows.append(row)
            results = {"command": command, "machine": machine, "rows": rows}
            checkpoint.write_json(Path(args.out) / "guard.json", results)
            text = f"# The guard on planted failures and on the shipped configs\n\n{about}\n\n"
            (Path(args.out) / "guard.md").write_text(text + report.markdown_table(rows, COLUMNS))


if __name__ == "__main__":
    main()
