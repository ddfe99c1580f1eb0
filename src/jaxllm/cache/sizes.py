"""How much of everything a cache has, and what is raised where that is not enough."""

from dataclasses import dataclass

from jaxllm.config import positive, require


class CacheFull(RuntimeError):
    """No room now; nothing has changed. The same call may work when other requests have ended."""


class OutOfSlots(CacheFull):
    """Every slot is held by a request.

    Attributes:
        slots: S.
    """

    def __init__(self, slots: int) -> None:
        super().__init__(
            f"all {slots} slots are held; release a request, wait until one ends, or build the cache with more slots"
        )
        self.slots = slots


class OutOfPages(CacheFull):
    """A group has too few pages.

    Attributes:
        group: its name.
        needed: pages that the call needs beyond those that the request has.
        free: pages that it could have had: free ones, and those of idle prefixes.
        pages: P.
    """

    def __init__(self, group: str, needed: int, free: int, pages: int) -> None:
        super().__init__(
            f"group {group!r}: {needed} pages needed, {free} of {pages} free or idle; release or preempt a request, "
            "wait until one ends, or build the cache with more pages"
        )
        self.group, self.needed, self.free, self.pages = group, needed, free, pages


@dataclass(frozen=True)
class Group:
    """Layers with one retention rule, which share tables and lengths.

    Attributes:
        name: for messages.
        pages: P, physical pages of each layer's pool.
        pages_per_slot: n, most pages of a request.
        evicts: the policy rewrites pages of its own; nothing of such a group is shared.
        page_bytes: bytes of one page in all layers of the group, for the accounting.
    """

    name: str
    pages: int
    pages_per_slot: int
    evicts: bool = False
    page_bytes: int = 0

    def __post_init__(self) -> None:
        positive(**{"group.pages": self.pages, "group.pages_per_slot": self.pages_per_slot})
        require(
            self.pages_per_slot <= self.pages,
            "group.pages_per_slot",
            self.pages_per_slot,
            f"a request must fit the {self.pages} pages of group {self.name!r}",
        )
        require(self.page_bytes >= 0, "group.page_bytes", self.page_bytes, "must be at least 0")


@dataclass(frozen=True)
class Sizes:
    """Sizes of one cache.

    Attributes:
        slots: S, requests held at once.
        page: tokens of a page, in every group.
        groups: cache groups; none where no layer keeps keys.
        snapshots: R, places for snapshots of recurrent states; 0: prefixes of a recurrent model are not shared.
        grid: tokens from snapshot to snapshot, a multiple of ``page``; None: the model keeps no recurrent state. Whatever
            a slot keeps of its past beside pages and open tails, such as rings of sliding windows, counts as one.
        prefixes: requests share published prefixes, if the model lets them (``shares``).
    """

    slots: int
    page: int
    groups: tuple[Group, ...]
    snapshots: int = 0
    grid: int | None = None
    prefixes: bool = True

    def __post_init__(self) -> None:
        positive(slots=self.slots, page=self.page)
        require(self.snapshots >= 0, "snapshots", self.snapshots, "must be at least 0")
        require(
            self.grid is None or (self.grid >= 1 and self.grid % self.page == 0),
            "grid",
            self.grid,
            f"None or a multiple of the page of {self.page} tokens",
        )
        require(
            self.grid is not None or not self.snapshots,
            "snapshots",
            self.snapshots,
            "0 for a model without recurrent state (grid=None)",
        )
        names = [group.name for group in self.groups]
        require(len(set(names)) == len(names), "groups", names, "different names")
        require(
            bool(names) or self.grid is not None, "groups", names, "a model keeps pages or recurrent states"
        )

    @property
    def shares(self) -> bool:
        """Whether prefixes can be shared: every group keeps them as they were, and recurrent states have snapshots."""
        return (
            self.prefixes
            and not any(group.evicts for group in self.groups)
            and (self.grid is None or self.snapshots > 0)
        )
