"""Units of tokens and work shared between workers: equal tokens and slots, then equal work, neighbours kept together."""

from dataclasses import dataclass

import numpy as np

# Of each worker, units that one sweep compares, singly and by twos; bounds a sweep where workers hold thousands.
_COMPARED = 96
_DOUBLED = 24
# Of each partner, exchanges of two units that one sweep looks at.
_COMPARISONS = 150_000
_TRIES = 12
_TRIED_UNITS = 4096
_PARTNERS = 8
_SWEEPS = 400
_PATIENCE = 24


@dataclass(frozen=True)
class Units:
    """What is placed as one: a block, a pair of blocks, or short blocks that share a slot.

    Attributes:
        tokens: i64[M].
        work: f64[M].
        pair: bool[M], units that may be split into two of half the tokens where memory demands it.
    """

    tokens: np.ndarray
    work: np.ndarray
    pair: np.ndarray


def fill(units: Units, workers: int) -> np.ndarray:
    """A worker for each unit, from both ends of the order by work per token.

    Each worker in turn takes dense units (of long documents) as long as sparse ones can fill the rest of its tokens
    without too much work. Units of a document are neighbours in that order, so that a worker sees few documents and a
    document few workers, next to each other. Plain longest-processing-time order scatters every document.

    Returns:
        i64[M].
    """
    order = np.argsort(-(units.work / units.tokens), kind="stable")
    tokens, work = units.tokens[order].tolist(), units.work[order].tolist()
    owner = np.zeros(len(order), np.int64)
    low, high = 0, len(order) - 1
    left_tokens, left_work = sum(tokens), sum(work)
    for worker in range(workers - 1):
        need, effort = left_tokens / (workers - worker), left_work / (workers - worker)
        while low <= high:
            sparse = work[high] / tokens[high]
            take_dense = effort - work[low] >= (need - tokens[low]) * sparse
            at = low if take_dense else high
            if tokens[at] / 2 > need:
                at = high if take_dense else low
                if tokens[at] / 2 > need:
                    break
            if at == low:
                low += 1
            else:
                high -= 1
            owner[order[at]] = worker
            need, effort = need - tokens[at], effort - work[at]
            left_tokens, left_work = left_tokens - tokens[at], left_work - work[at]
    owner[order[low : high + 1]] = workers - 1
    return owner


def equalise(tokens: np.ndarray, work: np.ndarray, owner: np.ndarray, workers: int, slack: int) -> np.ndarray:
    """Move units until every worker's tokens are within ``slack`` of the mean, and then what it takes in slots.

    A worker that happens to hold the poorly filled slots has more of them than others, and every worker computes as
    many as the one with most. Its smallest units go to others, as far as tokens allow.

    Args:
        tokens: i64[M], none above ``slack``, which makes success certain for tokens.
        work: f64[M].
        owner: i64[M].
        workers: how many.
        slack: tokens.

    Returns:
        i64[M], the new owners.
    """
    owner = owner.copy()
    held = np.bincount(owner, tokens, workers)
    load = np.bincount(owner, work, workers)
    mean = held.mean()
    while np.abs(held - mean).max() > slack:
        rich, poor = int(held.argmax()), int(held.argmin())
        own = np.flatnonzero(owner == rich)
        # A move of up to the whole gap narrows it; of those that narrow it well, the one that evens out the work.
        gap = held[rich] - held[poor]
        good = np.abs(tokens[own] - gap / 2)
        close = own[good <= good.min() + slack / 8]
        unit = close[np.abs(work[close] - (load[rich] - load[poor]) / 2).argmin()]
        owner[unit] = poor
        held[rich] -= tokens[unit]
        held[poor] += tokens[unit]
        load[rich] -= work[unit]
        load[poor] += work[unit]
    count = np.bincount(owner, minlength=workers)
    most = most_slots(len(owner), workers)
    for rich in np.flatnonzero(count > most).tolist():
        own = np.flatnonzero(owner == rich)
        for unit in own[np.argsort(tokens[own], kind="stable")].tolist():
            fits = (count < most) & (held + tokens[unit] <= mean + slack)
            if count[rich] <= most or not fits.any() or held[rich] - tokens[unit] < mean - slack:
                break
            poor = int(np.where(fits, load, np.inf).argmin())
            owner[unit] = poor
            for total, more in ((held, tokens[unit]), (load, work[unit]), (count, 1)):
                total[rich] -= more
                total[poor] += more
    return owner


def most_slots(slots: int, workers: int) -> int:
    """Slots that a worker may be given in an exchange, where they are not its own before: one above an equal share."""
    return -(-slots // workers) + 1


def refine(
    tokens: np.ndarray,
    work: np.ndarray,
    slots: np.ndarray,
    owner: np.ndarray,
    workers: int,
    slack: int,
    goal: float,
    by_twos: bool = True,
) -> np.ndarray:
    """Exchange units between busy and idle workers until the busiest has at most ``goal``, or nothing helps.

    A sweep gives every busy worker some of the least busy ones and makes its best exchange, all at once: of one unit, or
    of two where that no longer helps, for as many others or for nothing. Tokens stay within ``slack`` of the mean, slots
    within :func:`most_slots`. Workers within the goal are left alone: an exchange costs locality.

    Args:
        tokens: i64[M].
        work: f64[M].
        slots: i64[M], slots that a unit takes.
        owner: i64[M], where every worker's tokens are within ``slack`` of the mean.
        workers: how many.
        slack: tokens.
        goal: work of a worker that is good enough.
        by_twos: exchange two units where one does not help; thorough and, where many workers are busy, slow.

    Returns:
        i64[M], the new owners.
    """
    if workers == 1:
        return owner
    none = len(work)
    most = most_slots(int(slots.sum()), workers)
    work, tokens, slots = np.append(work, 0.0), np.append(tokens, 0), np.append(slots, 0)
    table = _table(owner, workers, none)
    mean = tokens.sum() / workers
    load, held, filled = work[table].sum(1), tokens[table].sum(1), slots[table].sum(1)
    stalled, doubles = 0, False
    for sweep in range(_SWEEPS):
        order = np.argsort(-load, kind="stable")
        busy = order[: min(int((load > goal).sum()), workers // 2)]
        if not len(busy):
            break
        if stalled > _PATIENCE:
            if doubles or not by_twos:
                break
            stalled, doubles = 0, True
        parcels = _parcels(table.shape[1], sweep, doubles)
        if doubles:
            busy = busy[: max(1, _COMPARISONS // len(parcels) ** 2)]
        # The longer nothing helps, the fewer are relieved and the more partners each of them has.
        busy = busy[: max(1, len(busy) >> stalled)]
        idle = order[len(busy) :][::-1]
        partners = min(_PARTNERS, len(idle) // len(busy))
        # Partners are disjoint, so that all exchanges of a sweep can be made.
        idle = np.roll(idle, -stalled)[: partners * len(busy)].reshape(partners, -1).T
        mine, theirs = table[busy][:, parcels], table[idle][:, :, parcels]
        moved = tokens[mine].sum(-1)[:, None, :, None] - tokens[theirs].sum(-1)[:, :, None, :]
        gain = work[mine].sum(-1)[:, None, :, None] - work[theirs].sum(-1)[:, :, None, :]
        after = np.maximum(load[busy][:, None, None, None] - gain, load[idle][:, :, None, None] + gain)
        fits = np.abs(held[busy][:, None, None, None] - moved - mean) <= slack
        fits &= np.abs(held[idle][:, :, None, None] + moved - mean) <= slack
        more = slots[theirs].sum(-1)[:, :, None, :] - slots[mine].sum(-1)[:, None, :, None]
        fits &= (
            filled[busy][:, None, None, None] + more <= np.maximum(most, filled[busy])[:, None, None, None]
        )
        fits &= filled[idle][:, :, None, None] - more <= np.maximum(most, filled[idle])[:, :, None, None]
        flat = np.where(fits, after, np.inf).reshape(len(busy), -1)
        best = flat.argmin(1)
        better = flat[np.arange(len(busy)), best] < load[busy] * (1 - 1e-9)
        stalled = 0 if better.any() else stalled + 1
        row = np.flatnonzero(better)
        partner, give, take = np.unravel_index(best[row], after.shape[1:])
        one, other = busy[row], idle[row, partner]
        here, there = (one[:, None], parcels[give]), (other[:, None], parcels[take])
        given, taken = table[here], table[there]
        table[here], table[there] = taken, given
        for total, each in ((load, work), (held, tokens), (filled, slots)):
            change = each[given].sum(-1) - each[taken].sum(-1)
            total[one] -= change
            total[other] += change
    refined = np.zeros(none + 1, np.int64)
    refined[table] = np.arange(workers)[:, None]
    return refined[:none]


def search(
    tokens: np.ndarray, work: np.ndarray, owner: np.ndarray, workers: int, slack: int, goal: float
) -> np.ndarray:
    """:func:`refine`, and where it ends above ``goal``, again from what the busiest worker and two others shuffle.

    With few units of very different work exchanges end where none helps, far from what is possible. Batches of many
    units do not need this and cannot afford it: the number of tries falls with their number.

    Returns:
        i64[M], the best owners found.
    """
    rng = np.random.default_rng(0)
    single = np.ones(len(work), np.int64)
    best = refine(tokens, work, single, owner, workers, slack, goal)
    load = np.bincount(best, work, workers)
    for _ in range(min(_TRIES, _TRIED_UNITS // len(work)) if workers > 2 else 0):
        if load.max() <= goal:
            break
        busiest = int(load.argmax())
        others = rng.permutation(np.delete(np.arange(workers), busiest))[:2]
        shuffled = np.flatnonzero(np.isin(best, [busiest, *others]))
        start = best.copy()
        start[shuffled] = rng.permutation(best[shuffled])
        start = equalise(tokens, work, start, workers, slack)
        found = refine(tokens, work, single, start, workers, slack, goal)
        after = np.bincount(found, work, workers)
        if after.max() < load.max():
            best, load = found, after
    return best


def _parcels(columns: int, sweep: int, doubles: bool) -> np.ndarray:
    """i64[C, 1 or 2]: columns of a table of units, one or two of which go into an exchange.

    Where there are too many to compare at once, each sweep takes others.
    """
    limit = _DOUBLED if doubles else _COMPARED
    chosen = np.arange(columns)
    if columns > limit:
        chosen = np.sort((np.arange(limit) + sweep * limit) % columns)
    return chosen[np.stack(np.triu_indices(len(chosen), 1), 1)] if doubles else chosen[:, None]


def _table(owner: np.ndarray, workers: int, none: int) -> np.ndarray:
    """i64[workers, most + 2]: the units of each worker, then ``none``, at least twice."""
    counts = np.bincount(owner, minlength=workers)
    table = np.full((workers, counts.max() + 2), none)
    order = np.argsort(owner, kind="stable")
    column = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    table[owner[order], column] = order
    return table
