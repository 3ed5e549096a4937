import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.models.small.mlp import ResidualMLP
from jaxdistill.models.small.text_unet import AttentionPool, CrossAttention, TextUNet, places
from jaxdistill.models.small.unet import SmallUNet


@pytest.mark.costly
@pytest.mark.parametrize("model", [ResidualMLP(32, 2), SmallUNet((16, 16), 1, 2)])
def test_a_fresh_model_is_zero_and_a_trained_one_sees_image_time_and_class(model):
    x, t, cond = jnp.ones((2, 8, 8, 1)), jnp.asarray([0.3, 0.3]), jnp.asarray([1, 1])
    params = model.init(jax.random.key(0), x, t, cond)
    assert not np.any(model.apply(params, x, t, cond))
    leaves, tree = jax.tree.flatten(params)
    params = tree.unflatten(
        [a + 0.05 * jax.random.normal(jax.random.key(i), a.shape) for i, a in enumerate(leaves)]
    )
    base = model.apply(params, x, t, cond)
    assert base.shape == x.shape
    for changed in (
        (2 * x, t, cond),
        (x, t + 0.2, cond),
        (x, t, cond + 1),
        (x, t, model.null_cond(cond)),
    ):
        assert np.abs(model.apply(params, *changed) - base).max() > 1e-4
    states = model.apply(params, x, t, cond, features=True)
    assert len(states) >= 2 and all(s.shape[0] == 2 for s in states)


def test_unet_names_the_sides_it_can_take():
    with pytest.raises(ValueError, match="multiples of 4, got 6x6"):
        SmallUNet((8, 8), 1, 2).init(
            jax.random.key(0), jnp.ones((1, 6, 6, 1)), jnp.ones(1), jnp.zeros(1, jnp.int32)
        )


@pytest.fixture(scope="module")
def text_unet():
    """(model, params that are not fresh, x, t, cond); of the second caption three positions are
    padding.
    """
    model = TextUNet((16, 16), 1, 2, text_width=16)
    x, t = jax.random.normal(jax.random.key(2), (2, 8, 8, 3)), jnp.asarray([0.3, 0.6])
    mask = jnp.asarray([[True] * 5, [True, True, False, False, False]])
    cond = {"tokens": jax.random.normal(jax.random.key(3), (2, 5, 12)), "mask": mask}
    leaves, tree = jax.tree.flatten(model.init(jax.random.key(0), x, t, cond))
    params = tree.unflatten(
        [a + 0.05 * jax.random.normal(jax.random.key(i), a.shape) for i, a in enumerate(leaves)]
    )
    return model, params, x, t, cond


@pytest.mark.long
def test_text_unet_reads_the_tokens_that_its_mask_shows_and_no_others(text_unet):
    model, params, x, t, cond = text_unet
    base = model.apply(params, x, t, cond)
    assert base.shape == x.shape
    hidden = {**cond, "tokens": cond["tokens"].at[1, 2:, 0].add(7.0)}
    np.testing.assert_allclose(model.apply(params, x, t, hidden), base, atol=1e-5)
    for row in (0, 1):
        shown = {**cond, "tokens": cond["tokens"].at[row, 1, 0].add(3.0)}
        change = np.abs(model.apply(params, x, t, shown) - base).max(axis=(1, 2, 3))
        assert change[row] > 1e-3 and change[1 - row] < 1e-5


def test_text_unets_null_caption_is_the_same_for_every_caption(text_unet):
    model, params, x, t, cond = text_unet
    other = {"tokens": cond["tokens"][::-1] * 2, "mask": cond["mask"][::-1]}
    drawn = [model.apply(params, x, t, model.null_cond(c)) for c in (cond, other)]
    np.testing.assert_array_equal(*drawn)
    assert np.abs(drawn[0] - model.apply(params, x, t, cond)).max() > 1e-3


def test_places_tell_every_position_from_its_mirror_images():
    found = places(4, 6)
    assert found.shape == (4, 6, 6) and float(jnp.abs(found).max()) <= 1.0
    for mirrored in (found[::-1], found[:, ::-1]):
        assert float(jnp.abs(mirrored - found).max(axis=-1).min()) > 0.1
    # x and y alike: exchanging the axes exchanges their features.
    np.testing.assert_allclose(
        places(6, 4).transpose(1, 0, 2)[..., [1, 0, 4, 5, 2, 3]], found, atol=1e-6
    )


def test_cross_attention_asks_differently_at_different_places(text_unet):
    *_, cond = text_unet
    flat = jnp.ones((2, 4, 4, 8))  # nothing but the place tells its positions apart
    layer = CrossAttention()
    params = layer.init(jax.random.key(0), flat, cond["tokens"], cond["mask"])
    out = np.asarray(layer.apply(params, flat, cond["tokens"], cond["mask"]))
    assert np.abs(out - out[:, ::-1]).max() > 1e-3 and np.abs(out - out[:, :, ::-1]).max() > 1e-3


def test_attention_pool_keeps_what_a_mean_of_the_tokens_loses():
    tokens = jax.random.normal(jax.random.key(0), (1, 4, 8))
    moved = tokens.at[0, 0].add(1.0).at[0, 1].add(-1.0)  # of the same mean
    mask = jnp.ones((1, 4), bool)
    pool = AttentionPool(queries=2, heads=2)
    params = pool.init(jax.random.key(1), tokens, mask)
    first, second = (pool.apply(params, x, mask) for x in (tokens, moved))
    assert first.shape == (1, 16) and float(jnp.abs(first - second).max()) > 0.01
