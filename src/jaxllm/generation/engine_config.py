"""Sizes of an engine."""

from dataclasses import dataclass, field

from jaxllm.cache.kv import KVCache
from jaxllm.cache.policies.base import Policy
from jaxllm.config import positive, require


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine's pools; one set of compiled steps per value.

    Attributes:
        slots: requests decoded at once.
        capacity: most positions of a request, prompt and output.
        kv: how keys and values are kept.
        policy: what attention reads of them, and which stay.
        stored: most tokens that a slot stores in every cache group; None: its capacity.
        chunk: longest piece of a prompt that one call reads.
        stop_width: most stop ids of a request.
        penalties: requests may use penalties (costs slots * vocabulary counts).
        vocab_limit: ids of the tokenizer, where the model has more; the others are never sampled. None: all are.
        thinking_width: longest closing or ending sequence of a thinking budget; 0: requests may have none.
        taps: what layers report of every decode step, for :attr:`Engine.report`.
        newline_ids: ids whose text has a newline, at which a thinking budget may close; only with budgets.
    """

    slots: int
    capacity: int
    kv: KVCache
    chunk: int = 512
    stop_width: int = 4
    penalties: bool = False
    vocab_limit: int | None = None
    thinking_width: int = 0
    newline_ids: frozenset[int] = frozenset()
    policy: Policy = field(default_factory=Policy)
    stored: tuple[int, ...] | None = None
    taps: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        positive(slots=self.slots, capacity=self.capacity, chunk=self.chunk, stop_width=self.stop_width)
        require(
            self.vocab_limit is None or self.vocab_limit >= 1,
            "vocab_limit",
            self.vocab_limit,
            "must be None or at least 1",
        )
        require(self.thinking_width >= 0, "thinking_width", self.thinking_width, "must be at least 0")
