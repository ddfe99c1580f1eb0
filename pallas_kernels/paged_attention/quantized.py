"""Pages of 8-bit or 4-bit keys or values: asymmetric codes with a scale and an offset (Atom, arXiv 2310.19102).

``value = code * scale + offset``. The offset is a float, as in Atom's serving kernel: with a clamped integer zero
point a vector far from 0 would be lost. Four-bit codes lie two to a byte, channel j in the low nibble and channel
j + d / 2 in the high one, so that either half of the channels is an operand of a matmul without any interleaving.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from pallas_kernels.arguments import require


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedPages:
    """A pool of P pages of K heads, each of ``page`` tokens of d channels.

    Attributes:
        codes: u8[P, K, page, d] for 8 bits, u8[P, K, page, d / 2] for 4 (two to a byte, see this file's head).
        scale: of one token and head, float[P, K, page, 1]; or of one channel of a sealed page, float[P, K, 1, d].
        offset: value of code 0, as scale.
        bits: 8 or 4.
    """

    codes: Any
    scale: Any
    offset: Any
    bits: int = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """(P, K, page, d) of the values."""
        *rest, last = self.codes.shape
        return (*rest, last * 8 // self.bits)

    @property
    def per_channel(self) -> bool:
        """Whether scale and offset belong to a channel of a page rather than to a token."""
        return self.scale.shape[-2] == 1 and self.scale.shape[-1] > 1

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


def pack_nibbles(codes: UInt8[Array, "*rest d"]) -> UInt8[Array, "*rest d2"]:
    """Codes 0..15 two to a byte: channel j low, channel j + d / 2 high.

    Raises:
        ValueError: d is odd.
    """
    d = codes.shape[-1]
    require(d % 2 == 0, "codes.shape", codes.shape, "an even last dimension")
    return codes[..., : d // 2] | (codes[..., d // 2 :] << 4)


def unpack_nibbles(packed: UInt8[Array, "*rest d2"]) -> UInt8[Array, "*rest d"]:
    """The inverse of :func:`pack_nibbles`."""
    return jnp.concatenate([packed & 15, packed >> 4], axis=-1)


def quantize_pages(
    pages: Float[Array, "P K page d"],
    *,
    bits: int,
    per_channel: bool = False,
    scale_dtype: DTypeLike = jnp.float16,
) -> QuantizedPages:
    """Round pages to codes: the range of each group is divided into ``2 ** bits - 1`` steps.

    The codes are found with scale and offset as they are stored, so that an error is at most half a step and what
    their rounding cuts off the ends of the range. A constant group is kept exactly up to the rounding of its offset.

    Args:
        pages: values; finite, within the range of ``scale_dtype``.
        bits: 8 or 4.
        per_channel: one group per channel of each page (keys, whose channels differ more than their tokens), instead
            of one per token and head.
        scale_dtype: of scale and offset: float16, bfloat16 or float32.

    Raises:
        ValueError: ``bits`` or ``scale_dtype`` is not as above, d is odd with 4 bits, or a page of one token or a head
            of one channel, whose two kinds of group could not be told apart.
    """
    require(bits in (4, 8), "bits", bits, "4 or 8")
    dtype = jnp.dtype(scale_dtype)
    require(
        dtype.name in ("float16", "bfloat16", "float32"),
        "scale_dtype",
        dtype.name,
        "a float of 16 or 32 bits",
    )
    require(pages.ndim == 4, "pages.shape", pages.shape, "four dimensions [P, K, page, d]")
    require(min(pages.shape[2:]) > 1, "pages.shape", pages.shape, "at least two tokens and two channels")
    values = pages.astype(jnp.float32)
    axis = 2 if per_channel else 3
    low, high = (reduce(values, axis=axis, keepdims=True) for reduce in (jnp.min, jnp.max))
    top = 2**bits - 1
    scale, offset = ((high - low) / top).astype(dtype), low.astype(dtype)
    step = jnp.where(scale > 0, scale, 1).astype(jnp.float32)
    codes = jnp.clip(jnp.round((values - offset.astype(jnp.float32)) / step), 0, top).astype(jnp.uint8)
    return QuantizedPages(codes if bits == 8 else pack_nibbles(codes), scale, offset, bits)


def dequantize_pages(pages: QuantizedPages) -> Float[Array, "P K page d"]:
    """The values in float32."""
    codes = pages.codes if pages.bits == 8 else unpack_nibbles(pages.codes)
    return codes.astype(jnp.float32) * pages.scale.astype(jnp.float32) + pages.offset.astype(jnp.float32)
