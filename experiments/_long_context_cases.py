"""What ``long_context`` compares: every policy at a fraction of the sequence, and the dtypes of keys and values."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from experiments._long_context_steps import PAGE
from jaxllm import H2O, RKV, KVCache, ModelConfig, Pillar, Policy, Quest, SnapKV, StreamingLLM, Tactic
from jaxllm.cache.state import cache_groups, init_cache
from jaxllm.cache.traffic import held

DTYPES = ("compute", "int8", "int4")
BUDGETS = {
    "quick": (1 / 16,),
    "one": (1 / 16,),
    "default": (1 / 64, 1 / 16, 1 / 8, 1.0),
    "full": tuple(2.0**-i for i in range(6, -1, -1)),
}
MASSES = {"quick": (), "one": (0.9,), "default": (0.5, 0.9, 1.0), "full": (0.5, 0.75, 0.9, 0.95, 0.99, 1.0)}
# Of the quick grid: what the rule of entry needs, one that selects, one that evicts.
QUICK = ("window", "quest", "rkv")
# The only policy that reads the last tokens and no other: what a task has to be out of reach of.
WINDOW = "window"
# They read a part and keep everything; all others evict.
SELECTING = ("quest", "tactic", "pillar")
# Lines that say most; where there are many samples they are measured on all of them before the others are.
URGENT = (
    (WINDOW, 1 / 16),
    (WINDOW, 1 / 8),
    ("quest", 1 / 16),
    ("quest", 1 / 8),
    ("pillar", 1 / 16),
    ("tactic", 0.9),
)
# Models with fewer attention layers cannot spare the two that Quest leaves dense as published.
_LAYERS_FOR_DENSE = 4


@dataclass(frozen=True)
class Variant:
    """One line of the table.

    Attributes:
        policy: its name here.
        setting: the budget, a fraction of the sequence; Tactic's is its mass.
        dtype: of keys and values.
        made: the policy itself.
    """

    policy: str
    setting: float
    dtype: str
    made: Policy

    @property
    def key(self) -> tuple[str, float, str]:
        """What tells it from the others."""
        return self.policy, self.setting, self.dtype


def policies(budget: float, tokens: int, layers: int) -> dict[str, Policy]:
    """Every policy that has a budget.

    Args:
        budget: fraction of ``tokens``; 1 is everything, through the policy's own paths.
        tokens: of the whole sequence. What evicts stores at most ``budget`` of them, buffers included, which is the
            memory that it would be given; SnapKV keeps that much of the prompt and the whole answer. What selects reads
            that part of what is stored.
        layers: attention layers of the model.
    """
    # Twice everything: buffers must not cut into it. At least two pages: what stays has to fill one.
    most = 2 * tokens if budget == 1 else max(round(budget * tokens), 2 * PAGE)

    def buffer(published: int) -> int:
        return max(1, min(published, most // 4))

    cut, rolled, gathered = buffer(128), buffer(16), buffer(64)
    heavy = (most - gathered) // 2
    rkv: dict[str, Any] = {"budget": most - cut, "buffer": cut, "window": min(8, (most - cut) // 2)}
    dense = (0, 1) if layers >= _LAYERS_FOR_DENSE else ()
    return {
        WINDOW: StreamingLLM(sinks=0, recent=most - rolled, buffer=rolled),
        "streaming": StreamingLLM(recent=most - rolled - 4, buffer=rolled),
        "quest": Quest(budget=float(budget), dense_layers=dense),
        "pillar": Pillar(budget=float(budget), least=PAGE),
        "rkv": RKV(**rkv),
        # Without redundancy what is left is SnapKV's rule, applied to the answer as well.
        "rkv, importance only": RKV(**rkv, mix=1.0),
        "h2o": H2O(heavy=heavy, recent=most - gathered - heavy, buffer=gathered),
        "snapkv": SnapKV(budget=most, window=min(32, most // 2)),
    }


def variants(grid: str, tokens: int, layers: int) -> list[Variant]:
    """All lines of one task at one length; dense in the compute dtype, which the others are held against, is the first.

    Args:
        grid: "quick", "one" (a sixteenth), "default" (few budgets; int4 at a sixteenth, int8 dense) or "full".
        tokens: of the whole sequence.
        layers: attention layers of the model.
    """
    found = []
    for dtype in DTYPES if grid in ("default", "full") else DTYPES[:1]:
        budgets, masses = settings(grid, dtype)
        found.append(Variant("dense", 1.0, dtype, Policy()))
        for budget in budgets:
            made = policies(budget, tokens, layers)
            named = QUICK if grid == "quick" else tuple(made)
            if grid == "default" and budget == 1:
                # What evicts nothing is dense; what selects everything goes through its tables.
                named = tuple(name for name in made if name in SELECTING)
            found += [Variant(name, budget, dtype, made[name]) for name in named]
        found += [Variant("tactic", mass, dtype, Tactic(mass=mass)) for mass in masses]
    return found


def urgent(variant: Variant) -> bool:
    """Whether a line comes before the others."""
    if variant.dtype == "compute":
        return (variant.policy, variant.setting) in URGENT
    return variant.policy == "dense" and variant.dtype == "int4"


def settings(grid: str, dtype: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Budgets and Tactic's masses of a grid in one dtype."""
    if grid == "full" or dtype == "compute":
        return BUDGETS[grid], MASSES[grid]
    return ((1 / 16,), (0.9,)) if dtype == "int4" and grid == "default" else ((), ())


def held_bytes(cfg: ModelConfig, variant: Variant, prompt: int, new: int) -> int:
    """Bytes of a cache for one such sequence after its prompt; nothing is allocated."""
    capacity = -(-(prompt + new) // PAGE) * PAGE
    rules, _ = cache_groups(cfg, variant.made)
    stored = tuple(capacity if rule is None else min(rule.stored(prompt, new), capacity) for rule in rules)
    kv = KVCache(variant.dtype, PAGE)
    return held(jax.eval_shape(lambda: init_cache(cfg, 1, capacity, kv, variant.made, stored=stored))).total


def budget_label(fraction: float) -> str:
    """1/64 for 0.015625."""
    return "1" if fraction == 1 else f"1/{np.round(1 / fraction):.0f}"
