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
from absl import flags, logging
from ml_collections import ConfigDict

from jaxdistill import main, sampling
from jaxdistill.benchmark import SHAPE, Benchmark, check, choose_method
from jaxdistill.interop import card
from jaxdistill.methods.contenders import imagine_flash_method
from jaxdistill.methods.imagine_flash import Trajectory
from jaxdistill.prediction import diffuse
from jaxdistill.run import checkpoint, loop, report
from jaxdistill.tasks.labelled_images.data import DataError
from jaxdistill.tasks.labelled_images.experiment import SHIFTS

FOLDER = flags.DEFINE_string(
    "benchmark", None, "Workdir of a benchmark that has trained the student."
)
STUDENT = flags.DEFINE_string("student", "imagine_flash-0", "Name of its folder in students/.")
OUT = flags.DEFINE_string(
    "out", None, "Folder of teacher_states.json, .md and .png; default: the benchmark's."
)
SAMPLES = flags.DEFINE_integer("samples", 1000, "Images a point.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 20, "Teacher steps from a state to the image.", lower_bound=1)

SOURCES = ("real", "student", "renoised", "renoised_fresh")


def states_of(
    bench: Benchmark, student: Any, sampler: card.Sampler, grid: np.ndarray, method: str
) -> Callable[..., dict[str, dict[float, Any]]]:
    """(x0 real, noise, fresh noise, cond) -> {source: {time: states [b, h, w, c]}} on the student's
    grid.
    """
    block, schedule = bench.config.method_settings[method], bench.schedule
    shift = card.choose(SHIFTS, block.shift, "shift")(schedule.T, **block.shift_settings.to_dict())

    @jax.jit
    def visit(params: Any, noise: Any, cond: Any) -> Trajectory:
        denoiser = sampler.denoiser(params, noise, cond, 1.0, block.noise_correction)
        return sampling.rollout(sampler.step(noise), denoiser, sampling.start(noise), grid)[1]

    def states(x0: Any, noise: Any, fresh: Any, cond: Any) -> dict[str, dict[float, Any]]:
        trajectory = visit(student, noise, cond)
        found: dict[str, dict[float, Any]] = {source: {} for source in SOURCES}
        for i, t in enumerate(grid):
            gamma = float(shift(jnp.asarray(t)))
            for at in (float(t), gamma):
                found["real"][at] = diffuse(schedule, x0, fresh, jnp.asarray(at))
            found["student"][float(t)] = trajectory.x[i]
            found["renoised"][gamma] = diffuse(
                schedule, trajectory.x0[i], trajectory.eps[i], jnp.asarray(gamma)
            )
            found["renoised_fresh"][gamma] = diffuse(
                schedule, trajectory.x0[i], fresh, jnp.asarray(gamma)
            )
        return found

    return states


def measure(bench: Benchmark, name: str, samples: int, steps: int) -> list[dict[str, Any]]:
    """Rows {"source", "t", "fd", "all_right"}: the teacher's images from each source and time."""
    config, size = bench.config, bench.config.eval.batch_size
    split = config.eval.split
    student, about = checkpoint.load_export(bench.workdir / "students" / name)
    evaluator = bench.evaluator(bench.recogniser(), split)
    teacher = bench.teacher(evaluator)
    sampler = bench.make(about["method"])(1).sampler
    grid = sampler.grid(max(config.student.steps))
    states = states_of(bench, jax.device_put(student), sampler, grid, about["method"])
    real = bench.images(split, samples).astype(np.float32) / 127.5 - 1.0
    captions = bench.captions[split][: len(real)]

    @jax.jit
    def finish(params: Any, x: Any, cond: Any, t: Any) -> Any:
        denoiser = bench.denoiser(params, cond, config.teacher.guidance)
        times = t * jnp.arange(steps, 0, -1) / steps
        return card.to_unit(
            sampling.rollout(sampling.ddim(bench.schedule), denoiser, sampling.start(x), times)[0].x
        )

    images: dict[tuple[str, float], list[np.ndarray]] = {}
    for i in loop.tqdm(range(0, len(real), size), desc="teacher_states", mininterval=10):
        rows = np.resize(np.arange(i, min(i + size, len(real))), size)
        kept = min(size, len(real) - i)
        cond = bench.embeddings([captions[r] for r in rows])
        noise, fresh = (
            card.noise_of(seed, jnp.asarray(rows), SHAPE)
            for seed in (config.eval.seed, config.eval.seed + 1)
        )
        for source, by_time in states(real[rows], noise, fresh, cond).items():
            for t, x in by_time.items():
                images.setdefault((source, t), []).append(
                    np.asarray(finish(teacher, x, cond, jnp.float32(t)))[:kept]
                )
    found = [
        {"source": s, "t": round(t, 4), **evaluator.quick(np.concatenate(parts))}
        for (s, t), parts in images.items()
    ]
    return sorted(found, key=lambda row: (SOURCES.index(row["source"]), -row["t"]))


def picture(path: Path, rows: list[dict[str, Any]]) -> None:
    """FD and all-right of the teacher's images against the time of the state, a curve a source."""
    figure = report.new_figure(10.0, 4.0)
    panels = figure.subplots(1, 2)
    for axes, (key, title) in zip(panels, report.SCORES.items(), strict=True):
        for source in SOURCES:
            points = [(r["t"], r[key]) for r in rows if r["source"] == source]
            axes.plot(*zip(*points, strict=True), marker="o", label=source.replace("_", " "))
        axes.set(xlabel="time t of the state", ylabel=f"{title} of the teacher's images")
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=100)


def cli() -> None:
    """Parse the flags and run."""
    main.parse_flags()
    logging.set_verbosity(logging.ERROR)
    try:
        if not FOLDER.value:
            raise main.UserError("--benchmark is missing; give the workdir of a benchmark")
        folder = Path(FOLDER.value)
        for part in ("config.json", f"students/{STUDENT.value}/card.json"):
            if not (folder / part).exists():
                raise main.UserError(
                    f"--benchmark={folder} has no {part}; run the benchmark first, or name another"
                    " --student"
                )
        config = ConfigDict(json.loads((folder / "config.json").read_text()))
        check(config)
        method = json.loads((folder / f"students/{STUDENT.value}/card.json").read_text())["method"]
        if choose_method(config, method) is not imagine_flash_method:
            raise main.UserError(
                f"--student={STUDENT.value} is of method {method!r}, which has no shift; name one"
                " of imagine_flash or its variants"
            )
        with loop.StopSignal().installed() as stop:
            bench = Benchmark(config, folder, stop)
            count = min(SAMPLES.value, len(bench.captions[config.eval.split]))
            rows = measure(bench, STUDENT.value, count, STEPS.value)
    except loop.Stopped as stopped:
        print(stopped)
        return
    except (main.UserError, DataError, ValueError) as error:
        main.fail(str(error))
    out = Path(OUT.value or folder)
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "student": STUDENT.value,
        "samples": count,
        "steps": STEPS.value,
        "split": config.eval.split,
    }
    checkpoint.write_json(
        out / "teacher_states.json", {**about, "rows": rows, "versions": main.versions()}
    )
    lines = ["| states | t | FD | all right |", "|---|---|---|---|"]
    lines += [
        f"| {r['source'].replace('_', ' ')} | {r['t']:.3f} | {r['fd']:.3f} | {r['all_right']:.3f} |"
        for r in rows
    ]
    (out / "teacher_states.md").write_text("\n".join(lines) + "\n")
    picture(out / "teacher_states.png", rows)
    print("\n".join(lines))


if __name__ == "__main__":
    cli()
