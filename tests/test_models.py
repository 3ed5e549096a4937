import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.models.mlp import ResidualMLP
from jaxdistill.models.unet import SmallUNet


@pytest.mark.parametrize("model", [ResidualMLP(32, 2), SmallUNet((16, 16), 1, 2)])
def test_a_fresh_model_is_zero_and_a_trained_one_sees_image_time_and_class(model):
    x, t, cond = jnp.ones((2, 8, 8, 1)), jnp.asarray([0.3, 0.3]), jnp.asarray([1, 1])
    params = model.init(jax.random.key(0), x, t, cond)
    assert not np.any(model.apply(params, x, t, cond))
    leaves, tree = jax.tree.flatten(params)
    params = tree.unflatten([a + 0.05 * jax.random.normal(jax.random.key(i), a.shape) for i, a in enumerate(leaves)])
    base = model.apply(params, x, t, cond)
    assert base.shape == x.shape
    for changed in ((2 * x, t, cond), (x, t + 0.2, cond), (x, t, cond + 1), (x, t, model.null_cond(cond))):
        assert np.abs(model.apply(params, *changed) - base).max() > 1e-4
    states = model.apply(params, x, t, cond, features=True)
    assert len(states) >= 2 and all(s.shape[0] == 2 for s in states)


def test_unet_names_the_sides_it_can_take():
    with pytest.raises(ValueError, match="multiples of 4, got 6x6"):
        SmallUNet((8, 8), 1, 2).init(jax.random.key(0), jnp.ones((1, 6, 6, 1)), jnp.ones(1), jnp.zeros(1, jnp.int32))
