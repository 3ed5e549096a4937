"""A small class-conditional model and a loss built on it, shared by the tests of the method."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import adversarial, schedule
from jaxdistill.methods.imagine_flash import Model, Reconstruction, imagine_flash
from jaxdistill.models.discriminator import FeatureHeads
from jaxdistill.models.mlp import ResidualMLP
from jaxdistill.prediction import v_prediction

SHAPE = (4, 4, 1)
NESTED = [np.asarray((1.0, 0.6, 0.3)[:n], np.float32) for n in (1, 2, 3)]
COSINE = schedule.cosine()


def make(width=32, depth=2, seed=0):
    """(model, params) whose output is not the zero of a fresh network."""
    model = ResidualMLP(width, depth, 10, 1000.0)
    params = model.init(jax.random.key(seed), jnp.zeros((1, *SHAPE)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return model, tree.unflatten([a + 0.05 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)])


def network(model):
    return Model(model.apply, COSINE, v_prediction)


def batch(size=6):
    return {"x0": jax.random.normal(jax.random.key(9), (size, *SHAPE)), "cond": jnp.arange(size) % 10}


def flash(model, **options):
    options = {"grids": NESTED, "null_cond": model.null_cond, "reconstruction": Reconstruction(steps=2), **options}
    return imagine_flash(network(model), network(model), **options)


def make_adversary(model, weight=0.1, **options):
    """(adversary, head parameters)."""
    heads = FeatureHeads(16)
    _, params = make(model.width, model.depth)
    states = model.apply(params, jnp.zeros((1, *SHAPE)), jnp.zeros(1), jnp.zeros(1, jnp.int32), features=True)
    made = adversarial.adversary(
        lambda *inputs: model.apply(*inputs, features=True),
        heads.apply,
        schedule=COSINE,
        weight=weight,
        noise_time=adversarial.uniform_time(0.0, 1.0),
        **options,
    )
    return made, heads.init(jax.random.key(3), states, jnp.zeros(1, jnp.int32))


def ddim_step(x0, eps, s):
    return COSINE.alpha(s) * x0 + COSINE.sigma(s) * eps


def predict(model, params, x, t, cond):
    """(x0, eps) of the v network at one time for the whole batch."""
    v = model.apply(params, x, jnp.full(len(x), t), cond)
    a, s = COSINE.alpha(t), COSINE.sigma(t)
    return a * x - s * v, s * x + a * v
