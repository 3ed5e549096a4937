"""Scores of generated scenes: recognisers trained on real train scenes say whether the image holds
what its caption says.

One network has a head for each of a scene's labels; its hidden layer is the feature space of the
Fréchet distance. It is trained here, frozen, and named by a hash: numbers of different hashes must
not be compared.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdistill.metrics.distances import (
    weights_hash,
)
from jaxdistill.models.vision.recogniser import Recogniser
from jaxdistill.tasks.scenes import scenes

CLASSES = (
    len(scenes.AXES),
    len(scenes.COLOURS),
    len(scenes.GARMENTS),
    len(scenes.COLOURS),
    len(scenes.GARMENTS),
)

SCALE_IMAGES = 5000
"""Train scenes that fix the scale of the features."""


class SceneRecogniser:
    """A frozen recogniser: images [n, h, w, 3] in [0, 1] -> labels int [n, 5] as of `Scene.labels`,
    and features [n, d].
    """

    def __init__(
        self, params: Any, scale: float, *, channels: Sequence[int], features: int
    ) -> None:
        self.params, self.scale = params, scale
        self._apply = jax.jit(Recogniser(CLASSES, tuple(channels), features).apply)
        self.hash = weights_hash(params)

    def scaled(self, train_images: np.ndarray) -> "SceneRecogniser":
        """With the one scale at which the features' mean variance over these images is 1."""
        self.scale = 1.0
        self.scale = float(np.sqrt(self(train_images)[1].var(axis=0, dtype=np.float64).mean()))
        return self

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels and features, in blocks of 500, or of 50 where there are fewer."""
        labels, features = [], []
        size = 500 if len(images) >= 500 else 50
        for i in range(0, len(images), size):
            block = np.asarray(images[i : i + size], np.float32)
            padded = np.concatenate(
                [block, np.zeros((size - len(block), *block.shape[1:]), np.float32)]
            )
            logits, hidden = self._apply(self.params, padded)
            labels.append(
                np.stack([np.asarray(head).argmax(-1) for head in logits], axis=-1)[: len(block)]
            )
            features.append(np.asarray(hidden)[: len(block)] / self.scale)
        return np.concatenate(labels), np.concatenate(features)


def train_recogniser(
    images: np.ndarray,
    labels: np.ndarray,
    scale_images: np.ndarray,
    *,
    channels: Sequence[int],
    features: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    noise: float = 0.1,
) -> SceneRecogniser:
    """Train on scenes of real garments, all compositions among them, with pixel noise as
    augmentation.

    The seed is fixed: all runs on one kind of machine share one recogniser.

    Args:
      images: uint8 [n, h, w, 3].
      labels: int [n, 5] as of `Scene.labels`.
      scale_images: train scenes, float32 [m, h, w, 3] in [0, 1], that fix the scale of the
        features.
      channels: as of `Recogniser`.
      features: as of `Recogniser`.
      steps: of AdamW.
      batch_size: of a step.
      learning_rate: at the start of its cosine decay.
      noise: the largest standard deviation of the Gaussian noise.
    """
    model = Recogniser(CLASSES, tuple(channels), features)
    params = model.init(jax.random.key(0), jnp.zeros((1, *images.shape[1:])))
    tx = optax.adamw(optax.cosine_decay_schedule(learning_rate, steps), weight_decay=1e-2)
    rng = np.random.default_rng(0)

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        heads = model.apply(params, x)[0]
        losses = [
            optax.softmax_cross_entropy_with_integer_labels(logits, y[:, i]).mean()
            for i, logits in enumerate(heads)
        ]
        return jnp.sum(jnp.stack(losses))

    @partial(jax.jit, donate_argnums=0)
    def update(state: Any, x: jax.Array, y: jax.Array, i: jax.Array) -> Any:
        params, opt_state = state
        key_level, key_noise = jax.random.split(jax.random.fold_in(jax.random.key(1), i))
        x = x.astype(jnp.float32) / 255.0
        x = x + noise * jax.random.uniform(key_level, (len(x), 1, 1, 1)) * jax.random.normal(
            key_noise, x.shape
        )
        updates, opt_state = tx.update(jax.grad(loss_fn)(params, x, y), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    state = (params, tx.init(params))
    for i in range(steps):
        rows = rng.integers(0, len(images), batch_size)
        state = update(state, images[rows], labels[rows], jnp.asarray(i))
    made = SceneRecogniser(state[0], 1.0, channels=channels, features=features)
    return made.scaled(scale_images)


def unit(images: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [0, 1]."""
    return images.astype(np.float32) / 255.0


def compare(found: np.ndarray, asked: np.ndarray) -> dict[str, float]:
    """Shares of images that are right, by recognised labels and asked labels, both int [n, 5].

    colour and garment: of the two garments in their asked places. relation: the axis is right, and
    the garments match their places no worse than exchanged. all_right: all five labels.
    """
    same = found == asked
    straight = same[:, 1:].sum(1)
    exchanged = (found[:, [3, 4, 1, 2]] == asked[:, 1:]).sum(1)
    return {
        "colour": float(same[:, [1, 3]].mean()),
        "garment": float(same[:, [2, 4]].mean()),
        "relation": float((same[:, 0] & (straight >= exchanged)).mean()),
        "all_right": float(same.all(1).mean()),
    }
