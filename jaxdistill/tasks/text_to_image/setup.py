"""From a text-to-image config and a pipeline's configs to the program of its distillation; no
weights, no data, no files.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxdistill import partition
from jaxdistill.costs.flops import flops_of
from jaxdistill.interop import architectures, card, diffusers_folder, diffusers_scheduler, lora
from jaxdistill.interop.diffusers_folder import Folder
from jaxdistill.methods import imagine_flash as flash
from jaxdistill.models.discriminator import FeatureHeads, fresh_heads
from jaxdistill.models.stable_diffusion.latent_layers import ATTENTION
from jaxdistill.models.stable_diffusion.unet_condition import REMAT_POLICIES, STACK
from jaxdistill.prediction import LossFn, as_denoiser, v_prediction
from jaxdistill.run.workdir import Programs, programs
from jaxdistill.sampling import TimeGrid, check_grid, trailing_grid
from jaxdistill.tasks.labelled_images.experiment import (
    check_keep_best,
    check_numbers,
    from_student,
    make_adversary,
    make_student_loss,
    make_student_optimizer,
    student_of,
)
from jaxdistill.tasks.text_to_image import pipeline

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}

TOKENS = 77
"""Of CLIP's text encoders."""


def open_teacher(config: ConfigDict) -> Folder:
    """The teacher's folder as its configs describe it or, without one, the published architecture
    config.teacher.architecture.

    Raises ValueError.
    """
    compute = config.compute
    for key, table in (
        ("dtype", DTYPES),
        ("teacher_dtype", DTYPES),
        ("attention", ATTENTION),
        ("remat", REMAT_POLICIES),
    ):
        card.choose(table, compute[key], f"config.compute.{key}")
    options: dict[str, Any] = {
        "attention": compute.attention,
        "remat": compute.remat,
        "scan": compute.scan,
        "dtype": DTYPES[compute.dtype],
    }
    if config.teacher.folder:
        return diffusers_folder.open_folder(config.teacher.folder, **options)
    name = config.teacher.get("architecture", "")
    return architectures.folder(
        card.choose(architectures.PIPELINES, name, "config.teacher.architecture"), **options
    )


class TextSetup:
    """The loss, the optimizer and where arrays live.

    Making it checks the config and computes nothing heavy.

    `devices` may be those of a TPU topology that is not here.
    """

    def __init__(
        self, config: ConfigDict, folder: Folder, *, devices: Sequence[Any] | None = None
    ) -> None:
        self.config, self.folder = config, folder
        check_numbers(config)
        student = config.student
        card.choose(DTYPES, config.export.dtype, "config.export.dtype")
        self.stacked = STACK if config.compute.scan else ""
        plain = diffusers_scheduler.student_config(self.folder.scheduler, noise_correction=False)
        scheduler = diffusers_scheduler.of_folder(self.folder._replace(scheduler=plain))
        self.schedule, self.unet = scheduler.schedule, self.folder.unet.module
        self.grids: dict[int, TimeGrid] = {n: self.grid(n) for n in sorted(student.steps)}
        check_keep_best(student.keep_best, ("distance",), self.grids)
        self.size = pipeline.image_size(
            self.folder, config.data.height or None, config.data.width or None
        )
        factor = self.folder.vae.module.factor
        self.latent_shape = (self.size[0] // factor, self.size[1] // factor, self.unet.in_channels)
        self.layout = partition.layout(config.mesh.to_dict(), devices=devices)
        if student.accumulate < 1 or student.batch_size % student.accumulate:
            raise ValueError(
                f"config.student.accumulate = {student.accumulate} must be at least 1 and divide"
                f" config.student.batch_size = {student.batch_size}"
            )
        micro = student.batch_size // student.accumulate
        name = "config.student.batch_size" + (
            " / config.student.accumulate" if student.accumulate > 1 else ""
        )
        partition.check_batch(micro, self.layout.mesh, name)
        shared = len(flash.unique_grids(list(self.grids.values())))
        if micro % shared:
            raise ValueError(
                f"{name} = {micro} must be a multiple of the {shared} time grids that share it"
            )
        self.adversarial = config.adversarial.weight > 0
        if not config.method.backward:
            raise ValueError(
                "config.method.backward = False needs images as data; a text-to-image run trains on"
                " the student's own trajectory"
            )
        self.abstract = diffusers_folder.abstract_params(self.folder.unet)
        if student.lora_rank < 0:
            raise ValueError(
                "config.student.lora_rank must be at least 0 (0: train all weights), got"
                f" {student.lora_rank}"
            )
        if student.lora_rank:
            lora.layers(self.abstract, student.lora_targets)
        self.layout.of(self.abstract)
        # For v-prediction from zero terminal SNR the corrected noise is the network's own.
        exact = (
            scheduler.parameterization is v_prediction
            and float(self.schedule.alpha(self.schedule.T)) < 1e-6
        )
        self.correct_noise = bool(config.method.noise_correction) and not exact
        self.scheduler = scheduler._replace(noise_correction=self.correct_noise)
        if from_student(config):
            self.check_student(config.teacher.folder)
        self.heads = FeatureHeads(config.adversarial.width)
        self.loss = self.make_loss()
        self.tx = make_student_optimizer(config)

    def grid(self, steps: int) -> TimeGrid:
        """The student's times."""
        return check_grid(trailing_grid(steps, self.schedule.T, discrete=True), self.schedule.T)

    def check_student(self, path: str) -> None:
        """Raise ValueError where the folder is not drawn from as a student is; a published
        architecture stands for one that is.
        """
        found, correct = self.folder.scheduler, bool(self.config.method.noise_correction)
        for key, value in diffusers_scheduler.student_config(
            found, noise_correction=self.correct_noise
        ).items():
            if path and found.get(key) != value:
                raise ValueError(
                    f"config.teacher.folder = {path} is no student with"
                    f" config.method.noise_correction = {correct}: its scheduler's {key} is"
                    f" {found.get(key)!r}, not {value!r}; give the diffusers/ folder of a"
                    " finished run"
                )

    def make_loss(self) -> LossFn:
        """The config's method on this folder's network; with LoRA the student is the teacher's
        weights plus the updates.

        Its second argument is {"teacher", "null"}: a null conditioning in the program would tie the
        program to a text encoder's weights.
        """
        config, dtype = self.config, DTYPES[self.config.compute.dtype]
        constrain = partition.constrain_batch(self.layout.mesh)
        network = flash.Model(
            self.unet.apply, self.schedule, self.scheduler.parameterization, shares=True
        )
        adversary = make_adversary(
            config.adversarial,
            partial(self.unet.apply, features=True),
            self.heads,
            self.schedule,
            constrain,
        )

        def with_null(null: Any) -> LossFn:
            return make_student_loss(
                config,
                network,
                grids=list(self.grids.values()),
                several=self.grid,
                null_cond=partial(pipeline.with_null, null),
                adversary=adversary,
                adversary_states=config.adversarial.states,
                constrain=constrain,
            )

        with_null({})  # a mistake in the config is told now

        def with_base(
            params: Any, given: Any, batch: Any, key: jax.Array
        ) -> tuple[jax.Array, dict[str, jax.Array]]:
            with (
                jax.ensure_compile_time_eval()
            ):  # tables of the method are numbers, also where a step is traced
                loss = with_null(given["null"])
            params, teacher = (
                self.layout.gathered(params, dtype),
                self.layout.gathered(given["teacher"], dtype),
            )
            with partition.on_mesh(self.layout):
                return loss(
                    {**params, "student": self.variables(params["student"], teacher)},
                    teacher,
                    batch,
                    key,
                )

        return with_base

    def variables(self, student: Any, teacher: Any) -> Any:
        """What the network is applied to: the student's parameters, or the teacher's with the
        student's updates beside them.
        """
        if not self.config.student.lora_rank:
            return student
        return {**jax.lax.stop_gradient(teacher), "lora": student}

    def fresh_updates(self) -> Any:
        """LoRA updates of zero."""
        student = self.config.student
        return lora.init(
            jax.random.key(self.config.seed),
            self.abstract,
            student.lora_targets,
            student.lora_rank,
            stacked=self.stacked,
        )

    def fresh_heads(self) -> Any:
        """The discriminator's first parameters, {} without one."""
        if not self.adversarial:
            return {}
        x, t, cond = diffusers_folder.example_inputs(self.folder.unet)
        states_of = partial(self.unet.apply, features=True)
        return fresh_heads(
            self.heads,
            jax.random.key(self.config.seed + 2),
            states_of,
            self.abstract,
            x,
            t,
            cond,
            cond=cond,
        )

    # -- what a compiler needs to know

    def abstract_cond(self, rows: int) -> dict[str, Any]:
        """Shapes of a batch's conditioning."""
        _, _, cond = diffusers_folder.example_inputs(self.folder.unet)
        shapes = {name: (rows, *a.shape[1:]) for name, a in cond.items()} | {
            "context": (rows, TOKENS, cond["context"].shape[-1])
        }
        return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}

    def abstract_batch(self) -> dict[str, Any]:
        """Shapes of a batch, on the mesh."""
        rows = self.config.student.batch_size
        latents, cond = (
            jax.ShapeDtypeStruct((rows, *self.latent_shape), np.float32),
            self.abstract_cond(rows),
        )
        found = {"x0": latents, "cond": cond} | (
            {"real": latents, "real_cond": cond} if self.adversarial else {}
        )
        return partition.described(found, partition.batch_sharding(self.layout.mesh))

    def abstract_null(self) -> dict[str, Any]:
        """Shapes of the null conditioning."""
        return {name: a for name, a in self.abstract_cond(1).items() if name != "time_ids"}

    def abstract_student(self) -> dict[str, Any]:
        """Shapes of what is trained."""
        student = (
            jax.eval_shape(self.fresh_updates) if self.config.student.lora_rank else self.abstract
        )
        return {"student": student, "discriminator": jax.eval_shape(self.fresh_heads)}

    def frozen(self, abstract: Any) -> Any:
        """Shapes of weights in the dtype of what is not trained."""
        dtype = DTYPES[self.config.compute.teacher_dtype]
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), abstract)

    def programs(self) -> Programs:
        """The run's own programs with the shapes of their arguments."""
        config, teacher = self.config.student, self.frozen(self.abstract)
        options = {
            "ema_decay": config.ema_decay,
            "ema_of": student_of,
            "accumulate": config.accumulate,
        }
        given = {"teacher": teacher, "null": self.abstract_null()}
        return programs(self.layout, self.loss, self.tx, self.abstract_student(), given, **options)

    def sample(self, unet: Any, vae: Any, noise: jax.Array, cond: Any, *, steps: int) -> jax.Array:
        """Images [b, h, w, 3] from standard normal latents in `steps` calls without guidance: what
        the trained student is for.
        """
        run = self.scheduler.run(steps)

        def step(state: Any, times: Any) -> tuple[Any, None]:
            denoiser = as_denoiser(
                self.unet.apply,
                unet,
                cond,
                schedule=self.schedule,
                parameterization=self.scheduler.parameterization,
            )
            return self.scheduler.advance(denoiser, state, noise, *times), None

        pairs = (jnp.asarray(run.times, jnp.float32), jnp.asarray(run.next_times, jnp.float32))
        state, _ = jax.lax.scan(step, self.scheduler.begin(noise, run), pairs)
        return self.folder.vae.module.apply(vae, state.x, method="decode")

    def decode_flops(self) -> float:
        """FLOPs of the dots and convolutions of decoding one image."""
        decode = partial(self.folder.vae.module.clone(attention="plain").apply, method="decode")
        z = jax.ShapeDtypeStruct((1, *self.latent_shape), np.float32)
        return flops_of(decode, diffusers_folder.abstract_params(self.folder.vae), z)

    def call_flops(self, *, features: bool = False, copies: int = 1) -> float:
        """FLOPs of the dots and convolutions of one call on one example (with `copies` rows of
        conditioning), or of its states alone.
        """
        x = jax.ShapeDtypeStruct((1, *self.latent_shape), np.float32)
        t = jax.ShapeDtypeStruct((1,), np.float32)
        plain = self.unet.clone(scan=False, remat="none", attention="plain")
        abstract = jax.eval_shape(
            lambda: plain.init(
                jax.random.key(0), *diffusers_folder.example_inputs(self.folder.unet)
            )
        )
        return flops_of(
            partial(plain.apply, features=features), abstract, x, t, self.abstract_cond(copies)
        )

    def step_flops(self) -> float:
        """Analytic FLOPs of a step on all devices, with nothing computed twice.

        Of `endpoint` a row costs the frozen student its steps, and the student 3 calls (with LoRA
        2). A row visits N states. Each costs the student 3 calls (forward, and backward to inputs
        and weights; with LoRA 2) and the teacher k, with guidance for two rows of conditioning; the
        adversary computes the hidden states of s of them forward and backward to the input, and of
        a real.
        """
        method, student = self.config.method, self.config.student
        if from_student(self.config):
            return (
                student.batch_size
                * ((2 if student.lora_rank else 3) + self.config.teacher.steps)
                * self.call_flops()
            )
        grids = flash.unique_grids(list(self.grids.values()))
        longest = max(len(grid) for grid in grids)
        states = longest if method.whole_trajectory else 1
        rollout = (
            0.0 if method.whole_trajectory else sum(len(grid) for grid in grids) / len(grids) - 1
        )
        guided = 2 if method.guidance != 1.0 else 1
        found = (states * (2 if student.lora_rank else 3) + rollout) * self.call_flops()
        found += states * method.teacher_steps * self.call_flops(copies=guided)
        if self.adversarial:
            judged = 1 if self.config.adversarial.states == "one" else states
            found += (2 * judged + 1) * self.call_flops(features=True)
        return student.batch_size * found
