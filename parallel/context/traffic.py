"""Bytes that workers receive: what a plan needs, what a back end sends for it, and what a compiled program holds."""

import math
import re

import numpy as np

from parallel.context.plan import Plan

# Bits of an element, by HLO's names.
_BITS = re.compile(r"^(?:pred|[a-z]+?(?P<bits>\d+))")
_COLLECTIVE = re.compile(
    r"= (?P<shapes>\(?[^=]*?) "
    r"(?P<kind>all-gather|all-reduce|all-to-all|collective-permute|ragged-all-to-all|reduce-scatter)(?:-done)?\("
)
_SHAPE = re.compile(r"(?P<dtype>[a-z]+[a-z0-9]*)\[(?P<sizes>[\d,]*)\]")


def planned_bytes(plan: Plan, slot_bytes: int, backend: str) -> np.ndarray:
    """i64[N]: bytes that each worker receives when all that the plan lists is exchanged once.

    Args:
        plan: the plan.
        slot_bytes: of one slot of what is exchanged: of keys and values ``2 block K d`` elements.
        backend: of :class:`parallel.context.exchange.Exchange`; ``ragged`` gives the exact need.
    """
    capacity = plan.capacity
    if backend == "ragged":
        return (plan.arrays.receive_from >= 0).sum(1) * slot_bytes
    slots = sum(capacity.shifts) if backend == "rotate" else (capacity.workers - 1) * capacity.slots
    return np.full(capacity.workers, slots * slot_bytes, np.int64)


def compiled_bytes(text: str, workers: int) -> dict[str, int]:
    """Bytes that one worker receives from others in a run of a program, by kind of collective.

    Collectives in loops count once. A ragged all-to-all counts as what it may bring at most.

    Args:
        text: the compiled program's HLO, ``compiled.as_text()``, of one worker as SPMD programs are.
        workers: members of each collective.
    """
    found: dict[str, int] = {}
    for match in _COLLECTIVE.finditer(re.sub(r"/\*.*?\*/", "", text)):
        kind = match["kind"]
        found[kind] = found.get(kind, 0) + received(kind, bytes_of(match["shapes"]), workers)
    return found


def received(kind: str, size: int, members: int) -> int:
    """Bytes that each of the ``members`` of a collective receives from the others, of a result of ``size`` bytes."""
    if kind in ("all-gather", "all-to-all"):
        return size * (members - 1) // members
    if kind == "reduce-scatter":
        return size * (members - 1)
    if kind == "all-reduce":
        return 2 * size * (members - 1) // members
    return size


def bytes_of(shapes: str) -> int:
    """Bytes of all arrays that a shape's HLO text names."""
    return sum(_bytes(shape) for shape in _SHAPE.finditer(shapes))


def _bytes(shape: re.Match[str]) -> int:
    bits = _BITS.match(shape["dtype"])
    sizes = [int(size) for size in shape["sizes"].split(",") if size]
    return math.ceil(math.prod(sizes) * int(bits["bits"] if bits and bits["bits"] else 8) / 8)
