"""Measure how well the teacher finishes images from states that the student made.

    python -m jaxdistill.teacher_states --benchmark=runs/benchmark

Backward distillation shows the teacher states of the student, on which it was never trained. Here
the teacher gets states of one time t from four sources and finishes each with its own guided
sampler. The sources are real scenes noised to t, the student's trajectory at t, and the student's
x̂0 noised again to the shifted time γ(t), with its trajectory's noise or with fresh noise. The
scores of the finished images tell what each source costs.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from jaxdistill import sampling
from jaxdistill.errors import UserError
from jaxdistill.interop import card
from jaxdistill.methods import imagine_flash
from jaxdistill.methods.recipe import settings_from
from jaxdistill.prediction import diffuse
from jaxdistill.run import checkpoint, compilation, loop, report
from jaxdistill.run.cli import Command, one_line_errors
from jaxdistill.run.run import Run
from jaxdistill.run.workdir import versions
from jaxdistill.tasks.scenes.task import SHAPE, Scenes
from jaxdistill.tasks.settings import changed

Rows = list[dict[str, Any]]
SOURCES = ("real", "student", "renoised", "renoised_fresh")


def settings_of(config: ConfigDict, method: str) -> imagine_flash.Settings:
    """Of Imagine Flash or a variant of it. Raises UserError for another method."""
    block = config.methods[method].to_dict()
    if block.pop("method", method) != "imagine_flash":
        raise UserError(
            f"--student was trained with {method!r}, which has no shift; choose a student of"
            " imagine_flash or its variants"
        )
    return cast(imagine_flash.Settings, settings_from(imagine_flash.Settings, block, method))


def states_of(task: Scenes, student: Any, method: str) -> Callable[..., dict[Any, Any]]:
    """(x0 real, noise, fresh noise, cond) -> {(source, time): states [b, h, w, c]} on the student's
    grid.
    """
    settings, sampler = settings_of(task.config, method), task.student_sampler
    reconstruction = imagine_flash.reconstruction_of(settings, task.schedule.T)
    shift = reconstruction.carried(task.schedule, reconstruction.shift)
    grid = sampler.grid(max(task.config.student.steps))

    @jax.jit
    def visit(params: Any, noise: Any, cond: Any) -> Any:
        denoiser = sampler.denoiser(params, noise, cond, 1.0, settings.noise_correction)
        return sampling.rollout(sampler.step(noise), denoiser, sampling.start(noise), grid)[1]

    def states(x0: Any, noise: Any, fresh: Any, cond: Any) -> dict[Any, Any]:
        trajectory = visit(student, noise, cond)
        found = {}
        for i, t in enumerate(map(float, grid)):
            gamma = float(shift(jnp.asarray(t)))
            for at in (t, gamma):
                found["real", at] = diffuse(task.schedule, x0, fresh, jnp.asarray(at))
            found["student", t] = trajectory.x[i]
            for source, eps in (("renoised", trajectory.eps[i]), ("renoised_fresh", fresh)):
                x = diffuse(task.schedule, trajectory.x0[i], eps, jnp.asarray(gamma))
                found[source, gamma] = x
        return found

    return states


def measure(task: Scenes, workdir: Path, folder: Path, samples: int, steps: int) -> Rows:
    """Rows {"source", "t", "fd", "all_right"}: the teacher's images from each source and time."""
    config, data, split = task.config, task.data, task.config.eval.split
    student, about = checkpoint.load_export(folder)
    teacher = jax.device_put(checkpoint.load_export(workdir / "teacher")[0])
    states = states_of(task, jax.device_put(student), about["method"])
    evaluator, conds = data.evaluator(split), data.conds(data.captions[split])
    samples = min(samples, len(data.captions[split]))
    real = data.images(split, samples).astype(np.float32) / 127.5 - 1.0
    size, kit = config.eval.batch_size, task.kit({})

    @jax.jit
    def finish(params: Any, x: Any, cond: Any, t: Any) -> Any:
        denoiser = kit.network.guided(params, cond, kit.null_cond, config.teacher.guidance)
        times = t * jnp.arange(steps, 0, -1) / steps
        step = sampling.ddim(task.schedule)
        return card.to_unit(sampling.rollout(step, denoiser, sampling.start(x), times)[0].x)

    images: dict[tuple[str, float], list[np.ndarray]] = {}
    for i in loop.tqdm(range(0, len(real), size), desc="teacher_states", mininterval=10):
        rows = np.resize(np.arange(i, min(i + size, len(real))), size)
        seeds = (config.eval.seed, config.eval.seed + 1)
        noise, fresh = (card.noise_of(seed, jnp.asarray(rows), SHAPE) for seed in seeds)
        cond = conds(rows)
        for key, x in states(real[rows], noise, fresh, cond).items():
            drawn = np.asarray(finish(teacher, x, cond, jnp.float32(key[1])))
            images.setdefault(key, []).append(drawn[: len(real) - i])
    found = [
        {"source": source, "t": round(t, 4), **evaluator.quick(np.concatenate(parts))}
        for (source, t), parts in images.items()
    ]
    return sorted(found, key=lambda row: (SOURCES.index(row["source"]), -row["t"]))


def write(out: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """teacher_states.json, .md and .png, a curve a source. Returns the table."""
    out.mkdir(parents=True, exist_ok=True)
    found = {**about, "rows": rows, "versions": versions()}
    checkpoint.write_json(out / "teacher_states.json", found)
    columns = {"source": ("states", "{}"), "t": ("t", "{:.3f}"), "fd": ("FD", "{:.3f}")}
    table = report.markdown_table(rows, {**columns, "all_right": ("all right", "{:.3f}")})
    (out / "teacher_states.md").write_text(table)
    figure = report.new_figure(10.0, 4.0)
    for axes, (key, title) in zip(figure.subplots(1, 2), Scenes.charted.items(), strict=True):
        for source in SOURCES:
            points = [(r["t"], r[key]) for r in rows if r["source"] == source]
            axes.plot(*zip(*points, strict=True), marker="o", label=source.replace("_", " "))
        axes.set(xlabel="time t of the state", ylabel=f"{title} of the teacher's images")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(out / "teacher_states.png", dpi=100)
    return table


NEEDED = "--benchmark=FOLDER"
FLAGS = {
    "benchmark": (None, "FOLDER: workdir of a benchmark that has trained the student"),
    "student": ("imagine_flash-0", "NAME: its folder in students/"),
    "out": (None, "FOLDER: for teacher_states.json, .md, .png (default: --benchmark)"),
    "samples": (1000, "images per source and time"),
    "steps": (20, "teacher steps from a state to the image"),
}


def define(values: flags.FlagValues) -> None:
    """The command's own flags."""
    for name, (default, about) in FLAGS.items():
        if isinstance(default, int):
            flags.DEFINE_integer(name, default, about, lower_bound=1, flag_values=values)
        else:
            flags.DEFINE_string(name, default, about, flag_values=values)


def main() -> None:
    """The command."""
    with one_line_errors():
        command = Command(
            __doc__, config=False, workdir=False, needed=NEEDED, define=define
        ).parse()
        if not command.benchmark:
            raise UserError("--benchmark is missing; give the workdir of a finished benchmark")
        folder, part = Path(command.benchmark), f"students/{command.student}/student"
        for name in ("config.json", "teacher/card.json", f"{part}/card.json"):
            if not (folder / name).exists():
                raise UserError(
                    f"--benchmark={folder} has no {name}; give the workdir of a finished benchmark,"
                    " or another --student"
                )
        compilation.check_devices()
        config = ConfigDict(json.loads((folder / "config.json").read_text()))
        if not config.data.source:
            raise UserError(
                f"--benchmark={folder} ran from captions alone; give one with config.data.source"
            )
        card_of = json.loads((folder / part / "card.json").read_text())
        settings_of(config, card_of["method"])
        changes = {"method.name": card_of["method"], "seed": card_of["seed"]}
        task = Scenes(changed(config, changes))
        with loop.StopSignal().installed() as stop:
            task.data.open(Run(task.config, folder, stop, task.layout))
            rows = measure(task, folder, folder / part, command.samples, command.steps)
        count = min(command.samples, len(task.data.captions[config.eval.split]))
        about = {"student": command.student, "samples": count, "steps": command.steps}
        out = Path(command.out or folder)
        print(write(out, {**about, "split": config.eval.split}, rows))


if __name__ == "__main__":
    main()
