"""Which attention a GPU takes, and that no program of one holds all scores of many positions.

A machine without a GPU lowers those programs, too. What cuDNN computes is tested where one is.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo  # there is no public way to name a version
from jax.sharding import NamedSharding, PartitionSpec

from jaxdistill import partition
from jaxdistill.models import attention
from jaxdistill.models.attention import auto_attention, gpu_capability, gpu_kernel, plain_attention

AMPERE, TURING = (8, 0), (7, 5)
BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32


def rows(length, head=64, dtype=BF16, batch=1, heads=2):
    return jax.ShapeDtypeStruct((batch, length, heads, head), dtype)


@pytest.mark.parametrize(
    ("queries", "keys", "head", "dtype", "masked", "capability", "kernel"),
    [
        (4096, 4096, 40, BF16, False, AMPERE, "cudnn"),  # 1.5 at 512²
        (1024, 1024, 80, F16, False, AMPERE, "cudnn"),
        (4096, 4096, 64, BF16, False, (12, 0), "cudnn"),  # XL at 1024²
        (4608, 4608, 128, BF16, False, (9, 0), "cudnn"),  # FLUX
        (4096, 4096, 64, BF16, False, TURING, "chunked"),
        (4096, 4096, 64, BF16, False, (0, 0), "chunked"),  # a GPU that is no NVIDIA
        (4096, 4096, 64, BF16, False, None, "chunked"),  # lowered where no GPU is
        (4096, 4096, 64, F32, False, AMPERE, "chunked"),
        (4096, 4096, 512, BF16, False, (9, 0), "chunked"),  # an autoencoder's
        (4096, 4096, 160, BF16, False, AMPERE, "chunked"),
        (4096, 4096, 36, BF16, False, AMPERE, "chunked"),
        (4608, 4608, 128, BF16, True, AMPERE, "chunked"),
        (4429, 4429, 64, BF16, False, AMPERE, "chunked"),
        (4096, 77, 40, BF16, False, AMPERE, "plain"),
        (4096, 300, 72, BF16, True, AMPERE, "plain"),
        (256, 256, 160, BF16, False, AMPERE, "plain"),  # the middle of 1.5
        (1024, 1024, 80, F32, False, AMPERE, "plain"),
    ],
)
def test_cudnn_takes_what_it_can_and_chunks_take_what_is_large(
    queries, keys, head, dtype, masked, capability, kernel
):
    q, k = rows(queries, head, dtype), rows(keys, head, dtype)
    assert gpu_kernel(q, k, masked=masked, capability=capability) == kernel


@pytest.fixture
def ampere(monkeypatch):
    """The programs of a process with such a GPU."""
    monkeypatch.setattr(attention, "gpu_capability", lambda: AMPERE)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


def both(*qkv):
    """The value and the gradient."""
    squared = jax.value_and_grad(lambda *a: jnp.sum(auto_attention(*a).astype(F32) ** 2), (0, 1, 2))
    return squared(*qkv)


def lowered(f, *shapes, platform="cuda"):
    return jax.jit(f).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


def calls(text):
    return set(re.findall(r"custom_call @([\w$]+)", text))


FUSED = {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_a_gpu_never_holds_all_scores_of_many_positions(ampere, dtype, masked, remat):
    q, mask = rows(4096, dtype=dtype), jax.ShapeDtypeStruct((1, 4096), bool)
    arguments = (q, q, q, mask) if masked else (q, q, q)
    text = lowered(jax.checkpoint(both) if remat else both, *arguments)
    assert "4096x2x64" in text and "4096x4096" not in text
    assert calls(text) == (FUSED if dtype == BF16 and not masked else set())


def test_the_same_program_lowers_for_a_cpu_and_a_tpu(ampere):
    """A GPU's process exports for them, and computes on its CPU."""
    for platform in ("cpu", "tpu"):
        text = lowered(both, *[rows(1024)] * 3, platform=platform)
        assert not calls(text) and "while" in text


@pytest.mark.parametrize(("batch", "fused"), [(4, True), (3, False)])
def test_on_several_devices_each_has_its_rows(ampere, batch, fused):
    """cuDNN's kernel is not divided by XLA. Where rows do not divide the chunks are."""
    layout = partition.layout({"data": 1})
    mesh = layout.mesh.abstract_mesh.update(axis_sizes=(2, 1, 1))
    q = jax.ShapeDtypeStruct(
        (batch, 4096, 2, 64), BF16, sharding=NamedSharding(mesh, PartitionSpec())
    )

    def on_mesh(*qkv):
        with jax.sharding.use_abstract_mesh(mesh):
            return both(*qkv)

    jaxpr = str(jax.make_jaxpr(on_mesh)(q, q, q))
    assert ("shard_map" in jaxpr) == fused == ("dot_product_attention" in jaxpr)
    assert "bf16[2,4096,2,64]" in jaxpr or not fused


def test_cudnn_by_name_needs_a_gpu():
    if gpu_capability() is not None:
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="attention = 'cudnn' needs an NVIDIA GPU"):
        jax.eval_shape(attention.cudnn_attention, *[rows(64)] * 3)


@pytest.mark.gpu
@pytest.mark.parametrize(("length", "context", "head"), [(4096, 4096, 40), (1024, 256, 64)])
def test_what_a_gpu_computes_is_the_plain_attention(length, context, head):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(2, length, 2, head), (2, context, 2, head), (2, context, 2, head)]
    q, k, v = (jax.random.normal(key, s, BF16) for key, s in zip(keys, shapes, strict=True))
    assert gpu_kernel(q, k, masked=False, capability=gpu_capability()) == "cudnn"

    def values(attend, *qkv):
        squared = jax.value_and_grad(lambda *a: jnp.sum(attend(*a).astype(F32) ** 2), (0, 1, 2))
        value, gradient = jax.jit(squared)(*qkv)
        return [value, *gradient]

    exact = values(plain_attention, *(a.astype(F32) for a in (q, k, v)))
    for found, expected in zip(values(auto_attention, q, k, v), exact, strict=True):
        error = np.abs(np.asarray(found, np.float32) - expected).max() / np.abs(expected).max()
        assert error < 0.03
