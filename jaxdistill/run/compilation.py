"""The cache of compiled programs."""

import os

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxdistill.run.workdir import user_cache

BYTES = 2**30
"""What the cache holds at most; the least used programs go first."""


def use_cache(folder: str = "") -> None:
    """Keep compiled programs in `folder`, by default in the user's cache folder.

    What the environment names ($JAX_COMPILATION_CACHE_DIR) wins over the default.
    """
    if not folder and os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    jax.config.update("jax_compilation_cache_dir", folder or str(user_cache() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # what was compiled before has settled that there is none
