r"""Load on `jaxdistill.serve` from 1 to 64 pages at once, batched and one image at a time: rate,
latency, wrong images; memory over minutes.

    python tests/benchmarks/serve.py --model=runs/benchmark/students/imagine_flash-0 \
        --out=docs/results/serve.json

Each of `--parts` (load, memory) replaces its own part of the file.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import itertools
import json
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import websockets
from PIL import Image

from jaxdistill.run.workdir import versions

COLOURS, GARMENTS = ("red", "blue", "green", "white"), ("bag", "dress", "coat", "boot")


@contextlib.contextmanager
def server(flags: list[str], sizes: str) -> Iterator[tuple[int, int]]:
    """(port, pid) of a server that is up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "jaxdistill.serve",
            *flags,
            f"--batch_sizes={sizes}",
            f"--port={port}",
        ]
    )
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5)
                break
            except OSError:
                if process.poll() is not None:
                    sys.exit(process.returncode)
                time.sleep(0.5)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait(20)


def resident(pid: int) -> float:
    """Resident memory in MiB."""
    line = next(
        x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmRSS")
    )
    return int(line.split()[1]) / 1024


def pixels(png: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))).astype(int)


async def ask(ws: Any, number: int, prompt: str, seed: int, steps: int) -> tuple[np.ndarray, float]:
    """(pixels, milliseconds seen by the page)."""
    began = time.perf_counter()
    frame = {"id": number, "prompt": prompt, "steps": steps, "seed": seed, "count": 1}
    await ws.send(json.dumps(frame))
    image = None
    while True:
        answer = json.loads(await asyncio.wait_for(ws.recv(), 60))
        if answer["kind"] == "image":
            image = answer["png"]
            milliseconds = 1000 * (time.perf_counter() - began)
        elif answer["kind"] == "done":
            return pixels(image), milliseconds
        else:
            raise RuntimeError(answer)


async def load(
    port: int,
    sessions: int,
    seconds: float,
    wanted: list[tuple[str, int]],
    expected: list[np.ndarray],
    steps: int,
) -> dict[str, Any]:
    """What `sessions` pages get in `seconds`, each asking again as soon as it has its image."""
    end, times, wrong = time.perf_counter() + seconds, list[float](), 0

    async def page(which: int) -> None:
        nonlocal wrong
        async with websockets.connect(f"ws://127.0.0.1:{port}/ws") as ws:
            number = 0
            while time.perf_counter() < end:
                i = (which * 7 + number) % len(wanted)
                image, milliseconds = await ask(ws, number, *wanted[i], steps)
                times.append(milliseconds)
                wrong += bool(np.abs(image - expected[i]).max() > 1)
                number += 1

    began = time.perf_counter()
    await asyncio.gather(*(page(i) for i in range(sessions)))
    rate = len(times) / (time.perf_counter() - began)
    found = {"images_per_second": round(rate, 1), "median_ms": round(float(np.median(times)), 1)}
    return {
        "sessions": sessions,
        "images": len(times),
        "wrong": wrong,
        **found,
        "p95_ms": round(float(np.quantile(times, 0.95)), 1),
    }


async def learn(port: int, wanted: list[tuple[str, int]], steps: int) -> list[np.ndarray]:
    """The images of one page that asks for one after the other."""
    async with websockets.connect(f"ws://127.0.0.1:{port}/ws") as ws:
        return [(await ask(ws, i, *w, steps))[0] for i, w in enumerate(wanted)]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--model", required=True)
    p.add_argument("--text_encoder", default="")
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--parts", default="load,memory")
    p.add_argument("--seconds", type=float, default=10.0, help="of each point of the load")
    p.add_argument("--minutes", type=int, default=10, help="of the memory part")
    p.add_argument("--sizes", default="1,4,16", help="batch sizes of the batching server")
    p.add_argument("--out", required=True)
    args = p.parse_args()
    flags = [f"--model={args.model}"] + (
        [f"--text_encoder={args.text_encoder}"] if args.text_encoder else []
    )
    scenes = itertools.product(COLOURS, GARMENTS, COLOURS[:2])
    wanted = [
        (f"a {first} {garment} above a {second} bag", i)
        for i, (first, garment, second) in enumerate(scenes)
    ]
    out = Path(args.out)
    results = json.loads(out.read_text()) if out.exists() else {}
    about = {
        "command": shlex.join(
            [
                "python",
                "tests/benchmarks/serve.py",
                *(f for f in sys.argv[1:] if "text_encoder" not in f),
            ]
        )
    }
    for part in args.parts.split(","):
        found = {"load": load_part, "memory": memory_part}[part](flags, wanted, args)
        results[part] = {**about, "steps": args.steps, **found, "versions": versions()}
        out.write_text(json.dumps(results, indent=2) + "\n")


def load_part(
    flags: list[str], wanted: list[tuple[str, int]], args: argparse.Namespace
) -> dict[str, Any]:
    """Rates of 1 to 64 pages, of a server that draws one image at a time and one that batches."""
    rows, expected = list[dict[str, Any]](), list[np.ndarray]()
    for sizes in ("1", args.sizes):
        with server(flags, sizes) as (port, pid):
            expected = expected or asyncio.run(learn(port, wanted, args.steps))
            asyncio.run(load(port, 1, 1.0, wanted, expected, args.steps))
            for sessions in (1, 4, 16, 64):
                before = resident(pid)
                row = asyncio.run(load(port, sessions, args.seconds, wanted, expected, args.steps))
                rows.append(
                    {"batch_sizes": sizes, **row, "grown_mib": round(resident(pid) - before, 1)}
                )
                print(rows[-1], flush=True)
    best = {
        s: max(r["images_per_second"] for r in rows if r["batch_sizes"] == s)
        for s in ("1", args.sizes)
    }
    ratio = round(best[args.sizes] / best["1"], 2)
    print(json.dumps(best), ratio)
    return {"rows": rows, "batched_over_one_by_one": ratio}


def memory_part(
    flags: list[str], wanted: list[tuple[str, int]], args: argparse.Namespace
) -> dict[str, Any]:
    """Resident memory of the batching server after each minute under 16 pages."""
    images = wrong = 0
    with server(flags, args.sizes) as (port, pid):
        expected = asyncio.run(learn(port, wanted, args.steps))
        minutes = [{"minute": 0, "images": 0, "resident_mib": round(resident(pid), 1)}]
        for minute in range(1, args.minutes + 1):
            row = asyncio.run(load(port, 16, 60.0, wanted, expected, args.steps))
            images, wrong = images + row["images"], wrong + row["wrong"]
            minutes.append(
                {"minute": minute, "images": images, "resident_mib": round(resident(pid), 1)}
            )
            print(minutes[-1], flush=True)
    return {"sessions": 16, "wrong": wrong, "minutes": minutes}


if __name__ == "__main__":
    main()
