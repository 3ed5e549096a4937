"""python tests/tpu_programs.py one_chip | four_chips: what `costs.hlo` counts in programs that the
TPU's compiler makes, as JSON behind FOUND. The compiler is loaded once a process.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).parent / "costs"))
from test_flops_of_jaxpr import WITHOUT_LOOPS, transposed
from test_hlo import LOOPS, both, layer

from jaxdistill.costs.hlo import count
from jaxdistill.models.attention import flash_attention

V4 = {
    "topology_name": "v4:2x2x1",
    "chip_config_name": "megacore",
    "chips_per_host_bounds": (2, 2, 1),
}
V5E = {"topology_name": "v5e:2x2"}
BF16 = jnp.bfloat16
found = {}


def devices(**options):
    return topologies.get_topology_desc(platform="tpu", **options).devices


def write(name, function, mesh, *arguments):
    """Count a function of arrays that (shape, dtype, spec) describe."""
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in arguments
    ]
    compiled = jax.jit(function).lower(*shapes).compile()
    text = compiled.as_text()
    counts = count(text)
    found[name] = {
        **counts._asdict(),
        "gathers": [gather._asdict() for gather in counts.gathers],
        "xla": compiled.cost_analysis()["flops"],
        "pieces": text.count(" all-gather("),
        "whiles": text.count(" while("),
    }


def attention(q, k, v):
    """The value and the gradient, and no mask: the second is of the padding."""
    squared = jax.value_and_grad(lambda *qkv: jnp.sum(flash_attention(*qkv) ** 2), (0, 1, 2))
    return squared(q, k, v)


def one_chip():
    chip = Mesh(np.array(devices(**V4)[:1]), ("x",))
    write("attention", attention, chip, *(((2, n, 3, 64), BF16, P()) for n in (1100, 300, 300)))
    for name, (function, shapes) in WITHOUT_LOOPS.items():
        backward, arrays = transposed(function, *shapes)
        write(f"{name} backward", backward, chip, *((a.shape, BF16, P()) for a in arrays))
    stack = ((64, 128), jnp.float32, P()), ((5, 128, 128), jnp.float32, P())
    for name, pair in LOOPS.items():
        for kind, f in zip(("looped", "unrolled"), pair, strict=True):
            write(f"{name} {kind}", f, chip, *stack)


def exchange(x, w):
    """Every collective once."""
    whole = jax.lax.all_gather(w, "i", tiled=True)
    y = jnp.tanh(x @ whole)
    y = y + jax.lax.psum(y, "i")
    z = jax.lax.psum_scatter(y @ whole.T, "i", tiled=True)
    z = jax.lax.ppermute(jnp.concatenate([z] * 4), "i", [(k, (k + 1) % 4) for k in range(4)])
    return jax.lax.all_to_all(z.reshape(4, -1, z.shape[1]), "i", 0, 0).reshape(z.shape)


ROWS, WEIGHTS = P("fsdp"), P(None, None, "fsdp")
ARGUMENTS = ((8192, 2048), BF16, ROWS), ((3, 2, 2048, 2048), BF16, WEIGHTS)


def fsdp(mesh, rows=ROWS):
    """Three layers whose weights are gathered: (looped, unrolled)."""

    def body(x, w):
        w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
        y = x + layer(x, w[0]) @ w[1]
        return jax.lax.with_sharding_constraint(y, NamedSharding(mesh, rows)) if rows else y

    return both(body, 3)


def step(mesh, rows=ROWS):
    """A step down the gradient of its squared result."""

    def loss(x, ws):
        return jnp.sum(fsdp(mesh, rows)[0](x, ws).astype(jnp.float32) ** 2)

    def stepped(x, ws):
        gradient = jax.grad(loss, 1)(x, ws)
        return ws - jax.lax.with_sharding_constraint(gradient, NamedSharding(mesh, WEIGHTS))

    return stepped


def from_noise(mesh, constrained):
    """Nothing that comes in says how the rows are divided."""

    def sampled(ws):
        x = jax.random.normal(jax.random.key(0), (8192, 2048), BF16)
        return jnp.sum(fsdp(mesh, ROWS if constrained else None)[0](x, ws).astype(jnp.float32))

    return sampled


def four_chips():
    v4 = devices(**V4)
    mesh = Mesh(np.array(v4), ("i",))
    rows = ((1024, 512), BF16, P("i")), ((5, 512, 1024), BF16, P(None, "i"))
    for kind, f in zip(("looped", "unrolled"), both(exchange, 5), strict=True):
        options = {"in_specs": (P("i"), P(None, "i")), "out_specs": P("i"), "check_vma": False}
        write(f"exchange {kind}", jax.shard_map(f, mesh=mesh, **options), mesh, *rows)
    for name, chips in (("v4", v4), ("v5e", devices(**V5E))):
        mesh = Mesh(np.array(chips), ("fsdp",))
        for kind, f in zip(("looped", "unrolled"), fsdp(mesh), strict=True):
            write(f"{name} {kind}", f, mesh, *ARGUMENTS)
    mesh = Mesh(np.array(v4), ("fsdp",))
    write("step", step(mesh), mesh, *ARGUMENTS)
    write("divided", from_noise(mesh, True), mesh, ARGUMENTS[1])
    write("replicated", from_noise(mesh, False), mesh, ARGUMENTS[1])
    two = sorted(devices(num_slices=2, **V4), key=lambda d: (d.slice_index, d.id))
    mesh, rows = Mesh(np.array(two).reshape(2, 4), ("data", "fsdp")), P(("data", "fsdp"))
    write("slices", step(mesh, rows), mesh, (*ARGUMENTS[0][:2], rows), ARGUMENTS[1])


if __name__ == "__main__":
    {"one_chip": one_chip, "four_chips": four_chips}[sys.argv[1]]()
    print("FOUND" + json.dumps(found))
