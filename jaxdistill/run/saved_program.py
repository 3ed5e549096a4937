"""A compiled training step as a file: made by `jaxdistill.aot --save`, loaded by a run that then
need not compile.

One line of JSON says what it is for, and what follows it is JAX's. JAX unpickles that: load only
files that you made.
"""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Mapping
from typing import Any

from jax.experimental import serialize_executable
from jax.sharding import Mesh

from jaxdistill.run.checkpoint import not_written, put_whole, store, told, within
from jaxdistill.tasks.labelled_images.experiment import flatten

FORMAT = "jaxdistill-program/1"

MEND = (
    "compile it here and now with `python -m jaxdistill.aot ... --save=FILE`, or leave"
    " config.compute.program empty"
)

ELSEWHERE = (
    "compute.program",
    "compute.compilation_cache",
    "data.prompts",
    "data.images",
    "data.cache",
    "data.tfds_dir",
    "teacher.folder",
)
"""Keys that no program depends on; those of config.log and config.export neither."""


class ProgramError(ValueError):
    """A saved program that cannot be used, in one line."""


def surroundings(mesh: Mesh) -> dict[str, Any]:
    """What a compiled program is tied to: versions, the kind of chip, and which chip stands where
    on the mesh.
    """
    devices = list(mesh.devices.flat)
    packages = ("jax", "jaxlib", *(("libtpu",) if devices[0].platform == "tpu" else ()))
    found = {
        **{name: importlib.metadata.version(name) for name in packages},
        "the kind of device": devices[0].device_kind,
        "the mesh": dict(mesh.shape),
        "the chips' order": [
            [d.id, *getattr(d, "coords", ()), getattr(d, "slice_index", 0)] for d in devices
        ],
    }
    # The CPU's compiler uses whatever instructions the machine has.
    return found | ({"the machine": platform.node()} if devices[0].platform == "cpu" else {})


def step_hash(lowered: Any) -> str:
    """Of the step as it is given to the compiler, with the structure of its arguments."""
    return hashlib.sha256(f"{lowered.in_tree}\n{lowered.as_text()}".encode()).hexdigest()


def save(path: str, lowered: Any, compiled: Any, mesh: Mesh, config: Mapping[str, Any]) -> None:
    """Write `lowered.compile()`, which is `compiled`.

    `config` is only for the message where it does not fit. Raises CheckpointError.
    """
    payload, _, _ = serialize_executable.serialize(compiled)
    header = {
        "format": FORMAT,
        **surroundings(mesh),
        "step": step_hash(lowered),
        "config": dict(config),
        "sha256": hashlib.sha256(payload).hexdigest(),
    }
    files, place = store(path)
    try:
        put_whole(files, place, json.dumps(header).encode() + b"\n" + payload)
    except Exception as error:  # a bucket's library has many
        raise not_written(f"write {path}", error) from None


def load(path: str, lower: Callable[[], Any], mesh: Mesh, config: Mapping[str, Any]) -> Any:
    """The program of `lower()` from a file, to be called as what it was compiled from.

    Raises ProgramError where the file cannot be read, is damaged, or is of another step, other
    versions or other devices.
    """
    name = f"config.compute.program = {path}"
    try:
        files, place = store(path)
        within(lambda: files.info(place))  # to say soon that nothing answers
        head, _, payload = files.cat_file(place).partition(b"\n")
    except Exception as error:  # a bucket's library has many
        raise ProgramError(f"{name} cannot be read ({told(error)}); {MEND}") from None
    try:
        header = json.loads(head)
        if header["format"] != FORMAT or header["sha256"] != hashlib.sha256(payload).hexdigest():
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise ProgramError(f"{name} is damaged or no saved program; {MEND}") from None
    for key, here in json.loads(json.dumps(surroundings(mesh))).items():
        if header.get(key) != here:
            raise ProgramError(
                f"{name} does not fit: {key} is {header.get(key)} there, {here} here; {MEND}"
            )
    lowered = lower()
    if header["step"] != step_hash(lowered):
        raise ProgramError(
            f"{name} is of another training step ({differences(header['config'], config)}); {MEND}"
        )
    try:
        devices = list(mesh.devices.flat)
        return serialize_executable.deserialize_and_load(
            payload,
            lowered.in_tree,
            lowered.out_tree,
            backend=devices[0].client,
            execution_devices=devices,
        )
    except Exception as error:  # the runtime has many, and all mean the same
        raise ProgramError(f"{name} cannot be loaded ({told(error)}); {MEND}") from None


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The keys of two configs that differ and may change the step."""
    a, b = flatten(there), flatten(json.loads(json.dumps(here)))
    keys = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
    keys = [k for k in keys if k not in ELSEWHERE and not k.startswith(("log.", "export."))]
    return (
        ", ".join(f"config.{k} = {a.get(k)} there, {b.get(k)} here" for k in keys[:5])
        or "of other code, or another folder's network"
    )
