"""Transfers of key and value blocks between workers, in rounds where each sends and receives at most one."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Rounds = Literal["matchings", "rotations"]
ROUNDS: tuple[Rounds, ...] = get_args(Rounds)


@dataclass(frozen=True)
class Transfers:
    """One entry for every block that a worker needs and does not hold.

    Attributes:
        block: i64[E].
        sender: i64[E], who holds it.
        receiver: i64[E], who needs it, for any number of its query blocks.
    """

    block: np.ndarray
    sender: np.ndarray
    receiver: np.ndarray

    def __len__(self) -> int:
        return len(self.block)

    def unlocked_first(self, rounds: np.ndarray, unlocked: np.ndarray) -> np.ndarray:
        """Rounds renumbered so that those come first whose blocks let most work begin.

        Args:
            rounds: i64[E].
            unlocked: f64[E], what each transfer lets begin.
        """
        if not len(self):
            return rounds
        place_of = np.zeros(int(rounds.max()) + 1, np.int64)
        place_of[np.argsort(-np.bincount(rounds, unlocked), kind="stable")] = np.arange(len(place_of))
        return place_of[rounds]

    def shifts(self, workers: int) -> tuple[int, ...]:
        """For k = 1 to N - 1 the most blocks that any worker sends to the k-th one after it."""
        count = np.bincount(self._shifted(workers), minlength=workers * workers).reshape(workers, workers)
        return tuple(count.max(1).tolist()[1:])

    def _shifted(self, workers: int) -> np.ndarray:
        return (self.receiver - self.sender) % workers * workers + self.sender

    def rotations(self, workers: int, shifts: tuple[int, ...], unlocked: np.ndarray) -> np.ndarray:
        """A round for every transfer where each round has one shift from sender to receiver.

        More rounds than :func:`schedule` needs, but their permutations are known before the plan is.

        Args:
            workers: how many.
            shifts: rounds for each shift, at least :meth:`shifts`.
            unlocked: f64[E]; of a sender's transfers by the same shift those come first that let most work begin.

        Returns:
            i64[E], counted from 0, in the order of shifts.
        """
        group = self._shifted(workers)
        order = np.lexsort((-unlocked, group))
        first = np.concatenate([[0, 0], np.cumsum(shifts)]).astype(np.int64)
        rounds = np.zeros(len(self), np.int64)
        rounds[order] = np.arange(len(self)) - np.searchsorted(group[order], group[order])
        return rounds + first[group // workers]

    def degree(self, workers: int) -> int:
        """Blocks of the worker that sends or receives most: no schedule has fewer rounds."""
        if not len(self):
            return 0
        sent, received = np.bincount(self.sender, minlength=workers), np.bincount(self.receiver)
        return int(max(sent.max(), received.max()))


@dataclass(frozen=True)
class Links:
    """What the network between workers is like.

    Attributes:
        node: workers of a node, numbered one after the other; 0: all are in one node.
        inside: time of one block between workers of a node, in any unit.
        between: of one block between nodes.
    """

    node: int = 0
    inside: float = 1.0
    between: float = 1.0

    def __post_init__(self) -> None:
        if self.node < 0:
            raise ValueError(f"links node={self.node}: must be at least 1 worker, or 0 for a single node")
        for name in ("inside", "between"):
            if not getattr(self, name) > 0:
                raise ValueError(f"links {name}={getattr(self, name)!r}: must be above 0")

    def crossing(self, transfers: Transfers) -> np.ndarray:
        """bool[E]: transfers that leave a node."""
        if not self.node:
            return np.zeros(len(transfers), bool)
        return transfers.sender // self.node != transfers.receiver // self.node


def transfers(
    document: np.ndarray, worker: np.ndarray, workers: int, query: np.ndarray, key: np.ndarray
) -> tuple[Transfers, np.ndarray]:
    """What attention makes workers fetch: every block of keys once, for any number of their blocks of queries.

    Args:
        document: i64[K], of each block.
        worker: i64[K], their owners.
        workers: how many.
        query: i64[M], blocks, some of whose queries see keys of the blocks
        key: i64[M].

    Returns:
        The transfers by document, receiver and block, and i64[M]: the one that brings the keys, -1 if they are local.
    """
    away = worker[query] != worker[key]
    wanted = (document[query] * workers + worker[query])[away] * len(worker) + key[away]
    wanted, at = np.unique(wanted, return_inverse=True)
    block, receiver = wanted % len(worker), wanted // len(worker) % workers
    move = np.full(len(query), -1)
    move[away] = at
    return Transfers(block, worker[block], receiver), move


def schedule(moves: Transfers, workers: int, links: Links) -> np.ndarray:
    """A round for every transfer: an edge colouring of the bipartite multigraph of senders and receivers.

    König: as many rounds as the largest degree are enough. Transfers take a round that is free at both ends; where none
    is, an alternating path of two rounds is exchanged, which frees one. Those between nodes come first and take as few
    rounds as they can, for a round lasts as long as its slowest transfer; the others fill what is left in those and
    then in rounds of their own.

    Args:
        moves: the transfers.
        workers: how many.
        links: decides which transfers are slow.

    Returns:
        i64[E], counted from 0; the number of rounds is ``moves.degree(workers)``.
    """
    rounds = moves.degree(workers)
    slow = links.crossing(moves) if links.between > links.inside else np.zeros(len(moves), bool)
    colouring = _Colouring(moves.sender.tolist(), moves.receiver.tolist(), workers, rounds)
    for chosen in (slow, ~slow):
        part = np.flatnonzero(chosen)
        few = Transfers(moves.block[part], moves.sender[part], moves.receiver[part])
        # The slow ones have their own degree; the rest share all rounds with them.
        colouring.add(part.tolist(), few.degree(workers) if chosen is slow else rounds)
    return np.asarray(colouring.colour, np.int64)


def round_costs(moves: Transfers, rounds: np.ndarray, links: Links) -> np.ndarray:
    """f64[rounds]: how long each round lasts, its slowest transfer deciding."""
    cost = np.zeros(int(rounds.max()) + 1 if len(rounds) else 0)
    np.maximum.at(cost, rounds, np.where(links.crossing(moves), links.between, links.inside))
    return cost


class _Colouring:
    """Edges of a bipartite multigraph and their colours; free colours of a node are the bits of an integer."""

    def __init__(self, left: list[int], right: list[int], nodes: int, colours: int):
        self.left, self.right = left, right
        self.colour = [-1] * len(left)
        self._free = [(1 << colours) - 1] * nodes, [(1 << colours) - 1] * nodes
        # The edge of each colour at each node; read only where the colour is not free.
        self._at = [[-1] * colours for _ in range(nodes)], [[-1] * colours for _ in range(nodes)]

    def add(self, edges: list[int], colours: int) -> None:
        """Colour edges with the first ``colours`` colours, at least the degree of all that they may meet there."""
        allowed = (1 << colours) - 1
        (free_left, free_right), (at_left, at_right) = self._free, self._at
        left, right, colour = self.left, self.right, self.colour
        for edge in edges:
            u, v = left[edge], right[edge]
            common = free_left[u] & free_right[v] & allowed
            if common:
                bit = common & -common
                chosen = bit.bit_length() - 1
            else:
                chosen = self._make_free(u, v, allowed)
                bit = 1 << chosen
            free_left[u] ^= bit
            free_right[v] ^= bit
            at_left[u][chosen] = at_right[v][chosen] = edge
            colour[edge] = chosen

    def _make_free(self, u: int, v: int, allowed: int) -> int:
        """A colour free at u is made free at v too: exchange it along the path that leaves v by it."""
        free_left, free_right = self._free
        mine, its = free_left[u] & allowed, free_right[v] & allowed
        first, second = (mine & -mine).bit_length() - 1, (its & -its).bit_length() - 1
        both = 1 << first | 1 << second
        path, node, side, colour = [], v, 1, first
        # The path cannot reach u: it would enter it by ``first``, which is free there.
        while not self._free[side][node] >> colour & 1:
            edge = self._at[side][node][colour]
            path.append(edge)
            side = 1 - side
            node = (self.left, self.right)[side][edge]
            colour = first + second - colour
        free_right[v] ^= both
        self._free[side][node] ^= both
        for edge in path:
            self.colour[edge] = changed = first + second - self.colour[edge]
            self._at[0][self.left[edge]][changed] = edge
            self._at[1][self.right[edge]][changed] = edge
        return first
