"""Values that are no numbers: where weights are read, and where a picture leaves."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folders import folder
from safetensors.numpy import load_file, save_file

from jaxdistill.errors import NotFinite
from jaxdistill.interop import torch_weights
from jaxdistill.interop.torch_weights import WeightFiles, WeightsError
from jaxdistill.run import checkpoint
from jaxdistill.tasks.text_to_image import pipeline

MODULE = {"params": {"a": {"bias": jax.ShapeDtypeStruct((3,), np.float32)}}}
GOOD = np.asarray([1.0, -2.0, 3.0], np.float32)


def read(tmp_path, value, dtype=np.float32):
    save_file({"a.bias": value}, tmp_path / "w.safetensors")
    files = WeightFiles([tmp_path / "w.safetensors"])
    return torch_weights.load(files, MODULE, where="a", dtype=dtype)["params"]["a"]["bias"]


@pytest.mark.parametrize("kind", [np.float32, np.float16, np.float64, jnp.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number_is_named(tmp_path, kind, bad):
    value = np.where(GOOD > 2, bad, GOOD).astype(kind)
    with pytest.raises(WeightsError, match=r"w\.safetensors: tensor a\.bias has 1 of 3 values"):
        read(tmp_path, value)


def test_a_weight_that_half_precision_cannot_hold_is_named(tmp_path):
    value = GOOD * 1e5
    with pytest.raises(WeightsError, match=r"a\.bias has values up to 3e\+05, but float16 ends"):
        read(tmp_path, value, np.float16)
    np.testing.assert_allclose(read(tmp_path, value, jnp.bfloat16), value, rtol=0.01)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.bool_])
def test_a_quantised_weight_is_refused(tmp_path, kind):
    with pytest.raises(WeightsError, match=r"tensor a\.bias is \w+: quantised"):
        read(tmp_path, GOOD.astype(kind))


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_is_read_as_torch_reads_it(tmp_path, kind):
    import torch
    from safetensors.torch import save_file as save_torch

    theirs = torch.tensor([1.1, -2.3, 3.7]).to(getattr(torch, kind))
    save_torch({"first": torch.zeros(5), "a.bias": theirs}, tmp_path / "w.safetensors")
    found = WeightFiles([tmp_path / "w.safetensors"]).read("a.bias")
    np.testing.assert_array_equal(found.astype(np.float32), theirs.float().numpy())
    bad = torch.tensor([1.0, float("nan"), 2.0]).to(getattr(torch, kind))
    save_torch({"a.bias": bad}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="not finite"):
        torch_weights.numbers(WeightFiles([tmp_path / "w.safetensors"]), "a.bias", np.float32)


def test_an_export_that_is_no_number_is_named(tmp_path):
    checkpoint.export(tmp_path / "e", {"params": {"a": {"bias": GOOD * np.nan}}}, {})
    with pytest.raises(checkpoint.CheckpointError, match=r"params/a/bias has values that are not"):
        checkpoint.load_export(tmp_path / "e")


def test_what_overflows_when_it_is_written_is_named():
    params = {"params": {"a": {"bias": GOOD * 1e5}}}
    with pytest.raises(WeightsError, match=r"the tensor a\.bias has values that are not finite"):
        torch_weights.torch_tensors(params, dtype=np.float16)


PARTS = {
    "text_encoder": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}


@pytest.mark.parametrize("component", PARTS)
def test_a_folders_bad_weight_names_its_component(tmp_path, component):
    copy = tmp_path / "sd"
    shutil.copytree(folder("sd"), copy)
    file = copy / component / f"{PARTS[component]}.safetensors"
    tensors = load_file(file)
    name = sorted(n for n in tensors if n.endswith("weight"))[0]
    tensors[name].reshape(-1)[-1] = np.nan
    save_file(tensors, file)
    with pytest.raises(WeightsError, match=rf"{component}/.*tensor {name} has 1 of"):
        pipeline.load(copy)


@pytest.fixture(scope="module")
def pipe():
    return pipeline.load(folder("sd"))


def spoiled(params):
    """Finite weights that give infinity."""
    return jax.tree.map(lambda a: jnp.full_like(a, 1e30), params)


SPOIL = {
    "the text encoder": lambda p: setattr(p.text, "params", spoiled(p.text.params)),
    "the UNet": lambda p: setattr(p, "params", spoiled(p.params)),
    "the VAE's decoder": lambda p: setattr(p, "vae_params", spoiled(p.vae_params)),
}


@pytest.mark.long
@pytest.mark.parametrize("component", SPOIL)
def test_a_picture_that_is_not_finite_names_the_component(pipe, monkeypatch, component):
    for owner, name in ((pipe.text, "params"), (pipe, "params"), (pipe, "vae_params")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    SPOIL[component](pipe)
    with pytest.raises(NotFinite, match=f"^{component} gives values that are not finite"):
        pipe(["a cat"], steps=1, guidance=1.0, height=16, width=16)


def test_the_mend_is_a_wider_type_where_half_precision_computes():
    bad = np.asarray([np.inf])
    for dtype, word in ((jnp.float16, "--dtype=float32"), (jnp.float32, "another checkpoint")):
        with pytest.raises(NotFinite, match=word):
            pipeline.check_finite(bad, "the VAE's decoder", dtype)
    pipeline.check_finite(np.zeros(3), "the VAE's decoder", jnp.float16)
