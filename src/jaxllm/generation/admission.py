"""Which requests run: slots, and pages where a pool is shared. Host bookkeeping alone; the engine runs the steps."""

import heapq
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from jaxllm.cache.allocator import Allocator
from jaxllm.cache.paged import PagedState
from jaxllm.cache.recurrent import RecurrentState
from jaxllm.cache.ring import RingState
from jaxllm.cache.sizes import CacheFull, Group, OutOfPages, Sizes
from jaxllm.cache.state import Cache, cache_groups
from jaxllm.cache.update import Update
from jaxllm.config import ModelConfig, require
from jaxllm.generation.engine_config import EngineConfig
from jaxllm.generation.request import Running


class Room(Protocol):
    """Who may run. A request has a slot from ``admit`` to ``release``."""

    def admit(self, request: Running, running: Sequence[Running]) -> bool:
        """Give ``request`` a slot, and what it needs to read its prompt; False: not now.

        Args:
            request: gets ``slot`` and ``read``, tokens of its prompt that are there already.
            running: those that hold a slot.
        """
        ...

    def grow(self, requests: Sequence[Running], steps: int) -> int:
        """Make room for the next decode steps of all ``requests``.

        Returns:
            steps for which there is room, at most ``steps``.

        Raises:
            OutOfPages: not even for one; nothing has changed.
        """
        ...

    def flush(self) -> Update | None:
        """What the device must do before its next step; None: nothing."""
        ...

    def settle(self, requests: Iterable[Running], cache: Cache, *, reading: bool) -> None:
        """A step has run for ``requests``; ``reading``: of their prompts."""
        ...

    def release(self, request: Running) -> None:
        """The request leaves its slot."""
        ...


class OwnPages:
    """Every slot has room for the longest request. Slots are taken lowest first."""

    def __init__(self, slots: int):
        self._free = list(range(slots))

    def admit(self, request: Running, running: Sequence[Running]) -> bool:
        """As in :class:`Room`."""
        if not self._free:
            return False
        request.slot = heapq.heappop(self._free)
        return True

    def grow(self, requests: Sequence[Running], steps: int) -> int:
        """As in :class:`Room`: always all."""
        return steps

    def flush(self) -> Update | None:
        """As in :class:`Room`."""
        return None

    def settle(self, requests: Iterable[Running], cache: Cache, *, reading: bool) -> None:
        """As in :class:`Room`."""

    def release(self, request: Running) -> None:
        """As in :class:`Room`."""
        heapq.heappush(self._free, request.slot)
        request.slot = -1


class SharedPages:
    """Pages of one pool, handed out by an :class:`Allocator`.

    Attributes:
        allocator: the books.
    """

    def __init__(self, sizes: Sizes):
        self.allocator = Allocator(sizes)

    def admit(self, request: Running, running: Sequence[Running]) -> bool:
        """As in :class:`Room`. A page stays free for every running request that will grow, or the new one would soon
        have to leave.

        Raises:
            CacheFull: nothing runs, and yet there is no room.
        """
        books = self.allocator
        try:
            with books.transaction():
                if request.suspended is None:
                    slot, read, _ = books.admit(request.prompt)
                else:
                    slot, read = books.resume(request.suspended.held), len(request.prompt)
                for index, (group, pool) in enumerate(zip(books.sizes.groups, books.pools)):
                    growing = sum(self._grows(each, index) for each in running)
                    spare = pool.free + len(books.prefixes.idle)
                    if spare < growing:
                        raise OutOfPages(group.name, growing, spare, pool.size)
        except CacheFull:
            if not running:
                raise
            return False
        request.slot, request.read = slot, read
        return True

    def _grows(self, request: Running, group: int) -> bool:
        """Whether the request may need another page of ``group``."""
        sizes = self.allocator.sizes
        most = (len(request.prompt) + request.params.max_new_tokens - 1) // sizes.page
        held = len(self.allocator.held[request.slot].pages[group])
        return held < min(most, sizes.groups[group].pages_per_slot)

    def grow(self, requests: Sequence[Running], steps: int) -> int:
        """As in :class:`Room`. Fewer steps are tried before any request has to leave."""
        while True:
            try:
                with self.allocator.transaction():
                    for request in requests:
                        left = request.params.max_new_tokens - request.sampled
                        self.allocator.grow(request.slot, min(steps, left))
                return steps
            except OutOfPages:
                if steps == 1:
                    raise
                steps //= 2

    def flush(self) -> Update | None:
        """As in :class:`Room`, padded."""
        update, sizes = self.allocator.flush(), self.allocator.sizes
        if update.empty:
            return None
        return update.padded(sizes.slots, [group.pages for group in sizes.groups], sizes.snapshots)

    def settle(self, requests: Iterable[Running], cache: Cache, *, reading: bool) -> None:
        """As in :class:`Room`: tokens are booked, pages that a policy has emptied are free, prompts are published."""
        books = self.allocator
        # What a policy keeps is decided on the device; its lengths are a few numbers.
        lengths = {
            index: np.asarray(cache.groups[index].length)
            for index, group in enumerate(books.sizes.groups)
            if group.evicts
        }
        for request in requests:
            slot = request.slot
            books.append(slot, request.tokens(books.held[slot].tokens, request.stored))
            # Until its end a prompt keeps the pages that it was admitted with.
            for group, stored in lengths.items() if request.read == len(request.prompt) else ():
                books.shrink(slot, group, int(stored[slot]))
            if reading:
                books.publish(slot)

    def release(self, request: Running) -> None:
        """As in :class:`Room`."""
        self.allocator.release(request.slot)
        request.slot = -1

    def forget(self) -> None:
        """No prefix of now is ever found again; no request may hold anything."""
        self.allocator = Allocator(self.allocator.sizes)


class PoolSizes(NamedTuple):
    """Sizes of a shared pool.

    Attributes:
        page: tokens of a page.
        pages: physical pages of every cache group.
        stored: most tokens that a slot stores in every group.
    """

    page: int
    pages: tuple[int, ...]
    stored: tuple[int, ...]


def pool_sizes(cfg: ModelConfig, config: EngineConfig) -> PoolSizes | None:
    """Sizes of the pool that the requests of an engine share; None where each has its own pages.

    Raises:
        ConfigError: the model keeps no pages, or pages do not divide the pool.
    """
    kv, policy = config.kv, config.policy
    if kv.pool_tokens is None:
        return None
    require("*" in cfg.pattern, "kv.pool_tokens", kv.pool_tokens, "needs a model with full attention layers")
    page = kv.pages_of(policy)
    assert page is not None
    require(
        kv.pool_tokens % page == 0,
        "kv.pool_tokens",
        kv.pool_tokens,
        f"a multiple of the page of {page} tokens",
    )
    rules, _ = cache_groups(cfg, policy)
    pages, most = [], []
    for rule, tokens in zip(rules, config.stored or (config.capacity,) * len(rules)):
        n = min(-(-min(tokens, config.capacity) // page), kv.pool_tokens // page)
        # Pages that no request can fill are of use to prefixes only, and these are not shared where a policy evicts.
        pages.append(
            kv.pool_tokens // page if rule is None else min(kv.pool_tokens // page, config.slots * n)
        )
        most.append(n * page)
    return PoolSizes(page, tuple(pages), tuple(most))


def book_sizes(config: EngineConfig, cache: Cache, sizes: PoolSizes) -> Sizes:
    """What the allocator of ``cache``, which was made with ``sizes``, must know.

    Raises:
        ConfigError: chunks do not end at pages where that is where prefixes end.
    """
    kv, chunk = config.kv, config.chunk
    paged = [state for state in cache.layers if isinstance(state, PagedState)]
    groups = []
    for index, pages in enumerate(sizes.pages):
        members = [state for state in paged if state.group == index]
        leaves = jax.tree.leaves([(state.k, state.v, state.memory.per_page) for state in members])
        evicts = any(state.policy.evicts for state in members)
        held = sum(leaf.nbytes for leaf in leaves) // pages
        groups.append(
            Group(f"attention {index}", pages, sizes.stored[index] // sizes.page, evicts, int(held))
        )
    stateful = any(isinstance(state, RecurrentState | RingState) for state in cache.layers)
    able = all(state.policy.rebuilds or not state.memory.per_slot for state in paged)
    shares = kv.prefixes and able and not any(group.evicts for group in groups)
    slots = config.slots
    # A chunk reads its own keys before they are rounded, so that integers depend on where chunks end.
    if not stateful and kv.bits is None:
        return Sizes(slots, sizes.page, tuple(groups), prefixes=shares)
    if not shares:
        return Sizes(slots, sizes.page, tuple(groups), 0, sizes.page, prefixes=False)
    require(
        chunk % sizes.page == 0,
        "chunk",
        chunk,
        f"a multiple of the page of {sizes.page} tokens, since prefixes end with chunks (or kv.prefixes=False)",
    )
    # Without states a snapshot costs nothing.
    count = kv.snapshots if stateful else sizes.pages[0]
    return Sizes(slots, sizes.page, tuple(groups), count, chunk)


class Suspended(NamedTuple):
    """A request that made room for others.

    Attributes:
        held: what the allocator knew of it.
        slot: its slot's contents, host arrays.
        sampling: its row of the sampling state, host arrays.
    """

    held: Any
    slot: Any
    sampling: Any
