"""Tables and pictures of a run."""

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxdistill.run import distributed
from jaxdistill.run.guard import ERROR


def new_figure(width: float, height: float) -> Any:
    """An empty figure of this size in inches.

    Matplotlib is imported here: it takes a second, and most commands draw nothing.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def counted(steps: int) -> str:
    """A number of steps in words."""
    return f"{steps} step{'s' * (steps > 1)}"


def slug(steps: int) -> str:
    """A number of steps in a folder's name."""
    return counted(steps).replace(" ", "_")


def image_grid(rows: np.ndarray, *, scale: int = 4, gap: int = 2) -> np.ndarray:
    """Images [r, c, h, w, ch] in [0, 1] -> one uint8 picture [H, W, 3], each pixel `scale` wide."""
    r, c, h, w, channels = rows.shape
    canvas = np.ones((r * (h * scale + gap) - gap, c * (w * scale + gap) - gap, 3), np.float32)
    for i in range(r):
        for j in range(c):
            tile = np.broadcast_to(rows[i, j], (h, w, 3)) if channels == 1 else rows[i, j]
            y, x = i * (h * scale + gap), j * (w * scale + gap)
            canvas[y : y + h * scale, x : x + w * scale] = tile.repeat(scale, 0).repeat(scale, 1)
    return (canvas * 255.0 + 0.5).astype(np.uint8)


def save_grid(
    path: str | Path, images: np.ndarray, *, columns: int | None = None, scale: int = 4
) -> None:
    """Save images [n, h, w, c] in [0, 1] as a PNG of rows of `columns` (default: about square)."""
    if not distributed.writes():
        return
    n = len(images)
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = int(np.ceil(n / columns))
    padded = np.concatenate(
        [images, np.ones((rows * columns - n, *images.shape[1:]), images.dtype)]
    )
    Image.fromarray(image_grid(padded.reshape(rows, columns, *images.shape[1:]), scale=scale)).save(
        path, format="PNG"
    )


def markdown_table(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, str]]
) -> str:
    """Rows of results as a markdown table.

    Args:
      rows: {key: value}; a missing one is left blank.
      columns: {key: (title, format)}.
    """
    titles = [title for title, _ in columns.values()]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for row in rows:
        cells = [
            form.format(row[key]) if row.get(key) is not None else ""
            for key, (_, form) in columns.items()
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def results_picture(
    path: Path,
    results: Mapping[str, Any],
    pictures: Mapping[tuple[str, int], np.ndarray],
    columns: Mapping[str, tuple[str, str]],
    captions: Sequence[str],
) -> None:
    """Teacher and student on the same noise, one row a sampler, above FD against network calls.

    Args:
      path: PNG to write.
      results: as in results.json.
      pictures: {(model, steps): images [c, h, w, ch]} in row order, all from one noise.
      columns: {key of a row: (title, format)} of the table beside the curve.
      captions: of the pictures' columns.
    """
    names = list(pictures)
    grid = image_grid(np.stack([pictures[name] for name in names]))
    width = 11.0
    height = width * 0.9 * grid.shape[0] / grid.shape[1]
    figure = new_figure(width, height + 3.6)
    parts: Any = figure.subfigures(2, 1, height_ratios=[height, 3.4])
    upper, lower = parts
    top = upper.subplots()
    left, right = lower.subplots(1, 2)
    show_rows(top, grid, names)
    show_captions(top, grid, captions)
    fd_curve(left, results)
    shown = list(columns)
    texts = [[columns[key][1].format(r[key]) for key in shown] for r in results["rows"]]
    labels = [f"{r['model']}, {counted(r['steps'])}" for r in results["rows"]]
    right.axis("off")
    table = right.table(
        texts,
        rowLabels=labels,
        colLabels=[*shown],
        loc="center right",
        cellLoc="center",
        edges="horizontal",
    )
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.scale(0.8, 1.4)
    figure.savefig(path, dpi=110)


def show_rows(axes: Any, grid: np.ndarray, names: Sequence[tuple[str, int]]) -> None:
    """A picture of `image_grid` with its rows labelled by (model, steps)."""
    axes.imshow(grid, interpolation="nearest", aspect="equal")
    row, longest = grid.shape[0] / len(names), max(len(model) for model, _ in names)
    axes.set_yticks(
        [row * (i + 0.5) for i in range(len(names))],
        [f"{model},\n{counted(steps)}" for model, steps in names],
        fontsize=10 if longest < 15 else 8,
    )
    axes.set_xticks([])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def fd_curve(axes: Any, results: Mapping[str, Any]) -> None:
    """FD against steps for teacher and student, with the reference and the floor as lines."""
    reference = results["reference"]
    guidances = (1.0, reference["guidance"]) if reference else (1.0,)
    for model, marker in (("teacher", "s"), ("student", "o")):
        rows = sorted(
            (
                r
                for r in results["rows"]
                if r["model"] == model
                and r["guidance"] == guidances[-1 if model == "teacher" else 0]
            ),
            key=lambda r: r["steps"],
        )
        axes.errorbar(
            [r["steps"] for r in rows],
            [r["fd"] for r in rows],
            yerr=[2 * (r["fd_noise"] or 0) for r in rows],
            marker=marker,
            capsize=3,
            label=model,
        )
    if reference:
        axes.axhline(
            reference["fd"],
            ls="--",
            c="tab:blue",
            lw=1,
            label=f"teacher, {reference['steps']} steps",
        )
    if results.get("train_fd") is not None:
        axes.axhline(
            results["train_fd"], ls=":", c="gray", lw=1, label="the training images themselves"
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="sampling steps",
        ylabel=f"Fréchet distance ({results['config']['eval']['split']})",
    )
    ticks = sorted({r["steps"] for r in results["rows"]})
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


LINES = [
    f"tab:{name}"
    for name in ("blue", "orange", "green", "red", "purple", "brown", "pink", "olive", "cyan")
]
"""Colours of the methods' curves: all but gray, which is the teacher's."""


def methods_picture(
    path: Path,
    results: Mapping[str, Any],
    captions: Sequence[str],
    pictures: Mapping[tuple[str, int], np.ndarray],
    chart: Mapping[str, Any],
) -> None:
    """The chart of a benchmark's scores; below, a row of images a method, a caption a column.

    Args:
      path: PNG to write.
      results: as in a benchmark's results.json.
      captions: of the columns.
      pictures: {(method, steps): images [c, h, w, ch]} in row order.
      chart: {"kind", "scores", "axis", "label"}: one of CHARTS, {key: title} of the scores that it
        shows, and of an axis its name within the methods' names and its title.
    """
    names = list(pictures)
    grid = image_grid(np.stack([pictures[name] for name in names]))
    width = 12.0
    height = width * 0.85 * grid.shape[0] / grid.shape[1]
    figure = new_figure(width, height + 6.2)
    parts: Any = figure.subfigures(2, 1, height_ratios=[5.0, height + 1.2])
    upper, lower = parts
    CHARTS[chart["kind"]](upper, results, chart)
    axes = lower.subplots()
    show_rows(axes, grid, names)
    show_captions(axes, grid, captions)
    figure.savefig(path, dpi=100)


def show_captions(axes: Any, grid: np.ndarray, captions: Sequence[str]) -> None:
    """Captions above the columns of a picture of `image_grid`."""
    column = grid.shape[1] / len(captions)
    wrapped = ["\n".join(textwrap.wrap(caption, 17)) for caption in captions]
    axes.set_xticks([column * (i + 0.5) for i in range(len(captions))], wrapped, fontsize=7)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)


def methods_chart(figure: Any, results: Mapping[str, Any], chart: Mapping[str, Any]) -> None:
    """Two scores against steps, a curve a method and the teacher as a line."""
    for axes, (key, title) in zip(figure.subplots(1, 2), chart["scores"].items(), strict=True):
        method_curves(axes, results, key)
        axes.set_ylabel(title)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=5,
        fontsize=8,
        frameon=False,
    )


def variants_chart(figure: Any, results: Mapping[str, Any], chart: Mapping[str, Any]) -> None:
    """FD of each variant as a multiple of the first one's mean, a point a seed, a panel a step
    count.
    """
    rows = [r for r in results["rows"] if r["model"] == "student"]
    methods, counts = (
        list(dict.fromkeys(r["method"] for r in rows)),
        sorted({r["steps"] for r in rows}),
    )
    for axes, n in zip(
        figure.subplots(1, len(counts), sharey=True, squeeze=False)[0], counts, strict=True
    ):
        values = {
            m: [r["fd"] for r in rows if (r["method"], r["steps"]) == (m, n)] for m in methods
        }
        first = np.mean(values[methods[0]])
        for place, found in enumerate(values.values()):
            if not found:  # a student of fewer step counts
                continue
            axes.plot(
                np.asarray(found) / first, [place] * len(found), "o", ms=4, alpha=0.6, c="tab:blue"
            )
            axes.plot(np.mean(found) / first, place, "|", ms=12, c="k")
        axes.axvline(1.0, ls="--", c="k", lw=1)
        axes.set(xscale="log", xlabel=f"FD / that of {methods[0]}", title=counted(n))
        plain_log_ticks(axes.xaxis)
        axes.grid(alpha=0.3)
    figure.axes[0].set_yticks(range(len(methods)), methods)
    figure.axes[0].invert_yaxis()


def on_axis(name: str, axis: str) -> tuple[str, float]:
    """("CURVE", 100.0) of a method called CURVE_AXIS_100. Raises ValueError for another form."""
    found = re.fullmatch(rf"(.*)_{re.escape(axis)}_(\d+\.?\d*|\.\d+)", name)
    if not found:
        raise ValueError(
            f"config.methods holds {name!r}; config.benchmark.chart.kind = 'axis' needs names like"
            f" CURVE_{axis}_100"
        )
    return found[1], float(found[2])


def axis_chart(figure: Any, results: Mapping[str, Any], chart: Mapping[str, Any]) -> None:
    """Scores at the most steps against a number in the methods' names, a curve a CURVE of
    `on_axis`, a point a seed.
    """
    rows = [r for r in results["rows"] if r["model"] == "student"]
    most = max(r["steps"] for r in rows)
    curves: dict[str, dict[float, list[Mapping[str, Any]]]] = {}
    for row in rows:
        if row["steps"] == most:
            curve, value = on_axis(row["method"], chart["axis"])
            curves.setdefault(curve, {}).setdefault(value, []).append(row)
    reference = results["reference"]
    for axes, (key, title) in zip(figure.subplots(1, 2), chart["scores"].items(), strict=True):
        for place, (curve, points) in enumerate(curves.items()):
            at = sorted(points)
            axes.plot(
                at,
                [np.mean([r[key] for r in points[x]]) for x in at],
                c=LINES[place],
                lw=1.2,
                label=curve,
            )
            axes.plot(
                *zip(*((x, r[key]) for x in at for r in points[x]), strict=True),
                "o",
                ms=4,
                c=LINES[place],
            )
        axes.axhline(
            reference[key], ls="--", c="k", lw=1, label=f"teacher, {reference['steps']} steps"
        )
        ticks = sorted({x for points in curves.values() for x in points})
        axes.set(xscale="log", xlabel=chart["label"], ylabel=f"{title}, {counted(most)}")
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_yscale("log")
    plain_log_ticks(figure.axes[0].yaxis)
    figure.axes[0].legend(fontsize=8)


def plain_log_ticks(axis: Any) -> None:
    """Numbers as people write them on a logarithmic axis that spans less than a few decades."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


CHARTS = {"methods": methods_chart, "variants": variants_chart, "axis": axis_chart}


def method_curves(axes: Any, results: Mapping[str, Any], key: str) -> None:
    """One score against steps: mean over seeds, its spread as bars, the reference and the ceiling
    as lines.
    """
    reference = results["reference"]
    for i, method in enumerate(dict.fromkeys(r["method"] for r in results["rows"])):
        rows = [
            r
            for r in results["rows"]
            if r["method"] == method
            and r["guidance"] == (reference["guidance"] if method == "teacher" else 1.0)
        ]
        counts = sorted({r["steps"] for r in rows if r["steps"] < reference["steps"]})
        values = [[r[key] for r in rows if r["steps"] == n] for n in counts]
        spread = [np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in values]
        style = (
            {"ls": ":", "c": "gray"} if method == "teacher" else {"c": LINES[(i - 1) % len(LINES)]}
        )
        # Side by side, or the bars hide each other.
        at = [n + 0.02 * (i - 4) for n in counts]
        axes.errorbar(
            at,
            [np.mean(v) for v in values],
            yerr=spread,
            marker="o",
            ms=4,
            lw=1.2,
            capsize=2,
            label=method,
            **style,
        )
    axes.axhline(reference[key], ls="--", c="k", lw=1, label=f"teacher, {reference['steps']} steps")
    if key in results["ceiling"]:
        axes.axhline(results["ceiling"][key], ls="-.", c="gray", lw=1)
    else:
        axes.axhline(results["floor_fd"], ls="-.", c="gray", lw=1, label="real images")
        axes.set_yscale("log")
    axes.set_xlabel("network calls an image")
    ticks = sorted({r["steps"] for r in results["rows"] if r["steps"] < reference["steps"]})
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.grid(alpha=0.3, which="both")


PANELS = {
    "regression loss": ("mse", "reconstruction"),
    "adversarial term": ("generator", "discriminator", "logit_"),
    "Fréchet distance on validation": ("health/fd",),
    "against the teacher (1 = the same)": (
        "health/diversity",
        "health/contrast",
        "health/saturation",
    ),
}


def curves_picture(path: Path, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Loss and quality of each phase against its step: a row a phase, a panel a kind of number."""
    figure = new_figure(4.2 * len(PANELS), 4.2 * len(curves))
    axes = figure.subplots(len(curves), len(PANELS), squeeze=False)
    for row, (phase, records) in enumerate(curves.items()):
        keys = sorted({k for r in records for k in r})
        keys = [k for k in keys if not (k.startswith("health/") and k.endswith(ERROR))]
        for axis, (title, prefixes) in zip(axes[row], PANELS.items(), strict=True):
            shown = [k for k in keys if k.startswith(prefixes)]
            if not shown:
                axis.axis("off")
                continue
            for key in shown:
                points = [(r["step"], r[key]) for r in records if key in r]
                axis.plot(
                    *zip(*points, strict=True),
                    marker="." if key.startswith("health/") else None,
                    lw=1,
                    label=key.removeprefix("health/"),
                )
            if title in ("regression loss", "Fréchet distance on validation"):
                axis.set_yscale("log")
            axis.set_title(f"{phase}: {title}", fontsize=9)
            axis.set_xlabel("step")
            axis.grid(alpha=0.3, which="both")
            axis.legend(
                fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False
            )
    figure.savefig(path, dpi=90)
