"""Prompts and captioned images of a text-to-image run."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jaxdistill.interop.prompts import read_prompts
from jaxdistill.metrics.image_metrics import read_image

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def prompts_of(source: str, tfds_dir: str = "") -> list[str]:
    """The prompts of a .txt or .jsonl file, or of a TFDS captions set as "tfds:name:split[:key]".

    Raises ValueError in one line where they cannot be read.
    """
    if not source:
        raise ValueError(
            "config.data.prompts is empty; give a .txt or .jsonl file of prompts, or"
            " tfds:name:split[:key]"
        )
    if not source.startswith("tfds:"):
        return [item["prompt"] for item in read_prompts(source)]
    found: list[str] = []
    items, key = tfds_captions("config.data.prompts", source, tfds_dir)
    for i in range(len(items)):
        found += texts_of(items[i][key])
    if not found:
        raise ValueError(f"config.data.prompts = {source!r} has no prompts")
    return found


def texts_of(value: Any) -> list[str]:
    """The text of an example's field, or its several texts."""
    texts = [value] if isinstance(value, (bytes, str)) else list(value)
    return [text.decode() if isinstance(text, bytes) else str(text) for text in texts]


def tfds_captions(
    name: str, source: str, tfds_dir: str, *, images: bool = False
) -> tuple[Any, str]:
    """The examples of tfds:name:split[:key], and the key of their captions. `name` is the config's.

    Raises ValueError.
    """
    fields = source.split(":")
    if len(fields) not in (3, 4):
        raise ValueError(
            f"{name} = {source!r} must have the form tfds:name:split or tfds:name:split:key"
        )
    key = fields[3] if len(fields) == 4 else "caption"
    items = tfds_source(fields[1], fields[2], tfds_dir)
    for wanted in (key, "image") if images else (key,):
        if len(items) and wanted not in items[0]:
            mend = "" if wanted == "image" else "; name it as fourth part"
            raise ValueError(
                f"{name} = {source!r}: no {wanted!r} in its examples, only"
                f" {', '.join(items[0])}{mend}"
            )
    return items, key


def tfds_source(name: str, split: str, folder: str) -> Any:
    """A stored TFDS dataset as a random-access source, without TensorFlow and without its builder's
    code.

    Read from `folder`/`name`, by default below ~/tensorflow_datasets; of several configs or
    versions the last by name. The files must be array_record. Raises ValueError in one line.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise ValueError(
            'a TFDS set needs tensorflow-datasets; run: pip install "jaxdistill[benchmark]"'
        ) from None
    root = Path(folder or "~/tensorflow_datasets").expanduser() / name
    stored = sorted(root.glob("**/dataset_info.json"))
    if not stored:
        raise ValueError(
            f"the TFDS dataset {name} is not in {root.parent}; prepare it there, or set"
            " config.data.tfds_dir"
        )
    try:
        return tfds.builder_from_directory(stored[-1].parent).as_data_source(split=split)
    except Exception as error:  # the library has many
        raise ValueError(
            f"the TFDS dataset {name}:{split} cannot be read ({str(error).splitlines()[0][:200]})"
        ) from None


class Captioned(NamedTuple):
    """An image with its caption.

    `stamp` changes when the image does; `read` gives it, uint8 [h, w, 3].
    """

    caption: str
    stamp: list[Any]
    read: Callable[[], np.ndarray]


def captioned_images(source: str, tfds_dir: str = "") -> list[Captioned]:
    """The images of a folder with a metadata.jsonl ({"file_name", "prompt"} a line), or of
    tfds:name:split[:caption key].

    Raises ValueError in one line.
    """
    if source.startswith("tfds:"):
        items, key = tfds_captions("config.data.images", source, tfds_dir, images=True)
        return [
            Captioned(texts_of(items[i][key])[0], [source, i], partial(stored_image, items, i))
            for i in range(len(items))
        ]
    root = Path(source)
    if not root.is_dir():
        raise ValueError(
            f"config.data.images = {source} is not a folder; give one with images and a"
            " metadata.jsonl, or leave it empty"
        )
    if not (root / "metadata.jsonl").is_file():
        raise ValueError(
            f'config.data.images = {source} has no metadata.jsonl; it must hold {{"file_name": ...,'
            ' "prompt": ...} a line'
        )
    found = []
    for item in read_prompts(root / "metadata.jsonl"):
        path = root / str(item.get("file_name", ""))
        if path.suffix.lower() not in IMAGES or not path.is_file():
            raise ValueError(
                f"{root / 'metadata.jsonl'} names the image {item.get('file_name')!r}, which is not"
                f" in {source}"
            )
        stamp = [str(path), path.stat().st_size, path.stat().st_mtime]
        found.append(Captioned(item["prompt"], stamp, partial(read_image, path)))
    return found


def stored_image(items: Any, i: int) -> np.ndarray:
    """The image of a stored example, grey ones in three channels: uint8 [h, w, 3]."""
    image = np.asarray(items[i]["image"], np.uint8)
    return np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image[..., :3]


def fit_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Uint8 [h, w, 3], cropped to the aspect ratio about its middle and resized: float32 [height,
    width, 3] in [-1, 1].
    """
    picture = Image.fromarray(image)
    scale = max(width / picture.width, height / picture.height)
    size = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return (
        np.asarray(picture.crop((left, top, left + width, top + height)), np.float32) / 127.5 - 1.0
    )
