"""A text-to-image run: a diffusers folder and prompts in, a few-step student out.

Started by `jaxdistill.main` for such a config.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from jaxdistill import partition
from jaxdistill.costs import chips
from jaxdistill.interop import card, diffusers_folder, diffusers_scheduler, lora
from jaxdistill.interop.diffusers_folder import FolderError
from jaxdistill.metrics import evaluate, image_metrics
from jaxdistill.run import checkpoint, distributed, loop, record_cache, report
from jaxdistill.run.workdir import UserError, prepare_workdir, say, train_phase, versions
from jaxdistill.tasks.labelled_images.experiment import student_of
from jaxdistill.tasks.text_to_image import pipeline
from jaxdistill.tasks.text_to_image.setup import DTYPES, TextSetup, open_teacher

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


# --------------------------------------------------------------------------------------------- data


def prompts_of(source: str, tfds_dir: str = "") -> list[str]:
    """The prompts of a .txt or .jsonl file, or of a TFDS captions set as "tfds:name:split[:key]".

    Raises ValueError in one line where they cannot be read.
    """
    if not source:
        raise ValueError(
            "config.data.prompts is empty: give a .txt or .jsonl file of prompts, or"
            " tfds:name:split[:key]"
        )
    if not source.startswith("tfds:"):
        return [item["prompt"] for item in pipeline.read_prompts(source)]
    found: list[str] = []
    items, key = tfds_captions("config.data.prompts", source, tfds_dir)
    for i in range(len(items)):
        found += texts_of(items[i][key])
    if not found:
        raise ValueError(f"config.data.prompts = {source!r} holds no prompt")
    return found


def texts_of(value: Any) -> list[str]:
    """The text of an example's field, or its several texts."""
    texts = [value] if isinstance(value, (bytes, str)) else list(value)
    return [text.decode() if isinstance(text, bytes) else str(text) for text in texts]


def tfds_captions(
    name: str, source: str, tfds_dir: str, *, images: bool = False
) -> tuple[Any, str]:
    """The examples of tfds:name:split[:key], and the key of their captions. `name` is the config's.

    Raises ValueError.
    """
    fields = source.split(":")
    if len(fields) not in (3, 4):
        raise ValueError(f"{name} = {source!r} must read tfds:name:split or tfds:name:split:key")
    key = fields[3] if len(fields) == 4 else "caption"
    items = tfds_source(fields[1], fields[2], tfds_dir)
    for wanted in (key, "image") if images else (key,):
        if len(items) and wanted not in items[0]:
            mend = "" if wanted == "image" else "; name it as fourth part"
            raise ValueError(
                f"{name} = {source!r}: no {wanted!r} in its examples, only"
                f" {', '.join(items[0])}{mend}"
            )
    return items, key


def tfds_source(name: str, split: str, folder: str) -> Any:
    """A stored TFDS dataset as a random-access source, without TensorFlow and without its builder's
    code.

    Read from `folder`/`name`, by default below ~/tensorflow_datasets; of several configs or
    versions the last by name. The files must be array_record. Raises ValueError in one line.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise ValueError(
            'a TFDS set needs tensorflow-datasets: pip install ".[benchmark]"'
        ) from None
    root = Path(folder or "~/tensorflow_datasets").expanduser() / name
    stored = sorted(root.glob("**/dataset_info.json"))
    if not stored:
        raise ValueError(
            f"the TFDS dataset {name} is not below {root.parent}; prepare it there, or set"
            " config.data.tfds_dir"
        )
    try:
        return tfds.builder_from_directory(stored[-1].parent).as_data_source(split=split)
    except Exception as error:  # the library has many
        raise ValueError(
            f"the TFDS dataset {name}:{split} cannot be read ({str(error).splitlines()[0][:200]})"
        ) from None


class Captioned(NamedTuple):
    """An image with its caption.

    `stamp` changes when the image does; `read` gives it, uint8 [h, w, 3].
    """

    caption: str
    stamp: list[Any]
    read: Callable[[], np.ndarray]


def captioned_images(source: str, tfds_dir: str = "") -> list[Captioned]:
    """The images of a folder with a metadata.jsonl ({"file_name", "prompt"} a line), or of
    tfds:name:split[:caption key].

    Raises ValueError in one line.
    """
    if source.startswith("tfds:"):
        items, key = tfds_captions("config.data.images", source, tfds_dir, images=True)
        return [
            Captioned(texts_of(items[i][key])[0], [source, i], partial(stored_image, items, i))
            for i in range(len(items))
        ]
    root = Path(source)
    if not root.is_dir():
        raise ValueError(
            f"config.data.images = {source} is no folder; give one with images and a"
            " metadata.jsonl, or leave it empty"
        )
    if not (root / "metadata.jsonl").is_file():
        raise ValueError(
            f'config.data.images = {source} has no metadata.jsonl; it must hold {{"file_name": ...,'
            ' "prompt": ...} a line'
        )
    found = []
    for item in pipeline.read_prompts(root / "metadata.jsonl"):
        path = root / str(item.get("file_name", ""))
        if path.suffix.lower() not in IMAGES or not path.is_file():
            raise ValueError(
                f"{root / 'metadata.jsonl'} names the image {item.get('file_name')!r}, which is not"
                f" in {source}"
            )
        stamp = [str(path), path.stat().st_size, path.stat().st_mtime]
        found.append(Captioned(item["prompt"], stamp, partial(image_metrics.read_image, path)))
    return found


def stored_image(items: Any, i: int) -> np.ndarray:
    """The image of a stored example, grey ones in three channels: uint8 [h, w, 3]."""
    image = np.asarray(items[i]["image"], np.uint8)
    return np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image[..., :3]


def fit_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Uint8 [h, w, 3], cropped to the aspect ratio about its middle and resized: float32 [height,
    width, 3] in [-1, 1].
    """
    picture = Image.fromarray(image)
    scale = max(width / picture.width, height / picture.height)
    size = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return (
        np.asarray(picture.crop((left, top, left + width, top + height)), np.float32) / 127.5 - 1.0
    )


# ---------------------------------------------------------------------------------------------- run


class TextRun(TextSetup):
    """One distillation of one folder in one workdir.

    Making it checks the config and reads no weights.
    """

    def __init__(self, config: ConfigDict, workdir: Path) -> None:
        if not config.teacher.folder:
            raise ValueError(
                "config.teacher.folder is empty: give the teacher's pipeline folder, as diffusers'"
                " save_pretrained writes it"
            )
        if "://" in config.data.cache:
            raise ValueError(
                f"config.data.cache = {config.data.cache!r} must be a folder; give one that"
                " outlives the machines, or leave it empty"
            )
        super().__init__(config, open_teacher(config))
        self.workdir = workdir
        self.teacher_scheduler = diffusers_scheduler.of_folder(
            self.folder, solver=config.teacher.get("solver") or None
        )
        self.prompts = prompts_of(config.data.prompts, config.data.tfds_dir)
        self.pairs = (
            captioned_images(config.data.images, config.data.tfds_dir) if config.data.images else []
        )
        if self.adversarial and config.adversarial.reals == "data" and not self.pairs:
            raise ValueError(
                "config.adversarial.reals = 'data' needs config.data.images; or let the teacher"
                " draw them: config.adversarial.reals=teacher"
            )
        self.stop = loop.StopSignal()
        self.seconds: dict[str, float] = {}
        self.hashes: dict[Path, str] = {}

    def hash_of(self, part: diffusers_folder.Part) -> str:
        """Of a component's weights; each file is read once a run."""
        if part.folder not in self.hashes:
            self.hashes[part.folder] = checkpoint.hash_files(part.files())
        return self.hashes[part.folder]

    def agree(self) -> None:
        """Raise ValueError where the processes were given different prompts, images or weights:
        each reads its own copies.
        """
        if jax.process_count() == 1:
            return
        distributed.check_same(
            {
                "the prompts' checksum": record_cache.key_of(self.prompts),
                "the checksum of the images' captions": record_cache.key_of(
                    [pair.caption for pair in self.pairs]
                ),
                "the teacher's checksum": [
                    self.hash_of(part)
                    for part in (self.folder.unet, *self.folder.text_encoders, self.folder.vae)
                ],
            }
        )

    # -- weights

    def weights(self, dtype: str, *, on_mesh: bool = True) -> Any:
        """The folder's UNet in a dtype of DTYPES, each tensor straight to its place on the mesh, or
        else on this process's first device.
        """
        shardings = self.layout.of(self.abstract) if on_mesh else None
        return diffusers_folder.load_params(
            self.folder.unet, dtype=DTYPES[dtype], shardings=shardings
        )

    def student_params(self) -> dict[str, Any]:
        """Where the student starts: at the folder's weights in float32, whatever the teacher
        computes with, or at updates of zero.
        """
        student = self.fresh_updates() if self.config.student.lora_rank else self.weights("float32")
        return {"student": student, "discriminator": self.fresh_heads()}

    def teacher_pipe(self, teacher: Any) -> pipeline.TextToImage:
        """What draws the teacher's images: each process by itself, on all of its devices.

        Where each of them has a copy of the teacher this takes it, and makes no other. All
        processes must call it.
        """
        own = partition.own_layout(self.layout)
        return pipeline.TextToImage(
            self.folder, partition.local(teacher, own.mesh), self.teacher_scheduler, layout=own
        )

    # -- data

    def cache(
        self,
        name: str,
        key: str,
        count: int,
        make: Callable[[list[int]], Mapping[str, np.ndarray]],
        what: str,
        *,
        rows: int,
    ) -> record_cache.Cache:
        """A record cache below config.data.cache (the workdir's cache/ by default), made where it
        is missing.

        All processes make it together, `rows` records each at a time. `make`: their numbers, of
        which the last may stand several times so that one program serves all -> fields [rows, ...].
        """
        folder = Path(self.config.data.cache or self.workdir / "cache") / f"{name}-{key}"
        block = rows * jax.process_count()

        def part(first: int, last: int) -> dict[str, np.ndarray]:
            numbers = [min(i, last - 1) for i in range(first, first + rows)]
            return {field: values[: last - first] for field, values in make(numbers).items()}

        def work() -> Iterator[None]:
            writer = (
                record_cache.Writer(folder, count, block=block) if distributed.writes() else None
            )
            start = distributed.least(
                writer.done if writer else count
            )  # a machine that is new here has none of it
            began, said = 0.0, start
            try:
                for first in range(start, count, block):
                    last = min(first + block, count)
                    values = distributed.divided_rows(first, last, part)
                    if writer and first >= writer.done:
                        writer.add(values)
                    if first == start:  # its time is that of compiling
                        began = time.perf_counter()
                    if first == start or last == count or last - said >= 1000:
                        rate = max(last - start - block, 1) / max(time.perf_counter() - began, 1e-6)
                        say(
                            f"{what}: {last} of {count}"
                            + (f", {(count - last) / rate:.0f} s to go" if first > start else "")
                        )
                        said = last
                    yield
            finally:
                if writer:
                    writer.close()

        loop.prepare(what, work(), self.stop)
        distributed.barrier("a cache is written")
        return record_cache.Cache(folder)

    def open_data(self, pipe: pipeline.TextToImage) -> None:
        """The caches of prompts and of reals, made where they are missing."""
        config = self.config
        weights = [self.hash_of(part) for part in self.folder.text_encoders]
        tokenizers = checkpoint.hash_files(
            file
            for folder in self.folder.tokenizers
            for file in sorted(folder.iterdir())
            if file.is_file()
        )
        encoder = [
            weights,
            tokenizers,
            [dict(part.config) for part in self.folder.text_encoders],
            config.compute.dtype,
        ]

        def encode(prompts: Sequence[str]) -> Callable[[list[int]], dict[str, np.ndarray]]:
            return lambda numbers: {
                k: v.astype(np.float16) for k, v in pipe.text([prompts[i] for i in numbers]).items()
            }

        key = record_cache.key_of(encoder, self.prompts)
        self.texts = self.cache(
            "prompts", key, len(self.prompts), encode(self.prompts), "encoding prompts", rows=16
        )
        self.null = {k: v.astype(np.float32) for k, v in pipe.text.negative(None).items()}
        self.reals: record_cache.Cache | None = None
        height, width = self.size
        if self.adversarial and config.adversarial.reals == "data":
            captions = [pair.caption for pair in self.pairs]
            texts = encode(captions)

            def read(numbers: list[int]) -> dict[str, np.ndarray]:
                images = np.stack([fit_image(self.pairs[i].read(), height, width) for i in numbers])
                return {**texts(numbers), "latents": pipe.encode(images)}

            stamps = [pair.stamp for pair in self.pairs]
            key = record_cache.key_of(
                encoder, self.hash_of(self.folder.vae), captions, stamps, self.size
            )
            self.reals = self.cache(
                "images", key, len(captions), read, "encoding images", rows=4 * pipe.parts
            )
        elif self.adversarial:
            chosen = np.random.default_rng(config.seed).integers(
                0, len(self.prompts), config.adversarial.pool
            )
            captions = [self.prompts[i] for i in chosen]
            texts = encode(captions)
            sampler = {
                "steps": config.teacher.steps,
                "guidance": config.teacher.guidance,
                "seed": config.seed + 200,
            }
            solver = config.teacher.get("solver")

            def draw(numbers: list[int]) -> dict[str, np.ndarray]:
                options = {
                    **sampler,
                    "start": numbers[0],
                    "height": height,
                    "width": width,
                    "batch_size": config.log.batch_size,
                }
                return {
                    **texts(numbers),
                    "latents": pipe([captions[i] for i in numbers], decode=False, **options),
                }

            key = record_cache.key_of(
                encoder,
                self.hash_of(self.folder.unet),
                captions,
                sampler,
                solver,
                dict(self.folder.scheduler),
                self.size,
            )
            self.reals = self.cache(
                "teacher",
                key,
                len(captions),
                draw,
                "the teacher's images for the discriminator",
                rows=config.log.batch_size * pipe.parts,
            )

    def cond(self, record: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A batch's conditioning: float32, with XL's time ids."""
        found = {name: record[name].astype(np.float32) for name in record if name != "latents"}
        if self.folder.xl:
            found["time_ids"] = np.tile(pipeline.time_ids(*self.size), (len(found["context"]), 1))
        return found

    def batches(self) -> Callable[[int], dict[str, Any]]:
        """I -> this process's rows of batch i, a function of (seed, i) alone."""
        size, seed = self.config.student.batch_size, self.config.seed
        rows = partition.process_rows(self.layout.mesh, size)
        texts = self.texts.batches(size, seed, rows)
        reals = self.reals.batches(size, seed + 1, rows) if self.reals else None
        shape = np.zeros((len(rows), *self.latent_shape), np.float32)

        def batch(i: int) -> dict[str, Any]:
            made = {"x0": shape, "cond": self.cond(texts(i))}
            if reals is not None:
                record = reals(i)
                made |= {"real": record["latents"], "real_cond": self.cond(record)}
            return made

        return batch

    # -- phases

    def run(self, stop: loop.StopSignal) -> dict[str, Any]:
        """Caches, training, exports, results. Resumes where it was stopped."""
        config, self.stop = self.config, stop
        (self.workdir / "samples").mkdir(exist_ok=True)
        if (
            config.log.checkpoints
        ):  # a bucket that cannot be opened is told before the weights are read
            checkpoint.Checkpoints(f"{config.log.checkpoints}/student").close()
        began = time.perf_counter()
        teacher = self.weights(config.compute.teacher_dtype)
        pipe = self.teacher_pipe(teacher)
        student_pipe = pipeline.TextToImage(
            self.folder, pipe.params, self.scheduler, share=pipe, layout=pipe.layout
        )
        self.seconds["load"] = time.perf_counter() - began
        began = time.perf_counter()
        self.open_data(pipe)
        self.seconds["cache"] = time.perf_counter() - began
        health = TextHealth(self, pipe, student_pipe)
        state, seconds = train_phase(
            "student",
            self.student_params,
            self.abstract_student(),
            jax.random.key(config.seed + 1),
            self.loss,
            self.tx,
            self.batches(),
            {"teacher": teacher, "null": self.null},
            health,
            layout=self.layout,
            ema_decay=config.student.ema_decay,
            ema_of=student_of,
            accumulate=config.student.accumulate,
            steps=config.student.iterations,
            health_every=config.student.health_every,
            log=config.log,
            workdir=self.workdir,
            stop=stop,
            advice="lower config.student.learning_rate and start in a new workdir",
            checkpoint_folder=config.log.checkpoints or None,
            examples=config.student.batch_size,
            flops=(
                self.step_flops() if chips.of_device(jax.local_devices()[0]) else 0.0
            ),  # counting takes seconds
            profile=config.log.profile,
            keep_best=config.student.keep_best,
            own=pipe.layout,
        )
        self.seconds |= {"student": seconds.total, "saving the student": seconds.saving}
        results = {}
        if distributed.writes():
            self.export(state.ema_params)
            results = self.write_results()
        distributed.barrier("results are written")
        return results

    def export(self, student: Any) -> None:
        """student/ (Orbax), diffusers/ (a pipeline folder) and with LoRA lora/ (diffusers' file)."""
        config = self.config
        settings = {
            "steps": max(self.grids),
            "guidance": 1.0,
            "noise_correction": self.correct_noise,
        }
        merged = (
            lora.merge(self.weights("float32", on_mesh=jax.process_count() == 1), student)
            if config.student.lora_rank
            else student
        )
        if config.student.lora_rank:
            lora.save(self.workdir / "lora", student, stacked=self.stacked)
        scheduler = diffusers_scheduler.student_config(
            self.folder.scheduler, noise_correction=self.correct_noise
        )
        code = (
            (diffusers_scheduler.NOISE_CORRECTION_MODULE, diffusers_scheduler.NOISE_CORRECTION_CODE)
            if self.correct_noise
            else None
        )
        diffusers_folder.save_student(
            self.folder,
            self.workdir / "diffusers",
            merged,
            scheduler=scheduler,
            scheduler_code=code,
            dtype=DTYPES[config.export.dtype],
            extra={pipeline.SETTINGS: settings},
        )
        about = {
            "format": card.FORMAT,
            "role": "text-to-image student",
            "components": "../diffusers",
            "stacked": self.stacked,
            "unet": dict(self.folder.unet.config),
            "scheduler": scheduler,
            "sampler": settings,
        }
        checkpoint.export(self.workdir / "student", merged, about)

    def write_results(self) -> dict[str, Any]:
        """results.json, results.md and curves.png, from the health line of the averages that were
        exported.
        """
        curve = loop.read_curve(self.workdir / "curves" / "student.jsonl")
        lines = [record for record in curve if any(key.startswith("health/") for key in record)]
        best = self.config.student.keep_best
        exported = min(lines, key=lambda record: record[f"health/{best}"]) if best else lines[-1]
        numbers = {key.removeprefix("health/"): value for key, value in exported.items()}
        names = ("diversity", "contrast", "saturation", "distance")
        rows = [
            {"model": "student", "steps": n, **{k: round(numbers[f"{k}_{n}"], 5) for k in names}}
            for n in self.grids
        ]
        results = {
            "rows": rows,
            "protocol": (
                f"against the teacher ({self.config.teacher.steps} steps, guidance"
                f" {self.config.teacher.guidance:g}) on the same {self.config.log.health_prompts}"
                " prompts and noises; ratios, and the root-mean-square pixel difference"
            ),
            "prompts": len(self.prompts),
            "seconds": {k: round(v, 1) for k, v in self.seconds.items()},
            "config": json.loads(self.config.to_json()),
            "versions": versions(),
        }
        checkpoint.write_json(self.workdir / "results.json", results)
        head = "| steps | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1)
        body = "\n".join(
            f"| {row['steps']} | " + " | ".join(f"{row[k]:.3f}" for k in names) + " |"
            for row in rows
        )
        seconds = ", ".join(f"{k} {v:.0f} s" for k, v in results["seconds"].items())
        (self.workdir / "results.md").write_text(
            f"{head}\n{body}\n\nThe student {results['protocol']}.\n\nWall time: {seconds}.\n"
        )
        report.curves_picture(self.workdir / "curves.png", {"student": curve})
        return results


class TextHealth:
    """The health line: the student's images against the teacher's on fixed prompts, two noises a
    prompt.

    Between two lines the encoders and the decoder are in the host's memory, as is a teacher that
    was gathered for drawing: what the devices hold then is what `jaxdistill.aot` has planned.
    """

    def __init__(
        self, run: TextRun, pipe: pipeline.TextToImage, student_pipe: pipeline.TextToImage
    ) -> None:
        config = run.config
        count = min(config.log.health_prompts, len(run.prompts))
        self.run, self.pipe = run, student_pipe
        self.prompts = [p for p in run.prompts[:count] for _ in range(2)]
        self.labels = np.repeat(np.arange(count), 2)
        self.options: dict[str, Any] = {
            "seed": config.seed + 100,
            "height": run.size[0],
            "width": run.size[1],
            "batch_size": config.log.batch_size,
        }
        self.teacher = pipe(
            self.prompts,
            steps=config.teacher.steps,
            guidance=config.teacher.guidance,
            **self.options,
        )
        report.save_grid(
            run.workdir / "samples" / "teacher.png",
            self.teacher,
            columns=len(self.prompts),
            scale=1,
        )
        gathered = jax.process_count() > 1 and run.layout.mesh.size > run.layout.mesh.shape["data"]
        self.params = jax.device_get(pipe.params) if gathered else pipe.params
        self.rest = jax.device_get((pipe.text.params, pipe.vae_params))
        pipe.params, pipe.vae_params = None, None
        self.leave()

    def leave(self) -> None:
        """Take from the devices what only drawing needs."""
        self.pipe.params = None
        self.pipe.text.params, self.pipe.vae_params = self.rest

    def __call__(self, student: Any, step: int) -> dict[str, float]:
        """Print a line a step count, save the picture, return the numbers."""
        self.pipe.text.params, self.pipe.vae_params = jax.device_put(self.rest)
        layout = self.pipe.layout
        assert layout is not None
        teacher = layout.place(self.params) if self.run.config.student.lora_rank else None
        self.pipe.params = self.run.variables(student, teacher)
        rows = [self.teacher]
        numbers: dict[str, float] = {}
        for n in self.run.grids:
            images = self.pipe(self.prompts, steps=n, guidance=1.0, **self.options)
            found = evaluate.health(images, self.teacher, self.labels)
            say(
                f"health  student {step}, {n} step{'s' * (n > 1)}: "
                + ", ".join(f"{k} {v:.3f}" for k, v in found.items())
            )
            numbers |= {f"{k}_{n}": v for k, v in found.items()}
            rows.append(images)
        self.leave()
        report.save_grid(
            self.run.workdir / "samples" / f"student_{step:07d}.png",
            np.concatenate(rows),
            columns=len(self.prompts),
            scale=1,
        )
        return numbers


def run(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """The whole job; returns what results.json holds.

    Raises UserError, NonFiniteError or Stopped.
    """
    workdir = Path(workdir)
    try:
        job = TextRun(config, workdir)
        prepare_workdir(workdir, config)
        if cache := config.compute.compilation_cache:
            if "://" in cache:  # JAX only warns, and compiles at each start
                checkpoint.reach(cache, f"config.compute.compilation_cache = {cache}")
            jax.config.update("jax_compilation_cache_dir", cache)
        job.agree()
        with loop.StopSignal().installed() as stop:
            return job.run(stop)
    except (FolderError, ValueError) as error:
        raise UserError(str(error)) from None
