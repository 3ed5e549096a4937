"""FLOPs counted from jaxprs: laws, windows one by one, and XLA's own count where no loop is."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec

from jaxdistill.costs.flops import flops_of


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def dot(a, b):
    return a @ b


X, W = shape(8, 16), shape(16, 16)
ONE = 2 * 8 * 16 * 16


def test_products_count_two_for_each_multiply_add():
    assert flops_of(dot, shape(3, 5), shape(5, 7)) == 2 * 3 * 5 * 7
    assert flops_of(dot, np.ones((3, 5)), shape(5, dtype=jnp.bfloat16)) == 2 * 3 * 5
    scores = partial(jnp.einsum, "bqhd,bkhd->bhqk")
    assert flops_of(scores, shape(2, 7, 3, 5), shape(2, 11, 3, 5)) == 2 * 2 * 3 * 7 * 11 * 5
    assert flops_of(lambda x: jnp.tanh(x) * jnp.sum(x), X) == 0


@given(
    size=st.integers(1, 5),
    stride=st.integers(1, 4),
    low=st.integers(-3, 6),
    high=st.integers(-3, 6),
    left=st.integers(1, 4),
    right=st.integers(1, 3),
    width=st.integers(1, 6),
)
def test_a_convolution_counts_the_pairs_that_meet(size, stride, low, high, left, right, width):
    padded = (width - 1) * left + 1 + low + high
    assume(padded >= 0)  # JAX refuses to take away more than there is
    positions = max(0, (padded - (size - 1) * right - 1) // stride + 1)
    met = [o * stride - low + k * right for k in range(size) for o in range(positions)]
    expected = sum(i % left == 0 and 0 <= i // left < width for i in met)

    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (stride,), [(low, high)], lhs_dilation=(left,), rhs_dilation=(right,)
        )

    assert flops_of(convolve, shape(2, 3, width), shape(5, 3, size)) == 2 * 2 * 3 * 5 * expected


def conv(x, w, stride=1, padding="SAME", **options):
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )


def attend(q, k, v):
    return jnp.einsum("bhqk,bkhd->bqhd", jnp.einsum("bqhd,bkhd->bhqk", q, k), v)


IMAGE, KERNEL = shape(2, 16, 16, 128), shape(3, 3, 128, 192)
WITHOUT_LOOPS = {
    "dot": (dot, [shape(64, 96), shape(96, 32)]),
    "attention": (attend, [shape(2, 24, 3, 40), shape(2, 17, 3, 40), shape(2, 17, 3, 40)]),
    "convolution": (conv, [IMAGE, KERNEL]),
    "strided": (partial(conv, stride=2), [IMAGE, KERNEL]),
    "one-sided": (partial(conv, stride=2, padding=((0, 1), (0, 1))), [IMAGE, KERNEL]),
    "valid": (partial(conv, padding="VALID"), [IMAGE, KERNEL]),
    "cropped": (partial(conv, padding=((-1, 2), (3, -2))), [IMAGE, KERNEL]),
    "dilated": (partial(conv, rhs_dilation=(2, 3)), [IMAGE, KERNEL]),
    "resized": (partial(conv, padding=((2, 2), (1, 2)), lhs_dilation=(2, 2)), [IMAGE, KERNEL]),
    "grouped": (partial(conv, feature_group_count=4), [IMAGE, shape(3, 3, 32, 192)]),
}


def transposed(function, *shapes):
    """(arrays, cotangent) -> the cotangents of the arrays, and their shapes; all functions here are
    linear in each array, so there is no arithmetic but that of the function's transpose.
    """
    out = jax.eval_shape(function, *shapes)
    return lambda *a: jax.vjp(function, *a[:-1])[1](a[-1]), [*shapes, out]


@pytest.mark.parametrize("name", WITHOUT_LOOPS)
def test_without_loops_the_count_is_that_of_xla(name):
    function, shapes = WITHOUT_LOOPS[name]
    for f, arguments in ((function, shapes), transposed(function, *shapes)):
        expected = jax.jit(f).lower(*arguments).cost_analysis()["flops"]
        assert flops_of(f, *arguments) == pytest.approx(expected, rel=1e-6)


def test_a_batch_of_several_groups_divides_the_work():
    grouped = partial(conv, batch_group_count=2, padding="VALID")
    assert flops_of(grouped, shape(6, 4, 4, 2), shape(1, 1, 2, 8)) == 2 * 3 * 16 * 8 * 2


def layer(x, w):
    return jnp.tanh(x @ w)


def chain(x, ws, body=layer):
    return jax.lax.scan(lambda x, w: (body(x, w), None), x, ws)[0]


def unrolled(x, ws):
    for w in ws:
        x = layer(x, w)
    return x


def loss(x, *weights, run=chain):
    return jnp.sum(run(x, *weights) ** 2)


STACK = shape(5, 16, 16)


def test_a_scan_counts_its_body_as_often_as_it_runs():
    assert flops_of(chain, X, STACK) == 5 * ONE

    def nested(x, ws):
        return jax.lax.scan(lambda x, _: (chain(x, ws), None), x, None, length=3)[0]

    def counted(x, w):
        return jax.lax.fori_loop(2, 5, lambda i, x: layer(x, w), x)

    def mapped(x, ws):
        return jax.lax.map(lambda w: layer(x, w), ws)

    assert flops_of(nested, X, STACK) == 15 * ONE
    assert flops_of(counted, X, W) == 3 * ONE
    assert flops_of(mapped, X, STACK) == 5 * ONE


@pytest.mark.parametrize("run", [chain, unrolled])
def test_a_gradient_costs_two_more_but_the_first_inputs(run):
    """Forward, and backward to weights and inputs; the first layer's input has no gradient."""
    steps = partial(loss, run=run)
    first = 0 if run is chain else ONE  # a scan's body is the same in every round
    assert flops_of(jax.value_and_grad(steps, 1), X, STACK) == 15 * ONE - first
    assert flops_of(jax.jit(jax.value_and_grad(steps, (0, 1))), X, STACK) == 15 * ONE


def test_rematerialization_counts_what_is_computed_again():
    # Backward needs each layer's input and tanh: all products of a layer run again. Of two layers
    # the same, where both are saved together.
    again = partial(loss, run=partial(chain, body=jax.checkpoint(layer)))
    assert flops_of(jax.grad(again, (0, 1)), X, STACK) == 20 * ONE
    # A last product that is linear is not needed backward.
    linear = jax.checkpoint(lambda x, w: layer(x, w) @ w)
    again = partial(loss, run=partial(chain, body=linear))
    assert flops_of(jax.grad(again, (0, 1)), X, STACK) == 5 * (6 + 1) * ONE


def test_custom_derivatives_count_what_they_run():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, 0 * saved[1]))
    assert flops_of(product, X, W) == ONE
    assert flops_of(jax.value_and_grad(lambda *a: jnp.sum(product(*a)), (0, 1)), X, W) == 2 * ONE
    assert flops_of(lambda x, w: jax.nn.silu(jax.jit(dot)(x, w)), X, W) == ONE
    assert flops_of(lambda x, w: jax.nn.relu(dot(x, w)) + jax.jit(dot)(x, w), X, W) == 2 * ONE


def test_what_no_result_needs_does_not_count():
    assert flops_of(lambda x, w: (x @ w, 2 * x)[1], X, W) == 0
    assert flops_of(lambda x, w: jax.jit(lambda x, w: (x @ w, 2 * x))(x, w)[1], X, W) == 0


def test_of_branches_the_largest_counts():
    branches = [lambda x, w: x, lambda x, w: layer(layer(x, w), w), layer]
    assert flops_of(lambda i, x, w: jax.lax.switch(i, branches, x, w), 1, X, W) == 2 * ONE


def test_a_loop_that_data_end_is_refused_where_it_has_products():
    def until(body):
        return lambda x, w: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: body(x, w), x)

    assert flops_of(until(lambda x, w: x + w[0]), X, W) == 0
    with pytest.raises(ValueError, match=rf"^a while loop with {ONE} FLOPs per round cannot"):
        flops_of(until(layer), X, W)


def test_a_shard_map_counts_each_device():
    mesh = jax.sharding.AbstractMesh((2, 3), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    rows = PartitionSpec("a")
    split = partial(jax.shard_map, mesh=mesh, in_specs=(rows, PartitionSpec()))
    whole = split(dot, out_specs=rows, check_vma=False)
    assert flops_of(whole, X, W) == 3 * ONE  # half of the rows on each of 6
    part = split(dot, out_specs=rows, axis_names={"a"})
    assert flops_of(part, X, W) == ONE  # the compiler divides along the other axis


@pytest.mark.parametrize("estimate", [None, 1234])
def test_a_kernel_counts_what_it_declares_or_its_body_times_its_grid(estimate):
    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    cost = estimate and pl.CostEstimate(flops=estimate, transcendentals=0, bytes_accessed=0)
    run = pl.pallas_call(
        kernel,
        out_shape=X,
        grid=(4,),
        in_specs=[pl.BlockSpec((2, 16), lambda i: (i, 0)), pl.BlockSpec((16, 16))],
        out_specs=pl.BlockSpec((2, 16), lambda i: (i, 0)),
        cost_estimate=cost,
    )
    assert flops_of(run, X, W) == (estimate or ONE)
