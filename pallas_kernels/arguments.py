"""Argument checks shared by the ops: every refusal names the argument, what was given and what is allowed."""

import math
from numbers import Integral, Real
from typing import Any

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


def _require_dtype(kind: Any, allowed: str, arrays: dict[str, Shaped[Array, "..."] | None]) -> None:
    for name, array in arrays.items():
        if array is not None:
            given = jnp.dtype(array.dtype)
            require(jnp.issubdtype(given, kind), f"{name}.dtype", given.name, allowed)


def require_floats(**arrays: Shaped[Array, "..."] | None) -> None:
    """Raise unless every array is None or has a floating dtype."""
    _require_dtype(jnp.floating, "a floating dtype", arrays)


def require_integers(**arrays: Shaped[Array, "..."] | None) -> None:
    """Raise unless every array is None or has an integer dtype."""
    _require_dtype(jnp.integer, "an integer dtype", arrays)


def require_booleans(**arrays: Shaped[Array, "..."] | None) -> None:
    """Raise unless every array is None or of booleans."""
    _require_dtype(jnp.bool_, "bool", arrays)


def require_count(name: str, value: object, optional: str = "") -> None:
    """Raise unless ``value`` is a whole number of at least 1, or None where ``optional`` is "None or "."""
    whole = isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1
    require(whole or (bool(optional) and value is None), name, value, f"{optional}at least 1, a whole number")


def require_score_options(window: object, soft_cap: object, scale: object) -> None:
    """Raise unless the window, soft cap and scale of attention are None or numbers that make sense."""
    require_count("window", window, "None or ")
    capped = isinstance(soft_cap, Real) and 0 < float(soft_cap) < math.inf
    require(soft_cap is None or capped, "soft_cap", soft_cap, "None or a positive number")
    require(scale is None or isinstance(scale, Real), "scale", scale, "None or a number")


def require_operand_dtype(operand_dtype: DTypeLike | None) -> None:
    """Raise unless ``operand_dtype`` is None or a float of at least 16 bits."""
    if operand_dtype is not None:
        allowed = ("bfloat16", "float16", "float32")
        try:
            name = jnp.dtype(operand_dtype).name
        except TypeError:
            name = operand_dtype
        require(name in allowed, "operand_dtype", name, f"None or one of {allowed}")


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
        segment_ids: checked to be integers of the shape ``tokens``, [B, T].
        initial_state: checked to be floats of the shape [B, n, *state].
        num_segments: as the op was given it.
        tokens: (B, T).
        state: shape of one state.
        letters: what the dimensions of ``state`` are called.
        open_ends: a row has one state before it and one after it, whatever its documents.

    Raises:
        ValueError: a shape or dtype is not as above; ``num_segments`` disagrees with ``initial_state``, or exceeds 1 without
            ``segment_ids`` or with ``open_ends``.
    """
    require_shape("segment_ids", segment_ids, tokens, "B, T")
    require_integers(segment_ids=segment_ids)
    require_floats(initial_state=initial_state)
    if initial_state is not None:
        shape, letters = initial_state.shape, f"B, n, {letters}"
        allowed = f"{2 + len(state)} dimensions [{letters}]"
        require(len(shape) == 2 + len(state), "initial_state.shape", shape, allowed)
        require_shape("initial_state", initial_state, (tokens[0], shape[1], *state), letters)
    require_count("num_segments", num_segments, "None or ")
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
