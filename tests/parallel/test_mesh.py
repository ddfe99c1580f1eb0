"""Meshes: sizes, axes, row sharding."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from parallel.mesh import (
    AXES,
    MeshShape,
    batch_sharding,
    make_mesh,
    place_rows,
    replicated,
    row_shards,
    row_share,
)


def test_every_axis_is_there_and_automatic():
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    assert mesh.axis_names == AXES == ("data", "fsdp", "context", "tensor", "expert", "stage")
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert row_shards(mesh) == 1


def test_product_and_devices_must_agree():
    with pytest.raises(
        ValueError, match=r"data=2 \* tensor=3 needs 6 devices, but 1 are there.*product is 1"
    ):
        make_mesh(MeshShape(data=2, tensor=3), jax.devices()[:1])


def test_sizes_are_positive_integers():
    with pytest.raises(ValueError, match=r"mesh\.fsdp=0"):
        MeshShape(fsdp=0)
    assert MeshShape(data=2, fsdp=3, stage=2).size == 12


def test_rows_go_over_data_fsdp_and_expert():
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    assert batch_sharding(mesh).spec == jax.P(("data", "fsdp", "expert"))
    assert replicated(mesh).is_fully_replicated


def test_one_process_reads_every_row():
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    assert row_share(mesh) == (0, 1)
    rows = np.arange(12).reshape(4, 3)
    np.testing.assert_array_equal(place_rows(mesh, rows), rows)
