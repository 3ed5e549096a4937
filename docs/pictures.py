"""The documentation's pictures, each in light and dark: docs/pictures/NAME-light.png and -dark.png.

    python docs/pictures.py NAME ...

hero        the scenes' teacher and students of pretrained/, on the first captions of the test split
trajectory  one training example of Imagine Flash, from a finished run of configs/digits.py (--run)
quality     FD against steps of all methods, from docs/results/
page        a running `python -m jaxdistill.serve` (--url) of student and teacher, also on a phone
memory      what each job needs of a TPU chip, from docs/results/plans.json
"""

import argparse
import contextlib
import itertools
import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

# -------------------------------------------------------------------------------------------- style

DPI = 192
WIDTH = 1600 / DPI  # inches; GitHub shows some 830 pixels, so one point is 1.4 pixels there


@dataclass(frozen=True)
class Theme:
    """Colours of a page: what is written, what is quiet, and series that the colour-blind tell
    apart.
    """

    name: str
    surface: str
    text: str
    muted: str
    line: str
    ours: str
    second: str
    series: tuple[str, ...]


THEMES = {
    "light": Theme(
        name="light",
        surface="#ffffff",
        text="#1f2328",
        muted="#59636e",
        line="#d1d9e0",
        ours="#c2410c",
        second="#0b62c4",
        series=("#00795a", "#8a6d00", "#a3408a", "#157a90", "#57606a", "#7b5ad0", "#7a4a2b"),
    ),
    "dark": Theme(
        name="dark",
        surface="#0d1117",
        text="#f0f6fc",
        muted="#9198a1",
        line="#3d444d",
        ours="#ff9350",
        second="#6cb6ff",
        series=("#2fc79a", "#dcc13f", "#e58fc9", "#4fd0e0", "#a5b1bd", "#b8a1ff", "#c99b78"),
    ),
}


@contextlib.contextmanager
def styled(name: str) -> Iterator[Theme]:
    """The theme, with matplotlib set to it as long as the block lasts."""
    theme = THEMES[name]
    settings: dict[str, Any] = {
        "font.family": "DejaVu Sans",
        "font.size": 8.5,
        "axes.titlesize": 9.5,
        "axes.labelsize": 8.5,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "legend.fontsize": 8.5,
        "legend.frameon": False,
        "text.color": theme.text,
        "axes.labelcolor": theme.text,
        "axes.titlecolor": theme.text,
        "axes.edgecolor": theme.muted,
        "axes.facecolor": theme.surface,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.prop_cycle": matplotlib.cycler(color=[theme.ours, theme.second, *theme.series]),
        "grid.color": theme.line,
        "grid.linewidth": 0.6,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelcolor": theme.text,
        "ytick.labelcolor": theme.text,
        "figure.facecolor": theme.surface,
        "savefig.facecolor": theme.surface,
    }
    with matplotlib.rc_context(settings):
        yield theme


def save(figure: Figure, folder: Path, name: str, theme: Theme, *, exact: bool = False) -> Path:
    """Write FOLDER/NAME-THEME.png, small: 256 colours do where `exact` is not asked for."""
    path = folder / f"{name}-{theme.name}.png"
    figure.savefig(path, dpi=DPI)
    image = Image.open(path).convert("RGB")
    if not exact:
        image = image.quantize(256, dither=Image.Dither.NONE)
    image.save(path, optimize=True)
    return path


def both(name: str, folder: Path, draw: Callable[[Theme], Figure], *, exact: bool = False) -> None:
    """The picture in each theme."""
    for theme in THEMES:
        with styled(theme) as chosen:
            print(save(draw(chosen), folder, name, chosen, exact=exact))


# --------------------------------------------------------------------------------------------- hero

ROWS = (
    ("teacher", 50, "Teacher, 50 steps", "100 network calls"),
    ("teacher", 3, "Teacher, 3 steps", "6 network calls"),
    ("student", 3, "Student, 3 steps", "3 network calls"),
    ("student", 2, "Student, 2 steps", "2 network calls"),
    ("student_one_step", 1, "Student, 1 step", "1 network call"),
)
"""Folder of pretrained/scenes, steps, and what the picture says. Guidance doubles the teacher's
calls.
"""
COLUMNS, SEED = 8, 0


def hero(args: argparse.Namespace) -> None:
    """Teacher and students, the same captions and noises."""
    from jaxdistill.interop.text_export import TextExport
    from jaxdistill.tasks.scenes import reference

    base = ROOT / "pretrained/scenes"
    captions = reference.load(base / "recogniser" / reference.FILE)[0]["test"].captions[:COLUMNS]
    models = {name: TextExport(base / name) for name in dict.fromkeys(row[0] for row in ROWS)}
    drawn = [models[name](captions, steps=steps, seed=SEED) for name, steps, *_ in ROWS]
    drawn = [np.round(images * 31) / 31 for images in drawn]  # a quarter smaller, looks the same

    def draw(theme: Theme) -> Figure:
        # Whole pixels, five for one of an image.
        left, size, gap, top = (n / DPI for n in (256, 160, 8, 146))
        figure = Figure(figsize=(WIDTH, top + len(ROWS) * (size + gap) + gap))
        axes = canvas(figure)
        height = figure.get_figheight()
        for column, caption in enumerate(captions):
            middle = left + column * (size + gap) + size / 2
            lines = textwrap.fill(caption, 15)
            axes.text(middle, height - top + 0.06, lines, ha="center", va="bottom", fontsize=7)
        for row, (name, _, who, cost) in enumerate(ROWS):
            y = height - top - (row + 1) * size - row * gap
            color = theme.text if name == "teacher" else theme.ours
            at = {"ha": "right", "x": left - 0.09}
            middle = y + size / 2
            bold = {"weight": "bold", "fontsize": 8.2, "color": color}
            axes.text(y=middle + 0.02, s=who, va="bottom", **bold, **at)
            axes.text(y=middle - 0.02, s=cost, va="top", fontsize=8, **at)
            for column, image in enumerate(drawn[row]):
                place(axes, image, left + column * (size + gap), y, size)
        return figure

    both("hero", args.out, draw, exact=True)


def canvas(figure: Figure) -> Any:
    """Axes over the whole figure, in inches."""
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, figure.get_figwidth()), ylim=(0, figure.get_figheight()))
    axes.set_axis_off()
    axes.set_autoscale_on(False)
    return axes


def place(
    axes: Any, image: np.ndarray, x: float, y: float, size: float, frame: str | None = None
) -> None:
    """An image [h, w, c] in [0, 1], its pixels as they are, its lower left corner at (x, y)."""
    extent = (x, x + size, y, y + size)
    shown = np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image
    axes.imshow(shown, extent=extent, interpolation="nearest", zorder=3, aspect="auto")
    if frame:
        edge = matplotlib.patches.Rectangle(
            (x, y), size, size, fill=False, ec=frame, lw=1.6, zorder=4
        )
        axes.add_patch(edge)


# --------------------------------------------------------------------------------------- trajectory


def example(run: Path, label: int) -> dict[str, Any]:
    """What the first training step computes for one noise and class, by the loss's own parts: the
    student still has the teacher's weights.
    """
    import jax

    from jaxdistill.interop import card
    from jaxdistill.methods import imagine_flash as flash
    from jaxdistill.methods.recipe import settings_from
    from jaxdistill.methods.trajectories import Walk, unique_grids
    from jaxdistill.model import Model
    from jaxdistill.run import checkpoint
    from jaxdistill.sampling import unconstrained

    config = json.loads((run / "config.json").read_text())
    block = config["methods"]["imagine_flash"]
    settings = settings_from(flash.Settings, block, "config.methods.imagine_flash")
    params, _ = checkpoint.load_export(run / "teacher")
    about = json.loads((run / "student/card.json").read_text())
    sampler = card.build_sampler(about)
    model = Model(sampler.model.apply, sampler.schedule, card.PREDICTIONS[about["prediction"]][0])
    grids = unique_grids([sampler.grid(n) for n in config["student"]["steps"]])
    step = flash.ddim(model.schedule)
    walk = Walk(model, grids, step, correct_noise=settings.noise_correction)
    reconstruction = flash.reconstruction_of(settings, model.schedule.T)
    correct = flash.Correction(
        model, sampler.model.null_cond, reconstruction, unconstrained, unroll=False
    )
    cond = np.full(1, label, np.int32)
    batch = {"x0": np.zeros((1, *about["data"]["image_shape"]), np.float32), "cond": cond}
    keys = jax.random.split(jax.random.key(SEED), 3)
    (part,) = walk.visit(params, batch, *keys[:2])
    start, gamma = correct.start(part, keys[2])
    target = correct.x0(params, start, gamma, np.repeat(cond, len(gamma)))
    found = {name: getattr(part.trajectory, name)[:, 0] for name in ("t", "x", "x0")}
    found |= {"gamma": gamma, "start": start, "target": target}
    return {name: np.asarray(value) for name, value in found.items()} | {"k": reconstruction.steps}


def trajectory(args: argparse.Namespace) -> None:
    """Backward distillation and the shifted reconstruction loss on one noise."""
    found = example(args.run, args.label)
    both("trajectory", args.out, lambda theme: trajectory_figure(theme, found))


def arrow(axes: Any, path: Sequence[tuple[float, float]], color: str, **style: Any) -> None:
    """Straight pieces through the points, with a head at the end."""
    axes.plot(*zip(*path, strict=True), color=color, lw=1.5, zorder=2, **style)
    (a, b), (x, y) = path[-2:]
    length = np.hypot(x - a, y - b)
    tail = (x - 0.1 * (x - a) / length, y - 0.1 * (y - b) / length)
    head = {"arrowstyle": "-|>,head_width=0.28,head_length=0.5", "color": color, "lw": 0.5}
    head |= {"shrinkA": 0, "shrinkB": 0, "mutation_scale": 10}
    axes.annotate("", (x, y), tail, arrowprops=head, zorder=2)


SIZE, LANES, ROW = 0.62, 0.96, 1.94  # of a state of the trajectory, in inches


def trajectory_figure(theme: Theme, found: dict[str, Any]) -> Figure:
    """A row a state, all on one axis of time: above the student, below the teacher."""
    top, bottom, half = 0.78, 0.82, SIZE / 2
    count = len(found["t"])
    figure = Figure(figsize=(WIDTH, top + ROW * count - 0.3 + bottom))
    axes, height = canvas(figure), figure.get_figheight()
    student, teacher = theme.ours, theme.second

    def at(t: float) -> float:
        return 6.2 - 4.7 * float(t)

    def say(x: float, y: float, text: str, color: str, **style: Any) -> None:
        box = {"facecolor": theme.surface, "lw": 0, "pad": 1.2}
        axes.text(x, y, text, color=color, bbox=box, zorder=3, **({"va": "center"} | style))

    def thumb(image: np.ndarray, t: float, y: float, color: str) -> None:
        place(axes, np.clip(image * 0.5 + 0.5, 0, 1), at(t) - half, y - half, SIZE, color)

    def fraction(t: float) -> str:
        return "T" if t == 1 else "0" if t == 0 else f"{t:.2g} T"

    say(0.12, height - 0.24, "time t", theme.muted)
    for t in (*found["t"], 0.0, *np.unique(found["gamma"])):
        shift = t in found["gamma"]
        color = teacher if shift else theme.line
        axes.plot([at(t)] * 2, [bottom, height - 0.38], color=color, lw=0.9, ls=":", zorder=0)
        name = f"γ = {fraction(t)}" if shift else fraction(t)
        color = teacher if shift else theme.text
        say(at(t), height - 0.24, name, color, ha="center", weight="bold")
    for n, (t, gamma) in enumerate(zip(found["t"], found["gamma"], strict=True)):
        y = height - top - half - n * ROW
        low, middle, first = y - LANES, y - LANES / 2, n == 0
        name = f"State {n + 1}"
        axes.text(0.12, y, name, weight="bold", va="center")
        said = f"t = {fraction(t)}\nγ(t) = {fraction(gamma)}"
        axes.text(0.12, y - 0.13, said, va="top", linespacing=1.4)
        small = {"fontsize": 8, "ha": "center"}
        # The student: from its own state to an image.
        thumb(found["x"][n], t, y, student)
        thumb(found["x0"][n], 0, y, student)
        noise = "$x_T$: noise" if first else "$x_t$: its own state"
        say(at(t), y + half + 0.1, noise, student, **small)
        arrow(axes, [(at(t) + half, y), (at(0) - half - 0.02, y)], student)
        if first:
            say(at(0.45), y, "student, one network call, with gradient", student, **small)
        # Its image is noised again.
        path = [(at(0), y - half), (at(0), middle), (at(gamma), middle)]
        arrow(axes, [*path, (at(gamma), low + half + 0.03)], theme.muted, ls=(0, (3, 1.5)))
        again = "noised again, with the trajectory's noise $\\hat{\\varepsilon}$, to γ(t)"
        again = again if first else "noised again, to γ(t)"
        say(at(0.39 if first else 0.24), middle, again, theme.text, **small)
        # The teacher: from there to the target.
        thumb(found["start"][n], gamma, low, teacher)
        thumb(found["target"][n], 0, low, teacher)
        arrow(axes, [(at(gamma) + half, low), (at(0) - half - 0.02, low)], teacher)
        for i in range(1, found["k"]):
            mark = at(gamma * (1 - i / found["k"]))
            axes.plot(mark, low, "o", color=teacher, ms=4.5, zorder=2)
        if first:
            say(at(0.4), low, f"teacher, {found['k']} steps", teacher, **small)
        # What is compared.
        x = at(0) + half + 0.1
        steps = "1 step" if first else f"{n + 1} steps"
        said = "the student's $\\hat{x}_0$:\nits image in " + steps
        axes.text(x + 0.2, y, said, color=student, fontsize=8, va="center")
        said = "the teacher's $\\hat{x}_0$:\nthe target"
        axes.text(x + 0.2, low, said, color=teacher, fontsize=8, va="center")
        axes.plot([x, x + 0.09, x + 0.09, x], [y, y, low, low], color=theme.text, lw=1.2)
        loss = np.mean((found["target"][n] - found["x0"][n]) ** 2)
        axes.text(x + 0.2, middle, f"loss {loss:.3f}", weight="bold", va="center")
        # On to the next state.
        if n + 1 < count:
            after, end = y - ROW, at(found["t"][n + 1]) - half - 0.02
            axes.plot([at(t)] * 2, [y - half, after], color=theme.surface, lw=6, zorder=2)
            arrow(axes, [(at(t), y - half), (at(t), after), (end, after)], student)
            where = (at(t) + end) / 2
            say(where, after, "DDIM step" if n else "DDIM step, no gradient", student, **small)
    for line, (what, said) in enumerate(TRAJECTORY_SAYS):
        y = 0.57 - 0.215 * line
        axes.text(0.12, y, what, weight="bold", fontsize=8)
        axes.text(2.13, y, said, fontsize=8)
    return figure


TRAJECTORY_SAYS = (
    ("Backward distillation:", "the student trains on the states that it reaches when it samples."),
    (
        "Shifted reconstruction:",
        "the teacher starts from the student's image, noised to γ(t), not from the state at t.",
    ),
    ("Shown:", "the first training step, when the student still has the teacher's weights."),
)


# ------------------------------------------------------------------------------------------ quality

HEADLINE = {"matched": "matched (ours)", "imagine_flash": "Imagine Flash"}
OTHERS = {
    "step_distillation": "step distillation",
    "direct": "direct distillation",
    "lcm": "LCM",
    "tdm": "TDM",
    "add": "ADD",
    "dmd2": "DMD2",
    "lightning": "SDXL-Lightning",
    "dmd2_faithful": "DMD2, 5 updates",
}
MARKERS = "sD^vPX*X"


def curves(results: Path) -> tuple[dict[str, dict[int, list[float]]], float, float]:
    """{method: {steps: FD of every training}}, the teacher's FD at 50 steps and its uncertainty."""
    read = lambda name: json.loads((results / name).read_text())  # noqa: E731
    table, later = read("benchmark.json"), read("scenes_headline.json")
    rows = [r for r in table["rows"] if r["method"] != "teacher" or r["steps"] <= 4]
    # Six trainings of matched; DMD2 of five updates is in the later file alone.
    rows += [r for r in later["rows"] if r["method"] in ("matched", "dmd2_faithful")]
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        found.setdefault(row["method"], {}).setdefault(row["steps"], []).append(row["fd"])
    return found, table["reference"]["fd"], table["reference"]["fd_noise"]


def quality(args: argparse.Namespace) -> None:
    """FD over the teacher's against steps."""
    found, reference, noise = curves(args.results)

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(WIDTH, 4.9))
        axes = figure.add_axes((0.075, 0.105, 0.91, 0.845))
        axes.set_yscale("log")
        axes.set(xlim=(-0.02, 4.12), ylim=(0.8, 21))
        axes.set_xticks([1, 2, 3, 4])
        axes.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
        axes.minorticks_off()
        axes.grid(axis="y")
        axes.set_xlabel("sampling steps (one network call each, two for the teacher)")
        axes.set_title(
            "FD on scenes, divided by the teacher's at 50 steps (lower is better)", loc="left"
        )
        axes.axhspan(
            1 - noise / reference, 1 + noise / reference, color=theme.line, alpha=0.5, lw=0
        )
        axes.axhline(1, color=theme.text, lw=1.2, ls="--")
        ends: list[tuple[float, str, str, str]] = []
        styles: dict[str, dict[str, Any]] = {
            "teacher": {"color": theme.text, "ls": ":", "marker": "o", "lw": 1.6}
        }
        for i, name in enumerate(OTHERS):
            styles[name] = {"color": theme.series[i % 7], "marker": MARKERS[i], "lw": 1.2}
        # One seed of DMD2's other form: its colour, dashed.
        styles["dmd2_faithful"] |= {"color": styles["dmd2"]["color"], "ls": "--"}
        styles["imagine_flash"] = {"color": theme.second, "marker": "o", "lw": 2.4, "ms": 6}
        styles["matched"] = {"color": theme.ours, "marker": "o", "lw": 3.2, "ms": 7.5}
        for i, (name, style) in enumerate(styles.items()):
            by_steps = {n: np.asarray(fds) / reference for n, fds in sorted(found[name].items())}
            mean = [fds.mean() for fds in by_steps.values()]
            spread = [fds.std(ddof=1) if len(fds) > 1 else 0 for fds in by_steps.values()]
            # Side by side, or the bars hide each other.
            x = np.asarray(list(by_steps)) + (0 if name in HEADLINE else 0.012 * (i - 4))
            axes.errorbar(
                x, mean, spread, capsize=2, elinewidth=1, **({"ms": 4.5} | style), zorder=3 + i
            )
            said = {"teacher": "teacher, same steps"} | OTHERS | HEADLINE
            weight = "bold" if name in HEADLINE else "normal"
            ends.append((mean[0], f"{said[name]}  {mean[0]:.2f}", style["color"], weight))
        low = -np.inf
        for value, said, color, weight in sorted(ends):
            low = max(np.log(value), low + 0.125)
            axes.text(0.9, np.exp(low), said, color=color, weight=weight, ha="right", va="center")
        axes.text(
            4.1, 0.83, "teacher, 50 steps (100 calls); the band is its uncertainty", ha="right"
        )
        return figure

    both("quality", args.out, draw)


# --------------------------------------------------------------------------------------------- page

ASKED = (
    "a purple coat to the left of a yellow boot",
    "a green dress above a pair of white trousers",
    "a red sneaker to the left of a blue bag",
)
"""Typed one after the other; the last one stays."""
SCREENS = {
    "page": {"viewport": {"width": 1160, "height": 650}, "device_scale_factor": 1.25},
    "page_phone": {"viewport": {"width": 390, "height": 996}, "device_scale_factor": 1.6},
}
DRAWN = """([model, caption]) => {
  const busy = document.querySelector("#teacher progress");
  const image = document.querySelector(`#${model} .grid:not(.stale) img[data-request]`);
  return image && busy.hidden && document.querySelector("#history button")
    && document.querySelector("#caption").value === caption;
}"""


def page(args: argparse.Namespace) -> None:
    """The page of jaxdistill.serve, on a screen and on a phone. Needs playwright and Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for theme, (name, screen) in itertools.product(THEMES, SCREENS.items()):
            tab = browser.new_page(color_scheme=theme, **screen)
            tab.goto(f"{args.url}/#seed={SEED}&lock=1&steps=3")
            tab.wait_for_selector("#student img[data-request]")
            for caption in ASKED:
                tab.fill("#caption", "")
                tab.locator("#caption").press_sequentially(caption, delay=60)
                tab.wait_for_timeout(1500)  # the history waits for the end of the typing
                for model in ("student", "teacher"):
                    tab.wait_for_function(DRAWN, arg=[model, caption], timeout=300_000)
            tab.locator("#caption").blur()
            tab.wait_for_timeout(500)  # pictures fade in
            path = args.out / f"{name}-{theme}.png"
            tab.screenshot(path=path)
            Image.open(path).convert("RGB").save(path, optimize=True)
            print(path)
        browser.close()


# ------------------------------------------------------------------------------------------- memory

KINDS = {
    "trained weights": ("student", "fake", "discriminator"),
    "averages": ("average",),
    "optimizers": ("optimizer",),
    "frozen networks": ("teacher", "frozen", "decoder"),
    "temporaries": ("temporaries",),
    "program, batch": ("program", "batch"),
}
"""What the memory picture shows, and the kinds of a report that each bar adds up."""

WIDEST = 34.0  # GiB that the axis shows: a v5p's 95 would leave the bars nothing


def memory(args: argparse.Namespace) -> None:
    """What each planned job needs of a chip, by kind."""
    rows = json.loads((args.results / "plans.json").read_text())["rows"]
    rows = [row for row in rows if "memory_gib" in row]
    both("memory", args.out, lambda theme: memory_figure(rows, theme))


def memory_figure(rows: Sequence[Mapping[str, Any]], theme: Theme) -> Figure:
    """One bar a job on a rail as long as the chip's memory."""
    figure = Figure(figsize=(WIDTH, 1.1 + 0.36 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(0, WIDEST), ylim=(len(rows) - 0.4, -0.6), xlabel="GiB a chip")
    leaf, olive, magenta, _, grey, *_ = theme.series
    shades = (theme.ours, olive, theme.second, grey, leaf, magenta)
    colours, hatch = dict(zip(KINDS, shades, strict=True)), {"frozen networks": "////"}
    for y, row in enumerate(rows):
        gib = row["memory_gib"]
        unknown = set(gib) - {name for names in KINDS.values() for name in names}
        assert unknown == {"needed", "chip"}, unknown
        axes.barh(y, min(gib["chip"], WIDEST), 0.74, color=theme.line, alpha=0.45, zorder=1)
        if gib["chip"] < WIDEST:
            axes.plot([gib["chip"]] * 2, [y - 0.37, y + 0.37], color=theme.text, lw=1.6, zorder=4)
        start = 0.0
        for kind, names in KINDS.items():
            size = sum(gib.get(name, 0.0) for name in names)
            axes.barh(
                y,
                size,
                0.5,
                start,
                color=colours[kind],
                hatch=hatch.get(kind),
                edgecolor=theme.surface,
                linewidth=0,
                zorder=2,
            )
            start += size
        # Outside the bar where there is room for it, else within its end.
        room = min(gib["chip"], WIDEST) - start > 6.2
        text = f"{gib['needed']:.1f} of {gib['chip']:g}"
        axes.text(
            start + 0.3 if room else start - 0.3,
            y,
            text,
            ha="left" if room else "right",
            va="center_baseline",
            zorder=5,
            color=theme.text if room else theme.surface,
            weight="bold",
        )
    names = [
        f"{row['teacher']}: {row['job']} ({row['topology'].partition(':')[0]})" for row in rows
    ]
    axes.set_yticks(range(len(rows)), names)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    handles = [
        Patch(facecolor=colours[kind], hatch=hatch.get(kind), edgecolor=theme.surface, label=kind)
        for kind in KINDS
    ]
    handles.append(Patch(facecolor=theme.line, alpha=0.45, label="the chip"))
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=len(handles),
        columnspacing=1.1,
        handlelength=1.4,
    )
    return figure


# ------------------------------------------------------------------------------------------ command

PICTURES: dict[str, Callable[[argparse.Namespace], None]] = {
    "hero": hero,
    "trajectory": trajectory,
    "quality": quality,
    "page": page,
    "memory": memory,
}


def main(argv: list[str] | None = None) -> None:
    """Parse and draw."""
    p = argparse.ArgumentParser(
        prog="python docs/pictures.py", description=(__doc__ or "").splitlines()[0]
    )
    p.add_argument("names", nargs="+", choices=list(PICTURES), metavar="NAME")
    p.add_argument("--out", type=Path, default=HERE / "pictures", help="folder of the pictures")
    p.add_argument("--run", type=Path, default=ROOT / "runs/digits", help="of configs/digits.py")
    p.add_argument("--label", type=int, default=4, help="class of the trajectory")
    p.add_argument("--results", type=Path, default=HERE / "results", help="folder of the tables")
    p.add_argument("--url", default="http://127.0.0.1:8000", help="of the page")
    args = p.parse_args(argv)
    if "trajectory" in args.names and not (args.run / "student/card.json").is_file():
        p.error(
            f"--run={args.run} is no finished run; make one with `python -m jaxdistill.main"
            " --config=configs/digits.py --workdir=runs/digits`"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        PICTURES[name](args)


if __name__ == "__main__":
    sys.exit(main())
