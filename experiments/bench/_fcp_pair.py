"""What a training step of attention on two processes should take on this CPU, by the FCP simulator and by sums of kernels.

Everything here is arithmetic on plans and on constants that were measured before any step.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from parallel.context import DIAGONAL, Plan, PlanConfig, draw_lengths, make_plan, planned_bytes
from parallel.context.costs import AttentionShape, Costs
from parallel.context.simulate import System, simulate_plan

WORKERS = 2
# A worker of two receives less than it holds, so that one stage brings all of it.
STAGE_ROUNDS = 8
# Documents as published (parallel/context/lengths.py), cut down to batches that a core computes in seconds.
SHRUNK = 16
# Of a measured ratio, how far the prediction may be away.
TOLERANCE = 0.15


@dataclass(frozen=True)
class Phase:
    """Kernels of the forward or of the backward pass on one core.

    Attributes:
        costs: the simulator's, their curve that of the kernel.
        full: seconds of one block of queries against another block of keys.
        diagonal: of a block against itself.
        crowding: seconds while the other core computes too, over those while it does not.
    """

    costs: Costs
    full: float
    diagonal: float
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
    return make_plan(lengths, PlanConfig(WORKERS, block, kind, stage_rounds=STAGE_ROUNDS, rounds="rotations"))


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


def predict(plan: Plan, kind: str, machine: Machine, shape: AttentionShape) -> dict[str, float]:
    """Seconds of a step, forward and backward.

    Transfers are added to both predictions in full, since a core copies what it sends and receives itself. While both
    cores compute each is slower by the measured crowding, which makes the busier one later by what the other computes.

    Returns:
        simulator: by :func:`parallel.context.simulate.simulate_plan` with the measured curves.
        kernels: by counting the kernels that the plan lists, each of the measured time of its kind.
        transfers: the part of both that is transfers.
    """
    travel = transfer_seconds(plan, shape, machine)
    simulated = summed = travel
    work, ends = plan.arrays.work[..., 2], plan.arrays.work_start[:, -1]
    listed = np.arange(work.shape[1]) < ends[:, None]
    diagonal = (listed & (work == DIAGONAL)).sum(1)
    for phase in (machine.forward, machine.backward):
        costs = replace(
            phase.costs,
            node=WORKERS,
            network=machine.bandwidth,
            nvlink=machine.bandwidth,
            network_latency=machine.latency,
            nvlink_latency=machine.latency,
        )
        result = simulate_plan(plan, kind, shape, costs, System(reshuffle="none"))
        busy = result.overlap * result.seconds
        idle = (2 * result.balance - 1) * busy
        simulated += result.seconds + (phase.crowding - 1) * idle
        each = phase.diagonal * diagonal + phase.full * (ends - diagonal)
        summed += each.max() + (phase.crowding - 1) * each.min()
    return {"simulator": float(simulated), "kernels": float(summed), "transfers": travel}


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
