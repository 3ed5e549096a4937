"""Judges a training by its health lines, and says when it has gone wrong.

Knows nothing of images: a number is far from its teacher's, or it is not.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxdistill.errors import choose

ACTIONS = ("off", "warn", "stop", "rollback")
RATIOS = ("contrast", "colour", "detail", "diversity", "channel_spread")
"""Of a health line: 1 where the student is as its teacher."""

DIFFERENCES = ("brightness", "channel_mean")
"""Of a health line: 0 where the student is as its teacher."""

DRIFT = "drift"
"""The farthest number of a line, as a share of its limit."""

ERROR = "_error"
"""Ends the name of a number's standard error."""

NEWS = 0.25
"""A number has become worse where it is farther than it was by this share of that, or of its limit
where it was within.
"""


@dataclasses.dataclass(frozen=True)
class GuardSettings:
    """config.guard. limits: number -> how far it may be: a difference, or of a ratio r the x of
    1/(1 + x) < r < 1 + x. rollbacks: at most. rate: each one's factor on the learning rate.
    """

    action: str = "warn"
    rollbacks: int = 2
    rate: float = 0.3
    limits: Mapping[str, float] = dataclasses.field(default_factory=dict)


def guard_settings(block: Mapping[str, Any]) -> GuardSettings:
    """From a config's block. Raises ValueError."""
    found = GuardSettings(**{**block, "limits": dict(block["limits"])})
    choose(dict.fromkeys(ACTIONS), found.action, "config.guard.action")
    for name, limit in found.limits.items():
        if name not in (*RATIOS, *DIFFERENCES):
            raise ValueError(
                f"config.guard.limits.{name}: no health line has such a number; choose of"
                f" {', '.join((*RATIOS, *DIFFERENCES))}"
            )
        if not limit > 0:
            raise ValueError(f"config.guard.limits.{name} must be above 0, got {limit:g}")
    if found.rollbacks < 1:
        raise ValueError(f"config.guard.rollbacks must be at least 1, got {found.rollbacks}")
    if not 0 < found.rate < 1:
        raise ValueError(
            f"config.guard.rate must be above 0 and below 1, got {found.rate:g}: it lowers the"
            " learning rate"
        )
    return found


class Event(NamedTuple):
    """A number (or "loss") that has gone wrong.

    value, error: of the line, as it stands there. As shares of the limit: far, how far it is;
    spread, the error of that; least, how far it was at its best. action: what was done, of ACTIONS.
    """

    step: int
    number: str
    value: float
    error: float
    far: float
    spread: float
    least: float
    action: str

    @property
    def worse(self) -> bool:
        """Whether it has been better before."""
        return not self.far - self.least <= max(NEWS * max(self.least, 1.0), 2 * self.spread)

    @classmethod
    def of_loss(cls, step: int) -> "Event":
        """A loss or a gradient that is no number."""
        return cls(step, "loss", math.nan, math.nan, math.inf, 0.0, 0.0, "")

    def record(self) -> dict[str, Any]:
        """As JSON values: None is no number."""
        pairs = self._asdict().items()
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in pairs}

    def __str__(self) -> str:
        if self.number == "loss":
            return f"step {self.step}: the loss is no number"
        return (
            f"step {self.step}: {self.number} = {self.value:.3g} ± {self.error:.2g} is"
            f" {self.far:.2f} of its limit from the teacher's; it was {self.least:.2f}"
        )


class Guard:
    """What the health lines of one training have said so far."""

    def __init__(self, settings: GuardSettings) -> None:
        self.settings, self.least = settings, dict[str, float]()
        self.events: list[Event] = []
        self.rollbacks = 0

    @property
    def rate(self) -> float:
        """The factor on the learning rate by now."""
        return self.settings.rate**self.rollbacks

    @property
    def acts(self) -> bool:
        """Whether it does more than tell."""
        return self.settings.action in ("stop", "rollback")

    def far(self, numbers: Mapping[str, float]) -> dict[str, tuple[float, float]]:
        """{key: (distance from the teacher's, its error)} of a line's numbers name_steps, as shares
        of the limits.
        """
        found = {}
        for key, value in numbers.items():
            name = key.rpartition("_")[0]
            if name not in self.settings.limits:
                continue
            limit, error = self.settings.limits[name], numbers.get(key + ERROR, 0.0)
            if name in DIFFERENCES:
                found[key] = abs(value) / limit, error / limit
            else:
                scale = math.log1p(limit)
                ratio = value if value > 0 else math.nan
                found[key] = abs(math.log(ratio)) / scale, error / ratio / scale
        return {
            key: (far if math.isfinite(far) else math.inf, error if math.isfinite(error) else 0.0)
            for key, (far, error) in found.items()
        }

    def drift(self, numbers: Mapping[str, float]) -> float:
        """How far the farthest number is, as a share of its limit."""
        return max((far for far, _ in self.far(numbers).values()), default=0.0)

    def judge(self, step: int, numbers: Mapping[str, float], *, last: bool) -> list[Event]:
        """What has gone wrong since the line before.

        A number has where it is beyond its limit by two errors and has become worse, or where it is
        there at the `last` line: a student of few steps starts blurred, and recovers.
        """
        found = []
        for key, (far, error) in self.far(numbers).items():
            least = self.least.setdefault(key, far)
            line = numbers[key], numbers.get(key + ERROR, math.nan)
            event = Event(step, key, *line, far, error, least, "")
            if far - 2 * error > 1 and (last or event.worse):
                found.append(event)
            self.least[key] = min(least, far)
        return found

    def act(self, found: list[Event], action: str) -> str:
        """Remember the events, of which so much is to be done; what is done, of ACTIONS: after so
        many rollbacks training stops.
        """
        if action == "rollback":
            action = "rollback" if self.rollbacks < self.settings.rollbacks else "stop"
            self.rollbacks += action == "rollback"
        self.events += [event._replace(action=action) for event in found]
        return action

    # -- across restarts

    def state(self) -> dict[str, Any]:
        """All that it remembers, for a checkpoint's JSON."""
        events = [list(map(str, event)) for event in self.events]
        return {"least": texts_of(self.least), "events": events, "rollbacks": self.rollbacks}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Remember what an earlier start did."""
        self.least, self.rollbacks = numbers_of(state["least"]), int(state["rollbacks"])
        kinds = Event.__annotations__.values()
        self.events = [
            Event(*(kind(text) for kind, text in zip(kinds, event, strict=True)))
            for event in state["events"]
        ]


def texts_of(numbers: Mapping[str, float]) -> dict[str, str]:
    """Numbers as a checkpoint's JSON holds them: NaN and infinity are none of JSON's."""
    return {name: repr(float(value)) for name, value in numbers.items()}


def numbers_of(texts: Mapping[str, str]) -> dict[str, float]:
    """`texts_of` undone, to the bit."""
    return {name: float(text) for name, text in texts.items()}
