"""Weights in 4 or 8 bits and activations in 8 bits: integer or float8 codes, and a scale per group of inputs.

``value = code * scale + offset``, the code signed: -8..7, -128..127, or a float of 8 bits: e4m3 (finite up to 448) or
e5m2 (up to 57344), all of which bfloat16 holds exactly. A code that is not a number makes its products so. Symmetric weights have no offset. That of
asymmetric ones is a float, not a zero point among the codes: groups far from 0 would be lost (Atom, arXiv 2310.19102, and
its serving kernel). GPTQ's and AWQ's ``(u - z) * scale`` with unsigned u is ``code = u - 8``, ``offset = (8 - z) * scale``.

Four-bit codes are packed two to a byte along the inputs, plus 8: the even input in the low nibble, the odd one in the
high one. Scales stand [groups, outputs], so that those of neighbouring outputs are one row of memory.

NVFP4 (see ``nvfp4.py``) is packed alike: codes e2m1 without a bias, scales e4m3 of 16 inputs, times one of the tensor.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int8, UInt8

from pallas_kernels.arguments import require

BIAS = 8
GROUPS = (32, 64, 128)
# Codes of 8 bits: integers, and the floats of OCP's 8-bit specification.
EIGHT_BITS = ("int8", "float8_e4m3fn", "float8_e5m2")
# Below it a group counts as zero (Atom).
LEAST = 1e-5


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedWeight:
    """A weight of N outputs and K inputs, K-major.

    Attributes:
        codes: u8[N, K / 2] for 4 bits, two to a byte as this file's head says; i8, e4m3 or e5m2[N, K] for 8.
        scale: float[K / group, N]; of NVFP4 e4m3[K / 16, N].
        offset: value of code 0, as scale; None: symmetric.
        bits: 4 or 8.
        tensor_scale: f32[], a factor of all values, of NVFP4 only, whose codes are then e2m1.
    """

    codes: Any
    scale: Any
    offset: Any = None
    bits: int = field(default=4, metadata={"static": True})
    tensor_scale: Any = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the values."""
        N, width = self.codes.shape
        return N, width * 8 // self.bits

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.shape[1] // self.scale.shape[0]

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedRows:
    """M rows of K activations that several products may share.

    Attributes:
        codes: i8, e4m3 or e5m2[M, K].
        scale: f32[M, A], A the number of groups of K inputs each: 1, or that of the weights.
    """

    codes: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, int]:
        """(M, K)."""
        return self.codes.shape


def pack_codes(codes: Int[Array, "*rest K"]) -> UInt8[Array, "*rest K2"]:
    """Codes -8..7 two to a byte: the even input low, the odd one high.

    Raises:
        ValueError: K is odd.
    """
    require(codes.shape[-1] % 2 == 0, "codes.shape", codes.shape, "an even last dimension; pad it with 0")
    biased = (codes + BIAS).astype(jnp.uint8)
    return biased[..., 0::2] | (biased[..., 1::2] << 4)


def unpack_nibbles(packed: UInt8[Array, "*rest K2"]) -> UInt8[Array, "*rest K"]:
    """Codes 0..15 as they lie in the bytes."""
    return jnp.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def unpack_codes(packed: UInt8[Array, "*rest K2"]) -> Int8[Array, "*rest K"]:
    """The inverse of :func:`pack_codes`."""
    return unpack_nibbles(packed).astype(jnp.int8) - jnp.int8(BIAS)


def e2m1_halves(nibbles: UInt8[Array, "*rest"]) -> Int8[Array, "*rest"]:
    """Twice the values of e2m1 codes 0..15, which are integers: 0, 1, 2, 3, 4, 6, 8, 12, and negative from code 8 on."""
    bits = nibbles.astype(jnp.int8)
    magnitude = bits & jnp.int8(7)
    most = jnp.where(magnitude == 7, jnp.int8(2), jnp.int8(0))
    twice = magnitude + jnp.maximum(magnitude - jnp.int8(4), jnp.int8(0)) + most
    return jnp.where(bits > 7, -twice, twice)


def in_range(code_dtype: DTypeLike) -> tuple[Any, float]:
    """The dtype of codes of 8 bits, and the largest magnitude that the quantisers scale to."""
    dtype = jnp.dtype(code_dtype)
    require(dtype.name in EIGHT_BITS, "code_dtype", dtype.name, f"one of {EIGHT_BITS}")
    return dtype, 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)


def rounded(steps: Any, dtype: Any, top: float) -> Any:
    """Nearest codes of 8 bits, ties to even; floats are clipped first, for beyond their range lies no number."""
    if dtype == jnp.int8:
        return jnp.clip(jnp.round(steps), -top - 1, top).astype(dtype)
    return jnp.clip(steps, -top, top).astype(dtype)


def quantize_weight(
    w: Float[Array, "N K"],
    *,
    bits: int = 4,
    group: int | None = 128,
    symmetric: bool = True,
    clip: float = 1.0,
    scale_dtype: DTypeLike = jnp.float16,
    code_dtype: DTypeLike = jnp.int8,
    shared: int = 1,
) -> QuantizedWeight:
    """Round to the nearest code, group by group (Atom's quantiser B; with ``clip=0.85`` as for its weights).

    Codes are found with scale and offset as they are stored. A constant group is kept up to the rounding of its offset
    where asymmetric; groups of zeros are kept in either way.

    Args:
        w: finite values, K-major: [outputs, inputs].
        bits: 4 or 8.
        group: inputs that share a scale: 32, 64 or 128; None: all of an output's.
        symmetric: the largest magnitude of a group is code 7 or 127 (448 of e4m3, 57344 of e5m2); else the range of a group is divided into
            ``2 ** bits - 1`` steps, for 4 bits only.
        clip: factor of the range about its middle (0 where symmetric), above 0 and at most 1; values beyond it get the outermost codes.
        scale_dtype: of scale and offset: float16, bfloat16 or float32. The steps of e5m2 are 450 times smaller than those
            of int8: bfloat16 or float32 has room for them.
        code_dtype: int8, float8_e4m3fn or float8_e5m2, with 8 bits; codes of 4 bits are integers.
        shared: neighbouring outputs whose groups have one scale, where symmetric; it is stored for each of them.

    Raises:
        ValueError: an argument is not as above, or ``group`` does not divide K or ``shared`` N.
    """
    require(w.ndim == 2, "w.shape", w.shape, "two dimensions [N, K], outputs first")
    N, K = w.shape
    require(bits in (4, 8), "bits", bits, "4 or 8")
    require(group is None or group in GROUPS, "group", group, f"one of {GROUPS}, or None for a whole row")
    size = K if group is None else group
    require(size > 0 and K % size == 0 and K * bits % 8 == 0, "w.shape", w.shape, f"K a multiple of {size}")
    require(0 < clip <= 1, "clip", clip, "above 0 and at most 1")
    require(symmetric or bits == 4, "symmetric", symmetric, "True with 8 bits")
    fits = shared == 1 or (shared > 0 and symmetric and N % shared == 0)
    require(fits, "shared", shared, f"1, or where symmetric a divisor of N = {N}")
    dtype = jnp.dtype(scale_dtype)
    floats = ("float16", "bfloat16", "float32")
    require(dtype.name in floats, "scale_dtype", dtype.name, f"one of {floats}")
    values = w.astype(jnp.float32).reshape(N, K // size, size)
    kind, top = in_range(code_dtype)
    require(kind == jnp.int8 or bits == 8, "code_dtype", kind.name, "int8 with 4 bits")
    top = 7.0 if bits == 4 else top
    if symmetric:
        largest = jnp.abs(values).max(axis=2)
        largest = jnp.repeat(largest.reshape(N // shared, shared, K // size).max(axis=1), shared, axis=0)
        step, offset = jnp.maximum(largest, LEAST) * clip / top, None
    else:
        low, high = values.min(axis=2), values.max(axis=2)
        step = (high - low) * clip / (2 * top + 1)
        # Of an even number of codes, 0 is the one half a step above the middle.
        offset = ((low + high) / 2 + step / 2).astype(dtype)
    # A scale that its dtype rounds to 0 would lose its group: the least it has stands for it.
    scale = jnp.where(step > 0, jnp.maximum(step.astype(dtype), jnp.finfo(dtype).smallest_subnormal), 0)
    scale = scale.astype(dtype)
    shifted = values if offset is None else values - offset.astype(jnp.float32)[..., None]
    divisor = jnp.where(scale > 0, scale, 1).astype(jnp.float32)[..., None]
    codes = rounded(shifted / divisor, kind, top).reshape(N, K)
    return QuantizedWeight(
        codes if bits == 8 else pack_codes(codes), scale.T, None if offset is None else offset.T, bits
    )


def signed_codes(w: QuantizedWeight) -> Int8[Array, "N K"] | Float[Array, "N K"]:
    """The codes themselves, unpacked; of NVFP4 their values."""
    if w.tensor_scale is not None:
        return e2m1_halves(unpack_nibbles(w.codes)).astype(jnp.float32) * 0.5
    return w.codes if w.bits == 8 else unpack_codes(w.codes)


def dequantize_weight(w: QuantizedWeight) -> Float[Array, "N K"]:
    """The values in float32."""

    def wide(x: Any) -> Any:
        return jnp.repeat(x.astype(jnp.float32).T, w.group, axis=1)

    values = signed_codes(w).astype(jnp.float32) * wide(w.scale)
    if w.tensor_scale is not None:
        return values * w.tensor_scale
    return values if w.offset is None else values + wide(w.offset)


def quantize_rows(
    x: Float[Array, "M K"],
    *,
    group: int | None = None,
    clip: float = 1.0,
    code_dtype: DTypeLike = jnp.int8,
    bits: int = 8,
) -> QuantizedRows:
    """Round activations to 8 bits, or 4 that lie one code to a byte, symmetric, the range that of each row or each group of a row (Atom's quantiser B).

    Args:
        x: finite rows.
        group: inputs that share a scale: 32, 64 or 128; None: all of a row's.
        clip: factor of the range, above 0 and at most 1.
        code_dtype: int8, float8_e4m3fn or float8_e5m2; of 4 bits int8.
        bits: 8, or 4: codes -8..7, of which -8 is reached with ``clip`` below 1 only.

    Raises:
        ValueError: an argument is not as above, or ``group`` does not divide K.
    """
    require(x.ndim == 2, "x.shape", x.shape, "two dimensions [M, K]")
    M, K = x.shape
    require(group is None or group in GROUPS, "group", group, f"one of {GROUPS}, or None for a whole row")
    size = K if group is None else group
    require(size > 0 and K % size == 0, "x.shape", x.shape, f"K a multiple of {size}")
    require(0 < clip <= 1, "clip", clip, "above 0 and at most 1")
    values = x.astype(jnp.float32).reshape(M, K // size, size)
    kind, top = in_range(code_dtype)
    require(bits in (4, 8), "bits", bits, "4 or 8")
    require(kind == jnp.int8 or bits == 8, "code_dtype", kind.name, "int8 with 4 bits")
    top = 7.0 if bits == 4 else top
    scale = jnp.maximum(jnp.abs(values).max(axis=2), LEAST) * clip / top
    codes = rounded(values / scale[..., None], kind, top)
    return QuantizedRows(codes.reshape(M, K), scale)


def dequantize_rows(x: QuantizedRows) -> Float[Array, "M K"]:
    """The values in float32."""
    return x.codes.astype(jnp.float32) * jnp.repeat(x.scale, x.shape[1] // x.scale.shape[1], axis=1)
