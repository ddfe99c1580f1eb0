"""Keys and values as the GPU kernels read them, and which of them they can read."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from pallas_kernels.paged_attention.quantized import QuantizedPages


@dataclass(frozen=True)
class Pool:
    """Keys or values as a kernel reads them.

    Attributes:
        pages: bf16[P, K, page, d], or codes as in QuantizedPages.
        affine: (scale, offset): float[P K page] of tokens, float[P, K, d] of channels; () for plain pages.
        bits: of a value.
        parts: of the channels, each an operand of its own; 2 for four bits, whose halves share bytes, and for more
            than 128 channels.
    """

    pages: Any
    affine: tuple[Any, ...] = ()
    bits: int = 16
    parts: int = 1

    @property
    def kind(self) -> str:
        """What a scale belongs to: "plain" (there is none), "token" or "channel"."""
        return "plain" if not self.affine else "token" if self.affine[0].ndim == 1 else "channel"

    @property
    def width(self) -> int:
        """Channels of a part."""
        held = self.pages.shape[3]
        return held * 8 * self.pages.dtype.itemsize // self.bits // self.parts


def pool(pages: Any, widest: int) -> Pool:
    """The pool of an argument; no byte moves. Parts have at most ``widest`` channels."""
    P, K, _, d = pages.shape
    parts = 1 if d <= widest else 2
    if not isinstance(pages, QuantizedPages):
        return Pool(pages, parts=parts)
    shape = (P, K, d) if pages.per_channel else (-1,)
    affine = tuple(w.reshape(shape) for w in (pages.scale, pages.offset))
    return Pool(pages.codes, affine, pages.bits, 2 if pages.bits == 4 else parts)


def refusal(q: Any, k_pages: Any, v_pages: Any, operand_dtype: Any, heads: tuple[int, ...]) -> str | None:
    """Why no kernel reads these pools, or has heads of another size than ``heads``; None where one may."""
    pools = (k_pages, v_pages)
    coded = [each for each in pools if isinstance(each, QuantizedPages)]
    if len(coded) == 1 or (coded and k_pages.bits != v_pages.bits):
        return "keys and values must be plain both, or of the same number of bits"
    if coded and v_pages.per_channel:
        return "values must have scales per token"
    dtypes = {q.dtype.name, *(each.dtype.name for each in pools if not coded)}
    if dtypes != {"bfloat16"}:
        return f"queries and plain pages must be bfloat16, not {', '.join(sorted(dtypes))}"
    if operand_dtype is not None and jnp.dtype(operand_dtype) != jnp.bfloat16:
        return f"operands are bfloat16, not {jnp.dtype(operand_dtype).name}"
    d = k_pages.shape[3]
    if d not in heads:
        return f"heads of {', '.join(map(str, heads[:-1]))} or {heads[-1]} channels, not {d}"
    return None
