"""Programs written by hand with counts made by hand, and programs of JAX against their unrolled
selves and XLA's own analysis.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdistill.costs.hlo import NETWORK, Gather, count


def module(entry, *computations):
    """The text of a module from the lines of its computations: (head, lines) and the lines of the
    entry.
    """
    parts = [
        f"{head} {{\n" + "\n".join(f"  {line}" for line in lines) + "\n}"
        for head, lines in (*computations, ("ENTRY main.1", entry))
    ]
    return "HloModule jit_f, is_scheduled=true\n\n" + "\n\n".join(parts) + "\n"


# ------------------------------------------------------------------------------- dots, convolutions

DOT = ["x = f32[8,16]{1,0} parameter(0)", "y = f32[16,32]{1,0} parameter(1)"]
TILED = "bf16[8,16]{1,0:T(8,128)(2,1)S(1)}"


@pytest.mark.parametrize(
    "lines",
    [
        [
            *DOT,
            "ROOT d = f32[8,32]{1,0} dot(x, y), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        ],
        [
            *DOT,
            (
                "ROOT d = f32[8,32]{1,0} dot(f32[8,16]{1,0} x, f32[16,32]{1,0} %y),"
                " lhs_contracting_dims={1}, rhs_contracting_dims={0}"
            ),
        ],
        [
            f"%x.1 = {TILED} parameter(0)",
            (
                '%y.1 = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(1), metadata={op_name="jit(f)/a=b,'
                ' calls=%no {"}'
            ),
            (
                "ROOT %d..2 = bf16[8,32]{1,0:T(8,128)S(1)} convolution(%x.1, %y.1),"
                ' dim_labels=bf_io->bf, backend_config={"a":[{"b":"}"}]}'
            ),
        ],
        [
            *DOT,
            (
                'ROOT d = f32[8,32] dot(x, y), frontend_attributes={a=", lhs_contracting_dims={0},'
                ' b={"}, lhs_contracting_dims={1}'
            ),
        ],
    ],
    ids=["plain", "operands with shapes", "TPU", "names in strings"],
)
def test_dot(lines):
    assert count(module(lines)).flops == 2 * 8 * 16 * 32


def test_dot_with_batch_dimensions():
    lines = ["q = f32[2,3,7,5] parameter(0)", "k = f32[2,3,11,5] parameter(1)"]
    lines.append(
        "ROOT s = f32[2,3,7,11] dot(q, k), lhs_batch_dims={0,1}, lhs_contracting_dims={3},"
        " rhs_batch_dims={0,1}, rhs_contracting_dims={3}"
    )
    assert count(module(lines)).flops == 2 * 2 * 3 * 7 * 11 * 5


def test_padding_does_no_work():
    lines = ["x = f32[2,4,4,3] parameter(0)", "w = f32[3,3,3,5] parameter(1)"]
    lines.append(
        "ROOT c = f32[2,4,4,5] convolution(x, w), window={size=3x3 pad=1_1x1_1},"
        " dim_labels=b01f_01io->b01f"
    )
    # 4 positions of 3 window elements, less one at either end.
    assert count(module(lines)).flops == 2 * 2 * 5 * 3 * 10 * 10


def test_groups_divide_the_work():
    lines = ["x = f32[2,4,4,6] parameter(0)", "w = f32[1,1,2,9] parameter(1)"]
    lines.append(
        "ROOT c = f32[2,4,4,9] convolution(x, w), window={size=1x1}, dim_labels=b01f_01io->b01f,"
        " feature_group_count=3"
    )
    assert count(module(lines)).flops == 2 * 2 * 16 * 9 * 2
    lines = ["x = f32[6,4,4,2] parameter(0)", "w = f32[1,1,2,9] parameter(1)"]
    lines.append(
        "ROOT c = f32[2,4,4,9] convolution(x, w), window={size=1x1}, dim_labels=b01f_01io->b01f,"
        " batch_group_count=3"
    )
    assert count(module(lines)).flops == 2 * 2 * 16 * 9 * 2


def test_a_batch_of_dots_written_as_a_convolution_counts_as_the_dots():
    # How the TPU's compiler writes bqd,bkd->bqk for a batch of 8: each row of the batch meets
    # itself only.
    lines = ["q = bf16[8,7,5] parameter(0)", "k = bf16[8,11,5] parameter(1)"]
    lines.append(
        "ROOT s = bf16[8,7,11] convolution(q, k), window={size=8 stride=7 lhs_dilate=8},"
        " dim_labels=0bf_0oi->0bf"
    )
    assert count(module(lines)).flops == 2 * 8 * 7 * 11 * 5
    lines = ["q = bf16[77,7,5] parameter(0)", "k = bf16[77,11,5] parameter(1)"]
    lines.append(
        "ROOT s = bf16[1,7,11] convolution(q, k), window={size=77 rhs_reversal=1},"
        " dim_labels=0bf_0oi->0bf"
    )
    assert count(module(lines)).flops == 2 * 77 * 7 * 11 * 5


WINDOW = {
    "size": st.integers(1, 5),
    "stride": st.integers(1, 4),
    "low": st.integers(-3, 6),
    "left": st.integers(1, 4),
    "right": st.integers(1, 3),
    "width": st.integers(1, 6),
    "positions": st.integers(1, 9),
}


@given(**WINDOW)
def test_a_window_meets_what_it_meets_one_by_one(size, stride, low, left, right, width, positions):
    met = [o * stride - low + k * right for k in range(size) for o in range(positions)]
    expected = sum(i % left == 0 and 0 <= i // left < width for i in met)
    window = f"size={size} stride={stride} pad={low}_0 lhs_dilate={left} rhs_dilate={right}"
    lines = [f"x = f32[1,{width},1] parameter(0)", f"w = f32[{size},1,1] parameter(1)"]
    lines.append(
        f"ROOT c = f32[1,{positions},1] convolution(x, w), window={{{window}}},"
        " dim_labels=b0f_0io->b0f"
    )
    assert count(module(lines)).flops == 2 * expected


@pytest.mark.parametrize(
    "estimate", ['"flops":"1234","transcendentals":"5"', '"bytes_accessed":"7","flops":"1234"']
)
def test_a_kernel_counts_what_it_declares(estimate):
    """In the order of its fields, as JAX prints it, or of the alphabet, as the TPU's compiler does."""
    config = (
        f'backend_config={{"custom_call_config":{{"body":"TUz","cost_estimate":{{{estimate}}}}}}}'
    )
    lines = [
        "x = f32[8] parameter(0)",
        f'ROOT k = f32[8] custom-call(x), custom_call_target="tpu_custom_call", {config}',
    ]
    assert count(module(lines)).flops == 1234


# -------------------------------------------------------------------------------------------- loops

SQUARE = "f32[4,4]{1,0}"
STATE = f"(s32[], {SQUARE})"
PRODUCT = 2 * 4 * 4 * 4


def loop(body, condition, *, start="0", more=(), config=""):
    """A module whose body makes one product of 4 x 4 matrices; `body` and `condition` are the lines
    on the counter i.
    """
    counter = [f"p = {STATE} parameter(0)", "i = s32[] get-tuple-element(p), index=0"]
    body = [
        *counter,
        f"x = {SQUARE} get-tuple-element(p), index=1",
        f"d = {SQUARE} dot(x, x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}",
        *body,
        f"ROOT t = {STATE} tuple(next, d)",
    ]
    entry = [
        f"a = {SQUARE} parameter(0)",
        f"c = s32[] constant({start})",
        f"s = {STATE} tuple(c, a)",
        f"w = {STATE} while(s), condition=condition.1, body=body.1{config}",
        f"ROOT r = {SQUARE} get-tuple-element(w), index=1",
    ]
    return module(entry, *more, ("body.1", body), ("condition.1", [*counter, *condition]))


UP = ["one = s32[] constant(1)", "next = s32[] add(i, one)"]
UNKNOWN = [
    'q = s32[] custom-call(), custom_call_target="q"',
    "ROOT m = pred[] compare(i, q), direction=LT",
]


LESS = "ROOT m = pred[] compare(i, n), direction=LT"


def compared(direction, bound, order="i, n"):
    return [
        f"n = s32[] constant({bound})",
        f"ROOT m = pred[] compare({order}), direction={direction}",
    ]


@pytest.mark.parametrize(
    "config", ['{"known_trip_count":{"n":"5"}}', r'"{\"known_trip_count\":{\"n\":\"5\"}}"']
)
def test_the_compiler_notes_the_rounds(config):
    found = count(
        loop(UP, UNKNOWN, config=f', backend_config={config}, metadata={{op_name="jit(f)/while"}}')
    )
    assert (found.flops, found.unknown_loops) == (5 * PRODUCT, 0)


@pytest.mark.parametrize(
    ("body", "condition", "start", "rounds"),
    [
        (UP, compared("LT", 7), "0", 7),
        (UP, compared("LT", 7), "3", 4),
        (UP, compared("LT", 7), "9", 0),
        (UP, compared("LE", 7), "0", 8),
        (UP, compared("NE", 7), "0", 7),
        (UP, compared("EQ", 0), "0", 1),
        (UP, compared("GT", 7, "n, i"), "0", 7),
        (UP, compared("GE", 7, "n, i"), "0", 8),
        (["two = s32[] constant(2)", "next = s32[] add(two, i)"], compared("LT", 7), "0", 4),
        (["one = s32[] constant(-1)", "next = s32[] add(i, one)"], compared("GT", 0), "6", 6),
        (["one = s32[] constant(-1)", "next = s32[] add(i, one)"], compared("NE", 0), "6", 6),
        (["two = s32[] constant(2)", "next = s32[] multiply(i, two)"], compared("LT", 64), "1", 6),
        (
            UP,
            ["a = s32[] constant(7)", "b = s32[] constant(9)", "n = s32[] minimum(b, a)", LESS],
            "0",
            7,
        ),
        (
            UP,
            ["a = s32[] constant(7)", "b = s32[] constant(9)", "n = s32[] maximum(b, a)", LESS],
            "0",
            9,
        ),
        (["one = s32[] constant(1)", "next = s32[] subtract(i, one)"], compared("GE", 0), "6", 7),
        (
            [
                "one = s32[] constant(1)",
                "j = s32[] copy(i)",
                "next = s32[] fusion(j, one), kind=kLoop, calls=add.1",
            ],
            compared("LT", 7),
            "0",
            7,
        ),
        (
            UP,
            ["n = s32[] constant(7)", "ROOT m = pred[] fusion(i, n), kind=kLoop, calls=less.1"],
            "0",
            7,
        ),
    ],
)
def test_the_rounds_follow_from_the_counter(body, condition, start, rounds):
    pair = ["a = s32[] parameter(0)", "b = s32[] parameter(1)"]
    more = (
        ("add.1", [*pair, "ROOT r = s32[] add(a, b)"]),
        ("less.1", [*pair, "ROOT r = pred[] compare(a, b), direction=LT"]),
    )
    found = count(loop(body, condition, start=start, more=more))
    assert (found.flops, found.unknown_loops) == (rounds * PRODUCT, 0)


def test_a_counter_behind_a_longer_chain_than_calls_may_nest():
    links = [f"c{i} = s32[] copy({f'c{i - 1}' if i else 'i'})" for i in range(5_000)]
    body = ["one = s32[] constant(1)", *links, "next = s32[] add(c4999, one)"]
    found = count(loop(body, compared("LT", 7)))
    assert (found.flops, found.unknown_loops) == (7 * PRODUCT, 0)


def test_the_condition_runs_once_more():
    product, addition, comparison = 3 * 64, 3 * 4, 4 + 4 + 1
    assert count(loop(UP, compared("LT", 7))).bytes == 7 * (product + addition) + 8 * comparison
    assert count(loop(UP, UNKNOWN)).bytes == product + addition + comparison + 4


@pytest.mark.parametrize(
    ("body", "condition"),
    [
        (UP, UNKNOWN),
        (UP, compared("GE", 0)),
        (['next = s32[] custom-call(i), custom_call_target="q"'], compared("LT", 7)),
    ],
    ids=["bound", "never ends", "step"],
)
def test_a_loop_of_unknown_length_counts_once(body, condition):
    found = count(loop(body, condition))
    assert (found.flops, found.unknown_loops) == (PRODUCT, 1)


def test_nested_loops_multiply():
    shape = "f32[4]{0}"
    state = f"(s32[], {shape})"

    def level(name, inside, bound, called=""):
        body = [
            f"p = {state} parameter(0)",
            "i = s32[] get-tuple-element(p), index=0",
            f"x = {shape} get-tuple-element(p), index=1",
            *UP,
        ]
        body += [*inside, f"ROOT t = {state} tuple(next, y)"]
        condition = [
            f"p = {state} parameter(0)",
            "i = s32[] get-tuple-element(p), index=0",
            *compared("LT", bound),
        ]
        return [(f"{name}.body", body), (f"{name}.condition", condition)]

    def run(name):
        start = ["zero = s32[] constant(0)", f"s = {state} tuple(zero, x)"]
        start.append(f"w = {state} while(s), condition={name}.condition, body={name}.body")
        return [*start, f"y = {shape} get-tuple-element(w), index=1"]

    gather = (
        "g = f32[16]{0} all-gather(x), channel_id=1, dimensions={0},"
        ' metadata={op_name="jit(f)/gather"}'
    )
    inner = level("inner", [gather, f"y = {shape} slice(g), slice={{[0:4]}}"], 3)
    outer = level("outer", run("inner"), 5)
    found = count(
        module(
            [f"x = {shape} parameter(0)", *run("outer"), f"ROOT r = {shape} copy(y)"],
            *inner,
            *outer,
        )
    )
    assert found.collectives == {"all-gather": 15 * 64}
    assert found.gathers == [Gather("f32[16]", "f32", 64.0, 15, "jit(f)/gather")]


def test_of_branches_the_largest_counts():
    x = "x = f32[4,4] parameter(0)"
    branches = [
        (
            "first.1",
            [x, "ROOT d = f32[4,4] dot(x, x), lhs_contracting_dims={1}, rhs_contracting_dims={0}"],
        ),
        ("second.1", [x, "ROOT r = f32[4,4] all-reduce(x), to_apply=add.1"]),
    ]
    entry = ["x = f32[4,4] parameter(0)", "i = s32[] parameter(1)"]
    for attributes in (
        "branch_computations={first.1, second.1}",
        "true_computation=first.1, false_computation=second.1",
    ):
        found = count(
            module([*entry, f"ROOT c = f32[4,4] conditional(i, x, x), {attributes}"], *branches)
        )
        assert (found.flops, found.collectives, found.bytes) == (
            PRODUCT,
            {"all-reduce": 64},
            3 * 64,
        )
        assert found.gathers == []


def test_of_branches_that_gather_the_larger_is_shown():
    x = "x = f32[4] parameter(0)"
    branches = [
        (f"{n}.1", [x, f"ROOT g = f32[{n}] all-gather(x), dimensions={{0}}"]) for n in (8, 16, 12)
    ]
    entry = [
        x,
        "i = s32[] parameter(1)",
        "ROOT c = f32[] conditional(i, x, x, x), branch_computations={8.1, 16.1, 12.1}",
    ]
    found = count(module(entry, *branches))
    assert (found.collectives, [g.shape for g in found.gathers]) == (
        {"all-gather": 64},
        ["f32[16]"],
    )


# -------------------------------------------------------------------------------------- collectives


@pytest.mark.parametrize(
    ("line", "kind", "size"),
    [
        ("r = f32[8] all-reduce(x), to_apply=add.1", "all-reduce", 32),
        ("r = (f32[8], f32[4]) all-reduce(x, y), to_apply=add.1", "all-reduce", 48),
        ("r = f32[8] all-reduce-start(x), to_apply=add.1", "all-reduce", 32),
        ("r = f32[2] reduce-scatter(x), dimensions={0}, to_apply=add.1", "reduce-scatter", 32),
        ("r = f32[32] all-gather(x), dimensions={0}", "all-gather", 128),
        (
            "r = (f32[8]{0}, f32[32]{0:T(128)S(1)}) all-gather-start(x), dimensions={0}",
            "all-gather",
            128,
        ),
        (
            "r = ((f32[8], f32[4]), (f32[32], f32[16])) all-gather-start(x, y), dimensions={0}",
            "all-gather",
            192,
        ),
        (
            "r = ((f32[8]), f32[2], u32[]) reduce-scatter-start(x), to_apply=add.1",
            "reduce-scatter",
            32,
        ),
        (
            "r = (f32[8], /*index=1*/f32[4]) all-reduce(x, /*index=1*/y), to_apply=add.1",
            "all-reduce",
            48,
        ),
        ("r = (f32[4], f32[4]) all-to-all(y, y)", "all-to-all", 32),
        ("r = f32[8] ragged-all-to-all(x, x)", "all-to-all", 32),
        (
            "r = bf16[8] collective-permute(z), source_target_pairs={{0,1},{1,0}}",
            "collective-permute",
            16,
        ),
        (
            "r = (bf16[8], bf16[8], u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(z)",
            "collective-permute",
            16,
        ),
    ],
)
def test_collectives(line, kind, size):
    lines = ["x = f32[8] parameter(0)", "y = f32[4] parameter(1)", "z = bf16[8] parameter(2)"]
    if "-start(" in line:
        lines += [line, f"ROOT d = f32[32] {kind}-done(r)"]
    else:
        lines.append(f"ROOT {line}")
    found = count(module(lines))
    assert found.collectives == {kind: size}
    assert sum(gather.bytes for gather in found.gathers) == found.collectives.get("all-gather", 0)


def test_what_a_host_sends_to_another_slice():
    host = (
        "is_host_transfer=true,"
        ' frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}'
    )
    lines = [
        "x = f32[8] parameter(0)",
        "t = token[] after-all()",
        f"s = (f32[8], u32[], token[]) send(x, t), channel_id=1, {host}",
    ]
    lines += [
        f"r = (f32[8], u32[], token[]) recv(t), channel_id=2, {host}",
        "e = token[] send-done(s), channel_id=1",
    ]
    lines += [
        "d = (f32[8], token[]) recv-done(r), channel_id=2",
        "ROOT g = f32[8] get-tuple-element(d), index=0",
    ]
    assert count(module(lines)).collectives == {NETWORK: 32}
    # To the program on the host itself nothing goes over the network.
    assert (
        count(
            module([line.replace("xla_megascale_runtime", "debug") for line in lines])
        ).collectives
        == {}
    )


def test_a_channel_used_twice_is_two_collectives_outside_fusions():
    gather = "= f32[32] all-gather(x), channel_id=1, dimensions={0}"
    assert count(
        module(["x = f32[8] parameter(0)", f"a {gather}", f"ROOT b {gather}"])
    ).collectives == {"all-gather": 256}


def test_an_asynchronous_computation_counts_once():
    inner = (
        "wrapped.1",
        ["x = f32[8] parameter(0)", "ROOT g = f32[32] all-gather(x), dimensions={0}"],
    )
    lines = [
        "x = f32[8] parameter(0)",
        "s = ((f32[8]), f32[32], u32[]) async-start(x), calls=wrapped.1",
    ]
    lines += [
        "u = ((f32[8]), f32[32], u32[]) async-update(s), calls=wrapped.1",
        "ROOT d = f32[32] async-done(u), calls=wrapped.1",
    ]
    found = count(module(lines, inner))
    assert (found.collectives, found.bytes) == ({"all-gather": 128}, 32 + 128)


def test_a_gather_in_pieces_counts_once():
    """How the TPU's compiler lays a gather under products: each piece names the whole gather, and
    hands the rest on.
    """
    gather = (
        "g = f32[32,8]{1,0:S(1)} all-gather(x), channel_id=7, dimensions={0},"
        ' frontend_attributes={chain_id="0"}'
    )
    x, whole, product = (
        "x = f32[8,8] parameter(0)",
        "w = f32[32,8]{1,0:S(1)} parameter(1)",
        "m = f32[8,8] parameter(2)",
    )
    dot = "d = f32[8,8] dot(m, m), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    pair, triple = (
        "(f32[8,8], f32[32,8]{1,0:S(1)})",
        "(f32[8,8], f32[8,8], f32[32,8]{1,0:S(1)}, f32[32,8]{1,0:S(1)})",
    )
    done = (
        "ROOT c = f32[32,8]{1,0:S(1)} custom-call(x, w, g),"
        ' custom_call_target="AsyncCollectiveDone"'
    )
    fused = [
        (
            "start.1",
            [
                x,
                gather,
                f'ROOT c = {pair} custom-call(g), custom_call_target="AsyncCollectiveStart"',
            ],
        ),
        ("piece.1", [x, whole, product, dot, gather, f"ROOT t = {triple} tuple(d, x, w, g)"]),
        ("done.1", [x, whole, gather, done]),
    ]
    lines = [x, "m = f32[8,8] parameter(1)", f"s = {pair} fusion(x), kind=kCustom, calls=start.1"]
    lines += [
        "x1 = f32[8,8] get-tuple-element(s), index=0",
        "w1 = f32[32,8]{1,0:S(1)} get-tuple-element(s), index=1",
    ]
    lines += [f"p = {triple} fusion(x1, w1, m), kind=kOutput, calls=piece.1"]
    lines += [
        "x2 = f32[8,8] get-tuple-element(p), index=1",
        "w2 = f32[32,8]{1,0:S(1)} get-tuple-element(p), index=3",
    ]
    lines += ["ROOT r = f32[32,8]{1,0:S(1)} fusion(x2, w2), kind=kCustom, calls=done.1"]
    found = count(module(lines, *fused))
    assert found.flops == 2 * 8**3
    assert found.collectives == {"all-gather": 4 * 32 * 8}
    # The shard and its gather once, and a factor (once: one operand of the fusion) and the product.
    assert (found.bytes, found.main_bytes) == (256 + 1024 + 256 + 256, 256 + 256 + 256)


def test_a_slice_of_a_sum_in_a_fusion_is_a_reduce_scatter():
    inner = [
        "x = f32[32] parameter(0)",
        "i = s32[] constant(0)",
        "s = f32[32] all-reduce(x), channel_id=3, to_apply=add.1",
    ]
    inner += [
        "b = f32[32] bitcast(s)",
        "ROOT d = f32[8] dynamic-slice(b, i), dynamic_slice_sizes={8}",
    ]
    entry = ["x = f32[32] parameter(0)", "ROOT r = f32[8] fusion(x), kind=kCustom, calls=scatter.1"]
    found = count(module(entry, ("scatter.1", inner)))
    assert (found.collectives, found.bytes) == ({"reduce-scatter": 128}, 128 + 32)


# -------------------------------------------------------------------------------------------- bytes

STACK, LAYER = "f32[10,4]{1,0}", "f32[1,4]{1,0}"


def fusion(*lines, operands=(STACK, "s32[]", LAYER), result=LAYER, more=()):
    parameters = [f"p{i} = {shape} parameter({i})" for i, shape in enumerate(operands)]
    called = ("fused.1", [*parameters, "z = s32[] constant(0)", *lines])
    names = ", ".join(f"p{i}" for i in range(len(operands)))
    return count(
        module(
            [*parameters, f"ROOT f = {result} fusion({names}), kind=kLoop, calls=fused.1"],
            *more,
            called,
        )
    ).bytes


SLICED = f"s = {LAYER} dynamic-slice(p0, p1, z), dynamic_slice_sizes={{1,4}}"
UPDATED = f"u = {STACK} dynamic-update-slice(p0, p2, p1, z)"


def test_of_a_stack_only_the_layer_moves():
    assert fusion(SLICED, f"ROOT r = {LAYER} add(s, p2)") == 16 + 4 + 16 + 16
    assert fusion("ROOT " + UPDATED, result=STACK) == 4 + 16 + 16
    both = [
        SLICED,
        f"a = {LAYER} add(s, p2)",
        f"ROOT u = {STACK} dynamic-update-slice(p0, a, p1, z)",
    ]
    assert fusion(*both, result=STACK) == 16 + 4 + 16 + 16
    # What is updated and then read elsewhere is read whole, and what is made new is written whole.
    assert fusion(UPDATED, f"ROOT r = {STACK} negate(u)", result=STACK) == 160 + 4 + 16 + 160
    new = f"n = {STACK} broadcast(c), dimensions={{}}"
    assert (
        fusion(
            "c = f32[] constant(0)",
            new,
            f"ROOT u = {STACK} dynamic-update-slice(n, p2, p1, z)",
            result=STACK,
        )
        == 4 + 16 + 160
    )


def test_of_a_stack_only_the_layer_moves_outside_fusions():
    lines = [
        f"p0 = {STACK} parameter(0)",
        "p1 = s32[] parameter(1)",
        f"p2 = {LAYER} parameter(2)",
        "z = s32[] constant(0)",
    ]
    assert count(module([*lines, "ROOT " + SLICED])).bytes == 16 + 4 + 4 + 16
    assert count(module([*lines, "ROOT " + UPDATED])).bytes == 16 + 4 + 4 + 16
    start = f"s = (({STACK}), {LAYER}, s32[]) slice-start(p0), slice={{[3:4], [0:4]}}"
    assert count(module([*lines, start, f"ROOT d = {LAYER} slice-done(s)"])).bytes == 16 + 16


def test_a_fusion_in_a_fusion_reads_what_is_read_of_it():
    shape = f"b = {STACK} parameter(0)"
    view = ("view.1", [shape, f"ROOT v = {STACK} bitcast(b)"])
    cut = ("cut.1", [shape, f"ROOT v = {LAYER} slice(b), slice={{[3:4], [0:4]}}"])
    nested = [
        f"v = {STACK} fusion(p0), kind=kLoop, calls=view.1",
        f"s = {LAYER} slice(v), slice={{[0:1], [0:4]}}",
    ]
    assert fusion(*nested, f"ROOT r = {LAYER} negate(s)", operands=[STACK], more=[view]) == 16 + 16
    assert (
        fusion(
            nested[0], f"ROOT r = {STACK} negate(v)", operands=[STACK], result=STACK, more=[view]
        )
        == 160 + 160
    )
    nested = [f"s = {LAYER} fusion(p0), kind=kLoop, calls=cut.1", f"ROOT r = {LAYER} negate(s)"]
    assert fusion(*nested, operands=[STACK], more=[cut]) == 16 + 16


def test_names_move_nothing():
    lines = [
        "x = f32[8] parameter(0)",
        "c = f32[8] constant({1, 2, 3, 4, 5, 6, 7, 8})",
        "t = (f32[8], f32[8]) tuple(x, c)",
    ]
    lines += [
        "g = f32[8] get-tuple-element(t), index=1",
        "b = f32[2,4] bitcast(g)",
        "i = u32[] partition-id()",
    ]
    lines += ['ROOT a = f32[8] custom-call(), custom_call_target="AllocateBuffer"']
    assert count(module(lines)).bytes == 0


def test_what_stays_on_the_chip_is_not_in_the_main_memory():
    lines = ["x = f32[8]{0:T(128)} parameter(0)"]
    lines += [
        "s = (f32[8]{0:T(128)S(1)}, f32[8]{0:T(128)}, u32[]{:S(2)}) copy-start(x)",
        "d = f32[8]{0:T(128)S(1)} copy-done(s)",
    ]
    lines += ["ROOT n = f32[8]{0:T(128)S(1)} negate(d)"]
    found = count(module(lines))
    assert (found.bytes, found.main_bytes) == (32 + 32 + 32 + 32, 32)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("pred[8]", 8),
        ("bf16[8]", 16),
        ("s4[8]", 4),
        ("f8e4m3fn[8]", 8),
        ("c64[8]", 64),
        ("u8[2,<=4]", 8),
        ("(s32[2], (f32[4]))", 24),
        ("token[]", 0),
    ],
)
def test_sizes(shape, size):
    lines = ["x = f32[] parameter(0)", f'ROOT r = {shape} custom-call(), custom_call_target="made"']
    assert count(module(lines)).bytes == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "module @jit_f {\n  func.func public @main() {\n  }\n}\n",
        "HloModule jit_f\n\nf.1 {\n  ROOT x = f32[] parameter(0)\n}\n",
    ],
)
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match=r"compiled.as_text\(\)"):
        count(text)


def test_a_line_that_cannot_be_read_is_named():
    with pytest.raises(ValueError, match="y = f32"):
        count(module(["x = f32[] parameter(0)", "ROOT y = f32[]"]))


# ---------------------------------------------------------------------------------- programs of JAX


def texts(function, *args):
    """The text before and after XLA's optimization for a CPU."""
    lowered = jax.jit(function).lower(*args)
    return {
        "lowered": lowered.compiler_ir(dialect="hlo").as_hlo_text(),
        "compiled": lowered.compile().as_text(),
    }


def conv(x, w, stride=1, padding="SAME", **options):
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )


def attend(q, k, v):
    return jnp.einsum("bhqk,bkhd->bqhd", jnp.einsum("bqhd,bkhd->bhqk", q, k), v)


def pulled(function, *shapes):
    """(arrays, cotangent) -> the cotangents of the arrays: no arithmetic but that of the function
    and its transpose.
    """
    out = jax.eval_shape(function, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    return lambda *a: jax.vjp(function, *a[:-1])[1](a[-1]), (*shapes, out.shape)


IMAGE, KERNEL = (2, 16, 16, 128), (3, 3, 128, 192)
LOOP_FREE = {
    "dot": (lambda a, b: a @ b, [(64, 96), (96, 32)]),
    "attention": (attend, [(2, 24, 3, 40), (2, 17, 3, 40), (2, 17, 3, 40)]),
    "convolution": (conv, [IMAGE, KERNEL]),
    "strided": (lambda x, w: conv(x, w, 2), [IMAGE, KERNEL]),
    "one-sided": (lambda x, w: conv(x, w, 2, ((0, 1), (0, 1))), [IMAGE, KERNEL]),
    "valid": (lambda x, w: conv(x, w, 1, "VALID"), [IMAGE, KERNEL]),
    "cropped": (lambda x, w: conv(x, w, 1, ((-1, 2), (3, -2))), [IMAGE, KERNEL]),
    "dilated": (lambda x, w: conv(x, w, rhs_dilation=(2, 3)), [IMAGE, KERNEL]),
    "transposed": (
        lambda x, w: conv(x, w, 1, ((2, 2), (1, 2)), lhs_dilation=(2, 2)),
        [IMAGE, KERNEL],
    ),
    "grouped": (lambda x, w: conv(x, w, feature_group_count=4), [IMAGE, (3, 3, 32, 192)]),
}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", LOOP_FREE)
def test_flops_are_those_of_xla_where_there_is_no_loop(name, backward):
    function, shapes = LOOP_FREE[name]
    if backward:
        function, shapes = pulled(function, *shapes)
    lowered = jax.jit(function).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    found = count(lowered.compiler_ir(dialect="hlo").as_hlo_text()).flops
    np.testing.assert_allclose(found, lowered.cost_analysis()["flops"], rtol=1e-6)
    compiled = lowered.compile()
    np.testing.assert_allclose(
        count(compiled.as_text()).flops, compiled.cost_analysis()["flops"], rtol=1e-6
    )


def test_bytes_are_those_of_xla_where_there_is_no_loop():
    def f(x, w):
        return jax.grad(lambda w: jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w.T) ** 2))(w)

    compiled = jax.jit(f).lower(jnp.ones((64, 128)), jnp.ones((128, 96))).compile()
    np.testing.assert_allclose(
        count(compiled.as_text()).bytes, compiled.cost_analysis()["bytes accessed"], rtol=0.01
    )


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
    looped, unrolled = (texts(f, *arrays) for f in LOOPS[name])
    assert " while(" in looped["compiled"]
    assert " while(" not in unrolled["compiled"]
    expected = count(unrolled["lowered"]).flops
    for text in looped.values():
        found = count(text)
        assert (found.flops, found.unknown_loops) == (expected, 0)
    # What XLA says: the bodies once.
    assert jax.jit(LOOPS[name][0]).lower(*arrays).cost_analysis()["flops"] < 0.7 * expected


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
    found = [count(texts(f, *arrays)["compiled"]).bytes for f in (scanned, unrolled)]
    np.testing.assert_allclose(found[0] / found[1], 1.0, atol=0.4)
    # Ten arrays of one layer's size a round; the stack is 40.
    assert max(found) < 12 * 40 * 4 * 128**2


def test_a_loop_that_data_end_counts_once():
    def f(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 100.0, lambda x: layer(x, w), x)

    for text in texts(f, jnp.ones((8, 16)), jnp.ones((16, 16))).values():
        assert (count(text).flops, count(text).unknown_loops) == (2 * 8 * 16 * 16, 1)


def test_the_largest_branch_of_a_switch_counts():
    def f(i, x, w):
        return jax.lax.switch(i, [lambda: x, lambda: layer(x, w), lambda: layer(layer(x, w), w)])

    for text in texts(f, jnp.int32(1), jnp.ones((8, 16)), jnp.ones((16, 16))).values():
        assert count(text).flops == 2 * 2 * 8 * 16 * 16


# ------------------------------------------------------------------------------- the TPU's compiler

TPU = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
sys.path[:0] = [{tests!r}, {root!r}]
from test_hlo import LOOPS, LOOP_FREE, both, layer, pulled
from jaxdistill.costs.hlo import count

V4 = dict(topology_name="v4:2x2x1", chip_config_name="megacore", chips_per_host_bounds=(2, 2, 1))
v4, v5 = (topologies.get_topology_desc(platform="tpu", **t).devices for t in (V4, dict(topology_name="v5e:2x2")))
found = {{}}

def write(name, function, mesh, *args):
    shaped = [jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, spec)) for s, d, spec in args]
    compiled = jax.jit(function).lower(*shaped).compile()
    text = compiled.as_text()
    counts = count(text)
    found[name] = dict(counts._asdict(), gathers=[g._asdict() for g in counts.gathers], xla=compiled.cost_analysis()["flops"])
    found[name]["pieces"], found[name]["whiles"] = text.count(" all-gather("), text.count(" while(")

{programs}
print("FOUND" + json.dumps(found))
"""

ONE_CHIP = """
chip = Mesh(np.array(v4[:1]), ("x",))
for name, (function, shapes) in LOOP_FREE.items():
    for kind, (f, s) in dict(forward=(function, shapes), backward=pulled(function, *shapes)).items():
        write(f"{name} {kind}", f, chip, *((shape, jnp.bfloat16, P()) for shape in s))
for name, pair in LOOPS.items():
    for kind, f in zip(("looped", "unrolled"), pair):
        write(f"{name} {kind}", f, chip, ((64, 128), jnp.float32, P()), ((5, 128, 128), jnp.float32, P()))
"""

FOUR_CHIPS = """
from jax import shard_map

def exchange(x, w):
    whole = jax.lax.all_gather(w, "i", tiled=True)
    y = jnp.tanh(x @ whole)
    y = y + jax.lax.psum(y, "i")
    z = jax.lax.psum_scatter(y @ whole.T, "i", tiled=True)
    z = jax.lax.ppermute(jnp.concatenate([z] * 4), "i", [(k, (k + 1) % 4) for k in range(4)])
    return jax.lax.all_to_all(z.reshape(4, -1, z.shape[1]), "i", 0, 0).reshape(z.shape)

mesh = Mesh(np.array(v4), ("i",))
for kind, f in zip(("looped", "unrolled"), both(exchange, 5)):
    f = shard_map(f, mesh=mesh, in_specs=(P("i"), P(None, "i")), out_specs=P("i"), check_vma=False)
    write(f"exchange {kind}", f, mesh, ((1024, 512), jnp.bfloat16, P("i")), ((5, 512, 1024), jnp.bfloat16, P(None, "i")))

for name, devices in (("v4", v4), ("v5e", v5)):
    mesh = Mesh(np.array(devices), ("fsdp",))

    def body(x, w):
        w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
        return jax.lax.with_sharding_constraint(x + layer(x, w[0]) @ w[1], NamedSharding(mesh, P("fsdp")))

    args = ((8192, 2048), jnp.bfloat16, P("fsdp")), ((3, 2, 2048, 2048), jnp.bfloat16, P(None, None, "fsdp"))
    for kind, f in zip(("looped", "unrolled"), both(body, 3)):
        write(f"{name} {kind}", f, mesh, *args)

mesh = Mesh(np.array(v4), ("fsdp",))

def loss(x, ws):
    return jnp.sum(both(body, 3)[0](x, ws).astype(jnp.float32) ** 2)

def step(x, ws):
    gradient = jax.grad(loss, 1)(x, ws)
    return ws - jax.lax.with_sharding_constraint(gradient, NamedSharding(mesh, P(None, None, "fsdp")))

write("step", step, mesh, *args)

two = topologies.get_topology_desc(platform="tpu", num_slices=2, **V4).devices
mesh = Mesh(np.array(sorted(two, key=lambda d: (d.slice_index, d.id))).reshape(2, 4), ("data", "fsdp"))

def summed(x, ws):
    gradient = jax.grad(loss, 1)(x, ws)
    return ws - jax.lax.with_sharding_constraint(gradient, NamedSharding(mesh, P(None, None, "fsdp")))

def body(x, w):
    w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
    return jax.lax.with_sharding_constraint(x + layer(x, w[0]) @ w[1], NamedSharding(mesh, P(("data", "fsdp"))))

write("slices", summed, mesh, (*args[0][:2], P(("data", "fsdp"))), args[1])
"""


def tpu(programs):
    """Counts of programs that the TPU's compiler makes, in a process of its own: the library is
    loaded once a process.
    """
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    tests = Path(__file__).parent
    script = TPU.format(tests=str(tests), root=str(tests.parent), programs=programs)
    environment = os.environ | {
        "TPU_SKIP_MDS_QUERY": "1",
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("FOUND")[1])


@pytest.mark.slow
def test_one_tpu_chip():
    found = tpu(ONE_CHIP)
    for name in LOOP_FREE:
        for kind in ("forward", "backward"):
            program = found[f"{name} {kind}"]
            # XLA's count has the conversions and copies around a convolution too.
            np.testing.assert_allclose(
                program["flops"], program["xla"], rtol=0.015, err_msg=f"{name} {kind}"
            )
    for name in LOOPS:
        looped, unrolled = found[f"{name} looped"], found[f"{name} unrolled"]
        assert looped["unknown_loops"] == 0
        np.testing.assert_allclose(looped["flops"], unrolled["flops"], rtol=0.01, err_msg=name)
        assert looped["main_bytes"] <= looped["bytes"]
    assert (
        found["scan looped"]["whiles"]
        and found["scan looped"]["xla"] < 0.3 * found["scan looped"]["flops"]
    )


@pytest.mark.long
def test_four_tpu_chips():
    found = tpu(FOUR_CHIPS)
    for name in ("exchange", "v4", "v5e"):
        looped, unrolled = found[f"{name} looped"], found[f"{name} unrolled"]
        assert looped["whiles"] and not unrolled["whiles"]
        assert looped["flops"] == unrolled["flops"]
        assert looped["collectives"] == unrolled["collectives"]
        np.testing.assert_allclose(unrolled["flops"], unrolled["xla"], rtol=0.01)
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
    layer_bytes = 2 * 2 * 2048**2
    for name in ("v4", "v5e"):
        assert found[f"{name} looped"]["collectives"] == {"all-gather": 3 * layer_bytes}
        (gather,) = found[f"{name} looped"]["gathers"]
        assert (gather["dtype"], gather["bytes"], gather["times"]) == ("bf16", layer_bytes, 3)
        assert (
            math.prod(map(int, gather["shape"][5:-1].split(","))) * 2 == layer_bytes
            and "while/body" in gather["op_name"]
        )
    # A layer's gradient is summed over the rows of all chips, and each chip keeps its part.
    assert found["step"]["collectives"]["reduce-scatter"] == 3 * layer_bytes
    assert "all-reduce" not in found["step"]["collectives"]
    # Between two slices a chip sends its part of the sum within its own.
    assert found["slices"]["collectives"][NETWORK] == 3 * layer_bytes / 4
    assert found["slices"]["collectives"]["reduce-scatter"] == pytest.approx(
        3 * layer_bytes, rel=0.05
    )
    assert NETWORK not in found["step"]["collectives"]
