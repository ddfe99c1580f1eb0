"""An allocator, the device that follows its instructions, and what every sequence must read there."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxllm.cache.allocator import Allocator
from jaxllm.cache.audit import check, usage
from jaxllm.cache.prefix import chain_digest
from jaxllm.cache.sizes import CacheFull, OutOfPages, OutOfSlots, Sizes
from tests.cache.device_model import Device, values

FULL = object()


@dataclass
class Request:
    """A request: its key, prompt, tokens read so far, what each group must store, and if admission gave it pages for all
    of its prompt."""

    key: Any
    prompt: list[int]
    tokens: list[int]
    stored: list[list[Any]]
    granted: bool = True


def books(allocator: Allocator) -> Any:
    """Everything that the allocator knows, to be compared."""
    pools = [allocator.slots, *allocator.pools, *([allocator.snapshots] if allocator.snapshots else [])]
    prefixes, pending = allocator.prefixes, allocator._pending
    return [
        dict(allocator.held),
        [(dict(pool.users), dict(pool.kept), bytes(pool._taken)) for pool in pools],
        dict(prefixes.nodes),
        {digest: set(each) for digest, each in prefixes.children.items()},
        list(prefixes.idle),
        list(prefixes.idle_snapshots),
        [dict(each) for each in (pending.rows, pending._starts, pending._saves, *pending._copies)],
    ]


class World:
    """Calls the allocator, follows it on the device, and compares.

    Attributes:
        operations: calls made.
        full: calls that were refused for want of room.
        shared: tokens that requests got from prefixes.
    """

    def __init__(self, sizes: Sizes, digest: Callable[[bytes, bytes], bytes] = chain_digest):
        self.sizes = sizes
        self.allocator = Allocator(sizes, digest)
        self.device = Device(sizes)
        self.live: dict[int, Request] = {}
        self.dead: set[int] = set()
        self.owned = False
        self.operations = self.full = self.shared = 0

    def call(self, verb: Callable[..., Any], *args: Any) -> Any:
        """The verb's result; FULL where there was no room, which must be true and must change nothing."""
        self.operations += 1
        before = books(self.allocator)
        try:
            result = verb(*args)
        except CacheFull as error:
            assert books(self.allocator) == before
            self.full += 1
            if isinstance(error, OutOfSlots):
                assert len(self.live) == self.sizes.slots
            else:
                assert isinstance(error, OutOfPages)
                self._really_out(error, exact=verb == self.allocator.grow)
            return FULL
        check(self.allocator)
        return result

    def _really_out(self, error: OutOfPages, exact: bool) -> None:
        """Every page that no request holds can be had."""
        (index,) = [i for i, group in enumerate(self.sizes.groups) if group.name == error.group]
        pool, nodes = self.allocator.pools[index], self.allocator.prefixes.nodes
        others = pool.size - len(
            {page for each in self.allocator.held.values() for page in each.pages[index]}
        )
        assert error.needed > error.free
        assert error.pages == pool.size
        if exact and not self.owned:
            assert error.free == others
        elif not self.owned and not self.sizes.groups[index].evicts:
            # A refused admission held a prefix already: its pages were not idle any more.
            assert (
                others - max((node.block.depth for node in nodes.values()), default=0) <= error.free <= others
            )

    def admit(self, prompt: list[int], key: Any, reserve: Sequence[int] | None) -> int | None:
        got = self.call(self.allocator.admit, prompt, key, reserve)
        if got is FULL:
            return None
        assert got.slot not in self.live
        assert got.slot == min(set(range(self.sizes.slots)) - set(self.live))
        assert got.tokens % self.sizes.page == 0 and got.tokens < len(prompt)
        assert got.tokens == 0 or self.sizes.shares
        assert (got.snapshot is not None) == (got.tokens > 0 and self.sizes.grid is not None)
        read = prompt[: got.tokens]
        known = values(key, read)
        self.live[got.slot] = Request(key, list(prompt), read, [list(known) for _ in self.sizes.groups])
        self.dead.discard(got.slot)
        self.shared += got.tokens
        return got.slot

    def fork(self, slot: int) -> int | None:
        got = self.call(self.allocator.fork, slot)
        if got is FULL:
            return None
        parent = self.live[slot]
        assert got.slot not in self.live and got.tokens == len(parent.tokens)
        self.live[got.slot] = replace(copy.deepcopy(parent), granted=False)
        self.dead.discard(got.slot)
        return got.slot

    def move(self, slot: int) -> None:
        """The request is put aside and comes back to other pages; where these are lacking now, it is gone."""
        self.flush()
        held, contents = self.allocator.held[slot], self.device.park(slot)
        request = self.live[slot]
        self.release(slot)
        new = self.call(self.allocator.resume, held)
        if new is FULL:
            return
        self.dead.discard(new)
        self.device.apply(self.allocator.flush())
        self.device.unpark(new, contents)
        self.live[new] = replace(request, granted=False)
        self.verify()

    def release(self, slot: int) -> None:
        self.call(self.allocator.release, slot)
        del self.live[slot]
        self.dead.add(slot)

    def flush(self, padded: bool = False) -> None:
        """The device catches up, and every sequence reads what it should."""
        self.operations += 1
        update = self.allocator.flush()
        if padded:
            sizes = self.sizes
            update = update.padded(sizes.slots, [group.pages for group in sizes.groups], sizes.snapshots)
        self.device.apply(update)
        assert self.allocator.flush().empty
        for slot in self.dead:
            self.device.run_dead(slot)
        self.verify()

    def verify(self) -> None:
        for slot, sequence in self.live.items():
            known = values(sequence.key, sequence.tokens)
            if self.sizes.grid is not None:
                assert self.device.states[slot] == (known[-1] if known else None)
            for group, stored in enumerate(sequence.stored):
                assert self.device.read(slot, group) == stored
                if not self.sizes.groups[group].evicts and not self.owned:
                    assert stored == known

    def step(self, slot: int, count: int, token: int, keep: int | None, tell: bool) -> None:
        """Read on in the prompt, or generate; then groups that evict keep ``keep`` tokens.

        Args:
            slot: of a live request.
            count: tokens of the step.
            token: what is generated.
            keep: None: nothing is evicted unless it must be.
            tell: the allocator hears of the eviction.
        """
        sequence, sizes = self.live[slot], self.sizes
        done = len(sequence.tokens)
        tokens = sequence.prompt[done : done + count] or [token] * count
        room = [(group.pages_per_slot + 1) * sizes.page - 1 for group in sizes.groups]
        for most, stored in zip(room, sequence.stored):
            tokens = tokens[: most - len(stored)]
        granted = sequence.granted and done < len(sequence.prompt) and not any(g.evicts for g in sizes.groups)
        if not granted and self.call(self.allocator.grow, slot, len(tokens)) is FULL:
            return
        self.flush()
        sequence.tokens += tokens
        new = values(sequence.key, sequence.tokens)[len(sequence.tokens) - len(tokens) :]
        self.device.append(slot, sequence.key, tokens, new)
        for stored in sequence.stored:
            stored += new
        self.call(self.allocator.append, slot, tokens)
        for group, sizes_ in enumerate(sizes.groups):
            if not sizes_.evicts:
                continue
            stored = sequence.stored[group]
            # A policy that evicts makes room before the slot is full.
            most = min(len(stored) if keep is None else keep, room[group] - sizes.page)
            if most < len(stored):
                stored = sequence.stored[group] = (
                    stored[:1] + stored[len(stored) - most + 1 :] if most else []
                )
                self.device.rewrite(slot, group, stored)
            if tell:
                before = self.allocator.pools[group].free
                freed = self.call(self.allocator.shrink, slot, group, len(stored))
                held = self.allocator.held[slot]
                assert len(held.pages[group]) == max(len(stored) // sizes.page, held.least[group])
                assert self.allocator.pools[group].free == before + freed

    def own(self, slot: int, group: int) -> None:
        """The slot's full pages become private, and something rewrites them."""
        if self.call(self.allocator.own, slot, group) is FULL:
            return
        self.owned = True
        self.flush()
        sequence = self.live[slot]
        sequence.stored[group] = [("rewritten", value) for value in sequence.stored[group]]
        self.device.rewrite(slot, group, sequence.stored[group])
        self.verify()

    def publish(self, slot: int) -> None:
        self.call(self.allocator.publish, slot)

    def broken(self, slot: int | None, prompt: list[int], key: Any) -> None:
        """A transaction of several calls that fails leaves nothing."""
        self.operations += 1
        before, allocator = books(self.allocator), self.allocator

        class Stop(Exception):
            pass

        try:
            with allocator.transaction():
                if slot is not None:
                    allocator.publish(slot)
                    allocator.release(slot)
                allocator.fork(allocator.admit(prompt, key).slot)
                raise Stop
        except (Stop, CacheFull):
            pass
        assert books(allocator) == before
        check(allocator)

    def end(self) -> None:
        """Nothing leaks: without requests every page is free or cached."""
        for slot in list(self.live):
            self.release(slot)
        self.flush()
        for group in usage(self.allocator).values():
            assert group.used == group.shared == 0
        while self.allocator.prefixes.reclaim():
            pass
        check(self.allocator)
        assert all(pool.free == pool.size for pool in self.allocator.pools)
        if self.allocator.snapshots and self.sizes.groups:
            assert self.allocator.snapshots.free == self.sizes.snapshots
