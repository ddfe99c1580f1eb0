"""Which pages of a pool are free, and who holds the others: reference counts, and runs of neighbours where possible."""

from jaxllm.cache.journal import Journal


class PagePool:
    """``size`` pages, each free, or held by users (requests), or kept by the prefix cache, or both.

    A page is free again when its last user lets go and the prefix cache does not keep it. Snapshots of recurrent states
    and slots are counted in the same way.

    Attributes:
        size: P.
        users: page to the number of requests that hold it; 0: only the prefix cache does. Free pages are absent.
        kept: page to the digest of the prefix that keeps it.
    """

    def __init__(self, size: int, journal: Journal) -> None:
        self.size = size
        self.users: dict[int, int] = {}
        self.kept: dict[int, bytes] = {}
        self._journal = journal
        # One byte a page, 1 where it is not free: bytes.find looks for runs at the speed of memchr.
        self._taken = bytearray(size)

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return self.size - len(self.users)

    def is_free(self, page: int) -> bool:
        """Whether nobody holds ``page``."""
        return not self._taken[page]

    def take(self, count: int, *, after: int | None = None, home: int = 0) -> list[int]:
        """Free pages with one user each, in as few runs as can be found quickly.

        Args:
            count: how many; at most ``free``.
            after: the page that they would best follow; None: they are the first of their request.
            home: where to look first for a run. Homes that lie apart leave each request room to grow in place.
        """
        if count > self.free:
            raise ValueError(f"{count} pages asked for, {self.free} free")
        pages: list[int] = []
        if after is not None:
            end = self._taken.find(1, after + 1, after + 1 + count)
            pages += range(after + 1, min(after + 1 + count, self.size) if end < 0 else end)
            self._mark(pages)
        run = count - len(pages)
        while len(pages) < count:
            run = min(run, count - len(pages))
            start = self._taken.find(bytes(run), home)
            start = self._taken.find(bytes(run)) if start < 0 else start
            if start < 0:
                run //= 2
                continue
            self._mark(range(start, start + run))
            pages += range(start, start + run)
        return pages

    def share(self, page: int) -> None:
        """One more user of a page that is not free."""
        self._journal.put(self.users, page, self.users[page] + 1)

    def drop(self, page: int) -> int:
        """One user less; the page is free where that was the last and no prefix keeps it.

        Returns:
            the users left.
        """
        left = self.users[page] - 1
        if left < 0:
            raise ValueError(f"page {page} has no user to let it go")
        self._journal.put(self.users, page, left)
        if not left and page not in self.kept:
            self._free(page)
        return left

    def keep(self, page: int, digest: bytes) -> None:
        """The prefix cache holds ``page``, which is not free, under ``digest``."""
        if page in self.kept or page not in self.users:
            raise ValueError(f"page {page} is free or kept already")
        self._journal.put(self.kept, page, digest)

    def forget(self, page: int) -> None:
        """The prefix cache lets ``page`` go; it is free where it has no user."""
        self._journal.drop(self.kept, page)
        if not self.users[page]:
            self._free(page)

    def _mark(self, pages: range | list[int]) -> None:
        for page in pages:
            self._journal.put(self._taken, page, 1)
            self._journal.put(self.users, page, 1)

    def _free(self, page: int) -> None:
        self._journal.drop(self.users, page)
        self._journal.put(self._taken, page, 0)
