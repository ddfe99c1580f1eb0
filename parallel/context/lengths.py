"""Published distributions of document lengths, from which batches for plans and simulations are drawn."""

import numpy as np

# Shares of documents up to so many tokens, in the data of MagiAttention's benchmark (SandAI-org/MagiAttention).
_MAGI_LIMITS = np.array(
    [500, 1_024, 2_048, 4_096, 8_192, 16_384, 32_768, 65_536, 131_072, 196_608], dtype=np.int64
)
_MAGI_SHARES = np.array([46.8, 24.6, 15.7, 7.3, 3.1, 1.3, 0.85, 0.14, 0.17, 0.14])


def _log_normal(rng: np.random.Generator, count: int) -> np.ndarray:
    """Median 8K, sigma 1.8, cut at 512K: the shape of the trace of arXiv 2605.08524, whose figures are not public."""
    return np.clip(rng.lognormal(np.log(8192), 1.8, count), 64, 524_288).astype(np.int64)


def _magi(rng: np.random.Generator, count: int) -> np.ndarray:
    """Uniform within each bar of the histogram; no document under 64 tokens."""
    bar = rng.choice(len(_MAGI_SHARES), count, p=_MAGI_SHARES / _MAGI_SHARES.sum())
    below = np.concatenate([[63], _MAGI_LIMITS[:-1]])
    return rng.integers(below[bar] + 1, _MAGI_LIMITS[bar] + 1)


DISTRIBUTIONS = {"log-normal": _log_normal, "magiattention": _magi}


def draw_lengths(name: str, tokens: int, seed: int) -> np.ndarray:
    """Documents of exactly ``tokens`` tokens together; the last one is cut to fit.

    Args:
        name: a key of ``DISTRIBUTIONS``.
        tokens: of all documents.
        seed: of the draw.

    Returns:
        i64[documents].

    Raises:
        ValueError: an unknown name, or ``tokens`` below 1.
    """
    if name not in DISTRIBUTIONS:
        raise ValueError(f"distribution={name!r}: must be one of {', '.join(DISTRIBUTIONS)}")
    if tokens < 1:
        raise ValueError(f"tokens={tokens}: must be at least 1")
    rng = np.random.default_rng(seed)
    drawn = np.zeros(0, np.int64)
    while drawn.sum() < tokens:
        drawn = np.concatenate([drawn, DISTRIBUTIONS[name](rng, 256)])
    ends = np.cumsum(drawn)
    last = int(np.searchsorted(ends, tokens))
    kept = drawn[: last + 1].copy()
    kept[-1] -= ends[last] - tokens
    return kept
