"""What an accelerator does with this package: attention, parity with the CPU, the digits, and
training steps of Stable Diffusion's network, with torch beside them where it is installed.

    python tests/benchmarks/accelerator.py --out=accelerator

Writes accelerator.json and accelerator.md. Weights are random and nothing is downloaded. Each part
is a process of its own: one that fails or takes too long is noted, and the others go on. All of
them are meant to take less than the 8 minutes of --minutes on a GPU; nobody has run them on one
yet. On a CPU `--quick --parts=attention,parity,digits` shows that the script works.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FOUND = "FOUND"
"""Begins the line of a part's process that holds its numbers."""
PLANS = ROOT / "docs" / "results" / "gpu_memory.json"
GIB = 2**30


# ------------------------------------------------------------------------------------- measuring


def seconds_of(run: Callable[[], Any], rounds: int) -> float:
    """The median of some calls, after one to warm up."""
    import jax
    import numpy as np

    found = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - began)
    return float(np.median(found[1:]))


def random_like(shapes: Any, seed: int = 0) -> Any:
    """Arrays of such shapes where their shardings say, made there: scales 1, biases 0, the rest
    normal, of kernels by the numbers that they add up.
    """
    import jax
    import jax.numpy as jnp

    def one(path: Any, leaf: Any, i: int) -> Any:
        name = getattr(path[-1], "key", "") if path else ""
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(i)
        if name in ("scale", "bias"):
            return jnp.full(leaf.shape, float(name == "scale"), leaf.dtype)
        width = 1.0
        if name in ("kernel", "a", "b"):
            for size in leaf.shape[:-1]:
                width *= size
        return (jax.random.normal(jax.random.key(i), leaf.shape) * width**-0.5).astype(leaf.dtype)

    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)

    def make() -> list[Any]:
        return [one(path, leaf, seed + i) for i, (path, leaf) in enumerate(leaves)]

    places = [getattr(leaf, "sharding", None) for _, leaf in leaves]
    return tree.unflatten(jax.jit(make, out_shardings=places)())


class Step(NamedTuple):
    """A run's own training step on random weights: `run` goes one on and gives the metrics."""

    run: Callable[[], Any]
    compiled: Any
    compile_seconds: float
    flops: float
    rows: int


def training_step(config: Any, devices: Sequence[Any] | None = None) -> Step:
    """Of a text-to-image config with an architecture instead of a folder."""
    from jaxdistill.run.phase import programs
    from jaxdistill.tasks.text_to_image.setup import TextSetup, open_teacher

    setup = TextSetup(config, open_teacher(config), devices=devices)
    planned = setup.distillation.planned(0)
    made = programs(planned, setup.layout)
    params = random_like(setup.layout.describe(planned.shapes))
    state = [made.start(params, key=planned.key)]
    given, batch = random_like(made.given, 10_000), setup.batch_shapes(setup.recipe.stages[0])
    began = time.perf_counter()
    compiled = made.step.lower(made.state, batch, made.given).compile()
    seconds = time.perf_counter() - began
    batch = random_like(batch, 20_000)

    def run() -> Any:
        state[0], metrics = compiled(state[0], batch, given)
        return metrics

    return Step(run, compiled, seconds, setup.step_flops(), config.student.batch_size)


def measured(step: Step, rounds: int) -> dict[str, Any]:
    """Seconds, images a second, MFU where the chip is known, and memory: at its peak, and what the
    compiler said.
    """
    import jax
    import numpy as np

    from jaxdistill.costs import chips
    from jaxdistill.run.cost import temporaries_of

    device, count = jax.local_devices()[0], jax.device_count()
    first = float(step.run()["loss"])
    seconds = seconds_of(step.run, rounds)
    stats = device.memory_stats() or {}
    arguments = step.compiled.memory_analysis().argument_size_in_bytes
    planned = arguments + temporaries_of(step.compiled)
    found = {
        "rows": step.rows,
        "seconds": round(seconds, 4),
        "images_per_second": round(step.rows / seconds, 3),
        "compile_seconds": round(step.compile_seconds, 1),
        "compiled_gib": round(planned / GIB, 2),
        "first_loss": first,
        "finite": bool(np.isfinite(float(step.run()["loss"]))),
    }
    if "peak_bytes_in_use" in stats:
        found["peak_gib"] = round(stats["peak_bytes_in_use"] / GIB, 2)
    if chip := chips.of_device(device):
        found["mfu"] = round(step.flops / seconds / count / chip.flops, 4)
    return found


# ------------------------------------------------------------------------------------- the parts


def device(quick: bool) -> dict[str, Any]:
    """What is measured."""
    import jax

    from jaxdistill.costs import chips

    first = jax.local_devices()[0]
    chip = chips.of_device(first)
    stats = first.memory_stats() or {}
    names = ("jax", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "torch")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "platform": jax.default_backend(),
        "kind": first.device_kind,
        "count": jax.device_count(),
        "memory_gib": round(stats.get("bytes_limit", 0) / GIB, 1),
        "peak_tflops": chip.flops / 1e12 if chip else None,
        "versions": versions,
    }


def attention(quick: bool) -> dict[str, Any]:
    """Value and gradient by each kernel: seconds, temporaries, and the error against plain
    attention in float32.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxdistill.models.attention import ATTENTION, gpu_capability, gpu_kernel

    shapes = {
        "1.5 at 512², 64²": (2, 4096, 4096, 8, 40, jnp.bfloat16),
        "1.5 at 512², 32²": (2, 1024, 1024, 8, 80, jnp.bfloat16),
        "1.5 at 512², 64² to its text": (2, 4096, 77, 8, 40, jnp.bfloat16),
        "XL at 1024², 64²": (1, 4096, 4096, 10, 64, jnp.bfloat16),
        "XL at 1024², 64², float32": (1, 4096, 4096, 10, 64, jnp.float32),
    }
    if quick:
        shapes = {"1.5 at 256², 32²": (1, 1024, 1024, 2, 40, jnp.float32)}
    kernels = ["plain", "chunked", "auto"] + ["flash"] * (jax.default_backend() == "tpu")

    def both(name: str, *qkv: Any) -> Any:
        squared = lambda *a: jnp.sum(ATTENTION[name](*a).astype(jnp.float32) ** 2)  # noqa: E731
        return jax.value_and_grad(squared, (0, 1, 2))(*qkv)

    found = {}
    for title, (b, queries, keys, heads, head, dtype) in shapes.items():
        sizes = ((b, queries, heads, head), *((b, keys, heads, head),) * 2)
        q, k, v = (jax.random.normal(jax.random.key(i), s, dtype) for i, s in enumerate(sizes))
        with jax.default_matmul_precision("highest"):
            exact = jax.jit(partial(both, "plain"))(*(a.astype(jnp.float32) for a in (q, k, v)))
        rows: dict[str, Any] = {}
        for name in kernels:
            try:
                compiled = jax.jit(partial(both, name)).lower(q, k, v).compile()
                pairs = zip(jax.tree.leaves(compiled(q, k, v)), jax.tree.leaves(exact), strict=True)
                error = max(
                    float(np.abs(np.asarray(a, np.float32) - e).max() / np.abs(e).max())
                    for a, e in pairs
                )
                rows[name] = {
                    "ms": round(
                        1e3 * seconds_of(partial(compiled, q, k, v), 3 if quick else 10), 3
                    ),
                    "temporaries_gib": round(
                        compiled.memory_analysis().temp_size_in_bytes / GIB, 3
                    ),
                    "error": round(error, 7),
                }
            except jax.errors.JaxRuntimeError as failure:
                rows[name] = {"failed": str(failure).splitlines()[0][:200]}
        if (capability := gpu_capability()) is not None:
            rows["auto is"] = gpu_kernel(q, k, masked=False, capability=capability)
        found[title] = rows
    return found


TINY = {"block_out_channels": (32, 64), "cross_attention_dim": 32, "layers_per_block": 1}
TINY |= {"norm_num_groups": 8, "attention_head_dim": 2, "sample_size": 16}
TINY |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
TINY |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
WIDE = {"block_out_channels": (128, 256, 448, 448), "cross_attention_dim": 512}


def of_network(changes: dict[str, Any], **settings: Any) -> Any:
    """A config of 1.5's layout with another network: bfloat16, LoRA, nothing computed twice."""
    from configs import gpu
    from jaxdistill.interop import architectures

    published = architectures.PIPELINES["sd15"]
    network = {**published["unet"], **changes}
    architectures.PIPELINES = {**architectures.PIPELINES, "own": {**published, "unet": network}}
    config = gpu.get_config("sd15_lora")
    config.teacher.architecture = "own"
    config.compute.remat = "none"
    config.update_from_flattened_dict(settings)
    return config


def parity(quick: bool) -> dict[str, Any]:
    """Three training steps of a tiny network in float32, here and on the CPU of this machine,
    where that is another device.
    """
    import jax

    settings = {"compute.dtype": "float32", "compute.teacher_dtype": "float32"}
    settings |= {"methods.imagine_flash.adversarial_weight": 0.0, "student.steps": (2,)}
    settings |= {"methods.imagine_flash.teacher_steps": 1, "student.batch_size": 2}
    losses: dict[str, list[float]] = {}
    places = {jax.default_backend(): jax.local_devices(), "cpu": jax.devices("cpu")}
    with jax.default_matmul_precision("highest"):
        for name, found in places.items():
            step = training_step(of_network(TINY, **settings), found[:1])
            losses[name] = [float(step.run()["loss"]) for _ in range(3)]
    here, there = next(iter(losses.values())), losses["cpu"]
    errors = [abs(a - b) / abs(b) for a, b in zip(here, there, strict=True)]
    return {"losses": losses, "relative_error": max(errors) if len(losses) > 1 else None}


def digits(quick: bool) -> dict[str, Any]:
    """The job of README.md from its beginning to its table; quick: the smoke config."""
    from configs import digits as whole
    from configs import smoke
    from jaxdistill import main

    config = (smoke if quick else whole).get_config()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        results = main.run(config, Path(folder) / "run")
    rows = [row for row in results["rows"] if row["model"] == "student"]
    return {
        "config": "smoke" if quick else "digits",
        "seconds": round(time.perf_counter() - began, 1),
        "fd": {row["steps"]: round(row["fd"], 4) for row in rows},
        "of the teacher's": {row["steps"]: round(row["ratio"], 3) for row in rows},
    }


def middle(quick: bool) -> dict[str, Any]:
    """A training step of a network of about 100 M parameters with LoRA, at 64x64 latents."""
    import jax

    rows = 8 * jax.device_count()
    return measured(training_step(of_network(WIDE, **{"student.batch_size": rows})), 5)


def full(quick: bool) -> dict[str, Any]:
    """1.5's own training step, by the size of configs/gpu.py that the memory allows."""
    import jax

    from configs import gpu

    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    size = "sd15" if limit > 55 * GIB else "sd15_lora"
    config = gpu.get_config(f"{size}_x{jax.device_count()}")
    if device.platform == "tpu":
        config.compute.attention = "flash"
    found = {"size": size, **measured(training_step(config), 5)}
    planned = json.loads(PLANS.read_text())["jobs"] if PLANS.exists() else {}
    if size in planned:
        found["planned_gib"] = planned[size]["gib"]["needed"]
    return found


ROWS = 4


def network(quick: bool) -> dict[str, Any]:
    """1.5's UNet forwards and backwards in bfloat16, all weights in float32, at 64x64 latents."""
    import jax
    import jax.numpy as jnp

    from jaxdistill.interop import architectures, diffusers_folder

    part = architectures.folder(architectures.PIPELINES["sd15"], dtype=jnp.bfloat16).network
    params = random_like(diffusers_folder.abstract_params(part))
    x, context = (jax.random.normal(jax.random.key(0), s) for s in _shapes())
    t = jnp.full(ROWS, 500.0)

    @jax.jit
    def both(params: Any) -> Any:
        def loss(params: Any) -> Any:
            out = part.module.apply(params, x, t, {"context": context})
            return jnp.mean(out.astype(jnp.float32) ** 2)

        return jax.value_and_grad(loss)(params)

    seconds = seconds_of(lambda: both(params), 5)
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "rows": ROWS,
        "seconds": round(seconds, 4),
        "peak_gib": round(stats.get("peak_bytes_in_use", 0) / GIB, 2),
    }


def _shapes() -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (ROWS, 64, 64, 4), (ROWS, 77, 768)


def network_torch(quick: bool) -> dict[str, Any]:
    """The same by diffusers and torch's autocast, as it comes."""
    import diffusers
    import torch

    torch.set_default_device("cuda")
    unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768).train()
    (b, h, w, c), of_text = _shapes()
    x, context = torch.randn(b, c, h, w), torch.randn(of_text)

    def both() -> float:
        unet.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            out = unet(x, torch.full((b,), 499.0), context).sample
        loss = (out.float() ** 2).mean()
        loss.backward()
        torch.cuda.synchronize()
        return loss.item()

    seconds = seconds_of(both, 5)
    peak = torch.cuda.max_memory_allocated() / GIB
    return {"rows": ROWS, "seconds": round(seconds, 4), "peak_gib": round(peak, 2)}


def against_torch(quick: bool) -> dict[str, Any]:
    """A distillation step of a network of 100 M parameters with the same weights in both, float32:
    `tests/benchmarks/against_torch.py` on this device.
    """
    sys.path.insert(0, str(Path(__file__).parent))
    import against_torch as beside
    import torch

    if torch.cuda.is_available():
        torch.set_default_device("cuda")
        torch.backends.cuda.matmul.allow_tf32 = True  # as XLA does
    setup = beside.Setup(quick, "auto")
    contenders = {
        "torch eager": beside.torch_step(setup, False),
        "jaxdistill": beside.jax_step(setup, unroll=False),
    }
    losses = {name: run() for name, run in contenders.items()}
    summary = beside.summary(beside.alternate(contenders, 2 if quick else 5))
    return {"first_losses": losses, **summary}


class Part(NamedTuple):
    """`everywhere`: a CPU does it within minutes, too; `torch`: compares with it."""

    run: Callable[[bool], dict[str, Any]]
    everywhere: bool = False
    torch: bool = False


PARTS = {
    "attention": Part(attention, everywhere=True),
    "parity": Part(parity, everywhere=True),
    "digits": Part(digits, everywhere=True),
    "middle": Part(middle),
    "network": Part(network),
    "network_torch": Part(network_torch, torch=True),
    "against_torch": Part(against_torch, everywhere=True, torch=True),
    "full": Part(full),
}
"""In this order: the last one compiles for longest, and has the time that is left."""


# ------------------------------------------------------------------------------- one after another


def obstacle(part: Part, about: dict[str, Any], quick: bool) -> str:
    """Why a part is left out on this machine; or nothing."""
    if about["platform"] == "cpu" and not part.everywhere:
        return "a full-size network is for accelerators, and this is a CPU"
    if about["platform"] == "cpu" and not quick and part.run is attention:
        return "at full size it is for accelerators; on a CPU give --quick"
    if part.torch and about["platform"] == "tpu":
        return "torch does not compute on this device"
    if part.torch and not all(map(importlib.util.find_spec, ("torch", "diffusers"))):
        return "torch or diffusers is not installed"
    return ""


def in_a_process(name: str, quick: bool, seconds: float) -> dict[str, Any]:
    """A part's numbers, or {"failed": why}."""
    command = [sys.executable, __file__, f"--part={name}", *["--quick"] * quick]
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": ":".join(filter(None, paths))}
    if PARTS.get(name, Part(device)).torch:  # which needs memory, too
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    try:
        process = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not finished after {seconds:.0f} s; --minutes gives it more"}
    for line in process.stdout.splitlines():
        if line.startswith(FOUND):
            return json.loads(line.removeprefix(FOUND))
    last = [line for line in process.stderr.splitlines() if line.strip()][-1:]
    return {"failed": f"exit code {process.returncode}: {''.join(last)[:300]}"}


def text_of(found: dict[str, Any]) -> str:
    """The report in Markdown."""
    about = found["device"]
    lines = [
        f"# {about['count']} x {about['kind']}",
        "",
        f"`{found['command']}`, jax {about['versions']['jax']}, {found['seconds']:.0f} s in all.",
    ]
    for name, numbers in found["parts"].items():
        why = (PARTS[name].run.__doc__ or "").split("\n\n")[0]
        lines += ["", f"## {name}", "", " ".join(why.split()), ""]
        if "failed" in numbers or "skipped" in numbers:
            lines.append("; ".join(f"{key}: {value}" for key, value in numbers.items()))
            continue
        lines += ["| | |", "|---|---|"]
        for key, value in numbers.items():
            shown = json.dumps(value) if isinstance(value, dict | list) else value
            lines.append(f"| {key} | {shown} |")
    return "\n".join(lines) + "\n"


def write(path: str, found: dict[str, Any]) -> None:
    """Both files, after each part: what was measured stays."""
    Path(f"{path}.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    Path(f"{path}.md").write_text(text_of(found))


def main() -> int:
    """Run the parts; 1 where one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="PATH: PATH.json and PATH.md are written")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="small networks, the smoke config")
    parser.add_argument("--minutes", type=float, default=8.0, help="of all parts together")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        run = device if args.part == "device" else PARTS[args.part].run
        try:
            if run is not network_torch:  # never on a CPU by mistake
                from jaxdistill.run import compilation

                compilation.check_devices()
            print(FOUND + json.dumps(run(args.quick)), flush=True)
        except Exception as error:  # whatever it is, it is the result
            traceback.print_exc()
            line = (str(error).strip().splitlines() or [""])[0][:300]
            print(FOUND + json.dumps({"failed": f"{type(error).__name__}: {line}"}), flush=True)
        return 0
    chosen = args.parts.split(",")
    if unknown := [name for name in chosen if name not in PARTS]:
        parser.error(f"--parts={unknown[0]} is not known; choose of {', '.join(PARTS)}")
    if not args.out:
        parser.error("--out=PATH is missing")
    began, end = time.monotonic(), time.monotonic() + 60 * args.minutes
    about = in_a_process("device", args.quick, 120)
    if "failed" in about:
        print(f"error: no device: {about['failed']}", file=sys.stderr)
        return 2
    print(f"device: {json.dumps(about)}", flush=True)
    found: dict[str, Any] = {
        "command": shlex.join(["python", "tests/benchmarks/accelerator.py", *sys.argv[1:]]),
        "device": about,
        "parts": {},
    }
    for name in chosen:
        why = obstacle(PARTS[name], about, args.quick)
        left = end - time.monotonic()
        if not why and left < 10:
            why = f"the {args.minutes:g} minutes are over; --minutes gives more"
        numbers = {"skipped": why} if why else in_a_process(name, args.quick, left)
        found["parts"][name] = numbers
        found["seconds"] = round(time.monotonic() - began, 1)
        print(f"{name}: {json.dumps(numbers, ensure_ascii=False)}", flush=True)
        write(args.out, found)
    return int(any("failed" in numbers for numbers in found["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
