"""What happens to slots between steps: requests begin there, make room for others, and come back.

Pure functions, jitted; cache and sampling state are donated as in :mod:`jaxllm.generation.steps`.
"""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from jaxllm.batch import Leaf
from jaxllm.cache.apply import applied
from jaxllm.cache.state import Cache, zero_slots
from jaxllm.cache.swap import Parked, parked, unparked
from jaxllm.cache.update import Update
from jaxllm.generation.sampling import SamplingState

HostOrDevice = np.ndarray | Array


def _admit(
    cache: Cache, sampling: SamplingState, slots: Any, rows: SamplingState
) -> tuple[Cache, SamplingState]:
    return zero_slots(cache, slots), sampling.put(slots, rows)


def _seat(sampling: SamplingState, slots: Any, rows: SamplingState) -> SamplingState:
    return sampling.put(slots, rows)


def _park(cache: Cache, sampling: SamplingState, slot: Any) -> tuple[Parked, SamplingState, Leaf]:
    row = replace(sampling.rows(slot[None]), newline=None)
    return parked(cache, slot), row, sampling.live.at[slot].set(False)


def _unpark(
    cache: Cache, sampling: SamplingState, slot: Any, contents: Parked, row: SamplingState
) -> tuple[Cache, SamplingState]:
    return unparked(cache, slot, contents), sampling.put(slot[None], row)


_admit_jit = jax.jit(_admit, donate_argnums=(0, 1))
_update_jit = jax.jit(applied, donate_argnums=(0, 1))
_seat_jit = jax.jit(_seat, donate_argnums=0)
_park_jit = jax.jit(_park)
_unpark_jit = jax.jit(_unpark, donate_argnums=(0, 1))
PROGRAMS: tuple[Any, ...] = (_admit_jit, _update_jit, _seat_jit, _park_jit, _unpark_jit)


def admit(
    cache: Cache, sampling: SamplingState, slots: Int[HostOrDevice, " B"], rows: SamplingState
) -> tuple[Cache, SamplingState]:
    """Open ``slots`` (-1: none), which own their pages, for new requests: recurrent state zeroed, sampling parameters
    from ``rows``."""
    return _admit_jit(cache, sampling, slots, rows)


def update(cache: Cache, snapshots: tuple[Any, ...], decided: Update) -> tuple[Cache, tuple[Any, ...]]:
    """Apply what an allocator has ``decided`` (padded): pages move, slots begin, snapshots are taken.

    ``snapshots`` are those of :func:`jaxllm.cache.apply.init_snapshots`, and donated as well.
    """
    return _update_jit(cache, snapshots, decided)


def seat(sampling: SamplingState, slots: Int[HostOrDevice, " B"], rows: SamplingState) -> SamplingState:
    """Sampling parameters of new requests whose slots (-1: none) an ``update`` begins."""
    return _seat_jit(sampling, slots, rows)


def park(cache: Cache, sampling: SamplingState, slot: int) -> tuple[Parked, SamplingState, SamplingState]:
    """Take a live request out of its slot, bit by bit; nothing is donated.

    Returns:
        the slot's contents and its row of ``sampling``, host arrays, and ``sampling`` in which the slot is not live.
    """
    *kept, live = _park_jit(cache, sampling, np.int32(slot))
    contents, row = jax.device_get(kept)
    return contents, row, replace(sampling, live=live)


def unpark(
    cache: Cache, sampling: SamplingState, slot: int, contents: Parked, row: SamplingState
) -> tuple[Cache, SamplingState]:
    """The inverse of :func:`park`, into a slot and pages that an ``update`` has given."""
    return _unpark_jit(cache, sampling, np.int32(slot), contents, row)
