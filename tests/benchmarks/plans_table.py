"""All that the TPU's compiler said, as one table and one picture.

    python tests/benchmarks/plans_table.py

Reads docs/results/aot_*.json, aot_v4_plain.txt and methods_memory.json. Writes
docs/results/plans.json and plans.md, the table between the markers of docs/plans.md, and
docs/pictures/memory-light.png and memory-dark.png. It compiles nothing.
"""

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "docs/results", ROOT / "docs/plans.md"
COMMAND = "python tests/benchmarks/plans_table.py"
BEGIN, END = f"<!-- {COMMAND}: begin -->\n", "<!-- end -->\n"

TEACHERS = {
    **{"sd15": "1.5", "sd21": "2.1", "sdxl": "XL", "sd35-medium": "3.5 medium"},
    **{"pixart-sigma": "PixArt-Σ", "flux-dev": "FLUX.1-dev", "zimage": "Z-Image"},
}
SIZES = {name: 1024 for name in TEACHERS.values()} | {"1.5": 512, "2.1": 768}  # pixels
METHODS = {"imagine_flash": "Imagine Flash", "dmd2": "DMD2", "tdm": "TDM", "matched": "matched"}
PROGRAMS = {"step": "training step", "sampler": "sampler, 3 steps", "teacher": "teacher's step"}
KEPT = (
    "topology",
    "chips",
    "rows_a_chip",
    "memory_gib",
    "fits",
    "flops_ratio",
    "flops_ratio_of_remat",
    "roofline_ms",
    "bound",
    "step_ms_at_least",
    "rows_a_second_a_chip_at_most",
    "mfu_at_most",
    "compile_seconds",
    "peak_memory_gib",
)
CORES = {"v4": 2, "v5p": 2}
"""TensorCores a chip: what the number in the name of a slice of these counts."""

COLUMNS = (
    "job and report",
    "slice",
    "rows per chip",
    "GiB per chip",
    "FLOPs / analytic (with remat)",
    "compute / memory / links, ms",
    "at most: rows/s per chip, MFU",
)
MORE = ("config", "bound by", "compiled in", "with")
"""Columns of docs/results/plans.md alone: the page has no room for them."""
TIMES = ("compute", "memory", "interconnect")


def config_of(command: str) -> str:
    """The config that a command names, as configs/tpu_v4.py:v5e."""
    found = re.search(r"--config=(\S+)", command)
    assert found, command
    return found[1]


def chips_of(topology: str) -> int:
    """Of the whole slice."""
    return math.prod(int(side) for side in topology.partition(":")[2].split("x"))


def slice_of(topology: str) -> str:
    """As Cloud TPU calls it: v4:2x2x4 is v4-32, v5e:4x4 is v5e-16."""
    chip = topology.partition(":")[0]
    return f"{chip}-{CORES.get(chip, 1) * chips_of(topology)}"


def weights_of(config: Mapping[str, Any], chips: int) -> str:
    """What is trained, and over how many chips its state is divided."""
    rank, fsdp = config["student"]["lora_rank"], config["mesh"]["fsdp"]
    over = chips if fsdp == -1 else fsdp
    trained = f"LoRA of rank {rank}" if rank else "all weights"
    return trained + (f" over {over} chips" if over > 1 else "")


def row_of_report(path: Path) -> dict[str, Any]:
    """A report of `jaxdistill.aot --json`."""
    report = json.loads(path.read_text())
    config, program = report["config"], report["compiled"]
    job = [PROGRAMS[program]]
    if program == "step":
        name = config["method"].get("name", "imagine_flash")
        job = [METHODS[name], weights_of(config, report["chips"])]
        if config["student"]["accumulate"] > 1:
            job.append(f"{config['student']['accumulate']} micro-batches")
    if config["compute"]["attention"] != "flash":
        job.append(f"{config['compute']['attention']} attention")
    teacher = TEACHERS[config["teacher"]["architecture"]]
    return {
        "file": path.name,
        "teacher": teacher,
        "pixels": config["data"]["height"] or SIZES[teacher],
        "program": program,
        "job": ", ".join(job),
        "config": config_of(report["command"]),
        **{key: report[key] for key in KEPT if key in report},
    }


def row_of_refusal(path: Path) -> dict[str, Any]:
    """What the compiler said of a program that is too large: its first line is the command."""
    text = path.read_text()
    flags = dict(re.findall(r"--([\w.]+)=(\S+)", text.splitlines()[0]))
    chips = chips_of(flags["topology"])
    found = re.search(r"temporaries \(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", text)
    assert found, path
    attention = flags["config.compute.attention"]
    return {
        "file": path.name,
        "teacher": "1.5",
        "pixels": SIZES["1.5"],
        "program": "step",
        "job": f"Imagine Flash, all weights, {attention} attention",
        "config": config_of(text),
        "topology": flags["topology"],
        "chips": chips,
        "rows_a_chip": int(flags["config.student.batch_size"]) / chips,
        "temporaries_gib": float(found[1]),
        "available_gib": float(found[2]),
        "fits": False,
    }


def rows_of_methods(path: Path) -> list[dict[str, Any]]:
    """The rows of methods_memory.json: all weights are divided over the whole slice."""
    table = json.loads(path.read_text())
    found = []
    for row in table["rows"]:
        full = f"all weights over {row['chips']} chips"
        weights = "LoRA of rank 64" if row["weights"] == "LoRA" else full
        found.append(
            {
                "file": path.name,
                "teacher": row["size"],
                "pixels": SIZES[row["size"]],
                "program": "step",
                "job": f"{METHODS[row['method']]}, {weights}",
                "config": "configs/tpu_v4.py" + (":sdxl" if row["size"] == "XL" else ""),
                "topology": table["topology"],
                **{key: row[key] for key in KEPT if key in row},
            }
        )
    return found


def collected() -> list[dict[str, Any]]:
    """Every plan: training steps by teacher, chip and need, then what draws images."""
    rows = [row_of_report(path) for path in sorted(RESULTS.glob("aot_*.json"))]
    rows += [row_of_refusal(path) for path in sorted(RESULTS.glob("aot_*.txt"))]
    rows += rows_of_methods(RESULTS / "methods_memory.json")

    def place(row: Mapping[str, Any]) -> tuple[Any, ...]:
        needed = row["memory_gib"]["needed"] if "memory_gib" in row else float("inf")
        chips = ("v4", "v5e", "v6e", "v5p")
        return (
            list(PROGRAMS).index(row["program"]),
            row["teacher"],
            chips.index(row["topology"].partition(":")[0]),
            needed,
        )

    return sorted(rows, key=place)


def cells_of(row: Mapping[str, Any], folder: str) -> dict[str, str]:
    """One row of the table by column; the longest of the times is bold."""
    memory = row.get("memory_gib")
    if memory:
        fits = "fits" if row["fits"] else "**does not fit**"
        gib = f"{memory['needed']:.1f} of {memory['chip']:g}: {fits}"
    else:
        gib = (
            f"{row['temporaries_gib']:.2f} of temporaries, where {row['available_gib']:.2f} are"
            " free: **does not fit**"
        )

    def shown(key: str, form: str) -> str:
        return form.format(row[key]) if key in row else ""

    def time(name: str) -> str:
        text = f"{row['roofline_ms'][name]:.0f}"
        return f"**{text}**" if name == row["bound"] else text

    again = shown("flops_ratio_of_remat", " ({:.3f})")
    most = ""
    if "mfu_at_most" in row:
        most = f"{row['rows_a_second_a_chip_at_most']:.3g}, {row['mfu_at_most']:.2f}"
    cells = (
        f"[{row['teacher']}, {row['pixels']}²: {row['job']}]({folder}{row['file']})",
        f"{slice_of(row['topology'])} ({row['topology']}, {chips_of(row['topology'])} chips)",
        f"{row['rows_a_chip']:g}",
        gib,
        shown("flops_ratio", "{:.3f}") + again,
        " / ".join(map(time, TIMES)) if "roofline_ms" in row else "",
        most,
        f"`{row['config']}`",
        row.get("bound", ""),
        shown("compile_seconds", "{:.0f} s"),
        shown("peak_memory_gib", "{:.1f} GiB"),
    )
    return dict(zip((*COLUMNS, *MORE), cells, strict=True))


def table_of(rows: list[dict[str, Any]], folder: str, columns: Sequence[str]) -> str:
    """The table; `folder` is the way from the page to the results."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = cells_of(row, folder)
        lines.append("| " + " | ".join(cells[name] for name in columns) + " |")
    return "\n".join(lines) + "\n"


def page_of(text: str, table: str) -> str:
    """The page with this table between its markers."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + table + "\n" + END + rest.split(END, 1)[1]


def outputs(page: str) -> dict[Path, str]:
    """What the command writes, but for the picture; `page` is docs/plans.md as it is."""
    rows = collected()
    head = (
        "# All plans\n\n"
        f"What the TPU's compiler said of each job; nothing has run on a TPU. Made by `{COMMAND}`;"
        " [plans](../plans.md) explains the columns.\n\n"
    )
    return {
        RESULTS / "plans.json": json.dumps({"command": COMMAND, "rows": rows}, indent=2) + "\n",
        RESULTS / "plans.md": head + table_of(rows, "", (*COLUMNS, *MORE)),
        PAGE: page_of(page, table_of(rows, "results/", COLUMNS)),
    }


def main() -> None:
    for path, text in outputs(PAGE.read_text()).items():
        path.write_text(text)
        print(path.relative_to(ROOT))
    sys.path.insert(0, str(ROOT / "docs"))
    import pictures

    pictures.main(["memory"])


if __name__ == "__main__":
    main()
