"""Budgets: a number of tokens, or a part of what is stored."""

from typing import Any

import numpy as np

from jaxllm.config import require

# Far above the rounding error of a product, far below any fraction that is meant.
_SLACK = 1e-9


def check_budget(name: str, given: Any) -> None:
    """Raise ConfigError unless ``given`` is a number of tokens (int, at least 1) or a fraction (float, in (0, 1])."""
    whole = isinstance(given, int) and not isinstance(given, bool) and given >= 1
    require(
        whole or (isinstance(given, float) and 0 < given <= 1),
        name,
        given,
        "tokens (an integer of at least 1) or a fraction of what is stored (a float above 0, at most 1)",
    )


def check_fraction(name: str, given: Any) -> None:
    """Raise ConfigError unless ``given`` is above 0 and at most 1."""
    require(0 < given <= 1, name, given, "must be above 0 and at most 1")


def part(fraction: float, whole: int) -> int:
    """``fraction`` of ``whole``, rounded up; a tenth of 10 is 1, whatever float stands nearest to a tenth."""
    return int(np.ceil(fraction * whole - _SLACK))


def parts(fraction: float, most: int) -> np.ndarray:
    """:func:`part` of 0, 1, ... ``most``, i32[most + 1]: a table, so that steps count as the host does."""
    return np.ceil(fraction * np.arange(most + 1) - _SLACK).astype(np.int32)
