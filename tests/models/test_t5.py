"""T5's encoder is transformers'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.interop import torch_weights
from jaxdistill.models.text.t5 import T5Encoder, distance_buckets

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "v1.1": {"d_model": 24, "num_heads": 3, "d_kv": 8, "num_layers": 3},
    "relu": {"d_model": 16, "num_heads": 2, "d_kv": 12, "num_layers": 1, "proj": "relu"},
    "gelu": {"d_model": 16, "num_heads": 4, "d_kv": 4, "num_layers": 2, "proj": "gelu"},
    "silu": {"d_model": 20, "num_heads": 5, "d_kv": 6, "num_layers": 2, "proj": "gated-silu"},
    "few": {"d_model": 12, "num_heads": 2, "d_kv": 6, "num_layers": 2, "buckets": 8, "far": 20},
}


def stock(*, d_model, num_heads, d_kv, num_layers, proj="gated-gelu", buckets=32, far=128, d_ff=40):
    """A T5EncoderModel in which norms and biases matter."""
    config = transformers.T5Config(
        vocab_size=50,
        d_model=d_model,
        num_heads=num_heads,
        d_kv=d_kv,
        d_ff=d_ff,
        num_layers=num_layers,
        feed_forward_proj=proj,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=far,
        is_encoder_decoder=False,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, value in model.named_parameters():
        if "relative" in name or "layer_norm" in name:
            noise = torch.randn(value.shape, generator=generator)
            value.data = noise if "relative" in name else 1 + 0.2 * noise
    return model


def ours(model, **options):
    """The module of a stock model's config."""
    c = model.config
    return T5Encoder(
        c.vocab_size,
        c.d_model,
        c.d_ff,
        c.num_layers,
        c.num_heads,
        c.d_kv,
        activation=c.dense_act_fn,
        gated=c.is_gated_act,
        buckets=c.relative_attention_num_buckets,
        distance=c.relative_attention_max_distance,
        **options,
    )


def params_of(model, module):
    """Its parameters in the module's tree, each tensor once."""
    state = {k: v.float().numpy() for k, v in model.state_dict().items() if "embed_tokens" not in k}
    abstract = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    return torch_weights.load(torch_weights.Arrays(state), abstract, where="the stock model")


def batch(model, length=40):
    rng = np.random.default_rng(2)
    ids = rng.integers(0, model.config.vocab_size, (3, length)).astype(np.int32)
    mask = np.arange(length) < np.array([[1], [length // 2], [length]])
    return jnp.asarray(ids), jnp.asarray(mask)


def reference(model, ids, mask=None):
    with torch.no_grad():
        given = None if mask is None else torch.tensor(np.asarray(mask)).long()
        return model(torch.tensor(np.asarray(ids)).long(), attention_mask=given)[0].float().numpy()


def error(a, b):
    return np.abs(np.asarray(a, np.float32) - b).max() / np.abs(b).max()


@pytest.mark.parametrize(("buckets", "far"), [(32, 128), (8, 20), (64, 1000), (16, 16)])
def test_buckets_are_transformers(buckets, far):
    from transformers.models.t5.modeling_t5 import T5Attention

    place = torch.arange(600)
    expected = T5Attention._relative_position_bucket(
        place[None] - place[:, None], True, buckets, far
    )
    np.testing.assert_array_equal(distance_buckets(600, buckets, far), expected.numpy())


@pytest.mark.costly
@pytest.mark.parametrize("name", SIZES)
def test_states_are_transformers_with_and_without_a_mask(name):
    model = stock(**SIZES[name])
    module, (ids, mask) = ours(model), batch(model)
    params = params_of(model, module)
    plain, masked = reference(model, ids), reference(model, ids, mask)
    assert error(module.apply(params, ids), plain) < 1e-5
    assert error(module.apply(params, ids, mask), masked) < 1e-5
    assert error(plain, masked) > 0.05  # the mask matters


def test_a_loop_over_the_blocks_is_the_blocks_in_a_row():
    model = stock(**SIZES["v1.1"])
    row, loop = ours(model), ours(model, scan=True)
    params, stacked, given = params_of(model, row), params_of(model, loop), batch(model)
    assert "encoder.block.0:3" in stacked["params"]
    np.testing.assert_allclose(loop.apply(stacked, *given), row.apply(params, *given), atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_near_and_does_not_overflow(dtype):
    model = stock(**SIZES["v1.1"])
    for name, value in model.named_parameters():
        if name.endswith("wo.weight"):
            value.data *= 1e5  # the sum over the MLP's width is beyond float16, as XXL's is
    module, (ids, mask) = ours(model, dtype=dtype), batch(model)
    wide = reference(model, ids, mask)
    assert error(module.apply(params_of(model, module), ids, mask), wide) < 0.05


@pytest.mark.long
def test_one_block_at_the_width_of_xxl():
    model = stock(d_model=4096, num_heads=64, d_kv=64, num_layers=1, d_ff=10240)
    ids, _ = batch(model, 12)
    params, wide = params_of(model, ours(model)), reference(model, ids)
    for dtype, bound in ((jnp.float32, 1e-4), (jnp.bfloat16, 0.03)):
        assert error(ours(model, dtype=dtype).apply(params, ids), wide) < bound
