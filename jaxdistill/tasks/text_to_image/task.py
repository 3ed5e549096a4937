"""Text to image as a task: a diffusers folder and prompts in, few-step students out."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxdistill import partition
from jaxdistill.costs import chips
from jaxdistill.errors import NotFinite, UserError
from jaxdistill.interop import (
    FLAGS,
    card,
    diffusers_folder,
    diffusers_scheduler,
    how_to_sample,
    lora,
    lora_files,
)
from jaxdistill.interop.families.family import FlowFamily
from jaxdistill.methods.recipe import Stage
from jaxdistill.run import checkpoint, distributed, inputs, report
from jaxdistill.run.distillation import Student
from jaxdistill.run.record_cache import Cache, key_of
from jaxdistill.run.run import Run
from jaxdistill.run.seeds import seed_of
from jaxdistill.tasks.health import Health
from jaxdistill.tasks.settings import REALS
from jaxdistill.tasks.text_to_image import pipeline, take_away
from jaxdistill.tasks.text_to_image.checksums import Checksums, weights_of
from jaxdistill.tasks.text_to_image.data import captioned_images, prompts_of
from jaxdistill.tasks.text_to_image.images import READING, Captioned, fit_image
from jaxdistill.tasks.text_to_image.setup import (
    DTYPES,
    SINGLE_FILE,
    TextSetup,
    open_teacher,
)

NUMBERS = ("diversity", "contrast", "saturation", "distance")
COLUMNS = {"steps": ("steps", "{}"), **{name: (name, "{:.3f}") for name in NUMBERS}}

ENCODING = 2
"""Counted up where the same text encoder makes something else of a prompt than it did."""

Batches = Callable[[int], dict[str, Any]]


class TextToImageTask(TextSetup):
    """See `TextSetup`. Making it checks the config and reads no weights. Raises ValueError."""

    def __init__(self, config: ConfigDict) -> None:
        if not config.teacher.folder:
            raise ValueError(
                "config.teacher.folder is empty; give the teacher's pipeline folder, written by"
                " diffusers' save_pretrained"
            )
        if "://" in config.data.cache:
            raise ValueError(
                f"config.data.cache = {config.data.cache!r} must be a folder; give one that"
                " outlives the machines, or leave it empty"
            )
        super().__init__(config, open_teacher(config))
        solver = config.teacher.solver or None
        self.teacher_scheduler = diffusers_scheduler.of_folder(self.folder, solver=solver)
        self.prompts = prompts_of(config.data.prompts, config.data.tfds_dir)
        images = config.data.images
        self.images = captioned_images(images, config.data.tfds_dir) if images else []
        if self.needs_reals and config.adversarial.reals == "data" and not self.images:
            raise ValueError(
                "config.adversarial.reals = 'data' needs config.data.images; set it, or let the"
                " teacher draw them: config.adversarial.reals=teacher"
            )
        self.checksums = Checksums()
        self._caches: dict[str, Cache] = {}

    @property
    def single_file(self) -> bool:
        """Whether the student is written as one file, too."""
        return SINGLE_FILE[self.config.export.single_file](self.folder)

    # -- weights

    @property
    def parts(self) -> dict[str, diffusers_folder.Part]:
        """The teacher's networks by name."""
        return {
            self.folder.family.network: self.folder.network,
            "vae": self.folder.vae,
            **self.folder.encoders,
        }

    def made_from(self) -> dict[str, inputs.Input]:
        """All that the run reads, by name: what its workdir remembers. Raises UserError."""
        folder, found = self.folder, dict[str, inputs.Input]()
        for name, part in self.parts.items():
            found[weights_of(name)] = self.checksums.input(part)
            found[f"the teacher's {name} config"] = inputs.value(dict(part.config))
        for path in folder.tokenizers:
            found[f"the teacher's {path.name}"] = inputs.files(files_in(path))
        about = [folder.family.name, folder.zero_empty_prompt, dict(folder.scheduler)]
        found["the teacher's scheduler"] = inputs.value(about)
        for path in self.beside_files():
            found[f"{path}, beside the teacher"] = inputs.files([path])
        found["the prompts (config.data.prompts)"] = inputs.value(self.prompts)
        if self.images:
            content = partial(content_of, self.images)
            stamps = [[image.caption, image.stamp] for image in self.images]
            digest = inputs.value(stamps).content()
            found["the images (config.data.images)"] = inputs.Input(digest, content)
        return found

    def beside_files(self) -> list[Path]:
        """The files that are named beside the teacher, as LoRAs with their scales."""
        named = jax.tree.leaves([self.config.teacher[name] for name in FLAGS])
        paths = [Path(p) for text in map(str, named) for p in (text, text.rpartition(":")[0]) if p]
        return [path for path in paths if path.is_file()]

    @cached_property
    def beside_key(self) -> Any:
        """What is named beside the teacher, as a cache's key: words, and files by their content.
        Of folders the parts that are taken from them are in `parts`.
        """
        text = json.dumps([self.config.teacher[name] for name in FLAGS], default=str)
        for path in self.beside_files():
            text = text.replace(json.dumps(str(path))[1:-1], inputs.hash_files([path]))
        return text

    def load(self, dtype: str, *, on_mesh: bool = True) -> Any:
        """The folder's network in a dtype of DTYPES, each tensor straight to its place on the mesh,
        or else on this process's first device.
        """
        places = self.layout.of(self.abstract) if on_mesh else None
        network = self.folder.network
        return diffusers_folder.load_params(network, dtype=DTYPES[dtype], shardings=places)

    def student(self, teacher: Any) -> Any:
        """The folder's weights in float32, whatever the teacher's dtype, or updates of zero."""
        del teacher
        if self.config.student.lora_rank:
            return self.weights.fresh(self.abstract)
        return self.load("float32")

    def teacher_pipe(self, teacher: Any) -> pipeline.TextToImage:
        """What draws the teacher's images: each process by itself, on all of its devices.

        Where each of them has a copy of the teacher this takes it, and makes no other. All
        processes must call it.
        """
        own = partition.own_layout(self.layout)
        params = partition.local(teacher, own.mesh)
        return pipeline.TextToImage(self.folder, params, self.teacher_scheduler, layout=own)

    # -- data

    def open_data(self, run: Run, pipe: pipeline.TextToImage) -> None:
        """The caches of prompts, of images and of pairs, made where they are missing.

        A key names all that the content depends on: weights, configs, tokenizers, captions, dtypes
        and the sampler.
        """
        config, folder = self.config, self.folder
        parts, paths = folder.text_encoders, folder.tokenizers
        encoder = [
            ENCODING,
            [self.checksums.of(part) for part in parts],
            inputs.hash_files(file for path in paths for file in files_in(path)),
            [dict(part.config) for part in parts],
            self.beside_key,
            config.compute.dtype,
            folder.clip_skip,
        ]

        def cache(
            name: str, about: Sequence[Any], captions: Sequence[str], *rest: Any, **kw: Any
        ) -> None:
            key = key_of(encoder, list(captions), *about)
            self._caches[name] = run.cache(name, key, len(captions), *rest, **kw)

        pipe.text.announce(self.prompts)
        texts = partial(self.encoded, pipe, self.prompts)
        cache("prompts", [], self.prompts, texts, "encoding prompts", rows=16)
        self.null = {k: v.astype(np.float32) for k, v in pipe.text.negative(None).items()}
        if self.needs_reals and config.adversarial.reals == "data":
            captions = [image.caption for image in self.images]
            pipe.text.announce(captions)
            vae = [self.checksums.of(folder.vae), dict(folder.vae.config)]
            about = [vae, [image.stamp for image in self.images], self.size, READING]
            read = partial(self.encoded_images, pipe, captions)
            rows = 4 * pipe.parts
            cache("images", about, captions, read, "encoding images", rows=rows)
        elif self.needs_reals:
            sampler = {"steps": config.teacher.steps, "solver": config.teacher.solver}
            self.teacher_cache(cache, pipe, "teacher", REALS, config.adversarial.pool, sampler)
        if self.recipe.pairs:
            pairs = self.recipe.pairs
            solver = choose_solver(pairs.solver)
            scheduler = diffusers_scheduler.of_folder(folder, solver=solver)
            drawn = pipeline.TextToImage(
                folder, pipe.params, scheduler, share=pipe, layout=pipe.layout
            )
            sampler = {"steps": pairs.steps, "solver": solver}
            self.teacher_cache(
                cache,
                drawn,
                "pairs",
                "pairs",
                self.distillation.pair_count(self.guided),
                sampler,
            )

    def encoded(
        self, pipe: pipeline.TextToImage, captions: Sequence[str], numbers: list[int]
    ) -> dict[str, np.ndarray]:
        """The conditioning of these captions, in the family's `text_dtype`."""
        found = pipe.text([captions[i] for i in numbers])
        with np.errstate(over="ignore"):
            dtype = self.folder.family.text_dtype
            half = {name: values.astype(dtype) for name, values in found.items()}
        if not all(np.isfinite(values).all() for values in half.values()):
            raise NotFinite(
                "the text encoder gives values above 65504, which the cache of prompts (float16)"
                " cannot hold; give another checkpoint"
            )
        return half

    def encoded_images(
        self, pipe: pipeline.TextToImage, captions: Sequence[str], numbers: list[int]
    ) -> dict[str, np.ndarray]:
        """The latents and conditioning of these images."""
        images = np.stack([fit_image(self.images[i].read(), *self.size) for i in numbers])
        return {**self.encoded(pipe, captions, numbers), "latents": pipe.encode(images)}

    def teacher_cache(
        self,
        cache: Callable[..., None],
        pipe: pipeline.TextToImage,
        name: str,
        what: str,
        count: int,
        sampler: Mapping[str, Any],
    ) -> None:
        """Latents of the teacher for prompts drawn at random, beside the noises they come from."""
        config, seed = self.config, seed_of(self.config.seed, name)
        chosen = np.random.default_rng(seed).integers(0, len(self.prompts), count)
        captions = [self.prompts[i] for i in chosen]
        height, width = self.size
        options = {"guidance": config.teacher.guidance, "steps": sampler["steps"], "seed": seed}
        drawn = {**options, "height": height, "width": width, "batch_size": config.log.batch_size}

        def draw(numbers: list[int]) -> dict[str, np.ndarray]:
            prompts = [captions[i] for i in numbers]
            latents = pipe(prompts, decode=False, start=numbers[0], **drawn)
            noise = pipe.draw(seed, numbers[0], len(numbers), height, width)
            return {**self.encoded(pipe, captions, numbers), "latents": latents, "noise": noise}

        network = [self.checksums.of(self.folder.network), dict(self.folder.network.config)]
        compute = [config.compute.dtype, config.compute.teacher_dtype]
        schedule = [dict(self.folder.scheduler), self.folder.zero_empty_prompt]
        about = [network, compute, options, sampler, schedule, self.size]
        cache(name, about, captions, draw, what, rows=config.log.batch_size * pipe.parts)

    def cond(self, record: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A batch's conditioning, float32, with what follows from the size of the images and, where
        the guidance scale is an input, the teacher's.
        """
        names = [name for name in record if name not in ("latents", "noise")]
        found = {name: record[name].astype(np.float32) for name in names}
        rows = len(found["context"])
        for name, values in self.folder.family.at_size(self.folder, *self.size).items():
            found[name] = np.tile(values, (rows, 1))
        if self.network.takes_guidance:
            found["guidance"] = np.full((rows,), self.config.teacher.guidance, np.float32)
        return found

    def batches(self, stage: Stage, name: str) -> Batches:
        """This process's rows of batch i: a function of (seed, name, i) alone."""
        size, config = self.config.student.batch_size, self.config
        rows = partition.process_rows(self.layout.mesh, size)
        kind = "images" if config.adversarial.reals == "data" else "teacher"
        sources = {"noise": "prompts", "images": kind, "pairs": "pairs"}
        main = self._caches[sources[stage.data]].batches(size, seed_of(config.seed, name), rows)
        reals = None
        if stage.reals:
            seed = seed_of(config.seed, f"{name} reals")
            reals = self._caches[kind].batches(size, seed, rows)
        shape = np.zeros((len(rows), *self.latent_shape), np.float32)

        def batch(i: int) -> dict[str, Any]:
            record = main(i)
            made = {"x0": record.get("latents", shape), "cond": self.cond(record)}
            if stage.data == "pairs":
                made |= {"noise": record["noise"], "target": record["latents"]}
            if reals is not None:
                real = reals(i)
                made |= {"real": real["latents"], "real_cond": self.cond(real)}
            return made

        return batch

    # -- health

    def health(
        self, run: Run, pipe: pipeline.TextToImage, student_pipe: pipeline.TextToImage
    ) -> Health:
        """The student's images against the teacher's on fixed prompts, two noises a prompt."""
        config = self.config
        count = min(config.log.health_prompts, len(self.prompts))
        prompts = [prompt for prompt in self.prompts[:count] for _ in range(2)]
        options: dict[str, Any] = {
            "seed": seed_of(config.seed, "health"),
            "height": self.size[0],
            "width": self.size[1],
            "batch_size": config.log.batch_size,
        }
        teacher = {"steps": config.teacher.steps, "guidance": config.teacher.guidance}
        source = pipe
        if self.recipe.learns_from:
            source, teacher = (
                student_pipe,
                {"steps": self.recipe.learns_from, "guidance": self.student_guidance},
            )
        latents = source(prompts, **teacher, **options, decode=False)
        reference = source.decoded(latents, batch_size=config.log.batch_size)
        path = run.workdir / "samples" / "teacher.png"
        report.save_grid(path, reference, columns=len(prompts), scale=1)
        return Health(
            reference=reference,
            latents=latents,
            groups=np.repeat(np.arange(count), 2),
            draw=Drawn(self, pipe, student_pipe, prompts, options),
            folder=run.workdir / "samples",
            columns=len(prompts),
            scale=1,
        )

    # -- the run

    def execute(self, run: Run) -> dict[str, Any]:
        """Caches, training, exports, results. Resumes where it was stopped."""
        config = self.config
        if config.log.checkpoints:  # a bucket that cannot be opened is told before weights are read
            checkpoint.Checkpoints(f"{config.log.checkpoints}/student").close()
        diffusers_folder.check_weights(*self.parts.values())
        run.check_inputs(self.made_from())
        for name, part in self.parts.items():  # they are not read again for the caches' keys
            self.checksums.know(part, run.inputs[weights_of(name)])
        if distributed.writes():
            self.rehearse(run.workdir)
        began = time.perf_counter()
        teacher = self.load(config.compute.teacher_dtype)
        pipe = self.teacher_pipe(teacher)
        layout = pipe.layout
        student_pipe = pipeline.TextToImage(
            self.folder, pipe.params, self.scheduler, share=pipe, layout=layout
        )
        run.record("load", time.perf_counter() - began)
        began = time.perf_counter()
        self.open_data(run, pipe)
        run.record("cache", time.perf_counter() - began)
        health = self.health(run, pipe, student_pipe)
        run.drawn_on(layout)
        if chips.of_device(jax.local_devices()[0]):  # counting takes seconds
            run.flops = self.step_flops
        students = self.distillation.students(run, teacher, self.null, health.of)
        results = {}
        if distributed.writes():
            for student in students:
                self.export(run.workdir, student, students[0])
            results = self.results(run, students)
        distributed.barrier("results are written")
        return results

    def rehearse(self, workdir: Path) -> None:
        """Look at all that the exports will touch, before the training. Raises UserError."""
        count = sum(a.size for a in jax.tree.leaves(self.abstract))
        unet = count * (4 + np.dtype(DTYPES[self.config.export.dtype]).itemsize)
        stages = [stage for stage in self.recipe.stages if stage.serves]
        size = unet + diffusers_folder.rehearse(self.folder, workdir / "diffusers")
        if self.single_file:
            student = take_away.trained(workdir, self.folder, self.abstract, {})
            size += take_away.size_of_file(student, self.folder, self.config.export.dtype)
        checkpoint.check_space(workdir, len(stages) * size, "its exports")

    def export(self, workdir: Path, student: Student, first: Student) -> None:
        """student/ (Orbax), diffusers/ (a pipeline folder), student.safetensors and with LoRA
        lora/.

        Of a stage beside the one of the most steps the names end in its steps.
        """
        steps = sorted(student.stage.serves)
        end = "" if student is first else f"_{report.slug(max(steps))}"
        scheduler = self.scheduler_config(self.recipe.sampler)
        calls = [self.folder.family.student_times(scheduler, n) for n in steps]
        made_for: dict[str, Any] = {
            "steps": max(steps),
            "guidance": self.student_guidance,
            "height": self.size[0],
            "width": self.size[1],
            "clip_skip": self.folder.clip_skip,
            **{
                name: {n: call[name] for n, call in zip(steps, calls, strict=True)}
                for name in calls[0]
            },
        }
        if held := lora_files.record(self.folder):
            made_for["loras"] = held
        settings = {**made_for, "noise_correction": self.correct_noise}
        how = how_to_sample.how_to_sample(self.told(scheduler, steps))
        params = student.trained
        if self.config.student.lora_rank:
            lora.save(workdir / f"lora{end}", params, self.folder)
            # What its teacher had in its weights already is in the base's.
            own = self.folder.scheduler.get(pipeline.KEY, {})
            styles = {"loras": held[len(own.get("loras", ())) :]}
            names = {"checkpoint": self.folder.name, "lora": lora.KOHYA_FILE}
            files = how_to_sample.files(how | styles, **names)
            for name, value in files.items():
                checkpoint.write_json(workdir / f"lora{end}" / name, value)
            base = self.load("float32", on_mesh=jax.process_count() == 1)
            params = self.weights.merged(params, base)
        diffusers_folder.save_student(
            self.folder,
            workdir / f"diffusers{end}",
            params,
            scheduler={**scheduler, pipeline.KEY: made_for},
            size=self.size,
            dtype=DTYPES[self.config.export.dtype],
            extra={
                pipeline.SETTINGS: settings,
                **how_to_sample.files(how, checkpoint=f"student{end}"),
            },
        )
        about = {
            "format": card.FORMAT,
            "role": "text-to-image student",
            "method": self.config.method.name,
            "components": f"../diffusers{end}",
            "stacked": self.config.compute.scan,
            self.folder.family.network: dict(self.folder.network.config),
            "scheduler": scheduler,
            "sampler": settings,
        }
        checkpoint.export(workdir / f"student{end}", params, about)
        folder = self.folder._replace(scheduler=scheduler)
        path = workdir / f"student{end}"
        whole = take_away.trained(path, folder, params, settings)
        self.take_away(whole, student.trained)

    def take_away(self, student: take_away.Student, trained: Any) -> None:
        """student.safetensors where it is wanted, and with LoRA a file under Kohya's names."""
        path = student.path
        if self.config.student.lora_rank and self.folder.family.original:
            factors = lora.factors_of(trained)
            file = path.with_name(path.name.replace("student", "lora")) / lora.KOHYA_FILE
            take_away.write_lora(student, factors, file, dtype="float32", form="kohya")
        if self.single_file:
            file = path.with_name(f"{path.name}.safetensors")
            take_away.write_file(student, self.folder, file, dtype=self.config.export.dtype)

    def told(
        self, scheduler: Mapping[str, Any], steps: Sequence[int]
    ) -> how_to_sample.Student | how_to_sample.FlowStudent:
        """What other programs are told of a student."""
        folder = self.folder
        if isinstance(folder.family, FlowFamily):
            return how_to_sample.FlowStudent(scheduler, steps, self.size, self.student_guidance)
        # A folder of 2.x holds 23 of OpenCLIP's 24 layers, and XL takes the last but one.
        out = folder.xl or folder.text_encoders[0].module.layers == 23
        return how_to_sample.Student(
            scheduler,
            steps,
            self.size,
            self.correct_noise,
            folder.clip_skip,
            int(out),
            folder.family.call,
        )

    def results(self, run: Run, students: Sequence[Student]) -> dict[str, Any]:
        """The table of the health numbers of the averages that were exported."""
        config = self.config
        rows = []
        for student in students:
            for n in student.stage.serves:
                numbers = {name: round(student.health[f"{name}_{n}"], 5) for name in NUMBERS}
                rows.append({"model": "student", "steps": n, **numbers})
        protocol = (
            f"against the teacher ({config.teacher.steps} steps, guidance"
            f" {config.teacher.guidance:g}) on the same {config.log.health_prompts} prompts and"
            " noises: ratios, where 1 is as the teacher and a diversity below 0.8 a collapse, and"
            " the root-mean-square pixel difference"
        )
        return run.write_results(
            {
                "rows": sorted(rows, key=lambda row: row["steps"]),
                "protocol": protocol,
                "prompts": len(self.prompts),
            },
            title=f"{config.method.name} of {self.folder.name}, seed {config.seed}",
            notes=f"The student {protocol}.",
            columns=COLUMNS,
        )


class Drawn:
    """Draws the student for the health lines.

    Between two lines the encoders and the decoder are in the host's memory, as is a teacher that
    was gathered for drawing: what the devices hold then is what a plan has counted.
    """

    def __init__(
        self,
        task: TextToImageTask,
        pipe: pipeline.TextToImage,
        student_pipe: pipeline.TextToImage,
        prompts: Sequence[str],
        options: Mapping[str, Any],
    ) -> None:
        self.task, self.pipe, self.prompts, self.options = task, student_pipe, prompts, options
        mesh = task.layout.mesh
        gathered = jax.process_count() > 1 and mesh.size > mesh.shape["data"]
        self.params = jax.device_get(pipe.params) if gathered else pipe.params
        self.rest = jax.device_get((pipe.text.params, pipe.vae_params))
        pipe.params, pipe.vae_params = None, None
        self.leave()

    def leave(self) -> None:
        """Take from the devices what only drawing needs."""
        self.pipe.params = None
        self.pipe.text.params, self.pipe.vae_params = self.rest

    def __call__(
        self, trained: Any, steps: Sequence[int]
    ) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """{steps: (images, latents)}."""
        self.pipe.text.params, self.pipe.vae_params = jax.device_put(self.rest)
        layout, low = self.pipe.layout, bool(self.task.config.student.lora_rank)
        assert layout is not None
        base = layout.place(self.params) if low else None
        self.pipe.params = self.task.weights.variables(trained, base) if low else trained
        try:
            scale, found = self.task.student_guidance, {}
            for n in steps:
                latents = self.pipe(
                    self.prompts, steps=n, guidance=scale, **self.options, decode=False
                )
                rows = self.options["batch_size"]
                found[n] = self.pipe.decoded(latents, batch_size=rows), latents
            return found
        except NotFinite as error:  # the teacher has drawn with the same text, VAE and types
            name = self.task.config.method.name
            raise NotFinite(
                f"the student in training: {str(error).partition(';')[0]}; lower"
                f" config.methods.{name}'s learning rate, or set config.compute.dtype=float32, and"
                " start in a new workdir"
            ) from None
        finally:
            self.leave()


def files_in(folder: Path) -> list[Path]:
    """Its files, in order."""
    return [path for path in sorted(folder.iterdir()) if path.is_file()]


def content_of(images: Sequence[Captioned]) -> str:
    """Checksum of captions and pictures: of their files' bytes; of those in a stored data set,
    their stamps.
    """
    firsts = dict.fromkeys(str(image.stamp[0]) for image in images)
    files = inputs.hash_files(path for path in map(Path, firsts) if path.is_file())
    others = [image.stamp for image in images if not Path(str(image.stamp[0])).is_file()]
    return inputs.value([[image.caption for image in images], files, others]).content()


def choose_solver(name: str) -> str:
    """A solver of pairs. Raises UserError."""
    if name not in diffusers_scheduler.SOLVERS:
        known = ", ".join(diffusers_scheduler.SOLVERS)
        raise UserError(f"pairs_solver = {name!r} is not known; choose one of {known}")
    return name
