"""The user's cache folder, and in it the compiled programs."""

import hashlib
import os
import platform
from pathlib import Path

import jax
from filelock import FileLock
from jax.experimental.compilation_cache import compilation_cache

from jaxdistill.errors import UserError
from jaxdistill.run import cuda

KEEP_ALL = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
"""JAX's settings that keep small programs, too."""
BYTES = 2**30
"""What the user's cache holds at most, a CPU; the programs that were not used for longest go first.

The programs of a small student take less than a megabyte in all: a thousand of them fit.
"""
LOCK_SECONDS = 10
"""How long another process may hold the cache; JAX waits as long."""


def user_cache() -> Path:
    """The folder of what can be made again: $XDG_CACHE_HOME/jaxdistill or ~/.cache/jaxdistill."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxdistill"


def check_devices() -> None:
    """Start JAX's devices. Raises UserError where those are not here that JAX_PLATFORMS asks for,
    or that JAX has a plugin for.
    """
    cuda.choose()
    try:
        with cuda.quiet_plugins() as said:
            jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where JAX has no such plug-in
        why = (said or str(error).splitlines() or [""])[0][:200]
        asked = os.environ.get("JAX_PLATFORMS", "")
        start = f"JAX_PLATFORMS={asked}: JAX finds no such device here"
        mend = "install jax for it, or leave JAX_PLATFORMS out"
        if not asked:
            start = "JAX cannot start the devices that it is installed for"
            mend = "see docs/gpu.md, or set JAX_PLATFORMS=cpu to compute on the CPU"
        raise UserError(f"{start}{f' ({why})' if why else ''}; {mend}") from None


def use_cache(folder: str = "") -> None:
    """Keep compiled programs in `folder`, by default in the user's cache folder, `xla/CPU`.

    What the environment says ($JAX_COMPILATION_CACHE_DIR and JAX's other variables) wins over the
    default. A cache folder that cannot be written or locked is no error: nothing is kept.
    """
    settings = dict(KEEP_ALL)
    if not folder:
        if "JAX_COMPILATION_CACHE_DIR" in os.environ:
            return
        default = user_cache() / "xla" / cpu()
        try:
            default.mkdir(mode=0o700, parents=True, exist_ok=True)  # JAX runs what it reads there
            drop_half_written(default)
        except (OSError, RuntimeError):
            return
        folder, settings["jax_compilation_cache_max_size"] = str(default), BYTES
    jax.config.update("jax_compilation_cache_dir", folder)
    for name, value in settings.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    compilation_cache.reset_cache()  # what was compiled before has settled that there is none


def cpu() -> str:
    """Names this CPU by its instructions.

    A home may be shared by machines, and a program may hold instructions that another one lacks.
    JAX does not say that its key of a program tells them apart.
    """
    told = ("flags", "Features", "model name", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    about = [platform.machine(), *sorted({line for line in lines if line.startswith(told)})]
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:12]


def drop_half_written(folder: Path) -> None:
    """Remove the programs without a time of use, which JAX writes last: a kill came between.

    Up to 0.10.2 JAX keeps nothing more beside one (its issue 39880). Raises OSError where the
    folder cannot be written or locked.
    """
    with FileLock(folder / ".lockfile", timeout=LOCK_SECONDS):
        if "JAX_COMPILATION_CACHE_MAX_SIZE" in os.environ:
            return  # without a bound JAX writes no times
        names = set(os.listdir(folder))
        for name in names:
            key = name.removesuffix("-cache")
            if key != name and f"{key}-atime" not in names:
                (folder / name).unlink(missing_ok=True)
