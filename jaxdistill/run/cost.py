"""What a run costs, told before it starts: networks, memory, network calls, FLOPs, hours, money and
disk. Counted from shapes alone: no weights are read.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from jaxdistill.costs import chips
from jaxdistill.costs.chips import CARDS, KNOWN, Chip
from jaxdistill.errors import UserError

RESERVED = 0.03
"""Share of a chip's memory that the runtime keeps, as an allowance."""


TAKEN = 0.75
"""Share of a GPU's memory that JAX takes, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."""


class Work(NamedTuple):
    """A part of a run: `iterations` of a training, or 0; network calls on a batch of the student's
    and FLOPs of all devices, None where nobody counts them.
    """

    name: str
    iterations: int
    calls: float | None
    flops: float | None


class Records(NamedTuple):
    """On disk: how many (None: nobody knows), and the bytes of one."""

    name: str
    number: int | None
    record: int


class Cost(NamedTuple):
    """Of a run.

    Attributes:
      networks: {name: number of parameters}.
      kept: {kind: bytes a device} of the training that holds most.
      drawing: {network: bytes a device} that are beside them while images are drawn.
      work: its parts, in order.
      records: its caches.
      rows: of the student's batch.
      checkpoints: of its trainings.
    """

    networks: Mapping[str, int]
    kept: Mapping[str, int]
    drawing: Mapping[str, int]
    work: Sequence[Work]
    records: Sequence[Records]
    rows: int
    checkpoints: Sequence[Records] = ()

    @property
    def flops(self) -> float | None:
        """Of all parts; None where one is not counted."""
        return total(part.flops for part in self.work)

    @property
    def calls(self) -> float | None:
        """Likewise."""
        return total(part.calls for part in self.work)

    def needed(self, temporaries: int | None) -> int:
        """Bytes a device: what is kept, and what comes for a time, a step's temporaries or the
        networks of drawing. A lower bound where the temporaries are not known.
        """
        return sum(self.kept.values()) + max(temporaries or 0, sum(self.drawing.values()))

    def hours(self, place: "Place", mfu: float) -> float | None:
        """At this share of the devices' peak; None where it or the FLOPs are not known."""
        if self.flops is None or place.chip is None:
            return None
        return self.flops / (place.devices * place.chip.flops * mfu) / 3600


def total(numbers: Iterable[float | None]) -> float | None:
    """Their sum, None where one is None."""
    found = list(numbers)
    return None if None in found else float(sum(number or 0.0 for number in found))


# ------------------------------------------------------------------------------------------ devices


class Place(NamedTuple):
    """Where a run is, or would be: so many devices, and the bytes that one of them has; None where
    it does not say. `compiles`: whether a compiler here tells what a step needs there.
    """

    devices: int
    kind: str
    chip: Chip | None
    memory: int | None
    compiles: bool = False


def here() -> Place:
    """The devices of this run."""
    device = jax.local_devices()[0]
    chip, stats = chips.of_device(device), device.memory_stats() or {}
    memory: int | None = stats.get("bytes_limit")
    if memory is None and chip:
        memory = int(chip.hbm * (1 - RESERVED))
    if memory is None and device.platform == "cpu":
        pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory = pages // jax.local_device_count()
    name = chip.name if chip else device.device_kind
    return Place(jax.device_count(), name, chip, memory, device.platform != "cpu")


def elsewhere(name: str) -> Place:
    """CHIP:COUNT: so many chips of the table, which are not here. Raises UserError."""
    kind, _, count = name.partition(":")
    if kind not in KNOWN or not count.isdigit() or int(count) < 1:
        raise UserError(
            f"--plan_for={name} is not known; give CHIP:COUNT, with one of {', '.join(KNOWN)}, such"
            " as v5e:16"
        )
    chip = KNOWN[kind]
    share = TAKEN if chip.name in CARDS else 1 - RESERVED
    return Place(int(count), chip.name, chip, int(chip.hbm * share))


def bytes_a_device(tree: Any) -> int:
    """Of abstract arrays with shardings."""

    def here(leaf: Any) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * _width(leaf.dtype)

    return sum(map(here, jax.tree.leaves(tree)))


def bytes_of(tree: Any) -> int:
    """Of whole abstract arrays."""
    return sum(leaf.size * _width(leaf.dtype) for leaf in jax.tree.leaves(tree))


def _width(dtype: Any) -> int:
    return 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize


def parameters(tree: Any) -> int:
    """How many a network has."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# ----------------------------------------------------------------------------------------- programs


class DoesNotFit(UserError):
    """A program that needs more memory than a device has; `report`: what the compiler said."""

    def __init__(self, line: str, report: str) -> None:
        super().__init__(line)
        self.report = report


def compiled(lowered: Any, options: Mapping[str, Any] | None = None) -> Any:
    """The program for its devices. Raises DoesNotFit where the compiler says so."""
    try:
        return lowered.compile(compiler_options=dict(options) if options else None)
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text and "memory" not in text.lower():
            raise
        raise DoesNotFit(f"the program does not fit: {first_line(error)}", text) from None


def temporaries_of(executable: Any) -> int:
    """Bytes a device of a compiled program beside its arguments. Results that are written over
    donated arguments cost nothing.
    """
    memory = executable.memory_analysis()
    return int(
        memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )


def first_line(error: Exception) -> str:
    """Of what it says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# -------------------------------------------------------------------------------------------- knobs


class Knob(NamedTuple):
    """A change of a config that makes a step smaller: dotted keys, and what it does beside to what
    is kept.
    """

    changes: Mapping[str, Any]
    effect: str = ""


def knobs(config: ConfigDict, devices: int) -> list[Knob]:
    """In the order to try them."""
    student, found = config.student, list[Knob]()
    parts = devices // config.mesh.tensor
    rows = student.batch_size // student.accumulate
    if config.compute.get("remat", "full") != "full":
        effect = "smaller temporaries, up to a third more FLOPs"
        found.append(Knob({"compute.remat": "full"}, effect))
    if rows % (2 * parts) == 0:
        effect = "temporaries of half the rows, the same FLOPs"
        found.append(Knob({"student.accumulate": 2 * student.accumulate}, effect))
        effect = "temporaries of half the rows, half the FLOPs a step"
        found.append(Knob({"student.batch_size": student.batch_size // 2}, effect))
    if config.mesh.fsdp < parts:
        found.append(Knob({"mesh.fsdp": parts, "mesh.data": 1}, "more between devices"))
    if config.compute.get("attention", "flash") in ("auto", "plain"):
        found.append(Knob({"compute.attention": "flash"}, "smaller temporaries, on a TPU"))
    if not student.lora_rank:
        found.append(Knob({"student.lora_rank": 64}, "low-rank updates alone are trained"))
    return found


def mends(config: ConfigDict, devices: int, kept: Callable[[ConfigDict], Mapping[str, int]]) -> str:
    """The knobs, each with what it makes of `kept`: a config -> {kind: bytes a device}."""
    told = []
    for knob in knobs(config, devices):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(dict(knob.changes))
        try:
            size = gib(sum(kept(changed).values()))
        except ValueError:  # such as rows that do not divide among the grids of a method
            continue
        keys = " ".join(f"--config.{key}={value}" for key, value in knob.changes.items())
        told.append(f"{keys} ({size} kept; {knob.effect})")
    return ", ".join(told) or "a smaller network or larger devices"


def excess(cost: Cost, place: Place, temporaries: int | None) -> str:
    """Why a run does not fit, "" where it does."""
    needed = cost.needed(temporaries)
    if place.memory is None or needed <= place.memory:
        return ""
    return (
        f"the run needs {gib(needed)} a device ({_parts(cost, temporaries)}), and {place.kind} has"
        f" {gib(place.memory)}"
    )


# -------------------------------------------------------------------------------------------- lines


class Rates(NamedTuple):
    """What hours and money assume: a share of the devices' peak, the price of one device an hour.

    Raises UserError, by `check`.
    """

    mfu: float = 0.4
    price: float | None = None

    def check(self) -> "Rates":
        """Itself, where both can be."""
        if not 0 < self.mfu <= 1:
            raise UserError(f"--mfu={self.mfu:g} must be above 0 and at most 1")
        if self.price is not None and not (0 <= self.price < math.inf):
            raise UserError(
                f"--price_per_hour={self.price:g} must be 0 or more: the price of one device an"
                " hour"
            )
        return self


def lines(cost: Cost, place: Place, temporaries: int | None, rates: Rates) -> list[str]:
    """All, for a reader."""
    networks = ", ".join(f"{name} {short(count)}" for name, count in cost.networks.items())
    of = f" of {gib(place.memory)}" if place.memory is not None else ""
    least = "at least " if temporaries is None else ""
    memory = f"{least}{gib(cost.needed(temporaries))}{of} a device: {_parts(cost, temporaries)}"
    found = {
        "networks": f"{networks} parameters",
        "memory": memory,
    }
    return [*(f"{name:9} {text}" for name, text in found.items()), *run_lines(cost, place, rates)]


def run_lines(cost: Cost, place: Place, rates: Rates) -> list[str]:
    """Of the run as a whole: work, time and money, disk."""
    found = {
        "work": _work(cost),
        "time": _time(cost, place, rates),
        "disk": ", ".join(map(_stored, [*cost.records, *cost.checkpoints])),
    }
    return [f"{name:9} {text}" for name, text in found.items() if text]


def _parts(cost: Cost, temporaries: int | None) -> str:
    kinds = ", ".join(f"{kind} {gib(size)}" for kind, size in cost.kept.items())
    found = [f"kept {gib(sum(cost.kept.values()))} ({kinds})"]
    if temporaries is not None:
        found.append(f"a step's temporaries {gib(temporaries)}")
    if cost.drawing:
        names = ", ".join(cost.drawing)
        found.append(f"while images are drawn {gib(sum(cost.drawing.values()))} ({names})")
    return ", ".join(found)


def _work(cost: Cost) -> str:
    def one(part: Work) -> str:
        steps = f" {part.iterations:,} iterations" if part.iterations else ""
        if part.calls is None:
            return f"{part.name}{steps}"
        return f"{part.name}{steps}{',' if steps else ''} {part.calls:,.0f} calls"

    parts = "; ".join(map(one, cost.work))
    if cost.calls is None or cost.flops is None:
        return parts
    return f"{cost.calls:,.0f} network calls on {cost.rows} rows, {cost.flops:.3g} FLOPs: {parts}"


def _time(cost: Cost, place: Place, rates: Rates) -> str:
    hours = cost.hours(place, rates.mfu)
    devices = f"{place.devices} x {place.kind}"
    if hours is None:
        why = "FLOPs are not counted" if place.chip else f"the peak of {place.kind} is not known"
        money = ", and no money" if rates.price is not None else ""
        return f"no hours{money}: {why}"
    text = f"{hours:.3g} hours on {devices} at an MFU of {rates.mfu:g}"
    if rates.price is not None:
        paid = hours * place.devices * rates.price
        text += f", {paid:,.2f} at {rates.price:g} a device and hour"
    return text


def _stored(records: Records) -> str:
    if records.number is None:
        return f"{records.name} {size_of(records.record)} each"
    whole = size_of(records.number * records.record)
    if records.number == 1:
        return f"{records.name} {whole}"
    return f"{records.name} {records.number:,} x {size_of(records.record)} = {whole}"


def gib(size: int) -> str:
    """Memory for people."""
    scale, unit = next((s, u) for s, u in MEMORY if size >= s / 10 or s == 1)
    return f"{size / scale:.3g} {unit}"


def size_of(count: int) -> str:
    """Bytes on disk for people."""
    scale, unit = next((s, u) for s, u in SIZES if count >= s or s == 1)
    return f"{count / scale:.3g} {unit}"


def short(count: int) -> str:
    """A number of parameters for people."""
    scale, unit = next((s, u) for s, u in NUMBERS if count >= s or s == 1)
    return f"{count / scale:.4g}{unit}"


MEMORY = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
SIZES = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "B"))
NUMBERS = ((10**9, " billion"), (10**6, " million"), (10**3, " thousand"), (1, ""))
