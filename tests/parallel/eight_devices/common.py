"""What the tests on eight devices share: workers, capacities that several plans have in common, packed batches."""

from dataclasses import dataclass
from functools import cached_property

import jax
import numpy as np
from hypothesis import strategies as st
from jax.sharding import Mesh

from parallel.context import Capacity, Plan, PlanConfig, layout, make_plan

AXIS = "context"


def workers(count: int) -> Mesh:
    """A mesh of the first ``count`` devices."""
    devices = jax.devices()
    assert len(devices) == 8, "run by tests/parallel/test_eight_devices.py"
    return Mesh(np.array(devices[:count]), (AXIS,))


def roomy(count: int, block: int, slots: int, stage_rounds: int, window: int | None = None) -> Capacity:
    """A capacity that plans of a few slots a worker fit into."""
    shifts = (max(1, slots - 1),) * (count - 1)
    stages = -(-sum(shifts) // stage_rounds)
    return Capacity(count, block, slots, 4 * slots, stages, stage_rounds, 6 * slots * slots, shifts, window)


@dataclass(frozen=True, eq=False)
class Packed:
    """A plan and where its tokens are."""

    plan: Plan
    lengths: tuple[int, ...]

    @cached_property
    def places(self):
        return layout(self.plan)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def slots(self, x: np.ndarray) -> np.ndarray:
        """[T, ...] to [N, S, block, ...]; padding is 7, which nothing may read."""
        index = self.places.index
        there = (index >= 0).reshape(*index.shape, *[1] * (x.ndim - 1))
        return np.where(there, x[np.maximum(index, 0)], 7).astype(x.dtype)

    def tokenwise(self, x) -> np.ndarray:
        """[N, S, block, ...] to [T, ...]."""
        x, index = np.asarray(x), self.places.index
        out = np.zeros((self.tokens, *x.shape[3:]), x.dtype)
        out[index[index >= 0]] = x[index >= 0]
        return out


def packed(lengths, capacity: Capacity, strategy: str = "fcp", rounds: str = "rotations") -> Packed:
    """A batch in a capacity, which must be large enough."""
    config = PlanConfig(
        capacity.workers,
        capacity.block,
        strategy,
        stage_rounds=capacity.stage_rounds,
        rounds=rounds,
        window=capacity.window,
    )
    plan = make_plan(lengths, config, at_least=capacity)
    assert plan.capacity == capacity
    return Packed(plan, tuple(lengths))


@st.composite
def batches(draw, tokens: int, block: int) -> list[int]:
    """Lengths of documents of at most ``tokens`` together, many shorter than a block, some longer than a worker holds."""
    lengths = draw(
        st.lists(st.integers(1, 2 * block) | st.integers(1, tokens - 2 * block), min_size=1, max_size=9)
    )
    ends = np.cumsum(lengths)
    return lengths[: max(1, int(np.searchsorted(ends, tokens, side="right")))]
