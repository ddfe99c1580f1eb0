"""General compressors on the same text: bits per byte that need no training at all."""

import gzip
import lzma
import math


def gzip_bits_per_byte(data: bytes) -> float:
    """Bits per byte of `gzip -9`; `data` is the concatenated text, not empty."""
    return 8 * len(gzip.compress(_not_empty(data), 9, mtime=0)) / len(data)


def xz_bits_per_byte(data: bytes) -> float:
    """Bits per byte of `xz -9`; `data` is the concatenated text, not empty."""
    return 8 * len(lzma.compress(_not_empty(data), preset=9)) / len(data)


def bits_per_byte(nats_per_token: float, scored_tokens: int, scored_bytes: int) -> float:
    """A language model's loss in the compressors' unit.

    Args:
        nats_per_token: mean loss over the scored tokens.
        scored_tokens: their number, end tokens included.
        scored_bytes: UTF-8 bytes that they stand for.
    """
    if scored_bytes < 1:
        raise ValueError(f"scored_bytes: got {scored_bytes}; at least one byte of text must have been scored")
    return nats_per_token * scored_tokens / (math.log(2) * scored_bytes)


def _not_empty(data: bytes) -> bytes:
    if not data:
        raise ValueError("data: got no bytes; bits per byte need some text")
    return data
