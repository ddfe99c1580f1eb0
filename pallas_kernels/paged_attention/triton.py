"""Paged attention over single tokens through Triton: rows gathered by index, split over the keys, merged in XLA."""

from dataclasses import dataclass

import jax.numpy as jnp

from pallas_kernels import tiles
from pallas_kernels.paged_attention import pools, shares
from pallas_kernels.paged_attention.options import Options, Reads
from pallas_kernels.paged_attention.quantized import QuantizedPages
from pallas_kernels.paged_attention.selection import indices
from pallas_kernels.paged_attention.triton_kernel import Entries, launch

REASON = "rows of single tokens gathered by Triton, split over the keys"
BESIDE = "the two products with the open tail (three with mass) and the merge of the shares"


@dataclass(frozen=True)
class Tiles:
    """tile: tokens of a step; warps: of a program; stages: steps in flight; splits: shares of a row's tokens, 0 for as
    many as fill the device twice."""

    tile: int = 64
    warps: int = 4
    stages: int = 3
    splits: int = 0

    def candidates(self) -> list["Tiles"]:
        """What the tuner tries."""
        every = [(tile, warps, stages) for tile in (32, 64, 128) for warps in (4, 8) for stages in (2, 3, 4)]
        return [Tiles(*each) for each in every]


def supports(q, k_pages, v_pages, _reads: Reads, options: Options) -> str | None:
    if options.granularity != "token":
        return "it gathers single tokens, not whole pages"
    refusal = pools.refusal(q, k_pages, v_pages, options.operand_dtype, (64, 128, 256))
    if refusal is not None:
        return refusal
    codes = k_pages.codes.size if isinstance(k_pages, QuantizedPages) else 0
    if 2**31 < codes <= 2**32:
        return f"Triton counts to {codes} bytes of codes in 32 signed bits: at most 2 GiB of them, or more than 4"
    return None


def run(q, k_pages, v_pages, reads: Reads, options: Options):
    B, _, H, d = q.shape
    P, K, page, _ = k_pages.shape
    table, count, q_positions = reads.table, reads.count, reads.q_positions
    n = table.shape[2]
    keys, values = pools.pool(k_pages, d), pools.pool(v_pages, d)
    kind = "bfloat16" if keys.bits == 16 else f"{keys.bits} bits by {keys.kind}"
    config = tiles.tiles("paged_attention", f"d{d} tokens {kind}", Tiles())
    steps = -(-n // config.tile)
    tokens = indices(table.shape, page, reads.logical, count, options.granularity)[..., 0]
    tokens = jnp.where(tokens < reads.kv_len[..., None], tokens, -1)
    row = (jnp.clip(table, 0, P - 1) * K + jnp.arange(K)[:, None]) * page + jnp.maximum(tokens, 0) % page
    used = jnp.full((B, K), n, jnp.int32) if count is None else jnp.clip(count, 0, n)
    entries = Entries(
        shares.padded(tokens, steps * config.tile, 2, -1),
        shares.padded(row, steps * config.tile, 2),
        -(-used // config.tile)[..., None],
    )
    rows, positions = shares.rows_of(q, K), jnp.repeat(q_positions, H // K, axis=1)
    live = rows.shape[2]
    # The tensor cores take 16 rows at least.
    block = next(size for size in (16, 32, 64) if size >= min(live, 64))
    m = -(-live // block) * block
    queries, sums = shares.operands(shares.padded(rows, m, 2), keys)
    given = (queries, sums, shares.padded(positions, m, 1, -1), entries)
    sizes = {
        "block": block,
        "tile": config.tile,
        "splits": shares.splits(config.splits, B * K * (m // block), steps),
        "warps": config.warps,
        "stages": config.stages,
    }
    scores = shares.of_scores(options)
    out, lse = launch(*given, keys, values, None, **sizes, **scores)

    def mass_of(lse):
        found = launch(*given, keys, None, shares.padded(lse, m, 2), **sizes, **scores).sum(axis=2)
        written = jnp.arange(found.shape[2]) < entries.spans * config.tile
        return jnp.where(written, found, 0)[..., :n, None]

    return shares.finished(q, K, out, lse, reads, options, mass_of)
