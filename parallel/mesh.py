"""Device meshes: one shape, one order of axes, one place for rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "context", "tensor", "expert", "stage")


@dataclass(frozen=True)
class MeshShape:
    """Devices along each axis; the product is the number of devices.

    Attributes:
        data: replicas that see other rows.
        fsdp: replicas that see other rows and hold a share of the parameters.
        context: shares of one sequence.
        tensor: shares of one layer's matrices.
        expert: shares of the experts.
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
                raise ValueError(f"mesh {axis.name}={size!r}: must be an integer of at least 1")

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


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp, everything else whole: for each [B, ...] leaf of a batch."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def row_shards(mesh: Mesh) -> int:
    """Shares into which the rows of a batch are cut; must divide the batch size."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
