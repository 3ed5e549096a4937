"""What each method's train step needs of a chip's memory, at full size, by the TPU's compiler.

    python tests/benchmarks/methods_memory.py --workdir=runs/memory --out=docs/results

Compiles the largest stage of each case with `jaxdistill.aot`, one after the other, and puts the
reports into one table; each case is set against LoRA Imagine Flash of the same size. Started again
it goes on where it was. Each case takes a core for a quarter of an hour or more, and up to 22 GB of
memory.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from plans_table import KEPT  # noqa: E402 - of a report, for the table of all plans

TOPOLOGY = "v5p:2x2x1"
SIZES = {
    "1.5": ["--config=configs/tpu_v4.py", "--config.student.batch_size=24"],
    "XL": ["--config=configs/tpu_v4.py:sdxl", "--config.student.batch_size=24"],
}
COMMON = ["--config.compute.scan=True", "--config.student.accumulate=1"]
WEIGHTS = {
    "LoRA": [
        "--config.student.lora_rank=64",
        "--config.mesh.data=-1",
        "--config.mesh.fsdp=1",
    ],
    "full": ["--config.student.lora_rank=0", "--config.mesh.data=1", "--config.mesh.fsdp=-1"],
}


class Case(NamedTuple):
    """A size of teacher, a method, and what it trains."""

    size: str
    method: str
    weights: str

    @property
    def name(self) -> str:
        return f"{self.size}-{self.method}-{self.weights}"


CASES = [
    *(
        Case(size, method, "LoRA")
        for size in ("XL", "1.5")
        for method in ("imagine_flash", "tdm", "matched")
    ),
    *(Case(size, "dmd2", weights) for size in ("1.5", "XL") for weights in ("full", "LoRA")),
]
FIRST = "imagine_flash"

COLUMNS = {
    "size": ("teacher", "{}"),
    "method": ("method", "{}"),
    "weights": ("weights", "{}"),
    "rows_a_chip": ("rows a chip", "{:g}"),
    "state": ("trained, averages, optimizers", "{:.2f}"),
    "frozen": ("frozen", "{:.2f}"),
    "temporaries": ("temporaries", "{:.2f}"),
    "needed": ("needed", "{:.2f}"),
    "ratio": ("/ LoRA Imagine Flash", "{:.3f}"),
    "flops": ("TFLOPs a row", "{:.1f}"),
    "compile_seconds": ("compiled in, s", "{:.0f}"),
}
REST = ("frozen", "batch", "temporaries", "program", "needed", "chip")


def compile_case(case: Case, folder: Path) -> None:
    """FOLDER/NAME.json, by the command."""
    command = [
        sys.executable,
        "-m",
        "jaxdistill.aot",
        *SIZES[case.size],
        *COMMON,
        *WEIGHTS[case.weights],
        f"--topology={TOPOLOGY}",
        f"--config.method.name={case.method}",
        f"--json={folder / case.name}.json",
    ]
    began = time.monotonic()
    with (folder / f"{case.name}.log").open("w") as log:
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
    print(f"{case.name}: exit code {code}, {time.monotonic() - began:.0f} s", flush=True)


def row_of(case: Case, report: dict) -> dict:
    """The report as a row of the table."""
    memory = report["memory_gib"]
    return {
        **case._asdict(),
        "state": sum(size for kind, size in memory.items() if kind not in REST),
        **{kind: memory[kind] for kind in ("frozen", "temporaries", "needed")},
        "flops": report["analytic_flops_a_chip"] / report["rows_a_chip"] / 1e12,
        **{key: report[key] for key in KEPT if key in report},
        "versions": report["versions"],
    }


def written(folder: Path, out: Path) -> None:
    """methods_memory.json and .md of the cases that are there."""
    from jaxdistill.run import checkpoint, report

    files = {case: folder / f"{case.name}.json" for case in CASES}
    rows = [row_of(c, json.loads(f.read_text())) for c, f in files.items() if f.exists()]
    rows.sort(key=lambda row: list(SIZES).index(row["size"]))
    first = {row["size"]: row["needed"] for row in rows if row["method"] == FIRST}
    for row in rows:
        if row["size"] in first:
            row["ratio"] = row["needed"] / first[row["size"]]
    command = "python tests/benchmarks/methods_memory.py --workdir=runs/memory --out=docs/results"
    checkpoint.write_json(
        out / "methods_memory.json", {"command": command, "topology": TOPOLOGY, "rows": rows}
    )
    text = (
        "# Memory of the methods at full size\n\n"
        f"A train step on {TOPOLOGY}, as the TPU's compiler plans it: GiB a chip. Of a method in"
        " several stages it is the one with the most networks. LoRA of rank 64: every chip holds"
        " the frozen teacher once. Full: all weights are divided over the four chips.\n\n"
    )
    (out / "methods_memory.md").write_text(text + report.markdown_table(rows, COLUMNS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", required=True, help="folder of the reports")
    parser.add_argument("--out", required=True, help="folder of methods_memory.json and .md")
    parser.add_argument(
        "--cases", default="", help="some of the cases, as XL-tdm-LoRA,1.5-dmd2-full"
    )
    args = parser.parse_args()
    folder, out = Path(args.workdir).resolve(), Path(args.out).resolve()
    for made in (folder, out):
        made.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        if (not args.cases or case.name in args.cases.split(",")) and not (
            folder / f"{case.name}.json"
        ).exists():
            compile_case(case, folder)
        written(folder, out)


if __name__ == "__main__":
    main()
