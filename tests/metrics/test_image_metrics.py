"""Numbers of other programs are in GOLDEN; `python tests/test_image_metrics.py` computes them anew.

That needs torch, transformers, torch-fidelity 0.4.0, torchmetrics 1.9.0 and clean-fid 0.1.35 (the
last three by `pip install --no-deps`, with lightning-utilities: their torchvision is not needed).
Where they are installed, a test holds GOLDEN and whole arrays against them.
"""

import functools
import importlib.util
import json
import shlex
import sys
import warnings
import zlib
from pathlib import Path
from unittest.mock import MagicMock, patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image
from safetensors.numpy import load_file, save_file

from jaxdistill.interop import torch_weights
from jaxdistill.interop.diffusers_folder import FolderError
from jaxdistill.interop.torch_weights import WeightsError
from jaxdistill.metrics import image_metrics
from jaxdistill.metrics.image_metrics import PROTOCOLS, MetricError
from jaxdistill.models.vision.inception import InceptionV3

GOLDEN: dict = {
    "resize": {
        "clean-fid": [
            [-1.0, 0.52659571, 0.72345996, -0.43739533, 0.91027164, -0.90593922],
            [-0.99497789, 0.17434907, -0.66287065, -0.54688871, -0.42161137, 0.9921875],
            [-1.0, 0.53125, 0.84375, -0.265625, 0.984375, 0.3046875],
        ],
        "pytorch-fid": [
            [-1.0, 0.53725493, 0.72994947, -0.43529409, 0.90588236, -0.90313691],
            [-0.99558002, 0.17511976, -0.66211462, -0.54576665, -0.41593283, 0.87732959],
            [-1.0, 0.53725493, 0.8509804, -0.26274508, 0.99215686, 0.30980396],
        ],
        "torch-fidelity": [
            [-1.0, 0.53125, 0.74879813, -0.4375, 0.8984375, -0.87782192],
            [-1.0, 0.13973665, -0.68020916, -0.56260467, -0.46143436, 0.85804272],
            [-1.0, 0.53125, 0.84375, -0.265625, 0.984375, 0.3046875],
        ],
    },
    "pooled": [[0.082186909, 6.7271683, -0.35080698], [0.5079027, 9.7477335, 0.20259121]],
    "logits": [[-4.7736382, -4.109327, 17.854773], [-6.3371567, -6.1814136, 24.816001]],
    "images": [
        [-0.14572824, -0.079367313, 0.0098799405],
        [0.13916072, -0.23228341, -0.09235455],
        [0.059832805, -0.11462879, -0.015385137],
    ],
    "texts": [
        [-0.40514015, -0.037094247, -0.2071529],
        [0.02327631, -0.27641834, -0.16523181],
        [0.24880219, -0.021265056, 0.23128327],
    ],
    "fid": 1.7091143,
    "kid": [0.23669839, 0.052325808],
    "precision_recall": [0.77999997, 0.80000001],
    "clip_score": [12.737325, 13.264441, 0.0],
}  # fmt: skip
PLACES = ([0, 0, 150, 298, 298, 201], [0, 298, 77, 0, 298, 3], [0, 1, 1, 2, 0, 2])
PROMPTS = ["photo", "of dog", "a photo of a dog and " + 40 * "a cat "]
CLIP_CONFIG = {
    "model_type": "clip",
    "projection_dim": 24,
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_act": "quick_gelu",
        "vocab_size": 523,
        "bos_token_id": 521,
        "eos_token_id": 522,
        "pad_token_id": 522,
        "max_position_embeddings": 77,
    },
    "vision_config": {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
        "image_size": 32,
        "patch_size": 8,
    },
}
PREPROCESSOR = {
    "crop_size": {"height": 32, "width": 32},
    "size": {"shortest_edge": 32},
    "resample": 3,
    "do_resize": True,
    "do_center_crop": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "image_processor_type": "CLIPImageProcessor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


# ------------------------------------------------------------------------------------------- inputs


def picture(height, width, step):
    """A uint8 image with slopes and edges, of integers alone."""
    y, x, c = np.ogrid[:height, :width, :3]
    return ((x * step + y * (step + 2) + 70 * c + x * y // 16) % 256).astype(np.uint8)


PICTURES = [picture(48, 64, 2), picture(400, 333, 1), picture(299, 299, 3)]


def tensor(name, shape):
    """A weight as a function of its name, of a size that keeps activations alive."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith(("running_var", "norm.weight", "norm1.weight", "norm2.weight", "bn.weight")):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if len(shape) == 1:
        return rng.normal(0, 0.1, shape).astype(np.float32)
    return (rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)


def shapes_of(module, example):
    abstract = jax.eval_shape(lambda: module.init(jax.random.key(0), example))
    return {
        torch_weights.torch_name(p): torch_weights.torch_shape(p, leaf.shape)
        for p, leaf in flatten_dict(abstract["params"]).items()
    }


@functools.cache
def inception_weights():
    return {
        name: tensor(name, shape)
        for name, shape in shapes_of(InceptionV3(), jnp.zeros((1, 299, 299, 3))).items()
    }


def clip_weights():
    from jaxdistill.interop.components import text_module

    vision = image_metrics.vision_module(CLIP_CONFIG["vision_config"], Path("."), projection=24)
    text = text_module(
        {**CLIP_CONFIG["text_config"], "projection_dim": 24}, Path("."), projection=True
    )
    shapes = (
        shapes_of(vision, jnp.zeros((1, 32, 32, 3)))
        | shapes_of(text, jnp.zeros((1, 2), jnp.int32))
        | {"logit_scale": ()}
    )
    return {
        name: np.float32(4.6) if name == "logit_scale" else tensor(name, shape)
        for name, shape in shapes.items()
    }


def write_clip(folder):
    """A tiny CLIP folder as transformers 4 wrote them: a vocabulary of bytes, some merges."""
    folder.mkdir(parents=True)
    symbols = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(c) for c in symbols] + [chr(256 + i) for i in range(256 - len(symbols))]
    merges = [
        "a t</w>",
        "c at</w>",
        "o g</w>",
        "d og</w>",
        "p h",
        "ph o",
        "t o</w>",
        "pho to</w>",
        "o f</w>",
    ]
    words = [
        *letters,
        *(c + "</w>" for c in letters),
        *("".join(m.split()) for m in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special})
    )
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "config.json").write_text(json.dumps(CLIP_CONFIG))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    # Buffers that older transformers stored.
    places = {
        f"{tower}_model.embeddings.position_ids": np.arange(count)[None]
        for tower, count in (("text", 77), ("vision", 17))
    }
    save_file(
        {name: np.asarray(value) for name, value in (clip_weights() | places).items()},
        folder / "model.safetensors",
    )
    return folder


def feature_sets():
    """Generated and real features float32, overlapping, of correlated columns."""
    rng = np.random.default_rng(5)
    mix = rng.normal(size=(16, 16)) / 4
    return [(rng.normal(size=(150, 16)) @ mix + shift).astype(np.float32) for shift in (0.3, 0.0)]


def directions(width):
    return np.random.default_rng(width).normal(size=(width, 3)) / np.sqrt(width)


# ----------------------------------------------------------------------------------- other programs


def libraries():
    """Modules by name; skips where one is missing.

    torch-fidelity imports torchvision for its data sets, which a CPU torch often comes without, or
    with one that does not load.
    """
    for name in ("torch", "transformers", "torch_fidelity", "torchmetrics", "cleanfid"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    standins = {
        f"torchvision{place}": MagicMock()
        for place in ("", ".datasets", ".models", ".transforms", ".transforms.functional")
    }
    fidelity = (
        "feature_extractor_inceptionv3",
        "interpolate_compat_tensorflow",
        "metric_fid",
        "metric_kid",
        "metric_prc",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = importlib.import_module("torch")
        before = {name: sys.modules.get(name) for name in standins}
        sys.modules.update(standins)
        try:
            found = {name: importlib.import_module(f"torch_fidelity.{name}") for name in fidelity}
        finally:  # by hand: patch.dict would forget torch too, which cannot be imported twice
            for name, module in before.items():
                sys.modules.pop(name) if module is None else sys.modules.update({name: module})
        others = {
            "resize": "cleanfid.resize",
            "clip_score": "torchmetrics.functional.multimodal.clip_score",
            "transformers": "transformers",
            "pil": "transformers.models.clip.image_processing_pil_clip",
        }
        return {
            **found,
            "torch": torch,
            **{name: importlib.import_module(path) for name, path in others.items()},
        }


def theirs():
    """What the other programs make of the inputs above, as whole arrays."""
    them = libraries()
    torch = them["torch"]
    found = {}
    found["resize"] = {"clean-fid": [], "pytorch-fid": [], "torch-fidelity": []}
    for image in PICTURES:
        clean = them["resize"].make_resizer("PIL", False, "bicubic", (299, 299))(image)
        nchw = torch.tensor(image).permute(2, 0, 1)[None].float()
        bilinear = torch.nn.functional.interpolate(
            nchw / 255, size=(299, 299), mode="bilinear", align_corners=False
        )
        tensorflow = them[
            "interpolate_compat_tensorflow"
        ].interpolate_bilinear_2d_like_tensorflow1x(nchw, (299, 299), align_corners=False)
        found["resize"]["clean-fid"].append((clean - 128) / 128)
        found["resize"]["pytorch-fid"].append((2 * bilinear - 1)[0].permute(1, 2, 0).numpy())
        found["resize"]["torch-fidelity"].append(
            ((tensorflow - 128) / 128)[0].permute(1, 2, 0).numpy()
        )

    weights = {name: torch.tensor(value) for name, value in inception_weights().items()}
    with (
        patch.object(torch, "load", lambda *_, **__: weights),
        patch.object(torch.nn.Module, "load_state_dict", loosely(torch)),
    ):
        net = them["feature_extractor_inceptionv3"].FeatureExtractorInceptionV3(
            "x", ["2048", "logits"], feature_extractor_weights_path="x"
        )
    with torch.no_grad():
        outs = [net(torch.tensor(image).permute(2, 0, 1)[None]) for image in PICTURES[:2]]
    found["pooled"], found["logits"] = (
        np.concatenate([o[i].numpy() for o in outs]) for i in range(2)
    )

    fake, real = feature_sets()
    moments = [them["metric_fid"].fid_features_to_statistics(torch.tensor(x)) for x in (fake, real)]
    found["fid"] = them["metric_fid"].fid_statistics_to_metric(*moments, False)[
        "frechet_inception_distance"
    ]
    options = {"kid_subset_size": 100, "verbose": False}
    kid = them["metric_kid"].kid_features_to_metric(
        torch.tensor(fake), torch.tensor(real), **options
    )
    found["kid"] = [kid["kernel_inception_distance_mean"], kid["kernel_inception_distance_std"]]
    near = them["metric_prc"].prc_features_to_metric(
        torch.tensor(fake), torch.tensor(real), verbose=False
    )
    found["precision_recall"] = [near["precision"], near["recall"]]
    return found | clip_theirs(them)


def loosely(torch):
    """torch's loading, which may do without the counters that the published file may lack, and
    without nothing else.
    """
    load = torch.nn.Module.load_state_dict

    def loose(self, weights):
        result = load(self, weights, strict=False)
        assert not result.unexpected_keys and all(
            name.endswith("num_batches_tracked") for name in result.missing_keys
        )

    return loose


def clip_theirs(them):
    import tempfile

    torch = them["torch"]
    with tempfile.TemporaryDirectory() as folder:
        path = write_clip(Path(folder) / "clip")
        model = (
            them["transformers"].CLIPModel(them["transformers"].CLIPConfig(**CLIP_CONFIG)).eval()
        )
        model.load_state_dict({name: torch.tensor(value) for name, value in clip_weights().items()})
        tokenizer = them["transformers"].CLIPTokenizer.from_pretrained(path)
        processor = them["pil"].CLIPImageProcessorPil.from_pretrained(path)

    def process(images=None, text=None, **options):
        if images is not None:
            return processor(
                [np.asarray(image) for image in images],
                return_tensors="pt",
                input_data_format="channels_first",
            )
        return tokenizer(text, return_tensors="pt", padding=True, truncation=True, max_length=77)

    class Old:
        """Of transformers 5, which torchmetrics 1.9.0 does not know: embeddings come wrapped."""

        config = model.config

        def to(self, device):
            return self

        def get_image_features(self, x):
            with torch.no_grad():
                return model.get_image_features(x).pooler_output

        def get_text_features(self, ids, mask):
            with torch.no_grad():
                return model.get_text_features(ids, mask).pooler_output

    chw = [torch.tensor(image).permute(2, 0, 1) for image in PICTURES]
    score = [
        float(them["clip_score"].clip_score(i, t, lambda: (Old(), process)))
        for i, t in zip(chw, PROMPTS, strict=True)
    ]
    text = process(text=PROMPTS)
    found = {
        "pixels": [
            processor(i, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
            for i in PICTURES
        ],
        "images": Old().get_image_features(process(images=chw)["pixel_values"]).numpy(),
        "texts": Old().get_text_features(text["input_ids"], text["attention_mask"]).numpy(),
    }
    return {
        **found,
        "images": unit(found["images"]),
        "texts": unit(found["texts"]),
        "clip_score": score,
    }


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def short(found):
    """The numbers of GOLDEN: pixels at PLACES, features along fixed directions."""

    def digits(values):
        return np.vectorize(lambda v: float(f"{v:.8g}"))(np.asarray(values, np.float64)).tolist()

    out = {
        "resize": {
            name: digits([x[PLACES] for x in arrays]) for name, arrays in found["resize"].items()
        }
    }
    for name in ("pooled", "logits", "images", "texts"):
        out[name] = digits(found[name] @ directions(found[name].shape[1]))
    return out | {
        name: digits(found[name]) for name in ("fid", "kid", "precision_recall", "clip_score")
    }


# ------------------------------------------------------------------------------------------- resize


@pytest.mark.parametrize("name", PROTOCOLS)
def test_resize_gives_the_pixels_of_each_program(name):
    found = [image_metrics.resize(image, name) for image in PICTURES]
    assert all(x.shape == (299, 299, 3) and x.dtype == np.float32 for x in found)
    np.testing.assert_allclose([x[PLACES] for x in found], GOLDEN["resize"][name], atol=2e-5)


def test_protocols_differ_by_more_than_a_rounding():
    made = [image_metrics.resize(PICTURES[0], name) for name in PROTOCOLS]
    for i in range(3):
        assert np.abs(made[i] - made[i - 1]).mean() > 2e-3


def test_unknown_protocol_is_refused(tmp_path):
    for call in (
        lambda: image_metrics.resize(PICTURES[0], "fid"),
        lambda: image_metrics.load_inception(tmp_path, protocol="fid"),
    ):
        with pytest.raises(
            MetricError,
            match=r"'fid' is not known; choose one of clean-fid, pytorch-fid, torch-fidelity",
        ):
            call()


# ----------------------------------------------------------------------------------------- networks


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file(inception_weights() | {"Conv2d_1a_3x3.bn.num_batches_tracked": np.asarray(7)}, path)
    return path


@pytest.fixture(scope="module")
def extractor(inception_file):
    return image_metrics.load_inception(inception_file, protocol="torch-fidelity", batch_size=2)


@pytest.fixture(scope="module")
def pooled(extractor):
    return extractor.features([*PICTURES[:2], PICTURES[0]])


def near(found, wanted, share=1e-4):
    """Within `share` of the largest norm of a row."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert np.abs(found - wanted).max() < share * np.linalg.norm(wanted, axis=-1).max()


@pytest.mark.long
def test_inception_features_are_torch_fidelitys_whatever_the_batch(pooled):
    assert pooled.shape == (3, 2048)
    near(pooled[:2] @ directions(2048), GOLDEN["pooled"], 2e-5)
    np.testing.assert_allclose(pooled[2], pooled[0], rtol=1e-4)


@pytest.mark.long
def test_inception_protocol_names_weights_and_pixels(extractor, inception_file, tmp_path):
    said = extractor.protocol
    assert (
        said["protocol"] == "torch-fidelity"
        and "TensorFlow" in said["resize"]
        and "(x - 128) / 128" in said["pixel_range"]
    )
    weights = load_file(inception_file)
    del weights["Conv2d_1a_3x3.bn.num_batches_tracked"]
    save_file(weights, tmp_path / "again.safetensors", metadata={"format": "pt"})
    again = image_metrics.load_inception(tmp_path / "again.safetensors")
    assert again.protocol["weights"] == said["weights"]  # of the numbers, not of the file
    weights["fc.bias"][0] += 1
    save_file(weights, tmp_path / "other.safetensors")
    assert (
        image_metrics.load_inception(tmp_path / "other.safetensors").protocol["weights"]
        != said["weights"]
    )


def test_inception_refusals(tmp_path, inception_file):
    with pytest.raises(MetricError, match=r"none.safetensors are missing; give a safetensors file"):
        image_metrics.load_inception(tmp_path / "none.safetensors")
    weights = load_file(inception_file)
    weights["another"] = weights.pop("fc.weight")
    save_file(weights, tmp_path / "part.safetensors")
    with pytest.raises(WeightsError, match=r"missing: fc.weight; left over: another"):
        image_metrics.load_inception(tmp_path / "part.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(inception_file.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=r"cut.safetensors cannot be read"):
        image_metrics.load_inception(tmp_path / "cut.safetensors")


def test_pickle_is_refused_with_a_recipe_that_works(tmp_path, monkeypatch, extractor):
    source = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    with pytest.raises(MetricError, match="is a pickle, which can run code") as refusal:
        image_metrics.load_inception(source)
    torch = pytest.importorskip("torch")
    torch.save({name: torch.tensor(value) for name, value in inception_weights().items()}, source)
    command = shlex.split(str(refusal.value).split("once: ")[1])
    assert command[:2] == ["python", "-c"]
    monkeypatch.chdir(tmp_path)
    exec(command[2], {})
    loaded = image_metrics.load_inception(tmp_path / source.with_suffix(".safetensors").name)
    assert loaded.protocol["weights"] == extractor.protocol["weights"]


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(MetricError, match="not finite"):
        image_metrics.in_batches(lambda x: x * np.nan, [np.zeros(3)], 2)
    with pytest.raises(MetricError, match="no images"):
        image_metrics.in_batches(lambda x: x, [], 2)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "tiny-clip")


@pytest.fixture(scope="module")
def clip(clip_folder):
    return image_metrics.load_clip(clip_folder, batch_size=2)


def test_clip_embeddings_and_scores_are_transformers_and_torchmetrics(clip):
    images, (texts, cut) = clip.images(PICTURES), clip.texts(PROMPTS)
    assert cut == 1
    near(images @ directions(24), GOLDEN["images"])
    near(texts @ directions(24), GOLDEN["texts"])
    scores = image_metrics.clip_scores(images, texts)
    np.testing.assert_allclose(scores, GOLDEN["clip_score"], atol=1e-3)
    assert scores[2] == 0 < (images[2] * texts[2]).sum() + 1  # the third cosine is negative


def test_clip_protocol(clip):
    assert clip.protocol["name"] == "tiny-clip" and len(clip.protocol["weights"]) == 12
    assert clip.protocol["resize"] == "Pillow bicubic, short side to 32, middle 32 x 32, 8-bit"


def change(folder, name, **values):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("config.json", {"model_type": "siglip"}, "model_type 'siglip'; only 'clip'"),
        (
            "config.json",
            {"vision_config": {**CLIP_CONFIG["vision_config"], "hidden_act": "relu"}},
            "hidden_act = 'relu' is not supported",
        ),
        (
            "config.json",
            {"vision_config": {**CLIP_CONFIG["vision_config"], "num_channels": 1}},
            "num_channels = 1 is not supported",
        ),
        ("config.json", {"vision_config": 3}, "config.json is damaged"),
        (
            "config.json",
            {"projection_dim": 25},
            "visual_projection.weight is .24, 48., the config wants .25, 48.",
        ),
        (
            "preprocessor_config.json",
            {"crop_size": 64},
            "crop_size = 64 does not fit the network's image_size 32",
        ),
        (
            "preprocessor_config.json",
            {"size": {"shortest_edge": 16}},
            "only a shortest_edge of at least 32",
        ),
        ("preprocessor_config.json", {"size": {"height": 32, "width": 32}}, "only a shortest_edge"),
        (
            "preprocessor_config.json",
            {"do_center_crop": False},
            "do_center_crop = False is not supported",
        ),
        ("preprocessor_config.json", {"image_mean": None}, "damaged"),
    ],
)
def test_clip_settings_that_cannot_be_honoured_are_refused(tmp_path, name, values, message):
    folder = write_clip(tmp_path / "clip")
    change(folder, name, **values)
    with pytest.raises((MetricError, WeightsError), match=message):
        image_metrics.load_clip(folder)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_missing_clip_file_is_named(tmp_path, name):
    folder = write_clip(tmp_path / "clip")
    (folder / name).unlink()
    with pytest.raises((MetricError, FolderError), match=name.removesuffix(".safetensors")):
        image_metrics.load_clip(folder)
    with pytest.raises(MetricError, match="is not a folder; give a CLIP folder"):
        image_metrics.load_clip(tmp_path / "none")


def test_processors_of_old_and_new_transformers_are_one(tmp_path):
    folder = write_clip(tmp_path / "clip")
    wanted = image_metrics.clip_preprocessing(folder, 32)
    change(folder, "preprocessor_config.json", size=32, crop_size=32)  # before 4.20
    old = image_metrics.clip_preprocessing(folder, 32)
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(
        json.dumps({"image_processor": PREPROCESSOR, "processor_class": "CLIPProcessor"})
    )
    for found in (old, image_metrics.clip_preprocessing(folder, 32)):  # since 5.0
        assert found[1] == wanted[1]
        np.testing.assert_array_equal(found[0](PICTURES[0]), wanted[0](PICTURES[0]))


def test_settings_said_twice_are_taken_from_the_second_place(tmp_path, clip):
    folder = write_clip(tmp_path / "clip")
    change(
        folder,
        "config.json",
        text_config={"hidden_size": 1},
        text_config_dict=CLIP_CONFIG["text_config"],
    )
    assert image_metrics.load_clip(folder).protocol["weights"] == clip.protocol["weights"]


# ------------------------------------------------------------------------- the other programs, live


@pytest.fixture(scope="module")
def their_arrays():
    return theirs()


@pytest.mark.long
def test_golden_numbers_are_those_of_the_programs(their_arrays):
    fresh = short(their_arrays)
    assert fresh.keys() == GOLDEN.keys()
    for name, values in fresh.items():
        for key, value in values.items() if isinstance(values, dict) else [(name, values)]:
            wanted = GOLDEN[name][key] if isinstance(values, dict) else GOLDEN[name]
            np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-4, err_msg=f"{name} {key}")


def test_whole_arrays_are_those_of_the_programs(
    their_arrays, pooled, clip, clip_folder, inception_file
):
    for name, wanted in their_arrays["resize"].items():
        for image, one in zip(PICTURES, wanted, strict=True):
            np.testing.assert_allclose(image_metrics.resize(image, name), one, atol=3e-5)
    near(pooled[:2], their_arrays["pooled"])
    prepare, _ = image_metrics.clip_preprocessing(clip_folder, 32)
    for image, one in zip(PICTURES, their_arrays["pixels"], strict=True):
        np.testing.assert_allclose(prepare(image), one, atol=1e-5)
    near(clip.images(PICTURES), their_arrays["images"])
    near(clip.texts(PROMPTS)[0], their_arrays["texts"])
    module, files = InceptionV3(), torch_weights.WeightFiles([inception_file])
    x = jnp.stack([image_metrics.resize(image, "torch-fidelity") for image in PICTURES[:2]])
    abstract = jax.eval_shape(lambda: module.init(jax.random.key(0), x))
    params = torch_weights.load(
        files, abstract, where="inception", ignore=lambda name: "num_batches" in name
    )
    near(jax.jit(module.apply)(params, x).logits, their_arrays["logits"])


# ------------------------------------------------------------------------------------------ numbers


def test_frechet_distance_is_the_closed_form_of_gaussians():
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.normal(size=(12, 12)))
    a, b, shift = rng.uniform(0.1, 3, 12), rng.uniform(0.1, 3, 12), rng.normal(size=12)
    covariance_a, covariance_b = (turn * a) @ turn.T, (turn * b) @ turn.T  # they commute
    found = image_metrics.frechet_distance(shift, covariance_a, np.zeros(12), covariance_b)
    assert found == pytest.approx(
        (shift**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-9
    )
    # Two that do not commute: √ of a 2 x 2 matrix M has the trace √(tr M + 2 √det M).
    one, two = np.asarray([[2.0, 0.5], [0.5, 1.0]]), np.asarray([[1.0, -0.7], [-0.7, 3.0]])
    root = np.sqrt(np.trace(one @ two) + 2 * np.sqrt(np.linalg.det(one @ two)))
    assert image_metrics.frechet_distance(np.zeros(2), one, np.zeros(2), two) == pytest.approx(
        np.trace(one + two) - 2 * root, rel=1e-9
    )


def test_frechet_distance_of_singular_covariances_is_finite():
    rng = np.random.default_rng(1)
    flat = rng.normal(size=(20, 3)) @ rng.normal(size=(3, 20))
    covariance = flat @ flat.T
    assert image_metrics.frechet_distance(
        np.zeros(20), covariance, np.zeros(20), covariance
    ) == pytest.approx(0, abs=1e-5 * np.trace(covariance))
    assert image_metrics.frechet_distance(
        np.zeros(20), covariance, np.zeros(20), 4 * covariance
    ) == pytest.approx(np.trace(covariance), rel=1e-6)


def test_fid_kid_precision_and_recall_are_torch_fidelitys():
    fake, real = feature_sets()
    assert image_metrics.frechet_distance(
        *image_metrics.moments(fake), *image_metrics.moments(real)
    ) == pytest.approx(GOLDEN["fid"], rel=1e-5)
    np.testing.assert_allclose(
        image_metrics.kid(fake, real, subset_size=100), GOLDEN["kid"], rtol=1e-5
    )
    reference = image_metrics.Reference(None, None, real, len(real), "real", "", {})
    found = image_metrics.feature_scores(fake, reference, ["precision_recall"])
    np.testing.assert_allclose(
        [found["precision"], found["recall"]], GOLDEN["precision_recall"], atol=1e-6
    )


def test_kid_is_the_double_loop():
    fake, real = (x[:12, :5] for x in feature_sets())
    kernel = lambda x, y: (float(x @ y) / 5 + 1) ** 3  # noqa: E731

    def within(rows):
        return np.mean([kernel(rows[i], rows[j]) for i in range(12) for j in range(12) if i != j])

    wanted = within(fake) + within(real) - 2 * np.mean([kernel(x, y) for x in fake for y in real])
    mean, deviation = image_metrics.kid(fake, real, subset_size=12, subsets=3)
    assert mean == pytest.approx(wanted, rel=1e-5) and deviation == pytest.approx(0, abs=1e-9)


def test_kid_of_one_distribution_is_zero_on_average():
    rng = np.random.default_rng(2)
    mean, deviation = image_metrics.kid(
        rng.normal(size=(400, 8)), rng.normal(size=(400, 8)), subset_size=100
    )
    assert abs(mean) < deviation


def test_clip_score_is_of_pairs_and_never_negative():
    images, texts = np.eye(3)[[0, 1, 2]], np.asarray([[0.6, 0.8, 0], [0, -1, 0], [0, 0, 1]])
    np.testing.assert_allclose(image_metrics.clip_scores(images, texts), [60, 0, 100])


def test_too_few_images_are_refused_with_the_number_needed():
    fake, real = feature_sets()
    with pytest.raises(MetricError, match=r"FID with 16 features needs at least 17 images, got 16"):
        image_metrics.moments(fake[:16])
    image_metrics.moments(fake[:17])
    with pytest.raises(
        MetricError,
        match=r"KID with subsets of 1,000 needs at least 1,000 generated images, got 150",
    ):
        image_metrics.kid(fake, real)
    reference = image_metrics.Reference(
        *image_metrics.moments(real), real, len(real), "real", "", {}
    )
    for metric, count, message in (
        ("fid", 16, "fid needs at least 17 images, but there are 16; add images or ask for others"),
        (
            "kid",
            99,
            (
                "kid needs at least 100 images, but there are 99; add images or lower"
                " --kid_subset_size"
            ),
        ),
        ("precision_recall", 3, "precision_recall needs at least 4 images, but there are 3"),
    ):
        with pytest.raises(MetricError, match=message):
            image_metrics.feature_scores(fake[:count], reference, [metric], subset_size=100)
        image_metrics.check_counts([metric], count + 1, reference, subset_size=100)
    few = image_metrics.Reference(None, None, real[:16], 16, "few", "", {})
    with pytest.raises(MetricError, match="fid needs at least 17 images, but the reference has 16"):
        image_metrics.feature_scores(fake, few, ["fid"])


# ---------------------------------------------------------------------------------------- reference


def cheap_features(images):
    return np.stack([np.asarray(image, np.float32).mean(axis=(0, 1)) / 100 for image in images])


CHEAP = image_metrics.Inception(cheap_features, {"weights": "abc", "resize": "none"})


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "real" / "sub").mkdir(parents=True)
    for i in range(12):
        place = tmp_path / "real" / ("sub" if i == 11 else "") / f"{i}.png"
        Image.fromarray(
            np.random.default_rng(i).integers(0, 40 + 10 * i, (6, 5, 3), np.uint8)
        ).save(place)
    (tmp_path / "real" / "notes.txt").write_text("no image")
    return tmp_path / "real"


def test_reference_of_a_folder_comes_back_from_its_file(folder, tmp_path):
    reference = image_metrics.open_reference(folder, CHEAP)
    assert (
        reference.count == 12 and reference.name == "real" and reference.features.shape == (12, 3)
    )
    for features in (True, False):
        path = tmp_path / f"{features}.npz"
        image_metrics.save_reference(path, reference, features=features)
        again = image_metrics.open_reference(path, CHEAP)
        assert (again.count, again.name, again.hash, again.protocol) == (
            12,
            "real",
            reference.hash,
            CHEAP.protocol,
        )
        assert (again.features is not None) is features
        fake = cheap_features(PICTURES * 2)
        wanted = image_metrics.feature_scores(fake, reference, ["fid"])
        found = image_metrics.feature_scores(fake, again, ["fid"])
        assert found == wanted
        assert found["protocol"] == {
            "inception": CHEAP.protocol,
            "reference": {"name": "real", "hash": reference.hash, "count": 12},
            "count": 6,
        }
    with pytest.raises(
        MetricError, match="kid needs the reference's features, but real holds statistics only"
    ):
        image_metrics.feature_scores(fake, again, ["fid", "kid"])
    assert not list(tmp_path.glob("*.tmp*"))


def test_reference_hash_is_of_the_files(folder):
    before = image_metrics.open_reference(folder, CHEAP).hash
    Image.fromarray(np.zeros((6, 5, 3), np.uint8)).save(folder / "3.png")
    assert image_metrics.open_reference(folder, CHEAP).hash != before


def test_statistics_of_another_protocol_are_refused(folder, tmp_path):
    image_metrics.save_reference(
        tmp_path / "stats.npz", image_metrics.open_reference(folder, CHEAP)
    )
    for name, value in (("weights", "abd"), ("resize", "other")):
        other = image_metrics.Inception(cheap_features, {**CHEAP.protocol, name: value})
        with pytest.raises(
            MetricError,
            match=rf"another protocol: {name} is '{CHEAP.protocol[name]}' there and '{value}' here",
        ):
            image_metrics.open_reference(tmp_path / "stats.npz", other)


def test_statistics_without_protocol_or_damaged_are_refused(folder, tmp_path):
    path = tmp_path / "stats.npz"
    with pytest.raises(MetricError, match=r"statistics .*stats.npz are missing"):
        image_metrics.open_reference(path, CHEAP)
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))  # pytorch-fid's
    with pytest.raises(MetricError, match="states no protocol, as statistics of other programs do"):
        image_metrics.open_reference(path, CHEAP)
    reference = image_metrics.open_reference(folder, CHEAP)
    image_metrics.save_reference(path, reference)
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"no zip"):
        path.write_bytes(data)
        with pytest.raises(MetricError, match="damaged"):
            image_metrics.open_reference(path, CHEAP)
    few = image_metrics.Reference(None, None, np.zeros((2, 3), np.float32), 2, "few", "", {})
    with pytest.raises(MetricError, match="too few for statistics"):
        image_metrics.save_reference(path, few)


# ------------------------------------------------------------------------------------------- images


def test_images_come_in_the_order_of_their_numbers(tmp_path):
    for name in ("10.png", "9.png", "2.JPG", "a/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(PICTURES[0]).save(tmp_path / name, format="PNG")
    found = image_metrics.image_files(tmp_path)
    assert [path.name for path in found.files] == ["2.JPG", "9.png", "10.png"]
    assert [path.name for path in image_metrics.image_files(tmp_path, deep=True).files] == [
        "2.JPG",
        "9.png",
        "10.png",
        "1.png",
    ]
    np.testing.assert_array_equal(next(iter(found)), PICTURES[0])


def test_folders_without_images_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(MetricError, match=r"holds no image; files must end in .bmp"):
        image_metrics.image_files(tmp_path)
    for path in (tmp_path / "none", tmp_path / "notes.txt"):
        with pytest.raises(MetricError, match="is not a folder"):
            image_metrics.open_reference(path, CHEAP)


def test_unreadable_images_are_named(tmp_path):
    Image.fromarray(PICTURES[0]).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    for data in (whole[: len(whole) // 2], whole[:100] + b"x" * 50 + whole[150:], b"", b"text"):
        (tmp_path / "bad.png").write_bytes(data)
        with pytest.raises(
            MetricError, match=r"image .*bad.png cannot be read .*copy it again or remove it"
        ):
            image_metrics.read_image(tmp_path / "bad.png")
    Image.fromarray(PICTURES[0][..., 0].astype(np.uint16) * 200).save(tmp_path / "deep.png")
    with pytest.raises(MetricError, match="more than 8 bits"):
        image_metrics.read_image(tmp_path / "deep.png")


def test_grey_images_become_rgb(tmp_path):
    Image.fromarray(PICTURES[0][..., 0]).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(
        image_metrics.read_image(tmp_path / "grey.png"), np.repeat(PICTURES[0][..., :1], 3, axis=-1)
    )


if __name__ == "__main__":
    print(json.dumps(short(theirs()), indent=1))
