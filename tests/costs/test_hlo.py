"""Compiled programs against their jaxprs and XLA's own analysis; and the TPU's ways to write them,
with counts made by hand.
"""

import importlib.util
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from paths import ROOT, TESTS
from shell import environment
from test_flops_of_jaxpr import WITHOUT_LOOPS, transposed

from jaxdistill.costs.flops import flops_of
from jaxdistill.costs.hlo import NETWORK, count

# ---------------------------------------------------------------------------------- programs of JAX


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", WITHOUT_LOOPS)
def test_flops_are_those_of_the_jaxpr_and_of_xla_where_there_is_no_loop(name, backward):
    function, shapes = WITHOUT_LOOPS[name]
    if backward:
        function, shapes = transposed(function, *shapes)
    compiled = jax.jit(function).lower(*shapes).compile()
    found = count(compiled.as_text()).flops
    assert found == pytest.approx(compiled.cost_analysis()["flops"], rel=1e-6)
    assert found == flops_of(function, *shapes)


def layer(x, w):
    return jnp.tanh(x @ w)


def both(body, rounds):
    """(x, ws) -> x after `rounds` of body, as a scan and unrolled."""

    def scanned(x, ws):
        return jax.lax.scan(lambda x, w: (body(x, w), None), x, ws)[0]

    def unrolled(x, ws):
        for i in range(rounds):
            x = body(x, ws[i])
        return x

    return scanned, unrolled


def squared(function):
    return jax.grad(lambda *a: jnp.sum(function(*a) ** 2), (0, 1))


def nested(x, ws):
    inner, _ = both(layer, 5)
    return jax.lax.scan(lambda x, _: (inner(x, ws), None), x, None, length=3)[0]


def nested_unrolled(x, ws):
    _, inner = both(layer, 5)
    for _ in range(3):
        x = inner(x, ws)
    return x


LOOPS = {
    "scan": both(layer, 5),
    "gradient": tuple(squared(f) for f in both(layer, 5)),
    "remat": tuple(squared(f) for f in both(jax.checkpoint(lambda x, w: layer(layer(x, w), w)), 5)),
    "nested": (nested, nested_unrolled),
    "nested gradient": (squared(nested), squared(nested_unrolled)),
    "fori": (
        lambda x, ws: jax.lax.fori_loop(2, 5, lambda i, x: layer(x, ws[i]), x),
        lambda x, ws: both(layer, 3)[1](x, ws),
    ),
    "reverse": (
        lambda x, ws: jax.lax.scan(lambda x, w: (layer(x, w), None), x, ws, reverse=True)[0],
        both(layer, 5)[1],
    ),
    "mapped": (
        lambda x, ws: jax.lax.map(lambda w: layer(x, w), ws),
        lambda x, ws: jnp.stack([layer(x, ws[i]) for i in range(5)]),
    ),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_counts_as_its_unrolled_self(name):
    arrays = (
        jax.ShapeDtypeStruct((32, 64), jnp.float32),
        jax.ShapeDtypeStruct((5, 64, 64), jnp.float32),
    )
    looped, unrolled = LOOPS[name]
    compiled = jax.jit(looped).lower(*arrays).compile()
    assert " while(" in compiled.as_text()
    found = count(compiled.as_text())
    assert found.unknown_loops == 0
    assert found.flops == flops_of(looped, *arrays) == flops_of(unrolled, *arrays)
    assert compiled.cost_analysis()["flops"] < 0.7 * found.flops  # what XLA says: the bodies once


def test_a_loop_that_data_end_counts_once():
    def f(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 100.0, lambda x: layer(x, w), x)

    found = count(jax.jit(f).lower(jnp.ones((8, 16)), jnp.ones((16, 16))).compile().as_text())
    assert (found.flops, found.unknown_loops) == (2 * 8 * 16 * 16, 1)


def test_the_largest_branch_of_a_switch_counts():
    def f(i, x, w):
        return jax.lax.switch(i, [lambda: x, lambda: layer(layer(x, w), w), lambda: layer(x, w)])

    text = jax.jit(f).lower(1, jnp.ones((8, 16)), jnp.ones((16, 16))).compile().as_text()
    assert count(text).flops == 2 * 2 * 8 * 16 * 16


def test_bytes_are_those_of_xla_where_there_is_no_loop():
    def f(x, w):
        return jax.grad(lambda w: jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w.T) ** 2))(w)

    compiled = jax.jit(f).lower(jnp.ones((64, 128)), jnp.ones((128, 96))).compile()
    found = count(compiled.as_text()).bytes
    assert found == pytest.approx(compiled.cost_analysis()["bytes accessed"], rel=0.01)


def test_bytes_of_a_scan_are_near_those_of_its_unrolled_self():
    # Each round reads one layer's weights of the stack, and writes one of the stacked results.
    def scanned(x, ws):
        return jax.lax.scan(lambda x, w: (layer(x, w), layer(x, w)), x, ws)

    def unrolled(x, ws):
        out = []
        for i in range(40):
            x = layer(x, ws[i])
            out.append(x)
        return x, jnp.stack(out)

    arrays = jnp.ones((128, 128)), jnp.ones((40, 128, 128))
    found = [
        count(jax.jit(f).lower(*arrays).compile().as_text()).bytes for f in (scanned, unrolled)
    ]
    assert found[0] == pytest.approx(found[1], rel=0.4)
    # Ten arrays of one layer's size a round; the stack is 40.
    assert max(found) < 12 * 40 * 4 * 128**2


# ------------------------------------------------------------------------------- the TPU's own ways


def module(entry, *computations):
    """The text of a module from the lines of its computations: (name, lines) and the lines of the
    entry.
    """
    parts = [
        f"{name} () -> f32[] {{\n" + "\n".join(f"  {line}" for line in lines) + "\n}"
        for name, lines in (*computations, ("ENTRY %main.1", entry))
    ]
    return "HloModule jit_f, is_scheduled=true\n\n" + "\n\n".join(parts) + "\n"


def test_a_dot_written_as_a_convolution_counts_as_the_dot():
    lines = [
        "%x.1 = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} parameter(0)",
        '%y.1 = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(1), metadata={op_name="a=b, calls=%no {"}',
        (
            "ROOT %d..2 = bf16[8,32]{1,0:T(8,128)S(1)} convolution(%x.1, /*index=1*/%y.1),"
            ' frontend_attributes={a=", dim_labels=fb_oi->fb"}, dim_labels=bf_io->bf,'
            ' backend_config={"a":[{"b":"}"}]}'
        ),
    ]
    assert count(module(lines)).flops == 2 * 8 * 16 * 32
    # bqd,bkd->bqk for a batch of 8 or 77: each row of the batch meets itself only.
    for rows, out, window in (
        (8, 8, "size=8 stride=7 lhs_dilate=8"),
        (77, 1, "size=77 rhs_reversal=1"),
    ):
        lines = [
            f"%q = bf16[{rows},7,5] parameter(0)",
            f"%k = bf16[{rows},11,5] parameter(1)",
            f"ROOT %s = bf16[{out},7,11] convolution(%q, %k), window={{{window}}},"
            " dim_labels=0bf_0oi->0bf",
        ]
        assert count(module(lines)).flops == 2 * rows * 7 * 11 * 5


@pytest.mark.parametrize(
    "estimate", ['"flops":"1234","transcendentals":"5"', '"bytes_accessed":"7","flops":"1234"']
)
def test_a_kernel_counts_what_it_declares(estimate):
    """Its fields in JAX's order, or by the alphabet, as the TPU's compiler writes them."""
    config = (
        f'backend_config={{"custom_call_config":{{"body":"TUz","cost_estimate":{{{estimate}}}}}}}'
    )
    lines = [
        "%x = f32[8] parameter(0)",
        f'ROOT %k = f32[8] custom-call(%x), custom_call_target="tpu_custom_call", {config}',
    ]
    assert count(module(lines)).flops == 1234


STATE = "(s32[]{:T(128)}, f32[4,4]{1,0}, s32[])"
PRODUCT = 2 * 4 * 4 * 4


def loop(step, condition, start):
    """A module whose body makes one product of 4 x 4 matrices; `step` and `condition` are lines on
    the counter i and the bound n, a constant that the loop hands on.
    """
    handed = [
        f"%p = {STATE} parameter(0)",
        "%i = s32[] get-tuple-element(%p), index=0",
        "%n = s32[] get-tuple-element(%p), index=2",
    ]
    body = [
        *handed,
        "%x = f32[4,4]{1,0} get-tuple-element(%p), index=1",
        "%d = f32[4,4] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        *step,
        f"ROOT %t = {STATE} tuple(%next, %d, %n)",
    ]
    entry = [
        "%a = f32[4,4]{1,0} parameter(0)",
        f"%c = s32[] constant({start})",
        "%bound = s32[] constant(7)",
        f"%s = {STATE} tuple(%c, %a, %bound)",
        f"%w = {STATE} while(%s), condition=%condition.1, body=%body.1",
        "ROOT %r = f32[4,4]{1,0} get-tuple-element(%w), index=1",
    ]
    pair = ["%a = s32[] parameter(0)", "%b = s32[] parameter(1)"]
    more = (
        ("%add.1", [*pair, "ROOT %r = s32[] add(%a, %b)"]),
        ("%less.1", [*pair, "ROOT %r = pred[] compare(%a, %b), direction=LT"]),
    )
    return module(entry, *more, ("%body.1", body), ("%condition.1", [*handed, *condition]))


UP = ["%one = s32[] constant(1)", "%next = s32[] add(%i, %one)"]
FUSED = [
    "%one = s32[] constant(1)",
    "%j = s32[] copy(%i)",
    "%next = s32[] fusion(%j, %one), kind=kLoop, calls=%add.1",
]
LESS = ["ROOT %m = pred[] compare(%i, %n), direction=LT"]


@pytest.mark.parametrize(
    ("step", "condition", "start", "rounds"),
    [
        (UP, LESS, 0, 7),
        (UP, LESS, 3, 4),
        (UP, LESS, 9, 0),
        (UP, ["ROOT %m = pred[] compare(%n, %i), direction=GE"], 0, 8),
        (["%one = s32[] constant(-2)", "%next = s32[] subtract(%i, %one)"], LESS, 0, 4),
        (FUSED, ["ROOT %m = pred[] fusion(%i, %n), kind=kLoop, calls=%less.1"], 0, 7),
        (UP, ["ROOT %m = pred[] compare(%i, %n), direction=NE"], 8, None),
        (['%next = s32[] custom-call(%i), custom_call_target="q"'], LESS, 0, None),
        (UP, ['ROOT %m = pred[] custom-call(%i, %n), custom_call_target="q"'], 0, None),
    ],
    ids=["up", "from 3", "none", "also 7", "by 2", "fusions", "no end", "step", "bound"],
)
def test_the_rounds_follow_from_the_counter(step, condition, start, rounds):
    found = count(loop(step, condition, start))
    assert found.unknown_loops == (rounds is None)
    assert found.flops == (1 if rounds is None else rounds) * PRODUCT


def test_the_condition_runs_once_more_than_the_body():
    product, addition, comparison = 3 * 64, 3 * 4, 4 + 4 + 1
    assert count(loop(UP, LESS, 0)).bytes == 7 * (product + addition) + 8 * comparison


# -------------------------------------------------------------------------------------- collectives


@pytest.mark.parametrize(
    ("line", "kind", "size"),
    [
        ("%r = (f32[8], f32[4]) all-reduce(%x, /*index=1*/%y), to_apply=%add.1", "all-reduce", 48),
        ("%r = f32[8] all-reduce-start(%x), to_apply=%add.1", "all-reduce", 32),
        ("%r = f32[2] reduce-scatter(%x), dimensions={0}, to_apply=%a", "reduce-scatter", 32),
        ("%r = ((f32[8]), f32[2]) reduce-scatter-start(%x)", "reduce-scatter", 32),
        ("%r = f32[32] all-gather(%x), dimensions={0}", "all-gather", 128),
        ("%r = (f32[8]{0}, f32[32]{0:T(128)S(1)}) all-gather-start(%x)", "all-gather", 128),
        ("%r = f32[8] ragged-all-to-all(%x, %x)", "all-to-all", 32),
        ("%r = (bf16[8], bf16[8], u32[]) collective-permute-start(%z)", "collective-permute", 16),
    ],
)
def test_collectives(line, kind, size):
    lines = ["%x = f32[8] parameter(0)", "%y = f32[4] parameter(1)", "%z = bf16[8] parameter(2)"]
    lines.append(line)
    done = {"all-gather": "f32[32]", "collective-permute": "bf16[8]"}.get(kind, "f32[8]")
    if "-start(" in line:
        lines.append(f"ROOT %d = {done}{{0}} {kind}-done(%r)")
    found = count(module(lines))
    assert found.collectives == {kind: size}
    assert sum(gather.bytes for gather in found.gathers) == found.collectives.get("all-gather", 0)


def test_gathers_in_nested_loops_are_named_and_multiplied():
    def f(x):
        def inner(x, _):
            whole = jax.lax.all_gather(x, "i", tiled=True)
            return whole[: len(x)] * 2, None

        def outer(x, _):
            return jax.lax.scan(inner, x, None, length=3)[0], None

        return jax.lax.scan(outer, x, None, length=5)[0]

    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("i")
    f = jax.shard_map(f, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    found = count(jax.jit(f).lower(jnp.ones(16)).compile().as_text())
    assert found.collectives == {"all-gather": 15 * 64}
    (gather,) = found.gathers
    assert gather[:3] == ("f32[16]", 64, 15) and gather.op_name.endswith("/all_gather")


def test_what_a_host_sends_to_another_slice():
    host = (
        "is_host_transfer=true,"
        ' frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}'
    )
    lines = [
        "%x = f32[8] parameter(0)",
        "%t = token[] after-all()",
        f"%s = (f32[8], u32[], token[]) send(%x, %t), channel_id=1, {host}",
        f"%r = (f32[8], token[]) recv(%t), channel_id=2, {host}",
        "%e = token[] send-done(%s), channel_id=1",
        "%d = (f32[8], token[]) recv-done(%r), channel_id=2",
        "ROOT %g = f32[8] get-tuple-element(%d), index=0",
    ]
    found = count(module(lines))
    assert (found.collectives, found.bytes) == ({NETWORK: 32}, 32 + 32)
    # To the program on the host itself nothing goes over the network.
    lines = [line.replace("xla_megascale_runtime", "debug") for line in lines]
    assert count(module(lines)).collectives == {}


def test_an_asynchronous_computation_counts_once():
    inner = (
        "%wrapped.1",
        ["%x = f32[8] parameter(0)", "ROOT %g = f32[32] all-gather(%x), dimensions={0}"],
    )
    lines = [
        "%x = f32[8] parameter(0)",
        "%s = ((f32[8]), f32[32], u32[]) async-start(%x), calls=%wrapped.1",
        "%u = ((f32[8]), f32[32], u32[]) async-update(%s), calls=%wrapped.1",
        "ROOT %d = f32[32] async-done(%u), calls=%wrapped.1",
    ]
    found = count(module(lines, inner))
    assert (found.collectives, found.bytes) == ({"all-gather": 128}, 32 + 128)


def test_a_gather_in_pieces_counts_once():
    """How the TPU's compiler lays a gather under products: each piece names the whole gather, and
    hands the rest on. Outside fusions a channel used twice is two collectives.
    """
    chip = "f32[32,8]{1,0:S(1)}"
    gather = f"%g = {chip} all-gather(%x), channel_id=7, dimensions={{0}}"
    x, whole, product = (
        "%x = f32[8,8] parameter(0)",
        f"%w = {chip} parameter(1)",
        "%m = f32[8,8] parameter(2)",
    )
    dot = "%d = f32[8,8] dot(%m, %m), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    pair, triple = f"(f32[8,8], {chip})", f"(f32[8,8], f32[8,8], {chip}, {chip})"
    start = f'ROOT %c = {pair} custom-call(%g), custom_call_target="AsyncCollectiveStart"'
    done = f'ROOT %c = {chip} custom-call(%x, %w, %g), custom_call_target="AsyncCollectiveDone"'
    fused = [
        ("%start.1", [x, gather, start]),
        ("%piece.1", [x, whole, product, dot, gather, f"ROOT %t = {triple} tuple(%d, %x, %w, %g)"]),
        ("%done.1", [x, whole, gather, done]),
    ]
    lines = [
        x,
        "%m = f32[8,8] parameter(1)",
        f"%s = {pair} fusion(%x), kind=kCustom, calls=%start.1",
        "%x1 = f32[8,8] get-tuple-element(%s), index=0",
        f"%w1 = {chip} get-tuple-element(%s), index=1",
        f"%p = {triple} fusion(%x1, %w1, %m), kind=kOutput, calls=%piece.1",
        "%x2 = f32[8,8] get-tuple-element(%p), index=1",
        f"%w2 = {chip} get-tuple-element(%p), index=3",
        f"ROOT %r = {chip} fusion(%x2, %w2), kind=kCustom, calls=%done.1",
    ]
    found = count(module(lines, *fused))
    assert found.flops == 2 * 8**3
    assert found.collectives == {"all-gather": 4 * 32 * 8}
    # The shard once, a factor (once: one operand of the fusion) and the product.
    assert found.bytes == 256 + 256 + 256
    twice = [x, gather, gather.replace("%g", "ROOT %h")]
    assert count(module(twice)).collectives == {"all-gather": 2 * 4 * 32 * 8}


def test_a_slice_of_a_sum_in_a_fusion_is_a_reduce_scatter():
    inner = [
        "%x = f32[32] parameter(0)",
        "%i = s32[] constant(0)",
        "%s = f32[32] all-reduce(%x), channel_id=3, to_apply=%add.1",
        "%b = f32[32] bitcast(%s)",
        "ROOT %d = f32[8] dynamic-slice(%b, %i), dynamic_slice_sizes={8}",
    ]
    entry = ["%x = f32[32] parameter(0)"]
    entry.append("ROOT %r = f32[8] fusion(%x), kind=kCustom, calls=%scatter.1")
    found = count(module(entry, ("%scatter.1", inner)))
    assert (found.collectives, found.bytes) == ({"reduce-scatter": 128}, 128 + 32)


# -------------------------------------------------------------------------------------------- bytes

STACK, LAYER = "f32[10,4]{1,0}", "f32[1,4]{1,0}"


def fusion(*lines, operands=(STACK, "s32[]", LAYER), result=LAYER, more=()):
    """The bytes of a fusion of operands %p0, %p1, ..."""
    parameters = [f"%p{i} = {shape} parameter({i})" for i, shape in enumerate(operands)]
    called = ("%fused.1", [*parameters, "%z = s32[] constant(0)", *lines])
    names = ", ".join(f"%p{i}" for i in range(len(operands)))
    root = f"ROOT %f = {result} fusion({names}), kind=kLoop, calls=%fused.1"
    return count(module([*parameters, root], *more, called)).bytes


SLICED = f"%s = {LAYER} dynamic-slice(%p0, %p1, %z), dynamic_slice_sizes={{1,4}}"
UPDATED = f"%u = {STACK} dynamic-update-slice(%p0, %p2, %p1, %z)"


def test_of_a_stack_only_the_layer_moves():
    assert fusion(SLICED, f"ROOT %r = {LAYER} add(%s, %p2)") == 16 + 4 + 16 + 16
    assert fusion(f"ROOT {UPDATED}", result=STACK) == 4 + 16 + 16
    read_too = UPDATED.replace("%p2", "%a")
    added = f"%a = {LAYER} add(%s, %p2)"
    assert fusion(SLICED, added, f"ROOT {read_too}", result=STACK) == 16 + 4 + 16 + 16
    # Of what stays on the chip nothing but its index and the layer.
    chip = STACK.replace("}", ":S(1)}")
    cut = fusion(SLICED, f"ROOT %r = {LAYER} add(%s, %p2)", operands=(chip, "s32[]", LAYER))
    assert cut == 4 + 16 + 16
    updated = f"ROOT {UPDATED}".replace(STACK, chip)
    assert fusion(updated, operands=(chip, "s32[]", LAYER), result=chip) == 4 + 16
    # What is updated and then read elsewhere is read whole, and what is made new is written whole.
    assert fusion(UPDATED, f"ROOT %r = {STACK} negate(%u)", result=STACK) == 160 + 4 + 16 + 160
    new = ["%c = f32[] constant(0)", f"%n = {STACK} broadcast(%c), dimensions={{}}"]
    assert fusion(*new, f"ROOT {UPDATED.replace('%p0', '%n')}", result=STACK) == 4 + 16 + 160


def test_of_a_stack_only_the_layer_moves_outside_fusions():
    lines = [
        f"%p0 = {STACK} parameter(0)",
        "%p1 = s32[] parameter(1)",
        f"%p2 = {LAYER} parameter(2)",
        "%z = s32[] constant(0)",
    ]
    assert count(module([*lines, f"ROOT {SLICED}"])).bytes == 16 + 4 + 4 + 16
    assert count(module([*lines, f"ROOT {UPDATED}"])).bytes == 16 + 4 + 4 + 16
    start = f"%s = (({STACK}), {LAYER}, s32[]) slice-start(%p0), slice={{[3:4], [0:4]}}"
    assert count(module([*lines, start, f"ROOT %d = {LAYER} slice-done(%s)"])).bytes == 16 + 16


def test_a_fusion_in_a_fusion_reads_what_is_read_of_it():
    shape = f"%b = {STACK} parameter(0)"
    view = ("%view.1", [shape, f"ROOT %v = {STACK} bitcast(%b)"])
    cut = ("%cut.1", [shape, f"ROOT %v = {LAYER} slice(%b), slice={{[3:4], [0:4]}}"])
    lines = [f"%v = {STACK} fusion(%p0), kind=kLoop, calls=%view.1"]
    lines.append(f"ROOT %r = {STACK} negate(%v)")
    assert fusion(*lines, operands=[STACK], result=STACK, more=[view]) == 160 + 160
    lines = [f"%s = {LAYER} fusion(%p0), kind=kLoop, calls=%cut.1", f"ROOT %r = {LAYER} negate(%s)"]
    assert fusion(*lines, operands=[STACK], more=[cut]) == 16 + 16
    inner = [f"%p{i} = {s} parameter({i})" for i, s in enumerate((STACK, "s32[]", LAYER, "s32[]"))]
    update = ("%update.1", [*inner, "ROOT " + UPDATED.replace("%z", "%p3")])
    root = f"ROOT %f = {STACK} fusion(%p0, %p1, %p2, %z), kind=kLoop, calls=%update.1"
    assert fusion(root, result=STACK, more=[update]) == 4 + 16 + 16


def test_only_what_moves_through_the_main_memory_counts():
    lines = [
        "%x = f32[8]{0:T(128)} parameter(0)",
        "%c = f32[8] constant({1, 2, 3, 4, 5, 6, 7, 8})",
        "%t = (f32[8], f32[8]) tuple(%x, %c)",
        "%b = f32[2,4] bitcast(%c)",
        '%a = f32[8] custom-call(), custom_call_target="AllocateBuffer"',
        "%s = (f32[8]{0:T(128)S(1)}, f32[8]{0:T(128)}, u32[]{:S(2)}) copy-start(%x)",
        "%d = f32[8]{0:T(128)S(1)} copy-done(%s)",
        "ROOT %n = f32[8]{0:T(128)S(1)} negate(%d)",
    ]
    assert count(module(lines)).bytes == 32


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("pred[8]", 8),
        ("s4[8]", 4),
        ("f8e4m3fn[8]", 8),
        ("c64[8]", 64),
        ("u8[2,<=4]", 8),
        ("(bf16[2], (f32[4]), token[])", 20),
    ],
)
def test_sizes(shape, size):
    lines = [f'ROOT %r = {shape} custom-call(), custom_call_target="made"']
    assert count(module(lines)).bytes == size


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"compiled\.as_text\(\)"),
        ("module @jit_f {\n  func.func public @main() {\n  }\n}\n", r"compiled\.as_text\(\)"),
        (module(["%x = f32[] parameter(0)", "ROOT %y = f32[]"]), "ROOT %y = f32"),
    ],
)
def test_other_text_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        count(text)


# ------------------------------------------------------------------------------- the TPU's compiler


def tpu(programs):
    """What tests/tpu_programs.py finds."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    script = TESTS / "tpu_programs.py"
    libtpu = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run(
        [sys.executable, script, programs],
        capture_output=True,
        text=True,
        env=environment(PYTHONPATH=str(ROOT), **libtpu),
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("FOUND")[1])


@pytest.mark.long
def test_one_tpu_chip():
    found = tpu("one_chip")
    for name in WITHOUT_LOOPS:
        program = found[f"{name} backward"]
        # XLA's count has the conversions and copies around a convolution too.
        assert program["flops"] == pytest.approx(program["xla"], rel=0.015), name
    for name in LOOPS:
        looped, unrolled = found[f"{name} looped"], found[f"{name} unrolled"]
        assert looped["unknown_loops"] == 0
        assert looped["flops"] == pytest.approx(unrolled["flops"], rel=0.01), name
    # Two products forward and five for the gradient, of lengths with padding.
    assert found["attention"]["flops"] == 7 * 2 * (2 * 3 * 1152 * 384 * 64)
    scan = found["scan looped"]
    assert scan["whiles"] and scan["xla"] < 0.3 * scan["flops"]


@pytest.mark.long
def test_four_tpu_chips():
    found = tpu("four_chips")
    for name in ("exchange", "v4", "v5e"):
        looped, unrolled = found[f"{name} looped"], found[f"{name} unrolled"]
        assert looped["whiles"] and not unrolled["whiles"]
        assert looped["flops"] == unrolled["flops"]
        assert looped["collectives"] == unrolled["collectives"]
        assert unrolled["flops"] == pytest.approx(unrolled["xla"], rel=0.01)
    rows, width, hidden = 256, 512, 1024
    assert found["exchange looped"]["collectives"] == {
        "all-gather": 5 * 2 * width * hidden,
        "all-reduce": 5 * 2 * rows * hidden,
        "reduce-scatter": 5 * 2 * rows * width,
        "collective-permute": 5 * 2 * rows * width,
        "all-to-all": 5 * 2 * rows * width,
    }
    # Gathers in pieces, under the products of the layer before.
    assert found["v5e unrolled"]["pieces"] > 3
    layer_bytes, layer_flops = 2 * 2 * 2048**2, 2 * 2 * 8192 * 2048**2
    for name in ("v4", "v5e"):
        assert found[f"{name} looped"]["flops"] == 3 * layer_flops / 4
        assert found[f"{name} looped"]["collectives"] == {"all-gather": 3 * layer_bytes}
        (gather,) = found[f"{name} looped"]["gathers"]
        assert (gather["bytes"], gather["times"]) == (layer_bytes, 3)
        assert re.fullmatch(r"bf16\[(1,)*2,2048,2048\]", gather["shape"]), gather["shape"]
        assert "while/body" in gather["op_name"]
    # Without a constraint each device computes all rows: nothing but the FLOPs shows it.
    assert found["divided"]["flops"] == 3 * layer_flops / 4
    assert found["replicated"]["flops"] == 3 * layer_flops
    # A layer's gradient is summed over the rows of all chips, and each chip keeps its part.
    assert found["step"]["collectives"]["reduce-scatter"] == 3 * layer_bytes
    assert "all-reduce" not in found["step"]["collectives"]
    # Between two slices a chip sends its part of the sum within its own.
    assert found["slices"]["collectives"][NETWORK] == 3 * layer_bytes / 4
    assert found["slices"]["collectives"]["reduce-scatter"] == pytest.approx(
        3 * layer_bytes, rel=0.05
    )
    assert NETWORK not in found["step"]["collectives"]
