"""Prompts and captioned images of a text-to-image run."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill.interop.prompts import read_prompts
from jaxdistill.tasks.text_to_image.images import (
    Captioned,
    folder_images,
    is_tars,
    tar_captions,
    tar_images,
)


def prompts_of(source: str, tfds_dir: str = "") -> list[str]:
    """The prompts of a file (`read_prompts`), of tars or a folder of captioned pictures
    (`images`), or of a TFDS captions set as "tfds:name:split[:key]".

    Raises ValueError in one line where they cannot be read.
    """
    name = "config.data.prompts"
    if not source:
        raise ValueError(
            f"{name} is empty; give a file of prompts (.txt, .jsonl, .csv, .parquet), .tar files,"
            " or tfds:name:split[:key]"
        )
    found: list[str] = []
    if source.startswith("tfds:"):
        items, key = tfds_captions(name, source, tfds_dir)
        for i in range(len(items)):
            found += texts_of(items[i][key], i)
        if not found:
            raise ValueError(f"{name} = {source!r} has no prompts")
        return found
    source = str(Path(source).expanduser())
    if is_tars(source):
        return tar_captions(name, source)
    if Path(source).is_dir():
        return [image.caption for image in folder_images(name, source)]
    return [item["prompt"] for item in read_prompts(source)]


def texts_of(value: Any, number: int) -> list[str]:
    """The text of an example's field, or its several texts. Raises ValueError."""
    texts = [value] if isinstance(value, (bytes, str)) else list(value)
    try:
        return [text.decode() if isinstance(text, bytes) else str(text) for text in texts]
    except UnicodeDecodeError:
        raise ValueError(f"the caption of example {number} is not UTF-8") from None


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


def captioned_images(source: str, tfds_dir: str = "") -> list[Captioned]:
    """The images of a folder, of tars (`images`), or of tfds:name:split[:caption key].

    Raises ValueError in one line.
    """
    name, source = "config.data.images", str(Path(source).expanduser())
    if source.startswith("tfds:"):
        items, key = tfds_captions(name, source, tfds_dir, images=True)
        return [
            Captioned(texts_of(items[i][key], i)[0], [source, i], partial(stored_image, items, i))
            for i in range(len(items))
        ]
    return tar_images(name, source) if is_tars(source) else folder_images(name, source)


def stored_image(items: Any, i: int) -> np.ndarray:
    """The image of a stored example, grey ones in three channels: uint8 [h, w, 3]."""
    image = np.asarray(items[i]["image"], np.uint8)
    return np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image[..., :3]
