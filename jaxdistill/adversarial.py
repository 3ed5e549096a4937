"""The adversarial term: a discriminator of light heads on the frozen teacher's features at a random
noise level.

The paper adds a discriminator without saying which; this is the latent form of Sauer et al. 2024
(LADD): student images and reals are noised to a random time, the teacher's hidden states are the
features, and only the heads learn.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdistill.prediction import diffuse
from jaxdistill.sampling import Constrain, unconstrained
from jaxdistill.schedule import NoiseSchedule, training_time

FeatureFn = Callable[..., Sequence[Array]]
"""(params, x [b, ...], t [b], cond) -> hidden states, each [b, ...]."""

HeadsFn = Callable[..., Array]
"""(head_params, features, cond) -> logits [b, h]; high means real."""


class GanLoss(NamedTuple):
    """Losses of logits: discriminator(real, fake) and generator(fake), both scalars."""

    discriminator: Callable[[Array, Array], Array]
    generator: Callable[[Array], Array]


hinge = GanLoss(
    discriminator=lambda real, fake: (
        jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))
    ),
    generator=lambda fake: -jnp.mean(fake),
)
"""E max(0, 1 - D(x)) + E max(0, 1 + D(G)), and -E D(G) (Lim & Ye 2017)."""

non_saturating = GanLoss(
    discriminator=lambda real, fake: (
        jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake))
    ),
    generator=lambda fake: jnp.mean(jax.nn.softplus(-fake)),
)
"""E log(1 + e^{-D(x)}) + E log(1 + e^{D(G)}), and E log(1 + e^{-D(G)}) (Goodfellow et al. 2014)."""


class AdversarialTerms(NamedTuple):
    """generator pulls only on the student, discriminator only on the heads: their sum can be one
    loss.
    """

    generator: Array
    discriminator: Array
    metrics: dict[str, Array]


Adversary = Callable[..., AdversarialTerms]
"""(head_params, teacher_params, fake, fake_cond, real, real_cond, key) -> AdversarialTerms."""


def uniform_time(
    schedule: NoiseSchedule, low: float = 0.0, high: float = 1.0
) -> Callable[[Array, int], Array]:
    """(key, n) -> times [n] of `training_time`, uniform in (low T, high T]. Raises ValueError
    unless 0 <= low < high <= 1.
    """
    if not 0 <= low < high <= 1:
        raise ValueError(f"uniform_time needs 0 <= low < high <= 1, got {low:g} and {high:g}")
    low, high = low * schedule.T, high * schedule.T
    return lambda key, n: training_time(schedule, jax.random.uniform(key, (n,)), low, high)


def noised_features(
    features: FeatureFn,
    schedule: NoiseSchedule,
    params: Any,
    x: Array,
    eps: Array,
    t: Array,
    cond: Any,
) -> Sequence[Array]:
    """The hidden states of `features` for x [b, ...] noised by ε to the times t [b]."""
    return features(params, diffuse(schedule, x, eps, t), schedule.network_time(t), cond)


def players(
    heads: HeadsFn,
    head_params: Any,
    on_fake: Sequence[Array],
    on_real: Sequence[Array],
    fake_cond: Any,
    real_cond: Any,
    loss: GanLoss,
) -> AdversarialTerms:
    """Both losses of hidden states, the generator's with weight 1.

    The generator's reads the states through heads without gradient, the discriminator's through
    states without gradient. `on_real` must carry no gradient.
    """
    generator = loss.generator(heads(jax.lax.stop_gradient(head_params), on_fake, fake_cond))
    fake_logits = heads(head_params, jax.lax.stop_gradient(on_fake), fake_cond)
    real_logits = heads(head_params, on_real, real_cond)
    discriminator = loss.discriminator(real_logits, fake_logits)
    metrics = {
        "generator": generator,
        "discriminator": discriminator,
        "logit_real": jnp.mean(real_logits),
        "logit_fake": jnp.mean(fake_logits),
    }
    return AdversarialTerms(generator, discriminator, metrics)


def pair_states(first: Any, second: Any) -> list[Array]:
    """Two lists of hidden states [b, ..., c] -> one of [b, ..., 2c]: what the discriminator of a
    jump sees.
    """
    return [jnp.concatenate(pair, axis=-1) for pair in zip(first, second, strict=True)]


def adversary(
    features: FeatureFn,
    heads: HeadsFn,
    *,
    schedule: NoiseSchedule,
    weight: float,
    noise_time: Callable[[Array, int], Array],
    loss: GanLoss = hinge,
    constrain: Constrain = unconstrained,
) -> Adversary:
    """The adversarial term for a method.

    The teacher's features of the fakes are computed once: the generator's loss reads them through
    heads without gradient, the discriminator's through features without gradient.

    Args:
      features: the frozen teacher's hidden states.
      heads: the discriminator.
      schedule: the teacher's forward process.
      weight: factor of the generator's loss, > 0.
      noise_time: draws the noise level, e.g. `uniform_time`: times that the teacher was trained at.
      loss: `hinge` or `non_saturating`.
      constrain: sharding constraint put on every random batch.

    Raises:
      ValueError: weight is not above 0 (leave the adversary out instead).
    """
    if not weight > 0:
        raise ValueError(
            f"the adversarial weight must be above 0, got {weight}; pass no adversary to switch"
            " it off"
        )

    def terms(
        head_params: Any,
        teacher_params: Any,
        fake: Array,
        fake_cond: Any,
        real: Array,
        real_cond: Any,
        key: Array,
    ) -> AdversarialTerms:
        teacher_params = jax.lax.stop_gradient(teacher_params)

        def at_random_noise(x: Array, cond: Any, key: Array) -> Sequence[Array]:
            key_t, key_eps = jax.random.split(key)
            t = constrain(noise_time(key_t, x.shape[0]))
            return noised_features(
                features,
                schedule,
                teacher_params,
                x,
                constrain(jax.random.normal(key_eps, x.shape, x.dtype)),
                t,
                cond,
            )

        key_fake, key_real = jax.random.split(key)
        on_fake = at_random_noise(fake, fake_cond, key_fake)
        on_real = jax.lax.stop_gradient(at_random_noise(real, real_cond, key_real))
        found = players(heads, head_params, on_fake, on_real, fake_cond, real_cond, loss)
        return found._replace(generator=weight * found.generator)

    return terms
