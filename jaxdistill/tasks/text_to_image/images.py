"""Pictures with captions: folders with a metadata file, folders with a text beside each picture,
and WebDataset's tars.
"""

import glob
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from jaxdistill.errors import UserError
from jaxdistill.interop.prompts import mended, prompt_of, read_prompts

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Of Hugging Face's ImageFolder: a row a picture, with `file_name` and a caption."""
CAPTIONS = (".txt", ".caption")
"""Endings of a caption beside its picture."""
UNREAD = (".heic", ".heif", ".jxl", ".svg", ".cr2", ".dng", ".nef", ".arw")
"""Known endings of pictures that Pillow does not open."""
READING = "turned, white below"
"""How pictures become arrays, for the key of what is made from them."""


class Captioned(NamedTuple):
    """An image with its caption.

    `stamp` changes when the image does; `read` gives it, uint8 [h, w, 3].
    """

    caption: str
    stamp: list[Any]
    read: Callable[[], np.ndarray]


# ----------------------------------------------------------------------------------------- pictures


@lru_cache(maxsize=1)
def endings() -> frozenset[str]:
    """Of the pictures that Pillow opens, in small letters."""
    return frozenset(e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def read_picture(source: Any, name: str) -> np.ndarray:
    """A picture for training: uint8 [h, w, 3], turned as its EXIF says, transparent parts white.

    Args:
      source: a path or an open file.
      name: for messages.

    Raises:
      UserError: not a picture, or a damaged one.
    """
    try:
        with Image.open(source) as image:
            turned = ImageOps.exif_transpose(image)
            return np.asarray(_rgb(turned))
    # What Pillow raises for damaged files is not one class.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"picture {name} cannot be read ({reason}); copy it again or remove it"
        ) from None


def _rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes in three channels of 8 bits."""
    if image.mode[0] == "F":
        raise ValueError("its values are floating point; save it with 8 bits a channel")
    if image.mode[0] == "I":  # 16 bits: Pillow would clip them at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    whole = image.convert("RGBA")
    white = Image.new("RGBA", whole.size, "white")
    return Image.alpha_composite(white, whole).convert("RGB")


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


# ------------------------------------------------------------------------------------------ sources


def is_tars(source: str) -> bool:
    """Whether a source means tars: by name, braces or wildcards, or as a folder of them."""
    return source.lower().endswith(".tar") or (
        Path(source).is_dir() and any(Path(source).glob("*.tar")) and not _metadata(Path(source))
    )


def tars_of(name: str, source: str) -> list[Path]:
    """The tars of a folder, or of a name with {000..012}, {a,b} and wildcards. Raises UserError."""
    if Path(source).is_dir():
        return sorted(Path(source).glob("*.tar"))
    found: list[str] = []
    for pattern in _expanded(source):
        paths = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
        if not paths or not Path(paths[0]).is_file():
            raise UserError(f"{name} = {source!r}: there is no {pattern}")
        found += paths
    return [Path(path) for path in found]


def _expanded(pattern: str) -> Iterator[str]:
    """Braces as a shell has them: {000..012} and {a,b}."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*)\}", pattern)
    if not match:
        yield pattern
        return
    first, last, words = match.groups()
    parts = (
        (f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1))
        if first
        else words.split(",")
    )
    for part in parts:
        yield from _expanded(pattern[: match.start()] + part + pattern[match.end() :])


class Sample(NamedTuple):
    """Of a tar: the files of one key. `image` is where a picture's bytes are."""

    key: str
    caption: str | None
    image: tarfile.TarInfo | None


def samples(path: Path) -> Iterator[Sample]:
    """The samples of a WebDataset tar. Raises UserError."""

    def parts(member: tarfile.TarInfo) -> tuple[str, str]:
        folder, _, name = member.name.rpartition("/")
        key, _, ending = name.partition(".")
        return f"{folder}/{key}" if folder else key, f".{ending.lower()}"

    try:
        with tarfile.open(path, "r:") as tar:
            keys: dict[str, dict[str, tarfile.TarInfo]] = {}
            for member in tar:
                if member.isfile():
                    key, ending = parts(member)
                    keys.setdefault(key, {})[ending] = member
            for key, by_ending in keys.items():
                caption = _tar_caption(tar, by_ending, f"{path}, {key}")
                images = [m for ending, m in by_ending.items() if ending in endings()]
                yield Sample(key, caption, images[0] if images else None)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{path} is no whole tar, or a compressed one ({error}); copy it again, or unpack it"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None


def _tar_caption(
    tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], where: str
) -> str | None:
    """From .txt or .caption, or from a .json with a caption; None where there is neither."""

    def content(member: tarfile.TarInfo) -> str:
        file = tar.extractfile(member)
        try:
            return file.read().decode() if file else ""
        except UnicodeDecodeError:
            raise UserError(f"{where}: {member.name} is not UTF-8; save it as UTF-8") from None

    for ending in CAPTIONS:
        if ending in members:
            return content(members[ending]).strip()
    if ".json" not in members:
        return None
    try:
        row = json.loads(content(members[".json"]))
    except (json.JSONDecodeError, RecursionError):
        raise UserError(f"{where}: {members['.json'].name} is not JSON") from None
    return prompt_of(row if isinstance(row, dict) else {}, f"{where}.json")


def tar_captions(name: str, source: str) -> list[str]:
    """The captions in tars. `name` is the config's. Raises UserError."""
    found: list[str] = []
    for path in tars_of(name, source):
        captions = [sample.caption for sample in samples(path) if sample.caption is not None]
        found += mended(captions, str(path))
    if not found:
        raise UserError(f"{name} = {source!r} has no captions; each key needs a .txt or .json")
    return found


def tar_images(name: str, source: str) -> list[Captioned]:
    """The pictures in tars, each read where it lies. Raises UserError."""
    found = []
    for path in tars_of(name, source):
        about = [str(path), path.stat().st_size, path.stat().st_mtime]
        captions, images = list[str](), list[tarfile.TarInfo]()
        for key, caption, image in samples(path):
            if image is not None and caption is None:
                raise UserError(
                    f"{name}: {path} has no caption for {image.name}; add a {key}.txt or {key}.json"
                )
            if image is not None and caption is not None:
                captions.append(caption)
                images.append(image)
        for text, image in zip(mended(captions, str(path)), images, strict=True):
            found.append(Captioned(text, [*about, image.name], partial(_from_tar, path, image)))
    if not found:
        raise UserError(f"{name} = {source!r} has no pictures")
    return found


def _from_tar(path: Path, member: tarfile.TarInfo) -> np.ndarray:
    with path.open("rb") as file:
        file.seek(member.offset_data)
        return read_picture(io.BytesIO(file.read(member.size)), f"{path}, {member.name}")


def _metadata(root: Path) -> list[Path]:
    return [root / name for name in METADATA if (root / name).is_file()]


def folder_images(name: str, source: str) -> list[Captioned]:
    """The pictures of a folder with one of METADATA, or with a caption beside each. `name` is the
    config's. Raises UserError.
    """
    root = Path(source)
    if not root.is_dir():
        raise UserError(
            f"{name} = {source} is not a folder; give one with pictures and a metadata.jsonl, or"
            " .tar files, or leave it empty"
        )
    listed = _metadata(root)
    if len(listed) > 1:
        raise UserError(f"{name} = {source} has {listed[0].name} and {listed[1].name}; leave one")
    pairs = _rows(root, listed[0]) if listed else _beside(name, root)
    found = []
    for path, caption in pairs:
        stamp = [str(path), path.stat().st_size, path.stat().st_mtime]
        found.append(Captioned(caption, stamp, partial(read_picture, path, str(path))))
    return found


def _rows(root: Path, where: Path) -> Iterator[tuple[Path, str]]:
    """What a metadata file names."""
    for number, row in enumerate(read_prompts(where), 1):
        name = row.get("file_name")
        if not name or not isinstance(name, str):
            keys = ", ".join(key for key in row if key != "prompt")
            raise UserError(
                f'{where}: row {number} names no picture under "file_name", but has {keys}'
            )
        path = root / name
        if not path.is_file():
            alike = [p.name for p in path.parent.glob("*") if p.name.lower() == path.name.lower()]
            near = f"; there is {alike[0]}" if alike else ""
            raise UserError(f"{where} names the picture {name!r}, which is not in {root}{near}")
        check_format(path)
        yield path, row["prompt"]


def check_format(path: Path) -> None:
    """Raise UserError for a file whose ending is not that of a picture that can be read."""
    ending = path.suffix.lower()
    if ending in endings():
        return
    kind = f"a {ending[1:]} picture" if ending in UNREAD else "no picture by its ending"
    raise UserError(f"{path} is {kind}, which cannot be read; save it as .png, .jpg or .webp")


def _beside(name: str, root: Path) -> Iterator[tuple[Path, str]]:
    """Pictures and the files of CAPTIONS beside them, at any depth."""
    paths = sorted(p for p in root.rglob("*") if p.is_file() and not p.name.startswith("."))
    pictures = [p for p in paths if p.suffix.lower() in endings()]
    others = {p.with_suffix(""): p for p in paths if p.suffix.lower() in CAPTIONS}
    for path in paths:
        if path.suffix.lower() in UNREAD:
            check_format(path)
    bare = [p for p in pictures if p.with_suffix("") not in others]
    if bare or not pictures:
        has = (
            f"{len(bare)} of {len(pictures)} pictures without a caption" if bare else "no pictures"
        )
        has += f", such as {bare[0].name}" if bare else ""
        raise UserError(
            f"{name} = {root} has {has}; write a {METADATA[0]} with rows of"
            ' {"file_name": ..., "caption": ...}, or a .txt beside each picture'
        )
    for path in pictures:
        where = others[path.with_suffix("")]
        try:
            yield path, where.read_text(encoding="utf-8-sig").strip()
        except UnicodeDecodeError:
            raise UserError(f"{where} is not UTF-8; save it as UTF-8") from None
        except OSError as error:
            raise UserError(f"{where} cannot be read ({error.strerror})") from None
