"""The documentation's pictures, each in light and dark: docs/pictures/NAME-light.png and -dark.png.

python docs/pictures.py NAME ...
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

HERE = Path(__file__).resolve().parent

# -------------------------------------------------------------------------------------------- style

WIDTH, DPI = 8.3, 192  # inches: GitHub shows 830 pixels, so one point is 1.4 pixels there


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
        series=("#0072b2", "#00795a", "#9a4f86", "#8a6d00", "#4a5a6a", "#b3441e", "#2f8fc0"),
    ),
    "dark": Theme(
        name="dark",
        surface="#0d1117",
        text="#f0f6fc",
        muted="#9198a1",
        line="#3d444d",
        ours="#ff9350",
        second="#6cb6ff",
        series=("#56b4e9", "#2fc79a", "#d796c3", "#dcc13f", "#9fb0c0", "#f08a5d", "#8fd0f5"),
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


def save(figure: Figure, folder: Path, name: str, theme: Theme) -> Path:
    """Write FOLDER/NAME-THEME.png, small: 256 colours are enough for a chart."""
    path = folder / f"{name}-{theme.name}.png"
    figure.savefig(path, dpi=DPI)
    image = Image.open(path).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    return path


def both(name: str, folder: Path, draw: Callable[[Theme], Figure]) -> None:
    """The picture in each theme."""
    for theme in THEMES:
        with styled(theme) as chosen:
            print(save(draw(chosen), folder, name, chosen))


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
    rows = json.loads((HERE / "results/plans.json").read_text())["rows"]
    rows = [row for row in rows if "memory_gib" in row]
    both("memory", args.out, lambda theme: memory_figure(rows, theme))


def memory_figure(rows: Sequence[Mapping[str, Any]], theme: Theme) -> Figure:
    """One bar a job on a rail as long as the chip's memory."""
    figure = Figure(figsize=(WIDTH, 1.1 + 0.36 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(0, WIDEST), ylim=(len(rows) - 0.4, -0.6), xlabel="GiB a chip")
    shades = (theme.ours, *(theme.series[i] for i in (3, 0, 4, 1, 2)))
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
        room = min(gib["chip"], WIDEST) - start > 5.5
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

PICTURES: dict[str, Callable[[argparse.Namespace], None]] = {"memory": memory}


def main(argv: list[str] | None = None) -> None:
    """Parse and draw."""
    p = argparse.ArgumentParser(
        prog="python docs/pictures.py", description=(__doc__ or "").splitlines()[0]
    )
    p.add_argument("names", nargs="+", choices=list(PICTURES), metavar="NAME")
    p.add_argument("--out", type=Path, default=HERE / "pictures", help="folder of the pictures")
    args = p.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        PICTURES[name](args)


if __name__ == "__main__":
    sys.exit(main())
