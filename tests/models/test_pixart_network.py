"""PixArt's network against diffusers' own module, on random weights in which every part counts."""

import functools

import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxdistill.interop.torch_weights import from_torch, torch_name, torch_shape
from jaxdistill.model import unstacked
from jaxdistill.models.transformers.layers import taps
from jaxdistill.models.transformers.pixart import PixArt, PixArtBlock

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

TEXT, TOKENS = 40, 7
ALPHA = {"heads": 3, "head_dim": 16, "depth": 3, "base": 8, "sizes": True}
SIGMA = {"heads": 2, "head_dim": 24, "depth": 5, "base": 16, "interpolation": 1.0}
PLAIN = {
    "heads": 4,
    "head_dim": 8,
    "depth": 2,
    "patch": 1,
    "base": 9,
    "interpolation": 0.5,
    "out_channels": 4,
    "qkv_bias": False,
    "affine": True,
    "eps": 1e-3,
    "context": 20,
    "projected": False,
}
CONFIGS = pytest.mark.parametrize("config", [ALPHA, SIGMA, PLAIN], ids=["alpha", "sigma", "plain"])


def norms(name):
    return "norm" in name and name.endswith("weight")


shaken = functools.partial(folders.shaken, norms=norms, tables="scale_shift_table")


def stock(network):
    """Diffusers' module of the same sizes."""
    width = network.heads * network.head_dim
    return shaken(
        diffusers.PixArtTransformer2DModel(
            num_attention_heads=network.heads,
            attention_head_dim=network.head_dim,
            in_channels=network.in_channels,
            out_channels=network.out_channels,
            num_layers=network.depth,
            cross_attention_dim=width if network.projected else network.context,
            attention_bias=network.qkv_bias,
            sample_size=network.base * network.patch,
            patch_size=network.patch,
            norm_elementwise_affine=network.affine,
            norm_eps=network.eps,
            interpolation_scale=network.interpolation,
            use_additional_conditions=network.sizes,
            caption_channels=network.context if network.projected else None,
        )
    )


def parameters(module, tensors, *args):
    """The module's parameters with these torch tensors, all of them used."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    names, tree = set(), {}
    for path, shape in flatten_dict(shapes).items():
        paths = unstacked(path) or [path]
        values = [from_torch(p, tensors[torch_name(p)].numpy()) for p in paths]
        names |= {torch_name(p) for p in paths}
        tree[path] = jnp.asarray(np.stack(values) if unstacked(path) else values[0])
        assert tree[path].shape == shape.shape, path
    assert names == set(tensors)
    return {"params": unflatten_dict(tree)}


def inputs(network, height=6, width=10, rows=2, per_row=1, seed=3):
    """x, t and cond; the last text is short, and padded with large numbers."""
    rng = np.random.default_rng(seed)
    count = rows * per_row
    x = rng.standard_normal((rows, height, width, network.in_channels), np.float32)
    mask = np.ones((count, TOKENS), np.float32)
    mask[-1, 3:] = 0.0
    cond = {
        "context": rng.standard_normal((count, TOKENS, network.context), np.float32),
        "mask": mask,
    }
    cond["context"][-1, 3:] *= 30.0
    if network.sizes:
        cond["resolution"] = np.float32([[512, 768]] * (count - 1) + [[640, 256]])
        cond["aspect_ratio"] = np.float32([[2 / 3]] * (count - 1) + [[2.5]])
    return jax.tree.map(jnp.asarray, (x, np.float32([801, 25])[:rows], cond))


def expected(module, x, t, cond):
    """Diffusers' output for as many rows of x as of cond, the learned variance dropped."""
    x, t, cond = jax.tree.map(np.array, (x, t, cond))
    sizes = {key: torch.tensor(cond[key]) for key in ("resolution", "aspect_ratio") if key in cond}
    out = module(
        torch.tensor(x.transpose(0, 3, 1, 2)),
        encoder_hidden_states=torch.tensor(cond["context"]),
        timestep=torch.tensor(t),
        added_cond_kwargs=sizes or None,
        encoder_attention_mask=torch.tensor(cond["mask"]),
        return_dict=False,
    )[0]
    return out.numpy().transpose(0, 2, 3, 1)[..., : x.shape[-1]]


def run(network, params, *args, **options):
    """The network's output, of one program."""
    return jax.jit(functools.partial(network.apply, **options))(params, *args)


def error(got, wanted):
    """The largest difference, relative to the largest number."""
    wanted = np.asarray(wanted, np.float32)
    return np.abs(np.asarray(got, np.float32) - wanted).max() / np.abs(wanted).max()


@functools.cache
def _case(items, scan):
    network = PixArt(**{"context": TEXT, "attention": "plain", **dict(items)}, scan=scan)
    module, args = stock(network), inputs(network)
    return network, module, parameters(network, module.state_dict(), *args)


def case(config, scan=False):
    """(network, diffusers' module, the network's parameters)."""
    return _case(tuple(config.items()), scan)


@pytest.mark.costly
@CONFIGS
def test_the_network_is_diffusers_own(config):
    network, module, params = case(config)
    for height, width in ((6, 10), (network.base * network.patch,) * 2, (4, 2)):
        args = inputs(network, height, width)
        got = run(network, params, *args)
        assert got.shape == args[0].shape and got.dtype == jnp.float32
        assert error(got, expected(module, *args)) < 1e-4


@pytest.mark.costly
@CONFIGS
def test_a_loop_over_blocks_is_the_blocks(config):
    network, module, params = case(config, scan=True)
    args = inputs(network)
    assert error(run(network, params, *args), expected(module, *args)) < 1e-4
    loop, (row, _, plain) = run(network, params, *args, features=True), case(config)
    for one, other in zip(loop, run(row, plain, *args, features=True), strict=True):
        assert error(one, other) < 1e-5


@pytest.mark.parametrize("scan", [False, True])
def test_several_texts_for_one_image_are_several_images(scan):
    network, module, params = case(ALPHA, scan)
    x, t, cond = inputs(network, per_row=2)
    got = run(network, params, x, t, cond)
    assert error(got, expected(module, x.repeat(2, 0), t.repeat(2), cond)) < 1e-4


@CONFIGS
def test_a_discriminator_sees_the_image_after_the_blocks_it_asks_for(config):
    network, module, params = case(config)
    args = inputs(network)
    wanted = []
    hooks = [
        module.transformer_blocks[i].register_forward_hook(lambda m, a, out: wanted.append(out))
        for i in taps(network.depth)
    ]
    expected(module, *args)
    for hook in hooks:
        hook.remove()
    grid = (6 // network.patch, 10 // network.patch)
    states = run(network, params, *args, features=True)
    for state, other in zip(states, wanted, strict=True):
        assert state.shape == (2, *grid, network.heads * network.head_dim)
        assert error(state.reshape(other.shape), other) < 1e-4


@pytest.mark.costly
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_states_that_are_computed_again_give_the_same_gradient(remat):
    network, _, params = case(SIGMA, scan=True)
    args = inputs(network)

    def gradient(network):
        return jax.jit(jax.grad(lambda p: (network.apply(p, *args) ** 2).mean()))(params)

    found = jax.tree.leaves(gradient(network.clone(remat=remat)))
    for one, other in zip(found, jax.tree.leaves(gradient(network)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.costly
@CONFIGS
def test_bf16_is_near(config):
    network, module, params = case(config)
    args = inputs(network)
    got = run(network.clone(dtype=jnp.bfloat16), params, *args)
    assert got.dtype == jnp.float32
    assert error(got, expected(module, *args)) < 0.05


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-4), (jnp.bfloat16, 0.02)])
def test_one_block_at_its_real_width(dtype, bound):
    """PixArt-XL: 16 heads of 72."""
    module = shaken(
        diffusers.models.attention.BasicTransformerBlock(
            1152,
            16,
            72,
            cross_attention_dim=1152,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            attention_bias=True,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
        )
    )
    rng = np.random.default_rng(0)
    x, context = (rng.standard_normal((1, n, 1152), np.float32) for n in (32, 9))
    modulation = 0.5 * rng.standard_normal((1, 6, 1152), np.float32)
    mask = np.arange(9)[None] < 6
    block = PixArtBlock(16, True, 1e-6, False, "plain", dtype)
    args = (jnp.asarray(x, dtype), *map(jnp.asarray, (modulation, context, mask)))
    got = block.apply(parameters(block, module.state_dict(), *args), *args)
    wanted = module(
        torch.tensor(x),
        encoder_hidden_states=torch.tensor(context),
        encoder_attention_mask=torch.where(torch.tensor(mask), 0.0, -10000.0)[:, None],
        timestep=torch.tensor(modulation.reshape(1, -1)),
    )
    assert got.dtype == dtype
    assert error(got, wanted.numpy()) < bound


@pytest.mark.parametrize("scan", [False, True])
def test_the_published_size_has_diffusers_tensors(scan):
    with torch.device("meta"):
        module = diffusers.PixArtTransformer2DModel(sample_size=128, caption_channels=4096)
    network = PixArt(sizes=True, attention="plain", scan=scan)
    args = inputs(network, 2, 2)
    shapes = flatten_dict(jax.eval_shape(network.init, jax.random.key(0), *args)["params"])
    found = {}
    for path, leaf in shapes.items():
        several = unstacked(path)
        shape = leaf.shape[1:] if several else leaf.shape
        found |= {torch_name(p): torch_shape(p, shape) for p in several or [path]}
    assert found == {name: tuple(value.shape) for name, value in module.state_dict().items()}
