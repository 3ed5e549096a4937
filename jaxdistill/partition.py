"""The device mesh, and where arrays live on it: batches over "data" and "fsdp", parameters by rules
over "fsdp" and "tensor".
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxdistill.errors import UserError
from jaxdistill.model import unstacked

AXES = ("data", "fsdp", "tensor")
"""The batch is divided over the first two, parameters over the last two."""

ROWS = PartitionSpec(("data", "fsdp"))

Rule = tuple[str, Sequence[str | None]]
"""A regular expression of the path, and the mesh axes of the last dimensions of what it finds; ()
is a copy on each device.
"""

RULES: tuple[Rule, ...] = (
    (r"^null/", ()),  # the null conditioning beside a teacher: one row
    # The second of two layers takes what the first has divided, so that one sum over "tensor"
    # serves both.
    (
        r"(^|[/.])(to_out\.0|to_add_out|net\.2|fc2|out_proj|proj_out|linear_2|conv2"
        r"|w2|wo|o|o_proj|down_proj)/kernel$",
        ("tensor", "fsdp"),
    ),
    (r"(kernel|embedding|down|up)$", ("fsdp", "tensor")),
    (r"pos_embed$", ("fsdp", None)),
    (r"(scale|bias|scale_shift_table|pad_token)$", ()),
)
"""For the networks of this package, their optimizer states and averages."""


def mesh_sizes(devices: int, data: int = -1, fsdp: int = 1, tensor: int = 1) -> dict[str, int]:
    """{"data", "fsdp", "tensor"} of a mesh of so many devices; one size may be -1: what the others
    leave.

    Raises ValueError where the sizes do not make up the number of devices.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"the mesh ({shown}) must have positive sizes, and -1 at most once")
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if devices % fixed or (not free and fixed != devices):
        mend = (
            f"make {free[0]} x {fixed} = {devices}" if free else f"their product must be {devices}"
        )
        raise ValueError(f"the mesh ({shown}) does not divide the {devices} devices; {mend}")
    return sizes | {name: devices // fixed for name in free}


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[Any] | None = None
) -> Mesh:
    """Devices as [data, fsdp, tensor]; see `mesh_sizes`. Raises ValueError."""
    found = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(len(found), data, fsdp, tensor)
    # Not every kind of chip says its slice where there is only one.
    slices = (
        len({getattr(device, "slice_index", 0) for device in found})
        if found[0].platform == "tpu"
        else 1
    )
    if sizes["data"] % slices:
        shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(
            f"the mesh ({shown}) must divide data over the {slices} slices: only gradients should"
            " travel between them"
        )
    # Chips that are near on the torus become neighbours on the mesh; an axis of the torus may be
    # divided among axes of the mesh.
    within = (sizes["data"] // slices, sizes["fsdp"], sizes["tensor"])
    arrange = partial(mesh_utils.create_device_mesh, within, allow_split_physical_axes=True)
    if slices > 1:
        arrange = partial(
            mesh_utils.create_hybrid_device_mesh,
            within,
            (slices, 1, 1),
            allow_split_physical_axes=True,
        )
    arranged = arrange(devices=found)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * 3)


def data_mesh() -> Mesh:
    """All devices on "data"."""
    return make_mesh()


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The leading axis divided over "data" and "fsdp"."""
    return NamedSharding(mesh, ROWS)


def parts(mesh: Mesh | AbstractMesh) -> int:
    """Into how many a batch is divided."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """A copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def constrain_batch(mesh: Mesh | AbstractMesh) -> Callable[[Array], Array]:
    """The sharding constraint for noise and other random batches, which raises UserError where the
    devices cannot have equal parts of the rows.
    """

    def constrain(x: Array) -> Array:
        if x.shape[0] % parts(mesh):
            raise UserError(
                f"{x.shape[0]} rows do not divide evenly among {parts(mesh)} devices: each must get"
                " config.student.batch_size / config.student.accumulate / devices rows, a multiple"
                " of the grids that share a batch"
            )
        return jax.lax.with_sharding_constraint(x, batch_sharding(mesh))

    return constrain


# --------------------------------------------------------------------------------------- parameters


def path_name(path: Any) -> str:
    """A leaf's path as "params/student/.../kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def sharding_of(
    name: str,
    shape: Sequence[int],
    mesh: Mesh | AbstractMesh,
    rules: Sequence[Rule] = RULES,
    *,
    smallest: int = 65536,
) -> NamedSharding:
    """Where one array lives: by the first rule whose expression is found in its name.

    Arrays below `smallest` elements are copied: gathering them costs more than it saves. An axis
    that does not divide its dimension takes another that the rule leaves free, or is left out.

    Raises:
      ValueError: an array of at least `smallest` elements that no rule names, or that its rule
        leaves whole though it means not to.
    """
    divided = mesh.size // mesh.shape["data"]
    if divided == 1 or int(np.prod(shape)) < smallest:
        return replicated(mesh)
    axes = next((axes for expression, axes in rules if re.search(expression, name)), None)
    shown = f"{name} {list(shape)} ({4 * int(np.prod(shape)) / 2**20:.0f} MiB in float32)"
    if axes is None:
        raise ValueError(
            f"no partition rule names {shown}; add one to config.mesh.rules: (expression, axes of"
            " its last dimensions)"
        )
    if not axes:
        return replicated(mesh)
    found: list[str | None] = [None] * len(shape)
    last = range(1, min(len(axes), len(shape)) + 1)
    for i, axis in enumerate(reversed(axes), 1):
        if axis is None or mesh.shape[axis] == 1:
            continue
        # Its own dimension first, else another that divides: a first convolution has four channels
        # in.
        for j in (*(j for j in last if j == i), *(j for j in last if j != i)):
            if (
                found[-j] is None
                and shape[-j] % mesh.shape[axis] == 0
                and (j == i or _free(axes, j, mesh))
            ):
                found[-j] = axis
                break
    if not any(found):
        wanted = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in axes if axis is not None)
        raise ValueError(
            f"{shown} does not divide over {wanted}; choose other mesh sizes or add a rule to"
            " config.mesh.rules"
        )
    return NamedSharding(mesh, PartitionSpec(*found))


def _free(axes: Sequence[str | None], j: int, mesh: Mesh | AbstractMesh) -> bool:
    """Whether the rule means no axis of this mesh for the j-th last dimension."""
    axis = axes[-j]
    return axis is None or mesh.shape[axis] == 1


def shardings(
    tree: Any, mesh: Mesh | AbstractMesh, rules: Sequence[Rule] = RULES, *, smallest: int = 65536
) -> Any:
    """A tree of `sharding_of` for arrays or ShapeDtypeStructs. Raises ValueError."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: sharding_of(path_name(path), leaf.shape, mesh, rules, smallest=smallest),
        tree,
    )


def _cast(leaf: Any, dtype: Any) -> Any:
    """Before it travels: half the bytes. The layers would cast to it anyway."""
    return leaf if dtype is None or leaf.dtype != np.float32 else leaf.astype(dtype)


def _exchanged(
    leaf: Any, after: Any, dtype: Any, divided: NamedSharding, whole: NamedSharding
) -> Any:
    """A divided array made whole; its gradient is summed into the parts.

    Not before `after`: else JAX takes it out of a loop around the loop over blocks, as the same in
    each round, and keeps all blocks whole.
    """

    @jax.custom_vjp
    def gather(leaf: Any, after: Any) -> Any:
        leaf, _ = jax.lax.optimization_barrier((leaf, after))
        return jax.lax.with_sharding_constraint(_cast(leaf, dtype), whole)

    def sum_into_parts(_: None, gradient: Any) -> tuple[Any, Any]:
        parts = jax.lax.with_sharding_constraint(gradient, divided).astype(leaf.dtype)
        return parts, jax.tree.map(jnp.zeros_like, after)

    gather.defvjp(lambda *arrays: (gather(*arrays), None), sum_into_parts)
    return gather(leaf, after)


class Layout:
    """A mesh with the rules of the parameters on it."""

    def __init__(
        self, mesh: Mesh | AbstractMesh, rules: Sequence[Rule] = RULES, *, smallest: int = 65536
    ) -> None:
        """On an abstract mesh arrays are described and programs traced, and no more."""
        self.mesh, self.rules, self.smallest = cast(Mesh, mesh), tuple(rules), smallest

    def of(self, tree: Any) -> Any:
        """The shardings of a tree of parameters, or of anything with the same paths in it.

        Raises ValueError.
        """
        return shardings(tree, self.mesh, self.rules, smallest=self.smallest)

    def gathered(self, tree: Any, dtype: Any = None) -> Any:
        """Parameters inside a jitted function as the networks use them: whole over "fsdp", kernels
        in `dtype`. Those of stacked blocks stay divided: see `gathered_block`.

        Without it the compiler may divide a layer's sum over "fsdp" instead, and compute the
        batch's rows on every device: values agree, and the cost does not fall. Their gradient comes
        back divided.
        """
        if self.mesh.shape["fsdp"] == 1:
            return tree

        def one(path: Any, leaf: Any, sharding: NamedSharding) -> Any:
            if "fsdp" not in sharding.spec or unstacked(path_name(path).split("/")):
                return leaf
            cast = _cast(leaf, dtype)
            return jax.lax.with_sharding_constraint(cast, self._whole(sharding.spec))

        return jax.tree_util.tree_map_with_path(one, tree, self.of(tree))

    def gathered_block(
        self, tree: Any, after: Any, name: str, length: int, dtype: Any = None
    ) -> Any:
        """The same for one block's parameters, inside the loop over the `length` that are stacked
        at `name`: never more than one block is whole. `after` is what the round begins with.
        """

        def one(path: Any, leaf: Any) -> Any:
            shape = (length, *leaf.shape)
            stacked = sharding_of(
                f"{name}/{path_name(path)}", shape, self.mesh, self.rules, smallest=self.smallest
            )
            if "fsdp" not in stacked.spec:
                return leaf
            spec = tuple(stacked.spec)[1:]
            divided = NamedSharding(self.mesh, PartitionSpec(*spec))
            return _exchanged(leaf, after, dtype, divided, self._whole(spec))

        return jax.tree_util.tree_map_with_path(one, tree)

    def _whole(self, spec: Iterable[Any]) -> NamedSharding:
        kept = (None if axis == "fsdp" else axis for axis in spec)
        return NamedSharding(self.mesh, PartitionSpec(*kept))

    def describe(self, tree: Any) -> Any:
        """The tree as ShapeDtypeStructs with their shardings, which is what a compiler needs."""
        return jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, self.of(tree)
        )

    def place(self, tree: Any) -> Any:
        """Arrays of the host or the devices onto the mesh; every process must hold the same."""
        return jax.tree.map(put, tree, self.of(tree))


def layout(
    block: Mapping[str, Any] | None = None, *, devices: Sequence[Any] | int | None = None
) -> Layout:
    """{"data", "fsdp", "tensor", "smallest", "rules"}, config.mesh, as a Layout; None is data
    parallel. A number of devices makes an abstract mesh. Raises ValueError.
    """
    given = dict(block or {})
    rules, smallest = tuple(given.pop("rules", ())), int(given.pop("smallest", 65536))
    for expression, axes in rules:
        unknown = [axis for axis in axes if axis not in (None, *AXES[1:])]
        if unknown:
            raise ValueError(
                f"config.mesh.rules: {expression!r} names the axis {unknown[0]!r}; choose fsdp,"
                " tensor or None"
            )
        try:
            re.compile(expression)
        except re.error as error:
            raise ValueError(
                f"config.mesh.rules: {expression!r} is not a regular expression ({error})"
            ) from None
    mesh: Mesh | AbstractMesh
    if isinstance(devices, int):
        sizes = tuple(mesh_sizes(devices, **given).values())
        mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)
    else:
        mesh = make_mesh(**given, devices=devices)
    return Layout(mesh, (*rules, *RULES), smallest=smallest)


# ------------------------------------------------------------------------------------- arrays on it


def put(value: Any, sharding: NamedSharding) -> Any:
    """One array onto the mesh.

    In many processes each puts its own part of the same value, which may be an array that is there
    already.
    """
    if isinstance(value, jax.Array) and value.sharding == sharding:
        return value
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        data = put(jax.random.key_data(value), sharding)
        return jax.jit(jax.random.wrap_key_data, out_shardings=sharding)(data)
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


_LAYOUT: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextlib.contextmanager
def on_mesh(layout: Layout | None) -> Iterator[None]:
    """Within a program: the flash kernel asks for the mesh, where there are several devices, and a
    loop over stacked blocks for the layout.
    """
    if layout is None:
        yield
        return
    before = _LAYOUT.set(layout)
    try:
        with jax.sharding.use_abstract_mesh(layout.mesh.abstract_mesh):
            yield
    finally:
        _LAYOUT.reset(before)


def gather_of_blocks(name: str, length: int, dtype: Any) -> Callable[..., Any] | None:
    """`Layout.gathered_block` of the layout that a program is on; None where nothing is divided
    over "fsdp".
    """
    layout = _LAYOUT.get()
    if layout is None or layout.mesh.shape["fsdp"] == 1:
        return None
    return partial(layout.gathered_block, name=name, length=length, dtype=dtype)


def own_layout(layout: Layout, process: int | None = None) -> Layout:
    """Where a process, by default this one, computes by itself: on the mesh, or as one of several
    with its own devices side by side.
    """
    process = jax.process_index() if process is None else process
    own = [device for device in layout.mesh.devices.flat if device.process_index == process]
    return layout if len(own) == layout.mesh.size else Layout(make_mesh(devices=own))


def described(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays, or their shapes, as ShapeDtypeStructs that all live so."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


def local(tree: Any, mesh: Mesh | None = None) -> Any:
    """Arrays of all processes as arrays of this one, gathered where they are divided.

    All processes must call it.

    They come on its first device or, with the mesh of its devices, as the copies that each of these
    holds already.
    """

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        if not leaf.is_fully_replicated:
            assert isinstance(leaf.sharding, NamedSharding)
            leaf = jax.device_put(
                leaf, replicated(leaf.sharding.mesh)
            )  # no program to compile for each shape
        if mesh is None:
            return leaf.addressable_data(0)
        copies = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, replicated(mesh), copies)

    return jax.tree.map(one, tree)


def process_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a global batch that this process provides, in order."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    rows = np.arange(batch_size)
    return np.unique(np.concatenate([rows[index] for index in indices if index is not None]))


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's rows of a host batch onto the mesh."""
    rows = batch_sharding(mesh)
    if rows.is_fully_addressable:
        return jax.device_put(batch, rows)
    return jax.tree.map(partial(jax.make_array_from_process_local_data, rows), batch)


def jit_train_step(
    step: Callable[..., Any], mesh: Mesh | AbstractMesh, state: Any = None, teacher: Any = None
) -> Callable[..., Any]:
    """Jit (state, batch, teacher_params) -> (state, metrics) on the mesh; the state is donated, the
    teacher never.

    `state` and `teacher` are trees of shardings, as of `Layout.of`; None is a copy on each device.
    """
    whole = replicated(mesh)
    state, teacher = whole if state is None else state, whole if teacher is None else teacher
    return jax.jit(
        step,
        in_shardings=(state, batch_sharding(mesh), teacher),
        out_shardings=(state, whole),
        donate_argnums=0,
    )


def check_batch(batch_size: int, mesh: Mesh | AbstractMesh, name: str) -> None:
    """Raise ValueError where a batch does not divide over the mesh's "data" and "fsdp"."""
    count = parts(mesh)
    if batch_size < 1 or batch_size % count:
        shown = (
            f"{count} devices"
            if mesh.shape["tensor"] == 1
            else f"{count} parts of the mesh (data x fsdp)"
        )
        raise ValueError(f"{name} = {batch_size} must be a positive multiple of the {shown}")
