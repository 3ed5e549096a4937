"""Attention kernels are one function, in value and gradient; so are convolutions; and rows share
what they can.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.extend.core import jaxprs_in_params

from jaxdistill.models.attention import (
    ATTENTION,
    auto_attention,
    chunked_attention,
    flash_attention,
    looped_attention,
    plain_attention,
)
from jaxdistill.models.layers import Conv, convolution, doubled_convolution, nearest
from jaxdistill.models.stable_diffusion.unet_condition import UNetCondition

KERNELS = {
    "looped": lambda q, k, v, mask: looped_attention(q, k, v, mask, scores=64 * k.shape[1]),
    "auto": auto_attention,
    "chunked": lambda q, k, v, mask: chunked_attention(q, k, v, mask, queries=100),
    "flash": flash_attention,
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("length", "context"), [(256, 256), (263, 263), (140, 300), (256, 7)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_attention_is_the_plain_one(kernel, length, context, masked, monkeypatch):
    """In value and gradient, of lengths that divide by nothing as well."""
    interpreted = functools.partial(splash.make_splash_mha_single_device, interpret=True)
    monkeypatch.setattr(splash, "make_splash_mha_single_device", interpreted)
    keys = jax.random.split(jax.random.key(0), 5)
    q, w = (jax.random.normal(key, (2, length, 2, 8)) for key in keys[:2])
    k, v = (2.0 * jax.random.normal(key, (2, context, 2, 8)) for key in keys[2:4])
    mask = None
    if masked:  # the second row sees nothing of a whole tile, and only its last keys
        mask = jax.random.bernoulli(keys[4], 0.5, (2, context)).at[1, : context - 5].set(False)
        mask = mask.at[:, -1].set(True)

    def values(attend):
        def weighted(*qkv):
            return jnp.sum(w * attend(*qkv, mask))

        return jax.jit(jax.value_and_grad(weighted, (0, 1, 2)))(q, k, v)

    value, gradient = values(KERNELS[kernel])
    expected, expected_gradient = values(plain_attention)
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-3)
    for a, b in zip(gradient, expected_gradient, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("kernel", ["looped", "chunked", "flash"])
def test_no_attention_holds_all_scores_of_a_length_that_divides_by_nothing(kernel):
    """4,429: the tokens of SD 3 at 1024²."""
    q = jax.ShapeDtypeStruct((1, 4429, 1, 64), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(jax.grad(lambda q: ATTENTION[kernel](q, q, q).sum().astype(float)))(q)

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (v.aval.size for v in equation.outvars)
            for inner in jaxprs_in_params(equation.params):
                yield from sizes(inner)

    assert max(sizes(jaxpr.jaxpr)) < 4429**2 / 2


def test_the_kernel_is_chosen_where_the_program_is_compiled_for():
    q = jax.ShapeDtypeStruct((1, 512, 2, 8), jnp.float32)
    lowered = {
        name: jax.jit(auto_attention).trace(q, q, q).lower(lowering_platforms=(name,)).as_text()
        for name in ("cpu", "tpu")
    }
    assert "while" in lowered["cpu"] and "while" not in lowered["tpu"]


def test_nearest_rounds_as_torch_does():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).standard_normal((1, 5, 7, 2), np.float32)
    for size in ((10, 14), (9, 13), (11, 7)):
        expected = torch.nn.functional.interpolate(
            torch.tensor(x.transpose(0, 3, 1, 2)), size=size, mode="nearest"
        )
        np.testing.assert_array_equal(
            nearest(jnp.asarray(x), size), expected.numpy().transpose(0, 2, 3, 1)
        )


def gradients(f, *args):
    """Values and gradients of sum(w f), w random."""
    w = jax.random.normal(jax.random.key(9), jax.eval_shape(f, *args).shape)
    return jax.jit(
        jax.value_and_grad(
            lambda *args: jnp.sum(w * f(*args).astype(jnp.float32)), tuple(range(len(args)))
        )
    )(*args)


def assert_same(f, g, *args, rtol):
    (value, grads), (expected, expected_grads) = gradients(f, *args), gradients(g, *args)
    np.testing.assert_allclose(value, expected, rtol=rtol, atol=rtol * 10)
    for a, b in zip(grads, expected_grads, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(
            a.astype(jnp.float32), b.astype(jnp.float32), atol=rtol * float(jnp.abs(b).max())
        )


def xla(x, kernel, stride=1, pads=((0, 0), (0, 0))):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("size", "stride", "pads"),
    [
        ((3, 3), 1, ((1, 1), (1, 1))),
        ((1, 1), 1, ((0, 0), (0, 0))),
        ((2, 3), 1, ((0, 1), (2, 0))),
        ((3, 3), 2, ((0, 1), (0, 1))),
    ],
)
def test_the_convolution_and_its_gradients_are_xlas(size, stride, pads, dtype):
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (3, 6, 10, 5), dtype)
    kernel = jax.random.normal(keys[1], (*size, 5, 7), dtype)
    rtol = 1e-5 if dtype == jnp.float32 else 2e-2
    assert_same(
        lambda x, k: convolution(x, k, stride=stride, pads=pads),
        lambda x, k: xla(x, k, stride, pads),
        x,
        kernel,
        rtol=rtol,
    )


@pytest.mark.parametrize(("height", "width"), [(6, 4), (1, 5), (1, 1)])
def test_a_convolution_of_doubled_states_is_the_one_after_a_resize(height, width):
    keys = jax.random.split(jax.random.key(0), 2)
    x, kernel = (
        jax.random.normal(keys[0], (2, height, width, 5)),
        jax.random.normal(keys[1], (3, 3, 5, 7)),
    )
    both = ((1, 1), (1, 1))
    assert_same(
        doubled_convolution,
        lambda x, k: xla(nearest(x, (2 * height, 2 * width)), k, 1, both),
        x,
        kernel,
        rtol=1e-5,
    )


def test_kernels_of_few_bits_are_added_up_in_float32():
    x, kernel = (
        jnp.ones((1, 3, 3, 1)),
        jax.random.normal(jax.random.key(0), (3, 3, 1, 1), jnp.bfloat16),
    )
    exact = doubled_convolution(x, kernel.astype(jnp.float32))
    np.testing.assert_array_equal(doubled_convolution(x, kernel), exact)


def test_a_convolution_of_doubled_states_takes_four_ninths_of_the_multiplications():
    x, kernel = (
        jax.ShapeDtypeStruct((1, 32, 32, 16), jnp.float32),
        jax.ShapeDtypeStruct((3, 3, 16, 16), jnp.float32),
    )

    def flops(f):
        return jax.jit(f).lower(x, kernel).compile().cost_analysis()["flops"]

    whole = flops(lambda x, k: xla(nearest(x, (64, 64)), k, 1, ((1, 1), (1, 1))))
    assert (
        0.42 < flops(doubled_convolution) / whole < 0.49
    )  # the padding's rows are computed as well


@pytest.mark.costly
@pytest.mark.parametrize("shape", [(1, 5, 7, 4), (2, 4, 4, 4)])
def test_a_layer_resizes_before_it_convolves_with_low_rank_updates_too(shape):
    layer, x = Conv(6), jax.random.normal(jax.random.key(0), shape)
    params = layer.init(jax.random.key(1), x)
    updates = {
        "down": jax.random.normal(jax.random.key(2), (3, 3, 4, 2)),
        "up": jax.random.normal(jax.random.key(3), (1, 1, 2, 6)),
    }
    for variables in (params, {**params, "lora": updates}):
        for size in ((2 * shape[1], 2 * shape[2]), (2 * shape[1] - 1, 2 * shape[2])):
            got, expected = (
                layer.apply(variables, x, size),
                layer.apply(variables, nearest(x, size)),
            )
            assert got.shape == (shape[0], *size, 6)
            np.testing.assert_allclose(got, expected, atol=1e-4)


SMALL = {"channels": (16, 32), "layers": (1, 1), "heads": (2, 2), "groups": 8}
UNETS = {
    "1.x": UNetCondition(depth=(1, 0), depth_up=(1, 0), **SMALL),
    "first level without attention": UNetCondition(depth=(0, 1), depth_up=(0, 1), **SMALL),
    "xl": UNetCondition(
        depth=(0, 2), depth_up=(0, 2), mid_depth=2, addition_time_width=8, scan=True, **SMALL
    ),
    "deep": UNetCondition(depth=(2, 0), depth_up=(2, 0), remat="full", **SMALL),
    "deep, scanned": UNetCondition(depth=(2, 0), depth_up=(2, 0), scan=True, **SMALL),
}


@pytest.mark.costly
@pytest.mark.parametrize("name", UNETS)
def test_rows_of_conditioning_for_one_state_share_what_does_not_depend_on_them(name):
    unet, r = UNETS[name], np.random.default_rng(0)
    x, t = (jnp.asarray(r.standard_normal(s, np.float32)) for s in ((2, 16, 16, 4), (2,)))
    cond = {"context": jnp.asarray(r.standard_normal((4, 7, 12), np.float32))}
    if unet.addition_time_width:
        cond |= {
            "pooled": jnp.asarray(r.standard_normal((4, 6), np.float32)),
            "time_ids": jnp.asarray(r.integers(8, 64, (4, 6))),
        }
    first = jax.tree.map(lambda a: a[::2], cond)
    shapes = jax.eval_shape(unet.init, jax.random.key(0), x, t, first)
    params = jax.tree.map(lambda a: 0.2 * r.standard_normal(a.shape, np.float32), shapes)

    def shared(params, x):
        return unet.apply(params, x, t, cond)

    def repeated(params, x):
        return unet.apply(params, jnp.repeat(x, 2, axis=0), jnp.repeat(t, 2), cond)

    programs = [jax.jit(f).lower(params, x).compile() for f in (shared, repeated)]
    np.testing.assert_allclose(*(program(params, x) for program in programs), atol=2e-5)
    cost = [program.cost_analysis()["flops"] for program in programs]
    assert cost[0] < cost[1]
