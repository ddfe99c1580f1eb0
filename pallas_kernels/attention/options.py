"""What is known of a call of attention when it is traced."""

from dataclasses import dataclass

from jax.typing import DTypeLike


@dataclass(frozen=True)
class Options:
    """As the arguments of :func:`pallas_kernels.attention.attention`, checked; ``scale`` is a number."""

    window: int | None
    soft_cap: float | None
    scale: float
    kv_layout: str
    operand_dtype: DTypeLike | None
    return_lse: bool = False
