"""From a text-to-image config and a pipeline's configs to the programs of its distillation; no
weights, no data, no files.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxdistill import methods, partition
from jaxdistill.costs import chips
from jaxdistill.costs.flops import flops_of
from jaxdistill.errors import UserError, choose
from jaxdistill.interop import (
    FLAGS,
    Beside,
    architectures,
    diffusers_folder,
    diffusers_scheduler,
    single_file,
)
from jaxdistill.interop.diffusers_folder import Folder
from jaxdistill.interop.diffusers_scheduler import Scheduler
from jaxdistill.methods.recipe import Kit, SamplerSpec, Stage
from jaxdistill.model import Model, full_weights, low_rank
from jaxdistill.models.attention import ATTENTION, gpu_capability
from jaxdistill.models.blocks import REMAT_POLICIES
from jaxdistill.models.discriminator import FeatureHeads, fresh_heads
from jaxdistill.prediction import as_denoiser, flow_prediction, v_prediction
from jaxdistill.run.cost import Cost, Records, Work, parameters
from jaxdistill.run.distillation import Distillation
from jaxdistill.run.seeds import key_of
from jaxdistill.sampling import TimeGrid
from jaxdistill.tasks.settings import (
    REALS,
    adversarial_settings,
    check_config,
    student_settings,
)
from jaxdistill.tasks.text_to_image import pipeline
from jaxdistill.tasks.text_to_image.data import captioned_images, prompts_of
from jaxdistill.tasks.text_to_image.images import Captioned

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}

SINGLE_FILE: dict[str, Callable[[Folder], bool]] = {
    "auto": lambda teacher: teacher.file is not None,
    "always": lambda teacher: True,
    "never": lambda teacher: False,
}
"""Whether a student is written as one file, too."""


def open_teacher(config: ConfigDict) -> Folder:
    """The teacher's folder as its configs describe it or, without one, the published architecture
    config.teacher.architecture.

    Raises ValueError.
    """
    compute = config.compute
    tables: Mapping[str, Mapping[str, Any]] = {
        "dtype": DTYPES,
        "teacher_dtype": DTYPES,
        "attention": ATTENTION,
        "remat": REMAT_POLICIES,
    }
    for key, table in tables.items():
        choose(table, compute[key], f"config.compute.{key}")
    if compute.attention == "cudnn" and gpu_capability() is None:
        raise UserError(
            "config.compute.attention = 'cudnn' needs an NVIDIA GPU, and JAX has none here; auto"
            " takes it where there is one"
        )
    options: dict[str, Any] = {
        "attention": compute.attention,
        "remat": compute.remat,
        "scan": compute.scan,
        "dtype": DTYPES[compute.dtype],
    }
    if config.teacher.folder:
        beside = Beside(**{name: config.teacher[name] for name in FLAGS})
        folder = single_file.open_checkpoint(config.teacher.folder, beside, **options)
        check_guided(folder)
        made_for = pipeline.made_for(config.teacher.folder)
        return folder._replace(clip_skip=folder.clip_skip or made_for.get("clip_skip", 0))
    name = config.teacher.architecture
    published = choose(architectures.PIPELINES, name, "config.teacher.architecture")
    return architectures.folder(published, **options)


def check_guided(folder: Folder) -> None:
    """Raise UserError for an UNet to which the guidance scale is an input (LCM's): it is a student,
    to which its teacher's guidance has been distilled.
    """
    if folder.family.original and folder.network.module.takes_guidance:
        width = folder.network.module.guidance_width
        raise UserError(
            f"config.teacher.folder = {folder.file or folder.path} is a student whose guidance is"
            f" an input of its UNet (time_cond_proj_dim = {width}), and none to learn from; give"
            " the checkpoint that it was made from"
        )


class TextSetup:
    """What a method asks for (`run.task.Task`) on a pipeline folder. Making it checks the config
    and computes nothing heavy.

    `devices` may be those of a TPU topology that is not here, or as many as a number says.
    """

    ranks: Sequence[str] = ("distance",)
    prompts: Sequence[str] = ()
    images: Sequence[Captioned] = ()

    def __init__(
        self, config: ConfigDict, folder: Folder, *, devices: Sequence[Any] | int | None = None
    ) -> None:
        check_config(config)
        self.config, self.folder = config, folder
        student = config.student
        choose(DTYPES, config.export.dtype, "config.export.dtype")
        choose(SINGLE_FILE, config.export.single_file, "config.export.single_file")
        if config.export.single_file == "always" and not folder.family.original:
            raise UserError(
                f"config.export.single_file = 'always': a student of the family"
                f" {folder.family.name} is not written as one file; set it to auto, and give"
                " programs its diffusers/ folder"
            )
        self.network, family = folder.network.module, folder.family
        made_for = pipeline.made_for(config.teacher.folder) if config.teacher.folder else {}
        height = config.data.height or made_for.get("height")
        width = config.data.width or made_for.get("width")
        self.size = pipeline.image_size(folder, height, width)
        plain = self._scheduler(SamplerSpec(), correct=False)
        self.parameterization = plain.parameterization
        own = self.scheduler_config(SamplerSpec())
        self.schedule = family.training_schedule(own, plain.schedule)
        factor = folder.vae.module.factor
        self.tokens = family.tokens(folder)
        self.latent_shape = (*(side // factor for side in self.size), self.network.in_channels)
        self.layout = partition.layout(config.mesh.to_dict(), devices=devices)
        micro = student.batch_size // student.accumulate
        divided = " / config.student.accumulate" if student.accumulate > 1 else ""
        partition.check_batch(micro, self.layout.mesh, f"config.student.batch_size{divided}")
        self.abstract = diffusers_folder.abstract_params(folder.network)
        self.layout.of(self.abstract)
        self.weights = full_weights()
        if student.lora_rank:
            key, targets = key_of(config.seed, "lora"), tuple(student.lora_targets)
            self.weights = low_rank(key, targets, student.lora_rank, beside=True)
            jax.eval_shape(self.weights.fresh, self.abstract)  # tells of bad targets
        self._heads = FeatureHeads(config.adversarial.width)
        build = methods.build(config.method.name, config.methods.to_dict())
        self.distillation = Distillation(self, build)
        self.recipe = self.distillation.recipe
        self.distillation.check_batch()
        # For v or flow prediction from zero terminal SNR the corrected noise is the network's own.
        ends = float(self.schedule.alpha(self.schedule.T)) < 1e-6
        exact = self.parameterization in (v_prediction, flow_prediction) and ends
        spec = self.recipe.sampler
        self.correct_noise = spec.noise_correction and spec.solver == "ddim" and not exact
        self.scheduler = self._scheduler(spec, correct=self.correct_noise)
        self.grids: dict[int, TimeGrid] = {n: self.grid(spec, n) for n in self.kit({}).steps}
        if self.recipe.learns_from:
            self.check_student(config.teacher.folder)

    @classmethod
    def planned(cls, config: ConfigDict, devices: Sequence[Any] | int | None = None) -> "TextSetup":
        """For its cost: a teacher may be named by its architecture, and prompts may be missing.

        Raises ValueError.
        """
        made = TextSetup(config, open_teacher(config), devices=devices)
        if config.data.prompts:
            made.prompts = prompts_of(config.data.prompts, config.data.tfds_dir)
        if config.data.images:
            made.images = captioned_images(config.data.images, config.data.tfds_dir)
        return made

    # -- what a method asks for

    def kit(self, null: Any) -> Kit:
        """The network, guided by this null conditioning, and what the methods share."""
        config, apply, family = self.config, self.network.apply, self.folder.family
        cfg_scale = (lambda scale: 1.0) if self.network.takes_guidance else family.cfg_scale
        return Kit(
            network=Model(apply, self.schedule, self.parameterization, True, cfg_scale),
            null_cond=partial(pipeline.with_null, null),
            grid=self.grid,
            features=partial(apply, features=True),
            heads=self._heads.apply,
            student=student_settings(config.student),
            adversarial=adversarial_settings(config.adversarial),
            constrain=partition.constrain_batch(self.layout.mesh),
            unroll=config.compute.unroll,
        )

    def grid(self, spec: SamplerSpec, steps: int) -> TimeGrid:
        """A student's times: those at which its stock scheduler calls it. Raises ValueError."""
        if spec.grid != "trailing":
            raise ValueError(
                f"grid = {spec.grid!r}: a pipeline folder's student is sampled by a stock"
                " scheduler, which has the trailing grid alone"
            )
        config = self.scheduler_config(spec)
        return self.folder.family.student_grid(config, spec.solver, steps, self.schedule)

    def frozen(self, tree: Any) -> Any:
        """Shapes of weights in the dtype of what is not trained."""
        dtype = DTYPES[self.config.compute.teacher_dtype]
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), tree)

    def null_shapes(self) -> dict[str, Any]:
        """Shapes of the null conditioning."""
        own = (*self.folder.family.at_size(self.folder, *self.size), "guidance")
        return {name: a for name, a in self.cond_shapes(1).items() if name not in own}

    def inside(self, tree: Any) -> Any:
        """Whole over "fsdp", kernels in the dtype of the computation."""
        return self.layout.gathered(tree, DTYPES[self.config.compute.dtype])

    def cond_shapes(self, rows: int) -> dict[str, Any]:
        """Shapes of a batch's conditioning."""
        _, _, cond = diffusers_folder.example_inputs(self.folder.network)
        shapes = {name: (rows, *a.shape[1:]) for name, a in cond.items()}
        for name in ("context", "mask"):  # which have a place for each token
            if name in shapes:
                shapes[name] = (rows, self.tokens, *cond[name].shape[2:])
        return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}

    def batch_shapes(self, stage: Stage) -> dict[str, Any]:
        """Shapes of a batch, on the mesh."""
        rows = self.config.student.batch_size
        latents = jax.ShapeDtypeStruct((rows, *self.latent_shape), np.float32)
        found = {"x0": latents, "cond": self.cond_shapes(rows)}
        if stage.data == "pairs":
            found |= {"noise": latents, "target": latents}
        if stage.reals:
            found |= {"real": latents, "real_cond": found["cond"]}
        return partition.described(found, partition.batch_sharding(self.layout.mesh))

    def heads(self, stage: Stage) -> Any:
        """First parameters of the stage's discriminator."""
        x, t, cond = diffusers_folder.example_inputs(self.folder.network)
        key = key_of(self.config.seed, f"discriminator {stage.name}")

        def states_of(*inputs: Any) -> Any:
            return stage.seen(self.network.apply(*inputs, features=True))

        return fresh_heads(self._heads, key, states_of, self.abstract, x, t, cond, cond=cond)

    def batches(self, stage: Stage, name: str) -> Callable[[int], Any]:
        """None: this is a plan. `TextToImageTask` has data."""
        raise NotImplementedError

    def student(self, teacher: Any) -> Any:
        """None: this is a plan. `TextToImageTask` has weights."""
        raise NotImplementedError

    # -- the student's sampler

    def _scheduler(self, spec: SamplerSpec, *, correct: bool) -> Scheduler:
        folder = self.folder._replace(scheduler=self.scheduler_config(spec))
        return folder.family.student_scheduler(folder, noise_correction=correct)

    def scheduler_config(self, spec: SamplerSpec) -> dict[str, Any]:
        """The student's scheduler_config.json."""
        return self.folder.family.student_config(self.folder, spec.solver, self.size)

    def check_student(self, path: str) -> None:
        """Raise ValueError where the folder is not drawn from as a student is; a published
        architecture stands for one that is.
        """
        if not path:
            return
        found, wanted = self.folder.scheduler, self.scheduler_config(self.recipe.sampler)
        different = [key for key, value in wanted.items() if found.get(key) != value]
        own = bool(pipeline.made_for(path).get("noise_correction", False))
        if found.get("_class_name") == diffusers_scheduler.NOISE_CORRECTION:
            different, own = [key for key in different if key != "_class_name"], True
        for key in different:
            raise ValueError(
                f"config.teacher.folder = {path} is not a student: its scheduler's {key} is"
                f" {found.get(key)!r}, not {wanted[key]!r}; give the diffusers/ folder of a"
                " finished run"
            )
        if own != self.correct_noise:
            raise ValueError(
                f"config.teacher.folder = {path} is a student with noise_correction = {own}, but"
                f" the config says {self.correct_noise}; set"
                f" config.methods.{self.config.method.name}.noise_correction={own}"
            )

    @property
    def student_guidance(self) -> float:
        """The scale at which a student is called: as an input that of its teacher, or else none."""
        if self.network.takes_guidance:
            return float(self.config.teacher.guidance)
        return self.folder.family.unguided

    def sample(
        self, params: Any, vae: Any, noise: jax.Array, cond: Any, *, steps: int
    ) -> jax.Array:
        """Images [b, h, w, 3] from standard normal latents in `steps` calls without guidance: what
        the trained student is for.
        """
        scheduler = self.scheduler
        run = scheduler.run(steps, self.folder.family.image_tokens(self.folder, *self.size))
        denoiser = as_denoiser(
            self.network.apply,
            params,
            cond,
            schedule=scheduler.schedule,
            parameterization=self.parameterization,
        )

        def step(state: Any, times: Any) -> tuple[Any, None]:
            return scheduler.advance(denoiser, state, noise, *times), None

        pairs = (jnp.asarray(run.times, jnp.float32), jnp.asarray(run.next_times, jnp.float32))
        state, _ = jax.lax.scan(step, scheduler.begin(noise, run), pairs)
        return self.folder.vae.module.apply(vae, state.x, method="decode")

    # -- cost

    def written(self) -> Distillation:
        """That of `as_written`."""
        return self.as_written.distillation

    @cached_property
    def as_written(self) -> "TextSetup":
        """The same, with nothing computed twice and attention as matrix products: what counts."""
        return self._written("none")

    def _written(self, remat: str) -> "TextSetup":
        config = self.config.copy_and_resolve_references()
        # An UNet's loop repeats rows that its first block shares. Other loops are counted as such:
        # that takes seconds where 57 blocks take minutes.
        scan = self.folder.family.network != "unet"
        config.compute.update({"scan": scan, "remat": remat, "attention": "plain"})
        config.mesh.update({"data": -1, "fsdp": 1, "tensor": 1})
        module = self.network.clone(scan=scan, remat=remat, attention="plain")
        folder = self.folder._replace(network=self.folder.network._replace(module=module))
        made = TextSetup(config, folder, devices=jax.devices()[:1])
        made.as_written = made
        return made

    def step_flops(self, stage: int = 0, *, remat: str = "none") -> float:
        """FLOPs of one step of a stage on all devices: with nothing computed twice, or with what
        this `remat` computes again.
        """
        if remat == "none":
            return self.distillation.flops(stage)
        return self._written(remat).distillation.counted(stage)

    def call_flops(self, *, copies: int = 1) -> float:
        """FLOPs of one call on one example, with `copies` rows of conditioning."""
        plain = self.as_written
        x = jax.ShapeDtypeStruct((1, *self.latent_shape), np.float32)
        t = jax.ShapeDtypeStruct((1,), np.float32)
        return flops_of(plain.network.apply, plain.abstract, x, t, self.cond_shapes(copies))

    def cost(self, *, plan: bool = False) -> Cost:
        """Of a run, but for its health lines. FLOPs are counted for a `plan`, and where a run asks
        for its MFU: that takes seconds.
        """
        count = plan or chips.of_device(jax.local_devices()[0]) is not None
        work, config, mesh = self.distillation, self.config, self.layout.mesh
        beside = {
            name: parameters(diffusers_folder.abstract_params(part))
            for name, part in {**self.folder.encoders, "vae": self.folder.vae}.items()
        }
        drawing = {name: 4 * size for name, size in beside.items()}
        for name, part in self.folder.encoders.items():
            drawing[name] = np.dtype(pipeline.dtype_of(part)).itemsize * beside[name]
        if jax.process_count() > 1 and mesh.size > mesh.shape["data"]:  # each draws by itself
            drawing["the student, gathered"] = 4 * parameters(work.trained_shapes)
            if config.student.lora_rank:
                width = np.dtype(DTYPES[config.compute.teacher_dtype]).itemsize
                drawing["the teacher, gathered"] = width * parameters(self.abstract)
        parts = []
        for records, steps in self.caches:
            if steps and records.number:
                images = records.number * steps
                copies = 2 if self.guided else 1
                calls = images * copies / config.student.batch_size
                flops = images * self.call_flops(copies=copies) if count else None
                parts.append(Work(records.name, 0, calls, flops))
        return Cost(
            networks=work.networks | beside,
            kept=work.kept(work.largest),
            drawing=drawing,
            work=[*parts, *work.work(count=count)],
            records=[records for records, _ in self.caches],
            rows=config.student.batch_size,
            checkpoints=work.checkpoints(),
        )

    @property
    def guided(self) -> bool:
        """Whether the teacher's images take two rows of conditioning a call."""
        return self.folder.family.guides(self.folder, self.config.teacher.guidance)

    @property
    def needs_reals(self) -> bool:
        """Whether some stage wants images."""
        return any(stage.reals or stage.data == "images" for stage in self.recipe.stages)

    @property
    def caches(self) -> list[tuple[Records, int]]:
        """What a run keeps on disk, and the teacher's steps that an image of it takes."""
        config, pairs = self.config, self.recipe.pairs
        width = np.dtype(self.folder.family.text_dtype).itemsize
        text = width * parameters(self.null_shapes())
        latents = 4 * math.prod(self.latent_shape)
        found = [(Records("prompts", len(self.prompts) or None, text), 0)]
        if self.needs_reals and config.adversarial.reals == "data":
            found.append((Records("images", len(self.images) or None, text + latents), 0))
        elif self.needs_reals:
            images = Records(REALS, config.adversarial.pool, text + 2 * latents)
            found.append((images, config.teacher.steps))
        if pairs:
            count = self.distillation.pair_count(self.guided)
            found.append((Records("pairs", count, text + 2 * latents), pairs.steps))
        return found

    def decode_flops(self) -> float:
        """FLOPs of decoding one image."""
        decode = partial(self.folder.vae.module.clone(attention="plain").apply, method="decode")
        z = jax.ShapeDtypeStruct((1, *self.latent_shape), np.float32)
        return flops_of(decode, diffusers_folder.abstract_params(self.folder.vae), z)
