"""Device meshes: one shape, one order of axes, one place for rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "context", "tensor", "expert", "stage")
# Devices along these see other rows.
ROWS = ("data", "fsdp", "expert")
# Devices along these see other tokens: those along ``context`` share the documents of the same rows.
SLOTS = (*ROWS, "context")


@dataclass(frozen=True)
class MeshShape:
    """Devices along each axis; the product is the number of devices.

    Attributes:
        data: replicas that see other rows.
        fsdp: replicas that see other rows and hold a share of the parameters.
        context: shares of the documents of the same rows.
        tensor: shares of one layer's matrices.
        expert: replicas that see other rows and have a share of the experts.
        stage: shares of the layers.
    """

    data: int = 1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1
    stage: int = 1

    def __post_init__(self) -> None:
        for axis in fields(self):
            size = getattr(self, axis.name)
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"mesh.{axis.name}={size!r}: must be an integer of at least 1")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes in the order of ``AXES``."""
        return tuple(getattr(self, name) for name in AXES)

    @property
    def size(self) -> int:
        """Number of devices."""
        return math.prod(self.sizes)


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with every axis of ``AXES``, all of type Auto.

    Args:
        shape: devices along each axis.
        devices: in mesh order, the last axis fastest; None: every device of the run, in an order that suits its
            interconnect.

    Raises:
        ValueError: the product of the sizes is not the number of devices.
    """
    given = len(jax.devices()) if devices is None else len(devices)
    if shape.size != given:
        product = " * ".join(f"{name}={size}" for name, size in zip(AXES, shape.sizes) if size > 1) or "1"
        raise ValueError(
            f"mesh: {product} needs {shape.size} devices, but {given} are there; change an axis so that the product "
            f"is {given} (data={given} alone always fits), or give the devices to use"
        )
    types = (AxisType.Auto,) * len(AXES)
    if devices is None:
        return jax.make_mesh(shape.sizes, AXES, axis_types=types)
    return Mesh(np.asarray(devices, dtype=object).reshape(shape.sizes), AXES, axis_types=types)


def abstract_mesh(shape: MeshShape) -> AbstractMesh:
    """The mesh without its devices: for counting."""
    return AbstractMesh(shape.sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over every axis whose devices see other rows, everything else whole: for each [B, ...] leaf of a batch."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def row_shards(mesh: Mesh) -> int:
    """Shares into which the rows of a batch are cut; must divide the batch size."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def row_share(mesh: Mesh) -> tuple[int, int]:
    """(i, n): this process holds the i-th of n equal slices of each batch; processes that share rows have the same i.

    Raises:
        ValueError: the mesh has no device of this process, or its rows are not one slice.
    """
    shards = row_shards(mesh)
    indices = batch_sharding(mesh).addressable_devices_indices_map((shards,)).values()
    places = sorted({index[0].indices(shards)[0] for index in indices if index is not None})
    count = len(places)
    if (
        not places
        or places != list(range(places[0], places[0] + count))
        or shards % count
        or places[0] % count
    ):
        raise ValueError(
            f"mesh: process {jax.process_index()} has the row shares {places} of {shards}, which are not one of equal "
            "slices; give make_mesh the devices process by process"
        )
    return places[0] // count, shards // count


def place_rows(mesh: Mesh, batch: Any) -> Any:
    """Arrays of the whole batch from this process's slice of its rows (:func:`row_share`), NumPy leaves [B / n, ...]."""
    sharding = batch_sharding(mesh)
    share, count = row_share(mesh)

    def placed(x: Any) -> jax.Array:
        x = np.asarray(x)
        first = share * len(x)

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(count * len(x))
            return x[start - first : stop - first]

        return jax.make_array_from_callback((count * len(x), *x.shape[1:]), sharding, part)

    return jax.tree.map(placed, batch)


def held(mesh: Mesh | AbstractMesh, spec: PartitionSpec, count: int) -> np.ndarray:
    """bool[count]: which of the entries along the first axis of an array that lies as ``spec`` says devices of this process
    hold; all of them where the mesh has no devices.
    """
    if isinstance(mesh, AbstractMesh):
        return np.ones(count, bool)
    found = np.zeros(count, bool)
    for index in NamedSharding(mesh, spec).addressable_devices_indices_map((count,)).values():
        if index is not None:
            found[index[0]] = True
    return found


def place_whole(mesh: Mesh, tree: Any, specs: Any) -> Any:
    """Arrays that lie as ``specs`` say, of NumPy leaves of their full shape, in which every process has what its own devices hold.

    Args:
        mesh: of all processes.
        tree: arrays.
        specs: a PartitionSpec, or a tree of them, each for all leaves below it.
    """

    def placed(spec: PartitionSpec, x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])

    leaf = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    return jax.tree.map(
        lambda spec, part: jax.tree.map(partial(placed, spec), part), specs, tree, is_leaf=leaf
    )
