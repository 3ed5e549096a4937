"""Our MMDiT is diffusers' SD3Transformer2DModel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.interop import torch_weights
from jaxdistill.methods.recipe import adamw
from jaxdistill.models.transformers.layers import taps
from jaxdistill.models.transformers.mmdit import MMDiT

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

CONFIGS = {
    "medium3": {"layers": 3},
    "medium35": {"layers": 4, "dual": (0, 1), "qk_norm": True, "heads": 2, "positions": 11},
    "large35": {"layers": 2, "qk_norm": True, "head_dim": 12, "sample_size": 9},
    "odd": {"layers": 4, "dual": (1, 3), "patch": 1, "channels": 4, "heads": 1, "positions": 9},
}


def stock(
    *,
    layers,
    heads=3,
    head_dim=8,
    patch=2,
    channels=6,
    positions=8,
    sample_size=12,
    dual=(),
    qk_norm=False,
    text=20,
    pooled=10,
):
    """A network in which gates, norms and biases matter."""
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=sample_size,
        patch_size=patch,
        in_channels=channels,
        out_channels=channels,
        num_layers=layers,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=text,
        caption_projection_dim=heads * head_dim,
        pooled_projection_dim=pooled,
        pos_embed_max_size=positions,
        dual_attention_layers=dual,
        qk_norm="rms_norm" if qk_norm else None,
    ).eval()
    generator = torch.Generator().manual_seed(1)
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim > 1:
            boost = 1.5 if ".linear." in name or "time_text" in name else 1.0
            value.data = noise * boost / value[0].numel() ** 0.5
        else:
            value.data = (
                1 + 0.2 * noise if ".norm_" in name and "linear" not in name else 0.3 * noise
            )
    return model


def ours(model, **options):
    """The module of a stock network's config."""
    c = model.config
    return MMDiT(
        c.in_channels,
        c.out_channels,
        c.patch_size,
        c.num_layers,
        c.num_attention_heads,
        c.attention_head_dim,
        c.pos_embed_max_size,
        c.sample_size,
        tuple(c.dual_attention_layers),
        c.qk_norm is not None,
        c.joint_attention_dim,
        c.pooled_projection_dim,
        **options,
    )


def params_of(model, module):
    """Its tensors in the module's tree, each once."""
    abstract = jax.eval_shape(module.init, jax.random.key(0), *module.example())
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    return torch_weights.load(torch_weights.Arrays(tensors), abstract, where="the stock network")


def batch(model, size=(5, 7), rows=2, copies=1):
    rng = np.random.default_rng(3)
    c = model.config
    side = [n * c.patch_size for n in size]

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    x, t = draw(rows, *side, c.in_channels), jnp.array([937.5, 20.25])[:rows]
    context = draw(rows * copies, 9, c.joint_attention_dim)
    return x, t, {"context": context, "pooled": draw(rows * copies, c.pooled_projection_dim)}


def reference(model, x, t, cond):
    """Of diffusers, as NHWC; x and t have the rows of cond."""
    copies = len(cond["context"]) // len(x)
    given = [np.repeat(np.asarray(a), copies, axis=0) for a in (x.transpose(0, 3, 1, 2), t)]
    x, t, context, pooled = map(torch.tensor, (*given, *map(np.array, cond.values())))
    with torch.no_grad():
        out = model(x, encoder_hidden_states=context, pooled_projections=pooled, timestep=t)
    return out.sample.numpy().transpose(0, 2, 3, 1)


def apply(module, params, given, **options):
    return jax.jit(functools.partial(module.apply, **options))(params, *given)


def error(a, b):
    return np.abs(np.asarray(a, np.float32) - b).max() / np.abs(b).max()


@pytest.mark.costly
@pytest.mark.parametrize("name", CONFIGS)
def test_the_output_is_diffusers(name):
    model = stock(**CONFIGS[name])
    module, given = ours(model), batch(model)
    assert error(apply(module, params_of(model, module), given), reference(model, *given)) < 5e-5


@pytest.mark.parametrize("size", [(8, 8), (1, 2), (3, 6)])
def test_other_sizes_are_the_centre_of_the_table(size):
    model = stock(layers=1)
    module, given = ours(model), batch(model, size)
    assert error(apply(module, params_of(model, module), given), reference(model, *given)) < 5e-5


@pytest.mark.costly
@pytest.mark.parametrize("name", ["medium35", "odd"])
def test_a_loop_over_blocks_is_the_blocks_in_a_row(name):
    model = stock(**CONFIGS[name])
    row, loop = ours(model), ours(model, scan=True, remat="full")
    params, stacked, given = params_of(model, row), params_of(model, loop), batch(model)
    assert any(":" in segment for segment in stacked["params"]) == (name == "medium35")
    np.testing.assert_allclose(apply(loop, stacked, given), apply(row, params, given), atol=1e-5)
    seen, expected = (
        apply(module, tree, given, features=True)
        for module, tree in ((loop, stacked), (row, params))
    )
    for a, b in zip(seen, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_features_are_the_images_states_after_a_few_blocks():
    model = stock(**CONFIGS["medium35"])
    module, given = ours(model), batch(model, (4, 6))
    states = []
    for block in model.transformer_blocks:
        block.register_forward_hook(lambda _, a, out: states.append(out[1].numpy()))
    reference(model, *given)
    found = apply(module, params_of(model, module), given, features=True)
    assert len(found) == len(taps(4)) == 4
    for a, i in zip(found, taps(4), strict=True):
        assert a.shape == (2, 4, 6, 16)
        assert error(a, states[i].reshape(a.shape)) < 5e-5


def test_several_rows_of_conditioning_share_one_of_x():
    model = stock(**CONFIGS["medium3"])
    module, given = ours(model), batch(model, copies=2)
    out = apply(module, params_of(model, module), given)
    assert out.shape == (4, 10, 14, 6)
    assert error(out, reference(model, *given)) < 5e-5


def test_half_precision_is_near():
    model = stock(**CONFIGS["medium35"])
    module, (x, t, cond) = ours(model, dtype=jnp.bfloat16), batch(model)
    out = apply(module, params_of(model, module), (x, t, cond))
    assert out.dtype == jnp.float32
    assert error(out, reference(model, x, t, cond)) < 0.05


@pytest.mark.long
def test_the_table_is_the_formulas_and_is_never_trained():
    model = stock(**CONFIGS["large35"])
    module, given = ours(model), batch(model)
    fresh = module.init(jax.random.key(0), *given)["params"]["pos_embed.pos_embed"]
    np.testing.assert_allclose(fresh, model.pos_embed.pos_embed.numpy(), atol=1e-6)
    params = params_of(model, module)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(module.apply(p, *given) ** 2)))(params)["params"]
    assert not gradient["pos_embed.pos_embed"].any()
    assert gradient["pos_embed.proj"]["kernel"].any()
    optimizer = adamw(1e-2, 2, warmup=0, weight_decay=0.5)
    params = params["params"]
    update, _ = optimizer.update(gradient, optimizer.init(params), params)
    assert not update["pos_embed.pos_embed"].any()
    assert update["pos_embed.proj"]["kernel"].any()


def test_the_checkpoint_comes_back_tensor_for_tensor():
    model = stock(**CONFIGS["medium35"])
    written = torch_weights.torch_tensors(params_of(model, ours(model)))
    expected = model.state_dict()
    assert written.keys() == expected.keys()
    for name, value in written.items():
        np.testing.assert_array_equal(value, expected[name].numpy())


@pytest.mark.parametrize("size", [(9, 4), (4, 9), (4.5, 4)])
def test_latents_that_do_not_fit_are_refused(size):
    model = stock(layers=1)
    x, t, cond = batch(model)
    x = jnp.zeros((2, *(int(2 * n) for n in size), 6))
    with pytest.raises(ValueError, match="each side must be a multiple of 2 up to 16"):
        jax.eval_shape(ours(model).init, jax.random.key(0), x, t, cond)


@pytest.mark.long
@pytest.mark.parametrize(("heads", "dual"), [(24, (0,)), (38, ())])
def test_one_block_at_its_real_width(heads, dual):
    """SD 3.5 medium's and large's, with the last one after it."""
    model = stock(layers=2, heads=heads, head_dim=64, dual=dual, qk_norm=True, text=64)
    given = batch(model, (3, 4), rows=1)
    params, wide = params_of(model, ours(model)), reference(model, *given)
    for dtype, bound in ((jnp.float32, 1e-4), (jnp.bfloat16, 0.03)):
        assert error(apply(ours(model, dtype=dtype), params, given), wide) < bound
