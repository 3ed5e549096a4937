"""All methods on all kinds of tasks, as small as can be: does each train, export, load and draw?

    python tests/benchmarks/methods_everywhere.py --workdir=runs/everywhere --out=docs/results

Ten methods on digits, scenes and a tiny pipeline folder of each family, all weights and LoRA, a few
steps each. Stock diffusers draws what a run leaves of a folder: the student and, with LoRA, its
teacher with the LoRA. A number is the largest difference to our image, in 1/255, on the same start
and the same fresh noise. "ran" means trained, exported, loaded and drawn. The table says that all
parts work together, not how good the students are. Started again, the command goes on where it was.
A case takes about 45 s of one core.
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


def key_of(row: dict) -> tuple:
    return row["task"], row["method"], row["weights"]


def weights_of(lora: int) -> str:
    return "LoRA" if lora else "full"


def cases_left(args: argparse.Namespace, rows: list[dict]) -> list[tuple]:
    """Those of the flags that have no row yet, and those whose row is an error."""
    import everywhere

    done = {key_of(row) for row in rows}
    return [
        (task, method, lora)
        for task, method, lora in everywhere.CASES
        if (task, method, weights_of(lora)) not in done
        and (not args.tasks or task in args.tasks.split(","))
        and (not args.methods or method in args.methods.split(","))
        and args.weights in ("", weights_of(lora))
    ]


def written(args: argparse.Namespace, rows: list[dict]) -> None:
    """methods_everywhere.json and .md."""
    import diffusers
    import everywhere
    import jax

    from jaxdistill.run import checkpoint

    order = [(t, m, weights_of(lora)) for t, m, lora in everywhere.CASES]
    rows = sorted(rows, key=lambda row: order.index(key_of(row)))
    versions = {"jax": jax.__version__, "diffusers": diffusers.__version__}
    about = {"versions": versions, "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}"}
    command = shlex.join(["python", *sys.argv])
    out = Path(args.out)
    checkpoint.write_json(
        out / "methods_everywhere.json", {"command": command, "rows": rows, **about}
    )
    wrong = [row for row in rows if "error" in row]
    errors = "".join(f"\n- {', '.join(key_of(row))}: {row['error']}" for row in wrong)
    text = (
        f"# Every method on every kind of task\n\n{len(rows)} of {len(order)} cases,"
        f" {len(wrong)} of them failed. {' '.join(everywhere_says().split())}\n\n"
    )
    (out / "methods_everywhere.md").write_text(text + matrix(rows) + errors)


def matrix(rows: list[dict]) -> str:
    """A line for each task and weights, a column for each method."""
    from jaxdistill.run import report

    columns = dict.fromkeys(["task", "weights", *(row["method"] for row in rows)])
    lines: dict[tuple, dict] = {}
    for row in rows:
        task, method, weights = key_of(row)
        line = lines.setdefault((task, weights), {"task": task, "weights": weights})
        line[method] = f"{row['difference']:.4f}" if "difference" in row else "ran"
        if "error" in row:
            line[method] = "failed"
    return report.markdown_table([*lines.values()], {name: (name, "{}") for name in columns})


def everywhere_says() -> str:
    return str(__doc__).split("\n\n")[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", required=True, help="of the runs; rows.json is kept there")
    parser.add_argument("--out", required=True)
    parser.add_argument("--tasks", default="", help="sd,sdxl,digits,scenes,...")
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
            row = {"task": task, "method": method, "weights": weights_of(lora)}
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
