import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import COSINE, batch, make, make_adversary

from jaxdistill import adversarial


def test_losses_have_their_closed_forms():
    real, fake = jnp.asarray([2.0, 0.0]), jnp.asarray([-3.0, 1.0])
    np.testing.assert_allclose(adversarial.hinge.discriminator(real, fake), 0.5 + 1.0)
    np.testing.assert_allclose(adversarial.hinge.generator(fake), 1.0)
    np.testing.assert_allclose(
        adversarial.non_saturating.generator(jnp.zeros(3)), np.log(2), rtol=1e-6
    )
    np.testing.assert_allclose(
        adversarial.non_saturating.discriminator(jnp.zeros(3), jnp.zeros(3)),
        2 * np.log(2),
        rtol=1e-6,
    )


def test_each_term_pulls_on_its_own_player_only():
    model, teacher = make()
    made, heads = make_adversary(model)
    data = batch()

    def term(name):
        return jax.grad(
            lambda h, f, t: getattr(
                made(h, t, f, data["cond"], data["x0"], data["cond"], jax.random.key(0)), name
            ),
            argnums=(0, 1, 2),
        )

    on_heads, on_fake, on_teacher = term("generator")(heads, data["x0"] + 1, teacher)
    assert not any(np.any(g) for g in jax.tree.leaves((on_heads, on_teacher))) and np.any(on_fake)
    on_heads, on_fake, on_teacher = term("discriminator")(heads, data["x0"] + 1, teacher)
    assert not any(np.any(g) for g in jax.tree.leaves((on_fake, on_teacher))) and any(
        np.any(g) for g in jax.tree.leaves(on_heads)
    )


def test_generator_moves_toward_the_reals():
    """Features are the noised image: the mean of the fakes must go to the mean of the reals."""
    made = adversarial.adversary(
        lambda p, x, t, c: [x],
        lambda h, f, c: (f[0] @ h["w"] + h["b"])[:, None],
        schedule=COSINE,
        weight=1.0,
        noise_time=adversarial.uniform_time(COSINE, 0.0, 0.3),
    )
    heads, mean = {"w": jnp.zeros(2), "b": jnp.zeros(())}, jnp.zeros(2)

    @jax.jit
    def update(heads, mean, key):
        def both(heads, mean):
            keys = jax.random.split(key, 3)
            fake, real = (
                mean + jax.random.normal(keys[0], (128, 2)),
                jnp.asarray([1.0, -2.0]) + jax.random.normal(keys[1], (128, 2)),
            )
            out = made(heads, {}, fake, None, real, None, keys[2])
            return (
                out.generator
                + out.discriminator
                + 0.05 * sum(jnp.sum(h**2) for h in jax.tree.leaves(heads)),
                out.metrics,
            )

        (on_heads, on_mean), metrics = jax.grad(both, argnums=(0, 1), has_aux=True)(heads, mean)
        return (
            jax.tree.map(lambda h, g: h - 0.05 * g, heads, on_heads),
            mean - 0.02 * on_mean,
            metrics,
        )

    for i in range(1500):
        heads, mean, metrics = update(heads, mean, jax.random.key(i))
        if i == 50:
            assert metrics["logit_real"] > metrics["logit_fake"]
    np.testing.assert_allclose(mean, [1.0, -2.0], atol=0.4)


def test_a_weight_of_zero_is_refused():
    with pytest.raises(ValueError, match="pass no adversary"):
        make_adversary(make()[0], weight=0.0)
