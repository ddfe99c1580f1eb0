"""How long a pipeline takes over the micro-batches of a step, in *units*: the forward pass of one stage over one of them."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

Schedule = Literal["gpipe", "1f1b"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


class Stage(NamedTuple):
    """What a stage costs for a micro-batch.

    Attributes:
        forward: units.
        backward: units.
    """

    forward: float
    backward: float


# Gradients of inputs and of weights cost as much as the forward pass each.
HEALTHY = Stage(1.0, 2.0)


@lru_cache(65536)
def pipeline_units(stages: Sequence[Stage], micro: int, schedule: str = "gpipe") -> float:
    """Until the last pass of the step ends; p equal stages of c units take c (p + M - 1) either way.

    Args:
        stages: a tuple, in the order of the pipeline.
        micro: M, how many micro-batches.
        schedule: ``gpipe``: all forward passes, then all backward ones; ``1f1b``: stage s begins with p - s forward passes
            and goes on with one backward and one forward pass in turn, so that p - s micro-batches are in flight there.

    Raises:
        ValueError: an unknown schedule.
    """
    if schedule == "gpipe":
        # Equal jobs in the same order through a line of machines: filled once, then the slowest sets the pace.
        return sum(sum(costs) + (micro - 1) * max(costs) for costs in zip(*stages))
    if schedule != "1f1b":
        raise ValueError(f"schedule={schedule!r}: must be one of {', '.join(SCHEDULES)}")
    return _one_forward_one_backward(stages, micro)


def merged_units(stages: int, micro: int, pair: float) -> float:
    """T_ndb = 3 (p - 2) + c + c (M - 1) of a pipeline of p stages of which one node runs two, for c = ``pair`` units.

    Of ``gpipe`` that is exact from c = 4 on: below, the merged node's forward passes hold up more than its backward ones.
    """
    return 3 * (stages - 2) + pair + pair * (micro - 1)


def _one_forward_one_backward(stages: Sequence[Stage], micro: int) -> float:
    p = len(stages)
    forward = [[0.0] * micro for _ in stages]
    backward = [[0.0] * micro for _ in stages]
    free = [0.0] * p
    # Pass by pass in an order in which what each needs is known: forward pass m + p - s of stage s waits for backward pass
    # m of that stage, which waits for the same of the later stages, the last of which runs it right after its forward pass.
    ahead = [0] * p
    for m in range(micro):
        for s, stage in enumerate(stages):
            while ahead[s] < min(m + p - s, micro):
                at = ahead[s]
                ready = forward[s - 1][at] if s else 0.0
                forward[s][at] = free[s] = max(free[s], ready) + stage.forward
                ahead[s] += 1
        for s in reversed(range(p)):
            ready = backward[s + 1][m] if s + 1 < p else 0.0
            backward[s][m] = free[s] = max(free[s], ready) + stages[s].backward
    return max(free)
