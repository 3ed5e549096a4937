"""Every method on every kind of task, as small as can be: trained, exported, loaded and drawn."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import flux_folders
import folders
import idx
import jax
import jax.numpy as jnp
import numpy as np
import pixart_folders
import pytest
import sd3_folders
import text_config
import tiny
import zimage_folders
from peft import PeftModel

from configs import base, benchmark, flux, pixart, sd3, sd15, zimage
from jaxdistill import main, sample, sampling
from jaxdistill.interop import how_to_sample, text_export
from jaxdistill.interop import lora as lora_file
from jaxdistill.methods import METHODS
from jaxdistill.tasks.text_to_image import pipeline

BERT = Path(__file__).parent / "golden" / "bert"
CAPTION = "a red bag above a blue boot"


def load_lora(pipe: Any, folder: Path) -> None:
    """By the stock pipeline's loader."""
    pipe.load_lora_weights(folder, weight_name=lora_file.FILE)


def load_adapter(pipe: Any, folder: Path) -> None:
    """By PEFT, as diffusers has no loader."""
    pipe.transformer = PeftModel.from_pretrained(pipe.transformer, folder)


class Family(NamedTuple):
    """What a family of pipelines has of its own: a tiny folder, a config of configs/, a size in
    pixels; and in stock diffusers its loaders, and the form of its latents.
    """

    folder: Callable[[], Path]
    config: ModuleType
    size: tuple[int, int] = (64, 64)
    load: Callable[[Path], Any] = folders.load_torch
    load_lora: Callable[[Any, Path], None] = load_lora
    packed: Callable[[np.ndarray], np.ndarray] = np.ascontiguousarray


FAMILIES = {
    "sd": Family(lambda: folders.folder("sd"), sd15),
    "sdxl": Family(lambda: folders.folder("sdxl"), sd15),
    "sd3": Family(lambda: sd3_folders.folder("no_t5"), sd3, (32, 48), sd3_folders.load_stock),
    "pixart": Family(
        lambda: pixart_folders.folder("alpha"), pixart, (64, 96), load_lora=load_adapter
    ),
    "flux": Family(lambda: flux_folders.folder("dev"), flux, (32, 48), packed=flux_folders.packed),
    "zimage": Family(lambda: zimage_folders.folder("small"), zimage, (64, 96)),
}
TASKS = (*FAMILIES, "digits", "scenes")
CASES = [(task, method, lora) for task in TASKS for lora in (0, 2) for method in METHODS]
SHORT = {
    "student.iterations": 4,
    "student.budget": 0,
    "student.health_every": 100,
    "student.steps": (1, 2),
    "log.checkpoint_every": 100,
    "guard.action": "warn",  # four steps tell nothing
    "methods.step_distillation.first": 4,
    "methods.direct.pairs_steps": 4,
    "methods.direct.pairs": 6,
    "methods.lightning.first": 4,
    "methods.lightning.substeps": 2,
    "methods.lightning.counts": (2, 1),
    "methods.dmd2.fake_updates": 2,
    "methods.tdm.fake_updates": 2,
    "methods.matched.matching.fake_updates": 2,
    "methods.matched.matching.counts": (2,),
    "methods.matched.one.steps": 2,
    "adversarial.pool": 6,
}


def config_of(task, method, lora, root):
    """The config of a case. The small tasks' teachers are those of `prepare`."""
    if task == "digits":
        config = base.chosen(tiny.get_config(), method, file="tiny")
        config.update_from_flattened_dict({"teacher.steps": 4, "teacher.iterations": 20})
        teacher = root / "digits-teacher" / "teacher"
        config.teacher.path = str(teacher) if teacher.is_dir() else ""
    elif task == "scenes":
        config = base.chosen(benchmark.get_config("smoke"), method, file="scenes")
        config.data.update({"source": str(fashion(root)), "cache": str(root / "scenes")})
        config.text.folder = str(BERT)
        teacher = root / "scenes-teacher"
        config.base = str(teacher) if (teacher / "results.json").exists() else ""
    else:
        family = FAMILIES[task]
        config = text_config.get_config(method, family.config)
        config.teacher.folder = str(text_folder(task, method, lora, root))
        config.data.height, config.data.width = family.size
        config.data.prompts = str(root / "prompts.txt")
        config.compute.scan &= bool(lora)
        (root / "prompts.txt").write_text("a cat\na dog at a cat\nphoto\n")
    short = {**SHORT, "student.lora_rank": lora}
    if method == "endpoint":
        short["student.steps"] = (1,)
    config.update_from_flattened_dict(short)
    return config


def fashion(root):
    """Made-up garments, written once."""
    folder = root / "idx"
    if not folder.is_dir():
        folder.mkdir(parents=True)
        idx.write_fashion(folder)
    return folder


def text_folder(task, method, lora, root):
    """The teacher's pipeline; of `endpoint` that of a finished student of the same weights, trained
    where it is missing.
    """
    if method != "endpoint":
        folder = root / f"{task}-folder"  # a run that goes on has its teacher where it was
        return folder if folder.is_dir() else shutil.copytree(FAMILIES[task].folder(), folder)
    finished = root / f"{task}-imagine_flash-{lora}"
    if not (finished / "results.json").exists():
        main.run(config_of(task, "imagine_flash", lora, root), finished)
    return finished / "diffusers"


def prepare(task, root):
    """The small tasks' teacher."""
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"{task}-teacher"
    if task in ("digits", "scenes") and not (folder / "results.json").exists():
        main.run(config_of(task, "imagine_flash", 0, root), folder)


def run_case(task, method, lora, root):
    """Train and export one case, load what it left, and draw; a row of the table.

    Raises where something is not as it must be.
    """
    prepare(task, root)
    workdir = root / f"{task}-{method}-{lora}"
    config = config_of(task, method, lora, root)
    if method == "endpoint" and task in ("digits", "scenes"):
        student = root / f"{task}-teacher" / "student"
        config.update_from_flattened_dict(finished_teacher(task, student))
    results = main.run(config, workdir)
    served = sorted({row["steps"] for row in results["rows"] if row["model"] == "student"})
    assert served == sorted(config.student.steps), served
    row = {"task": task, "method": method, "weights": "LoRA" if lora else "full"}
    if family := FAMILIES.get(task):
        row |= against_diffusers(family, workdir, Path(config.teacher.folder))
        assert [int(n) for n in row["timesteps"]] == served
        return row
    exports = sorted(path.name for path in workdir.glob("student*") if path.is_dir())
    teacher = small_images(task, root / f"{task}-teacher" / "teacher")
    for name in exports:
        images = small_images(task, workdir / name)
        assert np.isfinite(images).all() and (images != teacher).any()
        assert images.std() > 0.5 * teacher.std() > 0  # a teacher of a few steps is nearly grey
    return row | {"exports": len(exports), "drawn": True}


def finished_teacher(task, student):
    """Changes that put a finished student in the teacher's place."""
    return {"teacher.path": str(student)}


def small_images(task, folder):
    """Images of a small export, as `jaxdistill.sample` draws them."""
    if task == "digits":
        return sample.generate(folder, num=4, steps=1)[0]
    return text_export.TextExport(folder, encoder=BERT)([CAPTION] * 2, steps=1)


def against_diffusers(family, workdir, teacher):
    """What stock diffusers says of a run's pipeline folders, and of its teacher with the run's
    LoRAs, each drawn as how_to_sample.json says: the largest difference of an image, in 1/255, on
    the same start and the same fresh noise.

    "moved" is the least that a student's images differ from its teacher's.
    """
    worst, moved, names, timesteps = 0.0, np.inf, set(), {}
    paths = sorted(path for path in workdir.glob("diffusers*") if path.is_dir())
    for path in paths:
        how = json.loads((path / how_to_sample.FILE).read_text())["diffusers"]
        ours, theirs, base = pipeline.load(path), family.load(path), family.load(teacher)
        scheduler = type(theirs.scheduler)
        base.scheduler = scheduler.from_config(base.scheduler.config, **how["from_config"])
        pipes = {"student": theirs, "teacher": base}
        updates = path.with_name(path.name.replace("diffusers", "lora"))
        if updates.is_dir():
            pipes["LoRA"] = with_lora = family.load(teacher)
            with_lora.scheduler = base.scheduler
            family.load_lora(with_lora, updates)
        for n, call in how["calls"].items():
            start = starts(ours)
            found = ours(folders.PROMPTS, steps=int(n), latents=start)
            noises = fresh_noises(ours, int(n), start)
            far = {
                name: 255 * np.abs(found - stock_images(family, pipe, start, noises, call)).max()
                for name, pipe in pipes.items()
            }
            assert found.std() > 0.02
            moved = min(moved, float(far.pop("teacher")))
            worst = max(worst, float(max(far.values())))
            timesteps[n] = [round(float(t)) for t in theirs.scheduler.timesteps]
        names.add(scheduler.__name__)
    assert len(names) == 1
    about = {"scheduler": names.pop(), "timesteps": dict(sorted(timesteps.items()))}
    return {"exports": len(paths), "difference": worst, "moved": moved, **about}


def starts(ours):
    """Standard normal latents [2, c, h, w] of the size that a student was trained for."""
    sides = (side // ours.vae.factor for side in ours.check())
    shape = (2, ours.network.in_channels, *sides)
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def stock_images(family, pipe, start, noises, call):
    """What a stock pipeline draws of a start and fresh noises [n, c, h, w]."""
    with pytest.MonkeyPatch.context() as patch:
        folders.give_noise(patch, [family.packed(noise) for noise in noises])
        latents = folders.torch.tensor(family.packed(start))
        prompts = list(folders.PROMPTS)  # Z-Image's pipeline writes into its list
        return pipe(prompts, latents=latents, output_type="np", **call).images


def fresh_noises(pipe, steps, start):
    """What our sampler draws in each step, NCHW. Of the last one nothing is seen, but the scheduler
    of flow matching draws it.
    """
    noise = jnp.asarray(start.transpose(0, 2, 3, 1))
    times = jnp.asarray(pipe.scheduler.run(steps).next_times)
    keys = sampling.keys_of(noise)
    return [sampling.fresh_noise(keys, t, noise).transpose(0, 3, 1, 2) for t in times]


def forget():
    """Programs of finished cases."""
    jax.clear_caches()
