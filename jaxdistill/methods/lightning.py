"""SDXL-Lightning (Lin et al. 2024, arXiv 2402.13929): progressive distillation whose distance is a
discriminator.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdistill.adversarial import FeatureFn, GanLoss, HeadsFn, non_saturating, players
from jaxdistill.methods.imagine_flash import Model
from jaxdistill.methods.tdm import diffuse_on
from jaxdistill.prediction import LossFn, diffuse
from jaxdistill.sampling import Constrain, ddim, divided_steps, rollout, start, unconstrained
from jaxdistill.schedule import training_time


def pair_states(first: Any, second: Any) -> list[Array]:
    """Two lists of hidden states [b, ..., c] -> one of [b, ..., 2c]: what the discriminator of a
    jump sees.
    """
    return [jnp.concatenate(pair, axis=-1) for pair in zip(first, second, strict=True)]


def lightning(
    student: Model,
    teacher: Model,
    *,
    steps: int,
    features: FeatureFn,
    heads: HeadsFn,
    substeps: int = 2,
    keep_flow: bool = True,
    spread: float = 0.75,
    regression: float = 0.0,
    gan: GanLoss = non_saturating,
    constrain: Constrain = unconstrained,
    unroll: bool = False,
) -> LossFn:
    """-log D for the student's one jump t -> s, where D tells it from the teacher's `substeps` from
    the same x_t.

    x_t = q(x_0, ε, t) at a time of the trailing grid of `steps`. With `keep_flow`, D sees x_t
    beside x_s, so that the teacher's own end of the jump is asked for; without it (the paper's
    relaxed second half of a stage) any x_s of the right distribution will do. As for the paper's
    last stages, D looks at x_s diffused on to a random time up to s + spread (t - s). Its features
    are the frozen original teacher's (the paper trains them too).

    Args:
      student: the network that learns.
      teacher: the student of the stage before, guidance distilled in.
      steps: of this stage's student.
      features: hidden states of the original network.
      heads: the discriminator, on `pair_states` with keep_flow and on plain states without.
      substeps: teacher steps for one of the student.
      keep_flow: see above.
      spread: see above, in [0, 1].
      regression: weight of ‖x_s^Θ - x_s^Φ‖² beside the adversarial loss; the paper's is 0 after the
        first stage.
      gan: the paper's loss is non-saturating.
      constrain: sharding constraint of random batches.
      unroll: as of `rollout`.

    Returns:
      loss(params, teacher_params, batch, key), params {"student", "discriminator"}, teacher_params
      {"previous", "original"}, batch {"x0", "cond"}.

    Raises:
      ValueError: steps or substeps below 1 or more than a discrete schedule has times, spread
        outside [0, 1], regression below 0.
    """
    if steps < 1 or substeps < 1 or not 0 <= spread <= 1 or regression < 0:
        raise ValueError(
            "lightning needs at least one step and one substep, spread in [0, 1] and regression >="
            f" 0, got {steps}, {substeps}, {spread:g} and {regression:g}"
        )
    schedule, step = student.schedule, ddim(student.schedule)
    table = jnp.asarray(divided_steps(schedule, steps, substeps))

    def loss(
        params: Any, teacher_params: Any, batch: Any, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        x0, cond = batch["x0"], batch["cond"]
        frozen = jax.lax.stop_gradient(teacher_params)
        keys = jax.random.split(key, 4)
        times = table[:, constrain(jax.random.randint(keys[0], x0.shape[:1], 0, steps))]
        t, s = times[0], times[-1]
        x_t = diffuse(schedule, x0, constrain(jax.random.normal(keys[1], x0.shape, x0.dtype)), t)

        def jump(model: Model, weights: Any, grid: Array) -> Array:
            denoiser = model.denoiser(weights, cond)
            return rollout(step, denoiser, start(x_t), grid, t_end=s, unroll=unroll)[0].x

        x_s = jump(student, params["student"], times[:1])
        target = jax.lax.stop_gradient(jump(teacher, frozen["previous"], times[:-1]))

        u = constrain(jax.random.uniform(keys[2], t.shape))
        tau = training_time(schedule, u, s, s + spread * (t - s))
        eps = constrain(jax.random.normal(keys[3], x0.shape, x0.dtype))

        def states(x: Array, at: Array) -> Any:
            return features(frozen["original"], x, schedule.network_time(at), cond)

        before = states(x_t, t) if keep_flow else None

        def seen(x: Array) -> Any:
            # The same noise and time for both: they differ by what the jump did.
            after = states(diffuse_on(schedule, x, eps, s, tau)[0], tau)
            return after if before is None else pair_states(after, before)

        on_fake, on_real = seen(x_s), seen(target)
        terms = players(heads, params["discriminator"], on_fake, on_real, cond, cond, gan)
        distance = jnp.mean((x_s - target) ** 2)
        return terms.generator + terms.discriminator + regression * distance, terms.metrics | {
            "distance": distance
        }

    return loss
