"""The quantised product through XLA: values of a block of outputs at a time, or products of codes with codes.

On a CPU the values of a block stay in its cache between being made and being multiplied, and the whole weight never lies
in memory at full width. Elsewhere one block is everything: XLA's own products want large operands.

Nibbles are not interleaved: the even inputs come first and then the odd ones, in the weights as they are unpacked and in
the few rows that they meet.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quantized_matmul.codes import BIAS, QuantizedRows, QuantizedWeight, e2m1_halves
from pallas_kernels.target import target

REASON = "values of a block of outputs at a time, codes multiplied as codes"

# Bytes of the values of a block: half of the second-level cache of a core.
_BLOCK_BYTES = 2**20
# Low-precision products of fewer rows leave the fast path of XLA:CPU.
_LEAST_ROWS = 8


def supports(*_args, **_options) -> str | None:
    return None


def block_outputs(w: QuantizedWeight, itemsize: int) -> int:
    """Outputs of a block: all of them but on a CPU."""
    N, K = w.shape
    if target().platform != "cpu":
        return N
    return min(N, max(16, _BLOCK_BYTES // max(K * itemsize, 1) // 16 * 16))


def split(x, w: QuantizedWeight):
    """Inputs (last axis of x) in the order of unpacked nibbles: even ones, odd ones."""
    return x if w.bits == 8 else jnp.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)


def joined(x, w: QuantizedWeight):
    """The inverse of :func:`split`."""
    return x if w.bits == 8 else jnp.stack(jnp.split(x, 2, axis=-1), axis=-1).reshape(x.shape)


def _codes(codes, bits):
    """Signed codes [n, K] of a block, in the order of :func:`split`."""
    if bits == 8:
        return codes
    both = jnp.concatenate([codes & 15, codes >> 4], axis=-1)
    return both.astype(jnp.int8) - jnp.int8(BIAS)


def _wide(x, w: QuantizedWeight):
    """f32[n, K], in the order of :func:`split`, of f[groups, n]."""
    halves = 8 // w.bits
    return jnp.tile(jnp.repeat(x.T.astype(jnp.float32), w.group // halves, axis=1), (1, halves))


def _values(w: QuantizedWeight, dtype):
    """[n, K] in the order of :func:`split`; of NVFP4 without the tensor's scale, exact in every dtype."""
    if w.tensor_scale is not None:
        halves = e2m1_halves(jnp.concatenate([w.codes & 15, w.codes >> 4], axis=-1))
        return (halves.astype(jnp.float32) * _wide(w.scale, w) * 0.5).astype(dtype)
    values = _codes(w.codes, w.bits).astype(jnp.float32) * _wide(w.scale, w)
    return (values if w.offset is None else values + _wide(w.offset, w)).astype(dtype)


def _blocks(w: QuantizedWeight, itemsize: int, body, start):
    """``body(first, block, carry)`` over blocks of outputs. The last begins earlier where they do not divide N."""
    N, block = w.shape[0], block_outputs(w, itemsize)

    def part(first):
        def along(x, axis):
            return None if x is None else lax.dynamic_slice_in_dim(x, first, block, axis)

        return QuantizedWeight(
            along(w.codes, 0), along(w.scale, 1), along(w.offset, 1), w.bits, w.tensor_scale
        )

    if block == N:
        return body(0, w, start)

    def step(i, carry):
        first = jnp.minimum(i * block, N - block)
        return body(first, part(first), carry)

    return lax.fori_loop(0, -(-N // block), step, start)


def _dot(spec, a, b):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


def scaled(sums, w: QuantizedWeight):
    """Sums of products times the scale of the tensor, where it has one."""
    return sums if w.tensor_scale is None else sums * w.tensor_scale


def _at_least(x, rows):
    return jnp.pad(x, ((0, max(0, rows - x.shape[0])), (0, 0)))


def forward(x, w: QuantizedWeight, dtype, out_dtype):
    """``x @ W.T`` with operands of ``dtype``."""
    M, N = x.shape[0], w.shape[0]
    rows = split(x.astype(dtype), w)
    if dtype != jnp.float32:
        rows = _at_least(rows, _LEAST_ROWS)

    def body(first, block, y):
        out = scaled(_dot("mk,nk->mn", rows, _values(block, dtype)), w).astype(out_dtype)
        return lax.dynamic_update_slice_in_dim(y, out, first, 1)

    y = _blocks(w, jnp.dtype(dtype).itemsize, body, jnp.zeros((rows.shape[0], N), out_dtype))
    return y[:M]


def _own(g, first, block, N):
    """Columns of g of one block; zeros where the last one repeats outputs of that before it."""
    columns = lax.dynamic_slice_in_dim(g, first, block, 1)
    done = (N // block) * block if N % block else 0
    repeated = (first == N - block) & (first + jnp.arange(block) < done)
    return jnp.where(repeated, 0, columns)


def gradient_of_rows(g, w: QuantizedWeight, dtype, out_dtype):
    """``g @ W``, the scale of the tensor left out: values are made again, nothing of the weights is kept for it."""
    g = g.astype(dtype)

    def body(first, block, dx):
        return dx + _dot("mn,nk->mk", _own(g, first, block.shape[0], w.shape[0]), _values(block, dtype))

    dx = _blocks(w, jnp.dtype(dtype).itemsize, body, jnp.zeros((g.shape[0], w.shape[1]), jnp.float32))
    return joined(dx.astype(out_dtype), w)


def gradients_of_scales(g, x, w: QuantizedWeight, dtype):
    """(of scale, of offset or None): of each group the sum of (gradient of the value) times (code, or one)."""
    rows, g = split(x.astype(dtype), w), g.astype(dtype)
    halves, groups = 8 // w.bits, w.scale.shape[0]

    def of_groups(v):
        """f32[groups, n] sums of f32[n, K]."""
        return v.reshape(v.shape[0], halves, groups, -1).sum(axis=(1, 3)).T

    def body(first, block, sums):
        dw = _dot("mn,mk->nk", lax.dynamic_slice_in_dim(g, first, block.shape[0], 1), rows)
        found = [of_groups(dw * _codes(block.codes, w.bits).astype(jnp.float32))]
        found += [] if w.offset is None else [of_groups(dw)]
        return [lax.dynamic_update_slice_in_dim(s, f, first, 1) for s, f in zip(sums, found, strict=True)]

    start = [jnp.zeros(w.scale.shape, jnp.float32)] * (1 if w.offset is None else 2)
    scale, *offset = _blocks(w, 4, body, start)
    return scale.astype(w.scale.dtype), None if w.offset is None else offset[0].astype(w.offset.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 6, 7, 8))
def differentiable(product, x, codes, scale, offset, tensor_scale, bits, dtype, out_dtype):
    """``product(x, w, dtype, out_dtype)`` of float rows, whose gradients XLA computes."""
    return product(x, QuantizedWeight(codes, scale, offset, bits, tensor_scale), dtype, out_dtype)


def _fwd(product, x, codes, scale, offset, tensor_scale, bits, dtype, out_dtype):
    y = product(x, QuantizedWeight(codes, scale, offset, bits, tensor_scale), dtype, out_dtype)
    return y, (x, codes, scale, offset, tensor_scale)


def _bwd(_product, bits, dtype, _out_dtype, residuals, g):
    x, codes, scale, offset, tensor_scale = residuals
    w = QuantizedWeight(codes, scale, offset, bits, tensor_scale)
    if tensor_scale is not None:
        # Scales of blocks are codes too. By the tensor's the derivative of the sum of g * y is that by x, times x.
        dx = gradient_of_rows(g, w, dtype, jnp.float32)
        of_tensor = (dx * x.astype(dtype).astype(jnp.float32)).sum()
        return scaled(dx, w).astype(x.dtype), None, None, None, of_tensor
    # Loops of their own, so that the one whose result nobody wants is dropped.
    return gradient_of_rows(g, w, dtype, x.dtype), None, *gradients_of_scales(g, x, w, dtype), None


differentiable.defvjp(_fwd, _bwd)


def codes_by_codes(x: QuantizedRows, w: QuantizedWeight, out_dtype):
    """Codes times codes, summed over each group, then scaled and summed in float32.

    Integers are summed exactly in int32. float8 is multiplied as bfloat16, which holds it exactly (and -128..127 too), with
    sums of float32: Hopper's own products of float8 keep fewer bits of their sums.
    """
    integers = x.codes.dtype == jnp.int8 and (w.bits == 4 or w.codes.dtype == jnp.int8)
    operand, exact = (jnp.int8, jnp.int32) if integers else (jnp.bfloat16, jnp.float32)
    (M, K), (N, groups) = x.shape, (w.shape[0], w.scale.shape[0])
    halves = 8 // w.bits

    def by_group(v):
        """[groups, rows, K / groups] of [rows, K] in the order of :func:`split`; sums do not mind the order within."""
        v = v.reshape(len(v), halves, groups, K // halves // groups)
        return jnp.moveaxis(v, 2, 0).reshape(groups, len(v), K // groups)

    held_rows = _at_least(split(lax.stop_gradient(x.codes), w).astype(operand), _LEAST_ROWS)
    codes, scale = by_group(held_rows), _at_least(x.scale, _LEAST_ROWS)
    scale = jnp.broadcast_to(scale.T[..., None], (groups, scale.shape[0], 1))
    sums = codes.astype(exact).sum(axis=2, keepdims=True).astype(jnp.float32) * scale

    def body(first, block, y):
        held = by_group(lax.stop_gradient(_codes(block.codes, w.bits)).astype(operand))

        def group(g, total):
            found = jnp.einsum("mk,nk->mn", codes[g], held[g], preferred_element_type=exact)
            total += found.astype(jnp.float32) * (scale[g] * block.scale[g].astype(jnp.float32))
            return total if w.offset is None else total + sums[g] * block.offset[g].astype(jnp.float32)

        total = jnp.zeros((codes.shape[1], held.shape[1]), jnp.float32)
        total = group(0, total) if groups == 1 else lax.fori_loop(0, groups, group, total)
        return lax.dynamic_update_slice_in_dim(y, total.astype(out_dtype), first, 1)

    return _blocks(w, 1, body, jnp.zeros((codes.shape[1], N), out_dtype))[:M]


def run(x, w, *, operand_dtype, out_dtype):
    if isinstance(x, QuantizedRows):
        return codes_by_codes(x, w, out_dtype)
    dtype = jnp.dtype(operand_dtype or x.dtype)
    return differentiable(forward, x, w.codes, w.scale, w.offset, w.tensor_scale, w.bits, dtype, out_dtype)
