"""Paged attention on Hopper: pages by TMA, split over the keys; the shares and the open tail are merged in XLA."""

import jax.numpy as jnp

from pallas_kernels import tiles
from pallas_kernels.attention.common import ROWS
from pallas_kernels.paged_attention import mosaic_kernel, mosaic_mass, pools, shares
from pallas_kernels.paged_attention.mosaic_ring import HIGH, KEYS, Places, Tiles
from pallas_kernels.paged_attention.options import Options, Reads
from pallas_kernels.paged_attention.quantized import QuantizedPages
from pallas_kernels.paged_attention.selection import indices

REASON = "pages by TMA and warpgroup matrix products on Hopper, split over the keys"
BESIDE = "the two products with the open tail (three with mass) and the merge of the shares"

# Channels that one operand may have: more are too many registers at once.
_WIDEST = 128


def supports(q, k_pages, v_pages, _reads: Reads, options: Options) -> str | None:
    refusal = pools.refusal(q, k_pages, v_pages, options.operand_dtype, (64, 96, 128, 256))
    if refusal is not None:
        return refusal
    P, K, page, d = k_pages.shape
    if page not in (16, 32, 64):
        return f"pages of 16, 32 or 64 tokens, not {page}"
    if options.granularity == "token":
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


def _places(reads: Reads, page, pages, granularity):
    """What the kernels are told of the table: padded to whole tiles."""
    B, K, n = reads.table.shape
    per_tile = KEYS // page
    spare = -n % per_tile
    used = jnp.full((B, K), n, jnp.int32) if reads.count is None else jnp.clip(reads.count, 0, n)
    lengths, tokens = reads.kv_len, None
    if reads.logical is None:
        lengths = jnp.minimum(lengths, used * page)
        used = -(-lengths // page)
    else:
        tokens = indices(reads.table.shape, page, reads.logical, reads.count, granularity).reshape(B, K, -1)
        tokens = shares.padded(tokens, (n + spare) * page, 2, -1)
    table = jnp.clip(reads.table, 0, pages - 1)
    return Places(shares.padded(table, n + spare, 2), -(-used // per_tile), lengths, tokens)


def _mass(rows, lse, positions, keys, places, shape, config, scores):
    """f32[B, K, n, page]: the sum of each key's probability over the query rows."""
    B, K, n, page = shape
    blocks, size = mosaic_mass.columns_of(rows.shape[2])
    queries, sums = shares.operands(shares.blocked(rows, blocks, size, 2), keys, HIGH)
    found = mosaic_mass.launch(
        *(queries, keys, sums, shares.blocked(lse, blocks, size, 2)),
        *(shares.blocked(positions, blocks, size, 1, -1), places),
        config=config,
        splits=shares.splits(config.splits, B * K * blocks, places.table.shape[2] * page // KEYS),
        **scores,
    ).sum(axis=2)
    written = jnp.arange(found.shape[2]) < places.spans[..., None] * KEYS
    return jnp.where(written, found, 0)[..., : n * page].reshape(shape)


def run(q, k_pages, v_pages, reads: Reads, options: Options):
    B, _, H, d = q.shape
    P, K, page, _ = k_pages.shape
    reads = reads.tabled(P)
    keys, values = (pools.pool(pages, _WIDEST) for pages in (k_pages, v_pages))
    places = _places(reads, page, P, options.granularity)
    rows, positions = shares.rows_of(q, K), jnp.repeat(reads.q_positions, H // K, axis=1)
    live = rows.shape[2]
    m = -(-live // ROWS) * ROWS
    kind = "bfloat16" if keys.bits == 16 else f"{keys.bits} bits by {keys.kind}"
    config = tiles.tiles("paged_attention", f"d{d} page{page} {kind}", Tiles())
    scores = shares.of_scores(options)
    queries, sums = shares.operands(shares.padded(rows, m, 2), keys, HIGH)
    out, lse = mosaic_kernel.launch(
        *(queries, keys, values, sums, shares.padded(positions, m, 1, -1), places),
        rows=m if m > ROWS else -(-live // 8) * 8,
        config=config,
        splits=shares.splits(config.splits, B * K * (m // ROWS), places.table.shape[2] * page // KEYS),
        **scores,
    )

    def mass_of(lse):
        return _mass(rows, lse, positions, keys, places, (*reads.table.shape, page), config, scores)

    return shares.finished(q, K, out, lse, reads, options, mass_of)
