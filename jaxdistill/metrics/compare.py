"""Scores of images that belong to prompts: a row a model, tables, and a picture page."""

import hashlib
import itertools
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxdistill.errors import UserError
from jaxdistill.interop import diffusers_folder
from jaxdistill.metrics import distances, image_metrics
from jaxdistill.metrics.drift import ratio
from jaxdistill.metrics.image_metrics import CLIP, Inception, Reference
from jaxdistill.run import report

ROW = "row.json"
"""What drew the images of a folder."""
TILE = 256
"""Longer side of an image on the page."""
COLUMNS = {
    "distance": ("RMS to teacher ↓", 1.0, "{:.3f}"),
    "diversity": ("diversity", 1.0, "{:.2f}"),
    "contrast": ("contrast", 1.0, "{:.2f}"),
    "saturation": ("saturation", 1.0, "{:.2f}"),
    "fid": ("FID ↓", 1.0, "{:.2f}"),
    "kid": ("KID × 10³ ↓", 1e3, "{:.3f}"),
    "kid_std": ("± KID × 10³", 1e3, "{:.3f}"),
    "precision": ("precision ↑", 1.0, "{:.3f}"),
    "recall": ("recall ↑", 1.0, "{:.3f}"),
    "clip": ("CLIP score ↑", 1.0, "{:.2f}"),
    "clip_error": ("± CLIP score", 1.0, "{:.2f}"),
}


class CompareError(UserError):
    """A comparison that cannot be made, in one line."""


@dataclass(frozen=True)
class Row:
    """Images of one model at one setting; image i belongs to prompt i. None is not known; drawn is
    what row.json says of them.
    """

    model: str
    steps: int | None
    guidance: float | None
    files: list[Path]
    drawn: Mapping[str, Any]

    @property
    def teacher(self) -> str:
        """The model that these images are measured against, or none."""
        return str(self.drawn.get("teacher") or "")

    @property
    def name(self) -> str:
        """For a label."""
        return (
            self.model
            if self.steps is None
            else f"{self.model}, {self.steps} step{'s' * (self.steps > 1)}"
        )


def prompts_hash(items: Sequence[Mapping[str, Any]]) -> str:
    """First 12 hex digits of the SHA-256 of all prompts."""
    return hashlib.sha256("\n".join(item["prompt"] for item in items).encode()).hexdigest()[:12]


def open_rows(folder: str | Path, items: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Images that are there already: a row of each subfolder with images, or one of the folder's
    own. File i belongs to prompt i.

    Raises:
      MetricError: no such folder, or no image in it.
      CompareError: their number is not that of the prompts, or they were drawn here from other
        prompts.
    """
    folder = Path(folder)
    inside = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    rows = []
    for part in [
        p for p in inside if any(f.suffix.lower() in image_metrics.ENDINGS for f in p.iterdir())
    ] or [folder]:
        files = image_metrics.image_files(part).files
        if len(files) != len(items):
            raise CompareError(
                f"{part} holds {len(files):,} images for {len(items):,} prompts; there must be one"
                " per prompt, in the same order"
            )
        said = diffusers_folder.read_json(part / ROW) if (part / ROW).is_file() else {}
        if said and said.get("prompts") != prompts_hash(items):
            raise CompareError(
                f"{part} was drawn from other prompts; give the prompts that its {ROW} names"
            )
        rows.append(
            Row(
                said.get("model", part.name),
                said.get("steps"),
                said.get("guidance"),
                files,
                said or {"source": str(part)},
            )
        )
    return sorted(rows, key=lambda row: (row.model != "teacher", row.model, row.steps or 0))


# ------------------------------------------------------------------------------------------- scores


@dataclass(frozen=True)
class Judges:
    """What scores a row.

    metrics of METRICS, and what they need; texts are CLIP's embeddings of the prompts [n, p], cut
    says how many distinct prompts were longer than it takes; subset_size of KID.
    """

    metrics: list[str]
    extractor: Inception | None = None
    reference: Reference | None = None
    clip: CLIP | None = None
    texts: np.ndarray | None = None
    cut: int = 0
    subset_size: int = 1000


def embed(clip: CLIP, items: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, int]:
    """CLIP's embeddings of all prompts [n, p], and how many distinct ones were cut."""
    rows = {prompt: i for i, prompt in enumerate(dict.fromkeys(item["prompt"] for item in items))}
    found, cut = clip.texts(list(rows))
    return found[[rows[item["prompt"]] for item in items]], cut


def mean_score(scores: np.ndarray) -> dict[str, Any]:
    """Mean of [n], and its standard error where n > 1."""
    error = float(scores.std(ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else None
    return {"clip": float(scores.mean()), "clip_error": error}


def health(row: Row, teacher: Row, items: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """A row against its teacher's, from files, one prompt's images in memory: as ratios contrast,
    saturation and, where a prompt has several images, diversity; the distance.

    Raises MetricError.
    """
    values: dict[str, list[np.ndarray]] = {}
    start = 0
    for _, group in itertools.groupby(item["prompt"] for item in items):
        part = slice(start, start + len(list(group)))
        start = part.stop
        ours, theirs = (
            np.stack([image_metrics.read_image(f) for f in found.files[part]]) / np.float32(255)
            for found in (row, teacher)
        )
        if ours.shape != theirs.shape:
            raise CompareError(
                f"{row.name} has images of {ours.shape[2]}x{ours.shape[1]} pixels, {teacher.name}"
                f" of {theirs.shape[2]}x{theirs.shape[1]}; draw both alike, with --height, --width"
            )
        pair, labels = (ours, theirs), np.zeros(len(ours))
        measured = {
            "contrast": np.stack([x.std(axis=(1, 2, 3)) for x in pair], axis=1),
            "saturation": np.stack([distances.saturation(x) for x in pair], axis=1),
            "distance": np.square(ours - theirs).mean(axis=(1, 2, 3), dtype=np.float64)[:, None],
        }
        if len(ours) > 1:
            spread = [distances.class_spread(x, labels) for x in pair]
            measured["diversity"] = np.asarray([spread])
        for name, part_values in measured.items():
            values.setdefault(name, []).append(part_values)
    means = {name: np.concatenate(found).mean(axis=0) for name, found in values.items()}
    distance = float(np.sqrt(means.pop("distance")[0]))
    ratios = {name: ratio(*both) for name, both in means.items()}
    return ratios | {"distance": distance}


def score(
    row: Row,
    items: Sequence[Mapping[str, Any]],
    judges: Judges,
    teacher: Row | None = None,
) -> tuple[dict[str, Any], np.ndarray | None]:
    """A row's scores with their protocol, and the CLIP scores of its images [n] where CLIP is
    there. Raises MetricError.
    """
    images = image_metrics.ImageFiles(row.files[0].parent, row.files)
    result: dict[str, Any] = {"model": row.model, "steps": row.steps, "guidance": row.guidance}
    result["count"] = len(row.files)
    # All distinct sizes would be a list as long as a set of photographs.
    protocol: dict[str, Any] = {
        "count": len(row.files),
        "drawn": dict(row.drawn),
        "sizes": images.sizes()[:8],
    }
    single = None
    if teacher is not None:
        result |= health(row, teacher, items)
    if (
        judges.extractor is not None
        and judges.reference is not None
        and set(judges.metrics) - {"clip"}
    ):
        found = image_metrics.feature_scores(
            judges.extractor.features(images),
            judges.reference,
            judges.metrics,
            subset_size=judges.subset_size,
        )
        protocol |= found.pop("protocol")
        result |= found
    if judges.clip is not None and judges.texts is not None:
        single = image_metrics.clip_scores(judges.clip.images(images), judges.texts)
        result |= mean_score(single)
        protocol["clip"] = {
            **judges.clip.protocol,
            "score": "mean of 100 max(cos, 0)",
            "cut_prompts": judges.cut,
        }
        names = [str(item.get("category", "")) for item in items]
        if any(names):
            parts = {
                name or "(none)": single[[n == name for n in names]]
                for name in dict.fromkeys(names)
            }
            result["categories"] = {
                name: {**mean_score(part), "count": len(part)} for name, part in parts.items()
            }
    return {**result, "protocol": protocol}, single


# ------------------------------------------------------------------------------------------- output


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return (
        "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
        )
        + "\n"
    )


def _cell(value: Any, form: str = "{}") -> str:
    return "" if value is None else form.format(value)


def markdown(results: Mapping[str, Any]) -> str:
    """scores.json as tables and a list of the protocol."""
    rows = results["rows"]
    shown = {
        key: column
        for key, column in COLUMNS.items()
        if any(row.get(key) is not None for row in rows)
    }

    def cells(row: Mapping[str, Any]) -> list[str]:
        scores = [
            _cell(None if row.get(key) is None else row[key] * scale, form)
            for key, (_, scale, form) in shown.items()
        ]
        return [
            row["model"],
            _cell(row["steps"]),
            _cell(row["guidance"], "{:g}"),
            f"{row['count']:,}",
            *scores,
        ]

    text = _table(
        ["model", "steps", "guidance", "images", *(title for title, _, _ in shown.values())],
        [cells(row) for row in rows],
    )
    if not shown:
        text += (
            "\nNo scores: give --inception and --reference for FID, and --clip for CLIP score.\n"
        )
    if any("categories" in row for row in rows):
        names = list(rows[0]["categories"])
        counts = [f"{name} ({rows[0]['categories'][name]['count']:,})" for name in names]
        body = [
            [
                row["model"],
                _cell(row["steps"]),
                *(f"{row['categories'][name]['clip']:.2f}" for name in names),
            ]
            for row in rows
        ]
        text += "\nCLIP score of each category (number of images):\n\n" + _table(
            ["model", "steps", *counts], body
        )
    text += (
        f"\nPrompts: {results['prompts']['count']:,} from {', '.join(results['prompts']['files'])}"
        f" ({results['prompts']['hash']}).\n"
    )
    for title, part in rows[0]["protocol"].items():
        if isinstance(part, dict) and title != "drawn":  # which differs from row to row
            text += (
                f"\n{title}: " + "; ".join(f"{name} {value}" for name, value in part.items()) + "\n"
            )
    return text + f"\n`{results['command']}`\n"


def page(
    path: Path, rows: Sequence[Row], items: Sequence[Mapping[str, Any]], *, count: int
) -> None:
    """A picture of up to `count` prompts as columns, spread evenly over all, and the models as
    rows.

    Args:
      path: PNG to write.
      rows: images of the models, of any size; the first one's proportions hold for all.
      items: the prompts.
      count: largest number of columns.
    """
    chosen = sorted(
        {int(i) for i in np.linspace(0, len(items) - 1, min(count, len(items))).round()}
    )
    height, width = image_metrics.read_image(rows[0].files[chosen[0]]).shape[:2]
    side = (max(1, width * TILE // max(height, width)), max(1, height * TILE // max(height, width)))

    def tile(file: Path) -> np.ndarray:
        image = Image.fromarray(image_metrics.read_image(file))
        # Small images grow in blocks, so that their pixels can be seen.
        way = Image.Resampling.NEAREST if image.width < side[0] else Image.Resampling.BICUBIC
        return np.asarray(image.resize(side, way), np.float32) / 255

    grid = report.image_grid(
        np.stack([np.stack([tile(row.files[i]) for i in chosen]) for row in rows]), scale=1, gap=6
    )
    dpi = 128
    figure = report.new_figure(grid.shape[1] / dpi + 2.0, grid.shape[0] / dpi + 1.5)
    axes = figure.subplots()
    axes.imshow(grid, interpolation="nearest", aspect="equal")
    down, across = grid.shape[0] / len(rows), grid.shape[1] / len(chosen)
    axes.set_yticks(
        [down * (i + 0.5) for i in range(len(rows))], [row.name for row in rows], parse_math=False
    )
    captions = [
        textwrap.fill(
            textwrap.shorten(items[i]["prompt"], 150, placeholder=" ..."), max(8, side[0] // 9)
        )
        for i in chosen
    ]
    # A prompt may hold a dollar sign, which is no formula.
    axes.set_xticks(
        [across * (i + 0.5) for i in range(len(chosen))], captions, fontsize=7, parse_math=False
    )
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.savefig(path, dpi=dpi, bbox_inches="tight", pad_inches=0.1)


def write(
    out: Path,
    results: Mapping[str, Any],
    rows: Sequence[Row],
    items: Sequence[Mapping[str, Any]],
    singles: Sequence[Any],
) -> None:
    """scores.json, scores.md and images.jsonl."""
    (out / "scores.json").write_text(
        json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (out / "scores.md").write_text(markdown(results), encoding="utf-8")
    with (out / "images.jsonl").open("w", encoding="utf-8") as file:
        for row, single in zip(rows, singles, strict=True):
            for i, (path, item) in enumerate(zip(row.files, items, strict=True)):
                line = {
                    "row": row.name,
                    "file": str(path),
                    "clip": None if single is None else float(single[i]),
                    "prompt": dict(item),
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
