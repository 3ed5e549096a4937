"""Streams of randomness by name: none of a run's phases shares one, whatever the seeds."""

import zlib

import jax
import numpy as np


def key_of(seed: int, name: str) -> jax.Array:
    """The key of a stream."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def seed_of(seed: int, name: str) -> int:
    """The stream as an integer in [0, 2^31), for what takes no key."""
    state = np.random.SeedSequence((seed, zlib.crc32(name.encode()))).generate_state(1)
    return int(state[0] >> 1)
