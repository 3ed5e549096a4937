"""SDXL-Lightning (Lin et al. 2024, arXiv 2402.13929): progressive distillation whose distance is a
discriminator.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdistill.adversarial import FeatureFn, GanLoss, HeadsFn, non_saturating, pair_states, players
from jaxdistill.methods.recipe import Kit, Recipe, SamplerSpec, Stage
from jaxdistill.methods.step_distillation import step_distillation
from jaxdistill.methods.tdm import diffuse_on
from jaxdistill.model import Model
from jaxdistill.prediction import LossFn, diffuse
from jaxdistill.sampling import Constrain, ddim, divided_steps, rollout, start, unconstrained
from jaxdistill.schedule import training_time


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
    last stages, D looks at x_s diffused on to a random time up to s + spread (t - s).

    What differs from the paper: its discriminator trains the encoder of the teacher that it begins
    with, here that stays frozen. Its stages are 128 → 32 by squared error and 8, 4, 2, 1 by the
    discriminator, each first as a LoRA; here they are `Settings` and the weights those of the run.

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


@dataclass(frozen=True)
class Settings:
    """first: steps of the student that is trained by squared error, in `substeps` teacher steps
    each; counts: steps of the adversarial stages; first_share: of the budget.
    """

    learning_rate: float = 3e-4
    adversarial_learning_rate: float = 1e-5
    guidance: float = 1.0
    first: int = 16
    substeps: int = 4
    first_share: float = 0.25
    counts: Sequence[int] = (4, 2, 1)
    regression: float = 0.0


def recipe(kit: Kit, settings: Settings) -> Recipe:
    """Squared error with guidance down to `first` steps, then adversarial stages of `counts` steps.

    Each adversarial stage has a half that keeps the flow and a relaxed one. Raises ValueError.
    """
    counts = tuple(settings.counts)
    if not counts or any(a % b for a, b in itertools.pairwise((settings.first, *counts))):
        raise ValueError(
            "each of counts must divide the one before it, and the first one must divide first ="
            f" {settings.first}; got {counts}"
        )
    if not 0 < settings.first_share < 1:
        raise ValueError(f"first_share must be in (0, 1), got {settings.first_share:g}")
    squared = step_distillation(
        kit.network,
        kit.network,
        steps=settings.first,
        null_cond=kit.null_cond,
        guidance_scale=settings.guidance,
        substeps=settings.substeps,
        constrain=kit.constrain,
        unroll=kit.unroll,
    )
    stages = [
        Stage(
            f"{settings.first}",
            squared,
            kit.optimizers(settings.learning_rate),
            share=settings.first_share,
            data="images",
        )
    ]
    for i, count in enumerate(counts):
        larger = settings.first if i == 0 else counts[i - 1]
        smaller = counts[i + 1] if i + 1 < len(counts) else 0
        served = [n for n in kit.steps if smaller < n and (n <= count or i == 0)]
        share = (1 - settings.first_share) / (2 * len(counts))
        flow = adversarial_stage(kit, settings, count, larger // count, keep_flow=True)
        relaxed = adversarial_stage(kit, settings, count, larger // count, keep_flow=False)
        stages += [flow._replace(share=share), relaxed._replace(share=share, serves=served)]
    return Recipe(stages, SamplerSpec())


def adversarial_stage(
    kit: Kit, settings: Settings, count: int, substeps: int, *, keep_flow: bool
) -> Stage:
    """One half of what trains the student of `count` steps, `substeps` of the teacher's each."""
    loss = lightning(
        kit.network,
        kit.network,
        steps=count,
        features=kit.features,
        heads=kit.heads,
        substeps=substeps,
        keep_flow=keep_flow,
        regression=settings.regression,
        constrain=kit.constrain,
        unroll=kit.unroll,
    )
    return Stage(
        f"{count}-{'flow' if keep_flow else 'relaxed'}",
        loss,
        kit.optimizers(settings.adversarial_learning_rate, discriminator=True),
        teacher="both",
        data="images",
        pair_states=keep_flow,
    )
