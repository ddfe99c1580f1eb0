"""What a training step of attention on two processes should take on this CPU, by the FCP simulator and by counting tiles.

Everything here is arithmetic on plans and on constants that were measured before any step.
"""

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from pallas_kernels.attention.blocks import NO_KEY, NO_QUERY, visits_any, whole
from parallel.context import Plan, PlanConfig, draw_lengths, layout, make_plan, planned_bytes
from parallel.context.costs import AttentionShape, Costs
from parallel.context.simulate import System, simulate_plan

WORKERS = 2
# Tokens of documents, of blocks and of a worker are a fourth of those that the simulator is used for, so that a core
# computes them in seconds.
SHRUNK = 4
# Queries and keys that the kernel computes at once on CPUs (pallas_kernels/attention/xla.py).
TILE = (128, 512)
# Of a measured ratio, how far the prediction may be away.
TOLERANCE = 0.15


@dataclass(frozen=True)
class Phase:
    """Kernels of the forward or of the backward pass on one core.

    Attributes:
        costs: the simulator's, their curve that of the kernel.
        tile: seconds of ``TILE`` of queries and keys.
        crowding: seconds while the other core computes too, over those while it does not.
    """

    costs: Costs
    tile: float
    crowding: float


@dataclass(frozen=True)
class Machine:
    """Two cores.

    Attributes:
        forward: see :class:`Phase`.
        backward: the same.
        bandwidth: bytes/s of a permutation between the two processes, each way, both ways at once.
        latency: seconds of one of no bytes.
    """

    forward: Phase
    backward: Phase
    bandwidth: float
    latency: float


def long_last(tokens: int, short: int) -> np.ndarray:
    """A fourth of the tokens in documents of ``short``, all others in one document at the end."""
    count = tokens // 4 // short
    return np.array([short] * count + [tokens - count * short])


def shrunk(name: str, tokens: int, seed: int) -> np.ndarray:
    """Documents of :func:`parallel.context.draw_lengths`, each ``SHRUNK`` times shorter, of ``tokens`` together."""
    ends = np.cumsum(draw_lengths(name, tokens * SHRUNK, seed)) // SHRUNK
    lengths = np.diff(ends, prepend=0)
    return lengths[lengths > 0]


def pair_plan(lengths: np.ndarray, block: int, kind: str) -> Plan:
    """The plan of a batch for the two, by rotations, which is what CPUs can do."""
    return make_plan(lengths, PlanConfig(WORKERS, block, kind, rounds="rotations"))


def step_bytes(plan: Plan, shape: AttentionShape) -> int:
    """What each worker receives in a step: keys and values forward, the same again backward, and their gradients."""
    slot = plan.capacity.block * shape.kv_bytes
    return 3 * int(planned_bytes(plan, slot, "rotate")[0])


def fitted_transfers(seconds: dict[int, float]) -> tuple[float, float]:
    """Bandwidth and latency through measured seconds of permutations of so many bytes, by least squares of shares.

    Raises:
        ValueError: larger ones were not slower.
    """
    size, taken = np.array(list(seconds), np.float64), np.array(list(seconds.values()))
    latency, each = np.linalg.lstsq(np.stack([1 / taken, size / taken], 1), np.ones(len(taken)), rcond=None)[
        0
    ]
    if each <= 0:
        raise ValueError(f"permutations took {seconds}: must take longer the more bytes they carry")
    return float(1 / each), max(0.0, float(latency))


def transfer_seconds(plan: Plan, shape: AttentionShape, machine: Machine) -> float:
    """Of a step; keys and values go in permutations of their own."""
    stages = -(-sum(plan.capacity.shifts) // plan.capacity.stage_rounds)
    return step_bytes(plan, shape) / machine.bandwidth + 3 * 2 * stages * machine.latency


def tiles(plan: Plan) -> np.ndarray:
    """i64[N]: tiles that each worker's kernels compute for the pairs of blocks that its plan lists."""
    places, arrays, capacity = layout(plan), plan.arrays, plan.capacity
    queries, keys = (min(capacity.block, size) for size in TILE)
    found = np.zeros(capacity.workers, np.int64)
    for worker in range(capacity.workers):
        stage = np.repeat(np.arange(-1, capacity.stages), np.diff(arrays.work_start[worker]))
        row, number, _ = arrays.work[worker, : len(stage)].T
        if keys == capacity.block:
            # Nothing is skipped where one tile has all keys.
            found[worker] = len(row) * -(-capacity.block // queries)
            continue
        # A worker's slots, then what each round brings.
        source = np.where(stage < 0, number, number + stage * capacity.stage_rounds)
        document, position = arrays.receive_document[worker], arrays.receive_position[worker]
        came_ids = np.broadcast_to(document[:, None] + 1, (len(document), capacity.block))
        ids = np.concatenate([places.segment_ids[worker], came_ids])
        positions = np.concatenate(
            [places.positions[worker], position[:, None] + np.arange(capacity.block, dtype=np.int32)]
        )
        given = (ids[row], positions[row], ids[source], positions[source])
        found[worker] = int(_visited(queries, keys, *(x[:, None] for x in given)))
    return found


@partial(jax.jit, static_argnums=(0, 1))
def _visited(queries: int, keys: int, *given: jax.Array) -> jax.Array:
    """Tiles of all pairs; ids and positions [M, 1, block] of their queries and of their keys."""

    def one(q_ids: jax.Array, q_positions: jax.Array, ids: jax.Array, positions: jax.Array) -> jax.Array:
        seen = whole(q_ids, q_positions, queries, NO_QUERY), whole(ids, positions, keys, NO_KEY)
        return visits_any(*seen, queries, keys, None)[1].sum()

    return jax.vmap(one)(*given).sum()


def predict(plan: Plan, kind: str, machine: Machine, shape: AttentionShape) -> dict[str, float]:
    """Seconds of a step, forward and backward.

    Transfers are added to both predictions in full, since a core copies what it sends and receives itself. While both
    cores compute each is slower by the measured crowding, which makes the busier one later by what the other computes.

    Returns:
        simulator: by :func:`parallel.context.simulate.simulate_plan` with the measured curves.
        tiles: by :func:`tiles`, each of the measured time.
        transfers: the part of both that is transfers.
    """
    travel = transfer_seconds(plan, shape, machine)
    simulated = counted = travel
    count = tiles(plan)
    for way, phase in (("forward", machine.forward), ("backward", machine.backward)):
        costs = replace(
            phase.costs,
            node=WORKERS,
            network=machine.bandwidth,
            nvlink=machine.bandwidth,
            network_latency=machine.latency,
            nvlink_latency=machine.latency,
        )
        result = simulate_plan(plan, kind, shape, costs, System(reshuffle="none"), way)
        busy = result.overlap * result.seconds
        idle = (2 * result.balance - 1) * busy
        simulated += result.seconds + (phase.crowding - 1) * idle
        counted += phase.tile * (count.max() + (phase.crowding - 1) * count.min())
    return {"simulator": float(simulated), "tiles": float(counted), "transfers": travel}


def verdict(predicted: float, measured: float) -> dict[str, Any]:
    """How far a predicted ratio is from the measured one, as a share of that, and in words."""
    error = predicted / measured - 1
    beyond = abs(error) - TOLERANCE
    return {
        "error": error,
        "verdict": f"within {TOLERANCE:.0%}" if beyond <= 0 else f"short by {beyond:.1%}",
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": float(middle), "low": float(low), "high": float(high)}


def told(machine: Machine) -> dict[str, Any]:
    """A machine as plain JSON values: of its costs only what was measured."""
    found: dict[str, Any] = asdict(machine)
    for name in ("forward", "backward"):
        costs = found[name].pop("costs")
        found[name] |= {"flops": costs["peak"], "tokens": costs["kernel_tokens"]}
    return found
