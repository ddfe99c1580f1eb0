"""Paged attention on Hopper: pages by TMA, split over the keys; the shares and the open tail are merged in XLA."""

import jax.numpy as jnp

from pallas_kernels import tiles
from pallas_kernels.attention.common import ROWS
from pallas_kernels.paged_attention import mosaic_kernel, mosaic_mass, pools, shares
from pallas_kernels.paged_attention.mosaic_ring import HIGH, KEYS, Places, Tiles
from pallas_kernels.paged_attention.quantized import QuantizedPages
from pallas_kernels.paged_attention.selection import indices

REASON = "pages by TMA and warpgroup matrix products on Hopper, split over the keys"

# Channels that one operand may have: more are too many registers at once.
_WIDEST = 128


def supports(q, k_pages, v_pages, *, granularity, operand_dtype, **_options) -> str | None:
    refusal = pools.refusal(q, k_pages, v_pages, operand_dtype, (64, 96, 128, 256))
    if refusal is not None:
        return refusal
    P, K, page, d = k_pages.shape
    if page not in (16, 32, 64):
        return f"pages of 16, 32 or 64 tokens, not {page}"
    if granularity == "token":
        return "single tokens cannot be gathered by TMA on Hopper"
    if not isinstance(k_pages, QuantizedPages):
        return None
    if d > _WIDEST:
        return f"codes of {d} channels and their sums take more registers than there are, at most {_WIDEST}"
    if P * K * page < KEYS:
        return (
            f"a quantised pool holds at least {KEYS} tokens, those of its heads together, not {P * K * page}"
        )
    row = d * k_pages.scale.dtype.itemsize
    if k_pages.per_channel and row % 128:
        return f"scales of a page's channels must fill multiples of 128 bytes for TMA, not {row}"
    return None


def _places(shape, page, table, logical, count, granularity, kv_len):
    """What the kernels are told of the table: padded to whole tiles."""
    B, K, n = shape
    per_tile = KEYS // page
    spare = -n % per_tile
    used = jnp.full((B, K), n, jnp.int32) if count is None else jnp.clip(count, 0, n)
    lengths, tokens = kv_len, None
    if logical is None:
        lengths = jnp.minimum(kv_len, used * page)
        used = -(-lengths // page)
    else:
        tokens = indices(shape, page, logical, count, granularity).reshape(B, K, -1)
        tokens = shares.padded(tokens, (n + spare) * page, 2, -1)
    return Places(shares.padded(table, n + spare, 2), -(-used // per_tile), lengths, tokens)


def _mass(rows, lse, positions, keys, places, shape, config, options):
    """f32[B, K, n, page]: the sum of each key's probability over the query rows."""
    B, K, n, page = shape
    blocks, size = mosaic_mass.columns_of(rows.shape[2])
    queries, sums = shares.operands(shares.blocked(rows, blocks, size, 2), keys, HIGH)
    found = mosaic_mass.launch(
        *(queries, keys, sums, shares.blocked(lse, blocks, size, 2)),
        *(shares.blocked(positions, blocks, size, 1, -1), places),
        config=config,
        splits=shares.splits(config.splits, B * K * blocks, places.table.shape[2] * page // KEYS),
        **options,
    ).sum(axis=2)
    written = jnp.arange(found.shape[2]) < places.spans[..., None] * KEYS
    return jnp.where(written, found, 0)[..., : n * page].reshape(shape)


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
    del operand_dtype
    B, _, H, d = q.shape
    P, K, page, _ = k_pages.shape
    if table is None:
        table = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32).reshape(B, 1, P // B), (B, K, P // B))
    keys, values = (pools.pool(pages, _WIDEST) for pages in (k_pages, v_pages))
    places = _places(table.shape, page, jnp.clip(table, 0, P - 1), logical, count, granularity, kv_len)
    rows, positions = shares.rows_of(q, K), jnp.repeat(q_positions, H // K, axis=1)
    live = rows.shape[2]
    m = -(-live // ROWS) * ROWS
    kind = "bfloat16" if keys.bits == 16 else f"{keys.bits} bits by {keys.kind}"
    config = tiles.tiles("paged_attention", f"d{d} page{page} {kind}", Tiles())
    options = {"scale": scale, "soft_cap": soft_cap, "window": window}
    queries, sums = shares.operands(shares.padded(rows, m, 2), keys, HIGH)
    out, lse = mosaic_kernel.launch(
        *(queries, keys, values, sums, shares.padded(positions, m, 1, -1), places),
        rows=m if m > ROWS else -(-live // 8) * 8,
        config=config,
        splits=shares.splits(config.splits, B * K * (m // ROWS), places.table.shape[2] * page // KEYS),
        **options,
    )

    def mass_of(lse):
        return _mass(rows, lse, positions, keys, places, (*table.shape, page), config, options)

    kept = {"q_positions": q_positions, "tail": tail, **options}
    return shares.finished(q, K, out, lse, mass_of=mass_of if return_mass else None, **kept)
