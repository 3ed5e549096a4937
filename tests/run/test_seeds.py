"""Streams of randomness by name."""

import itertools

import jax
import numpy as np

from jaxdistill.interop import card
from jaxdistill.run.seeds import key_of, seed_of

NAMES = ["teacher", "student", "student-2", "student-4", "health", "pool", "pairs", "lora", ""]
NAMES += ["network", "discriminator ", "discriminator 2", "student reals"]
SEEDS = [0, 1, 2, 3, 200, 2**31 - 1, 2**31, 2**32 - 1]
STREAMS = list(itertools.product(SEEDS, NAMES))


def bits(key):
    return np.asarray(jax.random.key_data(key)).tobytes()


def test_streams_of_other_names_or_seeds_differ():
    """Also the student of seed s from the teacher of s + 1, and all draws from each other."""
    keys = [key_of(seed, name) for seed, name in STREAMS]
    assert len({bits(key) for key in keys}) == len(STREAMS)
    assert len({seed_of(seed, name) for seed, name in STREAMS}) == len(STREAMS)
    draws = np.asarray(jax.vmap(lambda key: jax.random.normal(key, (64,)))(jax.numpy.stack(keys)))
    alike = np.abs(np.corrcoef(draws) - np.eye(len(draws)))
    assert alike.max() < 0.7  # of 64 numbers that have nothing to do with each other: below 0.6


def test_a_student_is_not_the_teacher_of_the_next_seed():
    for seed in range(20):
        assert bits(key_of(seed, "student")) != bits(key_of(seed + 1, "teacher"))
        assert seed_of(seed, "student") != seed_of(seed + 1, "teacher")


def test_a_streams_steps_are_not_those_of_another():
    """Step i of a training uses fold_in(key, i)."""
    some = [(seed, name) for seed in (0, 1, 2) for name in ("teacher", "student")]
    steps = [bits(jax.random.fold_in(key_of(*one), i)) for one in some for i in range(20)]
    assert len(set(steps)) == len(steps)


def test_a_stream_is_the_same_in_every_process():
    """Python's own hash of a name is not: a resumed run would go on with other numbers."""
    assert [seed_of(0, "teacher"), seed_of(1, "student")] == [1678333214, 330059899]
    assert jax.random.key_data(key_of(0, "teacher")).tolist() == [1381669686, 1443336698]
    assert all(0 <= seed_of(*one) < 2**31 for one in STREAMS)


def test_noise_has_all_seeds_of_32_bits_and_old_ones_are_as_before():
    for seed in (0, 7, 2**31 - 1, 2**31, 2**32 - 1):
        key = jax.random.fold_in(jax.random.key(seed), 3)
        expected = jax.random.normal(key, (2, 2, 1))
        np.testing.assert_array_equal(card.draw_noise(seed, 3, 1, (2, 2, 1))[0], expected)
