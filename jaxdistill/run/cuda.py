"""NVIDIA GPUs: what stands between them and JAX, in one line before JAX looks for devices.

JAX itself logs a traceback, or nothing, and goes on with the CPU.
"""

import ctypes
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax

from jaxdistill.errors import UserError

NODES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")
"""Where JAX looks for a GPU: of Linux, of a container, of WSL2."""
DRIVERS = {12: 525, 13: 580}
"""CUDA's major version -> the first NVIDIA driver that runs it."""


class Machine(NamedTuple):
    """What decides whether JAX can have the GPUs.

    plugins: CUDA's major versions for which JAX has a plugin here; driver: the newest CUDA that the
    machine's driver runs, as 1000 * major + 10 * minor, None without one; visible: whether there is
    a GPU; hidden: CUDA_VISIBLE_DEVICES where it hides all of them.
    """

    plugins: tuple[int, ...]
    driver: int | None
    visible: bool
    hidden: str | None = None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of its parent
        return False


def _driver() -> int | None:
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed or not version.value else version.value


def this_machine() -> Machine:
    """This one; starts no device."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return Machine(
        tuple(n for n in DRIVERS if _is_installed(f"jax_plugins.xla_cuda{n}")),
        _driver(),
        any(Path(node).exists() for node in NODES),
        listed if listed is not None and listed.strip() in ("", "-1", "NoDevFiles") else None,
    )


def obstacle(machine: Machine) -> str:
    """Why JAX cannot have the GPUs although it has a plugin for them, and the mend; or nothing."""
    if not machine.plugins:
        return ""
    if len(machine.plugins) > 1:
        one, other = (f"jax-cuda{n}" for n in machine.plugins)
        return (
            f"{one}-plugin and {other}-plugin are both installed, and JAX takes either by chance;"
            f" keep one: pip uninstall {one}-plugin {one}-pjrt"
        )
    (needed,) = machine.plugins
    plugin, cpu = f"jax-cuda{needed}-plugin", "JAX_PLATFORMS=cpu computes on the CPU instead"
    if not machine.visible:
        return (
            f"{plugin} is installed, and no NVIDIA GPU is here (no {NODES[0]}); a container needs"
            f" --gpus=all, a SLURM job --gpus-per-node; {cpu}"
        )
    if machine.hidden is not None:
        return (
            f"CUDA_VISIBLE_DEVICES='{machine.hidden}' hides all NVIDIA GPUs; leave it out, or list"
            f" some, such as 0,1; {cpu}"
        )
    if machine.driver is None:
        return (
            f"the NVIDIA driver does not answer (libcuda.so.1), which {plugin} needs; see what"
            f" nvidia-smi says; {cpu}"
        )
    major, minor = machine.driver // 1000, machine.driver % 1000 // 10
    if major < needed:
        instead = ', or install the extra "cuda" instead of "cuda13"' if major >= 12 else ""
        return (
            f"the NVIDIA driver runs CUDA {major}.{minor} at most, and {plugin} needs CUDA"
            f" {needed}; update the driver to {DRIVERS[needed]} or newer{instead}; {cpu}"
        )
    return ""


def choose() -> None:
    """Have JAX take the GPUs where there are some and nobody asks for another platform: then it
    raises where it cannot start them, and asks no TPU's plugin.

    Raises UserError where JAX has a plugin for GPUs that it cannot have.
    """
    asked = jax.config.jax_platforms  # type: ignore[attr-defined]
    if asked and not {"cuda", "gpu"} & set(asked.split(",")):
        return
    machine = this_machine()
    if line := obstacle(machine):
        raise UserError(line)
    if machine.plugins and not asked:
        if _is_installed("libtpu"):
            print(
                "note: the extras for CUDA and for TPUs are both installed: this takes the NVIDIA"
                " GPU, and libtpu is for jaxdistill.aot; JAX_PLATFORMS chooses otherwise",
                file=sys.stderr,
            )
        jax.config.update("jax_platforms", "cuda,cpu")


@contextmanager
def quiet_plugins() -> Iterator[Sequence[str]]:
    """Within, JAX logs no traceback of a plugin that cannot start; gives what it would have said,
    the first line of each.
    """
    said: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            said.append((str(error).splitlines() or [type(error).__name__])[0][:200])
        return error is None

    logger = logging.getLogger("jax._src.xla_bridge")
    logger.addFilter(keep)
    try:
        yield said
    finally:
        logger.removeFilter(keep)
