"""The two products of attention over plain or quantised pages, laid out [b, n, k, p, d] (n pages of p tokens).

Codes are multiplied as they are, centred so that they are small and exact in bfloat16. Scales and offsets of tokens
move to the scores and to the probabilities, those of channels to the queries and to the output; no value is ever
dequantised. Where float32 is asked for and scales belong to tokens, codes stay bfloat16 all the same, and it is the few
rows of the other operand that are cut into three bfloat16 parts: the products are exact, and half as many bytes are read
as of codes in float32, on the units that know bfloat16. With scales of channels each page is a product of its own, too
small for that.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention.quantized import QuantizedPages
from pallas_kernels.precision import contract


def _halves(pages, dtype):
    """Centred codes as operands, one or two parts of the channels."""
    centre = 2 ** (pages.bits - 1)
    codes = [pages.codes] if pages.bits == 8 else [pages.codes & 15, pages.codes >> 4]
    # Modulo 256, which is what the difference is as a signed byte.
    return [(c - jnp.uint8(centre)).astype(jnp.int8).astype(dtype) for c in codes]


def _cut(x):
    """float32 as three bfloat16 parts along the next to last axis, whose sum is ``x`` exactly (but for subnormals)."""
    # Not a conversion there and back: XLA takes that for excess precision and drops it.
    high = jax.lax.reduce_precision(x, 8, 7)
    rest = x - high
    middle = jax.lax.reduce_precision(rest, 8, 7)
    return jnp.concatenate([high, middle, rest - middle], axis=-2)


def _affine(pages):
    """Scale and the value of the centre code, float32."""
    scale, offset = (w.astype(jnp.float32) for w in (pages.scale, pages.offset))
    return scale, offset + 2 ** (pages.bits - 1) * scale


def scores(rows, keys, dtype):
    """f32[b, n, k, p, m] of scaled queries ``rows`` [b, k, m, d]."""
    rows = jnp.broadcast_to(rows[:, None], (rows.shape[0], keys.shape[1], *rows.shape[1:]))
    spec = "bnkpd,bnkmd->bnkpm"
    if not isinstance(keys, QuantizedPages):
        # The cache as left operand: faster on CPU for a few rows of queries.
        return contract(spec, keys, rows, operand_dtype=dtype)
    scale, middle = _affine(keys)
    rows = rows.astype(dtype).astype(jnp.float32)
    left = rows * scale if keys.per_channel else rows
    cut = dtype == jnp.float32 and not keys.per_channel
    left, dtype = (_cut(left), jnp.dtype(jnp.bfloat16)) if cut else (left, dtype)
    parts = _halves(keys, dtype)
    lefts = jnp.split(left, len(parts), axis=-1)
    product = sum(contract(spec, c, q, operand_dtype=dtype) for c, q in zip(parts, lefts))
    product = sum(jnp.split(product, 3, axis=-1)) if cut else product
    if keys.per_channel:
        return product + jnp.sum(rows * middle, axis=-1)[..., None, :]
    return product * scale + middle * jnp.sum(rows, axis=-1)[..., None, :]


def mixture(weights, values, dtype):
    """f32[b, k, m, d]: ``weights`` f32[b, n, k, m, p] times values, summed over pages."""
    spec = "bnkmp,bnkpd->bnkmd"
    if not isinstance(values, QuantizedPages):
        return contract(spec, weights, values, operand_dtype=dtype).sum(axis=1)
    scale, middle = _affine(values)
    if not values.per_channel:
        weights, shift = weights * scale.swapaxes(3, 4), jnp.sum(weights * middle.swapaxes(3, 4), axis=-1)
        cut = dtype == jnp.float32
        weights, dtype = (_cut(weights), jnp.dtype(jnp.bfloat16)) if cut else (weights, dtype)
        parts = [contract(spec, weights, c, operand_dtype=dtype) for c in _halves(values, dtype)]
        product = jnp.concatenate(parts, axis=-1)
        product = sum(jnp.split(product, 3, axis=-2)) if cut else product
        return (product + shift[..., None]).sum(axis=1)
    parts = [contract(spec, weights, c, operand_dtype=dtype) for c in _halves(values, dtype)]
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return (jnp.concatenate(parts, axis=-1) * scale + total * middle).sum(axis=1)


def bits(x):
    """bfloat16 as its bits, anything else as it is.

    XLA:CPU gathers and selects integers as they are, but converts bfloat16 to float32 first: a whole pool, in a loop.
    """
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def floats(x, dtype):
    """The inverse of :func:`bits`."""
    return jax.lax.bitcast_convert_type(x, dtype) if dtype == jnp.bfloat16 else x


def silence(pages, seen):
    """``pages`` with 0 for the value of every token that no query sees; ``seen`` bool[b, n, k, p]."""
    if not isinstance(pages, QuantizedPages):
        return floats(jnp.where(seen[..., None], bits(pages), 0), pages.dtype)
    seen = seen.any(axis=3)[..., None, None] if pages.per_channel else seen[..., None]
    scale, offset = (jnp.where(seen, w, 0) for w in (pages.scale, pages.offset))
    return QuantizedPages(pages.codes, scale, offset, pages.bits)
