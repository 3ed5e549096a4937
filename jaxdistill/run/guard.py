"""Judges a training by its health lines, and says when it has gone wrong.

Knows nothing of images: a number is far from its teacher's, or it is not.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxdistill.errors import choose

ACTIONS = ("off", "warn", "stop", "rollback")
RATIOS = ("contrast", "colour", "detail", "diversity", "channel_spread")
"""Of a health line: 1 where the student is as its teacher."""

DIFFERENCES = ("brightness", "channel_mean")
"""Of a health line: 0 where the student is as its teacher."""

RISES = {"fd": 1e-9, "distance": 0.02}
"""Of a health line: falls as the student learns, and rises from its lowest where that goes wrong;
below this it is low enough.
"""

LOSS = "loss"
"""Of an event: a loss or a gradient that is no number."""

DRIFT = "drift"
"""The farthest from its teacher's of a line's numbers, as a share of its limit."""

ERROR = "_error"
"""Ends the name of a number's standard error."""

NEWS = 0.25
"""A number has become worse where it is farther than it was by this share of that, or of its limit
where it was within.
"""


@dataclasses.dataclass(frozen=True)
class GuardSettings:
    """config.guard. limits: number -> how far it may be: a difference, of a ratio r the x of
    1/(1 + x) < r < 1 + x, of one of RISES its rise as a share of its lowest. lines: wrong ones in a
    row that are events. rollbacks: at most. rate: each one's factor on the learning rate.
    """

    action: str = "stop"
    lines: int = 2
    rollbacks: int = 2
    rate: float = 0.3
    limits: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def acts(self) -> bool:
        """Whether it does more than tell."""
        return self.action in ("stop", "rollback")

    @property
    def returns(self) -> bool:
        """Whether it goes back to a whole state."""
        return self.action == "rollback"


def guard_settings(block: Mapping[str, Any]) -> GuardSettings:
    """From a config's block. Raises ValueError."""
    found = GuardSettings(**{**block, "limits": dict(block["limits"])})
    choose(dict.fromkeys(ACTIONS), found.action, "config.guard.action")
    for name, limit in found.limits.items():
        if name not in (*RATIOS, *DIFFERENCES, *RISES):
            raise ValueError(
                f"config.guard.limits.{name}: no health line has such a number; choose of"
                f" {', '.join((*RATIOS, *DIFFERENCES, *RISES))}"
            )
        if not limit > 0:
            raise ValueError(f"config.guard.limits.{name} must be above 0, got {limit:g}")
    for name in ("lines", "rollbacks"):
        if getattr(found, name) < 1:
            raise ValueError(f"config.guard.{name} must be at least 1, got {getattr(found, name)}")
    if not 0 < found.rate < 1:
        raise ValueError(
            f"config.guard.rate must be above 0 and below 1, got {found.rate:g}: it lowers the"
            " learning rate"
        )
    return found


class Event(NamedTuple):
    """A number (or LOSS) that has gone wrong.

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
    def wrong(self) -> bool:
        """Whether it is beyond its limit by two errors, and farther than it was: a student of few
        steps starts blurred, and recovers.
        """
        news = max(NEWS * max(self.least, 1.0), 2 * self.spread)
        return self.far - 2 * self.spread > 1 and not self.far - self.least <= news

    @classmethod
    def of_loss(cls, step: int) -> "Event":
        """At this step."""
        return cls(step, LOSS, math.nan, math.nan, math.inf, 0.0, 0.0, "")

    def record(self) -> dict[str, Any]:
        """As JSON values: None is no number."""
        pairs = self._asdict().items()
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in pairs}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "Event":
        """`record` undone."""
        far = math.inf if record["far"] is None else record["far"]
        values: dict[str, Any] = {k: math.nan if v is None else v for k, v in record.items()}
        return cls(**{**values, "far": far})

    def __str__(self) -> str:
        if self.number == LOSS:
            return f"step {self.step}: the loss is no number"
        told = f"step {self.step}: {self.number} = {self.value:.3g}"
        if name_of(self.number) in RISES:
            return f"{told} has risen from its lowest {self.far:.2f} times as far as it may"
        return (
            f"{told} ± {self.error:.2g} is {self.far:.2f} times as far from the teacher's as it may"
            f" be; it was {self.least:.2f}"
        )


def by_line(events: Sequence[Event]) -> list[list[Event]]:
    """Events in their order, those of one health line together. After a rollback the same step may
    come again, with the same number.
    """
    found: list[list[Event]] = []
    for event in events:
        line = found[-1] if found else []
        alike = all((e.step, e.action) == (event.step, event.action) for e in line)
        if line and alike and event.number not in {e.number for e in line}:
            line.append(event)
        else:
            found.append([event])
    return found


def summary(events: Sequence[Event]) -> str:
    """Those of one health line: the farthest, and how many more there are."""
    more = f" (and {len(events) - 1} more)" if len(events) > 1 else ""
    return f"{max(events, key=lambda event: event.far)}{more}"


class Guard:
    """What the health lines of one training have said so far."""

    def __init__(self, settings: GuardSettings) -> None:
        self.settings = settings
        self.least, self.lowest = dict[str, float](), dict[str, float]()  # far, and of RISES
        self.events: list[Event] = []
        self.rollbacks = self.wrong = 0  # wrong: lines in a row, by now

    @property
    def rate(self) -> float:
        """The factor on the learning rate by now."""
        return self.settings.rate**self.rollbacks

    def far(self, numbers: Mapping[str, float]) -> dict[str, tuple[float, float]]:
        """{key: (distance from the teacher's or its lowest, its error)} of a line's numbers
        name_steps, as shares of the limits. A number without an error is exact; an error that
        nobody knows is infinite, as that of a single group's diversity.
        """
        found = {}
        for key, value in numbers.items():
            name = name_of(key)
            if name not in self.settings.limits:
                continue
            limit, error = self.settings.limits[name], numbers.get(key + ERROR, 0.0)
            if name in DIFFERENCES:
                found[key] = abs(value) / limit, error / limit
            elif name in RISES:
                lowest = max(self.lowest.get(key, value), RISES[name])
                found[key] = max(value - lowest, 0.0) / lowest / limit, error / lowest / limit
            else:
                scale = math.log1p(limit)
                ratio = value if value > 0 else math.nan
                found[key] = abs(math.log(ratio)) / scale, error / ratio / scale
        return {
            key: (far, math.inf if math.isnan(error) else error)
            if math.isfinite(far)
            else (math.inf, 0.0)
            for key, (far, error) in found.items()
        }

    def drift(self, numbers: Mapping[str, float]) -> float:
        """How far from its teacher's the farthest number of known error is, as a share of its
        limit.
        """
        found = {k: v for k, v in self.far(numbers).items() if name_of(k) not in RISES}
        return max((far for far, error in found.values() if math.isfinite(error)), default=0.0)

    def judge(self, step: int, numbers: Mapping[str, float], *, last: bool) -> list[Event]:
        """What is wrong, once so many lines in a row have been, or this is the last one."""
        found = []
        for key, (far, error) in self.far(numbers).items():
            least = self.least.setdefault(key, far)
            line = numbers[key], numbers.get(key + ERROR, math.nan)
            event = Event(step, key, *line, far, error, least, "")
            if event.wrong:
                found.append(event)
            self.least[key] = min(least, far)
            if name_of(key) in RISES and numbers[key] < self.lowest.get(key, math.inf):
                self.lowest[key] = numbers[key]
        self.wrong = self.wrong + 1 if found else 0
        return found if last or self.wrong >= self.settings.lines else []

    def act(self, found: list[Event], best: int | None) -> str:
        """Remember the events; what is to be done, of ACTIONS. Without a best line it is a warning,
        and after the last rollback training stops.
        """
        action = self.settings.action if best is not None else "warn"
        if action == "rollback":
            action = "rollback" if self.rollbacks < self.settings.rollbacks else "stop"
            self.rollbacks += action == "rollback"
            self.wrong = 0
        self.events += [event._replace(action=action) for event in found]
        return action

    # -- across restarts

    def state(self) -> dict[str, Any]:
        """All that it remembers, for a checkpoint's JSON."""
        events = [list(map(str, event)) for event in self.events]
        counts = {"rollbacks": self.rollbacks, "wrong": self.wrong}
        numbers = {"least": texts_of(self.least), "lowest": texts_of(self.lowest)}
        return {**numbers, "events": events, **counts}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Remember what an earlier start did."""
        self.least, self.lowest = numbers_of(state["least"]), numbers_of(state["lowest"])
        self.rollbacks, self.wrong = int(state["rollbacks"]), int(state["wrong"])
        kinds = Event.__annotations__.values()
        self.events = [
            Event(*(kind(text) for kind, text in zip(kinds, event, strict=True)))
            for event in state["events"]
        ]


def name_of(key: str) -> str:
    """Of a line's number name_steps."""
    return key.rpartition("_")[0]


def texts_of(numbers: Mapping[str, float]) -> dict[str, str]:
    """Numbers as a checkpoint's JSON holds them: NaN and infinity are none of JSON's."""
    return {name: repr(float(value)) for name, value in numbers.items()}


def numbers_of(texts: Mapping[str, str]) -> dict[str, float]:
    """`texts_of` undone, to the bit."""
    return {name: float(text) for name, text in texts.items()}
