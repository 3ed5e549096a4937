"""The card of an export: plain JSON names for model, schedule, prediction, grids and transforms,
and what they build.

Configs use the same blocks, so this is the one place where a name becomes a function.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array

from jaxdistill import prediction, sampling, schedule
from jaxdistill.errors import NotFinite, choose
from jaxdistill.models.small.mlp import ResidualMLP
from jaxdistill.models.small.text_unet import TextUNet
from jaxdistill.models.small.unet import SmallUNet

FORMAT = "jaxdistill-export/1"

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": ResidualMLP,
    "unet": SmallUNet,
    "text_unet": TextUNet,
}
PREDICTIONS = {
    "eps": (prediction.eps_prediction, prediction.eps_target),
    "v": (prediction.v_prediction, prediction.v_target),
    "x0": (prediction.x0_prediction, prediction.x0_target),
    "flow": (prediction.flow_prediction, prediction.flow_target),
}
BETAS = {
    "linear": schedule.linear_betas,
    "scaled_linear": schedule.scaled_linear_betas,
    "cosine_betas": schedule.cosine_betas,
}
SOLVERS = {"ddim": sampling.ddim, "dpm_solver_pp_2m": sampling.dpm_solver_pp_2m}
RENOISING = ("renoise", "consistency")
"""Students' solvers that draw fresh noise between steps; "consistency" reads the network as LCM's
f(x, t).
"""
GRIDS = {
    "trailing": sampling.trailing_grid,
    "leading": sampling.leading_grid,
    "linspace": sampling.linspace_grid,
}


def build_schedule(block: Mapping[str, Any]) -> schedule.NoiseSchedule:
    """{"name", "snr_scale", "zero_terminal_snr", "num_train_steps"} -> NoiseSchedule.

    Raises ValueError.
    """
    continuous = {"cosine": schedule.cosine, "flow": schedule.flow}
    name = block["name"]
    make = choose({**continuous, **BETAS}, name, "schedule.name")
    if name in continuous:
        built = make()
    else:
        betas = make(int(block["num_train_steps"]))
        built = schedule.ddpm(
            schedule.rescale_zero_terminal_snr(betas) if block["zero_terminal_snr"] else betas
        )
    if name == "flow" and block["snr_scale"] != 1.0:
        raise ValueError(
            "schedule.snr_scale needs a variance-preserving schedule, which 'flow' is not; leave it"
            " at 1.0"
        )
    return (
        built if block["snr_scale"] == 1.0 else schedule.shifted(built, float(block["snr_scale"]))
    )


def build_model(block: Mapping[str, Any]) -> nn.Module:
    """{"name", ...the module's attributes} -> Linen module.

    Raises ValueError for an unknown name.
    """
    attributes = {
        k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in block.items() if k != "name"
    }
    module: Any = choose(MODELS, block["name"], "model.name")
    known = [f.name for f in dataclasses.fields(module) if f.name not in ("parent", "name")]
    strangers = [k for k in attributes if k not in known]
    if strangers:
        raise ValueError(
            f"model {block['name']!r} has no setting {', '.join(strangers)}; it has"
            f" {', '.join(known)}"
        )
    for key, value in attributes.items():
        if not all(v > 0 for v in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"model.{key} must be above 0, got {value}")
    return module(**attributes)


def check_model(model: nn.Module, x: Any, cond: Any) -> Any:
    """Shapes of the model's parameters for inputs of these shapes ([1, ...]). Nothing is computed.

    Raises ValueError if it cannot take them, for a batch of any size, or does not give back x's
    shape.
    """

    def traced(x: Any, cond: Any) -> Any:
        t = jax.ShapeDtypeStruct(x.shape[:1], x.dtype)
        return jax.eval_shape(model.init_with_output, jax.random.key(0), x, t, cond)

    rows = jax.export.symbolic_shape("b")  # an export serves batches of any size
    free = jax.tree.map(lambda a: jax.ShapeDtypeStruct((*rows, *a.shape[1:]), a.dtype), (x, cond))
    try:
        out, params = traced(*free)
    except (TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        try:
            traced(x, cond)
        except (TypeError, ValueError) as cause:
            reason = str(cause).splitlines()[0]
            raise ValueError(
                f"the model does not take images of shape {x.shape[1:]}: {reason}"
            ) from None
        raise ValueError(
            f"the model must leave its batch open (x.shape[0], not len(x)): {reason}"
        ) from None
    if out.shape != free[0].shape:
        raise ValueError(
            f"the model returns shape {out.shape} for images of shape {free[0].shape}; it must keep"
            " the shape"
        )
    return params


def sampler_block(
    spec: sampling.SamplerSpec, *, steps: int, guidance: float = 1.0
) -> dict[str, Any]:
    """The "sampler" of a card."""
    return {
        "solver": spec.solver,
        "grid": spec.grid,
        "times": [list(t) if isinstance(t, (list, tuple)) else t for t in spec.times],
        "steps": steps,
        "guidance": guidance,
        "noise_correction": spec.noise_correction,
    }


def build_grid(block: Mapping[str, Any], steps: int, T: float) -> sampling.TimeGrid:
    """The grid for `steps` network calls of a sampler block {"grid", "times"}. Raises ValueError.

    "nested" takes the first `steps` of the block's times (fractions of T, first 1), so that a
    shorter sampler is the beginning of a longer one; "listed" takes the one of the block's lists of
    times that has `steps` of them. Past what these hold both fall back to the trailing grid. All
    times of a discrete schedule (T > 1) are integers.
    """
    discrete = T > 1

    def times_of(fractions: Any) -> sampling.TimeGrid:
        times = np.asarray(fractions, np.float32) * np.float32(T)
        return sampling.check_grid(np.round(times) if discrete else times, T)

    if block["grid"] == "nested":
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        times = times_of(block["times"])
        if steps <= len(times):
            return times[:steps]
    elif block["grid"] == "listed":
        for listed in block["times"]:
            if len(listed) == steps:
                return times_of(listed)
    else:
        return choose(GRIDS, block["grid"], "grid")(steps, T, discrete=discrete)
    return sampling.trailing_grid(steps, T, discrete=discrete)


NOT_FINITE = (
    "the network draws an image that is not finite (NaN or infinite); its guidance or steps leave"
    " what it was trained for, or its training has failed: choose others, or another export"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """Builds sampling programs from a card. Each is its own key of the programs that `draw`
    compiles.
    """

    model: nn.Module
    schedule: schedule.NoiseSchedule
    card: Mapping[str, Any]

    def denoiser(
        self,
        params: Any,
        noise: Array,
        cond: Any,
        guidance: float | Array,
        correct_noise: bool | Array,
    ) -> prediction.Denoiser:
        """The network with the card's transforms and the given ones, for one batch; `correct_noise`
        may be traced.
        """
        parameterization = PREDICTIONS[self.card["prediction"]][0]
        network = sampling.guided_denoiser(
            self.model.apply,
            params,
            cond,
            schedule=self.schedule,
            parameterization=parameterization,
            null_cond=self.model.null_cond,
            scale=guidance,
        )
        if self.card["sampler"]["solver"] == "consistency":
            network = sampling.boundary_function(self.schedule, parameterization)(network)
        if correct_noise is False:
            return network
        correct = sampling.noise_correction(noise, self.schedule.T)

        def denoiser(x: Array, t: Array) -> prediction.Prediction:
            found = network(x, t)
            corrected = correct(lambda *_: found)(x, t)
            return jax.tree.map(lambda a, b: jnp.where(correct_noise, a, b), corrected, found)

        return denoiser

    def step(self, noise: Array) -> sampling.Step:
        """The card's solver for the images that start from `noise`.

        Fresh noise is a function of an image's own start.
        """
        name = self.card["sampler"]["solver"]
        if name in SOLVERS:
            return SOLVERS[name](self.schedule)
        return sampling.renoise(self.schedule, sampling.keys_of(noise))

    def sample(
        self,
        params: Any,
        noise: Array,
        cond: Any,
        grid: Any,
        *,
        guidance: float,
        correct_noise: bool,
    ) -> Array:
        """Noise [b, h, w, c] standard normal, cond [b], grid [n] -> images like it in [0, 1]."""
        denoiser = self.denoiser(params, noise, cond, guidance, correct_noise)
        return to_unit(
            sampling.rollout(self.step(noise), denoiser, sampling.start(noise), grid)[0].x
        )

    # Not a jit in each call of `draw`: that would compile anew each time.
    _program = jax.jit(sample, static_argnums=0, static_argnames=("guidance", "correct_noise"))

    def visited(
        self, params: Any, noise: Array, cond: Any, grid: Any, *, correct_noise: bool
    ) -> Array:
        """The x̂0 at each state of one trajectory: [n, b, h, w, c] in [0, 1]; on nested grids,
        every shorter sampler's images.
        """
        denoiser = self.denoiser(params, noise, cond, 1.0, correct_noise)
        return to_unit(
            sampling.rollout(self.step(noise), denoiser, sampling.start(noise), grid)[1].x0
        )

    def draw(
        self,
        params: Any,
        conds: Any,
        *,
        seed: int,
        steps: int | None = None,
        guidance: float | None = None,
        noise_correction: bool | None = None,
        batch_size: int,
    ) -> np.ndarray:
        """Images float32 [n, h, w, c] in [0, 1] of n rows of conditioning; image i is a function of
        (seed, i) and its row.

        None takes the card's setting. Raises ValueError for a setting that the card cannot serve,
        NotFinite for an image that is not finite.
        """
        settings, num = self.card["sampler"], len(jax.tree.leaves(conds)[0])
        guidance = settings["guidance"] if guidance is None else guidance
        check_guidance(guidance)
        correct = settings["noise_correction"] if noise_correction is None else noise_correction
        grid = jnp.asarray(self.grid(settings["steps"] if steps is None else steps))
        program = partial(self._program, guidance=float(guidance), correct_noise=bool(correct))
        shape, block, images = tuple(self.card["data"]["image_shape"]), min(batch_size, num), []
        for i in range(0, num, block):
            rows = (
                np.arange(i, i + block) % num
            )  # the last block is filled up, so that one program serves all
            cond = jax.tree.map(lambda a, rows=rows: a[rows], conds)
            drawn = np.asarray(program(params, draw_noise(seed, i, block, shape), cond, grid))
            images.append(check_images(drawn))
        return np.concatenate(images)[:num]

    def grid(self, steps: int) -> sampling.TimeGrid:
        """The card's grid for `steps` calls."""
        return build_grid(self.card["sampler"], steps, self.schedule.T)


def build_sampler(card: Mapping[str, Any]) -> Sampler:
    """A card -> its Sampler.

    Raises ValueError where the card names what this version does not know.
    """
    if card.get("format") != FORMAT:
        raise ValueError(
            f"format {card.get('format')!r} is not {FORMAT!r}; the export was written by another"
            " version"
        )
    choose(PREDICTIONS, card["prediction"], "prediction")
    choose({**SOLVERS, **dict.fromkeys(RENOISING)}, card["sampler"]["solver"], "sampler.solver")
    return Sampler(build_model(card["model"]), build_schedule(card["schedule"]), card)


def check_guidance(scale: float, name: str = "guidance") -> None:
    """Raise ValueError, naming the setting, for a scale that is no number of at least 0."""
    if not np.isfinite(scale) or scale < 0:
        raise ValueError(f"{name} must be a number of at least 0, got {scale}")


def check_images(images: np.ndarray) -> np.ndarray:
    """The images of a network alone. Raises NotFinite."""
    if not np.isfinite(images).all():
        raise NotFinite(NOT_FINITE)
    return images


def to_unit(x: Array) -> Array:
    """[-1, 1] -> [0, 1], clipped."""
    return jnp.clip(x * 0.5 + 0.5, 0.0, 1.0)


def draw_noise(seed: int, start: int, count: int, image_shape: tuple[int, ...]) -> Array:
    """Standard normal [count, h, w, c]; image i depends on (seed, start + i) alone, not on the
    batch it is drawn in.
    """
    return _noise(
        np.uint32(seed % 2**32), np.arange(start, start + count, dtype=np.int32), image_shape
    )


def noise_of(seed: int | Array, rows: Array, image_shape: tuple[int, ...]) -> Array:
    """Standard normal [n, h, w, c] of the image numbers `rows` int [n], each a function of (seed,
    number).
    """
    key = jax.random.key(seed)
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), image_shape))(rows)


_noise = jax.jit(noise_of, static_argnums=2)  # one program, not one an operation
