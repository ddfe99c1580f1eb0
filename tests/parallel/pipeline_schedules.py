"""Pipeline schedules played pass by pass, as an oracle of formulas for their length."""

from collections.abc import Sequence


def orders(stages: int, micro: int, kind: str) -> list[list[tuple[str, int]]]:
    """What each stage does, in order: (``F`` or ``B``, micro-batch)."""
    found = []
    for stage in range(stages):
        ahead = micro if kind == "gpipe" else min(stages - stage, micro)
        order = [("F", m) for m in range(ahead)]
        for m in range(micro):
            order.append(("B", m))
            if ahead + m < micro:
                order.append(("F", ahead + m))
        found.append(order)
    return found


def length(forward: Sequence[float], backward: Sequence[float], micro: int, kind: str) -> float:
    """When the last pass ends if every stage does its passes in order, each as soon as what it needs is there.

    Args:
        forward: of each stage, for a micro-batch.
        backward: the same.
        micro: how many micro-batches.
        kind: ``gpipe``: all forward passes first; ``1f1b``: stage s has at most p - s micro-batches in flight.
    """
    stages = len(forward)
    left = orders(stages, micro, kind)
    free = [0.0] * stages
    done: dict[tuple[int, str, int], float] = {}
    while any(left):
        for stage, order in enumerate(left):
            while order:
                way, m = order[0]
                if way == "F":
                    needs = [(stage - 1, "F", m)] if stage else []
                else:
                    needs = [(stage, "F", m)] + ([(stage + 1, "B", m)] if stage < stages - 1 else [])
                if any(each not in done for each in needs):
                    break
                lasts = (forward if way == "F" else backward)[stage]
                free[stage] = max([free[stage], *(done[each] for each in needs)]) + lasts
                done[stage, way, m] = free[stage]
                order.pop(0)
    return max(free)
