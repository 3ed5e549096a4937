"""Compiled programs in the user's cache folder, and what the start of a command leaves out."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxdistill.interop import card
from jaxdistill.run import checkpoint, compilation

SAMPLE = """
import json, sys
import jax
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
from jaxdistill.sample import main
main(sys.argv[1:])
counted = [events.count(f"/jax/compilation_cache/cache_{kind}") for kind in ("hits", "misses")]
print(json.dumps([*counted, sorted(sys.modules)]))
"""
HEAVY = {
    *("torch", "tensorflow", "matplotlib", "scipy", "sklearn", "transformers", "tokenizers"),
    *("orbax", "optax", "grain", "fsspec", "safetensors", "ml_collections", "tensorboardX"),
}
CARD = {
    "format": card.FORMAT,
    "role": "student",
    "model": {"name": "mlp", "width": 16, "depth": 1, "num_classes": 10},
    "schedule": {"name": "cosine", "snr_scale": 1.0},
    "prediction": "v",
    "sampler": {
        **{"solver": "ddim", "grid": "trailing", "times": [], "steps": 2},
        **{"guidance": 1.0, "noise_correction": True},
    },
    "data": {"image_shape": [4, 4, 1], "class_names": list("0123456789")},
}
SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user's cache folder, with nothing said in the environment."""
    for name in SETTINGS:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    yield tmp_path / "home" / "jaxdistill" / "xla" / compilation.cpu()
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def programs(folder):
    return {path.name for path in folder.glob("*-cache")}


def compile_one(factor):
    jax.jit(lambda x: x * factor)(np.ones(7, np.float32)).block_until_ready()


@pytest.mark.long
def test_the_second_sample_compiles_nothing_and_imports_little(tmp_path):
    model = card.build_model(CARD["model"])
    inputs = jnp.zeros((1, 4, 4, 1)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    params = model.init(jax.random.key(0), *inputs)
    checkpoint.export(tmp_path / "student", params, CARD)
    environment = {k: v for k, v in os.environ.items() if k.lower() not in SETTINGS}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "home")
    found = []
    for name in ("one.npz", "two.npz"):
        flags = [f"--model={tmp_path / 'student'}", f"--out={tmp_path / name}", "--num=4"]
        ran = subprocess.run(
            [sys.executable, "-c", SAMPLE, *flags],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr
        found.append(json.loads(ran.stdout.splitlines()[-1]))
    (_, compiled, modules), (hits, misses, _) = found
    assert compiled > 0 and (hits, misses) == (compiled, 0)
    assert not {name.partition(".")[0] for name in modules} & HEAVY
    one, two = (np.load(tmp_path / name)["images"] for name in ("one.npz", "two.npz"))
    np.testing.assert_array_equal(one, two)


def test_programs_are_kept_in_the_users_folder_and_nobody_else_reads_it(home):
    compilation.use_cache()
    compile_one(2.25)
    assert len(programs(home)) == 1
    assert home.stat().st_mode & 0o777 == 0o700
    assert jax.config.jax_compilation_cache_max_size == compilation.BYTES


def test_what_was_used_longest_ago_goes_first(home, tmp_path, monkeypatch):
    compilation.use_cache(str(tmp_path / "given"))
    compile_one(2.5)
    (one,) = (tmp_path / "given").glob("*-cache")
    monkeypatch.setattr(compilation, "BYTES", int(1.5 * one.stat().st_size))
    compilation.use_cache()
    compile_one(3.5)
    (first,) = programs(home)
    compile_one(4.5)
    assert len(programs(home)) == 1 and first not in programs(home)


def test_a_cache_that_the_environment_leaves_without_a_bound_stays(home, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "-1")
    jax.config.update("jax_compilation_cache_max_size", -1)
    compilation.use_cache()
    compile_one(2.5)
    compilation.use_cache()
    assert len(programs(home)) == 1


def test_the_environment_wins_over_the_default_and_a_given_folder_over_both(
    home, tmp_path, monkeypatch
):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "named"))
    compilation.use_cache()
    assert not home.exists()
    compilation.use_cache(str(tmp_path / "given"))
    compile_one(2.75)
    assert len(programs(tmp_path / "given")) == 1 and not home.exists()
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "5")
    before = jax.config.jax_compilation_cache_max_size
    compilation.use_cache()
    assert home.exists() and jax.config.jax_compilation_cache_max_size == before


def test_a_cache_folder_that_cannot_be_written_is_no_error(home, tmp_path):
    (tmp_path / "home").write_text("a file")
    before = jax.config.jax_compilation_cache_dir
    compilation.use_cache()
    compile_one(3.25)
    assert jax.config.jax_compilation_cache_dir == before


def test_half_a_program_of_a_killed_process_is_no_obstacle(home):
    compilation.use_cache()
    compile_one(4.25)
    (whole,) = programs(home)
    (home / "half-cache").write_bytes(b"half")  # its time of use was to be written next
    compilation.use_cache()
    compile_one(5.25)
    assert whole in programs(home) and len(programs(home)) == 2
    assert not (home / "half-cache").exists()
