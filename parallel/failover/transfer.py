"""The state of the run from the member that is furthest to those that lack it: over the collectives, bit by bit."""

import json
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# 32-bit words that travel at once: 64 MiB.
CHUNK = 1 << 24


@dataclass(frozen=True)
class Carried:
    """A state that all members have.

    Attributes:
        step: batches that it was trained on.
        leaves: of the state, NumPy.
        notes: what belongs to it beside the arrays.
        source: rank of the member whose state it is.
        receivers: ranks that lacked it.
        bytes: that were sent to them.
        seconds: that this took.
    """

    step: int
    leaves: list[np.ndarray]
    notes: dict[str, Any]
    source: int
    receivers: tuple[int, ...]
    bytes: int
    seconds: float


def host_leaves(tree: Any) -> list[np.ndarray]:
    """Leaves as NumPy copies, of arrays that every process has whole; can be read even after a collective has failed."""
    # A copy: on CPUs NumPy would share the memory of an array whose device is about to go.
    return [
        np.array(leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf)
        for leaf in jax.tree.leaves(tree)
    ]


def checksum(leaves: Sequence[np.ndarray]) -> int:
    """CRC of the bytes of arrays, and of their shapes and dtypes."""
    value = 0
    for leaf in leaves:
        value = zlib.crc32(f"{leaf.shape}{leaf.dtype}".encode(), value)
        value = zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8).reshape(-1).data, value)
    return value


def carry(
    step: int | None, leaves: Sequence[np.ndarray] | None, notes: dict[str, Any] | None, like: Any
) -> Carried | None:
    """Give every member the state of the one that is furthest; all members have to call it.

    Args:
        step: of this process's state; None: it has none.
        leaves: of it (:func:`host_leaves`).
        notes: plain JSON values that go with it.
        like: tree of arrays or ShapeDtypeStructs as the state has.

    Returns:
        the state of the member with the largest step, of those the lowest rank; None: nobody has one.
    """
    begin = time.perf_counter()
    shapes = [(tuple(x.shape), np.dtype(x.dtype)) for x in jax.tree.leaves(like)]
    text = b"" if step is None else json.dumps(notes or {}).encode()
    mine = np.zeros(4, np.uint32)
    if step is not None:
        assert leaves is not None
        mine[:] = step + 1, checksum(leaves), len(text), zlib.crc32(text)
    each = _gathered(mine)
    source = int(np.argmax(each[:, 0]))
    if each[source, 0] == 0:
        return None
    receivers = tuple(int(rank) for rank in np.flatnonzero((each != each[source]).any(axis=1)))
    sent = 0
    if receivers:
        here = jax.process_index() == source
        sizes = [int(np.prod(shape)) * dtype.itemsize for shape, dtype in shapes]
        total, length = sum(sizes), int(each[source, 2])
        flat = np.zeros(-(-(total + length) // 4) * 4, np.uint8)
        if here:
            assert leaves is not None
            parts = [np.ascontiguousarray(leaf).view(np.uint8).reshape(-1) for leaf in leaves]
            flat[: total + length] = np.concatenate([*parts, np.frombuffer(text, np.uint8)])
        flat = _broadcast(flat.view(np.uint32), here).view(np.uint8)
        cuts = np.split(flat[:total], np.cumsum(sizes)[:-1])
        leaves = [cut.view(dtype).reshape(shape) for cut, (shape, dtype) in zip(cuts, shapes)]
        notes = json.loads(flat[total : total + length].tobytes())
        sent = total + length
        if checksum(leaves) != int(each[source, 1]):
            raise RuntimeError(f"the state of step {each[source, 0] - 1} did not arrive as it was sent")
    assert leaves is not None
    taken = time.perf_counter() - begin
    return Carried(int(each[source, 0]) - 1, list(leaves), notes or {}, source, receivers, sent, taken)


def _mesh() -> Mesh:
    """One device of every process, in the order of ranks."""
    first: dict[int, Any] = {}
    for device in jax.devices():
        first.setdefault(device.process_index, device)
    return Mesh(np.asarray([first[rank] for rank in sorted(first)]), ("all",))


def _summed(row: np.ndarray, mesh: Mesh) -> np.ndarray:
    """The sum over processes of an array of 32-bit words: exact, whatever the bits mean."""
    over = NamedSharding(mesh, PartitionSpec("all"))
    each = jax.make_array_from_callback((mesh.size, *row.shape), over, lambda index: row[None])
    whole = jax.jit(
        lambda x: jnp.sum(x, axis=0, dtype=x.dtype), out_shardings=NamedSharding(mesh, PartitionSpec())
    )
    return np.array(whole(each).addressable_data(0))


def _gathered(row: np.ndarray) -> np.ndarray:
    """[processes, ...]: the row of every process."""
    mesh = _mesh()
    table = np.zeros((mesh.size, *row.shape), np.uint32)
    table[jax.process_index()] = row
    return _summed(table, mesh)


def _broadcast(words: np.ndarray, here: bool) -> np.ndarray:
    """The words of the one process where ``here``; others give zeros of the same length."""
    mesh = _mesh()
    assert here or not words.any()
    parts = [_summed(words[first : first + CHUNK], mesh) for first in range(0, len(words), CHUNK)]
    return np.concatenate(parts)
