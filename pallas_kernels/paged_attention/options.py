"""What an implementation of paged attention is given beside the arrays, checked."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike


class Reads(NamedTuple):
    """Which keys each row reads, as the arguments of :func:`pallas_kernels.paged_attention.paged_attention`.

    Attributes:
        table: i32[B, K, n] or None.
        logical: i32[B, K, n] or None.
        count: i32[B, K] or None.
        kv_len: i32[B, K].
        q_positions: i32[B, W].
        tail: OpenTail or None.
    """

    table: Any
    logical: Any
    count: Any
    kv_len: Any
    q_positions: Any
    tail: Any

    def tabled(self, pages: int) -> "Reads":
        """With the table of consecutive pages written out; ``pages``: P."""
        if self.table is not None:
            return self
        B, K = self.kv_len.shape
        own = jnp.arange(pages, dtype=jnp.int32).reshape(B, 1, pages // B)
        return self._replace(table=jnp.broadcast_to(own, (B, K, pages // B)))


@dataclass(frozen=True)
class Options:
    """What is known when a call is traced; ``scale`` is a number."""

    granularity: str
    window: int | None
    soft_cap: float | None
    scale: float
    operand_dtype: DTypeLike | None
    return_mass: bool
