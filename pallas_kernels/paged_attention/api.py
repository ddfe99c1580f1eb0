"""Public entry of paged attention."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.arguments import (
    require,
    require_booleans,
    require_floats,
    require_integers,
    require_operand_dtype,
    require_score_options,
    require_shape,
)
from pallas_kernels.paged_attention.checks import check_values
from pallas_kernels.paged_attention.options import Options, Reads
from pallas_kernels.paged_attention.quantized import QuantizedPages

_MOST_QUERIES = 64


class OpenTail(NamedTuple):
    """The last tokens of each row, not yet sealed into pages: t of them have room.

    Attributes:
        k: keys, float[B, K, t, d].
        v: values, as k.
        length: tokens that are there, i32[B]; what lies behind them may be anything, NaN included.
        positions: position of each tail token in its sequence, i32[B, t]; that of a tree's node is its depth's.
        mask: bool[B, W, t], False hides a token from a query (a tree's node from those that are not below it, see
            :func:`pallas_kernels.paged_attention.window_mask`); None: a chain, where position decides alone.
    """

    k: Any
    v: Any
    length: Any
    positions: Any
    mask: Any = None


class PagedOutput(NamedTuple):
    """What :func:`paged_attention` gives.

    Attributes:
        out: [B, W, H, d] in the dtype of q, 0 where nothing is visible.
        lse: f32[B, W, H], the logarithm of each row's sum of exponentials; -inf where nothing is visible.
        mass: None, or with ``return_mass`` the probability of each key, averaged over the query heads of its KV head
            and the row's live queries (those of position >= 0): (sealed f32[B, K, n, p], tail f32[B, K, t]), p the
            tokens of a table entry (``page``, or 1 for tokens). Where every live query sees something, both
            together sum to 1 for each row and KV head.
    """

    out: Any
    lse: Any
    mass: Any


def _check_pool(name: str, pages: Any, K: int | None, d: int) -> tuple[int, ...]:
    """Shape (P, K, page, d) of a pool; raises unless it has K heads (if given) of d channels."""
    if isinstance(pages, QuantizedPages):
        require(pages.bits in (4, 8), f"{name}.bits", pages.bits, "4 or 8")
        require(pages.codes.dtype == jnp.uint8, f"{name}.codes.dtype", pages.codes.dtype.name, "uint8")
        require(pages.codes.ndim == 4, f"{name}.codes.shape", pages.codes.shape, "four dimensions")
    else:
        require_floats(**{name: pages})
    shape = pages.shape
    heads = "K" if K is None else K
    good = len(shape) == 4 and shape[3] == d and K in (None, shape[1]) and min(shape) >= 1
    require(good, f"{name}.shape", shape, f"[P, {heads}, page, {d}]")
    if isinstance(pages, QuantizedPages):
        token, channel = (*shape[:3], 1), (*shape[:2], 1, d)
        allowed = f"{token} (per token) or {channel} (per channel)"
        require(pages.scale.shape in (token, channel), f"{name}.scale.shape", pages.scale.shape, allowed)
        require_shape(f"{name}.offset", pages.offset, pages.scale.shape, "as scale")
        require_floats(**{f"{name}.scale": pages.scale, f"{name}.offset": pages.offset})
    return shape


def _check_tail(tail: OpenTail, B: int, W: int, K: int, d: int) -> None:
    require(isinstance(tail, OpenTail), "tail", type(tail).__name__, "None or OpenTail")
    shape = tail.k.shape
    good = len(shape) == 4 and shape[:2] == (B, K) and shape[2] >= 1 and shape[3] == d
    require(good, "tail.k.shape", shape, f"[{B}, {K}, t, {d}]")
    t = shape[2]
    require_shape("tail.v", tail.v, shape, "B, K, t, d")
    require_shape("tail.length", tail.length, (B,), "B")
    require_shape("tail.positions", tail.positions, (B, t), "B, t")
    require_shape("tail.mask", tail.mask, (B, W, t), "B, W, t")
    require_floats(**{"tail.k": tail.k, "tail.v": tail.v})
    require_integers(**{"tail.length": tail.length, "tail.positions": tail.positions})
    require_booleans(**{"tail.mask": tail.mask})


def paged_attention(
    q: Float[Array, "B W H d"],
    k_pages: Float[Array, "P K page d"] | QuantizedPages,
    v_pages: Float[Array, "P K page d"] | QuantizedPages,
    *,
    table: Int[Array, "B K n"] | None,
    kv_len: Int[Array, "B K"],
    q_positions: Int[Array, "B W"],
    logical: Int[Array, "B K n"] | None = None,
    count: Int[Array, "B K"] | None = None,
    granularity: str = "page",
    tail: OpenTail | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    operand_dtype: DTypeLike | None = None,
    return_mass: bool = False,
    debug: bool = False,
    implementation: str = "auto",
) -> PagedOutput:
    """One softmax over the sealed keys that a table names and over an open tail, for decode and windows of W queries.

    Entry i of a row's table for KV head k stands for logical page (or token) ``logical[b, k, i]``, which lies in
    physical page ``table[b, k, i]``: a selection is a shorter table, :func:`translate` makes one. A sealed key of
    logical index l is visible to a query iff an entry below ``count`` names it, ``l < kv_len``,
    ``l <= q_position``, and ``q_position - l < window`` where a window is given. Query head h uses KV head
    ``h // (H // K)``. Sealed pages and tail are merged by log-sum-exp.

    Sources: paged keys and values, arXiv 2309.06180; a selection as a page table, Quest, arXiv 2406.10774; 4-bit
    pages, Atom, arXiv 2310.19102; mass, SparseSpec, arXiv 2512.01278.

    Args:
        q: queries after RoPE, W from 1 to 64.
        k_pages: pool of keys after RoPE, P pages. Pages and tokens that no query sees may be anything, NaN included,
            unless ``table`` is None: then what is not seen must be finite.
        v_pages: pool of values, plain or quantised on its own, of the same four sizes.
        table: physical page of each entry. None: each row owns n = P / B consecutive pages, row b those from b n on
            (they are then read in place, without a gather); needs ``logical`` None.
        kv_len: sealed tokens of each row and KV head (heads differ where a policy evicts by head).
        q_positions: position of each query in its sequence; negative = padding, which sees nothing.
        logical: logical page or token of each entry, -1 = none. None: entry i is logical page i. A logical index is
            taken as a position: where pages were compacted it is at most that, so ``window`` must be None there.
        count: entries in use; None: all.
        granularity: what ``logical`` counts, "page" or "token". With "token" it must be given.
        tail: tokens that are not in pages yet; None: none.
        window: how many positions a query sees, its own included; None: all.
        soft_cap: bound of the scores, ``soft_cap tanh(score / soft_cap)``; None: unbounded.
        scale: factor of the scores; None: ``d ** -0.5``.
        operand_dtype: dtype to which the operands of both matmuls are rounded (sums and softmax are float32); None:
            that of k_pages, or of q where k_pages is quantised.
        return_mass: also return the mean probability of every key.
        debug: check the values of ``table``, ``logical``, ``count``, ``kv_len`` and ``tail.length`` through
            ``jax.experimental.checkify``: eager calls raise themselves, traced ones need ``checkify.checkify`` around
            the caller. Without it an index out of range reads an arbitrary page.
        implementation: "auto" or one of ``dispatch.IMPLEMENTATIONS["paged_attention"]``.

    Raises:
        ValueError: a shape, a dtype, ``granularity``, ``window``, ``soft_cap``, ``operand_dtype`` or ``implementation`` is
            not as above, K does not divide H, or ``table`` and ``logical`` do not go together.
    """
    require(q.ndim == 4, "q.shape", q.shape, "four dimensions [B, W, H, d]")
    B, W, H, d = q.shape
    require(min(q.shape) >= 1, "q.shape", q.shape, "at least one row, query, head and channel [B, W, H, d]")
    require(1 <= W <= _MOST_QUERIES, "q.shape", q.shape, f"W (second) from 1 to {_MOST_QUERIES}")
    shape = _check_pool("k_pages", k_pages, None, d)
    P, K = shape[:2]
    other = _check_pool("v_pages", v_pages, K, d)
    require(other == shape, "v_pages.shape", other, f"{shape}, as k_pages")
    require(H % K == 0, "k_pages.shape", shape, f"K = {K} (second) to divide H = {H}")
    require(granularity in ("page", "token"), "granularity", granularity, "'page' or 'token'")
    require(granularity == "page" or logical is not None, "logical", logical, "tokens, as granularity says")
    if table is None:
        require(logical is None, "logical", "given", "None where table is None")
        require(
            P % B == 0, "k_pages.shape", shape, f"P (first) to be a multiple of B = {B} where table is None"
        )
    else:
        require(table.ndim == 3 and table.shape[2] >= 1, "table.shape", table.shape, f"[{B}, {K}, n]")
        require_shape("table", table, (B, K, table.shape[2]), "B, K, n")
        require_shape("logical", logical, table.shape, "B, K, n")
    require_shape("count", count, (B, K), "B, K")
    require_shape("kv_len", kv_len, (B, K), "B, K")
    require_shape("q_positions", q_positions, (B, W), "B, W")
    if tail is not None:
        _check_tail(tail, B, W, K, d)
    require_floats(q=q)
    require_integers(table=table, logical=logical, count=count, kv_len=kv_len, q_positions=q_positions)
    require_score_options(window, soft_cap, scale)
    require_operand_dtype(operand_dtype)
    if debug:
        check_values(shape, table, logical, count, granularity, kv_len, tail)
    reads = Reads(table, logical, count, kv_len, q_positions, tail)
    factor: float = d**-0.5 if scale is None else scale
    options = Options(granularity, window, soft_cap, factor, operand_dtype, return_mass)
    given = (q, k_pages, v_pages, reads, options)
    return PagedOutput(*dispatch.choose("paged_attention", implementation, *given).run(*given))
