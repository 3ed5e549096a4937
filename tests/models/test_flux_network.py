"""FLUX.1's transformer against diffusers' own, on random weights in which every part matters."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxdistill.costs.flops import flops_of
from jaxdistill.interop.torch_weights import from_torch, torch_name
from jaxdistill.model import unstacked
from jaxdistill.models.transformers import flux
from jaxdistill.models.transformers.layers import taps

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

LATENTS, WORDS, TEXT, POOLED = 4, 7, 20, 12
CONFIGS = {
    "dev": {"heads": 4, "axes": (4, 6, 6), "double": 2, "single": 3, "takes_guidance": True},
    "schnell": {"heads": 3, "axes": (2, 4, 2), "double": 3, "single": 2},
    "one of each": {"heads": 2, "axes": (8, 12, 12), "double": 1, "single": 1},
    "no double": {"heads": 5, "axes": (4, 2, 2), "double": 0, "single": 2, "takes_guidance": True},
}


def stock(heads: int, axes: Any, double: int, single: int, takes_guidance: bool = False) -> Any:
    """Diffusers' module with weights of which each has an effect."""
    net = diffusers.FluxTransformer2DModel(
        in_channels=4 * LATENTS,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=sum(axes),
        num_attention_heads=heads,
        joint_attention_dim=TEXT,
        pooled_projection_dim=POOLED,
        guidance_embeds=takes_guidance,
        axes_dims_rope=tuple(axes),
    ).eval()
    draw = torch.Generator().manual_seed(heads)
    with torch.no_grad():
        for name, p in net.named_parameters():
            noise = torch.randn(p.shape, generator=draw)
            if p.ndim == 1:
                p.copy_(
                    1 + 0.2 * noise if ".norm_" in name and "linear" not in name else 0.1 * noise
                )
            else:
                p.copy_(noise * (1.5 if "linear" in name else 1.0) / p.shape[1] ** 0.5)
    return net


def inputs(rows: int = 2, copies: int = 1, size: tuple[int, int] = (6, 10)) -> tuple[Any, ...]:
    """x, t and cond of `rows` examples, `copies` rows of cond for each. These times and scales come
    out otherwise in bfloat16 if one of the pipeline's roundings is left out.
    """
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    cond = {
        "context": normal(rows * copies, WORDS, TEXT),
        "pooled": normal(rows * copies, POOLED),
        "guidance": jnp.linspace(3.4, 1.7, rows),
    }
    return normal(rows, *size, LATENTS), jnp.linspace(0.51, 0.89, rows), cond


def of_torch(net: Any, module: Any, args: tuple[Any, ...]) -> Any:
    """The parameters of ours from diffusers'."""
    weights = {name: p.detach().float().numpy() for name, p in net.named_parameters()}
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    tree = {}
    for path, leaf in flatten_dict(shapes).items():
        blocks = [weights.pop(torch_name(p)) for p in unstacked(path) or [path]]
        values = [from_torch(path, value) for value in blocks]
        tree[path] = jnp.asarray(np.stack(values) if unstacked(path) else values[0])
        assert tree[path].shape == leaf.shape, path
    assert not weights
    return {"params": unflatten_dict(tree)}


def torch_output(net: Any, x: Any, t: Any, cond: Any, dtype: Any = None) -> np.ndarray:
    """What diffusers' module gives, packed and unpacked by its pipeline."""
    pack, dtype = diffusers.FluxPipeline, dtype or torch.float32
    rows = len(cond["context"])
    repeat = lambda a: np.repeat(np.asarray(a), rows // len(a), axis=0)  # noqa: E731
    tensor = lambda a: torch.tensor(repeat(a)).to(dtype)  # noqa: E731
    _, h, w, c = x.shape
    latents = tensor(x).permute(0, 3, 1, 2)
    with torch.no_grad():
        out = net(
            hidden_states=pack._pack_latents(latents, rows, c, h, w),
            timestep=tensor(1000 * np.asarray(t)) / 1000,
            guidance=torch.tensor(repeat(cond["guidance"])) if net.config.guidance_embeds else None,
            pooled_projections=tensor(cond["pooled"]),
            encoder_hidden_states=tensor(cond["context"]),
            txt_ids=torch.zeros(cond["context"].shape[1], 3),
            img_ids=pack._prepare_latent_image_ids(1, h // 2, w // 2, "cpu", dtype),
            return_dict=False,
        )[0]
    return pack._unpack_latents(out, h, w, 1).permute(0, 2, 3, 1).float().numpy()


def relative(ours: Any, theirs: Any) -> float:
    """The largest difference, of the largest value."""
    return float(np.abs(np.asarray(ours, np.float32) - theirs).max() / np.abs(theirs).max())


@pytest.mark.costly
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_as_diffusers(name: str, scan: bool) -> None:
    """The output is diffusers', with one and with two rows of conditioning for each latent."""
    net, module = (
        stock(**CONFIGS[name]),
        flux.FluxTransformer(LATENTS, TEXT, POOLED, **CONFIGS[name], scan=scan),
    )
    for copies in (1, 2):
        args = inputs(copies=copies)
        params = of_torch(net, module, args)
        ours = jax.jit(module.apply)(params, *args)
        assert relative(ours, torch_output(net, *args)) < 1e-4


def test_guidance_counts() -> None:
    """The scale moves the output of dev, and is not read by schnell."""
    x, t, cond = inputs()
    for name, moves in (("dev", True), ("schnell", False)):
        module = flux.FluxTransformer(LATENTS, TEXT, POOLED, **CONFIGS[name])
        params = of_torch(stock(**CONFIGS[name]), module, (x, t, cond))
        apply = jax.jit(module.apply)
        other = apply(params, x, t, cond | {"guidance": 1.1 * cond["guidance"]})
        assert (relative(other, np.asarray(apply(params, x, t, cond))) > 0.01) == moves


def test_a_loop_counts_as_its_blocks() -> None:
    """FLOPs of a gradient, as they are written: a plan counts the loops, which is quicker."""
    x, t, cond = inputs()

    def count(scan: bool) -> float:
        module = flux.FluxTransformer(LATENTS, TEXT, POOLED, **CONFIGS["dev"], scan=scan)
        params = jax.eval_shape(module.init, jax.random.key(0), x, t, cond)
        return flops_of(jax.grad(lambda p: jnp.sum(module.apply(p, x, t, cond))), params)

    assert count(True) == pytest.approx(count(False), rel=1e-9)


@pytest.mark.parametrize("scan", [False, True])
def test_features(scan: bool) -> None:
    """The states after the blocks that `taps` names, as diffusers' blocks give them."""
    config = CONFIGS["dev"]
    net, args = stock(**config), inputs(copies=2)
    module = flux.FluxTransformer(LATENTS, TEXT, POOLED, **config, scan=scan)
    seen: list[Any] = []
    for block in [*net.transformer_blocks, *net.single_transformer_blocks]:
        block.register_forward_hook(lambda _, __, out: seen.append(out[1].numpy()))
    torch_output(net, *args)
    see = jax.jit(functools.partial(module.apply, features=True))
    states = see(of_torch(net, module, args), *args)
    assert len(states) == 4
    for i, state in zip(taps(5), states, strict=True):
        assert state.shape == (4, 3, 5, 64)
        assert relative(state, seen[i].reshape(state.shape)) < 1e-4


def test_packed() -> None:
    """Tokens are as diffusers packs them, and unpacking gives the latents back."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 6, 3)), jnp.float32)
    latents = torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)
    theirs = diffusers.FluxPipeline._pack_latents(latents, 2, 3, 4, 6).numpy()
    np.testing.assert_array_equal(flux.packed(x), theirs)
    np.testing.assert_array_equal(flux.unpacked(flux.packed(x), 4, 6), x)


def test_bfloat16() -> None:
    """In bfloat16 the output stays within that type's rounding of diffusers' own in bfloat16: the
    time and the scale are rounded alike.
    """
    config, args = CONFIGS["dev"], inputs()
    net, module = (
        stock(**config),
        flux.FluxTransformer(LATENTS, TEXT, POOLED, **config, dtype=jnp.bfloat16),
    )
    ours = jax.jit(module.apply)(of_torch(net, module, args), *args)
    assert ours.dtype == jnp.float32
    assert relative(ours, torch_output(net.bfloat16(), *args, dtype=torch.bfloat16)) < 0.03


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["double", "single"])
def test_real_width(kind: str, dtype: str) -> None:
    """One block of FLUX.1's width: as diffusers' in float32, and within rounding in bfloat16."""
    heads, axes, words, rows, columns = 24, (16, 56, 56), 16, 4, 6
    width, stocks = heads * sum(axes), diffusers.models.transformers.transformer_flux
    ours, theirs = {
        "double": (flux.DoubleBlock, stocks.FluxTransformerBlock),
        "single": (flux.SingleBlock, stocks.FluxSingleTransformerBlock),
    }[kind]
    block, module = (
        theirs(width, heads, sum(axes)).to(getattr(torch, dtype)),
        ours(heads, "auto", dtype),
    )
    draw = torch.Generator().manual_seed(0)
    text, image, moment = (
        torch.randn(1, *shape, generator=draw).to(getattr(torch, dtype))
        for shape in ((words, width), (rows * columns, width), (width,))
    )
    ids = flux.token_positions(words, rows, columns)
    with torch.no_grad():
        turns = stocks.FluxPosEmbed(10_000, axes)(torch.tensor(np.asarray(ids)))
        out = block(image, text, moment, image_rotary_emb=turns)
    text, image, moment = (jnp.asarray(a.float().numpy(), dtype) for a in (text, image, moment))
    carry = (text, image) if kind == "double" else jnp.concatenate([text, image], axis=1)
    args = (carry, moment, flux.rotary_angles(ids, axes, flux.ROTARY_BASE))
    found = jax.jit(module.apply)(of_torch(block, module, args), *args)
    pair = found if kind == "double" else (found[:, :words], found[:, words:])
    for a, b in zip(pair, out, strict=True):
        assert relative(a, b.float().numpy()) < (1e-5 if dtype == "float32" else 0.01)
