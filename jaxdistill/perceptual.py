"""A perceptual distance without another network: two images in the frozen teacher's features at one random noise level.

LPIPS (Zhang et al. 2018) compares images in the features of a classifier. A diffusion teacher has features too, at every noise level
and for every caption, and needs no data of its own kind: ours, not in the paper of Imagine Flash.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdistill.adversarial import FeatureFn, noised_features
from jaxdistill.sampling import Constrain, unconstrained
from jaxdistill.schedule import NoiseSchedule

PerceptualDistance = Callable[..., Array]
"""(teacher_params, x0 [b, ...], target [b, ...], cond, key) -> distance of each pair [b]; the gradient reaches x0 alone."""


def perceptual_distance(
    features: FeatureFn,
    *,
    schedule: NoiseSchedule,
    noise_time: Callable[[Array, int], Array],
    constrain: Constrain = unconstrained,
) -> PerceptualDistance:
    """Mean over hidden states φ of |φ̄(q(x0, ε, τ)) - φ̄(q(y, ε, τ))|², φ̄ of zero mean and unit variance over channels.

    x0 and its target y are noised to the same τ by the same ε, so that the distance is 0 where they are equal. A high τ asks for
    the layout, a low one for detail.

    Args:
      features: the frozen teacher's hidden states.
      schedule: the teacher's forward process.
      noise_time: draws τ, within [0, T].
      constrain: sharding constraint put on every random batch.
    """

    def distance(teacher_params: Any, x0: Array, target: Array, cond: Any, key: Array) -> Array:
        teacher_params = jax.lax.stop_gradient(teacher_params)
        key_t, key_eps = jax.random.split(key)
        tau = constrain(noise_time(key_t, x0.shape[0]))
        eps = constrain(jax.random.normal(key_eps, x0.shape, x0.dtype))

        def states(x: Array) -> list[Array]:
            found = noised_features(features, schedule, teacher_params, x, eps, tau, cond)
            return [jax.nn.standardize(state, axis=-1, epsilon=1e-5) for state in found]

        pairs = zip(states(x0), jax.lax.stop_gradient(states(target)), strict=True)
        apart = [jnp.mean((a - b) ** 2, axis=tuple(range(1, a.ndim))) for a, b in pairs]
        return sum(apart, start=jnp.zeros(x0.shape[0])) / len(apart)

    return distance
