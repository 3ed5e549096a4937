"""Captions to images from an export of a small text-conditional model: what `jaxdistill.benchmark`
leaves in teacher/ and students/.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill.interop import card, sentence_encoder
from jaxdistill.run import checkpoint


class TextExport:
    """A loaded export with the frozen text encoder that its card names.

    Raises CheckpointError or EncoderError, in one line, for a folder that cannot be read or an
    encoder that is another one.
    """

    def __init__(self, folder: str | Path, *, encoder: str | Path = "") -> None:
        self.params, self.card = checkpoint.load_export(folder)
        if "sha256" not in self.card.get("text", {}):
            raise checkpoint.CheckpointError(
                f"{folder} holds a {self.card.get('role', 'thing')} that reads no text"
            )
        self.sampler = card.build_sampler(self.card)
        self.shape = tuple(self.card["data"]["image_shape"])
        self.encoder = sentence_encoder.load(encoder)
        if self.encoder.hash != self.card["text"]["sha256"]:
            raise sentence_encoder.EncoderError(
                f"the text encoder has hash {self.encoder.hash}, but {folder} was trained with"
                f" {self.card['text']['sha256']}; give the folder of that encoder"
            )

    def encode(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """The network's conditioning, {"tokens" float32 [n, l, d], "mask" bool [n, l]}.

        Raises EncoderError for one that is too long.
        """
        distinct = list(dict.fromkeys(captions))
        tokens, mask = self.encoder(
            distinct, length=self.card["text"]["length"], batch_size=min(len(distinct), 256)
        )
        number = {caption: i for i, caption in enumerate(distinct)}
        rows = [number[caption] for caption in captions]
        return {"tokens": tokens[rows].astype(np.float32), "mask": mask[rows]}

    def __call__(
        self,
        captions: Sequence[str],
        *,
        steps: int | None = None,
        guidance: float | None = None,
        noise_correction: bool | None = None,
        seed: int = 0,
        batch_size: int = 500,
    ) -> np.ndarray:
        """Images float32 [n, h, w, c] in [0, 1], one a caption; image i is a function of (seed, i)
        and its caption.

        None takes the card's setting. Raises ValueError for a setting that the export cannot serve.
        """
        settings: dict[str, Any] = {
            "steps": steps,
            "guidance": guidance,
            "noise_correction": noise_correction,
        }
        return self.sampler.draw(
            self.params, self.encode(captions), seed=seed, batch_size=batch_size, **settings
        )
