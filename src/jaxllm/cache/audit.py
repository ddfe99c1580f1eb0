"""What an allocator holds in figures, and whether its books are right."""

from collections import Counter
from typing import Any, NamedTuple

from jaxllm.cache.allocator import Allocator
from jaxllm.cache.journal import Order
from jaxllm.cache.pages import PagePool


class Usage(NamedTuple):
    """Pages of one group; free + used + cached are all.

    Attributes:
        free: nobody holds them.
        used: requests hold them.
        shared: more than one request holds them; they are among ``used``.
        cached: only the prefix cache holds them, and gives them up when they are needed.
        held_bytes: of used and cached pages.
        saved_bytes: what the requests would hold more if they shared nothing.
    """

    free: int
    used: int
    shared: int
    cached: int
    held_bytes: int
    saved_bytes: int


def usage(allocator: Allocator) -> dict[str, Usage]:
    """Group name to what is held of it."""
    found = {}
    for group, pool in zip(allocator.sizes.groups, allocator.pools):
        users = [count for count in pool.users.values() if count]
        found[group.name] = Usage(
            free=pool.free,
            used=len(users),
            shared=sum(count > 1 for count in users),
            cached=len(pool.users) - len(users),
            held_bytes=len(pool.users) * group.page_bytes,
            saved_bytes=(sum(users) - len(users)) * group.page_bytes,
        )
    return found


def check(allocator: Allocator) -> None:
    """Count everything anew from what requests and prefixes hold.

    Raises:
        AssertionError: the books are wrong; the message says where.
    """
    _check_requests(allocator)
    _check_prefixes(allocator)
    for pool in (allocator.slots, *allocator.pools, *_snapshot_pools(allocator)):
        _check_pool(pool)


def _must(condition: bool, *what: Any) -> None:
    if not condition:
        raise AssertionError(" ".join(map(str, what)))


def _snapshot_pools(allocator: Allocator) -> list[PagePool]:
    return [] if allocator.snapshots is None else [allocator.snapshots]


def _check_pool(pool: PagePool) -> None:
    _must(pool.users.keys() >= pool.kept.keys(), "a free page is kept by a prefix")
    for page in range(pool.size):
        _must(pool.is_free(page) == (page not in pool.users), "page", page, "is free and not free")
    for page, users in pool.users.items():
        _must(users > 0 or page in pool.kept, "page", page, "leaked: nobody holds it, and it is not free")


def _check_requests(allocator: Allocator) -> None:
    sizes, held = allocator.sizes, allocator.held
    _must(allocator.slots.users == dict.fromkeys(held, 1), "slots and requests differ")
    for index, (group, pool) in enumerate(zip(sizes.groups, allocator.pools)):
        counts = Counter(page for each in held.values() for page in each.pages[index])
        users = {page: count for page, count in pool.users.items() if count}
        _must(counts == users, "group", group.name, "counts users", users, "but requests hold", counts)
        for slot, each in held.items():
            pages, full = each.pages[index], each.stored[index] // sizes.page
            open_ = pages if group.evicts else pages[full:]
            _must(len(set(pages)) == len(pages), "slot", slot, "holds a page twice")
            _must(len(pages) >= min(full, group.pages_per_slot), "slot", slot, "stores more than its pages")
            _must(len(pages) <= group.pages_per_slot, "slot", slot, "holds more pages than a slot has")
            private = all(pool.users[page] == 1 and page not in pool.kept for page in open_)
            _must(private, "slot", slot, "shares pages of group", group.name, "that it writes")
            _must(group.evicts or each.stored[index] == each.tokens, "slot", slot, "lost tokens")
    if allocator.snapshots is not None:
        pins = Counter(each.snapshot for each in held.values() if each.snapshot >= 0)
        users = {snapshot: count for snapshot, count in allocator.snapshots.users.items() if count}
        _must(pins == users, "snapshots count users", users, "but requests started from", pins)


def _check_prefixes(allocator: Allocator) -> None:
    prefixes, nodes = allocator.prefixes, allocator.prefixes.nodes
    behind: dict[bytes, set[bytes]] = {}
    for digest, node in nodes.items():
        block, parent = node.block, node.block.parent
        _must(block.digest == digest and parent is not None, "a node stands under another's digest")
        assert parent is not None
        _must(block.depth == parent.depth + 1, "a node is deeper than its parent by more than a page")
        if parent.depth:
            _must(parent.digest in nodes, "a node's parent is gone")
            _must(nodes[parent.digest].block is parent, "a node's parent is another sequence's")
            behind.setdefault(parent.digest, set()).add(digest)
        _must(len(node.pages) == len(allocator.pools), "a node lacks pages")
    _must(behind == {digest: set(each) for digest, each in prefixes.children.items()}, "children are wrong")
    for index, pool in enumerate(allocator.pools):
        kept = {node.pages[index]: digest for digest, node in nodes.items()}
        _must(kept == pool.kept, "kept pages of group", index, "are not those of the nodes")
    in_use = {digest for pool in allocator.pools for page, digest in pool.kept.items() if pool.users[page]}
    idle = nodes.keys() - in_use if allocator.pools else set()
    _must(set(prefixes.idle) == idle and len(prefixes.idle) == len(idle), "idle nodes are wrong")
    _check_order(prefixes.idle)
    _check_order(prefixes.idle_snapshots)
    snapshots = {node.snapshot: digest for digest, node in nodes.items() if node.snapshot >= 0}
    if allocator.snapshots is None:
        _must(not snapshots, "a model without recurrent state has snapshots")
        return
    _must(snapshots == allocator.snapshots.kept, "kept snapshots are not those of the nodes")
    idle_snapshots = {each for each in snapshots if not allocator.snapshots.users[each]}
    _must(set(prefixes.idle_snapshots) == idle_snapshots, "idle snapshots are wrong")
    useless = [digest for digest, node in nodes.items() if digest not in behind and node.snapshot < 0]
    _must(not useless, "nodes of no use:", useless)


def _check_order(order: Order) -> None:
    forwards = list(order)
    _must(forwards == list(reversed(list(order.backwards()))), "an order's links differ by direction")
    _must(len(set(forwards)) == len(forwards) == len(order), "an order holds keys that it does not reach")
