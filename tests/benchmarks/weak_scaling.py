"""What a larger slice costs: the train step of a small UNet, compiled for 8 to 1,024 v4 chips with
as many rows a chip.

    python tests/benchmarks/weak_scaling.py --out=docs/results/weak_scaling.json

Reads the compiler's reports (`jaxdistill.aot`), so no TPU is needed; about a minute and a half of
one CPU core a row. Collective bytes a chip should stay as they are while the slice grows.
"""

import argparse
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SLICES = ("v4:2x2x2", "v4:2x4x4", "v4:4x4x8", "v4:8x8x8", "v4:8x8x16")
MESHES = ({"data": -1, "fsdp": 1}, {"data": -1, "fsdp": 4})
SHARED = (
    "--config.compute.dtype=bfloat16",
    "--config.compute.attention=flash",
    "--config.mesh.smallest=1024",
)


def chips(topology: str) -> int:
    """Of CHIP:AxBxC."""
    return math.prod(map(int, topology.partition(":")[2].split("x")))


def report(topology: str, mesh: dict[str, int], rows: int, teacher: Path) -> dict[str, Any]:
    """The JSON report of one compile."""
    out = teacher.parent / "report.json"
    flags = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    command = [
        sys.executable,
        "-m",
        "jaxdistill.aot",
        "--config=tests/text_config.py",
        f"--topology={topology}",
        *SHARED,
        *flags,
    ]
    command += [
        f"--config.teacher.folder={teacher}",
        f"--config.student.batch_size={rows * chips(topology)}",
        f"--json={out}",
    ]
    subprocess.run(
        command, cwd=ROOT, check=True, stdout=sys.stderr, env={**os.environ, "PYTHONPATH": "tests"}
    )
    return json.loads(out.read_text())


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        (
            "| slice | chips | fsdp | rows a chip | FLOPs a chip | collective MiB a chip | by kind"
            " | interconnect ms | compute ms |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        kinds = (
            ", ".join(
                f"{kind} {size / 2**20:.2f}"
                for kind, size in sorted(row["collective_bytes_a_chip"].items())
            )
            or "none"
        )
        total = sum(row["collective_bytes_a_chip"].values()) / 2**20
        times = row["roofline_ms"]
        cells = [
            row["topology"],
            row["chips"],
            row["mesh"]["fsdp"],
            f"{row['rows_a_chip']:g}",
            f"{row['flops_a_chip']:.4g}",
        ]
        cells += [f"{total:.2f}", kinds, f"{times['interconnect']:.3f}", f"{times['compute']:.3f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument(
        "--rows", type=int, default=6, help="a chip; a multiple of the grids that share the batch"
    )
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        teacher = Path(scratch) / "teacher"
        maker = [sys.executable, "tests/folders.py", "sd", str(teacher)]
        subprocess.run(
            maker,
            cwd=ROOT,
            check=True,
            stdout=sys.stderr,
            env={**os.environ, "PYTHONPATH": "tests"},
        )
        for mesh in MESHES:
            for topology in SLICES:
                found = report(topology, mesh, args.rows, teacher)
                kept = (
                    "topology",
                    "chips",
                    "rows_a_chip",
                    "flops_a_chip",
                    "flops_ratio",
                    "collective_bytes_a_chip",
                    "gathered",
                )
                kept += ("roofline_ms", "compile_seconds", "versions")
                rows.append({"mesh": mesh, **{key: found[key] for key in kept}})
                print(table(rows[-1:]).splitlines()[-1], flush=True)
    command = shlex.join(["python", "tests/benchmarks/weak_scaling.py", *sys.argv[1:]])
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    args.out.write_text(
        json.dumps({"command": command, "machine": machine, "rows": rows}, indent=1) + "\n"
    )
    title = (
        f"# Weak scaling by the compiler's reports\n\nA small UNet, v4, {args.rows} rows a chip;"
        f" `{command}`.\n\n"
    )
    args.out.with_suffix(".md").write_text(title + table(rows))


if __name__ == "__main__":
    main()
