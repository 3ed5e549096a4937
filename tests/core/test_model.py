"""How trainable weights are stored: a tree of their own, or low-rank updates of a shared base."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from jaxdistill.model import full_weights, low_rank
from jaxdistill.models.layers import Linear
from jaxdistill.train import init_state

WIDTH = 64
KEY = jax.random.key(0)


class Net(nn.Module):
    """Two layers, of which one is a target of the updates."""

    @nn.compact
    def __call__(self, x):
        return Linear(WIDTH, name="out")(nn.silu(Linear(WIDTH, name="to_q")(x)))


NET = Net()
X = jax.random.normal(jax.random.key(1), (4, WIDTH))
BASE = NET.init(jax.random.key(2), X)
both = pytest.mark.parametrize("beside", [False, True])


def weights(beside, rank=2):
    return low_rank(KEY, ["to_q"], rank, beside=beside)


def trained(made, seed=3):
    """Updates after some training: of no zero."""
    fresh = made.fresh(BASE)
    leaves, tree = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten(
        [a + 0.3 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    )


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


@both
def test_low_rank_weights_begin_as_their_base(beside):
    made = weights(beside)
    fresh = made.fresh(BASE)
    assert set(fresh) == {"to_q"}  # no layer that is no target
    variables = made.variables(fresh, BASE)
    assert same(variables["params"], BASE["params"]) and same(made.merged(fresh, BASE), BASE)
    np.testing.assert_array_equal(NET.apply(variables, X), NET.apply(BASE, X))


@both
def test_low_rank_weights_merge_into_what_they_are_beside_their_base(beside):
    made, updates = weights(beside), trained(weights(beside))
    output = NET.apply(made.variables(updates, BASE), X)
    np.testing.assert_allclose(output, NET.apply(made.merged(updates, BASE), X), atol=1e-5)
    assert np.abs(output - NET.apply(BASE, X)).max() > 0.1
    # W + down up, and no more.
    kernel, update = BASE["params"]["to_q"]["kernel"], updates["to_q"]
    merged = made.merged(updates, BASE)["params"]
    expected = kernel + update["down"] @ update["up"]
    np.testing.assert_allclose(merged["to_q"]["kernel"], expected, atol=1e-6)
    assert same(merged["out"], BASE["params"]["out"])


@both
def test_low_rank_weights_alone_have_a_gradient(beside):
    made, updates = weights(beside), trained(weights(beside))

    def value(updates, base):
        return jnp.sum(NET.apply(made.variables(updates, base), X) ** 2)

    on_updates, on_base = jax.grad(value, argnums=(0, 1))(updates, BASE)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(on_updates))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(on_base))


def size(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_networks_of_low_rank_share_one_base_and_copy_nothing_of_it():
    """In a program that runs two of them, the base is one argument, and nothing of its size
    is made beside it.
    """
    made = weights(beside=True)
    networks = {name: trained(made, seed) for seed, name in enumerate(("student", "fake"))}

    def two(networks, base):
        return {name: made.variables(updates, base) for name, updates in networks.items()}

    jaxpr = jax.make_jaxpr(two)(networks, BASE).jaxpr
    assert {str(equation.primitive) for equation in jaxpr.eqns} == {"stop_gradient"}

    def loss(networks, base):
        seen = two(networks, base)
        return sum(jnp.mean(NET.apply(variables, X[:1]) ** 2) for variables in seen.values())

    compiled = jax.jit(jax.grad(loss)).lower(networks, BASE).compile().memory_analysis()
    assert compiled.argument_size_in_bytes < size(BASE) + 1.1 * size(networks)
    assert compiled.temp_size_in_bytes < BASE["params"]["to_q"]["kernel"].nbytes
    tx = {name: optax.adam(1e-3) for name in networks}
    state = init_state(networks, tx, KEY, ema_of=lambda params: params["student"])
    assert size((state.params, state.opt_state, state.ema_params)) < 0.5 * size(BASE)


def test_full_weights_are_a_copy_that_may_be_given_away():
    made = full_weights()
    fresh = made.fresh(BASE)
    assert same(fresh, BASE) and same(made.variables(fresh, None), BASE)
    assert same(made.merged(fresh, None), BASE)
    jax.jit(lambda tree: jax.tree.map(lambda a: a + 1, tree), donate_argnums=0)(fresh)
    assert np.isfinite(np.asarray(BASE["params"]["to_q"]["kernel"])).all()
    pointers = [
        {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}
        for tree in (made.fresh(BASE), BASE)
    ]
    assert not pointers[0] & pointers[1]


@pytest.mark.parametrize(
    ("targets", "rank", "message"),
    [
        (["to_k"], 2, "LoRA target 'to_k' matches no layer; the layers end in out, to_q"),
        (["to_("], 2, "is not a regular expression"),
        (["to_q"], 0, "the LoRA rank must be at least 1, got 0"),
    ],
)
def test_updates_that_cannot_be_are_refused(targets, rank, message):
    with pytest.raises(ValueError) as error:
        low_rank(KEY, targets, rank).fresh(BASE)
    assert message in str(error.value)
