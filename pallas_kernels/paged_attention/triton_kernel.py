"""The Triton kernels of paged attention over single tokens: rows gathered by index, which Mosaic cannot do on Hopper.

The copy engine of Hopper gathers no rows (it does from Blackwell on), and a copy of its own for every token is a
descriptor and a barrier's arrival for 256 bytes. Triton loads a tile of 64 rows by 64 addresses, a row's bytes by
neighbouring threads, and pipelines such loads through shared memory. Entries of no token are not loaded.

Bound: 2 d bytes of each selected key and value (a row of 256 bytes is two lines of the cache, nothing is wasted), with
codes d bytes or d / 2 and its scales, of tokens 4 bytes in sectors of 32, of channels another 4 d; and 8 bytes of index.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.attention.common import LOG2E, capped
from pallas_kernels.paged_attention.pools import Pool

# Finite, so that the difference of two peaks is a number before anything was seen.
_NOTHING = -1e30


@dataclass(frozen=True)
class Entries:
    """What is read.

    Attributes:
        tokens: i32[B, K, n], n a multiple of the tile: logical token of each entry, -1 for none.
        rows: i32[B, K, n], where it lies in [P K page].
        spans: i32[B, K, 1], tiles to read.
    """

    tokens: Any
    rows: Any
    spans: Any


def _pool_specs(pool: Pool):
    pl = compat.pl
    whole = [pool.pages.reshape(-1, pool.pages.shape[3])]
    whole += [each if each.ndim == 1 else each.reshape(-1, each.shape[2]) for each in pool.affine]
    return whole, [pl.BlockSpec(each.shape, lambda *_, n=each.ndim: (0,) * n) for each in whole]


def _rows(ref, there, *at):
    """Rows of a pool by index, 0 without a load where nothing is there; the interpreter knows no such mask."""
    mask = there if len(ref.shape) == 1 else there[:, None]
    if compat.interpreting():
        return jnp.where(mask, ref[at], jnp.zeros((), ref.dtype))
    return compat.pltriton.load(ref.at[at], mask=mask, other=0)


def _tile(pool: Pool, refs, row, there):
    """Parts bf16[T, width] of the rows, and scale and offset f32[T] of tokens or None.

    Codes are as they are; with scales of channels they are the values. Rows of no token are 0.
    """
    held = _rows(refs[0], there, row, slice(None))
    if pool.bits == 16:
        return [held], None
    codes = [held & 15, held >> 4] if pool.bits == 4 else [held]
    codes = [each.astype(jnp.float32) for each in codes]
    if pool.kind == "token":
        affine = [_rows(ref, there, row).astype(jnp.float32) for ref in refs[1:]]
        return [each.astype(jnp.bfloat16) for each in codes], affine
    found = []
    for part, each in enumerate(codes):
        at = (lax.div(row, jnp.int32(pool.pages.shape[2])), compat.pl.ds(part * pool.width, pool.width))
        scale, offset = (_rows(ref, there, *at).astype(jnp.float32) for ref in refs[1:])
        found.append((each * scale + offset).astype(jnp.bfloat16))
    return found, None


def _scores(pool, refs, q, sums, position, token, row, *, scale, soft_cap, window):
    """f32[rows, T] in units of log 2, -inf where nothing is seen, and bool[rows, T]."""
    keys, affine = _tile(pool, refs, row, token >= 0)
    score: Any = sum(compat.pltriton.dot(part, each, trans_b=True) for part, each in zip(q, keys))
    if affine is not None:
        score = score * affine[0][None, :] + sums[:, None] * affine[1][None, :]
    distance = position[:, None] - token[None, :]
    seen = (token >= 0)[None, :] & (distance >= 0)
    seen = seen if window is None else seen & (distance < window)
    return jnp.where(seen, capped(score, scale, soft_cap), -jnp.inf), seen


def _steps(spans, splits):
    """First and last + 1 of the tiles of this share: those in use, divided evenly."""
    total = spans[0]
    size = lax.div(total + (splits - 1), jnp.int32(splits))
    first = jnp.minimum(compat.pl.program_id(0) * size, total)
    return first, jnp.minimum(first + size, total)


def _attention_body(keys, values, tokens, splits, score_of, refs, out, lse):
    q_ref, positions, sums_ref, spans, token_ref, row_ref = refs[:6]
    k_refs = refs[6 : 7 + len(keys.affine)]
    v_refs = refs[7 + len(keys.affine) :]
    parts, rows = keys.parts, q_ref.shape[1]
    q = [q_ref[part] for part in range(parts)]
    position, sums = positions[...], sums_ref[...]

    def step(index, carry):
        totals, shift, peak, weight = carry
        at = compat.pl.ds(index * tokens, tokens)
        token, row = token_ref[at], row_ref[at]
        score, _seen = score_of(keys, k_refs, q, sums, position, token, row)
        above = jnp.maximum(peak, score.max(axis=1))
        weights = jnp.exp2(score - above[:, None])
        fade = jnp.exp2(peak - above)
        weight = weight * fade + weights.sum(axis=1)
        operands, affine = _tile(values, v_refs, row, token >= 0)
        if affine is not None:
            shift = shift * fade + (weights * affine[1][None, :]).sum(axis=1)
            weights = weights * affine[0][None, :]
        weights = weights.astype(jnp.bfloat16)
        totals = [t * fade[:, None] + compat.pltriton.dot(weights, v) for t, v in zip(totals, operands)]
        return totals, shift, above, weight

    zero = jnp.zeros((rows,), jnp.float32)
    totals = [jnp.zeros((rows, values.width), jnp.float32) for _ in range(parts)]
    carry = (totals, zero, zero + _NOTHING, zero)
    totals, shift, peak, weight = lax.fori_loop(*_steps(spans, splits), step, carry)
    some = weight > 0
    safe = jnp.where(some, weight, 1.0)
    for part, total in enumerate(totals):
        out[part] = (total + shift[:, None]) / safe[:, None]
    lse[...] = jnp.where(some, peak * (1 / LOG2E) + jnp.log(safe), -jnp.inf)


def _mass_body(keys, tokens, splits, score_of, refs, mass):
    q_ref, positions, sums_ref, spans, token_ref, row_ref, lse = refs[:7]
    q = [q_ref[part] for part in range(keys.parts)]
    position, sums, top = positions[...], sums_ref[...], lse[...] * LOG2E

    def step(index, carry):
        at = compat.pl.ds(index * tokens, tokens)
        token, row = token_ref[at], row_ref[at]
        score, _ = score_of(keys, refs[7:], q, sums, position, token, row)
        mass[at] = jnp.exp2(score - top[:, None]).sum(axis=0)
        return carry

    lax.fori_loop(*_steps(spans, splits), step, 0)


def launch(
    q: Any,
    sums: Any,
    positions: Any,
    entries: Entries,
    keys: Pool,
    values: Pool | None,
    lse: Any,
    *,
    block: int,
    tile: int,
    splits: int,
    warps: int,
    stages: int,
    scale: float,
    soft_cap: float | None,
    window: int | None,
):
    """Attention of every share of the keys, or the mass of every key.

    Args:
        q: bf16[parts, B, K, m, d / parts], m a multiple of ``block``.
        sums: f32[B, K, m], sum of each query's channels.
        positions: i32[B, m], position of each query row; -1 for padding.
        entries: which tokens.
        keys: pool of keys.
        values: pool of values; None: the mass, from ``lse``.
        lse: f32[B, K, m], finite, over all keys; None for attention.
        block: query rows of a program, a power of two.
        tile: entries of a step.
        splits: shares of the keys.
        warps: of a program.
        stages: steps in flight.

    Returns:
        (f32[parts, B, K, splits, m, d / parts], f32[B, K, splits, m]): outputs and log-sum-exps; or the mass
        f32[B, K, m / block, n], a sum over each block's query rows; steps beyond ``spans`` are not written.
    """
    pl = compat.pl
    parts, B, K, m, width = q.shape
    n, blocks = entries.tokens.shape[2], m // block

    def of_rows(lead):
        """The block's rows of an array [B, m] (``lead`` 1) or [B, K, m] (2)."""
        return pl.BlockSpec((None,) * lead + (block,), lambda s, k, b: (*(b // blocks, k)[:lead], b % blocks))

    def of_head(size):
        return pl.BlockSpec((None, None, size), lambda s, k, b: (b // blocks, k, 0))

    q_spec = pl.BlockSpec(
        (parts, None, None, block, width), lambda s, k, b: (0, b // blocks, k, b % blocks, 0)
    )
    key_arrays, key_specs = _pool_specs(keys)
    arrays = [q, positions, sums, entries.spans, entries.tokens, entries.rows]
    specs = [q_spec, of_rows(1), of_rows(2), of_head(1), of_head(n), of_head(n)]
    score_of = partial(_scores, scale=scale, soft_cap=soft_cap, window=window)
    if values is None:
        arrays += [lse, *key_arrays]
        specs += [of_rows(2), *key_specs]
        shapes = jax.ShapeDtypeStruct((B, K, blocks, n), jnp.float32)
        outs = pl.BlockSpec((None, None, None, n), lambda s, k, b: (b // blocks, k, b % blocks, 0))
        name, count = "paged_attention_token_mass", 1
        body = partial(_mass_body, keys, tile, splits, score_of)
    else:
        value_arrays, value_specs = _pool_specs(values)
        arrays += [*key_arrays, *value_arrays]
        specs += [*key_specs, *value_specs]
        shapes = [
            jax.ShapeDtypeStruct((parts, B, K, splits, m, width), jnp.float32),
            jax.ShapeDtypeStruct((B, K, splits, m), jnp.float32),
        ]
        outs = [
            pl.BlockSpec(
                (parts, None, None, None, block, width),
                lambda s, k, b: (0, b // blocks, k, s, b % blocks, 0),
            ),
            pl.BlockSpec((None, None, None, block), lambda s, k, b: (b // blocks, k, s, b % blocks)),
        ]
        name, count = "paged_attention_tokens", 2
        body = partial(_attention_body, keys, values, tile, splits, score_of)
    run = compat.triton_call(
        lambda *refs: body(refs[:-count], *refs[-count:]),
        name=name,
        num_warps=warps,
        num_stages=stages,
        grid=(splits, K, B * blocks),
        in_specs=specs,
        out_specs=outs,
        out_shape=shapes,
    )
    return run(*arrays)
