"""Store the statistics of real scenes beside a recogniser, so that runs need captions only.

    python -m jaxdistill.tasks.scenes.measure --source=/usr/share/datasets/fashion-mnist

--base is a finished benchmark, or an export of its teacher, recogniser and config.json. The
recogniser's card gets the checksum of the new file.
"""

import json
from pathlib import Path

from absl import flags

from jaxdistill.errors import UserError
from jaxdistill.run import checkpoint
from jaxdistill.run.cli import Command, one_line_errors
from jaxdistill.run.compilation import user_cache
from jaxdistill.tasks.scenes import reference, scenes
from jaxdistill.tasks.scenes.recognise import SCALE_IMAGES, SceneRecogniser, unit

COUNT = 2000
"""Captions of a split that are stored: as many images can be scored."""


def measure(source: str, base: Path, cache: Path) -> Path:
    """Write base/recogniser/reference.npz; its path. Scenes go to `cache`. Raises UserError."""
    folder = base / "recogniser"
    if not (base / "config.json").exists():
        raise UserError(
            f"--base={base} has no config.json; give a finished benchmark or its export"
        )
    config = json.loads((base / "config.json").read_text())
    params, about = checkpoint.load_export(folder)
    sources = scenes.open_scenes(source, cache, scale=config["data"]["scale"])
    size = {key: about["recogniser"][key] for key in ("channels", "features")}
    scaled = unit(scenes.images_of(sources["train"], SCALE_IMAGES))
    recogniser = SceneRecogniser(params, 1.0, **size).scaled(scaled)
    captions = {
        split: [item["caption"].decode() for item in sources[split]]
        for split in (*reference.SPLITS, "unseen")
    }
    repeated = {key: config["eval"][key] for key in ("diversity_captions", "repeats")}
    found = {
        split: reference.measure(recogniser, sources, captions, source, split, **repeated)
        for split in reference.SPLITS
    }
    path = folder / reference.FILE
    reference.save(path, found, scale=recogniser.scale, count=COUNT)
    checkpoint.sign(folder, reference.FILE)
    return path


def define(values: flags.FlagValues) -> None:
    """The command's own flags."""
    flags.DEFINE_string("source", None, "FOLDER: Fashion-MNIST's idx files", flag_values=values)
    about = "FOLDER: with recogniser/ and config.json"
    flags.DEFINE_string("base", "pretrained/scenes", about, flag_values=values)


def main() -> None:
    """The command."""
    with one_line_errors():
        command = Command(
            __doc__, config=False, workdir=False, needed="--source=FOLDER", define=define
        ).parse()
        if not command.source:
            raise UserError("--source is missing; give the folder of Fashion-MNIST's idx files")
        path = measure(command.source, Path(command.base), user_cache() / "scenes" / "scenes")
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
