"""How far a student's images have drifted from the teacher's of the same noises, with the sampling
error of each number.

Images are in [0, 1]. The error is a jackknife's over groups, as prompts (Efron & Stein 1981); over
the images themselves, where all are of one group.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdistill.metrics.distances import saturation, spread

TINY = 1e-6


class Number(NamedTuple):
    """A measurement and its standard error."""

    value: float
    error: float


def of_images(student: np.ndarray, teacher: np.ndarray, groups: np.ndarray) -> dict[str, Number]:
    """Images [n, h, w, c] of both, and the group of each, int [n] -> numbers by name.

    brightness: the difference of the means. As ratios to the teacher's: contrast, the standard
    deviation within an image; saturation, the share of values at either end; colour, the largest
    less the smallest channel of a pixel, where there are three; detail, the energy that a blur over
    3 pixels takes away; diversity, the distance of two images of one group.
    """
    both = student, teacher

    def sums(measure: Callable[[np.ndarray], Any]) -> list[np.ndarray]:
        return [by_group(measure(images), groups) for images in both]

    counts = by_group(np.ones(len(groups)), groups)

    def compared(measure: Callable[[np.ndarray], Any]) -> Number:
        return jackknife(ratio, [*sums(measure), counts])

    found = {
        "brightness": jackknife(
            lambda s, t, n: (s - t) / n, [*sums(lambda a: a.mean((1, 2, 3))), counts]
        ),
        "contrast": compared(lambda a: a.std((1, 2, 3))),
        "saturation": compared(saturation),
        "detail": compared(detail),
    }
    if student.shape[-1] == 3:
        found["colour"] = compared(lambda a: np.ptp(a, axis=3).mean((1, 2)))
    members = (np.flatnonzero(groups == group) for group in np.unique(groups))
    several = [rows for rows in members if len(rows) > 1]
    if several:
        spreads = [np.array([spread(a[rows]) for rows in several]) for a in both]
        found["diversity"] = jackknife(ratio, [*spreads, np.ones(len(several))])
    return found


def of_channels(student: np.ndarray, teacher: np.ndarray, groups: np.ndarray) -> dict[str, Number]:
    """Latents [n, h, w, c] of both -> of the channel that differs most: channel_mean, the shift of
    its mean in the teacher's standard deviations, and channel_spread, the ratio of its standard
    deviations.
    """
    moments = [
        by_group((np.asarray(latents, np.float64) ** power).mean((1, 2)), groups)
        for latents in (student, teacher)
        for power in (1, 2)
    ]
    counts = by_group(np.ones((len(groups), 1)), groups)

    def of_both(sums: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        s, s2, t, t2 = (a / sums[4] for a in sums[:4])
        deviations = (np.sqrt(np.maximum(b - a**2, TINY**2)) for a, b in ((s, s2), (t, t2)))
        return s, t, *deviations

    def mean(*sums: np.ndarray) -> float:
        s, t, _, deviation = of_both(sums)
        return float(np.abs((s - t) / deviation).max())

    def spread_of(*sums: np.ndarray) -> float:
        ratios = np.divide(*of_both(sums)[2:])
        return float(ratios[np.abs(np.log(ratios)).argmax()])

    inputs = [*moments, counts]
    return {"channel_mean": jackknife(mean, inputs), "channel_spread": jackknife(spread_of, inputs)}


def by_group(values: Any, groups: np.ndarray) -> np.ndarray:
    """Sums [groups, ...] of values [n, ...] over the members of each group. Of a single one: the
    values, which tell more of the error.
    """
    rows, kinds = np.asarray(values, np.float64), np.unique(groups)
    return rows if len(kinds) == 1 else np.array([rows[groups == kind].sum(0) for kind in kinds])


def ratio(student: Any, teacher: Any, count: Any = 1) -> float:
    """Of two sums' means over `count`; 1 where both are 0."""
    return float(max(student / count, TINY) / max(teacher / count, TINY))


def detail(images: np.ndarray) -> np.ndarray:
    """Energy per pixel [n] that a blur over 3 x 3 pixels takes away; 0 of images of one pixel."""
    smooth = np.asarray(images, np.float64)
    for axis in (1, 2):
        padded = np.take(smooth, [0], axis), smooth, np.take(smooth, [-1], axis)
        wide = np.concatenate(padded, axis)
        length = smooth.shape[axis]
        smooth = np.mean([np.take(wide, range(i, i + length), axis) for i in range(3)], axis=0)
    return ((images - smooth) ** 2).mean((1, 2, 3))


def jackknife(number: Callable[..., float], sums: Sequence[np.ndarray]) -> Number:
    """A function of sums over groups, each [groups, ...], and its error from leaving out one group
    after the other; nan with one group alone.
    """
    totals = [a.sum(0) for a in sums]
    value, count = float(number(*totals)), len(sums[0])
    if count < 2:
        return Number(value, float("nan"))
    without = [
        number(*(total - a[i] for total, a in zip(totals, sums, strict=True))) for i in range(count)
    ]
    return Number(value, float(np.sqrt((count - 1) * np.var(without))))
