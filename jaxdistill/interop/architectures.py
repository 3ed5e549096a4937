"""The published configs of pipelines, as data: what a single file does not say of itself,
and what a run is planned with where there is no checkpoint.
"""

import atexit
import functools
import gzip
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jaxdistill.interop import families
from jaxdistill.interop.diffusers_folder import Folder, Part
from jaxdistill.run.compilation import user_cache

_DATA = resources.files("jaxdistill.interop") / "published"
_FILES = {
    "model_index": "model_index.json",
    "scheduler": "scheduler/scheduler_config.json",
    "tokenizer": "tokenizer/tokenizer_config.json",
    "tokenizer_2": "tokenizer_2/tokenizer_config.json",
}
"""Where a pipeline folder has a component's config; all others have COMPONENT/config.json."""


def _published(name: str) -> Mapping[str, Mapping[str, Any]]:
    return json.loads((_DATA / f"{name}.json").read_text(encoding="utf-8"))


NAMES = (
    *("sd15", "sd21", "sd21-base", "sdxl", "sd3-medium", "sd35-medium", "sd35-large"),
    *("pixart-sigma", "flux-dev", "flux-schnell", "zimage"),
)
PIPELINES: Mapping[str, Mapping[str, Any]] = {name: _published(name) for name in NAMES}
"""Stable Diffusion 1.5 (512 px), 2.1 (768 px, v prediction), 2.1 base (512 px), and what draws 1024
px: {component: config}. 1.4 has the configs of 1.5, and 2.0 those of 2.1.
"""


def folder(pipeline: Mapping[str, Any], **options: Any) -> Folder:
    """One of PIPELINES as a Folder to plan with: no weights, tokenizers or text encoders. `options`
    as of `open_folder`.
    """
    nowhere = Path("architecture")
    common = {key: options[key] for key in ("attention", "dtype") if key in options}
    family = families.PIPELINES[pipeline["model_index"]["_class_name"]]
    network, vae = dict(pipeline[family.network]), dict(pipeline["vae"])
    return Folder(
        path=nowhere,
        components={},
        family=family,
        network=Part(family.network_module(network, nowhere, **options), network, nowhere, ""),
        vae=Part(family.vae_module(vae, nowhere, **common), vae, nowhere, ""),
        text_encoders=(),
        encoder_names=(),
        tokenizers=(),
        scheduler=dict(pipeline["scheduler"]),
        zero_empty_prompt=False,
    )


@functools.cache
def pipeline_folder(name: str) -> Path:
    """One of PIPELINES as a pipeline folder without weights, in the user's cache folder.

    Each file appears whole or not at all, and the folder's name has the checksum of its content, so
    that any number of processes may ask for it at once. Where the cache folder cannot be written,
    it is a temporary folder of this process.
    """
    files = _contents(PIPELINES[name])
    digest = hashlib.sha256("".join(f"{k}\n{v}\n" for k, v in files.items()).encode()).hexdigest()
    kept = user_cache() / "published" / f"{name}-{digest[:12]}"
    try:
        return _written(kept, files)
    except (OSError, RuntimeError):
        made = Path(tempfile.mkdtemp(prefix="jaxdistill-"))
        atexit.register(shutil.rmtree, made, ignore_errors=True)
        return _written(made / name, files)


def _written(root: Path, files: Mapping[str, str]) -> Path:
    for path, text in files.items():
        target = root / path
        if target.is_file() and target.stat().st_size == len(text.encode()):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        temporary.write_bytes(text.encode())
        os.replace(temporary, target)
    return root


def _contents(pipeline: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """{path in the folder: text}."""
    files = {
        _FILES.get(name, f"{name}/config.json"): json.dumps(config, indent=2) + "\n"
        for name, config in pipeline.items()
    }
    merges = gzip.decompress((_DATA / "clip_merges.txt.gz").read_bytes()).decode()
    vocabulary = json.dumps(clip_vocabulary(merges), ensure_ascii=False)
    for name in pipeline:
        if name.startswith("tokenizer"):
            files |= {f"{name}/merges.txt": merges, f"{name}/vocab.json": vocabulary}
    return files


def clip_vocabulary(merges: str) -> dict[str, int]:
    """{token: id} of CLIP's tokenizer, from its merges.txt (Radford et al. 2021): the bytes, the
    bytes that end a word, the merges in their order, and two marks.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = 256 - len(printable)  # written as letters from 256 on
    letters = [chr(code) for code in (*printable, *range(256, 256 + others))]
    joined = [line.replace(" ", "") for line in merges.splitlines()[1:]]
    marks = ["<|startoftext|>", "<|endoftext|>"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *joined, *marks]
    return {token: number for number, token in enumerate(tokens)}
