"""Metrics of text-to-image models: FID, KID, precision and recall of Inception features, and the
CLIP score.

Both networks are read from files that the user points to. Every number comes with its protocol:
what was computed, of which weights, with which resize and pixel range, against which reference and
from how many images. Programs differ in all of these, and a Fréchet distance says nothing without
them.

Inception's weights are a safetensors file of the state dict that pytorch-fid and torch-fidelity
publish, pt_inception-2015-12-05-6726825d.pth. One line makes it, in an environment with torch and
safetensors:

    python -c "import torch, safetensors.torch as s; s.save_file({k: v.contiguous() for k, v in
    torch.load('pt_inception-2015-12-05-6726825d.pth', weights_only=True).items()},
    'inception.safetensors')"

CLIP is a transformers folder, such as openai/clip-vit-large-patch14.
"""

import json
import os
import platform
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import PIL
from PIL import Image

from jaxdistill.errors import UserError
from jaxdistill.interop import components, diffusers_folder, torch_weights
from jaxdistill.interop.clip_tokenizer import Tokenizer
from jaxdistill.interop.torch_weights import WeightFiles
from jaxdistill.metrics.distances import gaussian_distance as frechet_distance
from jaxdistill.metrics.distances import precision_recall, weights_hash
from jaxdistill.models.text.clip import ACTIVATIONS
from jaxdistill.models.vision import inception
from jaxdistill.models.vision.clip_vision import CLIPVision
from jaxdistill.run import checkpoint

ENDINGS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
RECIPE = (
    'python -c "import torch, safetensors.torch as s; s.save_file({{k: v.contiguous() for k, v in '
    "torch.load('{source}', weights_only=True).items()}}, '{target}')\""
)
KID_SUBSETS, KID_SEED = 100, 2020
"""torch-fidelity's."""
NEIGHBOURS = 3
"""k of precision and recall."""


class MetricError(UserError):
    """Images, weights or statistics that cannot be used, in one line."""


# ------------------------------------------------------------------------------------------- images


@dataclass(frozen=True)
class ImageFiles:
    """The images of a folder, in the order of their numbers and names."""

    folder: Path
    files: list[Path]

    def __iter__(self) -> Iterator[np.ndarray]:
        """Images uint8 [h, w, 3], read one at a time.

        Raises MetricError at one that cannot be read.
        """
        return (read_image(path) for path in self.files)

    def sizes(self) -> list[str]:
        """All distinct sizes, "height x width".

        Raises MetricError at an image that cannot be read.
        """
        found = set()
        for path in self.files:
            try:
                with Image.open(path) as image:  # reads the header alone
                    found.add((image.height, image.width))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise unreadable(path, error) from None
        return [f"{height} x {width}" for height, width in sorted(found)]

    def hash(self) -> str:
        """First 12 hex digits of the SHA-256 of all files' bytes."""
        return checkpoint.hash_files(self.files)


def image_files(folder: str | Path, *, deep: bool = False) -> ImageFiles:
    """The images of a folder, and with `deep` those of its subfolders. "10.png" follows "9.png".

    Raises MetricError where the folder does not exist or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MetricError(f"{folder} is not a folder; give a folder of images")
    found = [
        p
        for p in folder.glob("**/*" if deep else "*")
        if p.suffix.lower() in ENDINGS and p.is_file()
    ]
    if not found:
        raise MetricError(f"{folder} holds no image; files must end in {', '.join(ENDINGS)}")

    def order(path: Path) -> list[tuple[int, int, str]]:
        parts = re.split(r"(\d+)", path.relative_to(folder).as_posix())
        return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]

    return ImageFiles(folder, sorted(found, key=order))


def unreadable(path: Path, error: Exception) -> MetricError:
    """The line for an image that Pillow gives up on."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return MetricError(f"image {path} cannot be read ({reason}); copy it again or remove it")


def read_image(path: Path) -> np.ndarray:
    """One image as uint8 [h, w, 3]; grey becomes RGB and an alpha channel is dropped, as in
    pytorch-fid. Raises MetricError.
    """
    try:
        with Image.open(path) as image:
            mode = image.mode
            pixels = np.asarray(image.convert("RGB"))
    # What Pillow raises for damaged files is not one class.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise unreadable(path, error) from None
    if mode[0] in "IF":
        raise MetricError(
            f"image {path} has more than 8 bits per channel (mode {mode}); save it with 8"
        )
    return pixels


# -------------------------------------------------------------------------- what Inception is given


def bilinear(image: np.ndarray, *, centres: bool) -> np.ndarray:
    """Two-point bilinear resize of float32 [h, w, c] to 299 x 299, without smoothing when it
    shrinks.

    Output i lies at (i + ½) s - ½ with `centres` (torch's align_corners=False), else at i s
    (TensorFlow 1), for s = size / 299.
    """
    for axis in (1, 0):
        size, places = image.shape[axis], np.arange(inception.SIDE, dtype=np.float32)
        scale = np.float32(size / inception.SIDE)
        places = (
            np.maximum((places + np.float32(0.5)) * scale - np.float32(0.5), 0)
            if centres
            else places * scale
        )
        low = np.minimum(places.astype(np.int64), size - 1)
        weight = np.expand_dims((places - low).astype(np.float32), 1 - axis)[..., None]
        first, second = (
            np.take(image, low, axis),
            np.take(image, np.minimum(low + 1, size - 1), axis),
        )
        image = first + (second - first) * weight
    return image


def _pytorch_fid(image: np.ndarray) -> np.ndarray:
    return 2 * bilinear(image.astype(np.float32) / 255, centres=True) - 1


def _torch_fidelity(image: np.ndarray) -> np.ndarray:
    return (bilinear(image.astype(np.float32), centres=False) - 128) / 128


def _clean_fid(image: np.ndarray) -> np.ndarray:
    side = (inception.SIDE, inception.SIDE)
    channels = [
        Image.fromarray(image[..., c].astype(np.float32)).resize(side, Image.Resampling.BICUBIC)
        for c in range(3)
    ]
    return (np.stack([np.asarray(c) for c in channels], axis=-1).clip(0, 255) - 128) / 128


class Protocol(NamedTuple):
    """How uint8 pixels become Inception's input.

    `prepare` maps uint8 [h, w, 3] to float32 [299, 299, 3].
    """

    prepare: Callable[[np.ndarray], np.ndarray]
    resize: str
    pixel_range: str


PROTOCOLS = {
    "clean-fid": Protocol(
        _clean_fid,
        "Pillow bicubic, smoothed, a float32 channel at a time, clipped",
        "(x - 128) / 128",
    ),
    "pytorch-fid": Protocol(
        _pytorch_fid, "bilinear at pixel centres, not smoothed", "2 x / 255 - 1"
    ),
    "torch-fidelity": Protocol(
        _torch_fidelity, "bilinear as TensorFlow 1's, not smoothed", "(x - 128) / 128"
    ),
}
"""The three in use. torchmetrics and TensorFlow's original FID are "torch-fidelity"."""


def resize(image: np.ndarray, protocol: str) -> np.ndarray:
    """Uint8 [h, w, 3] -> Inception's input float32 [299, 299, 3] by a protocol of PROTOCOLS.

    Sides are not kept in proportion.

    Raises MetricError for an unknown protocol.
    """
    if protocol not in PROTOCOLS:
        raise MetricError(
            f"the protocol {protocol!r} is not known; choose one of {', '.join(PROTOCOLS)}"
        )
    return PROTOCOLS[protocol].prepare(image)


# ----------------------------------------------------------------------------------------- networks


class Inception(NamedTuple):
    """Frozen features.

    `features` maps images uint8 [h, w, 3] of any sizes to float32 [n, d]; `protocol` says how.
    """

    features: Callable[[Iterable[np.ndarray]], np.ndarray]
    protocol: dict[str, Any]


def load_inception(
    path: str | Path, *, protocol: str = "clean-fid", batch_size: int = 32
) -> Inception:
    """Inception's 2,048 pooled features from a safetensors file.

    Args:
      path: the file; the module's text has the recipe.
      protocol: a key of PROTOCOLS.
      batch_size: images at once.

    Raises:
      MetricError: no such file, a pickle, an unknown protocol.
      WeightsError: tensors that are not this network's.
    """
    path = Path(path)
    if protocol not in PROTOCOLS:
        raise MetricError(
            f"the protocol {protocol!r} is not known; choose one of {', '.join(PROTOCOLS)}"
        )
    if path.suffix in (".pth", ".pt", ".pkl", ".bin", ".ckpt"):
        recipe = RECIPE.format(source=path, target=path.with_suffix(".safetensors").name)
        raise MetricError(
            f"{path} is a pickle, which can run code; turn it into safetensors once: {recipe}"
        )
    if not path.is_file():
        raise MetricError(
            f"Inception's weights {path} are missing; give a safetensors file of"
            " pt_inception-2015-12-05-6726825d.pth"
        )
    module = inception.InceptionV3()
    example = jnp.zeros((1, inception.SIDE, inception.SIDE, 3))
    abstract = jax.eval_shape(lambda: module.init(jax.random.key(0), example))
    # Counters of torch's training, which the published file has or has not.
    params = torch_weights.load(
        WeightFiles([path]),
        abstract,
        where=str(path),
        ignore=lambda name: name.endswith("num_batches_tracked"),
    )

    @jax.jit
    def apply(params: Any, x: jax.Array) -> jax.Array:
        # A TPU multiplies float32 in bfloat16 unless told otherwise, which moves FID.
        with jax.default_matmul_precision("highest"):
            return module.apply(params, x).pooled

    chosen = PROTOCOLS[protocol]
    said = {
        "features": "inception-2015-12-05, 2048 pooled",
        "weights": weights_hash(params),
        "protocol": protocol,
        "resize": f"to 299 x 299, {chosen.resize}",
        "pixel_range": f"{chosen.pixel_range} of 8-bit x",
    }
    return Inception(
        lambda images: in_batches(
            lambda x: apply(params, x), map(chosen.prepare, images), batch_size
        ),
        said,
    )


def in_batches(
    apply: Callable[[np.ndarray], Any], items: Iterable[Any], batch_size: int
) -> np.ndarray:
    """`apply` to stacks of `batch_size` items; the last is filled up, so that one program serves
    all. Raises MetricError for no item.
    """
    outs: list[np.ndarray] = []
    block: list[np.ndarray] = []

    def flush() -> None:
        if block:
            filled = np.stack(block + block[-1:] * (batch_size - len(block)))
            outs.append(np.asarray(apply(filled))[: len(block)])
            block.clear()

    for item in items:
        block.append(item)
        if len(block) == batch_size:
            flush()
    flush()
    if not outs:
        raise MetricError("no images to compute features of")
    found = np.concatenate(outs)
    if not np.isfinite(found).all():
        raise MetricError("features are not finite; the weights are damaged or not this network's")
    return found


class CLIP(NamedTuple):
    """Frozen encoders.

    `images` maps images uint8 [h, w, 3] and `texts` maps n texts to embeddings of unit length,
    float32 [n, p]; `texts` also tells how many of them were longer than the encoder takes, and cut.
    """

    images: Callable[[Iterable[np.ndarray]], np.ndarray]
    texts: Callable[[Sequence[str]], tuple[np.ndarray, int]]
    protocol: dict[str, Any]


def _clip_modules(folder: Path) -> tuple[Any, Any]:
    """The networks of a CLIP folder, for images and for text. Raises MetricError, FolderError."""
    if not folder.is_dir():
        raise MetricError(
            f"{folder} is not a folder; give a CLIP folder of transformers, such as a copy of"
            " openai/clip-vit-large-patch14"
        )
    if not (folder / "config.json").is_file():
        raise MetricError(f"{folder} is not a CLIP folder: it has no config.json")
    where, config = folder / "config.json", diffusers_folder.read_json(folder / "config.json")
    if config.get("model_type") != "clip":
        raise MetricError(
            f"{where} describes model_type {config.get('model_type')!r}; only 'clip' (a CLIPModel)"
            " is supported"
        )
    width = config.get("projection_dim", 512)
    try:
        vision = vision_module(_tower(config, "vision"), where, projection=width)
        text = components.text_module(
            {**_tower(config, "text"), "projection_dim": width}, where, projection=True
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise MetricError(
            f"{where} is damaged ({type(error).__name__} {error}); copy it again"
        ) from None
    return vision, text


def load_clip(folder: str | Path, *, batch_size: int = 32) -> CLIP:
    """A CLIPModel's two encoders from the folder that transformers' save_pretrained writes for
    model and processor.

    Raises:
      MetricError: a missing folder or file, or a setting that is not supported.
      FolderError, WeightsError: a damaged config or weights that do not fit it.
    """
    folder = Path(folder)
    vision, text = _clip_modules(folder)
    prepare, said = clip_preprocessing(folder, vision.image_size)
    tokenizer = Tokenizer(folder, text.positions)
    files = WeightFiles(diffusers_folder.weight_files(folder, "model"))

    def load(module: Any, example: jax.Array, others: tuple[str, ...]) -> Any:
        abstract = jax.eval_shape(lambda: module.init(jax.random.key(0), example))
        ignore = lambda name: name.startswith(others) or name.endswith("position_ids")  # noqa: E731
        return torch_weights.load(files, abstract, where=str(folder), ignore=ignore)

    vision_params = load(
        vision, jnp.zeros((1, vision.image_size, vision.image_size, 3)), ("text_", "logit_scale")
    )
    text_params = load(
        text, jnp.zeros((1, 2), jnp.int32), ("vision_model.", "visual_projection.", "logit_scale")
    )

    @jax.jit
    def see(params: Any, x: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return vision.apply(params, x)

    @jax.jit
    def read(params: Any, ids: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return text.apply(params, ids).pooled

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def texts(prompts: Sequence[str]) -> tuple[np.ndarray, int]:
        found = tokenizer(prompts)
        return unit(in_batches(lambda ids: read(text_params, ids), found.ids, batch_size)), sum(
            bool(cut) for cut in found.cut
        )

    return CLIP(
        lambda images: unit(
            in_batches(lambda x: see(vision_params, x), map(prepare, images), batch_size)
        ),
        texts,
        {
            "name": folder.resolve().name,
            "weights": weights_hash((vision_params, text_params)),
            **said,
        },
    )


def _tower(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A tower's settings. Old folders say them twice, and the second place wins."""
    return {**(config.get(f"{name}_config") or {}), **(config.get(f"{name}_config_dict") or {})}


def vision_module(config: Mapping[str, Any], where: Path, *, projection: int) -> CLIPVision:
    """The encoder of a CLIPVisionConfig. Raises MetricError for settings that are not supported."""
    activation = config.get("hidden_act", "quick_gelu")
    if activation not in ACTIVATIONS:
        raise MetricError(
            f"{where}: hidden_act = {activation!r} is not supported, only"
            f" {' or '.join(map(repr, ACTIVATIONS))}"
        )
    if config.get("num_channels", 3) != 3:
        raise MetricError(
            f"{where}: num_channels = {config['num_channels']!r} is not supported, only 3"
        )
    return CLIPVision(
        hidden_size=config.get("hidden_size", 768),
        intermediate=config.get("intermediate_size", 3072),
        layers=config.get("num_hidden_layers", 12),
        heads=config.get("num_attention_heads", 12),
        image_size=config.get("image_size", 224),
        patch_size=config.get("patch_size", 32),
        projection=projection,
        activation=activation,
        eps=float(config.get("layer_norm_eps", 1e-5)),
    )


def clip_preprocessing(
    folder: Path, side: int
) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]:
    """A CLIPImageProcessor in Pillow, uint8 [h, w, 3] -> float32 [side, side, 3], and its protocol.

    Raises MetricError where the folder has no processor, or one that does something else or gives
    another size.
    """
    where, key = folder / "preprocessor_config.json", None
    if (
        not where.is_file() and (folder / "processor_config.json").is_file()
    ):  # transformers 5 writes one file for both processors
        where, key = folder / "processor_config.json", "image_processor"
    if not where.is_file():
        raise MetricError(f"{where} is missing; copy the CLIP folder whole")
    config = diffusers_folder.read_json(where)
    config = config.get(key, {}) if key else config
    for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        if config.get(name, True) is not True:
            raise MetricError(f"{where}: {name} = {config[name]!r} is not supported, only true")
    size, crop = config.get("size", 224), config.get("crop_size", side)
    edge = size.get("shortest_edge") if isinstance(size, dict) else size
    sides = (crop.get("height"), crop.get("width")) if isinstance(crop, dict) else (crop, crop)
    if not isinstance(edge, int) or edge < side:
        raise MetricError(
            f"{where}: size = {size!r} is not supported, only a shortest_edge of at least {side}"
        )
    if sides != (side, side):
        raise MetricError(
            f"{where}: crop_size = {crop!r} does not fit the network's image_size {side}"
        )
    try:
        resample = Image.Resampling(config.get("resample", Image.Resampling.BICUBIC))
        mean, deviation = (
            np.asarray(config[name], np.float32).reshape(3) for name in ("image_mean", "image_std")
        )
        factor = float(config.get("rescale_factor", 1 / 255))
    except (KeyError, TypeError, ValueError) as error:
        raise MetricError(
            f"{where} is damaged ({type(error).__name__} {error}); copy it again"
        ) from None

    def prepare(image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        short = min(height, width)
        height, width = (edge if n == short else int(edge * n / short) for n in (height, width))
        resized = np.asarray(Image.fromarray(image).resize((width, height), resample))
        top, left = (height - side) // 2, (width - side) // 2
        cropped = resized[top : top + side, left : left + side]
        return (cropped.astype(np.float32) * np.float32(factor) - mean) / deviation

    said = {
        "resize": (
            f"Pillow {resample.name.lower()}, short side to {edge}, middle {side} x {side}, 8-bit"
        ),
        "pixel_range": (
            f"(x * {factor:.6g} - {[round(float(m), 6) for m in mean]}) /"
            f" {[round(float(d), 6) for d in deviation]}"
        ),
    }
    return prepare, said


# ------------------------------------------------------------------------------------------ numbers


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [d] and covariance [d, d] of features [n, d], float64.

    Raises MetricError for d rows or fewer: the covariance is singular.
    """
    count, width = features.shape
    if count <= width:
        raise MetricError(
            f"FID with {width:,} features needs at least {width + 1:,} images, got {count:,}"
        )
    features = features.astype(np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False)


def kid(
    fake: np.ndarray, real: np.ndarray, *, subset_size: int = 1000, subsets: int = KID_SUBSETS
) -> tuple[float, float]:
    """Mean and standard deviation over subsets of the unbiased MMD² with the kernel (x·y/d + 1)³
    (Bińkowski et al. 2018).

    Subsets are torch-fidelity's, so that its numbers come out.

    Args:
      fake: features [n, d] of generated images.
      real: features [m, d].
      subset_size: rows of each, drawn without repetition.
      subsets: their number.

    Raises:
      MetricError: fewer rows than subset_size.
    """
    for name, rows in (("generated", fake), ("reference", real)):
        if len(rows) < subset_size:
            raise MetricError(
                f"KID with subsets of {subset_size:,} needs at least {subset_size:,} {name} images,"
                f" got {len(rows):,}"
            )
    if subset_size < 2:
        raise MetricError(f"KID needs subsets of at least 2, got {subset_size}")
    random = np.random.RandomState(KID_SEED)

    def draw(rows: np.ndarray) -> np.ndarray:
        return rows[random.choice(len(rows), subset_size, replace=False)].astype(np.float64)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def between(x: np.ndarray) -> float:
        found = kernel(x, x)
        return (found.sum() - np.trace(found)) / (len(x) * (len(x) - 1))

    distances = []
    for _ in range(subsets):
        x, y = draw(fake), draw(real)
        distances.append(between(x) + between(y) - 2 * kernel(x, y).mean())
    return float(np.mean(distances)), float(np.std(distances))


def clip_scores(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """100 max(cos, 0) of each pair of embeddings [n, p] of unit length: [n] (Hessel et al. 2021,
    scaled as in torchmetrics).

    torchmetrics clips the mean, not the single score; the two differ only where an image has a
    negative cosine to its prompt.
    """
    return 100 * np.maximum((images.astype(np.float64) * texts.astype(np.float64)).sum(axis=-1), 0)


# ---------------------------------------------------------------------------------------- reference


@dataclass(frozen=True)
class Reference:
    """Real images as the metrics need them.

    mean [d] and covariance [d, d] float64, None where there are too few images for them; features
    float32 [n, d], None where only statistics were stored; count of images; name and hash of the
    images; protocol of the features.
    """

    mean: np.ndarray | None
    covariance: np.ndarray | None
    features: np.ndarray | None
    count: int
    name: str
    hash: str
    protocol: dict[str, Any]

    @property
    def width(self) -> int:
        """Number of features."""
        if self.features is not None:
            return self.features.shape[1]
        assert self.mean is not None
        return len(self.mean)

    def said(self) -> dict[str, Any]:
        """For a result's protocol."""
        return {"name": self.name, "hash": self.hash, "count": self.count}


def open_reference(path: str | Path, extractor: Inception) -> Reference:
    """A folder of images (with its subfolders), or statistics that `save_reference` wrote.

    Raises MetricError where the path is neither, an image cannot be read, or statistics are damaged
    or of another protocol.
    """
    path = Path(path)
    if path.suffix == ".npz":
        return _read_statistics(path, extractor.protocol)
    images = image_files(path, deep=True)
    features = extractor.features(images)
    mean, covariance = moments(features) if len(features) > features.shape[1] else (None, None)
    return Reference(
        mean,
        covariance,
        features,
        len(features),
        path.resolve().name,
        images.hash(),
        extractor.protocol,
    )


def save_reference(path: str | Path, reference: Reference, *, features: bool = True) -> None:
    """Write statistics with their protocol, and by default the features, which KID, precision and
    recall need. Whole or not at all.

    Raises MetricError where the reference has too few images for a covariance.
    """
    if reference.mean is None or reference.covariance is None:
        raise MetricError(
            f"{reference.name} has {reference.count:,} images, too few for statistics"
        )
    path = Path(path)
    arrays = {
        "mu": reference.mean,
        "sigma": reference.covariance,
        "count": np.asarray(reference.count),
    }
    if features and reference.features is not None:
        arrays["features"] = reference.features
    said = {"name": reference.name, "hash": reference.hash, "protocol": reference.protocol}
    temporary = path.with_name(path.name + ".tmp.npz")
    np.savez(temporary, said=np.asarray(json.dumps(said)), **arrays)  # type: ignore[arg-type]
    os.replace(temporary, path)


def _read_statistics(path: Path, protocol: Mapping[str, Any]) -> Reference:
    if not path.is_file():
        raise MetricError(
            f"reference statistics {path} are missing; give a folder of images or an .npz of"
            " --save_reference"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        if "mu" in found and "said" not in found:
            raise MetricError(
                f"{path} states no protocol, as statistics of other programs do; "
                "compute them again from the images with --reference=FOLDER"
                " --save_reference=FILE.npz"
            )
        said = json.loads(str(found["said"]))
        reference = Reference(
            found["mu"],
            found["sigma"],
            found.get("features"),
            int(found["count"]),
            said["name"],
            said["hash"],
            said["protocol"],
        )
    except (OSError, KeyError, TypeError, EOFError, zipfile.BadZipFile, ValueError) as error:
        if isinstance(error, MetricError):
            raise
        raise MetricError(
            f"reference statistics {path} are damaged ({type(error).__name__}: {error}); write them"
            " again"
        ) from None
    for name in sorted({*reference.protocol, *protocol}):
        theirs, ours = reference.protocol.get(name), protocol.get(name)
        if theirs != ours:
            raise MetricError(
                f"reference statistics {path} are of another protocol: {name} is {theirs!r} there"
                f" and {ours!r} here; numbers of the two cannot be compared"
            )
    width = len(reference.mean) if reference.mean is not None else 0
    if (
        reference.covariance is None
        or reference.covariance.shape != (width, width)
        or not np.isfinite(reference.covariance).all()
    ):
        raise MetricError(
            f"reference statistics {path} are damaged (sigma does not fit mu); write them again"
        )
    return reference


# ------------------------------------------------------------------------------------------ results

METRICS = ("fid", "kid", "precision_recall", "clip")


def check_counts(
    metrics: Sequence[str], count: int, reference: Reference, *, subset_size: int
) -> None:
    """Raise MetricError, with the number that is needed, where `count` images or the reference are
    too few for one of `metrics`.
    """
    for metric, needed, mend in (
        ("fid", reference.width + 1, "ask for others with --metrics"),
        ("kid", subset_size, "lower --kid_subset_size"),
        ("precision_recall", NEIGHBOURS + 1, "add images"),
    ):
        if metric not in metrics:
            continue
        if metric != "fid" and reference.features is None:
            raise MetricError(
                f"{metric} needs the reference's features, but {reference.name} holds statistics"
                " only; give its images"
            )
        for whose, found in (("the reference has", reference.count), ("there are", count)):
            if found < needed:
                raise MetricError(
                    f"{metric} needs at least {needed:,} images, but {whose} {found:,}; add images"
                    f" or {mend}"
                )


def feature_scores(
    features: np.ndarray, reference: Reference, metrics: Sequence[str], *, subset_size: int = 1000
) -> dict[str, Any]:
    """Scores of features [n, d] against a reference, with their protocol.

    Args:
      features: of the generated images.
      reference: of the same protocol; `open_reference` sees to that.
      metrics: of METRICS; "clip" is passed over.
      subset_size: of KID.

    Returns:
      those asked for of {"fid", "kid", "kid_std", "precision", "recall"}, and "protocol".

    Raises:
      MetricError: too few images.
    """
    check_counts(metrics, len(features), reference, subset_size=subset_size)
    scores: dict[str, Any] = {}
    protocol: dict[str, Any] = {
        "inception": reference.protocol,
        "reference": reference.said(),
        "count": len(features),
    }
    if "fid" in metrics:
        if reference.mean is None or reference.covariance is None:
            raise MetricError(
                f"fid needs statistics, but {reference.name} has too few images for them"
            )
        scores["fid"] = frechet_distance(*moments(features), reference.mean, reference.covariance)
    if reference.features is not None:
        if "kid" in metrics:
            scores["kid"], scores["kid_std"] = kid(
                features, reference.features, subset_size=subset_size
            )
            protocol["kid"] = {
                "kernel": "(x.y / features + 1)^3",
                "subsets": KID_SUBSETS,
                "subset_size": subset_size,
                "seed": KID_SEED,
            }
        if "precision_recall" in metrics:
            scores["precision"], scores["recall"] = precision_recall(
                reference.features, features, k=NEIGHBOURS
            )
            protocol["precision_recall"] = {
                "k": NEIGHBOURS,
                "block": min(len(features), len(reference.features)),
            }
    return {**scores, "protocol": protocol}


def machine() -> dict[str, str]:
    """What read, resized and computed, and where."""
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "device": f"{device.platform}, {device.device_kind}",
        "system": platform.platform(),
    }
