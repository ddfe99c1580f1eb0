"""What the Mosaic kernels of the convolutions share: rows of channels in registers, and how the window of inputs slides.

Mosaic shifts no value in registers along its rows, and need not: a warpgroup goes down the tokens of its channels one by
one, a few neighbouring channels in each thread, and the last k-1 inputs go along in registers. So each input is read
once, and where documents begin is one comparison of two numbers, the same for all threads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import compat
from pallas_kernels.causal_conv.tiles import LANES, Tiles
from pallas_kernels.mosaic import cast_layout, load

Row = jax.Array  # f32[columns] in registers


class Operands(NamedTuple):
    """What forward and backward are given; every part lies in global memory.

    Attributes:
        x: [B, T, D].
        weight: [k, D], or [B, T, k, D] where every token has a kernel of its own.
        bias: [D] or None.
        ids: i32[B, T] or None, documents 1..n and 0 for padding.
        state: [B, n, k-1, D] or None, what stands before each document.
    """

    x: Float[Array, "B T D"]
    weight: Float[Array, "k D"] | Float[Array, "B T k D"]
    bias: Float[Array, "D"] | None
    ids: Int[Array, "B T"] | None
    state: Float[Array, "B n k-1 D"] | None


@dataclass(frozen=True)
class Plan:
    """How a call is cut: ``rows`` tokens by ``columns`` channels for a warpgroup, ``blocks`` along the tokens."""

    tokens: int
    taps: int
    rows: int
    columns: int
    blocks: int
    unroll: int

    @classmethod
    def of(cls, x: Float[Array, "B T D"], taps: int, tiles: Tiles) -> "Plan":
        T, D = x.shape[1:]
        # A short row is one block.
        rows = min(tiles.rows, -(-T // 8) * 8)
        unroll = tiles.unroll if rows % tiles.unroll == 0 else 1
        return cls(T, taps, rows, tiles.columns_of(D), -(-T // rows), unroll)

    @property
    def reach(self) -> int:
        return self.taps - 1

    @property
    def layout(self) -> Any:
        """Of a row: neighbouring channels to one thread, whatever the dtype, so that threads read what they wrote."""
        return compat.plgpu.Layout.WG_STRIDED((self.columns,), vec_size=self.columns // LANES)

    def readable(self, v: Array, more: int = 0) -> Array:
        """``v`` [B, T, ...] as the copy engine can read blocks of it, with ``more`` rows after each.

        The engine fills what lies past the end with zeros, if there is one block; the interpreter fills nothing.
        """
        length, whole = v.shape[1], self.blocks * self.rows + more
        if length >= self.rows + more and not (compat.interpreting() and length < whole):
            return v
        return jnp.pad(v, [(0, 0), (0, whole - length)] + [(0, 0)] * (v.ndim - 2))

    def read_ids(self, ids: Int[Array, "B T"] | None) -> Int[Array, "B L"] | None:
        """``ids`` with padding before and after, for :meth:`document`."""
        if ids is None:
            return None
        behind = self.blocks * self.rows - self.tokens + self.reach
        return jnp.pad(ids, ((0, 0), (self.reach, behind)))

    def document(self, ids: Any, b: Any, t: Any) -> jax.Array:
        """Id of the document of token ``t``; 0 on padding and outside of the row. ``ids``: ref of :meth:`read_ids`."""
        if ids is None:
            return ((t >= 0) & (t < self.tokens)).astype(jnp.int32)
        return ids[b, t + self.reach]

    def zero(self) -> Row:
        return cast_layout(jnp.zeros((self.columns,), jnp.float32), self.layout)

    def shared(self, ref: Any) -> Row:
        """A row of shared memory."""
        return load(ref, self.layout).astype(jnp.float32)

    def far(self, ref: Any) -> Row:
        """A row of global memory."""
        return load(ref, self.layout, optimized=False).astype(jnp.float32)

    def far_rows(self, ref: Any, columns: Any) -> list[Row]:
        """The rows of ``ref`` [r, D] in global memory."""
        return [self.far(ref.at[j, columns]) for j in range(ref.shape[0])]

    def opening(self, state: Any, b: Any, s: Any, columns: Any) -> tuple[Row, ...]:
        """What stands before document ``s``."""
        if state is None:
            return (self.zero(),) * self.reach
        index = jnp.clip(s - 1, 0, state.shape[1] - 1)
        return tuple(self.far_rows(state.at[b, index], columns))


class Window(NamedTuple):
    """The inputs before a token, oldest first, and the document that they belong to."""

    inputs: tuple[Row, ...]
    document: jax.Array


def slide(
    window: Window, u: Row, s: jax.Array, opening: Callable[[], tuple[Row, ...]]
) -> tuple[list[Row], Window]:
    """The taps of a token of document ``s`` with input ``u``, oldest first, and the window after it.

    A new document begins with its ``opening``. Padding (document 0) counts as zeros, and as no document: it stands
    between documents only, so that whatever follows it begins anew.
    """
    inputs = lax.cond((s > 0) & (s != window.document), opening, lambda: window.inputs)
    taps = [*inputs, jnp.where(s > 0, u, 0.0)]
    return taps, Window(tuple(taps[1:]), s)


def weighted(weights: list[Row], taps: list[Row], bias: Row | None) -> Row:
    total = weights[-1] * taps[-1]
    for w, tap in zip(weights[:-1], taps[:-1], strict=True):
        total = total + w * tap
    return total if bias is None else total + bias


def sigmoid(y: Row) -> Row:
    return 1.0 / (1.0 + jnp.exp(-y))


def compiler_params() -> Any:
    """Layouts are written out here; the default of later versions infers them."""
    plgpu = compat.plgpu
    return plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
