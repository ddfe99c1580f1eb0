"""Time of whole hybrid stacks under a kind of context parallelism: attention as simulated, the rest by tokens.

Products of matrices run at the best rate of the attention kernel, recurrent scans at that or at the speed of memory,
whichever is slower; a worker's time is that of the fullest one's tokens. Experts are spread over a node.
Backward takes twice the products of forward, of a recurrence two and a half times, as of attention, for scores are computed
again; it passes states and experts' rows the same way back. Nothing else is computed twice, and the reduction of gradients
of weights is not part of it.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from jaxllm import preset
from parallel.context import STRATEGIES
from parallel.context.costs import AttentionShape, Costs
from parallel.context.magi import CHUNK
from parallel.context.outcome import Result
from parallel.context.simulate import KINDS, Passes, System, plan_for, simulate, simulate_plan, ways_of

STACKS = {"hybrid (Nemotron-H 8B)": "nemotron_h_8b", "MoE (Nemotron 3 Nano)": "nemotron_3_nano_30b_a3b"}
SCATTERED, RESHUFFLED = "fcp, blocks stay scattered", "fcp, reshuffled at attention"
CROWDING = (1.05, 1.1, 1.25, 1.5, 2.0)
_BFLOAT16, _FLOAT32 = 2, 4


class _Times(NamedTuple):
    """Of forward: products of matrices, operations and memory of recurrences, messages."""

    products: float
    scan_flops: float
    scan_bytes: float
    messages: float


_TIMES = {
    "forward": _Times(1.0, 1.0, 1.0, 1.0),
    "backward": _Times(2.0, 2.5, 2.0, 1.0),
}


@dataclass(frozen=True)
class Stack:
    """What a stack needs for each token, all layers together, and what its recurrent layers pass on.

    Attributes:
        shape: of attention.
        attention: layers of it.
        recurrent: layers.
        flops: of products of matrices, for a token.
        scan_flops: of recurrences.
        scan_bytes: that recurrences read and write.
        state: bytes of one recurrent state of one layer.
        halo: bytes that a convolution of one layer needs of the block before.
        routed: bytes that a token's experts receive and send back.
    """

    shape: AttentionShape
    attention: int
    recurrent: int
    flops: float
    scan_flops: float
    scan_bytes: float
    state: float
    halo: float
    routed: float


def stack_of(name: str) -> Stack:
    """The stack of a preset with Mamba-2 layers."""
    cfg = preset(name)
    attention, mamba, width = cfg.attention, cfg.mamba, cfg.hidden_size
    assert attention is not None and mamba is not None
    count = {letter: cfg.pattern.count(letter) for letter in "*M-E"}
    queries, keys = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    inner, groups = mamba.num_heads * mamba.head_dim, mamba.n_groups * mamba.state_size
    entering = 2 * inner + 2 * groups + mamba.num_heads
    flops = count["*"] * 2 * width * (2 * queries + 2 * keys)
    flops += count["M"] * 2 * width * (entering + inner)
    routed = 0.0
    if cfg.mlp is not None:
        flops += count["-"] * 4 * width * cfg.mlp.intermediate_size
    if cfg.moe is not None:
        moe = cfg.moe
        experts = moe.top_k * moe.intermediate_size + (moe.shared_intermediate_size or 0)
        flops += count["E"] * (4 * width * experts + 2 * width * moe.num_experts)
        routed = float(count["E"] * 2 * moe.top_k * width * _BFLOAT16)
    # Within a chunk scores and outputs; the states of chunks are made and read.
    inside = 2 * mamba.chunk_size * (groups + inner)
    states = 4 * inner * mamba.state_size
    state = inner * mamba.state_size * _FLOAT32
    return Stack(
        AttentionShape(attention.num_heads, attention.num_kv_heads, attention.head_dim),
        count["*"],
        count["M"],
        float(flops),
        float(count["M"] * (inside + states)),
        count["M"] * ((entering + inner) * _BFLOAT16 + 2 * state / mamba.chunk_size),
        float(state),
        float((mamba.conv_kernel - 1) * (inner + 2 * groups) * _BFLOAT16),
        routed,
    )


def stack_results(
    stack: Stack, lengths: np.ndarray, workers: int, costs: Costs, passes: tuple[Passes, ...]
) -> dict[str, dict[str, dict[str, float]]]:
    """MFU of all layers, and shares of their time, of every kind that is possible, by passes."""
    found: dict[str, dict[str, dict[str, float]]] = {each: {} for each in passes}
    mean = float(lengths.sum()) / workers
    plan = plan_for(lengths, workers, "fcp", costs)
    for name in (RESHUFFLED, SCATTERED):
        # Scattered, every layer computes whole slots, filled or not; reshuffled, equal shares of the batch.
        slots = plan.capacity.slots
        scattered = name == SCATTERED
        tokens = float(slots * plan.capacity.block) if scattered else mean
        passing = _all_to_all(stack, slots, workers, costs) if scattered else _scan(stack, 1, workers, costs)
        for each in passes:
            system = System(reshuffle="none" if scattered else "overlapped")
            result = simulate_plan(plan, "fcp", stack.shape, costs, system, each)
            found[each][name] = _total(stack, lengths, workers, costs, result, tokens, passing, each)
    for kind in (kind for kind in KINDS if not kind.startswith("fcp")):
        if kind == "ulysses" and stack.shape.heads % workers:
            continue
        passing = _passing(stack, kind, lengths, workers, costs)
        plan = plan_for(lengths, workers, kind, costs) if kind in STRATEGIES else None
        for each in passes:
            if plan is not None:
                made = [simulate_plan(plan, kind, stack.shape, costs, passes=each)]
            else:
                # Groups are chosen for the whole stack: the more tokens on one worker, the slower the other layers.
                made = [
                    simulate(lengths, workers, kind, stack.shape, replace(costs, crowding=most), passes=each)
                    for most in (CROWDING if kind == "grouping" else (costs.crowding,))
                ]
            totals = [_total(stack, lengths, workers, costs, r, r.tokens * mean, passing, each) for r in made]
            found[each][kind] = min(totals, key=lambda total: total["seconds"])
    return found


def _passing(stack: Stack, kind: str, lengths: np.ndarray, workers: int, costs: Costs) -> float:
    """Seconds of passing a layer's states on under a rival."""
    # Of documents that lie on all workers each has two chunks everywhere, and chunks that are dealt out lie anywhere; else
    # a worker's tokens are neighbours.
    if kind == "zigzag-each":
        return _all_to_all(stack, 2 * len(lengths), workers, costs)
    if kind == "magi":
        return _all_to_all(stack, -(-int(lengths.sum()) // (CHUNK * workers)), workers, costs)
    return _scan(stack, 2 if kind == "zigzag" else 1, workers, costs)


def _all_to_all(stack: Stack, chunks: int, workers: int, costs: Costs) -> float:
    """Seconds of passing states between chunks that lie anywhere: elements of all states to one worker each, and back."""
    if workers == 1:
        return 0.0
    size = np.array([chunks * (stack.state + stack.halo)])
    return 2 * float(costs.all_to_all_seconds(size, workers)[0])


def _scan(stack: Stack, chunks: int, workers: int, costs: Costs) -> float:
    """Seconds of passing states along neighbouring workers, by doubling."""
    if workers == 1:
        return 0.0
    bandwidth, latency = costs.neighbour(workers)
    return math.ceil(math.log2(workers)) * (chunks * (stack.state + stack.halo) / bandwidth + latency)


def _total(
    stack: Stack,
    lengths: np.ndarray,
    workers: int,
    costs: Costs,
    result: Result,
    tokens: float,
    passing: float,
    passes: Passes,
) -> dict[str, float]:
    times = [_TIMES[way] for way in ways_of(passes)]
    products, scan_flops, messages = (
        sum(getattr(each, name) for each in times) for name in ("products", "scan_flops", "messages")
    )
    rate = costs.peak * costs.kernel_best
    scan = sum(
        max(
            tokens * stack.scan_flops * each.scan_flops / rate,
            tokens * stack.scan_bytes * each.scan_bytes / costs.memory,
        )
        for each in times
    )
    routed = 0.0
    if stack.routed and workers > 1:
        size = np.array([tokens * stack.routed])
        routed = messages * float(costs.all_to_all_seconds(size, min(workers, costs.node))[0])
    attention, states = stack.attention * result.seconds, stack.recurrent * passing * messages
    seconds = attention + states + tokens * stack.flops * products / rate + scan + routed
    all_tokens = float(lengths.sum())
    flops = all_tokens * (stack.flops * products + stack.scan_flops * scan_flops)
    flops += stack.attention * result.mfu * result.seconds * workers * costs.peak
    return {
        "seconds": seconds,
        "mfu": flops / (workers * costs.peak * seconds),
        "attention": attention / seconds,
        "states": states / seconds,
        "tokens": tokens * workers / all_tokens,
    }
