"""Forward time of whole hybrid stacks under a kind of context parallelism: attention as simulated, the rest by tokens.

Products of matrices run at the best rate of the attention kernel, recurrent scans at that or at the speed of memory,
whichever is slower; a worker's time is that of the fullest one's tokens. Experts are spread over a node.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from jaxllm import preset
from parallel.context.costs import AttentionShape, Costs
from parallel.context.simulate import Result, System, plan_for, simulate, simulate_plan

STACKS = {"hybrid (Nemotron-H 8B)": "nemotron_h_8b", "MoE (Nemotron 3 Nano)": "nemotron_3_nano_30b_a3b"}
SCATTERED, RESHUFFLED = "fcp, blocks stay scattered", "fcp, reshuffled at attention"
CROWDING = (1.05, 1.1, 1.25, 1.5, 2.0)
_BFLOAT16, _FLOAT32 = 2, 4


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
    stack: Stack, lengths: np.ndarray, workers: int, costs: Costs
) -> dict[str, dict[str, float]]:
    """MFU of the whole forward pass, and shares of its time, of every kind that is possible."""
    found = {}
    plan = plan_for(lengths, workers, "fcp", costs)
    for name, reshuffle in ((RESHUFFLED, "overlapped"), (SCATTERED, "none")):
        result = simulate_plan(plan, "fcp", stack.shape, costs, System(reshuffle=reshuffle))
        # Scattered, every layer computes whole slots, filled or not; reshuffled, equal shares of the batch.
        slots = plan.capacity.slots
        scattered = name == SCATTERED
        tokens = slots * plan.capacity.block if scattered else plan.blocks.tokens / workers
        passing = _all_to_all(stack, slots, workers, costs) if scattered else _scan(stack, 1, workers, costs)
        found[name] = _total(stack, lengths, workers, costs, result, tokens, passing)
    for kind in ("ring", "zigzag", "zigzag-each", "ulysses", "document", "grouping"):
        if kind == "ulysses" and stack.shape.heads % workers:
            continue
        # Groups are chosen for the whole stack: the more tokens on one worker, the slower the other layers.
        crowding = CROWDING if kind == "grouping" else (costs.crowding,)
        made = [
            simulate(lengths, workers, kind, stack.shape, replace(costs, crowding=most)) for most in crowding
        ]
        # Of documents that lie on all workers each has two chunks everywhere; else a worker's tokens are neighbours.
        passing = (
            _all_to_all(stack, 2 * len(lengths), workers, costs)
            if kind == "zigzag-each"
            else _scan(stack, 2 if kind == "zigzag" else 1, workers, costs)
        )
        mean = float(lengths.sum()) / workers
        totals = [_total(stack, lengths, workers, costs, each, each.tokens * mean, passing) for each in made]
        found[kind] = min(totals, key=lambda total: total["seconds"])
    return found


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
) -> dict[str, float]:
    rate = costs.peak * costs.kernel_best
    scan = max(tokens * stack.scan_flops / rate, tokens * stack.scan_bytes / costs.memory)
    routed = 0.0
    if stack.routed and workers > 1:
        size = np.array([tokens * stack.routed])
        routed = float(costs.all_to_all_seconds(size, min(workers, costs.node))[0])
    attention, states = stack.attention * result.seconds, stack.recurrent * passing
    seconds = attention + states + tokens * stack.flops / rate + scan + routed
    all_tokens = float(lengths.sum())
    flops = all_tokens * (stack.flops + stack.scan_flops)
    flops += stack.attention * result.mfu * result.seconds * workers * costs.peak
    return {
        "seconds": seconds,
        "mfu": flops / (workers * costs.peak * seconds),
        "attention": attention / seconds,
        "states": states / seconds,
        "tokens": tokens * workers / all_tokens,
    }
