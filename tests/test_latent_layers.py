"""Attention kernels are one function, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.models.latent_layers import auto_attention, looped_attention, nearest, plain_attention


@pytest.mark.parametrize(("length", "context"), [(256, 256), (300, 300), (256, 7), (263, 263)])
def test_looped_attention_is_the_plain_one(length, context):
    keys = jax.random.split(jax.random.key(0), 4)
    q, w = (jax.random.normal(key, (2, length, 3, 8)) for key in keys[:2])
    k, v = (2.0 * jax.random.normal(key, (2, context, 3, 8)) for key in keys[2:])

    def looped(q, k, v):
        return looped_attention(q, k, v, scores=64 * context)

    values = [jax.jit(jax.value_and_grad(lambda *qkv, f=f: jnp.sum(w * f(*qkv)), (0, 1, 2)))(q, k, v) for f in (looped, plain_attention)]
    np.testing.assert_allclose(values[0][0], values[1][0], rtol=1e-4, atol=1e-3)
    for a, b in zip(values[0][1], values[1][1], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_the_kernel_is_chosen_where_the_program_is_compiled_for():
    q = jax.ShapeDtypeStruct((1, 512, 2, 8), jnp.float32)
    lowered = {name: jax.jit(auto_attention).trace(q, q, q).lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "tpu")}
    assert "while" in lowered["cpu"] and "while" not in lowered["tpu"]


def test_nearest_rounds_as_torch_does():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).standard_normal((1, 5, 7, 2), np.float32)
    for size in ((10, 14), (9, 13), (11, 7)):
        expected = torch.nn.functional.interpolate(torch.tensor(x.transpose(0, 3, 1, 2)), size=size, mode="nearest")
        np.testing.assert_array_equal(nearest(jnp.asarray(x), size), expected.numpy().transpose(0, 2, 3, 1))
