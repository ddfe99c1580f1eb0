"""Argument checks shared by the ops: every refusal names the argument, what was given and what is allowed."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Shaped


def require(condition: bool, name: str, given: object, allowed: str) -> None:
    """Raise the ValueError of a bad argument unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{name}={given!r}: expected {allowed}")


def require_shape(
    name: str, array: Shaped[Array, "..."] | None, shape: tuple[int, ...], letters: str
) -> None:
    """Raise unless ``array`` is None or has ``shape``, whose dimensions are called ``letters``."""
    if array is not None and array.shape != shape:
        raise ValueError(f"{name}.shape={array.shape}: expected {shape} [{letters}]")


def require_operand_dtype(operand_dtype: DTypeLike | None) -> None:
    """Raise unless ``operand_dtype`` is None or a float of at least 16 bits."""
    if operand_dtype is not None:
        dtype = jnp.dtype(operand_dtype)
        allowed = ("bfloat16", "float16", "float32")
        require(dtype.name in allowed, "operand_dtype", dtype.name, f"None or one of {allowed}")


def count_segments(
    segment_ids: Shaped[Array, "..."] | None,
    initial_state: Shaped[Array, "..."] | None,
    num_segments: int | None,
) -> int | None:
    """The n of the states [B, n, ...] an op takes and returns; None when no state is wanted.

    Raises:
        ValueError: ``num_segments`` disagrees with ``initial_state``, or exceeds 1 without ``segment_ids``.
    """
    if num_segments is not None:
        require(num_segments >= 1, "num_segments", num_segments, "None or at least 1")
    n = num_segments
    if initial_state is not None:
        n = initial_state.shape[1]
        require(num_segments in (None, n), "num_segments", num_segments, f"{n}, as in initial_state")
    if segment_ids is None:
        require(n in (None, 1), "num_segments", n, "1 where segment_ids is None (one segment a row)")
    return n
