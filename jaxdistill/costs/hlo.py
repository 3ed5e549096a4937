"""FLOPs, bytes and collectives of a compiled program, read from its text: loops count as often as
they run.

`compiled.cost_analysis()` counts the body of a loop once and knows no collectives. The text is that
of one device, so all numbers are of one device: work that is not divided among them shows as FLOPs.
"""

import math
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from jaxdistill.costs.flops import valid_pairs

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

ATTENTION = {"splash_mha_fwd": 2, "splash_mha_dkv": 5}
"""Kernels that declare no FLOPs -> how often they multiply as much as queries [b, h, l, d] by keys
[b, h, m, d]: the scores and the result; the scores again and the four products of a gradient.
"""

NETWORK = "between slices"
"""What goes by the host over the data-center network, among the kinds of collectives."""


class Gather(NamedTuple):
    """One all-gather: its result ("bf16[1024,4096]"), the bytes of one run, the times it runs, and
    the name JAX gave it.
    """

    shape: str
    bytes: float
    times: int
    op_name: str


class Counts(NamedTuple):
    """What one run of a program does on one device.

    Attributes:
      flops: of dots and convolutions, as `flops.flops_of` counts them: a dot that the TPU's
        compiler writes as a convolution counts as the dot. Pallas kernels count what they declare,
        which may be nothing, and those of attention their products.
      bytes: read from and written to the device's main memory by what is not inside a fusion; not
        what a TPU keeps on the chip. Of slices and updates in place only the part that moves.
      collectives: each of `COLLECTIVES` that occurs -> bytes of its results; of its operands for
        all-reduce and reduce-scatter. And `NETWORK` -> the bytes that are sent there.
      gathers: the all-gathers; their bytes times their times make up collectives["all-gather"].
      unknown_loops: loops whose number of rounds is not in the text; they count as one round.
    """

    flops: float
    bytes: float
    collectives: dict[str, float]
    gathers: list[Gather]
    unknown_loops: int


def count(text: str) -> Counts:
    """The counts of `compiled.as_text()`. Of a conditional's branches that with the most FLOPs.

    Raises ValueError for other text.
    """
    program = _Program(text)
    flops = moved = 0.0
    collectives: dict[str, float] = {}
    gathers: list[Gather] = []
    for times, of, inside, fused in program.runs(program.entry):
        flops += times * _flops(of, inside)
        moved += times * program.traffic(of, inside, fused)
        for kind, shape, size in _sent(of, inside, fused):
            collectives[kind] = collectives.get(kind, 0.0) + times * size
            if kind == "all-gather":
                gathers.append(Gather(shape, size, times, _text(of, r'op_name="([^"]*)"')))
    return Counts(flops, moved, collectives, gathers, program.unknown_loops)


# --------------------------------------------------------------------------------------------- text


class _Array(NamedTuple):
    """An array's type; `space` is 0 for the main memory."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def size(self) -> float:
        bits = re.search(r"\d+", self.dtype)
        width = int(bits[0]) / 8 if bits else float(self.dtype == "pred")
        return math.prod(self.dims) * width


class _Instruction(NamedTuple):
    """`%name = shape op(operands), attributes`, of a constant or a parameter op(literal)."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    literal: str
    attributes: str


class _Computation:
    def __init__(self) -> None:
        self.instructions: dict[str, _Instruction] = {}
        self.root = ""

    def __getitem__(self, name: str) -> _Instruction:
        return self.instructions[name]

    def shapes(self, of: _Instruction) -> list[str]:
        """Of the operands."""
        return [self[name].shape for name in of.operands]

    @cached_property
    def parameters(self) -> dict[int, str]:
        return {
            int(of.literal): name for name, of in self.instructions.items() if of.op == "parameter"
        }

    @cached_property
    def users(self) -> dict[str, list[tuple[_Instruction, int]]]:
        """Name of a value -> who uses it, as which operand."""
        found: dict[str, list[tuple[_Instruction, int]]] = {}
        for of in self.instructions.values():
            for position, name in enumerate(of.operands):
                found.setdefault(name, []).append((of, position))
        return found


_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"(ENTRY )?%(\S+) \(.*\{")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%(\S+) = (.*?) ([a-z][a-z\d-]*)\(([^)]*)\)(.*)")
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"')
_COMMENT = re.compile(r"/\*.*?\*/")


@lru_cache(maxsize=4096)
def _arrays(shape: str) -> tuple[_Array, ...]:
    """The arrays of a shape, which may be a tuple of tuples."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(n.strip("<= ")) for n in dims.split(",") if n)
        found.append(_Array(dtype, sizes, int(space[1]) if space else 0))
    return tuple(found)


def _size(*shapes: str) -> float:
    return math.fsum(array.size for shape in shapes for array in _arrays(shape))


def _in_main(*shapes: str) -> float:
    """The bytes of what is in the main memory."""
    arrays = (array for shape in shapes for array in _arrays(shape))
    return math.fsum(array.size for array in arrays if array.space == 0)


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    """The computations by name, and the name of the entry."""
    computations: dict[str, _Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _HEADER.fullmatch(line):
            current = computations[header[2]] = _Computation()
            entry = header[2] if header[1] else entry
        elif current and line.startswith(" "):
            match = _INSTRUCTION.fullmatch(_COMMENT.sub("", line))
            if not match:
                raise ValueError(f"this is not an instruction of a compiled program: {line[:80]}")
            root, name, shape, op, inside, attributes = match.groups()
            named = () if op in ("constant", "parameter") else inside.split(",")
            operands = tuple(part.strip(" %") for part in named if part)
            current.instructions[name] = _Instruction(name, shape, op, operands, inside, attributes)
            current.root = name if root else current.root
    if not entry:
        raise ValueError("the text has no ENTRY computation; pass compiled.as_text()")
    return computations, entry


def _text(of: _Instruction, pattern: str) -> str:
    """What the pattern's group finds in the attributes, or ""."""
    match = re.search(pattern, of.attributes)
    return match[1] if match else ""


def _attribute(of: _Instruction, name: str) -> str:
    """`name=value` or `name={value}`, "" where there is none."""
    pattern = rf"[\s,]{name}=(?:\{{([^{{}}]*)\}}|([^\s,{{]+))"
    match = re.search(pattern, _STRING.sub('""', of.attributes))
    return (match[1] or match[2] or "") if match else ""


def _names(of: _Instruction, *attributes: str) -> list[str]:
    """The computations that attributes name."""
    values = ",".join(_attribute(of, attribute) for attribute in attributes)
    return [name.strip(" %") for name in values.split(",") if name.strip()]


# -------------------------------------------------------------------------------------------- FLOPs


def _flops(of: _Instruction, inside: _Computation) -> float:
    if of.op == "dot":
        (result,), (left,) = _arrays(of.shape), _arrays(inside[of.operands[0]].shape)
        contracted = _attribute(of, "lhs_contracting_dims").split(",")
        return 2.0 * math.prod(result.dims) * math.prod(left.dims[int(n)] for n in contracted if n)
    if of.op == "convolution":
        return _convolution(of, *(_arrays(s)[0].dims for s in (of.shape, *inside.shapes(of))))
    if of.op == "custom-call":
        for kernel, products in ATTENTION.items():
            if of.name.startswith(kernel):
                return products * _scores(of, inside)
        return float(_text(of, r'"cost_estimate":\{[^{}]*"flops":"(\d+)"') or 0)
    return 0.0


def _scores(of: _Instruction, inside: _Computation) -> float:
    """The FLOPs of an attention kernel's queries by its keys: its first two operands of floats."""
    arrays = [_arrays(shape)[0] for shape in inside.shapes(of)]
    queries, keys = (a.dims for a in [a for a in arrays if "f" in a.dtype][:2])
    return 2.0 * math.prod(queries) * keys[-2]


def _convolution(
    of: _Instruction, result: Sequence[int], left: Sequence[int], kernel: Sequence[int]
) -> float:
    """As `flops.flops_of` counts it."""
    left_axes, kernel_axes, result_axes = re.split("_|->", _attribute(of, "dim_labels"))
    window = dict(part.split("=") for part in _attribute(of, "window").split())
    flops = 2.0 * result[result_axes.index("b")] * result[result_axes.index("f")]
    flops *= kernel[kernel_axes.index("i")]  # of one group
    for i in range(len(result) - 2):
        stride, left_step, kernel_step = (
            int(window[key].split("x")[i]) if key in window else 1
            for key in ("stride", "lhs_dilate", "rhs_dilate")
        )
        low = int(window["pad"].split("x")[i].split("_")[0]) if "pad" in window else 0
        size, positions, left_size = (
            dims[axes.index(str(i))]
            for dims, axes in ((kernel, kernel_axes), (result, result_axes), (left, left_axes))
        )
        flops *= valid_pairs(size, positions, left_size, stride, low, left_step, kernel_step)
    return flops


# -------------------------------------------------------------------------------------- collectives


def _started(of: _Instruction, inside: _Computation) -> _Instruction:
    """`x-start`, which an asynchronous `x-done` ends, as x."""
    while of.operands and not of.op.endswith("-start"):
        of = inside[of.operands[0]]
    return of._replace(op=of.op.removesuffix("-start"))


def _sent(of: _Instruction, inside: _Computation, fused: bool) -> Iterator[tuple[str, str, float]]:
    """Kind, shape and bytes of each array that a collective exchanges."""
    shape = of.shape
    if of.op == "send" and "xla_megascale" in of.attributes:
        yield NETWORK, "", _size(inside[of.operands[0]].shape)
    if of.op.endswith("-done") and of.op.removesuffix("-done") in COLLECTIVES:
        of = _started(of, inside)
    kind = of.op.removeprefix("ragged-")
    if kind not in COLLECTIVES:
        return
    if fused and kind == "all-reduce" and _keeps_a_slice(inside):
        kind = "reduce-scatter"
    summed = kind in ("all-reduce", "reduce-scatter")
    for array in _arrays(" ".join(inside.shapes(of)) if summed else shape):
        yield kind, f"{array.dtype}[{','.join(map(str, array.dims))}]", array.size


def _keeps_a_slice(fused: _Computation) -> bool:
    """Whether a fusion with an all-reduce is the TPU's reduce-scatter: each device keeps its slice
    of the sum.
    """
    return any(of.op == "dynamic-slice" for of in fused.instructions.values())


# ------------------------------------------------------------------------------------------ program

# These name what is there already, or run others. The custom calls frame the pieces of an
# asynchronous gather, or hand out memory.
_STILL = frozenset(
    (
        *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"),
        *("partition-id", "replica-id", "opt-barrier", "while", "conditional", "call"),
        *("send-done", "recv-done", "async-done"),
    )
)
_STILL_CALLS = ("AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone")
_SLICES = ("slice", "dynamic-slice", "gather")

_MOST_ROUNDS = 10_000
_INTEGERS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("copy", "bitcast", "convert"), int),
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
}


def _is_still(of: _Instruction) -> bool:
    return of.op in _STILL or _text(of, r'custom_call_target="([^"]*)"') in _STILL_CALLS


class _Program:
    """A parsed module."""

    def __init__(self, text: str) -> None:
        self.computations, self.entry = _parse(text)
        self.unknown_loops = 0

    def called(self, of: _Instruction) -> _Computation:
        """What a fusion or a call runs."""
        return self.computations[_names(of, "calls", "to_apply")[0]]

    def runs(
        self, name: str, times: int = 1, pieces: set[str] | None = None
    ) -> Iterator[tuple[int, _Instruction, _Computation, bool]]:
        """Every instruction with the times it runs, its computation, and whether that is a fusion.

        `pieces` are the collectives that fusions of the same computation have begun: the TPU's
        compiler cuts one into many of the same channel, and the first stands for all.
        """
        computation, fused = self.computations[name], pieces is not None
        begun: set[str] = set() if pieces is None else pieces
        for of in computation.instructions.values():
            if fused and of.op in COLLECTIVES and (channel := _attribute(of, "channel_id")):
                if channel in begun:
                    continue
                begun.add(channel)
            yield times, of, computation, fused
            if of.op == "while":
                rounds = self.rounds(of, computation)
                self.unknown_loops += rounds is None
                body, condition = _names(of, "body", "condition")
                yield from self.runs(body, times * (1 if rounds is None else rounds))
                yield from self.runs(condition, times * (1 if rounds is None else rounds + 1))
            elif of.op == "conditional":
                yield from self.runs(self.branch(of), times)
            elif of.op in ("call", "async-start"):
                yield from self.runs(_names(of, "to_apply", "calls")[0], times)
            elif of.op in ("fusion", "custom-call"):
                for called in _names(of, "calls", "called_computations"):
                    yield from self.runs(called, times, begun)

    def branch(self, of: _Instruction) -> str:
        """A conditional's branch with the most FLOPs."""
        attributes = ("branch_computations", "true_computation", "false_computation")

        def flops(name: str) -> float:
            return sum(times * _flops(of, inside) for times, of, inside, _ in self.runs(name))

        return max(_names(of, *attributes), key=flops)

    # -- bytes

    def traffic(self, of: _Instruction, inside: _Computation, fused: bool) -> float:
        """What an instruction moves through the main memory; in a fusion only collectives count,
        the rest with the fusion.
        """
        result = of.shape
        if _is_still(of) or of.op.endswith(("-start", "-update")):
            return 0.0
        if of.op.endswith("-done"):
            of = _started(of, inside)
        shapes = inside.shapes(of)
        if of.op in COLLECTIVES:
            return _in_main(*shapes, "" if fused and _keeps_a_slice(inside) else result)
        if fused:
            return 0.0
        if of.op == "send":
            return _in_main(*shapes)
        if of.op == "fusion":
            called = self.called(of)
            read = (
                self.read(called, called.parameters[i]) for i, s in enumerate(shapes) if _in_main(s)
            )
            return math.fsum(read) + self.written(called, called.root)
        if of.op in _SLICES:
            part = _size(result) if _in_main(shapes[0]) else 0.0
            return part + _in_main(*shapes[1:], result)
        if of.op in ("dynamic-update-slice", "scatter"):
            # A scatter combines with what is there.
            update, moves = (shapes[1], 1) if of.op != "scatter" else (shapes[-1], 2)
            return _in_main(*shapes[1:]) + (moves * _size(update) if _in_main(result) else 0.0)
        return _in_main(*shapes, result)

    def read(self, fused: _Computation, name: str, behind: float = 0.0) -> float:
        """The bytes of a fusion's value that its users read: of slices only what they take, nothing
        of what they hand on, update in place or exchange; of the root those that are read `behind`.
        """
        whole, total = _size(fused[name].shape), behind if name == fused.root else 0.0
        for user, position in fused.users.get(name, []):
            if user.op in ("bitcast", "get-tuple-element"):
                total += self.read(fused, user.name, behind)
            elif user.op == "dynamic-update-slice" and position == 0:
                total += self.read(fused, user.name)
            elif user.op in _SLICES and position == 0:
                total += _size(user.shape)
            elif user.op == "fusion":
                inner = self.called(user)
                total += self.read(inner, inner.parameters[position], _size(user.shape))
            elif user.op not in COLLECTIVES and not _is_still(user):
                total += whole
        return min(whole, total)

    def written(self, fused: _Computation, name: str) -> float:
        """What a fusion writes to the main memory for its root, or for one element of it."""
        of = fused[name]
        if of.op in ("tuple", "bitcast"):
            return math.fsum(self.written(fused, operand) for operand in of.operands)
        if of.op == "fusion":
            inner = self.called(of)
            return self.written(inner, inner.root)
        if of.op in COLLECTIVES or _is_still(of) or not _in_main(of.shape):
            return 0.0
        updates = 0.0
        while of.op in ("dynamic-update-slice", "bitcast"):
            updates += _size(fused[of.operands[1]].shape) if of.op != "bitcast" else 0.0
            of = fused[of.operands[0]]
        return updates if of.op == "parameter" else _in_main(fused[name].shape)

    # -- rounds of a loop

    def rounds(self, loop: _Instruction, inside: _Computation) -> int | None:
        """How often a loop's body runs, by running its counters; None where data decide.

        The CPU's compiler notes it (`known_trip_count`), the TPU's does not.
        """
        body, condition = (self.computations[name] for name in _names(loop, "body", "condition"))
        counters = {
            int(_attribute(of, "index"))
            for of in condition.instructions.values()
            if of.op == "get-tuple-element"
        }
        first, after = inside[loop.operands[0]], body[body.root]
        if first.op != "tuple" or after.op != "tuple":
            return None
        state = {i: self.integer(inside, first.operands[i], ()) for i in counters}
        for times in range(_MOST_ROUNDS):
            more = self.integer(condition, condition.root, (state,))
            if not more:
                return None if more is None else times
            state = {i: self.integer(body, after.operands[i], (state,)) for i in counters}
        return None

    def integer(self, inside: _Computation, name: str, arguments: Sequence[Any]) -> Any:
        """The value of an integer, or of a loop's state {index: integer}; None where the text does
        not say it.
        """
        of = inside[name]
        if of.op == "constant":
            literal = of.literal.strip("{} ")
            return int(literal) if re.fullmatch(r"-?\d+", literal) else None
        if of.op == "parameter":
            return arguments[int(of.literal)] if arguments else None
        if of.op not in (*_INTEGERS, "compare", "get-tuple-element", "fusion", "call"):
            return None
        values = [self.integer(inside, operand, arguments) for operand in of.operands]
        if of.op == "get-tuple-element":
            return (values[0] or {}).get(int(_attribute(of, "index")))
        if None in values:
            return None
        if of.op in ("fusion", "call"):
            called = self.called(of)
            return self.integer(called, called.root, values)
        if of.op == "compare":
            return getattr(operator, _attribute(of, "direction").lower())(*values)
        return _INTEGERS[of.op](*values)
