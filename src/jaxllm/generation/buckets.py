"""Shape buckets: every size that a compiled step sees is rounded up to one of a few."""


def power_of_two(value: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``value`` and ``least``."""
    return max(least, 1 << max(value - 1, 0).bit_length())


def multiple(value: int, of: int) -> int:
    """``value`` rounded up to a multiple of ``of``."""
    return -(-value // of) * of
