"""FLOPs of a function as it is written, counted from its jaxpr: nothing is compiled or run.

XLA's own count before compiling (`lowered.cost_analysis()`) has the body of a loop once, so that a
`lax.scan` of N steps counts as one; here it counts N times.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr


def flops_of(function: Callable[..., Any], *arguments: Any) -> float:
    """Sum over matrix products [m, k] x [k, n] of 2 m k n, and over convolutions of 2 for each
    multiply-add of kernel and input (none on padding, none between dilated elements).

    Nothing else counts. On all devices together, as a function of global arrays is written.

    A scan counts its body `length` times, rematerialization what it computes again, a conditional
    its largest branch, `shard_map` each device, and a Pallas kernel the `cost_estimate` that it
    declares, else its body times its grid. What no result needs does not count.

    `arguments` are trees of arrays or of ShapeDtypeStructs.

    Raises ValueError for products in a `while` loop, or in a kernel with a grid, whose rounds data
    decide.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    used, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return float(_flops(used, {}))


def _flops(jaxpr: Jaxpr, counted: dict[Jaxpr, int]) -> int:
    """`counted` has the jaxprs that are counted already: JAX shares those of equal calls."""
    if jaxpr not in counted:
        counted[jaxpr] = sum(_flops_of_equation(equation, counted) for equation in jaxpr.eqns)
    return counted[jaxpr]


def _flops_of_equation(equation: JaxprEqn, counted: dict[Jaxpr, int]) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left, result = _shape(equation.invars[0]), _shape(equation.outvars[0])
        return 2 * math.prod(result) * math.prod(left[i] for i in contracted)
    if name == "conv_general_dilated":
        return _convolution(equation)
    if name == "pallas_call" and params["cost_estimate"] is not None:
        return int(params["cost_estimate"].flops)
    inside = [_flops(jaxpr, counted) for jaxpr in jaxprs_in_params(params)]
    if not any(inside):
        return 0
    if name == "cond":
        return max(inside)
    if name == "while":
        raise ValueError(
            f"a while loop with {sum(inside)} FLOPs per round cannot be counted: data decide how"
            " often it runs; use jax.lax.scan, or fori_loop with a fixed number of rounds"
        )
    return sum(inside) * _times(name, params)


def _times(name: str, params: dict[str, Any]) -> int:
    """How often the jaxprs of an equation run."""
    if name == "scan":
        return int(params["length"])
    if name == "shard_map":
        axes = params["newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"]
        return math.prod(params["mesh"].shape[axis] for axis in axes)  # jax 0.10.0: the second
    if name == "pallas_call":
        grid = params["grid_mapping"].grid
        if not all(isinstance(size, int) for size in grid):
            raise ValueError(f"a kernel with the grid {grid} cannot be counted without an estimate")
        return math.prod(grid)
    return 1  # jit, remat, custom derivatives and their like


def _shape(variable: Any) -> tuple[int, ...]:
    return tuple(variable.aval.shape)


def _convolution(equation: JaxprEqn) -> int:
    """2 for each output feature, batch row, kernel input feature (of one group) and valid pair of
    window and output position.
    """
    left, kernel, result = map(_shape, (*equation.invars, *equation.outvars))
    params = equation.params
    axes = params["dimension_numbers"]
    batch, features, *out_axes = axes.out_spec
    flops = 2 * result[batch] * result[features] * kernel[axes.rhs_spec[1]]
    windows = zip(
        axes.rhs_spec[2:],
        out_axes,
        axes.lhs_spec[2:],
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        strict=True,
    )
    for k, o, i, stride, (low, _), left_step, kernel_step in windows:
        flops *= valid_pairs(kernel[k], result[o], left[i], stride, low, left_step, kernel_step)
    return flops


def valid_pairs(
    size: int,
    positions: int,
    left_size: int,
    stride: int,
    low: int,
    left_step: int,
    kernel_step: int,
) -> int:
    """Pairs (k < size, o < positions) that meet an input element, along one dimension: those where
    o stride - low + k kernel_step is left_step times an index below left_size.
    """
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
