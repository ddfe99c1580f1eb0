"""Paged attention on Hopper: pages by TMA, split over the keys; the shares and the open tail are merged in XLA."""

import jax.numpy as jnp

from pallas_kernels import tiles
from pallas_kernels.attention.merge import merge
from pallas_kernels.paged_attention import xla
from pallas_kernels.paged_attention.mosaic_kernel import KEYS, ROWS, Operands, Tiles, launch
from pallas_kernels.paged_attention.quantized import QuantizedPages
from pallas_kernels.paged_attention.selection import indices

REASON = "pages by TMA and warpgroup matrix products on Hopper, split over the keys"

_MULTIPROCESSORS = 132


def supports(q, k_pages, v_pages, *, granularity, operand_dtype, return_mass, **_options) -> str | None:
    pools = (k_pages, v_pages)
    coded = [isinstance(pool, QuantizedPages) for pool in pools]
    if any(coded):
        if not all(coded) or k_pages.bits != v_pages.bits:
            return "keys and values must be plain both, or of the same number of bits"
        if any(pool.per_channel for pool in pools):
            return "scales per channel have no kernel"
        least = min(pool.scale.dtype.itemsize for pool in pools) * k_pages.shape[2]
        if least % 128:
            return f"the scales of a page must fill 128 bytes for TMA (64 tokens of float16), not {least}"
        dtypes = {q.dtype.name}
    else:
        dtypes = {q.dtype.name, k_pages.dtype.name, v_pages.dtype.name}
    if dtypes != {"bfloat16"}:
        return f"queries and plain pages must be bfloat16, not {', '.join(sorted(dtypes))}"
    if operand_dtype is not None and jnp.dtype(operand_dtype) != jnp.bfloat16:
        return f"operands are bfloat16, not {jnp.dtype(operand_dtype).name}"
    page, d = k_pages.shape[2:]
    if page not in (16, 32, 64):
        return f"pages of 16, 32 or 64 tokens, not {page}"
    if d not in (64, 128):
        return f"heads of 64 or 128 channels, not {d}"
    if granularity == "token":
        return "single tokens cannot be gathered by TMA on Hopper"
    if return_mass:
        return "it does not return mass"
    return None


def _combined(out, lse):
    """One output [B, K, m, d] and lse [B, K, m] of all shares of the keys; ``out`` in parts of the channels."""
    peak = jnp.max(lse, axis=2, keepdims=True)
    peak = jnp.where(peak == -jnp.inf, 0, peak)
    weight = jnp.exp(lse - peak)
    total = jnp.sum(weight, axis=2)
    mean = jnp.sum(weight[..., None] * out, axis=3) / jnp.where(total > 0, total, 1)[..., None]
    return jnp.concatenate(list(mean), axis=-1), peak[:, :, 0] + jnp.log(total)


def _padded_rows(x, m):
    """[B, ..., rows, d] with zeros up to m rows."""
    return jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, m - x.shape[-2]), (0, 0)])


def _queries(q, K, m, parts):
    """bf16[parts, B, K, m, d / parts] and the sums f32[B, K, m] of the channels."""
    B, W, H, d = q.shape
    rows = q.reshape(B, W, K, H // K, d).swapaxes(1, 2).reshape(B, K, -1, d)
    rows = _padded_rows(rows, m)
    halves = jnp.split(rows, parts, axis=-1)
    # The high half of four-bit codes is read 16 times too large.
    halves = [
        half if part == 0 else half * jnp.asarray(1 / 16, half.dtype) for part, half in enumerate(halves)
    ]
    return jnp.stack(halves), jnp.sum(rows.astype(jnp.float32), axis=-1)


def run(
    q,
    k_pages,
    v_pages,
    *,
    table,
    logical,
    count,
    granularity,
    kv_len,
    q_positions,
    tail,
    window,
    soft_cap,
    scale,
    operand_dtype,
    return_mass,
):
    del operand_dtype, return_mass
    B, W, H, d = q.shape
    P, K, page, _ = k_pages.shape
    if table is None:
        table = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32).reshape(B, 1, P // B), (B, K, P // B))
    n = table.shape[2]
    per_tile = KEYS // page
    spare = -n % per_tile
    used = jnp.full((B, K), n, jnp.int32) if count is None else jnp.clip(count, 0, n)
    lengths, tokens = kv_len, None
    if logical is None:
        lengths = jnp.minimum(kv_len, used * page)
        used = -(-lengths // page)
    else:
        tokens = indices((B, K, n), page, logical, count, granularity).reshape(B, K, -1)
        tokens = jnp.pad(tokens, ((0, 0), (0, 0), (0, spare * page)), constant_values=-1)
    groups = H // K
    m = -(-W * groups // ROWS) * ROWS
    coded = isinstance(k_pages, QuantizedPages)
    parts = 2 if coded and k_pages.bits == 4 else 1
    queries, sums = _queries(q, K, m, parts)
    positions = jnp.repeat(q_positions, groups, axis=1)
    given = Operands(
        q=queries,
        pools=(k_pages.codes, v_pages.codes) if coded else (k_pages, v_pages),
        scales=tuple(w[..., 0] for pool in (k_pages, v_pages) for w in (pool.scale, pool.offset))
        if coded
        else (),
        sums=sums if coded else None,
        table=jnp.pad(jnp.clip(table, 0, P - 1), ((0, 0), (0, 0), (0, spare))),
        spans=-(-used // per_tile),
        lengths=lengths,
        positions=jnp.pad(positions, ((0, 0), (0, m - W * groups)), constant_values=-1),
        tokens=tokens,
    )
    kind = f"{k_pages.bits} bits" if coded else "bfloat16"
    config = tiles.tiles("paged_attention", f"d{d} page{page} {kind}", Tiles())
    fill = -(-2 * _MULTIPROCESSORS // (B * K * (m // ROWS)))
    splits = config.splits or max(1, min(fill, -(-n // per_tile)))
    out, lse = launch(given, scale=scale, soft_cap=soft_cap, window=window, config=config, splits=splits)
    out, lse = _combined(out[..., : W * groups, :], lse[..., : W * groups])
    if tail is not None:
        rows = xla.grouped_rows(q, K, scale)
        part = xla.tail_part(rows, tail, q_positions, window, soft_cap, jnp.dtype(jnp.bfloat16))
        out, lse = merge((out, lse), part[:2])
    return xla.ungrouped(out, W).astype(q.dtype), xla.ungrouped(lse, W), None
