"""The state of the run from the members that are furthest to those that lack it: over the collectives, bit by bit.

It has parts. Where everybody trains the whole model there is one; in a pipeline a stage is one, and nobody may have all of
the last step: then all go on from the step before, which members keep until it is certain that nobody needs it.
"""

import json
import math
import time
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# 32-bit words that travel at once: 64 MiB.
CHUNK = 1 << 24
# Steps of which a member can hold the state: the last one, and the one before.
VERSIONS = 2


class Version(NamedTuple):
    """What a member has of the state after a step.

    Attributes:
        step: batches that it was trained on.
        parts: leaves of those parts that it has, NumPy, by the part's number.
        notes: plain JSON values that go with it.
    """

    step: int
    parts: Mapping[int, Sequence[np.ndarray]]
    notes: dict[str, Any]


@dataclass(frozen=True)
class Carried:
    """A state of which all members have what they want.

    Attributes:
        step: batches that it was trained on.
        parts: leaves of the parts that this member wanted, NumPy.
        notes: what belongs to it beside the arrays.
        sources: rank of the member whose copy of each part it is.
        receivers: ranks that wanted each part and lacked it.
        bytes: of parts that were sent.
        seconds: that this took.
    """

    step: int
    parts: dict[int, list[np.ndarray]]
    notes: dict[str, Any]
    sources: dict[int, int]
    receivers: dict[int, tuple[int, ...]]
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


class _Row(NamedTuple):
    """What every member tells the others, 32-bit words; a step is counted from 1, 0 where there is none."""

    steps: np.ndarray  # [.., VERSIONS]
    notes: np.ndarray  # [.., VERSIONS, 2]; bytes and CRC
    has: np.ndarray  # [.., VERSIONS, P]
    sums: np.ndarray  # [.., VERSIONS, P]
    wants: np.ndarray  # [.., P]

    @classmethod
    def shapes(cls, parts: int) -> list[tuple[int, ...]]:
        return [(VERSIONS,), (VERSIONS, 2), (VERSIONS, parts), (VERSIONS, parts), (parts,)]


def carry(held: Sequence[Version], wanted: Collection[int], like: Mapping[int, Any]) -> Carried | None:
    """Give every member the parts that it wants, of the last step of which all are there; all members have to call it.

    Args:
        held: what this process has, at most of two steps.
        wanted: parts that it needs; it may have others.
        like: tree of arrays or ShapeDtypeStructs of every part there is, the same in every process.

    Returns:
        parts as the lowest rank has them that has them of that step; None: there is no step of which every part is left.

    Raises:
        RuntimeError: something did not arrive as it was sent.
    """
    begin = time.perf_counter()
    names = sorted(like)
    texts = [json.dumps(version.notes).encode() for version in held]
    mine = _Row(*(np.zeros(shape, np.uint32) for shape in _Row.shapes(len(names))))
    for at, (version, text) in enumerate(zip(held, texts, strict=True)):
        mine.steps[at] = version.step + 1
        mine.notes[at] = len(text), zlib.crc32(text)
        for part, name in enumerate(names):
            if name in version.parts:
                mine.has[at, part], mine.sums[at, part] = 1, checksum(version.parts[name])
    mine.wants[:] = [name in wanted for name in names]
    flat = _gathered(np.concatenate([field.ravel() for field in mine]))
    sizes = [field.size for field in mine]
    cuts = np.split(flat, np.cumsum(sizes)[:-1], axis=1)
    each = _Row(*(cut.reshape(-1, *field.shape) for cut, field in zip(cuts, mine, strict=True)))

    step = _last_whole(each)
    if step is None:
        return None
    mesh, rank = _mesh(), jax.process_index()
    # [n] which of a member's versions is of that step, and [n, P] what it has of it.
    at = np.argmax(each.steps == step + 1, axis=1)
    members = np.arange(len(at))
    has = (each.has[members, at] > 0) & (each.steps[members, at] == step + 1)[:, None]
    sums = each.sums[members, at]
    own_text, chosen = next(((t, v) for t, v in zip(texts, held) if v.step == step), (b"", None))
    parts, sources, receivers, sent = {}, {}, {}, 0
    for part, name in enumerate(names):
        source = int(np.argmax(has[:, part]))
        same = has[:, part] & (sums[:, part] == sums[source, part])
        lacking = tuple(int(other) for other in np.flatnonzero((each.wants[:, part] > 0) & ~same))
        own = None if chosen is None else chosen.parts.get(name)
        if lacking:
            shapes = [(tuple(x.shape), np.dtype(x.dtype)) for x in jax.tree.leaves(like[name])]
            own, size = _send(own if rank == source else None, shapes, mesh)
            sent += size
            if checksum(own) != int(sums[source, part]):
                raise RuntimeError(f"part {name} of the state of step {step} did not arrive as it was sent")
        sources[name], receivers[name] = source, lacking
        if name in wanted:
            assert own is not None
            parts[name] = list(own)
    first = sources[names[0]]
    text = _told(own_text, rank == first, int(each.notes[first, at[first], 0]), mesh)
    if zlib.crc32(text) != int(each.notes[first, at[first], 1]):
        raise RuntimeError(f"the notes of step {step} did not arrive as they were sent")
    taken = time.perf_counter() - begin
    return Carried(step, parts, json.loads(text), sources, receivers, sent, taken)


def _last_whole(each: _Row) -> int | None:
    """The last step of which every part is somewhere."""
    for step in sorted({int(value) for value in each.steps.ravel()} - {0}, reverse=True):
        there = (each.steps == step)[..., None] & (each.has > 0)
        if there.any(axis=(0, 1)).all():
            return step - 1
    return None


def _send(
    leaves: Sequence[np.ndarray] | None, shapes: Sequence[tuple[tuple[int, ...], np.dtype]], mesh: Mesh
) -> tuple[list[np.ndarray], int]:
    """Leaves from the one process that gives them to all, and their bytes."""
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in shapes]
    flat = np.zeros(-(-sum(sizes) // 4) * 4, np.uint8)
    if leaves is not None:
        parts = [np.ascontiguousarray(leaf).view(np.uint8).reshape(-1) for leaf in leaves]
        flat[: sum(sizes)] = np.concatenate(parts)
    flat = _broadcast(flat.view(np.uint32), leaves is not None, mesh).view(np.uint8)
    cuts = np.split(flat[: sum(sizes)], np.cumsum(sizes)[:-1])
    return [cut.view(dtype).reshape(shape) for cut, (shape, dtype) in zip(cuts, shapes)], sum(sizes)


def _told(text: bytes, here: bool, length: int, mesh: Mesh) -> bytes:
    """The text of the one process where ``here``."""
    flat = np.zeros(-(-length // 4) * 4, np.uint8)
    if here:
        flat[:length] = np.frombuffer(text, np.uint8)
    return _broadcast(flat.view(np.uint32), here, mesh).view(np.uint8)[:length].tobytes()


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


def _broadcast(words: np.ndarray, here: bool, mesh: Mesh) -> np.ndarray:
    """The words of the one process where ``here``; others give zeros of the same length."""
    assert here or not words.any()
    parts = [_summed(words[first : first + CHUNK], mesh) for first in range(0, len(words), CHUNK)]
    return np.concatenate(parts)
