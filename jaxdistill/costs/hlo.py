"""FLOPs, bytes and collectives of a compiled program, read from its HLO text: loops count as often
as they run.

`compiled.cost_analysis()` counts the body of a loop once and knows no collectives;
`count(compiled.as_text())` is for programs with `lax.scan`. A program over a mesh is the program of
one device, so all numbers are of one device.
"""

import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

NETWORK = "between slices"
"""What goes by the host over the data-center network, among the kinds of collectives."""


class Gather(NamedTuple):
    """One all-gather: its result ("bf16[1024,4096]"), the bytes of one run, the times it runs, and
    the name JAX gave it.
    """

    shape: str
    dtype: str
    bytes: float
    times: int
    op_name: str


class Counts(NamedTuple):
    """What one run of a program does on one device.

    Attributes:
      flops: of dots and convolutions, 2 for each multiply-add. As in XLA's own count, a
        convolution's positions on padding and between dilated elements do no work: a dot that the
        TPU's compiler writes as a convolution counts as the dot. Pallas kernels count what they
        declare, which may be nothing.
      bytes: read and written by what is not inside a fusion. Of slices and updates in place only
        the part that moves.
      collectives: each of `COLLECTIVES` that occurs -> bytes of its results; of its operands for
        all-reduce and reduce-scatter. And `NETWORK` -> the bytes that are sent there.
      gathers: the all-gathers; their bytes times their times make up collectives["all-gather"].
      unknown_loops: loops whose number of rounds is not in the text; they count as one round.
      main_bytes: the part of `bytes` in the device's main memory, without the buffers that a TPU
        keeps on the chip or on the host.
    """

    flops: float
    bytes: float
    collectives: dict[str, float]
    gathers: list[Gather]
    unknown_loops: int
    main_bytes: float


def count(text: str) -> Counts:
    """The counts of an HLO module's text, optimized (`compiled.as_text()`) or not.

    Of a conditional's branches each number's largest.

    Raises ValueError for other text.
    """
    program = _Program(text)
    counts = program.total(program.entry)
    return counts._replace(unknown_loops=len(program.unknown))


# --------------------------------------------------------------------------------------------- text


class _Array(NamedTuple):
    """An array's type; `space` is 0 for the main memory."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def size(self) -> float:
        bits = re.search(r"\d+", self.dtype)
        return self.elements * (int(bits[0]) / 8 if bits else float(self.dtype == "pred"))


class _Instruction(NamedTuple):
    """`name = shape op(inside), attributes`."""

    name: str
    shape: str
    op: str
    inside: str
    attributes: str
    operands: tuple[str, ...]


class _Computation(NamedTuple):
    """Instructions by name, the root's name (a list of one), parameters by number, and who uses a
    value as which operand.
    """

    instructions: dict[str, _Instruction]
    root: list[str]
    parameters: dict[int, str]
    users: dict[str, list[tuple[_Instruction, int]]]


_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"(ENTRY )?%?([^\s(]+) (?:\(.*)?\{")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([^\s=]+) = (.*)")
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"')
_INDEX = re.compile(r"/\*index=\d+\*/")
_BRACKET = re.compile(r"[(\[{}\])]|,")


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for match in _BRACKET.finditer(text, start):
        depth += (match[0] in "([{") - (match[0] in ")]}")
        if depth == 0:
            return match.start()
    raise ValueError(f"a bracket is not closed in the HLO text {text[start : start + 80]!r}")


def _split(text: str) -> list[str]:
    """The parts between commas that are in no bracket."""
    depth, start, parts = 0, 0, []
    for match in _BRACKET.finditer(text):
        depth += (match[0] in "([{") - (match[0] in ")]}")
        if match[0] == "," and depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


@lru_cache(maxsize=4096)
def _arrays(shape: str) -> tuple[_Array, ...]:
    """The arrays of a shape, which may be a tuple of tuples."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        space = re.search(r"S\((\d+)\)", layout)
        found.append(
            _Array(
                dtype,
                tuple(int(n.strip("<= ")) for n in dims.split(",") if n),
                int(space[1]) if space else 0,
            )
        )
    return tuple(found)


def _instruction(name: str, text: str) -> _Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
    start = text.find("(", end)
    if end < 1 or start < 0:
        raise ValueError(f"this is not an HLO instruction: {name} = {text[:80]}")
    close = _closing(text, start)
    op, inside = text[end:start].strip(), text[start + 1 : close]
    # Other printers put the shape before an operand's name.
    operands = (
        ()
        if op in ("constant", "parameter")
        else tuple(part.split()[-1].lstrip("%") for part in _split(inside))
    )
    return _Instruction(name, text[:end], op, inside, text[close + 1 :], operands)


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    """The computations by name, and the name of the entry."""
    computations: dict[str, _Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if not line.startswith(" "):
            header = None if line.startswith("HloModule") else _HEADER.fullmatch(line.rstrip())
            current = _Computation({}, [], {}, {}) if header else None
            if header and current:
                computations[header[2]] = current
                entry = header[2] if header[1] else entry
        elif current and (match := _INSTRUCTION.match(line)):
            found = _instruction(match[2], _INDEX.sub("", match[3]))
            current.instructions[found.name] = found
            if match[1]:
                current.root.append(found.name)
            if found.op == "parameter":
                current.parameters[int(found.inside)] = found.name
            for i, operand in enumerate(found.operands):
                current.users.setdefault(operand, []).append((found, i))
    if not entry:
        raise ValueError(
            "the text has no ENTRY computation; pass HLO text, as from compiled.as_text()"
        )
    return computations, entry


def _attribute(instruction: _Instruction, name: str) -> str:
    """`name=value` or `name={value}` behind the operands, "" where there is none."""
    match = re.search(
        rf"[\s,]{name}=(?:\{{([^{{}}]*)\}}|([^\s,{{]+))", _STRING.sub('""', instruction.attributes)
    )
    return (match[1] or match[2] or "") if match else ""


def _names(instruction: _Instruction, *attributes: str) -> list[str]:
    """The computations that attributes name."""
    return [
        name.strip(" %")
        for attribute in attributes
        for name in _attribute(instruction, attribute).split(",")
        if name.strip()
    ]


# -------------------------------------------------------------------------------------------- FLOPs


def _dot_flops(instruction: _Instruction, computation: _Computation) -> float:
    (result,), (left, *_) = (
        _arrays(instruction.shape),
        _arrays(computation.instructions[instruction.operands[0]].shape),
    )
    contracted = _attribute(instruction, "lhs_contracting_dims")
    return 2.0 * result.elements * math.prod(left.dims[int(n)] for n in contracted.split(",") if n)


def _convolution_flops(instruction: _Instruction, computation: _Computation) -> float:
    """2 for each output feature, batch row, kernel input feature and valid pair of window and
    output position.
    """
    (result,) = _arrays(instruction.shape)
    (left,), (kernel,) = (
        _arrays(computation.instructions[name].shape) for name in instruction.operands
    )
    left_labels, kernel_labels, result_labels = re.split(
        "_|->", _attribute(instruction, "dim_labels")
    )
    window = dict(part.split("=") for part in _attribute(instruction, "window").split())
    flops = 2.0 * result.dims[result_labels.index("b")] * result.dims[result_labels.index("f")]
    # A group's input features only; result rows only of a batch group: the groups divide the work.
    flops *= kernel.dims[kernel_labels.index("i")]
    for i in range(len(result_labels) - 2):
        stride, left_step, kernel_step = (
            int(window[key].split("x")[i]) if key in window else 1 for key in _STEPS
        )
        low = int(window["pad"].split("x")[i].split("_")[0]) if "pad" in window else 0
        left_size, size, positions = (
            array.dims[labels.index(str(i))]
            for array, labels in (
                (left, left_labels),
                (kernel, kernel_labels),
                (result, result_labels),
            )
        )
        flops *= _valid_pairs(size, positions, left_size, stride, low, left_step, kernel_step)
    return flops


_STEPS = ("stride", "lhs_dilate", "rhs_dilate")


@lru_cache(maxsize=4096)
def _valid_pairs(
    size: int,
    positions: int,
    left_size: int,
    stride: int,
    low: int,
    left_step: int,
    kernel_step: int,
) -> int:
    """Pairs (window element, output position) that meet an input element, along one dimension."""
    common = math.gcd(stride, left_step)
    period = left_step // common
    pairs = 0
    for k in range(size):
        # Output position o meets o stride + offset, an input element where left_step divides it.
        offset = k * kernel_step - low
        if offset % common:
            continue
        first = max(0, -(offset // stride))
        last = min(positions - 1, ((left_size - 1) * left_step - offset) // stride)
        phase = -offset // common * pow(stride // common, -1, period)
        first += (phase - first) % period
        pairs += max(0, (last - first) // period + 1)
    return pairs


# ------------------------------------------------------------------------------------------- counts

_Moved = tuple[float, int]
"""Bytes, and the memory space they are read from or written to."""

_NOTHING = Counts(0.0, 0.0, {}, [], 0, 0.0)

# These name or wait for what is there already. The custom calls frame the pieces of an asynchronous
# gather, or hand out memory.
_STILL = {
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
}
_STILL_CALLS = {"AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone"}
_SLICES = {"slice", "dynamic-slice", "gather"}

_MOST_ROUNDS = 10_000
_COMPARED = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}
_FOLDED: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(
        ("copy", "bitcast", "reshape", "convert", "opt-barrier", "compare"), lambda a: a
    ),
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
}


def _foldable(of: _Instruction) -> bool:
    """Whether a value can be known from its operands': an int or bool of one element, or a tuple."""
    if not of.shape.startswith("("):
        array = _arrays(of.shape)[0]
        if array.elements != 1 or not re.fullmatch(r"[su]\d+|pred", array.dtype):
            return False
    return of.op in _FOLDED or of.op in (
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "fusion",
        "call",
    )


def _sum(parts: Iterable[tuple[int, Counts]]) -> Counts:
    """Times and counts -> the sum of the products."""
    flops, moved, main, gathers = 0.0, 0.0, 0.0, []
    collectives: dict[str, float] = {}
    for times, part in parts:
        if not times:
            continue
        flops += times * part.flops
        moved += times * part.bytes
        main += times * part.main_bytes
        gathers += [gather._replace(times=times * gather.times) for gather in part.gathers]
        for kind, size in part.collectives.items():
            collectives[kind] = collectives.get(kind, 0.0) + times * size
    return Counts(flops, moved, collectives, gathers, 0, main)


def _largest(branches: list[Counts]) -> Counts:
    found = {kind for branch in branches for kind in branch.collectives}
    kinds = {
        kind: max(branch.collectives.get(kind, 0.0) for branch in branches)
        for kind in sorted(found)
    }
    gathers = max(branches, key=lambda branch: branch.collectives.get("all-gather", 0.0)).gathers
    flops, moved, main = (
        max(numbers)
        for numbers in zip(*((b.flops, b.bytes, b.main_bytes) for b in branches), strict=True)
    )
    return Counts(flops, moved, kinds, gathers, 0, main)


def _moved(moved: Iterable[_Moved]) -> Counts:
    sizes = list(moved)
    main = [size for size, space in sizes if space == 0]
    return _NOTHING._replace(bytes=math.fsum(size for size, _ in sizes), main_bytes=math.fsum(main))


def _whole(shape: str) -> list[_Moved]:
    return [(array.size, array.space) for array in _arrays(shape)]


def _size(shape: str) -> float:
    return math.fsum(array.size for array in _arrays(shape))


def _target(instruction: _Instruction) -> str:
    match = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return match[1] if match else ""


def _result(instruction: _Instruction) -> str:
    """The shape of what an instruction writes: the start of an asynchronous one carries operands
    and handles too.
    """
    if not instruction.op.endswith("-start") or instruction.op == "all-reduce-start":
        return instruction.shape
    return _split(instruction.shape[1:-1])[0 if instruction.op == "copy-start" else 1]


class _Program:
    """A parsed module."""

    def __init__(self, text: str) -> None:
        self.computations, self.entry = _parse(text)
        self.unknown: set[str] = set()
        self.totals: dict[str, Counts] = {}

    def called(self, instruction: _Instruction) -> _Computation:
        """What a fusion or a call runs."""
        return self.computations[_names(instruction, "calls", "to_apply")[0]]

    def total(self, name: str) -> Counts:
        """The counts of one run of a computation that is no fusion."""
        if name not in self.totals:
            computation, channels = self.computations[name], set[str]()
            self.totals[name] = _sum(
                (1, self.cost(i, computation, False, channels))
                for i in computation.instructions.values()
            )
        return self.totals[name]

    def cost(
        self, instruction: _Instruction, computation: _Computation, fused: bool, channels: set[str]
    ) -> Counts:
        """The counts of one instruction; `channels` are the collectives that fusions of the same
        computation have begun.
        """
        op = instruction.op.removesuffix("-start")
        if op in _STILL or op.endswith(("-done", "-update")):
            return _NOTHING
        if op in COLLECTIVES or op == "ragged-all-to-all":
            return self.collective(instruction, computation, fused, channels)
        if op == "send" and "xla_megascale" in instruction.attributes:
            sent = computation.instructions[instruction.operands[0]].shape
            return _moved(_whole(sent))._replace(collectives={NETWORK: _size(sent)})
        if op == "while":
            body, condition = _names(instruction, "body", "condition")
            times = self.rounds(instruction, computation)
            if times is None:
                self.unknown.add(f"{body} {instruction.name}")
            body_times, condition_times = (1, 1) if times is None else (times, times + 1)
            return _sum([(body_times, self.total(body)), (condition_times, self.total(condition))])
        if op == "conditional":
            branches = _names(
                instruction, "branch_computations", "true_computation", "false_computation"
            )
            return _largest([self.total(name) for name in branches])
        if op in ("call", "async"):
            return _sum((1, self.total(name)) for name in _names(instruction, "to_apply", "calls"))
        parts = [(1, _NOTHING if fused else _moved(self.traffic(op, instruction, computation)))]
        if op == "dot":
            parts.append((1, _NOTHING._replace(flops=_dot_flops(instruction, computation))))
        elif op == "convolution":
            parts.append((1, _NOTHING._replace(flops=_convolution_flops(instruction, computation))))
        elif op == "custom-call":
            declared = re.search(r'"cost_estimate":\{[^{}]*"flops":"(\d+)"', instruction.attributes)
            parts.append((1, _NOTHING._replace(flops=float(declared[1]) if declared else 0.0)))
        for name in (
            _names(instruction, "calls", "called_computations")
            if op in ("fusion", "custom-call")
            else []
        ):
            inner = self.computations[name]
            parts += [(1, self.cost(i, inner, True, channels)) for i in inner.instructions.values()]
        return _sum(parts)

    def collective(
        self, instruction: _Instruction, computation: _Computation, fused: bool, channels: set[str]
    ) -> Counts:
        """A collective.

        In fusions the TPU's compiler cuts one into many pieces of the same channel: the first
        counts for all.
        """
        channel = _attribute(instruction, "channel_id")
        if fused and channel:
            if channel in channels:
                return _NOTHING
            channels.add(channel)
        kind = instruction.op.removesuffix("-start").removeprefix("ragged-")
        results = _arrays(_result(instruction))
        if fused and kind == "all-reduce":
            slices = [i for i in computation.instructions.values() if i.op == "dynamic-slice"]
            kept = [
                array
                for i in slices
                if self.origin(computation, i.name) == instruction
                for array in _arrays(i.shape)
            ]
            if kept:
                # The TPU's reduce-scatter: each device keeps its slice of the sum.
                kind, results = "reduce-scatter", tuple(kept)
        operands = [
            array
            for name in instruction.operands
            for array in _arrays(computation.instructions[name].shape)
        ]
        counted = operands if kind in ("all-reduce", "reduce-scatter") else results
        found = _moved((array.size, array.space) for array in (*operands, *results))
        found = found._replace(collectives={kind: math.fsum(array.size for array in counted)})
        if kind == "all-gather":
            name = re.search(r'op_name="([^"]*)"', instruction.attributes)
            shapes = [
                (f"{array.dtype}[{','.join(map(str, array.dims))}]", array) for array in results
            ]
            found = found._replace(
                gathers=[Gather(s, a.dtype, a.size, 1, name[1] if name else "") for s, a in shapes]
            )
        return found

    # -- bytes

    def traffic(
        self, op: str, instruction: _Instruction, computation: _Computation
    ) -> Iterator[_Moved]:
        """What an instruction outside a fusion reads and writes."""
        operands = [computation.instructions[name].shape for name in instruction.operands]
        result = _result(instruction)
        spaces = [_arrays(shape)[0].space if _arrays(shape) else 0 for shape in (*operands, result)]
        if op == "custom-call" and _target(instruction) in _STILL_CALLS:
            return
        if op in _SLICES:
            yield _size(result), spaces[0]
            operands = operands[1:]
        elif op in ("dynamic-update-slice", "scatter"):
            size = _size(operands[1] if op == "dynamic-update-slice" else operands[-1])
            # A scatter combines with what is there.
            yield size * (1 if op == "dynamic-update-slice" else 2), spaces[-1]
            operands, result = operands[1:], ""
        elif op == "fusion":
            inner = self.called(instruction)
            for i, space in enumerate(spaces[:-1]):
                yield self.read(inner, inner.parameters[i]), space
            yield from self.written(inner, inner.root[0])
            return
        for shape in (*operands, result):
            yield from _whole(shape)

    def read(
        self, computation: _Computation, name: str, outer: Callable[[], float] | None = None
    ) -> float:
        """The bytes of a value in a fusion that its users read: of slices only what they take,
        nothing of what is handed on.

        `outer` reads on behind the root, where the fusion is inside another. What a collective
        reads counts with the collective.
        """
        whole = _size(computation.instructions[name].shape)
        total = outer() if outer and name == computation.root[0] else 0.0
        for user, position in computation.users.get(name, []):
            if user.op in ("bitcast", "get-tuple-element") or (
                user.op == "dynamic-update-slice" and position == 0
            ):
                total += self.read(computation, user.name, outer)
            elif user.op in _SLICES and position == 0:
                total += _size(user.shape)
            elif user.op == "fusion":
                inner = self.called(user)
                total += self.read(
                    inner,
                    inner.parameters[position],
                    partial(self.read, computation, user.name, outer),
                )
            elif not (
                user.op in COLLECTIVES
                or _target(user) in _STILL_CALLS
                or (user.op == "tuple" and not outer)
            ):
                total += whole
        return min(whole, total)

    def written(self, computation: _Computation, name: str) -> Iterator[_Moved]:
        """What a fusion writes for its root, or for one element of it."""
        value = computation.instructions[name]
        if value.op in ("tuple", "bitcast"):
            for operand in value.operands:
                yield from self.written(computation, operand)
        elif value.op == "fusion":
            inner = self.called(value)
            yield from self.written(inner, inner.root[0])
        elif (
            value.op == "dynamic-update-slice"
            and (size := self.updates(computation, name)) is not None
        ):
            yield size, _arrays(value.shape)[0].space
        elif not (
            value.op == "parameter"
            or _target(value) in _STILL_CALLS
            or self.origin(computation, name).op in COLLECTIVES
        ):
            yield from _whole(value.shape)

    def origin(self, computation: _Computation, name: str) -> _Instruction:
        """The value behind bitcasts and dynamic slices."""
        value = computation.instructions[name]
        return (
            self.origin(computation, value.operands[0])
            if value.op in ("bitcast", "dynamic-slice")
            else value
        )

    def updates(self, computation: _Computation, name: str) -> float | None:
        """The bytes that updates in place write into a parameter to make this value; None for a
        value made otherwise.
        """
        value = computation.instructions[name]
        if value.op == "parameter":
            return 0.0
        if value.op not in ("bitcast", "dynamic-update-slice"):
            return None
        below = self.updates(computation, value.operands[0])
        if below is None or value.op == "bitcast":
            return below
        return below + _size(computation.instructions[value.operands[1]].shape)

    # -- rounds of a loop

    def rounds(self, loop: _Instruction, computation: _Computation) -> int | None:
        """How often a loop's body runs, as the compiler noted it or by running the loop's counters;
        None where data decide.
        """
        known = re.search(r'known_trip_count\\?":\s*\{\\?"n\\?":\s*\\?"(\d+)', loop.attributes)
        if known:
            return int(known[1])
        body, condition = (self.computations[name] for name in _names(loop, "body", "condition"))
        state = self.value(computation, loop.operands[0], None, {})
        for times in range(_MOST_ROUNDS):
            more = self.value(condition, condition.root[0], (state,), {})
            if more is None:
                return None
            if not more:
                return times
            state = self.value(body, body.root[0], (state,), {})
        return None

    def value(
        self,
        computation: _Computation,
        name: str,
        arguments: tuple[Any, ...] | None,
        known: dict[str, Any],
    ) -> Any:
        """An int or bool of one element, a tuple of such, or None for what is not known from the
        text alone.
        """
        waiting = [name]  # a stack: in a large program the chains are longer than calls may nest
        while waiting:
            of = computation.instructions[waiting[-1]]
            if not _foldable(of):
                known[waiting.pop()] = None
            elif missing := [operand for operand in of.operands if operand not in known]:
                waiting += missing
            else:
                known[waiting.pop()] = self.folded(of, arguments, known)
        return known[name]

    def folded(
        self, of: _Instruction, arguments: tuple[Any, ...] | None, known: dict[str, Any]
    ) -> Any:
        """`value` of a foldable instruction whose operands are known."""
        if of.op == "parameter":
            return arguments[int(of.inside)] if arguments else None
        if of.op == "constant":
            literal = of.inside.strip("{} ")
            return literal == "true" if literal in ("true", "false") else int(literal)
        values = tuple(known[operand] for operand in of.operands)
        if of.op == "tuple":
            return values
        if of.op in ("fusion", "call"):
            inner = self.called(of)
            return self.value(inner, inner.root[0], values, {})
        if of.op == "get-tuple-element":
            return values[0][int(_attribute(of, "index"))] if isinstance(values[0], tuple) else None
        if None in values:
            return None
        return (
            _COMPARED[_attribute(of, "direction")](*values)
            if of.op == "compare"
            else _FOLDED[of.op](*values)
        )
