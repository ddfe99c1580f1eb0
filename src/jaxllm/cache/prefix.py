"""Prefixes that outlive their requests: full sealed pages and recurrent snapshots, found again by their tokens.

A page is known by the chain digest of (adapter, tenant, every token up to its end). The tokens are stored as well and
compared at every page, so that two chains of equal digest are never taken for each other.
"""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxllm.cache.journal import Journal, Order
from jaxllm.cache.pages import PagePool

#: Adapter and tenant: requests that differ in either share nothing.
Key = tuple[Hashable, Hashable]
TOKEN_BYTES = 4


def chain_digest(parent: bytes, content: bytes) -> bytes:
    """16 bytes that stand for ``content`` behind everything that ``parent`` stands for; the same in every process."""
    return hashlib.blake2b(content, digest_size=16, key=parent).digest()


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Block:
    """One full page of a sequence, with all that stands before it. Compared by identity.

    Attributes:
        key: adapter and tenant.
        digest: chain digest.
        tokens: i32[page] as bytes; empty at the root.
        parent: the page before; None: this is the root, which has depth 0 and no page.
        depth: pages up to and with this one.
    """

    key: Key
    digest: bytes
    tokens: bytes
    parent: "Block | None"
    depth: int

    def is_after(self, parent: "Block", tokens: bytes) -> bool:
        """Whether this block, of the cache, is ``tokens`` behind ``parent``, of the cache or a root."""
        assert self.parent is not None
        return (
            self.tokens == tokens
            and self.depth == parent.depth + 1
            and self.parent.digest == parent.digest
            and self.key == parent.key
        )


class Node(NamedTuple):
    """A published page.

    Attributes:
        block: its tokens, and the nodes before it.
        pages: the physical page of each cache group.
        snapshot: where the recurrent state at its end is kept; -1: nowhere.
    """

    block: Block
    pages: tuple[int, ...]
    snapshot: int = -1


class PrefixCache:
    """The tree of published pages over the pools, with the order in which idle ones are given up.

    A node is idle while no request holds any of its pages; idle nodes are given up from the longest idle on, the end of
    a chain before its beginning. With recurrent layers a prefix is of use only where a snapshot exists, so that a node
    without a snapshot at or behind it does not stay.

    Attributes:
        nodes: digest to node.
        children: digest of a node to the digests of the pages published behind it.
        idle: digests of idle nodes.
        idle_snapshots: snapshots that no request started from, least recently used first.
    """

    def __init__(
        self,
        pools: Sequence[PagePool],
        snapshots: PagePool | None,
        page: int,
        journal: Journal,
        digest: Callable[[bytes, bytes], bytes] = chain_digest,
    ) -> None:
        """``snapshots``: None where the model keeps no recurrent state. ``page``: tokens of a page."""
        self.nodes: dict[bytes, Node] = {}
        self.children: dict[bytes, dict[bytes, None]] = {}
        self.idle = Order(journal)
        self.idle_snapshots = Order(journal)
        self._pools = pools
        self._snapshots = snapshots
        self._width = page * TOKEN_BYTES
        self._journal = journal
        self._digest = digest

    def root(self, key: Key) -> Block:
        """What every sequence of an adapter and tenant begins with."""
        return Block(key, self._digest(b"", repr(key).encode()), b"", None, 0)

    def chain(self, block: Block, data: bytes) -> tuple[Block, bytes]:
        """``block`` continued by the full pages of ``data`` (i32 tokens), and the bytes that are left."""
        whole = len(data) - len(data) % self._width
        for at in range(0, whole, self._width):
            tokens = data[at : at + self._width]
            block = Block(block.key, self._digest(block.digest, tokens), tokens, block, block.depth + 1)
        return block, data[whole:]

    def find(self, key: Key, data: bytes, most: int) -> list[Node]:
        """The longest usable published prefix of ``data`` (i32 tokens), at most ``most`` pages."""
        parent, found, usable = self.root(key), [], 0
        for at in range(0, most * self._width, self._width):
            tokens = data[at : at + self._width]
            node = self.nodes.get(self._digest(parent.digest, tokens))
            if node is None or not node.block.is_after(parent, tokens):
                break
            found.append(node)
            parent = node.block
            if self._snapshots is None or node.snapshot >= 0:
                usable = len(found)
        return found[:usable]

    def publish(self, block: Block, pages: Sequence[Sequence[int]]) -> tuple[Block, int, int | None]:
        """Keep the pages of a chain; those that another request has published stay that one's.

        Another chain may have the digest of a block: what lies behind such a collision could not be found and is left
        out. With recurrent layers, nothing is kept without a snapshot at the end of the chain.

        Args:
            block: end of the chain.
            pages: of each group, the request's physical pages.

        Returns:
            ``block`` as the cache has it (itself where it has not), the number of new nodes, and the snapshot to write
            at its end; None: there is one already, or none is needed or possible.
        """
        top, new = self._publish_pages(block, pages)
        whole = top.depth == block.depth
        if self._snapshots is None:
            return (top if whole else block), new, None
        if whole and (snapshot := self.nodes[top.digest].snapshot) >= 0:
            self.pin(snapshot)
            self.unpin(snapshot)
            return top, new, None
        snapshot = self._take_snapshot() if whole else None
        if snapshot is None:
            if top.depth and self._useless(top.digest):
                self._remove(top.digest)
            return block, 0, None
        # The snapshot that made way may have been the only use of nodes before its own.
        top, again = self._publish_pages(top, pages)
        self._journal.put(self.nodes, top.digest, self.nodes[top.digest]._replace(snapshot=snapshot))
        self._snapshots.keep(snapshot, top.digest)
        self.unpin(snapshot)
        return top, new + again, snapshot

    def _publish_pages(self, block: Block, pages: Sequence[Sequence[int]]) -> tuple[Block, int]:
        """The last block of the chain that is in the cache now, and the number of new nodes."""
        missing: list[Block] = []
        while block.parent is not None and not self._has(block):
            missing.append(block)
            block = block.parent
        new = 0
        for each in reversed(missing):
            node = self.nodes.get(each.digest)
            if node is None:
                if each.parent is not block:
                    each = Block(each.key, each.digest, each.tokens, block, each.depth)
                self._add(Node(each, tuple(group[each.depth - 1] for group in pages)))
                new += 1
            elif node.block.is_after(block, each.tokens):
                each = node.block
            else:
                break
            block = each
        return block, new

    def _has(self, block: Block) -> bool:
        """Whether the cache has this very block, and so all before it."""
        node = self.nodes.get(block.digest)
        return node is not None and node.block is block

    def hold(self, node: Node) -> None:
        """A request shares the node's pages."""
        for pool, page in zip(self._pools, node.pages):
            pool.share(page)
        if node.block.digest in self.idle:
            self.idle.remove(node.block.digest)

    def let_go(self, pages: Iterable[tuple[int, int]]) -> None:
        """A request lets (group, page) go; published pages stay as idle ones."""
        touched = {}
        for group, page in pages:
            pool = self._pools[group]
            if not pool.drop(page) and page in pool.kept:
                touched[pool.kept[page]] = None
        for digest in touched:
            if self.unused(self.nodes[digest]):
                self.idle.add(digest)

    def unused(self, node: Node) -> bool:
        """Whether the node has pages and no request holds one."""
        users = [pool.users[page] for pool, page in zip(self._pools, node.pages)]
        return bool(users) and not any(users)

    def reclaim(self) -> bool:
        """Give up the node that was idle the longest; False where none is idle."""
        digest = self.idle.first
        if digest is None:
            return False
        self._remove(digest)
        return True

    def pin(self, snapshot: int) -> None:
        """A request started from ``snapshot``: it is not given up as long as that one lives."""
        assert self._snapshots is not None
        self._snapshots.share(snapshot)
        if snapshot in self.idle_snapshots:
            self.idle_snapshots.remove(snapshot)

    def unpin(self, snapshot: int) -> None:
        """One request less; the last one leaves the snapshot as the most recently used."""
        assert self._snapshots is not None
        if not self._snapshots.drop(snapshot) and snapshot in self._snapshots.kept:
            self.idle_snapshots.add(snapshot)

    def _add(self, node: Node) -> None:
        digest, parent = node.block.digest, node.block.parent
        assert parent is not None
        self._journal.put(self.nodes, digest, node)
        if parent.depth:
            if parent.digest not in self.children:
                self._journal.put(self.children, parent.digest, {})
            self._journal.put(self.children[parent.digest], digest, None)
        for pool, page in zip(self._pools, node.pages):
            pool.keep(page, digest)

    def _remove(self, digest: bytes) -> None:
        """Take out a node, all behind it, which could not be found without it, and what before it is of no use then.

        Pages in use stay their users'.
        """
        parent = self.nodes[digest].block.parent
        assert parent is not None
        while parent.depth and self._useless(parent.digest, but=digest):
            digest, parent = parent.digest, parent.parent
            assert parent is not None
        stack = [digest]
        while stack:
            each = stack.pop()
            node = self.nodes[each]
            if each in self.children:
                stack += self.children[each]
                self._journal.drop(self.children, each)
            if each in self.idle:
                self.idle.remove(each)
            self._journal.drop(self.nodes, each)
            for pool, page in zip(self._pools, node.pages):
                pool.forget(page)
            if node.snapshot >= 0:
                self._forget_snapshot(node.snapshot)
        if parent.depth:
            siblings = self.children[parent.digest]
            self._journal.drop(siblings, digest)
            if not siblings:
                self._journal.drop(self.children, parent.digest)

    def _useless(self, digest: bytes, but: bytes | None = None) -> bool:
        """Whether a model that needs snapshots finds none at the node, and nothing behind it ``but`` one node."""
        behind = self.children.get(digest, {})
        return self._snapshots is not None and self.nodes[digest].snapshot < 0 and not (behind.keys() - {but})

    def _forget_snapshot(self, snapshot: int) -> None:
        assert self._snapshots is not None
        if snapshot in self.idle_snapshots:
            self.idle_snapshots.remove(snapshot)
        self._snapshots.forget(snapshot)

    def _take_snapshot(self) -> int | None:
        """A place for a snapshot, in use for now: a free one, or the least recently used; None: requests hold all."""
        pool = self._snapshots
        assert pool is not None
        if not pool.free:
            oldest = self.idle_snapshots.first
            if oldest is None:
                return None
            digest = pool.kept[oldest]
            self._journal.put(self.nodes, digest, self.nodes[digest]._replace(snapshot=-1))
            self._forget_snapshot(oldest)
            if self._useless(digest):
                self._remove(digest)
        return pool.take(1)[0]
