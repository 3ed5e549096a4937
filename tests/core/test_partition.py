"""Eight CPU devices against one, in a process of its own: values and compiled cost on every kind of
mesh.
"""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from paths import ROOT
from shell import quick

from jaxdistill import partition
from jaxdistill.errors import UserError

SCRIPT = """
import json, sys
import jax, jax.numpy as jnp, numpy as np, optax
sys.path.insert(0, "tests")
from jaxdistill import partition
from jaxdistill.run.phase import Training, programs
from jaxdistill.train import Objective
from small import batch, flash, make

model, teacher = make(64, 2)
tx = optax.adam(1e-3)

def report(mesh, accumulate=1, steps=20):
    layout = partition.Layout(mesh, smallest=64)
    loss_fn = flash(model, constrain=partition.constrain_batch(mesh))
    def loss(params, teacher, batch, key):
        return loss_fn(layout.gathered(params), layout.gathered(teacher), batch, key)
    params = {"student": jax.tree.map(np.asarray, teacher)}
    training = Training(
        name="student",
        objective=Objective(loss, tx),
        params=dict,
        shapes=params,
        key=jax.random.key(0),
        batches=None,
        given=teacher,
        health=None,
        steps=steps,
        health_every=1,
        ema_decay=0.9,
        accumulate=accumulate,
    )
    made = programs(training, layout)
    state, step = made.start(layout.place(params), key=jax.random.key(0)), made.step
    data = partition.put_batch(batch(512), mesh)
    fixed = layout.place(jax.tree.map(np.asarray, teacher))
    compiled = step.lower(state, data, fixed).compile()
    leaves = jax.tree.leaves((state.params, state.ema_params, state.opt_state))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, data, fixed)
        losses.append(float(metrics["loss"]))
    total = float(sum(jnp.sum(jnp.abs(a)) for a in jax.tree.leaves(state.params)))
    return compiled.cost_analysis()["flops"], losses, total, held

mesh = partition.make_mesh
one = mesh(devices=jax.devices()[:1])
out = {
    "one": report(one),
    "data": report(mesh()),
    "fsdp": report(mesh(data=1, fsdp=8)),
    "mixed": report(mesh(data=2, fsdp=2, tensor=2)),
    "micro": report(mesh(data=4, fsdp=2), accumulate=2, steps=1),
}
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def eight():
    environment = quick("--xla_force_host_platform_device_count=8")
    root = ROOT
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        cwd=root,
        env=environment,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", ["data", "fsdp", "mixed"])
def test_eight_devices_compute_an_eighth_each_and_the_same_values(eight, mesh):
    cost, losses, total, _ = eight[mesh]
    cost_one, losses_one, total_one, _ = eight["one"]
    assert losses == pytest.approx(losses_one, rel=1e-6 if mesh == "data" else 2e-5)
    assert total == pytest.approx(total_one, rel=1e-6)
    assert cost * 8 == pytest.approx(cost_one, rel=0.05)


def test_micro_batches_on_a_mesh_keep_their_rows(eight):
    """Another draw of the noise, so another loss; but each device still computes an eighth."""
    assert eight["micro"][0] * 8 * 2 == pytest.approx(
        eight["one"][0], rel=0.05
    )  # the loop's body is counted once


def test_fsdp_holds_an_eighth_of_the_state(eight):
    assert eight["fsdp"][3] < 0.2 * eight["one"][3] and eight["data"][3] == eight["one"][3]


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"config\.student\.batch_size = 0 must be"):
        partition.check_batch(0, partition.data_mesh(), "config.student.batch_size")


def test_rows_that_the_devices_cannot_divide_evenly_are_refused():
    with pytest.raises(UserError, match=r"^12 rows do not divide evenly among 8 devices: each"):
        partition.constrain_batch(abstract_mesh())(jnp.zeros((12, 3)))


def abstract_mesh(data=2, fsdp=4, tensor=2):
    return jax.sharding.AbstractMesh((data, fsdp, tensor), partition.AXES)


ROWS_LAST, SUMS = ("fsdp", "tensor"), ("tensor", "fsdp")


@pytest.mark.parametrize(
    ("name", "shape", "spec"),
    [
        ("params/down/to_q/kernel", (320, 640), ("fsdp", "tensor")),
        ("opt_state/0/mu/params/mid/to_out.0/kernel", (640, 320), ("tensor", "fsdp")),
        (
            "params/blocks/ff/net.2/kernel",
            (10, 1280, 320),
            (None, "tensor", "fsdp"),
        ),  # a stack of blocks
        ("params/conv1/kernel", (3, 3, 320, 640), (None, None, "fsdp", "tensor")),
        (
            "params/conv_in/kernel",
            (3, 3, 3, 3200),
            (None, None, None, "tensor"),
        ),  # three channels do not divide by four
        ("params/transformer_blocks.0:13/attn/to_q/kernel", (13, 512, 320), (None, *ROWS_LAST)),
        ("params/transformer_blocks.0:13/attn/to_add_out/kernel", (13, 512, 320), (None, *SUMS)),
        ("params/transformer_blocks.0:13/ff_context/net.2/kernel", (13, 512, 320), (None, *SUMS)),
        ("params/transformer_blocks.0:13/norm1/linear/kernel", (13, 320, 1920), (None, *ROWS_LAST)),
        ("params/single_transformer_blocks.0:38/proj_out/kernel", (38, 640, 128), (None, *SUMS)),
        ("params/layers.0:30/feed_forward.w2/kernel", (30, 640, 256), (None, *SUMS)),
        ("params/layers.0:30/adaLN_modulation.0/kernel", (30, 256, 1024), (None, *ROWS_LAST)),
        ("params/block.0:24/layer.1.DenseReluDense.wo/kernel", (24, 640, 256), (None, *SUMS)),
        ("params/block.0:24/layer.0/SelfAttention/o/kernel", (24, 256, 256), (None, *SUMS)),
        ("params/layers.0:36/self_attn.o_proj/kernel", (36, 256, 256), (None, *SUMS)),
        ("params/layers.0:36/mlp.down_proj/kernel", (36, 640, 256), (None, *SUMS)),
        ("lora/transformer_blocks.0:13/attn/to_q/down", (13, 512, 16), (None, *ROWS_LAST)),
        ("params/transformer_blocks.0:28/scale_shift_table", (28, 6, 1152), ()),
        ("params/transformer_blocks.0:38/norm/linear/bias", (38, 9216), ()),
        ("params/pos_embed.pos_embed", (1, 36864, 64), (None, "fsdp", None)),
        ("params/norm/scale", (80000,), ()),
        ("null/context", (1, 77, 2048), ()),
        ("params/to_q/kernel", (8, 8), ()),  # small
        (
            "params/table/embedding",
            (80000,),
            ("tensor",),
        ),  # fewer dimensions than the rule has axes
    ],
)
def test_rules_place_by_the_last_dimensions(name, shape, spec):
    found = partition.sharding_of(name, shape, abstract_mesh())
    assert found.spec == PartitionSpec(*spec)


def test_an_axis_that_does_not_divide_takes_a_free_dimension():
    assert partition.sharding_of(
        "conv_in/kernel", (3, 3, 3, 3200), abstract_mesh(tensor=1)
    ).spec == PartitionSpec(None, None, None, "fsdp")


def test_a_large_parameter_that_no_rule_places_is_an_error():
    with pytest.raises(
        ValueError,
        match=r"no partition rule names params/table \[1000, 1000\] \(4 MiB in float32\)",
    ):
        partition.sharding_of("params/table", (1000, 1000), abstract_mesh())
    with pytest.raises(
        ValueError, match=r"params/x/kernel \[333, 333\] .* does not divide over fsdp 4 x tensor 2"
    ):
        partition.sharding_of("params/x/kernel", (333, 333), abstract_mesh())
    own = partition.layout({"data": -1, "rules": (("table$", ()),)})
    assert own.rules[0] == ("table$", ())
    assert (
        partition.sharding_of("params/table", (1000, 1000), abstract_mesh(), own.rules).spec
        == PartitionSpec()
    )


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            {"data": 3, "fsdp": 1},
            r"the mesh \(data 3, fsdp 1, tensor 1\) does not divide the 1 devices",
        ),
        ({"data": -1, "fsdp": 2}, r"does not divide the 1 devices; make data x 2 = 1"),
        ({"data": -1, "fsdp": -1}, "-1 at most once"),
        ({"data": 0}, "must have positive sizes"),
        (
            {"rules": (("kernel$", ("rows",)),)},
            "names the axis 'rows'; choose fsdp, tensor or None",
        ),
        ({"rules": (("(kernel", ("fsdp",)),)}, "is not a regular expression"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(block, message):
    with pytest.raises(ValueError, match=message):
        partition.layout(block, devices=jax.devices()[:1])


def test_arrays_reach_the_mesh_and_come_back_in_their_bits():
    layout = partition.layout()
    tree = {"w": np.arange(6.0, dtype=np.float32), "key": jax.random.key(3)}
    back = partition.local(layout.place(tree))
    np.testing.assert_array_equal(back["w"], tree["w"])
    assert jnp.array_equal(jax.random.key_data(back["key"]), jax.random.key_data(tree["key"]))
    np.testing.assert_array_equal(partition.process_rows(layout.mesh, 6), np.arange(6))


BLOCKS = """
import json
import jax, jax.numpy as jnp, numpy as np
from flax import linen as nn
from jaxdistill import partition
from jaxdistill.costs.hlo import count
from jaxdistill.models.layers import Linear
from jaxdistill.models.blocks import run_blocks

class Block(nn.Module):
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x):
        wide = Linear(512, dtype=self.dtype, name="net.0.proj")(x)
        return x + Linear(128, dtype=self.dtype, name="net.2")(jnp.tanh(wide))

class Net(nn.Module):
    scan: bool = True

    @nn.compact
    def __call__(self, x):
        return run_blocks(Block, "blocks", range(6), x, (), scan=self.scan, remat="full")[0]

random = np.random.default_rng(0)
x = jnp.asarray(random.standard_normal((64, 128)), jnp.float32)
shapes = jax.eval_shape(Net().init, jax.random.key(0), x)
params = jax.tree.map(lambda a: 0.1 * random.standard_normal(a.shape, np.float32), shapes)
out = {}
for name, sizes in {"one": {}, "fsdp": {"fsdp": 8}, "both": {"fsdp": 4, "tensor": 2}}.items():
    mesh = partition.make_mesh(data=1, **sizes, devices=jax.devices()[: 8 if sizes else 1])
    layout = partition.Layout(mesh)

    def loss(params, x):
        params = layout.gathered(params)
        with partition.on_mesh(layout):
            step = lambda x, _: (Net().apply(params, x), None)
            return jnp.mean(jax.lax.scan(step, x, None, length=2)[0] ** 2)

    places, rows = layout.of(params), partition.batch_sharding(mesh)
    options = {"in_shardings": (places, rows), "out_shardings": (None, places)}
    made = jax.jit(jax.value_and_grad(loss), **options)
    made = made.lower(params, x).compile()
    value, gradient = made(layout.place(params), jax.device_put(x, rows))
    counts = count(made.as_text())
    sums = [float(jnp.abs(a).sum()) for a in jax.tree.leaves(gradient)]
    largest = max([g.bytes for g in counts.gathers], default=0)
    temporaries = made.memory_analysis().temp_size_in_bytes
    out[name] = [float(value), sums, counts.flops, largest, temporaries]
print(json.dumps(out))
"""


def test_stacked_blocks_are_gathered_one_at_a_time():
    """Their values, gradients and cost are those of one device, and no more than one block is
    whole: a network of 12B does not fit a chip.
    """
    run = subprocess.run(
        [sys.executable, "-c", BLOCKS],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=quick("--xla_force_host_platform_device_count=8"),
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    value, sums, cost, _, _ = found["one"]
    block = 4 * 2 * 128 * 512  # of six
    for name in ("fsdp", "both"):
        assert found[name][0] == pytest.approx(value, rel=1e-5)
        assert found[name][1] == pytest.approx(sums, rel=1e-4)
        assert found[name][2] * 8 == pytest.approx(cost, rel=0.05)
        assert 0 < found[name][3] <= block / 2
        assert found[name][4] < 4 * block
