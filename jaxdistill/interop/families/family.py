"""What differs between families of pipelines, as one object each."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array

from jaxdistill.interop import components, diffusers_scheduler, flow_scheduler
from jaxdistill.interop.clip_tokenizer import TextTokenizer
from jaxdistill.interop.diffusers_folder import Folder
from jaxdistill.interop.diffusers_scheduler import Scheduler
from jaxdistill.sampling import TimeGrid
from jaxdistill.schedule import NoiseSchedule

Encode = Callable[[Sequence[Any], Sequence[Array], Sequence[Array], int], dict[str, Array]]
"""(parameters, token ids [b, l], masks bool [b, l], layers left out) -> the conditioning; one of
the first three for each text encoder of a folder.
"""


class Family:
    """A family of pipelines whose networks are of one kind. This one has betas and an UNet's or a
    transformer's noise prediction; see also `FlowFamily`.

    Attributes:
      name: short.
      pipelines: classes of model_index.json.
      network: the component that is distilled.
      networks: its classes.
      encoders: {text encoder: its classes}, in diffusers' order.
      tokenizers: {tokenizer: its classes}, in the same order.
      optional: text encoders that a folder may lack, with their tokenizers.
      steps, guidance: defaults of the stock pipeline's call.
      unguided: the guidance scale of a stock pipeline that asks for none.
      text_dtype: in which conditioning is cached. T5's states leave float16's range.
      words: the length of "context" where there is no tokenizer to ask: of a plan.
      original: whether single files of it are read and written, and Kohya's LoRAs written.
      adapter: whether a LoRA is written as PEFT's adapter, too: stock pipelines load none.
      call: what a stock call must say to draw what is drawn here.
      negative: whether guidance leads away from a negative prompt.
    """

    name = ""
    pipelines: tuple[str, ...] = ()
    network = "transformer"
    networks: tuple[str, ...] = ()
    encoders: Mapping[str, tuple[str, ...]] = {}
    tokenizers: Mapping[str, tuple[str, ...]] = {}
    optional: tuple[str, ...] = ()
    steps = 50
    guidance = 7.5
    unguided = 1.0
    text_dtype: Any = jnp.bfloat16
    negative = True
    original = False
    adapter = False
    call: Mapping[str, Any] = {}
    xl = False
    words = 77

    # -- what a folder holds; all raise FolderError

    def network_module(self, config: Mapping[str, Any], where: Path, **options: Any) -> nn.Module:
        """The network of its config. `options`: attention, remat, scan, dtype."""
        raise NotImplementedError

    def vae_module(self, config: Mapping[str, Any], where: Path, **options: Any) -> nn.Module:
        """The autoencoder of its config. `options`: attention, dtype."""
        return components.vae_module(config, where, **options)

    def check_tokenizer(self, folder: Path) -> None:
        """Refuse a tokenizer's folder without its files."""
        components.check_clip_files(folder)

    def encoder_module(
        self, component: str, config: Mapping[str, Any], where: Path, *, dtype: Any
    ) -> nn.Module:
        """A text encoder of its config."""
        raise NotImplementedError

    def check(self, folder: Folder) -> None:
        """Refuse parts that do not belong together."""

    # -- from texts to the conditioning

    def open_tokenizers(self, folder: Folder) -> Sequence[TextTokenizer]:
        """One for each text encoder of the folder. Raises FolderError."""
        raise NotImplementedError

    def tokens(self, folder: Folder) -> int:
        """The length of "context", and of "mask" where there is one."""
        return self.open_tokenizers(folder)[0].length if folder.tokenizers else self.words

    def encode(self, folder: Folder) -> Encode:
        """What turns tokens into the conditioning of the network, float32: a program."""
        raise NotImplementedError

    def at_size(self, folder: Folder, height: int, width: int) -> dict[str, np.ndarray]:
        """What of a row's conditioning follows from the size of its image: float32 [k] each."""
        del folder, height, width
        return {}

    # -- guidance

    def guides(self, folder: Folder, scale: float) -> bool:
        """Whether a stock pipeline calls the network twice at this scale: not at 1 or less, and
        never where the scale is an input of the network.

        Here alone. Everywhere else (exports, and the teachers of all methods) u + scale (c - u)
        holds at every scale: 0 is unconditional, 0.5 halfway (`sampling.guided_denoiser`).
        """
        return scale > 1.0 and not folder.network.module.takes_guidance

    def cfg_scale(self, scale: Any) -> Any:
        """The w of u + w (c - u) that a stock pipeline means by its scale."""
        return scale

    # -- sizes and latents

    def multiple(self, folder: Folder) -> int:
        """By what the sides of an image, in pixels, must divide."""
        return max(8, folder.vae.module.factor)

    def largest(self, folder: Folder) -> int:
        """The longest side of an image in pixels; 0 where there is no bound."""
        del folder
        return 0

    def image_tokens(self, folder: Folder, height: int, width: int) -> int:
        """The positions of an image that the network attends to, on which a shift may depend."""
        return height * width // self.multiple(folder) ** 2

    def native_size(self, folder: Folder) -> tuple[int, int]:
        """Height and width in pixels that diffusers draws by default."""
        side = folder.network.config["sample_size"] * folder.vae.module.factor
        return side, side

    def sized_config(self, folder: Folder, size: tuple[int, int]) -> dict[str, Any]:
        """The network's config for a size (height, width in pixels) that diffusers then draws by
        default, as far as a config can say so.
        """
        config, factor = dict(folder.network.config), folder.vae.module.factor
        height, width = size
        return {**config, "sample_size": height // factor} if height == width else config

    def unpacked(self, latents: np.ndarray, shape: tuple[int, int, int, int]) -> np.ndarray:
        """Starts as the stock pipeline's `latents=` takes them, as [n, c, h, w], which is `shape`;
        an array of four axes is left to the caller.
        """
        del shape
        return latents

    # -- schedules

    def scheduler(self, folder: Folder, **options: Any) -> Scheduler:
        """The folder's; `options`: grid, solver, noise_correction. Raises FolderError."""
        where = diffusers_scheduler.config_path(folder)
        return diffusers_scheduler.read(folder.scheduler, where, xl=True, **options)

    def student_scheduler(self, folder: Folder, **options: Any) -> Scheduler:
        """A student's, of its folder: as of `scheduler`."""
        return self.scheduler(folder, **options)

    def student_config(self, folder: Folder, solver: str, size: tuple[int, int]) -> dict[str, Any]:
        """A student's scheduler_config.json. Raises FolderError, and ValueError for a solver that
        no student has.
        """
        del size
        where = diffusers_scheduler.config_path(folder)
        return diffusers_scheduler.student_config(folder.scheduler, solver=solver, where=where)

    def training_schedule(
        self, config: Mapping[str, Any], schedule: NoiseSchedule
    ) -> NoiseSchedule:
        """The schedule in whose times a student of that config is trained; `schedule` is that of
        its scheduler, the same process.
        """
        del config
        return schedule

    def student_grid(
        self, config: Mapping[str, Any], solver: str, steps: int, schedule: NoiseSchedule
    ) -> TimeGrid:
        """The times [N] of the training's schedule at which stock diffusers calls a student of that
        config. Raises ValueError.
        """
        del config
        return diffusers_scheduler.student_grid(solver, steps, schedule.T)

    def student_times(self, config: Mapping[str, Any], steps: int) -> dict[str, list[Any]]:
        """What stock diffusers is told to call a student of that config in so many steps:
        {"timesteps": [N]}, which it finds by itself.
        """
        return {"timesteps": diffusers_scheduler.student_timesteps(config, steps)}


class FlowFamily(Family):
    """A family of flow matching: x_t = (1 - t) x_0 + t ε, u = ε - x_0.

    Attributes:
      sigmas: of the stock pipeline's call: "scheduler" (the scheduler's own) or "linspace" (1 to
        1/n, passed to it).
    """

    sigmas = "linspace"

    def vae_module(self, config: Mapping[str, Any], where: Path, **options: Any) -> nn.Module:
        """See `Family`."""
        return components.vae_module(config, where, moved_by="shift_factor", **options)

    def network_time(self, sigma: Array) -> Array:
        """What the network is told at a time of the flow."""
        raise NotImplementedError

    def multiple(self, folder: Folder) -> int:
        """See `Family`: a patch of two latents a side is one token."""
        return 2 * folder.vae.module.factor

    def scheduler(self, folder: Folder, **options: Any) -> Scheduler:
        """See `Family`."""
        return flow_scheduler.read(
            folder.scheduler,
            diffusers_scheduler.config_path(folder),
            network_time=self.network_time,
            sigmas=self.sigmas,
            **options,
        )

    def student_scheduler(self, folder: Folder, **options: Any) -> Scheduler:
        """See `Family`: its sigmas are 1 to 1/n, whatever the pipeline's are."""
        return self.scheduler(folder, **options, grid="trailing")

    def student_config(self, folder: Folder, solver: str, size: tuple[int, int]) -> dict[str, Any]:
        """See `Family`: the shift of the teacher at the student's size, as a fixed one."""
        where = diffusers_scheduler.config_path(folder)
        shift = flow_scheduler.shift_of(folder.scheduler, self.image_tokens(folder, *size))
        config = folder.scheduler
        return flow_scheduler.student_config(config, solver=solver, shift=shift, where=where)

    def training_schedule(
        self, config: Mapping[str, Any], schedule: NoiseSchedule
    ) -> NoiseSchedule:
        """See `Family`: times before the shift, so that what is even in time follows it."""
        del schedule
        return flow_scheduler.training_schedule(
            config, network_time=self.network_time, shift=config["shift"]
        )

    def student_grid(
        self, config: Mapping[str, Any], solver: str, steps: int, schedule: NoiseSchedule
    ) -> TimeGrid:
        """See `Family`: before the shift, the trailing times of all."""
        del config, schedule
        return flow_scheduler.student_grid(solver, steps, 1.0)

    def student_times(self, config: Mapping[str, Any], steps: int) -> dict[str, list[Any]]:
        """See `Family`: {"sigmas": [N]}, to which the scheduler adds its shift."""
        del config
        return {"sigmas": flow_scheduler.student_sigmas(steps)}
