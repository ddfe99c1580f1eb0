"""Permutations that are the same on every platform and in every NumPy version."""

import numpy as np

_MASK = (1 << 64) - 1


def _mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser on uint64[n]; the same on every platform and NumPy version, unlike Generator streams."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def seeded_order(n: int, *key: int) -> np.ndarray:
    """A permutation of range(n), int64[n], that depends on nothing but `n` and the integers of `key`."""
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _mix(state + np.uint64((part + 0x9E3779B97F4A7C15) & _MASK))
    return np.argsort(
        _mix(state + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)), kind="stable"
    )
