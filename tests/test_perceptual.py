"""The perceptual distance: laws that hold for any features, and one by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from small import COSINE, SHAPE, batch, flash, make

from jaxdistill import adversarial
from jaxdistill.perceptual import perceptual_distance

KEY = jax.random.key(3)


def images(seed, size=4):
    return jax.random.normal(jax.random.key(seed), (size, *SHAPE))


def distance_of(model, low=0.1, high=0.6):
    features = lambda *inputs: model.apply(*inputs, features=True)  # noqa: E731
    return perceptual_distance(features, schedule=COSINE, noise_time=adversarial.uniform_time(low, high))


def test_distance_by_hand_zero_for_equal_images_and_in_each_row_alone():
    model, teacher = make()
    x, y, cond = images(0), images(1), jnp.arange(4)
    distance = jax.jit(distance_of(model))
    found = distance(teacher, x, y, cond, KEY)
    key_t, key_eps = jax.random.split(KEY)
    tau, eps = jax.random.uniform(key_t, (4,), minval=0.1, maxval=0.6), jax.random.normal(key_eps, x.shape)

    def states(x):
        a, s = (f(tau).reshape(4, 1, 1, 1) for f in (COSINE.alpha, COSINE.sigma))
        found = model.apply(teacher, a * x + s * eps, COSINE.network_time(tau), cond, features=True)
        return [(h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5) for h in found]

    expected = np.mean([((a - b) ** 2).reshape(4, -1).mean(1) for a, b in zip(states(x), states(y), strict=True)], axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert found.min() > 1e-3
    np.testing.assert_allclose(distance(teacher, x, x, cond, KEY), np.zeros(4), atol=1e-12)
    other = distance(teacher, x, y.at[2].set(x[2]), cond, KEY)
    np.testing.assert_allclose(other, found.at[2].set(0.0), rtol=1e-5, atol=1e-12)


def test_gradient_reaches_the_first_image_alone():
    model, teacher = make()
    distance = distance_of(model)
    gradients = jax.grad(lambda *inputs: jnp.sum(distance(*inputs, jnp.arange(4), KEY)), argnums=(0, 1, 2))(teacher, images(0), images(1))
    assert all(not np.any(g) for g in jax.tree.leaves((gradients[0], gradients[2])))
    assert np.abs(gradients[1]).max(axis=(1, 2, 3)).min() > 1e-4  # in every row


def test_it_is_added_to_the_loss_with_its_weight():
    model, teacher = make()
    _, student = make(seed=4)
    values = []
    for weight in (0.0, 1.0, 3.0):
        loss = flash(model, perceptual=distance_of(model), perceptual_weight=weight)
        values.append(jax.jit(loss)({"student": student}, teacher, batch(), KEY))
    plain, apart = values[0][0], values[0][1]["perceptual"]
    assert apart > 1e-3
    for (value, _), weight in zip(values, (0.0, 1.0, 3.0), strict=True):
        np.testing.assert_allclose(value, plain + weight * apart, rtol=1e-5)
