"""The host's side of the cache: which slot, pages and snapshots a request holds, as one transactional resource.

Pure bookkeeping without time, files or device arrays. A request holds a slot (its recurrent states and open tails) and
pages of every cache group, or nothing. Decisions become device instructions in :meth:`Allocator.flush`:

    admit, resume, grow, fork, own, release    # before a step; they may raise, and then nothing has changed
    flush                                      # one Update for the device
    (the step)
    append, shrink, publish                    # after it: what the device stores now

A page is written only by the one request that holds it, and never again once it is full, except that a group whose
policy evicts rewrites its own.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np

from jaxllm.cache.journal import Journal
from jaxllm.cache.pages import PagePool
from jaxllm.cache.prefix import TOKEN_BYTES, Block, Key, PrefixCache, chain_digest
from jaxllm.cache.sizes import OutOfPages, OutOfSlots, Sizes
from jaxllm.cache.update import Pending, Update
from jaxllm.config import require


class Admission(NamedTuple):
    """What a new request got.

    Attributes:
        slot: its slot.
        tokens: tokens that it has already (shared prefix, or all of its parent's): reading goes on behind them.
        snapshot: the snapshot that its recurrent states come from; None: zeros, or the parent's slot.
    """

    slot: int
    tokens: int
    snapshot: int | None


class Held(NamedTuple):
    """What one request holds.

    Attributes:
        tokens: tokens read or generated so far; the next one's position.
        stored: of each group, the most tokens that the device may store of them.
        pages: of each group, physical pages in logical order; the first ``stored // page`` are full.
        least: of each group, pages that are held whatever is evicted.
        block: its full pages by content, as long as it may publish; None: it may not (any more).
        rest: tokens behind the last full page, i32 as bytes.
        snapshot: the snapshot it started from; -1: none.
    """

    tokens: int
    stored: tuple[int, ...]
    pages: tuple[tuple[int, ...], ...]
    least: tuple[int, ...]
    block: Block | None
    rest: bytes
    snapshot: int


class Allocator:
    """Slots, pages, prefixes and snapshots of one cache.

    Attributes:
        sizes: what there is.
        slots: slots, counted like pages.
        pools: of each group its pages.
        snapshots: places for snapshots; None where the model keeps no recurrent state.
        prefixes: published prefixes.
        held: slot to what its request holds.
    """

    def __init__(self, sizes: Sizes, digest: Callable[[bytes, bytes], bytes] = chain_digest) -> None:
        """``digest``: of a parent's digest and a content, for prefixes; equal ones of different content do no harm."""
        self.sizes = sizes
        self._journal = Journal()
        self.slots = PagePool(sizes.slots, self._journal)
        self.pools = tuple(PagePool(group.pages, self._journal) for group in sizes.groups)
        self.snapshots = None if sizes.grid is None else PagePool(sizes.snapshots, self._journal)
        self.prefixes = PrefixCache(self.pools, self.snapshots, sizes.page, self._journal, digest)
        self.held: dict[int, Held] = {}
        self._pending = Pending(len(self.pools), sizes.slots, self._journal)

    def transaction(self) -> AbstractContextManager[None]:
        """Calls inside count only if nothing is raised there; one that fails leaves everything as it was anyway."""
        return self._journal.transaction()

    def admit(
        self, prompt: Sequence[int], key: Key = (None, None), reserve: Sequence[int] | None = None
    ) -> Admission:
        """A slot, the longest published prefix, and pages for the rest of the prompt.

        Args:
            prompt: token ids, at least one; the last is never taken from a prefix, since its logits are wanted.
            key: adapter and tenant; only requests of the same key share.
            reserve: of each group, stored tokens for which pages are taken at once and kept, so that ``grow`` cannot
                fail below; None: those of the prompt, as ``shrink`` leaves them.

        Raises:
            ConfigError: the request is longer than a slot.
            OutOfSlots, OutOfPages: there is no room now.
        """
        sizes, length = self.sizes, len(prompt)
        require(length > 0, "prompt", prompt, "must have at least one token")
        reserve = [0] * len(self.pools) if reserve is None else list(reserve)
        require(
            len(reserve) == len(self.pools), "reserve", reserve, f"one for each of {len(self.pools)} groups"
        )
        for group, tokens in zip(range(len(self.pools)), reserve):
            self._check_length(group, max(length, tokens))
        with self.transaction():
            slot = self._take_slot()
            data = _bytes(prompt)
            nodes = self.prefixes.find(key, data, (length - 1) // sizes.page) if sizes.shares else []
            for node in nodes:
                self.prefixes.hold(node)
            snapshot = nodes[-1].snapshot if nodes else -1
            if snapshot >= 0:
                self.prefixes.pin(snapshot)
            block = nodes[-1].block if nodes else self.prefixes.root(key) if sizes.shares else None
            shared = len(nodes) * sizes.page
            held = Held(
                tokens=shared,
                stored=(shared,) * len(self.pools),
                pages=tuple(tuple(node.pages[g] for node in nodes) for g in range(len(self.pools))),
                least=tuple(tokens // sizes.page for tokens in reserve),
                block=block,
                rest=b"",
                snapshot=snapshot,
            )
            self._extend(slot, held, [length] * len(self.pools))
            self._pending.start(slot, shared, snapshot)
        return Admission(slot, shared, None if snapshot < 0 else snapshot)

    def resume(self, held: Held) -> int:
        """A slot, and pages of its own, for a request that was released and that stores what ``held`` said then.

        It publishes nothing. Its contents are the caller's to put back.

        Returns:
            the slot.

        Raises:
            OutOfSlots, OutOfPages: there is no room now.
        """
        with self.transaction():
            slot = self._take_slot()
            empty = held._replace(pages=((),) * len(self.pools), block=None, rest=b"", snapshot=-1)
            self._extend(slot, empty, list(held.stored))
            self._pending.start(slot, 0, -1)
        return slot

    def grow(self, slot: int, tokens: int) -> None:
        """Pages for the next ``tokens`` tokens, before the step that stores them.

        Admission has taken those of the prompt; a fork, and a slot that has shrunk since, grow for the rest of it too.

        Raises:
            ConfigError: the request would be longer than a slot.
            OutOfPages: there is no room now.
        """
        held = self._held(slot)
        require(tokens >= 0, "tokens", tokens, "must be at least 0")
        wanted = self._after(held, tokens)
        with self.transaction():
            self._extend(slot, held, wanted)

    def append(self, slot: int, tokens: Sequence[int]) -> None:
        """The step has stored these tokens of the request, for which it had pages.

        Raises:
            ConfigError: pages were not reserved, or the update that gives them has not been flushed.
        """
        held, sizes = self._held(slot), self.sizes
        require(slot not in self._pending.rows, "slot", slot, "its update must be flushed before a step")
        stored = self._after(held, len(tokens))
        for group, pages, count in zip(sizes.groups, held.pages, stored):
            require(
                count // sizes.page <= len(pages),
                "tokens",
                f"{len(tokens)} more in slot {slot}",
                f"it holds {len(pages)} pages of group {group.name!r}; grow it before the step",
            )
        block, rest = held.block, held.rest
        if block is not None:
            block, rest = self.prefixes.chain(block, rest + _bytes(tokens))
        with self.transaction():
            count = held.tokens + len(tokens)
            self._set(slot, held._replace(tokens=count, stored=tuple(stored), block=block, rest=rest))

    def shrink(self, slot: int, group: int, tokens: int) -> int:
        """The policy of ``group`` has evicted: the slot stores ``tokens`` there, at the beginning of its pages.

        Told after ``append``; until it is, the allocator counts on the most that may be stored.

        Returns:
            pages that are free again.
        """
        held = self._held(slot)
        require(
            self.sizes.groups[group].evicts, "group", self.sizes.groups[group].name, "its policy never evicts"
        )
        require(0 <= tokens <= held.stored[group], "tokens", tokens, f"must be 0 to {held.stored[group]}")
        kept = max(tokens // self.sizes.page, held.least[group])
        pages = held.pages[group]
        with self.transaction():
            for page in pages[kept:]:
                self.prefixes.let_go([(group, page)])
            stored = _replaced(held.stored, group, tokens)
            self._set(slot, held._replace(stored=stored, pages=_replaced(held.pages, group, pages[:kept])))
            if pages[kept:]:
                self._pending.row(slot)
        return len(pages[kept:])

    def own(self, slot: int, group: int) -> int:
        """Make the slot's full pages private, by copies of those that others hold, before something rewrites them.

        The request publishes nothing from here on: its pages need not hold its tokens any more.

        Returns:
            pages copied.

        Raises:
            OutOfPages: there is no room for the copies.
        """
        held, pool = self._held(slot), self.pools[group]
        pages = list(held.pages[group])
        shared = [i for i, page in enumerate(pages) if pool.users[page] > 1 or page in pool.kept]
        with self.transaction():
            for index, copy in zip(shared, self._take(slot, group, len(shared), None)):
                self._pending.copy(group, pages[index], copy)
                self.prefixes.let_go([(group, pages[index])])
                pages[index] = copy
            self._set(slot, held._replace(pages=_replaced(held.pages, group, tuple(pages)), block=None))
            if shared:
                self._pending.row(slot)
        return len(shared)

    def fork(self, slot: int) -> Admission:
        """A second request that goes on from the same tokens: full pages are shared, tails and states are copied.

        Pages of a group whose policy evicts are copied as well, since they will be rewritten.

        Raises:
            OutOfSlots, OutOfPages: there is no room now.
        """
        held, sizes = self._held(slot), self.sizes
        with self.transaction():
            child = self._take_slot()
            pages = []
            for index, (group, pool) in enumerate(zip(sizes.groups, self.pools)):
                full = held.pages[index][: held.stored[index] // sizes.page]
                if group.evicts:
                    own = self._take(child, index, len(full), None)
                    for source, target in zip(full, own):
                        self._pending.copy(index, source, target)
                    full = tuple(own)
                else:
                    for page in full:
                        pool.share(page)
                pages.append(full)
            if held.snapshot >= 0:
                self.prefixes.pin(held.snapshot)
            self._extend(child, held._replace(pages=tuple(pages)), list(held.stored))
            self._pending.fork(child, held.tokens, slot)
        return Admission(child, held.tokens, None)

    def publish(self, slot: int) -> int:
        """Let others share the request's full pages from now on.

        With recurrent layers that needs the state at their end: nothing is published unless the request stands on the
        snapshot grid (so chunks of a prompt should end there), and a place for a snapshot is free or idle.

        Returns:
            pages that are published anew (of each group).
        """
        held, grid = self._held(slot), self.sizes.grid
        if held.block is None or not held.block.depth or (grid is not None and held.tokens % grid):
            return 0
        with self.transaction():
            block, new, snapshot = self.prefixes.publish(held.block, held.pages)
            if snapshot is not None:
                self._pending.save(snapshot, slot)
            self._set(slot, held._replace(block=block))
        return new

    def release(self, slot: int) -> None:
        """The request is over: its pages are free, or idle where they are published."""
        held = self._held(slot)
        with self.transaction():
            for index in reversed(range(max(map(len, held.pages), default=0))):
                self.prefixes.let_go([(g, p[index]) for g, p in enumerate(held.pages) if index < len(p)])
            if held.snapshot >= 0:
                self.prefixes.unpin(held.snapshot)
            self._journal.drop(self.held, slot)
            self.slots.drop(slot)
            # Its row names no page any more: a step that still runs it cannot write to pages of others.
            self._pending.row(slot)
            self._pending.end(slot)

    def flush(self) -> Update:
        """Instructions of all calls since the last flush; to be applied before the next step."""
        require(not self._journal.open, "flush", "in a transaction", "a transaction may still be taken back")
        slots = list(self._pending.rows)
        return self._pending.take([self.table(group, slots) for group in range(len(self.pools))])

    def table(self, group: int, slots: Sequence[int]) -> np.ndarray:
        """i32[m, n], rows of the group's page table; P past the pages that a slot holds."""
        sizes = self.sizes.groups[group]
        table = np.full((len(slots), sizes.pages_per_slot), sizes.pages, np.int32)
        for row, slot in zip(table, slots):
            if slot in self.held:
                pages = self.held[slot].pages[group]
                row[: len(pages)] = pages
        return table

    def consecutive(self, slot: int, group: int) -> bool:
        """Whether the slot's pages stand one behind the other, so that it can be read as a slice."""
        pages = self._held(slot).pages[group]
        return not pages or pages == tuple(range(pages[0], pages[0] + len(pages)))

    def _held(self, slot: int) -> Held:
        require(slot in self.held, "slot", slot, "no request holds it")
        return self.held[slot]

    def _set(self, slot: int, held: Held) -> None:
        self._journal.put(self.held, slot, held)

    def _take_slot(self) -> int:
        if not self.slots.free:
            raise OutOfSlots(self.sizes.slots)
        return self.slots.take(1)[0]

    def _check_length(self, group: int, tokens: int) -> None:
        """A slot holds full pages and an open tail that is not one yet."""
        most = (self.sizes.groups[group].pages_per_slot + 1) * self.sizes.page - 1
        name = self.sizes.groups[group].name
        require(tokens <= most, "tokens", tokens, f"a request in group {name!r} stores at most {most}")

    def _after(self, held: Held, tokens: int) -> list[int]:
        """Most tokens that each group stores after ``tokens`` more; a policy that evicts keeps to the slot's size."""
        after = [stored + tokens for stored in held.stored]
        for group, sizes in enumerate(self.sizes.groups):
            if sizes.evicts:
                after[group] = min(after[group], (sizes.pages_per_slot + 1) * self.sizes.page - 1)
            self._check_length(group, after[group])
        return after

    def _extend(self, slot: int, held: Held, tokens: Sequence[int]) -> None:
        """``slot`` holds ``held``, and pages for ``tokens`` stored tokens of each group."""
        pages = []
        for group, (own, least) in enumerate(zip(held.pages, held.least)):
            more = max(tokens[group] // self.sizes.page, least) - len(own)
            pages.append(own + tuple(self._take(slot, group, more, own[-1] if own else None)))
        if slot not in self.held or tuple(pages) != held.pages:
            self._set(slot, held._replace(pages=tuple(pages)))
            self._pending.row(slot)

    def _take(self, slot: int, group: int, count: int, after: int | None) -> list[int]:
        """``count`` pages, idle prefixes giving way where too few are free."""
        pool = self.pools[group]
        if count <= 0:
            return []
        # An idle node gives one page of every group.
        free = pool.free + len(self.prefixes.idle)
        if count > free:
            raise OutOfPages(self.sizes.groups[group].name, count, free, pool.size)
        while pool.free < count and self.prefixes.reclaim():
            pass
        return pool.take(count, after=after, home=slot * pool.size // self.sizes.slots)


def _bytes(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, f"<i{TOKEN_BYTES}").tobytes()


def _replaced(values: tuple, index: int, value: object) -> tuple:
    return (*values[:index], value, *values[index + 1 :])
