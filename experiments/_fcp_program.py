"""What a compiled training step of context parallelism holds: purposes of its collectives, and the bytes of a plan."""

import re
from typing import Any

import numpy as np

from experiments._fcp_step import Case, batch, settings
from experiments._hlo import Instruction, parse
from experiments._schedule import Collective, collectives, summed
from jaxllm.model.functional import abstract_params, flatten
from jaxllm.train.context import Scatterer
from parallel.context import planned_bytes, scatter
from parallel.context.traffic import bytes_of
from parallel.mesh import abstract_mesh

KEYS, GRADIENTS, BOTH = "keys and values", "their gradients", "keys, values and gradients"
KEYS_AND_GRADIENTS = (KEYS, GRADIENTS, BOTH)
# What is exchanged in a Python function, innermost first.
PURPOSES = {
    "ulysses_attention": "heads for tokens",
    "scaled_states": "states of blocks",
    "transformed_states": "states of blocks",
    "halo": "inputs of convolutions",
    "Placement.share": "parameters",
    "through_experts": "tokens to experts",
    "Scattered.sum_group": "balance of experts",
}
_FLOATS = re.compile(r"\b(bf16|f32)\[")


def purpose(one: Collective) -> str:
    """What a collective brings.

    Raises:
        ValueError: nobody knows; every collective of a step must be accounted for.
    """
    # Nothing else is exchanged so, and XLA does not keep where it is from.
    origin = ("context_attention",) if one.kind == "ragged-all-to-all" else one.origin
    for name in origin:
        if name == "context_attention":
            found = set(_FLOATS.findall(one.shape))
            return KEYS if found == {"bf16"} else GRADIENTS if found == {"f32"} else BOTH
        if name == "scaled_states" and one.kind in ("all-gather", "reduce-scatter"):
            return "decays of blocks"
        if name == "Placement.share" and one.kind == "reduce-scatter":
            return "gradients of parameters"
        if name in PURPOSES:
            return PURPOSES[name]
    # Of gradients, of the loss, of their norm; what XLA has combined of many has lost where it is from.
    if one.kind == "all-reduce":
        return "gradients and sums"
    raise ValueError(f"{one.name}: {one.kind} of {one.shape[:200]} in {one.origin[:6]}: of unknown purpose")


def described(case: Case, text: str) -> dict[str, Any]:
    """What stands in the text of a compiled case, beside what its plan says."""
    program = parse(text)
    found = collectives(program)

    def attention(work: Instruction) -> bool:
        """The loop over a stage's pairs of blocks."""
        return work.opcode == "while" and "context_attention" in program.origin(work)

    return {
        "parameters": sum(p.size for p in flatten(abstract_params(case.config)).values()),
        "collectives": summed(found, purpose, attention),
        "gathered_keys_bytes": gathered_keys(case, found),
        "exchange": None if case.strategy == "ulysses" else exchange(case, found),
    }


def gathered_keys(case: Case, found: list[Collective]) -> int:
    """Bytes of keys, values or their gradients that all-gathers bring, by where they are from or by their shape."""
    attention = case.config.attention
    assert attention is not None
    own = f"{case.block},{attention.num_kv_heads},{attention.head_dim}]"
    return sum(
        one.times * one.bytes
        for one in found
        if one.kind == "all-gather" and ("context_attention" in one.origin or own in one.shape)
    )


def exchange(case: Case, found: list[Collective]) -> dict[str, Any]:
    """The exchange of keys and values: what the plan needs and sends, and what the program brings a device.

    Returns:
        ``need_bytes`` and ``sent_bytes`` of each device, of one layer's keys and values fetched once; ``ratio`` of their
        sums; ``fetched_bytes`` and ``returned_bytes``, of a device in a whole step, as they stand in the program: blocks in
        bfloat16, their gradients in float32; ``fetches``, how often a layer's are fetched. A ragged all-to-all stands
        there with the most that it may bring.
    """
    cfg = case.config
    assert cfg.attention is not None
    config = Scatterer(cfg, settings(case), abstract_mesh(case.shape)).config
    plans = [plan for group in scatter(batch(case).segment_ids, config).plans for plan in group]
    slot = 2 * case.block * cfg.attention.num_kv_heads * cfg.attention.head_dim * 2
    need, sent = (
        np.concatenate([planned_bytes(plan, slot, name) for plan in plans])
        for name in ("ragged", case.exchange)
    )
    capacity, layers = plans[0].capacity, sum(letter in "*W" for letter in cfg.letters)
    bring = [one for one in found if purpose(one) in KEYS_AND_GRADIENTS]

    def brought(dtype: str) -> int:
        parts = [re.findall(rf"\b{dtype}\[[\d,]*\]", one.shape) for one in bring]
        return sum(one.times * bytes_of(" ".join(part)) for one, part in zip(bring, parts))

    fetched = brought("bf16")
    return {
        "documents": [plan.blocks.document.max().item() + 1 for plan in plans],
        "imbalance": max(plan.balance.work for plan in plans),
        "slots": capacity.slots,
        "stages": capacity.stages,
        "rounds": sum(capacity.shifts) if capacity.shifts else capacity.rounds,
        "slot_bytes": slot,
        "need_bytes": need.tolist(),
        "sent_bytes": sent.tolist(),
        "ratio": float(sent.sum() / need.sum()),
        "fetched_bytes": fetched,
        "returned_bytes": brought("f32"),
        "fetches": fetched / layers / float(sent[0] if case.exchange == "rotate" else capacity.rounds * slot),
    }
