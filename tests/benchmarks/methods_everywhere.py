"""All methods on all kinds of tasks, as small as can be: does each train, export, load and draw?

    python tests/benchmarks/methods_everywhere.py --workdir=runs/everywhere --out=docs/results

Ten methods on digits, scenes and tiny 1.x and XL folders, all weights and LoRA, a few steps each.
Pipeline folders are loaded by stock diffusers: the table has the largest difference to our image,
on the same start and the same fresh noise. It says that all parts work together, not how good the
students are. Started again it goes on where it was. About an hour on one core.
"""

import argparse
import json
import os
import platform
import shlex
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import quick  # noqa: E402

COLUMNS = {
    "task": ("task", "{}"),
    "method": ("method", "{}"),
    "weights": ("weights", "{}"),
    "exports": ("exports", "{}"),
    "difference": ("difference to diffusers, of 255", "{:.4f}"),
    "scheduler": ("its scheduler", "{}"),
    "timesteps": ("its timesteps", "{}"),
    "error": ("error", "{}"),
}


def key_of(row: dict) -> tuple:
    return row["task"], row["method"], row["weights"]


def cases_left(args: argparse.Namespace, rows: list[dict]) -> list[tuple]:
    """Those of the flags that have no row yet, and those whose row is an error."""
    import everywhere

    done = {key_of(row) for row in rows}
    return [
        (task, method, lora)
        for task, method, lora in everywhere.CASES
        if (task, method, "LoRA" if lora else "full") not in done
        and (not args.tasks or task in args.tasks.split(","))
        and (not args.methods or method in args.methods.split(","))
        and args.weights in ("", "LoRA" if lora else "full")
    ]


def written(args: argparse.Namespace, rows: list[dict]) -> None:
    """methods_everywhere.json and .md."""
    import diffusers
    import everywhere
    import jax

    from jaxdistill.run import checkpoint, report

    order = [(t, m, "LoRA" if lora else "full") for t, m, lora in everywhere.CASES]
    rows = sorted(rows, key=lambda row: order.index(key_of(row)))
    versions = {"jax": jax.__version__, "diffusers": diffusers.__version__}
    about = {"versions": versions, "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}"}
    command = shlex.join(["python", *sys.argv])
    out = Path(args.out)
    checkpoint.write_json(
        out / "methods_everywhere.json", {"command": command, "rows": rows, **about}
    )
    wrong = sum("error" in row for row in rows)
    text = (
        f"# Every method on every kind of task\n\n{len(rows)} of {len(order)} cases,"
        f" {wrong} of them failed. {' '.join(everywhere_says().split())}\n\n"
    )
    (out / "methods_everywhere.md").write_text(text + report.markdown_table(rows, COLUMNS))


def everywhere_says() -> str:
    return str(__doc__).split("\n\n")[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", required=True, help="of the runs; rows.json is kept there")
    parser.add_argument("--out", required=True)
    parser.add_argument("--tasks", default="", help="sd,sdxl,digits,scenes")
    parser.add_argument("--methods", default="")
    parser.add_argument("--weights", default="", help="full or LoRA")
    args = parser.parse_args()
    root = Path(args.workdir).resolve()
    root.mkdir(parents=True, exist_ok=True)
    os.environ.update({**quick.VARIABLES, "JAX_PLATFORMS": "cpu"})
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(root / "xla")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    import everywhere

    from jaxdistill.run.loop import Stopped

    path = root / "rows.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    rows = [row for row in rows if "error" not in row]
    for task, method, lora in cases_left(args, rows):
        began = time.perf_counter()
        try:
            row = everywhere.run_case(task, method, lora, root)
        except Stopped as stopped:
            sys.exit(str(stopped))
        except Exception as error:  # the others are of interest, too
            traceback.print_exc()
            said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            row = {"task": task, "method": method, "weights": "LoRA" if lora else "full"}
            row["error"] = said
        row["seconds"] = round(time.perf_counter() - began, 1)
        rows.append(row)
        print("CASE", json.dumps(row), flush=True)
        path.write_text(json.dumps(rows, indent=1))
        everywhere.forget()
    written(args, rows)
    sys.exit(any("error" in row for row in rows))


if __name__ == "__main__":
    main()
