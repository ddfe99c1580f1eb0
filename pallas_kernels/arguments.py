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


def require_floats(**arrays: Shaped[Array, "..."]) -> None:
    """Raise unless every array has a floating dtype."""
    for name, array in arrays.items():
        given = jnp.dtype(array.dtype)
        require(jnp.issubdtype(given, jnp.floating), f"{name}.dtype", given.name, "a floating dtype")


def require_integers(**arrays: Shaped[Array, "..."]) -> None:
    """Raise unless every array has an integer dtype."""
    for name, array in arrays.items():
        given = jnp.dtype(array.dtype)
        require(jnp.issubdtype(given, jnp.integer), f"{name}.dtype", given.name, "an integer dtype")


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
    *,
    tokens: tuple[int, int],
    state: tuple[int, ...],
    letters: str,
    open_ends: bool = False,
) -> int | None:
    """The n of the states [B, n, ...] an op takes and returns; None when no state is wanted.

    Args:
        segment_ids: checked to have the shape ``tokens``, [B, T].
        initial_state: checked to have the shape [B, n, *state].
        num_segments: as the op was given it.
        tokens: (B, T).
        state: shape of one state.
        letters: what the dimensions of ``state`` are called.
        open_ends: a row has one state before it and one after it, whatever its documents.

    Raises:
        ValueError: a shape is not as above; ``num_segments`` disagrees with ``initial_state``, or exceeds 1 without
            ``segment_ids`` or with ``open_ends``.
    """
    require_shape("segment_ids", segment_ids, tokens, "B, T")
    if initial_state is not None:
        shape, letters = initial_state.shape, f"B, n, {letters}"
        allowed = f"{2 + len(state)} dimensions [{letters}]"
        require(len(shape) == 2 + len(state), "initial_state.shape", shape, allowed)
        require_shape("initial_state", initial_state, (tokens[0], shape[1], *state), letters)
    if num_segments is not None:
        require(num_segments >= 1, "num_segments", num_segments, "None or at least 1")
    n = num_segments
    if initial_state is not None:
        n = initial_state.shape[1]
        require(num_segments in (None, n), "num_segments", num_segments, f"{n}, as in initial_state")
    if segment_ids is None:
        require(n in (None, 1), "num_segments", n, "1 where segment_ids is None (one segment a row)")
    if open_ends:
        require(n in (None, 1), "num_segments", n, "1 with open_ends (one state a row)")
        return 1
    return n
