"""The cost of a training step, counted by the compiler: no hidden network call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import NESTED, SHAPE, flash, make, make_adversary, network

from jaxdistill.methods.endpoint import endpoint
from jaxdistill.methods.imagine_flash import Reconstruction

B, N, K, WIDTH = 32, 3, 2, 256


@pytest.fixture
def unrolled(monkeypatch):
    """Cost analysis counts a loop's body once: run `lax.scan` as a Python loop."""

    def scan(body, carry, xs, unroll=False):
        outs = []
        for i in range(len(jax.tree.leaves(xs)[0])):
            carry, out = body(carry, jax.tree.map(lambda a, i=i: a[i], xs))
            outs.append(out)
        return carry, jax.tree.map(lambda *a: jnp.stack(a), *outs)

    monkeypatch.setattr(jax.lax, "scan", scan)


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def units(model, params):
    """FLOPs of one call on n examples, forward and forward + backward."""

    def call(p, x, cotangent):
        return jnp.sum(
            model.apply(p, x, jnp.full(len(x), 0.5), jnp.zeros(len(x), jnp.int32)) * cotangent
        )

    x = jnp.ones((B, *SHAPE))
    forward = flops(
        lambda p, x: model.apply(p, x, jnp.full(len(x), 0.5), jnp.zeros(len(x), jnp.int32)),
        params,
        x,
    )
    return forward, flops(jax.grad(call), params, x, x)


@pytest.mark.costly
@pytest.mark.parametrize("scale", [1.0, 1.5])
@pytest.mark.parametrize("with_adversary", [False, True])
def test_whole_trajectory_costs_what_it_must(unrolled, scale, with_adversary):
    model, params = make(WIDTH, 2)
    forward, forward_backward = units(model, params)
    guided = 2 if scale != 1.0 else 1
    expected = N * forward_backward + N * K * guided * forward
    adversary, heads = make_adversary(model) if with_adversary else (None, {})
    data = {"x0": jnp.ones((B, *SHAPE)), "cond": jnp.zeros(B, jnp.int32)}
    if adversary is not None:

        def terms(heads, fake, teacher, data, key):
            out = adversary(
                heads, teacher, fake, jnp.tile(data["cond"], N), data["x0"], data["cond"], key
            )
            return out.generator + out.discriminator

        expected += flops(
            jax.grad(terms, argnums=(0, 1)),
            heads,
            jnp.ones((N * B, *SHAPE)),
            params,
            data,
            jax.random.key(0),
        )
    loss_fn = flash(
        model, adversary=adversary, reconstruction=Reconstruction(steps=K, guidance_scale=scale)
    )
    measured = flops(
        jax.grad(lambda p, t, b, k: loss_fn(p, t, b, k)[0]),
        {"student": params, "discriminator": heads},
        params,
        data,
        jax.random.key(0),
    )
    np.testing.assert_allclose(measured / expected, 1.0, atol=0.02)


def test_one_random_step_costs_the_rollout_one_update_and_its_target(unrolled):
    model, params = make(WIDTH, 2)
    forward, forward_backward = units(model, params)
    loss_fn = flash(model, whole_trajectory=False, reconstruction=Reconstruction(steps=K))
    data = {"x0": jnp.ones((B, *SHAPE)), "cond": jnp.zeros(B, jnp.int32)}
    measured = flops(
        jax.grad(lambda p, t, b, k: loss_fn(p, t, b, k)[0]),
        {"student": params},
        params,
        data,
        jax.random.key(0),
    )
    np.testing.assert_allclose(
        measured / ((N - 1) * forward + forward_backward + K * forward), 1.0, atol=0.02
    )


def test_one_step_from_several_costs_the_frozen_students_steps_and_one_update(unrolled):
    model, params = make(WIDTH, 2)
    forward, forward_backward = units(model, params)
    loss_fn = endpoint(network(model), grid=NESTED[N - 1])
    measured = flops(
        jax.grad(lambda p, t, b, k: loss_fn(p, t, b, k)[0]),
        {"student": params},
        params,
        {"x0": jnp.ones((B, *SHAPE)), "cond": jnp.zeros(B, jnp.int32)},
        jax.random.key(0),
    )
    np.testing.assert_allclose(measured / (N * forward + forward_backward), 1.0, atol=0.02)
