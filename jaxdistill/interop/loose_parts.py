"""A VAE or a text encoder that is named beside a checkpoint: a folder, or a single file."""

from pathlib import Path

from jaxdistill.interop.components import text_module
from jaxdistill.interop.diffusers_folder import (
    Folder,
    FolderError,
    Part,
    read_json,
)
from jaxdistill.interop.original_layout import DIFFUSERS, origin
from jaxdistill.interop.recognise import Place, Shapes, read_header, text_places, vae_place
from jaxdistill.interop.torch_weights import Origin


def part_at(part: Part, path: Path, shapes: Shapes, place: Place) -> Part:
    """A component with the weights that a file holds at `place`."""
    if place.names == DIFFUSERS and not place.prefix:
        return part._replace(file=path, origin=None, prefix="")
    plain = origin(part.module, place.prefix, names=place.names)

    def where(name: str) -> Origin:
        found = plain(name)
        if found.transposed and found.name not in shapes:
            return Origin(f"{found.name}.weight")  # as a linear layer, not as a matrix
        return found

    return part._replace(file=path, origin=where, prefix=place.prefix)


def _component(where: str, flag: str, folders: str) -> Path:
    """The path of a flag. Raises FolderError for a whole pipeline."""
    path = Path(where).expanduser()
    if (path / "model_index.json").is_file():
        raise FolderError(f"--{flag}={where} is a whole pipeline; give {path / folders}")
    return path


def vae_beside(base: Folder, where: str) -> Part | None:
    """The VAE of `Beside.vae`, None where none is named. A file takes the config of `base`.

    Raises FolderError.
    """
    if not where:
        return None
    path, module = _component(where, "vae", "vae"), base.vae.module
    if path.is_dir():
        config = read_json(path / "config.json")
        options = {"attention": module.attention, "dtype": module.dtype}
        made = base.family.vae_module(config, path / "config.json", **options)
        found = Part(made, config, path, base.vae.stem)
        found.files()
        channels = made.latent_channels
    else:
        shapes, _ = read_header(path)
        place = vae_place(shapes)
        if place is None:
            some = ", ".join(sorted(shapes)[:3])
            raise FolderError(f"--vae={where} holds no autoencoder (it has {some}, ...)")
        found = part_at(base.vae, path, shapes, place)
        channels = shapes[f"{place.prefix}decoder.conv_in.weight"][1]
    if channels != module.latent_channels:
        raise FolderError(
            f"--vae={where} has latents of {channels} channels, but this checkpoint's have"
            f" {module.latent_channels}; give a VAE of its family"
        )
    return found


def text_beside(base: Folder, where: str) -> list[Part | None]:
    """For each text encoder of `base` the one of `Beside.text_encoder`: it is told by its width, or
    by the order where the widths are equal. A file may hold both.

    Raises FolderError.
    """
    parts = base.text_encoders
    found: list[Part | None] = [None] * len(parts)
    given = [text for text in where.split(",") if text]
    widths = [part.module.hidden_size for part in parts]
    if len(given) > len(parts):
        raise FolderError(
            f"--text_encoder={where} names {len(given)}, but this checkpoint has {len(parts)}"
        )
    for text in given:
        path = _component(text, "text_encoder", "text_encoder")
        shapes = {} if path.is_dir() else read_header(path)[0]
        here = _config_width(path) if path.is_dir() else [p.width for p in text_places(shapes)]
        free = [i for i, width in enumerate(widths) if width in here and found[i] is None]
        if not free:
            seen = f"an encoder of width {here[0]}" if here else "no text encoder"
            raise FolderError(
                f"--text_encoder={text} holds {seen}, but this checkpoint wants width"
                f" {' and '.join(map(str, widths))}{', each once' * (len(given) > 1)}"
            )
        alike = len({widths[i] for i in free}) < len(free)
        if alike and len(given) < len(free):
            raise FolderError(
                f"--text_encoder={text} may be any of {len(free)} encoders; name all, as A,B"
            )
        for i in free[:1] if alike else free:
            found[i] = _encoder(parts[i], path, shapes)
    return found


def _config_width(path: Path) -> list[int]:
    return [read_json(path / "config.json").get("hidden_size", 512)]


def _encoder(part: Part, path: Path, shapes: Shapes) -> Part:
    if path.is_dir():
        config, module = read_json(path / "config.json"), part.module
        projection = bool(module.projection)
        made = text_module(config, path / "config.json", projection=projection, dtype=module.dtype)
        found = Part(made, config, path, part.stem)
        found.files()
        return found
    place = next(p for p in text_places(shapes) if p.width == part.module.hidden_size)
    return part_at(part, path, shapes, place)
