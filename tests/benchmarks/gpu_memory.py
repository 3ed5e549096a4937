"""The memory that the training steps of `configs/gpu.py` take by XLA's GPU compiler, and attention
of 4,096 positions beside it. No GPU is needed, and nothing runs: XLA is told of an A100.

    python tests/benchmarks/gpu_memory.py --out=docs/results/gpu_memory.json [--jobs=attention,...]

Needs the extra "cuda". What cuDNN's kernels take for themselves comes on top: they are chosen on
the GPU. A job takes up to an hour on two CPU cores; what is in the file already stays.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

A100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 166912
  shared_memory_per_core: 167936
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: 108
  fpus_per_core: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 2039000000000
  l2_cache_size: 41943040
  clock_rate_ghz: 1.41
  device_memory_size: 85899345920
  cuda_compute_capability { major: 8 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA A100-SXM4-80GB"
"""
"""As XLA describes the card: from its data sheet and the tables of CUDA's programming guide."""

SHAPE = (2, 4096, 8, 64)
KERNELS = ("plain", "chunked", "auto")
GIB = 2**30


def without_a_gpu() -> list[Any]:
    """One device of a card that is not here."""
    compiler = importlib.util.find_spec("nvidia.cuda_nvcc")
    if compiler is None or not compiler.submodule_search_locations:
        sys.exit("nvidia-cuda-nvcc-cu12 is missing; install the extra: pip install '.[cuda]'")
    (folder, *_) = compiler.submodule_search_locations
    os.environ["PATH"] = f"{folder}/bin:{os.environ['PATH']}"
    # The fastest kernels are chosen by running them.
    os.environ["XLA_FLAGS"] = f"--xla_gpu_cuda_data_dir={folder} --xla_gpu_autotune_level=0"
    os.environ |= {"JAX_PLATFORMS": "cuda,cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}

    from jax._src.cudnn import fused_attention_stablehlo
    from jax.experimental import topologies

    from jaxdistill.models import attention

    attention.gpu_capability = lambda: (8, 0)
    fused_attention_stablehlo.check_cudnn_version = lambda: 90_800
    options = {"topology": "1x1x1", "target_config": A100}
    return list(topologies.get_topology_desc("1x1x1", "cuda", **options).devices)


def of_attention(devices: list[Any]) -> dict[str, Any]:
    """Temporaries of the value and the gradient, by dtype and kernel."""
    import jax
    import jax.numpy as jnp

    from jaxdistill.models.attention import ATTENTION

    place = jax.sharding.NamedSharding(
        jax.make_mesh((1,), ("x",), devices=devices), jax.sharding.PartitionSpec()
    )
    found: dict[str, Any] = {"shape": SHAPE}
    for dtype in (jnp.bfloat16, jnp.float32):
        q = jax.ShapeDtypeStruct(SHAPE, dtype, sharding=place)
        rows = {}
        for name in KERNELS:

            def summed(*qkv: Any, name: str = name) -> Any:
                return ATTENTION[name](*qkv).astype(jnp.float32).sum()

            compiled = jax.jit(jax.value_and_grad(summed, (0, 1, 2))).lower(q, q, q).compile()
            size = compiled.memory_analysis().temp_size_in_bytes
            called = sorted(set(re.findall(r'custom_call_target="([^"]+)"', compiled.as_text())))
            rows[name] = {"temporaries_gib": round(size / GIB, 3), "calls": called}
        found[jnp.dtype(dtype).name] = rows
    return found


def of_step(size: str, devices: list[Any]) -> dict[str, Any]:
    """GiB of the training step of a size of configs/gpu.py."""
    from configs import gpu
    from jaxdistill.run.cost import temporaries_of
    from jaxdistill.tasks.text_to_image import plan

    config = gpu.get_config(size)
    program = plan.text_program(config, devices)
    began = time.perf_counter()
    compiled = program.function.lower(*program.arguments).compile()
    seconds, memory = time.perf_counter() - began, compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + temporaries_of(compiled)
    text = compiled.as_text()
    kinds = {name: plan.bytes_a_device(tree) for name, tree in program.kinds.items()}
    return {
        "rows": config.student.batch_size,
        "gib": {
            **{name: round(bytes_ / GIB, 3) for name, bytes_ in kinds.items()},
            "temporaries": round(memory.temp_size_in_bytes / GIB, 3),
            "needed": round(needed / GIB, 3),
        },
        "donated_gib": round(memory.alias_size_in_bytes / GIB, 3),
        "fused_attention_calls": text.count('custom_call_target="__cudnn$fmha'),
        "holds_all_scores": "4096,4096]" in text,
        "analytic_flops": program.analytic_flops,
        "compile_seconds": round(seconds, 1),
    }


def main() -> None:
    """Write the jobs' numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--jobs", default="attention,sd15_lora,sd15,sdxl_lora")
    args = parser.parse_args()
    devices = without_a_gpu()
    path = Path(args.out)
    for job in args.jobs.split(","):
        found = json.loads(path.read_text()) if path.exists() else {"jobs": {}}
        made = of_attention(devices) if job == "attention" else of_step(job, devices)
        print(job, json.dumps(made), flush=True)
        found["jobs"][job] = made
        found |= {
            "command": shlex.join(["python", "tests/benchmarks/gpu_memory.py", *sys.argv[1:]]),
            "card": "A100 80GB, described to the compiler; nothing was run",
            "versions": {n: importlib.metadata.version(n) for n in ("jax", "jax-cuda12-plugin")},
        }
        path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
