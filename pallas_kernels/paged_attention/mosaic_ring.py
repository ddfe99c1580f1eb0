"""What the Hopper kernels of paged attention share: tiles of 64 keys on their way from pages to registers.

A producer warpgroup looks pages up in the table and brings them to a ring in shared memory, several pages to a tile.
The copy engine moves no less than 128 bytes, which the scales of 16 or 32 tokens do not fill: a copy of them takes 64
tokens from the first of the page on, and what follows the page (the scales of the next heads, which other CTAs read at
the same time, so that they come from HBM once) is not looked at.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat, mosaic
from pallas_kernels.attention.common import matrices
from pallas_kernels.paged_attention.pools import Pool

KEYS = 64
# Of the 227 KiB that a CTA may have, what vectors, barriers and reductions leave.
SHARED_BYTES = 216 * 1024
_LOW, _HIGH = 15, 240
# The upper four bits of a byte are not shifted down: they are read that much too large.
HIGH = 16.0


@dataclass(frozen=True)
class Tiles:
    """stages: tiles of keys in flight, 0 for as many as fit, at most 4; splits: shares of a row's keys, 0 for as many as
    fill the device twice."""

    stages: int = 0
    splits: int = 0

    def candidates(self) -> list["Tiles"]:
        """What the tuner tries."""
        return [Tiles(stages) for stages in (2, 3, 4, 5)]


@dataclass(frozen=True)
class Places:
    """Which keys are read and who sees them.

    Attributes:
        table: i32[B, K, n], within the pool, n page a multiple of 64.
        spans: i32[B, K], tiles of keys to read.
        lengths: i32[B, K], sealed tokens.
        tokens: i32[B, K, n page], logical token of each key, -1 for none; None: consecutive.
    """

    table: Any
    spans: Any
    lengths: Any
    tokens: Any


class Ring:
    """``stages`` tiles of 64 keys of each pool in flight.

    Attributes:
        inputs: pytree of the arrays that the kernel takes.
        scratch: pytree of what it needs in shared memory.
    """

    def __init__(self, pools: dict[str, Pool], places: Places, stages: int) -> None:
        plgpu = compat.plgpu
        self.pools, self.stages = pools, stages
        self.selected = places.tokens is not None
        self.page = next(iter(pools.values())).pages.shape[2]
        self.pages = KEYS // self.page
        self.inputs = {
            "pages": {name: pool.pages for name, pool in pools.items()},
            "affine": {name: pool.affine for name, pool in pools.items()},
            **{name: getattr(places, name) for name in ("table", "spans", "lengths", "tokens")},
        }
        copies = sum(1 + len(pool.affine) for pool in pools.values()) * self.pages
        self.scratch = {
            "pages": {
                name: matrices((stages, KEYS, pool.pages.shape[3]), pool.pages.dtype)
                for name, pool in pools.items()
            },
            "affine": {name: [self._vectors(each) for each in pool.affine] for name, pool in pools.items()},
            "ready": plgpu.Barrier(num_arrivals=copies + self.selected, num_barriers=stages),
            "free": plgpu.Barrier(num_barriers=stages),
        }
        if self.selected:
            self.scratch["tokens"] = plgpu.SMEM((stages, KEYS), jnp.int32)

    def _vectors(self, each):
        shape = (self.pages * KEYS,) if each.ndim == 1 else (self.pages, each.shape[2])
        return compat.plgpu.SMEM((self.stages, *shape), each.dtype)

    def stage(self, step):
        return lax.rem(step, jnp.int32(self.stages))

    def produce(self, source, tile, b, k, first, count) -> None:
        """The producer: brings tiles ``first`` to ``first + count`` of row b and KV head k."""
        pl, plgpu = compat.pl, compat.plgpu
        heads = next(iter(self.pools.values())).pages.shape[1]

        @pl.loop(0, count)
        def _(step):
            stage = self.stage(step)
            ready = tile["ready"].at[stage]
            pl.when(step >= self.stages)(lambda: plgpu.barrier_wait(tile["free"].at[stage]))
            if self.selected:
                keys = pl.ds((first + step) * KEYS, KEYS)
                plgpu.copy_gmem_to_smem(source["tokens"].at[b, k, keys], tile["tokens"].at[stage], ready)
            for i in range(self.pages):
                physical = source["table"][b, k, (first + step) * self.pages + i]
                rows = pl.ds(i * self.page, self.page)
                for name, pages in source["pages"].items():
                    plgpu.copy_gmem_to_smem(pages.at[physical, k], tile["pages"][name].at[stage, rows], ready)
                    for given, kept in zip(source["affine"][name], tile["affine"][name]):
                        if len(given.shape) == 1:
                            # The interpreter neither knows the least size of a copy nor reads past the end.
                            size = self.page if compat.interpreting() else KEYS
                            there = given.at[pl.ds((physical * heads + k) * self.page, size)]
                            kept = kept.at[stage, pl.ds(i * KEYS, size)]
                        else:
                            there, kept = given.at[physical, k], kept.at[stage, i]
                        plgpu.copy_gmem_to_smem(there, kept, ready)

        # Nobody leaves while its barriers are still signalled.
        @pl.loop(jnp.maximum(count - self.stages, 0), count)
        def _(step):
            plgpu.barrier_wait(tile["free"].at[self.stage(step)])

    def tokens(self, tile, stage, begin, length, layout):
        """Logical tokens i32[KEYS] of the tile whose first entry is ``begin``, and bool[KEYS] which are there."""
        if not self.selected:
            token = begin + mosaic.iota((KEYS,), 0, layout)
            return token, token < length
        token = mosaic.load(tile["tokens"].at[stage], layout)
        return token, (token >= 0) & (token < length)

    def seen(self, tile, stage, begin, length, position, window, shape, axis):
        """bool[shape]: which keys, along ``axis``, the queries at ``position``, along the other, see."""
        layout = compat.plgpu.Layout.WGMMA
        if self.selected:
            token, there = self.tokens(tile, stage, begin, length, layout.reduce(1 - axis))
            token, there = (lax.broadcast_in_dim(x, shape, [axis]) for x in (token, there))
        else:
            token = begin + mosaic.iota(shape, axis, layout)
            there = token < length
        distance = lax.broadcast_in_dim(position, shape, [1 - axis]) - token
        seen = there & (distance >= 0)
        return seen if window is None else seen & (distance < window)

    def of_tokens(self, tile, name, index, stage, layout, shape, axis):
        """Scale (0) or offset (1) of the tile's tokens, f32[shape], the same along every axis but ``axis``."""
        kept = tile["affine"][name][index]
        found: Any = None
        for i in range(self.pages):
            # Page i lies from i KEYS on; begun so much earlier, each of its tokens stands at its place in the tile.
            window = kept.at[stage, compat.pl.ds(i * (KEYS - self.page), KEYS)]
            values = mosaic.load(window, layout).astype(jnp.float32)
            if found is None:
                found = values
            else:
                found = jnp.where(mosaic.iota((KEYS,), 0, layout) >= i * self.page, values, found)
        return lax.broadcast_in_dim(found, shape, [axis])

    def _dequantised(self, tile, name, codes, stage, part):
        """f32[KEYS, width] of codes of one part, each page with the scales of its own channels."""
        layout, (_, width) = compat.plgpu.Layout.WGMMA, codes.shape
        columns = compat.pl.ds(part * width, width)
        # The upper four bits are read too large.
        factor = 1 / HIGH if self.pools[name].bits == 4 and part else 1.0
        for i in range(self.pages):
            scale, offset = (
                lax.broadcast_in_dim(
                    mosaic.load(kept.at[stage, i, columns], layout.reduce(0)).astype(jnp.float32),
                    codes.shape,
                    [1],
                )
                for kept in tile["affine"][name]
            )
            values = codes * (scale * factor) + offset
            if self.pages > 1:
                page = lax.div(mosaic.iota(codes.shape, 0, layout), jnp.int32(self.page))
                values = jnp.where(page == i, values, codes)
            codes = values
        return codes

    def operands(self, tile, name, stage) -> list[Any]:
        """A tile as operands [KEYS, width] of products, one for each part of the channels.

        Plain pages are refs in shared memory, codes bf16 values in registers of layout WGMMA: with scales of channels
        the values that they stand for; else as they are, but for the upper four bits, which are HIGH times too large.
        """
        pool, place = self.pools[name], tile["pages"][name].at[stage]
        layout, width = compat.plgpu.Layout.WGMMA, pool.width
        if pool.bits == 4:
            both = mosaic.load(place, layout)
            codes = [both & jnp.uint8(_LOW), both & jnp.uint8(_HIGH)]
        else:
            parts = [compat.pl.ds(part * width, width) for part in range(pool.parts)]
            slices = [place.at[:, columns] for columns in parts] if pool.parts > 1 else [place]
            if pool.bits == 16:
                return slices
            codes = [mosaic.load(part, layout) for part in slices]
        # Codes are exact in bfloat16.
        found = [each.astype(jnp.bfloat16) for each in codes]
        if pool.kind != "channel":
            return found
        return [
            self._dequantised(tile, name, each.astype(jnp.float32), stage, part).astype(jnp.bfloat16)
            for part, each in enumerate(found)
        ]
