"""A small class-conditional model and a loss built on it, shared by the tests of the method."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import adversarial, schedule
from jaxdistill.methods.imagine_flash import Reconstruction, imagine_flash
from jaxdistill.model import Model
from jaxdistill.models.discriminator import FeatureHeads, fresh_heads
from jaxdistill.models.small.mlp import ResidualMLP
from jaxdistill.prediction import v_prediction
from jaxdistill.run import phase
from jaxdistill.run.phase import Training
from jaxdistill.train import Objective

SHAPE = (4, 4, 1)
NESTED = [np.asarray((1.0, 0.6, 0.3)[:n], np.float32) for n in (1, 2, 3)]
COSINE = schedule.cosine()


@partial(jax.jit, static_argnums=0)
def trained(model, key, *inputs):
    """Parameters whose output is not the zero of a fresh network."""
    leaves, tree = jax.tree.flatten(model.init(key, *inputs))
    keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
    return tree.unflatten(
        [a + 0.05 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    )


@cache
def make(width=32, depth=2, seed=0):
    """(model, params)."""
    model = ResidualMLP(width, depth, 10, 1000.0)
    return model, trained(
        model, jax.random.key(seed), jnp.zeros((1, *SHAPE)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    )


def compiled(method):
    """The method, with its loss in one program: op by op, each of hundreds would be compiled by
    itself.
    """
    return lambda *networks, **options: jax.jit(method(*networks, **options))


def network(model):
    return Model(model.apply, COSINE, v_prediction)


def batch(size=6):
    return {
        "x0": jax.random.normal(jax.random.key(9), (size, *SHAPE)),
        "cond": jnp.arange(size) % 10,
    }


def flash(model, **options):
    options = {
        "grids": NESTED,
        "null_cond": model.null_cond,
        "reconstruction": Reconstruction(steps=2),
        **options,
    }
    return imagine_flash(network(model), network(model), **options)


def make_adversary(model, weight=0.1, **options):
    """(adversary, head parameters)."""
    heads = FeatureHeads(16)
    _, params = make(model.width, model.depth)
    features, labels = partial(model.apply, features=True), jnp.zeros(1, jnp.int32)
    made = adversarial.adversary(
        features,
        heads.apply,
        schedule=COSINE,
        weight=weight,
        noise_time=adversarial.uniform_time(COSINE),
        **options,
    )
    example = jnp.zeros((1, *SHAPE)), jnp.zeros(1), labels
    return made, fresh_heads(heads, jax.random.key(3), features, params, *example, cond=labels)


def ddim_step(x0, eps, s):
    return COSINE.alpha(s) * x0 + COSINE.sigma(s) * eps


@partial(jax.jit, static_argnums=0)
def predict(model, params, x, t, cond):
    """(x0, eps) of the v network at one time for the whole batch."""
    v = model.apply(params, x, jnp.full(len(x), t), cond)
    a, s = COSINE.alpha(t), COSINE.sigma(t)
    return a * x - s * v, s * x + a * v


def train(teacher, loss, tx, batches, *, steps, place):
    """The last state of a training in which the student starts as its teacher; without health
    numbers.
    """
    own = jax.tree.map(np.asarray, teacher)
    training = Training(
        name="student",
        objective=Objective(loss, tx),
        params=lambda: {"student": own},
        shapes={"student": teacher},
        key=jax.random.key(0),
        batches=batches,
        given=own,
        health=lambda averages, step: {},
        steps=steps,
        health_every=steps,
        ema_decay=0.9,
    )
    return phase.train(training, place).state
