"""What attention over a cache is told beside its arrays."""

from dataclasses import dataclass
from typing import Any

#: Taps that attention layers know: tokens read and stored, [B, K] each, and the share of the true probability that
#: lies on what was read (which costs a dense attention).
TAPS = ("kv_read", "kv_stored", "kv_recall")


@dataclass(frozen=True)
class AttendOptions:
    """Attributes are those of :class:`jaxllm.linear.Context` and of the layer.

    Attributes:
        window: positions that a query sees, its own included; None: all.
        operand: dtype of the operands of matmuls; None: that of the cache.
        implementation: of the kernels.
        bound: stored tokens that attention reads of a slot (a bucket over every row's length); None: all.
        fresh: the slots hold nothing yet: a prompt's first chunk has no pages to gather.
        ended: bool[B, n] or [B], segments whose prompt ends with this step; None: none.
        drafting: the step's tokens may be rolled back: nothing is sealed, and policies do not look.
        taps: what shall be reported.
    """

    window: int | None = None
    operand: Any = None
    implementation: str = "auto"
    bound: int | None = None
    fresh: bool = False
    ended: Any = None
    drafting: bool = False
    taps: frozenset[str] = frozenset()
