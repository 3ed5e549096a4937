"""Kernels of attention: one function each, chosen by name."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

AttentionFn = Callable[..., Array]
"""(q [b, l, h, d], k [b, m, h, d], v [b, m, h, d], mask) -> [b, l, h, d]: softmax(q kᵀ/√d) v.

mask: bool [b, m], False at keys that nobody sees; None, the default, shows all. Each row must show
at least one.
"""

HIDDEN = -0.7 * float(np.finfo(np.float32).max)
"""The score of a hidden key: twice that is still finite."""

LANES = 128
"""Of a TPU's vectors: what its kernels tile lengths by."""

FEW = 2**16
"""Scores of a head up to which XLA's own attention is as good as any."""
FEW_ON_GPU = 2**21
"""The same on a GPU that has no fused kernel for them: 4,096 queries and 512 keys."""


def plain_attention(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """XLA's own: all scores at once."""
    return jax.nn.dot_product_attention(q, k, v, mask=_seen(mask))


def _seen(mask: Array | None) -> Array | None:
    return None if mask is None else mask[:, None, None, :]


def _scaled(q: Array) -> Array:
    """q/√d: in bf16 the factor itself would be rounded, for all scores alike."""
    return (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)


def _padded(a: Array, length: int, axis: int) -> Array:
    """Zeros behind, up to `length`."""
    pads = [(0, 0)] * a.ndim
    pads[axis] = (0, length - a.shape[axis])
    return jnp.pad(a, pads)


def _parts(length: int, most: int) -> tuple[int, int]:
    """(number, size) of the fewest equal parts, at most `most` long, that hold a length."""
    number = -(-length // most)
    return number, -(-length // number)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend_in_rows(q: Array, k: Array, v: Array, mask: Array | None, size: int) -> Array:
    """One head, `size` queries at a time: q [l, d], k and v [m, d], mask [m] -> [l, d]."""
    return _rows_forward(q, k, v, mask, size)[0]


def _scores(q: Array, k: Array, mask: Array | None) -> Array:
    scores = jnp.dot(_scaled(q), k.T, preferred_element_type=jnp.float32)
    return scores if mask is None else jnp.where(mask, scores, HIDDEN)


def _rows_forward(q: Array, k: Array, v: Array, mask: Array | None, size: int) -> tuple[Array, Any]:
    """The result, and what the gradient needs: all arguments, the result and the logarithm of each
    query's sum [l].
    """
    length, d = q.shape

    def rows(part: Array) -> tuple[Array, Array]:
        scores = _scores(part, k, mask)
        highest = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = weights.sum(axis=-1, keepdims=True)
        return ((weights.astype(v.dtype) @ v) / total).astype(q.dtype), (highest + jnp.log(total))[
            :, 0
        ]

    out, log_sum = jax.lax.map(rows, q.reshape(length // size, size, d))
    out = out.reshape(length, d)
    return out, (q, k, v, mask, out, log_sum.reshape(length))


def _rows_backward(size: int, kept: Any, cotangent: Array) -> tuple[Array, Array, Array, None]:
    """The gradients (Dao et al. 2022, app. B.4): the weights again from log_sum, without looking
    for the highest score or the sum.
    """
    q, k, v, mask, out, log_sum = kept
    length, d = q.shape
    own = jnp.sum((cotangent * out).astype(jnp.float32), axis=-1)

    def rows(
        carry: tuple[Array, Array], part: tuple[Array, ...]
    ) -> tuple[tuple[Array, Array], Array]:
        q, g, log_sum, own = part
        weights = jnp.exp(_scores(q, k, mask) - log_sum[:, None])
        into = weights * (jnp.dot(g, v.T, preferred_element_type=jnp.float32) - own[:, None])
        weights, into = weights.astype(v.dtype), into.astype(q.dtype)
        # k's and v's gradients transposed, [d, m]: a product that transposes its large factor takes
        # XLA's CPU backend six times as long.
        to_k, to_v = (
            jnp.dot(a.T, b, preferred_element_type=jnp.float32)
            for a, b in ((q, into), (g, weights))
        )
        return (carry[0] + to_k, carry[1] + to_v), into @ k

    zeros = jnp.zeros(k.T.shape, jnp.float32)
    blocks = tuple(
        a.reshape(length // size, size, *a.shape[1:]) for a in (q, cotangent, log_sum, own)
    )
    (to_k, to_v), to_q = jax.lax.scan(rows, (zeros, zeros), blocks)
    scale = d**-0.5
    to_q = scale * to_q.reshape(length, d)
    return to_q, (scale * to_k.T).astype(k.dtype), to_v.T.astype(v.dtype), None


_attend_in_rows.defvjp(_rows_forward, _rows_backward)


def looped_attention(
    q: Array, k: Array, v: Array, mask: Array | None = None, *, scores: int = 2**23
) -> Array:
    """One head and a chunk of queries after the other, at most `scores` numbers at a time; they are
    computed again for the gradient.

    On CPU ten times faster than XLA's own for 4,096 positions, and its memory does not grow with
    their square. It has no forward-mode derivative.
    """
    b, length, h, d = q.shape
    number, size = _parts(length, max(1, scores // k.shape[1]))
    q = _padded(q, number * size, axis=1)
    heads = [jnp.moveaxis(a, 2, 1).reshape(b * h, a.shape[1], d) for a in (q, k, v)]
    hidden = None if mask is None else jnp.repeat(mask, h, axis=0)
    out = jax.lax.map(lambda head: _attend_in_rows(*head, size), (*heads, hidden))
    return jnp.moveaxis(out.reshape(b, h, -1, d)[:, :, :length], 1, 2)


def auto_attention(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """For many positions `looped_attention` on a CPU and what `gpu_kernel` names on an NVIDIA GPU;
    XLA's own elsewhere.
    """
    if q.shape[1] * k.shape[1] < FEW:
        return plain_attention(q, k, v, mask)
    capability = gpu_capability()
    # Where a gradient is taken each branch gives what all of them keep for it, as zeros. So a
    # program of a GPU has no branch that keeps all scores.
    return jax.lax.platform_dependent(
        q,
        k,
        v,
        mask,
        cpu=looped_attention,
        cuda=ATTENTION[gpu_kernel(q, k, masked=mask is not None, capability=capability)],
        default=plain_attention if capability is None else chunked_attention,
    )


def gpu_capability() -> tuple[int, int] | None:
    """Compute capability of this process's GPU, (0, 0) of one that is no NVIDIA; None without."""
    if jax.default_backend() != "gpu":
        return None
    text = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    major, _, minor = text.partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)


def gpu_kernel(q: Any, k: Any, *, masked: bool, capability: tuple[int, int] | None) -> str:
    """Of ATTENTION for arrays (or their shapes) on a GPU: cuDNN's where it takes them; else
    "plain" where the scores are few, "chunked" where they are many.

    cuDNN takes bfloat16 and float16, heads of whole eights up to 128, from Ampere on. JAX gives it
    a mask as one number a score, which must not be held, and up to 0.10.2 no odd length where a
    gradient is taken.
    """
    lengths = q.shape[1], k.shape[1]
    head, even = q.shape[3], not any(length % 2 for length in lengths)
    fits = q.dtype in (jnp.bfloat16, jnp.float16) and head <= 128 and head % 8 == 0 and even
    if fits and not masked and capability is not None and capability >= (8, 0):
        return "cudnn"
    return "plain" if math.prod(lengths) <= FEW_ON_GPU else "chunked"


def _fused_attention(q: Array, k: Array, v: Array, mask: None) -> Array:
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def cudnn_attention(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """CuDNN's fused kernel, and what `gpu_kernel` names for what it does not take.

    Raises ValueError where the process has no GPU: JAX asks it while the program is traced.
    """
    capability = gpu_capability()
    if capability is None:
        raise ValueError(
            "attention = 'cudnn' needs an NVIDIA GPU, and JAX has none here; take auto"
        )
    name = gpu_kernel(q, k, masked=mask is not None, capability=capability)
    if name != "cudnn":
        return ATTENTION[name](q, k, v, mask)
    mesh = dict(jax.sharding.get_abstract_mesh().shape)
    heads = mesh.pop("tensor", 1)
    if q.shape[0] % math.prod(mesh.values()) or q.shape[2] % heads:  # a part for each device
        return chunked_attention(q, k, v, mask)
    return _on_mesh(_fused_attention)(q, k, v, None)


def _on_mesh(attend: Callable[..., Array]) -> Callable[..., Array]:
    """A kernel on each device's part, where the program has a mesh: XLA cannot divide one. Rows by
    the batch's axes, heads by "tensor".
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return attend
    rows = tuple(name for name in mesh.axis_names if name != "tensor")
    heads = "tensor" if "tensor" in mesh.axis_names else None
    spec = jax.sharding.PartitionSpec(rows, None, heads)

    def divided(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        of_mask = None if mask is None else jax.sharding.PartitionSpec(rows)
        return jax.shard_map(
            attend, in_specs=(spec, spec, spec, of_mask), out_specs=spec, check_vma=False
        )(q, k, v, mask)

    return divided


def _tiles(length: int) -> tuple[int, int, int]:
    """(the length with padding, its block, the block of partial gradients): of the blocks whose
    scores fit on the chip the one that pads least, and the largest of those.
    """
    blocks = range(4 * LANES, LANES, -LANES) if length > 2 * LANES else (LANES,)
    block = min(blocks, key=lambda block: -(-length // block) * block)
    number = -(-length // block)
    wide = max(n for n in range(1, 12 * LANES // block + 1) if number % n == 0)
    return number * block, block, wide * block


def _tiled_attention(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """The TPU kernel on one device: any lengths, with zeros behind them that nobody sees."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    (b, length, h, _), keys = q.shape, k.shape[1]
    (rows, block, _), (columns, block_k, wide) = _tiles(length), _tiles(keys)
    segments = None
    if mask is not None or columns > keys:
        seen = jnp.ones((b, keys), bool) if mask is None else mask
        ids = _padded(seen, columns, axis=1).astype(jnp.int32)
        segments = splash.SegmentIds(jnp.ones((b, rows), jnp.int32), ids)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block_k,
        block_q_dkv=block,
        block_kv_dkv=wide,
        block_kv_dkv_compute=block_k,
        use_fused_bwd_kernel=True,
    )
    attend = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.FullMask((rows, columns))] * h), block_sizes=sizes
    )
    heads = [
        _padded(jnp.swapaxes(a, 1, 2), n, axis=2)
        for a, n in ((_scaled(q), rows), (k, columns), (v, columns))
    ]
    out = jax.vmap(attend)(*heads, segments)
    return jnp.swapaxes(out[:, :, :length], 1, 2)


def flash_attention(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """The TPU flash kernel; XLA's own for fewer than 128 queries or keys, and `chunked_attention`
    for heads that it does not take: wider than 128 and no multiple of it.

    On several devices it must run within a mesh (`jax.sharding.use_abstract_mesh`).
    """
    if min(q.shape[1], k.shape[1]) < LANES:
        return plain_attention(q, k, v, mask)
    if q.shape[3] > LANES and q.shape[3] % LANES:
        return chunked_attention(q, k, v, mask)
    return _on_mesh(_tiled_attention)(q, k, v, mask)


def chunked_attention(
    q: Array, k: Array, v: Array, mask: Array | None = None, *, queries: int = 512
) -> Array:
    """All heads, at most `queries` positions at a time; the scores are computed again for the
    gradient.

    Where no fused kernel takes the arrays: memory grows with the length, not with its square.
    """
    b, length, h, d = q.shape
    if length <= queries:
        return plain_attention(q, k, v, mask)
    number, size = _parts(length, queries)
    size = -(-size // 8) * 8  # a TPU's tiles have eight rows
    parts = jnp.moveaxis(_padded(q, number * size, axis=1).reshape(b, number, size, h, d), 1, 0)
    rows = jax.checkpoint(lambda part: plain_attention(part, k, v, mask))
    return jnp.moveaxis(jax.lax.map(rows, parts), 0, 1).reshape(b, -1, h, d)[:, :length]


ATTENTION: dict[str, AttentionFn] = {
    "auto": auto_attention,
    "plain": plain_attention,
    "looped": looped_attention,
    "chunked": chunked_attention,
    "flash": flash_attention,
    "cudnn": cudnn_attention,
}
