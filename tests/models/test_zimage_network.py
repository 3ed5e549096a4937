"""Z-Image's network and Qwen3 against diffusers' and transformers' own modules, on random weights
in which every part counts.
"""

import functools

import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxdistill.interop.torch_weights import from_torch, torch_name
from jaxdistill.model import unstacked
from jaxdistill.models.text.qwen3 import Qwen3Text
from jaxdistill.models.transformers.layers import rotary_angles, taps
from jaxdistill.models.transformers.zimage import ZImageBlock, ZImageTransformer, caption_lengths

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

SMALL = {"width": 64, "heads": 4, "axes": (4, 6, 6), "depth": 3, "refiners": 2}
PLAIN = {
    "width": 48,
    "heads": 2,
    "axes": (12, 8, 4),
    "depth": 5,
    "refiners": 1,
    "in_channels": 4,
    "patch": 1,
    "qk_norm": False,
    "eps": 1e-3,
    "base": 50.0,
    "time_scale": 700.0,
    "context_width": 20,
}
WIDE = {"width": 300, "heads": 3, "axes": (20, 40, 40), "depth": 1, "refiners": 3}
CONFIGS = pytest.mark.parametrize("config", [SMALL, PLAIN, WIDE], ids=["small", "plain", "wide"])
TOKENS, COUNTS = 70, (70, 5)
"""Of the longest caption, and of each: padded by themselves they have 96 and 32."""


def norms(name):
    return "norm" in name or name.endswith("cap_embedder.0.weight")


shaken = functools.partial(folders.shaken, norms=norms, tables="pad_token")


def stock(network):
    """Diffusers' module of the same sizes."""
    return shaken(
        diffusers.ZImageTransformer2DModel(
            all_patch_size=(network.patch,),
            in_channels=network.in_channels,
            dim=network.width,
            n_layers=network.depth,
            n_refiner_layers=network.refiners,
            n_heads=network.heads,
            n_kv_heads=network.heads,
            norm_eps=network.eps,
            qk_norm=network.qk_norm,
            cap_feat_dim=network.context_width,
            rope_theta=network.base,
            t_scale=network.time_scale,
            axes_dims=list(network.axes),
            axes_lens=[256, 64, 64],
        )
    )


def parameters(module, tensors, *args):
    """The module's parameters with these torch tensors, all of them used."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    names, tree = [], {}
    for path, shape in flatten_dict(shapes).items():
        paths = unstacked(path) or [path]
        values = [from_torch(p, tensors[torch_name(p)].float().numpy()) for p in paths]
        names += [torch_name(p) for p in paths]
        tree[path] = jnp.asarray(np.stack(values) if unstacked(path) else values[0])
        assert tree[path].shape == shape.shape, path
    assert sorted(names) == sorted(tensors)
    return {"params": unflatten_dict(tree)}


def inputs(network, height=8, width=12, rows=2, counts=COUNTS, seed=3):
    """x, t and cond; what stands behind a caption is large and must not be seen."""
    rng = np.random.default_rng(seed)
    shape = (len(counts), TOKENS, network.context_width)
    mask = np.float32(np.arange(TOKENS) < np.array(counts)[:, None])
    context = rng.standard_normal(shape, np.float32) * np.where(mask, 1, 30)[..., None]
    x = rng.standard_normal((rows, height, width, network.in_channels), np.float32)
    cond = {"context": np.float32(context), "mask": mask}
    return jax.tree.map(jnp.asarray, (x, np.float32([0.15, 0.8])[:rows], cond))


def expected(module, x, t, cond):
    """Diffusers' output, negated, for as many rows of x as of cond."""
    x, t, context, mask = (torch.tensor(np.array(a)) for a in (x, t, *map(cond.get, cond)))
    images = [*x.permute(0, 3, 1, 2)[:, :, None]]
    captions = [row[seen > 0] for row, seen in zip(context, mask, strict=True)]
    out = module(images, t, captions, return_dict=False, patch_size=module.all_patch_size[0])[0]
    return -torch.stack(out)[:, :, 0].permute(0, 2, 3, 1).float().numpy()


def error(got, wanted):
    """The largest difference, relative to the largest number."""
    wanted = np.asarray(wanted, np.float32)
    return np.abs(np.asarray(got, np.float32) - wanted).max() / np.abs(wanted).max()


@functools.cache
def _case(items, scan):
    options = {"context_width": 24, "attention": "plain", **dict(items)}
    network = ZImageTransformer(**options, scan=scan)
    module, args = stock(network), inputs(network)
    return network, module, parameters(network, module.state_dict(), *args)


def case(config, scan=False):
    """(network, diffusers' module, the network's parameters)."""
    return _case(tuple(config.items()), scan)


@functools.cache
def _compiled(network, features):
    return jax.jit(functools.partial(network.apply, features=features))


def run(network, params, *args, features=False):
    """The network's output, compiled once for each shape."""
    return _compiled(network, features)(params, *args)


@pytest.mark.costly
@CONFIGS
def test_the_network_is_diffusers_own(config):
    network, module, params = case(config, scan=True)
    p = network.patch
    for height, width, counts in ((4, 6, COUNTS), (8, 4, (32, 1))):
        args = inputs(network, height * p, width * p, counts=counts)
        got = run(network, params, *args)
        assert got.shape == args[0].shape and got.dtype == jnp.float32
        assert error(got, expected(module, *args)) < 1e-4


@pytest.mark.costly
@CONFIGS
def test_a_loop_over_the_blocks_gives_the_same(config):
    network, _, params = case(config)
    looped, _, stacked = case(config, scan=True)
    args = inputs(network)
    assert error(run(looped, stacked, *args), run(network, params, *args)) < 1e-5
    many = "layers" if network.depth > 1 else "noise_refiner"
    assert any(name.startswith(f"{many}.0:") for name in stacked["params"])
    assert f"{many}.1" not in stacked["params"]


@pytest.mark.costly
@pytest.mark.parametrize("side", [(8, 16), (4, 6)], ids=["no pads", "pads"])
def test_guidance_has_two_captions_for_one_image_and_each_its_own_length(side):
    network, module, params = case(SMALL, scan=True)
    x, t, cond = inputs(network, *side, counts=(70, 5, 9, 33))
    got = run(network, params, x, t, cond)
    assert got.shape == (4, *side, 16)
    x, t = jnp.repeat(x, 2, axis=0), jnp.repeat(t, 2)
    assert error(got, run(network, params, x, t, cond)) < 1e-5
    c, u = expected(module, x, t, cond)[:2]
    assert error(got[0] + 4.0 * (got[0] - got[1]), c + 4.0 * (c - u)) < 1e-4
    assert error(c, u) > 0.05


def test_the_padding_of_the_batch_is_not_seen():
    network, _, params = case(SMALL, scan=True)
    x, t, cond = inputs(network, counts=(40, 5))
    short = {key: value[:, :64] for key, value in cond.items()}
    assert error(run(network, params, x, t, short), run(network, params, x, t, cond)) < 1e-5
    assert list(caption_lengths(cond["mask"])) == [64, 32]


@pytest.mark.parametrize("name", ["x_pad_token", "cap_pad_token"])
def test_pads_to_a_multiple_of_32_are_seen(name):
    network, _, params = case(SMALL, scan=True)
    args = inputs(network, 4, 6, counts=(70, 5, 9, 33))
    without = {"params": {**params["params"], name: jnp.zeros_like(params["params"][name])}}
    assert error(run(network, without, *args), run(network, params, *args)) > 0.01


def test_a_discriminator_sees_states_of_the_image():
    network, module, params = case(PLAIN)
    x, t, cond = inputs(network)
    found = []
    hooks = [
        block.register_forward_hook(lambda _, args, out: found.append(out.numpy()))
        for block in module.layers
    ]
    expected(module, x, t, cond)
    for hook in hooks:
        hook.remove()
    looped, _, stacked = case(PLAIN, scan=True)
    states = run(network, params, x, t, cond, features=True)
    again = run(looped, stacked, x, t, cond, features=True)
    assert [s.shape for s in states] == [(2, 8, 12, 48)] * len(taps(5))
    for state, other, i in zip(states, again, taps(5), strict=True):
        assert error(state.reshape(2, 96, 48), found[i][:, :96]) < 1e-4
        assert error(other, state) < 1e-5


def test_bfloat16_is_near():
    network, _, params = case(SMALL, scan=True)
    args = inputs(network)
    near = run(network.clone(dtype=jnp.bfloat16), params, *args)
    assert near.dtype == jnp.float32
    assert 1e-4 < error(near, run(network, params, *args)) < 0.05


def test_the_published_size_has_diffusers_tensors():
    with torch.device("meta"):
        theirs = diffusers.ZImageTransformer2DModel().state_dict()
    network = ZImageTransformer(attention="plain", scan=True)
    args = (
        jnp.zeros((1, 8, 8, 16)),
        jnp.zeros(1),
        {"context": jnp.zeros((1, 8, 2560)), "mask": jnp.ones((1, 8))},
    )
    shapes = jax.eval_shape(network.init, jax.random.key(0), *args)["params"]
    count = sum(np.prod(leaf.shape) for leaf in flatten_dict(shapes).values())
    names = {torch_name(p) for path in flatten_dict(shapes) for p in unstacked(path) or [path]}
    assert names == set(theirs)
    assert count == sum(value.numel() for value in theirs.values())


@pytest.mark.long
def test_a_block_of_the_published_width():
    from diffusers.models.transformers.transformer_z_image import RopeEmbedder
    from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock as Stock

    d, length = 3840, 40
    module = shaken(Stock(0, d, 30, 30, 1e-5, True))
    rng = np.random.default_rng(0)
    x, time = (rng.standard_normal(s, np.float32) for s in ((1, length, d), (1, 256)))
    places = rng.integers(0, 500, (length, 3))
    mask = np.arange(length)[None] < 33
    angles = rotary_angles(jnp.asarray(places)[None], (32, 48, 48), 256.0)
    turns = RopeEmbedder(256.0, [32, 48, 48], [512] * 3)(torch.tensor(places))[None]

    def theirs(dtype):
        x_, time_ = (torch.tensor(a).to(dtype) for a in (x, time))
        return module.to(dtype)(x_, torch.tensor(mask), turns, time_).float().numpy()[:, :33]

    wanted = theirs(torch.float32)
    block = ZImageBlock(30, 1e-5, True, True, "plain", jnp.float32)
    args = (jnp.asarray(x), jnp.asarray(mask), angles, jnp.asarray(time))
    params = parameters(block, module.state_dict(), *args)
    assert error(block.apply(params, *args)[:, :33], wanted) < 1e-4
    rounding = error(theirs(torch.bfloat16), wanted)
    half = block.clone(dtype=jnp.bfloat16).apply(params, args[0].astype(jnp.bfloat16), *args[1:])
    assert half.dtype == jnp.bfloat16 and error(half[:, :33], wanted) < 2 * rounding < 0.05


# ---------------------------------------------------------------------------------------- Qwen3

TEXTS = pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 48, "intermediate": 96, "layers": 4, "heads": 4, "kv_heads": 2},
        {
            "hidden_size": 40,
            "intermediate": 72,
            "layers": 3,
            "heads": 6,
            "kv_heads": 6,
            "eps": 1e-3,
        },
        {
            "hidden_size": 64,
            "intermediate": 50,
            "layers": 1,
            "heads": 4,
            "kv_heads": 1,
            "head_dim": 8,
            "base": 1e4,
            "use_bias": True,
        },
    ],
    ids=["grouped", "narrow", "one layer"],
)


@pytest.mark.costly
@TEXTS
@pytest.mark.parametrize("scan", [False, True])
def test_the_text_encoder_is_transformers_own(sizes, scan):
    ours = Qwen3Text(vocab_size=99, scan=scan, **{"head_dim": 16, **sizes})
    theirs = transformers.Qwen3Config(
        vocab_size=99,
        hidden_size=ours.hidden_size,
        intermediate_size=ours.intermediate,
        num_hidden_layers=ours.layers,
        num_attention_heads=ours.heads,
        num_key_value_heads=ours.kv_heads,
        head_dim=ours.head_dim,
        rms_norm_eps=ours.eps,
        attention_bias=ours.use_bias,
        rope_parameters={"rope_type": "default", "rope_theta": ours.base},
    )
    module = shaken(transformers.Qwen3Model(theirs))
    ids = np.random.default_rng(1).integers(0, 99, (3, 50))
    mask = np.arange(50) < np.array([50, 1, 33])[:, None]
    mask[0, :20] = False  # right padding would change nothing without the mask
    args = (jnp.asarray(ids), jnp.asarray(mask))
    params = parameters(ours, module.state_dict(), *args)
    got = jax.jit(ours.apply)(params, *args)
    wanted = module(
        torch.tensor(ids), attention_mask=torch.tensor(mask), output_hidden_states=True
    ).hidden_states[-2]
    assert error(got[mask], wanted.numpy()[mask]) < 1e-4
    near = jax.jit(ours.clone(dtype=jnp.bfloat16).apply)(params, *args)
    assert near.dtype == jnp.bfloat16 and error(near[mask], wanted.numpy()[mask]) < 0.05


def test_the_last_layer_of_the_text_encoder_is_not_computed():
    args = (jnp.zeros((1, 8), int), jnp.ones((1, 8), bool))

    def products(layers):
        ours = Qwen3Text(50, 32, 64, layers, heads=2, kv_heads=1, head_dim=16)
        params = jax.eval_shape(ours.init, jax.random.key(0), *args)
        return jax.jit(ours.apply).lower(params, *args).as_text().count("dot_general")

    assert products(1) == 0 and products(3) == 2 * products(2) > 0
