"""`python -m jaxdistill.teacher_states --benchmark=DIR`: how well does the teacher do on states
that the student made?

The objection to backward distillation: its teacher sees the student's states, on which it was never
trained. So the teacher is given states of one time t from four sources and finishes each by its own
guided sampler: real scenes noised to t, the student's own trajectory at t, and the student's x̂0
re-noised to the shifted time γ(t) with its trajectory's noise and with fresh noise (the shifted
reconstruction loss). Scores of the finished images say what the source costs.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from jaxdistill import sampling
from jaxdistill.benchmark import Benchmark, of_method
from jaxdistill.errors import UserError
from jaxdistill.interop import card
from jaxdistill.methods import imagine_flash
from jaxdistill.methods.recipe import settings_from
from jaxdistill.prediction import diffuse
from jaxdistill.run import checkpoint, loop, report
from jaxdistill.run.cli import Command, one_line_errors
from jaxdistill.run.workdir import versions
from jaxdistill.tasks.scenes.task import SHAPE, Scenes

SOURCES = ("real", "student", "renoised", "renoised_fresh")


def settings_of(config: ConfigDict, method: str) -> imagine_flash.Settings:
    """Of Imagine Flash or a variant of it. Raises UserError for another method."""
    block = config.methods[method].to_dict()
    if block.pop("method", method) != "imagine_flash":
        raise UserError(
            f"--student is of method {method!r}, which has no shift; name one of imagine_flash or"
            " its variants"
        )
    found: imagine_flash.Settings = settings_from(imagine_flash.Settings, block, method)
    return found


def states_of(task: Scenes, student: Any, method: str) -> Callable[..., dict[Any, Any]]:
    """(x0 real, noise, fresh noise, cond) -> {(source, time): states [b, h, w, c]} on the student's
    grid.
    """
    settings, sampler = settings_of(task.config, method), task.student_sampler
    shift = imagine_flash.reconstruction_of(settings, task.schedule.T).shift
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


def measure(bench: Benchmark, folder: Path, samples: int, steps: int) -> list[dict[str, Any]]:
    """Rows {"source", "t", "fd", "all_right"}: the teacher's images from each source and time."""
    config, data = bench.config, bench.data
    student, about = checkpoint.load_export(folder)
    task = Scenes(of_method(config, about["method"], about["seed"]), data=data, share=bench.task)
    states, teacher = states_of(task, jax.device_put(student), about["method"]), bench.prepare()
    evaluator, conds = (
        data.evaluator(config.eval.split),
        data.conds(data.captions[config.eval.split]),
    )
    real = data.images(config.eval.split, samples).astype(np.float32) / 127.5 - 1.0
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
    """teacher_states.json, .md and .png: FD and all-right against the time of the state, a curve a
    source. Returns the table.
    """
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(
        out / "teacher_states.json", {**about, "rows": rows, "versions": versions()}
    )
    columns = {"source": ("states", "{}"), "t": ("t", "{:.3f}"), "fd": ("FD", "{:.3f}")}
    table = report.markdown_table(rows, {**columns, "all_right": ("all right", "{:.3f}")})
    (out / "teacher_states.md").write_text(table)
    figure = report.new_figure(10.0, 4.0)
    for axes, (key, title) in zip(figure.subplots(1, 2), report.SCORES.items(), strict=True):
        for source in SOURCES:
            points = [(r["t"], r[key]) for r in rows if r["source"] == source]
            axes.plot(*zip(*points, strict=True), marker="o", label=source.replace("_", " "))
        axes.set(xlabel="time t of the state", ylabel=f"{title} of the teacher's images")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(out / "teacher_states.png", dpi=100)
    return table


def define(values: flags.FlagValues) -> None:
    """The command's own flags."""
    about = "Workdir of a benchmark that has trained the student."
    flags.DEFINE_string("benchmark", None, about, flag_values=values)
    about = "Name of its folder in students/."
    flags.DEFINE_string("student", "imagine_flash-0", about, flag_values=values)
    about = "Folder of teacher_states.json, .md and .png; default: the benchmark's."
    flags.DEFINE_string("out", None, about, flag_values=values)
    more = {"flag_values": values, "lower_bound": 1}
    flags.DEFINE_integer("samples", 1000, "Images a point.", **more)
    flags.DEFINE_integer("steps", 20, "Teacher steps from a state to the image.", **more)


def open_benchmark(command: Command) -> tuple[ConfigDict, Path, Path]:
    """(config, workdir, the student's export) of the flags. Raises UserError."""
    if not command.benchmark:
        raise UserError("--benchmark is missing; give the workdir of a benchmark")
    folder, part = Path(command.benchmark), f"students/{command.student}/student"
    for name in ("config.json", f"{part}/card.json"):
        if not (folder / name).exists():
            raise UserError(
                f"--benchmark={folder} has no {name}; run the benchmark first, or name another"
                " --student"
            )
    config = ConfigDict(json.loads((folder / "config.json").read_text()))
    if not config.data.source:
        raise UserError(f"--benchmark={folder} ran from captions alone; real scenes are needed")
    settings_of(config, json.loads((folder / part / "card.json").read_text())["method"])
    return config, folder, folder / part


def main() -> None:
    """The command."""
    with one_line_errors():
        command = Command(__doc__, config=False, workdir=False, define=define).parse()
        config, folder, student = open_benchmark(command)
        with loop.StopSignal().installed() as stop:
            bench = Benchmark(config, folder, stop)
            samples, steps = command.samples, command.steps
            count = min(samples, len(bench.data.captions[config.eval.split]))
            rows = measure(bench, student, count, steps)
        about = {"student": command.student, "samples": count, "steps": steps}
        out = Path(command.out or folder)
        print(write(out, {**about, "split": config.eval.split}, rows))


if __name__ == "__main__":
    main()
