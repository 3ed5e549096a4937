"""Every method on every kind of task, as small as can be: trained, exported, loaded and drawn."""

from pathlib import Path

import folders
import idx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import text_config
import tiny

from configs import base, benchmark
from jaxdistill import main, sample, sampling
from jaxdistill.interop import text_export
from jaxdistill.methods import METHODS
from jaxdistill.tasks.text_to_image import pipeline

BERT = Path(__file__).parent / "golden" / "bert"
CAPTION = "a red bag above a blue boot"
TASKS = ("sd", "sdxl", "digits", "scenes")
CASES = [(task, method, lora) for task in TASKS for lora in (0, 2) for method in METHODS]
LCM = "LCMScheduler"
SHORT = {
    "student.iterations": 4,
    "student.budget": 0,
    "student.health_every": 100,
    "student.steps": (1, 2),
    "log.checkpoint_every": 100,
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
        config = text_config.get_config(method)
        config.teacher.folder = str(text_folder(task, method, root))
        config.data.prompts = str(root / "prompts.txt")
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


def text_folder(task, method, root):
    """The teacher's pipeline; of `endpoint` a finished student's, trained where it is missing."""
    if method != "endpoint":
        return folders.folder(task)
    finished = root / f"{task}-imagine_flash-0"
    if not (finished / "results.json").exists():
        main.run(config_of(task, "imagine_flash", 0, root), finished)
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
    if task in ("sd", "sdxl"):
        return row | against_diffusers(workdir, served)
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


def against_diffusers(workdir, served):
    """What stock diffusers says of a run's pipeline folders: the largest difference of an image at
    each step count, in 1/255, on the same start and the same fresh noise.
    """
    start = np.random.default_rng(0).standard_normal((2, 4, 8, 8), np.float32)
    paths = sorted(path for path in workdir.glob("diffusers*") if path.is_dir())
    worst, names, timesteps = 0.0, set(), {}
    for path in paths:
        ours = pipeline.load(path)
        steps = [n for n in served if len(paths) == 1 or n == ours.steps]
        for n in steps:
            found = ours(folders.PROMPTS, steps=n, latents=start)
            with pytest.MonkeyPatch.context() as patch:
                folders.give_noise(patch, fresh_noises(ours, n, start))
                theirs = folders.load_torch(path)
                expected = folders.torch_images(theirs, latents=start, steps=n, guidance=1.0)
            assert expected.std() > 0.02
            worst = max(worst, float(np.abs(found - expected).max()))
            names.add(type(theirs.scheduler).__name__)
            timesteps[n] = [int(t) for t in theirs.scheduler.timesteps]
    assert sorted(timesteps) == served and len(names) == 1
    about = {"scheduler": names.pop(), "timesteps": dict(sorted(timesteps.items()))}
    return {"exports": len(paths), "difference": 255 * worst, **about}


def fresh_noises(pipe, steps, start):
    """What our sampler draws between steps, NCHW."""
    noise = jnp.asarray(start.transpose(0, 2, 3, 1))
    times = jnp.asarray(pipe.scheduler.run(steps).next_times)
    keys = sampling.keys_of(noise)
    return [sampling.fresh_noise(keys, t, noise).transpose(0, 3, 1, 2) for t in times if t > 0]


def forget():
    """Programs of finished cases."""
    jax.clear_caches()
