"""Eight CPU devices against one, in a process of its own: values and compiled cost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxdistill import partition

SCRIPT = """
import json, sys
import jax, jax.numpy as jnp, optax
from functools import partial
sys.path.insert(0, "tests")
from jaxdistill import partition
from jaxdistill.sampling import unconstrained
from jaxdistill.train import init_state, train_step
from small import batch, flash, make

model, teacher = make(64, 2)
tx = optax.adam(1e-3)
def report(mesh, constrain):
    loss_fn = flash(model, constrain=constrain)
    step = partition.jit_train_step(partial(train_step, loss_fn=loss_fn, tx=tx, ema_decay=0.9), mesh)
    whole = partition.replicated(mesh)
    state = jax.device_put(init_state({"student": jax.tree.map(jnp.copy, teacher)}, tx, jax.random.key(0)), whole)
    data, fixed = partition.put_batch(batch(512), mesh), jax.device_put(teacher, whole)
    cost = step.lower(state, data, fixed).compile().cost_analysis()["flops"]
    losses = []
    for _ in range(5):
        state, metrics = step(state, data, fixed)
        losses.append(float(metrics["loss"]))
    return cost, losses, float(sum(jnp.sum(jnp.abs(a)) for a in jax.tree.leaves(state.params)))

eight = partition.data_mesh()
one = partition.make_mesh(devices=jax.devices()[:1])
out = [report(eight, partition.constrain_batch(eight)), report(one, partition.constrain_batch(one)), report(eight, unconstrained)]
print(json.dumps(out))
"""


@pytest.mark.slow
def test_eight_devices_compute_an_eighth_each_and_the_same_values():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=root, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    (cost, losses, total), (cost_one, losses_one, total_one), (cost_free, losses_free, _) = json.loads(run.stdout.splitlines()[-1])
    assert losses == pytest.approx(losses_one, rel=1e-5) and losses_free == pytest.approx(losses_one, rel=1e-5)
    assert total == pytest.approx(total_one, rel=1e-6)
    assert cost * 8 == pytest.approx(cost_one, rel=0.05)
    assert cost_free > 1.5 * cost  # what the constraint on the noise is for; no value shows it


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"config\.student\.batch_size = 0 must be"):
        partition.check_batch(0, partition.data_mesh(), "config.student.batch_size")
