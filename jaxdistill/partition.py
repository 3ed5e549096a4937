"""The device mesh and where arrays live on it. Now: data parallel, parameters replicated."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array


def data_mesh() -> Mesh:
    """All devices on one axis, "data"."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis divided over "data"."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def constrain_batch(mesh: Mesh) -> Callable[[Array], Array]:
    """The sharding constraint for noise and other random batches."""
    return lambda x: jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """A host batch onto the mesh."""
    return jax.device_put(batch, batch_sharding(mesh))


def jit_train_step(step: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Jit (state, batch, teacher_params) -> (state, metrics) on the mesh; the state is donated, the teacher never."""
    whole, rows = replicated(mesh), batch_sharding(mesh)
    return jax.jit(step, in_shardings=(whole, rows, whole), out_shardings=(whole, whole), donate_argnums=0)


def check_batch(batch_size: int, mesh: Mesh, name: str) -> None:
    """Raise ValueError where a batch does not divide over the mesh's data axis."""
    devices = int(np.prod(list(mesh.shape.values())))
    if batch_size < 1 or batch_size % devices:
        raise ValueError(f"{name} = {batch_size} must be a positive multiple of the {devices} devices")
