"""Random calls of paged attention, and the same attention by plain loops in float64."""

from dataclasses import dataclass, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention import OpenTail, dequantize_pages, paged_attention, quantize_pages


@dataclass(frozen=True)
class Call:
    """Arrays of one call (see ``paged_attention``) and the values that its pools stand for."""

    q: np.ndarray
    k_pages: object
    v_pages: object
    table: np.ndarray | None
    kv_len: np.ndarray
    q_positions: np.ndarray
    logical: np.ndarray | None = None
    count: np.ndarray | None = None
    tail: OpenTail | None = None
    granularity: str = "page"
    window: int | None = None
    soft_cap: float | None = None

    def run(self, **options):
        """The op's output as numpy."""
        names = ("q", "k_pages", "v_pages", "table", "kv_len", "q_positions", "logical", "count", "tail")
        given = jax.tree.map(jnp.asarray, {name: getattr(self, name) for name in names})
        statics = {
            "granularity": self.granularity,
            "window": self.window,
            "soft_cap": self.soft_cap,
            **options,
        }
        return jax.tree.map(np.asarray, _compiled(tuple(statics.items()))(given))


@cache
def _compiled(statics: tuple):
    return jax.jit(lambda given: paged_attention(**given, **dict(statics)))


def draw_call(
    seed: int,
    *,
    B: int = 2,
    W: int = 1,
    K: int = 2,
    G: int = 2,
    d: int = 16,
    page: int = 4,
    n: int = 5,
    t: int | None = 6,
    granularity: str | None = None,
    in_place: bool = False,
    dtype=np.float32,
) -> Call:
    """Permuted and partly shared pages, odd lengths, an empty row now and then, NaN wherever nothing may be read.

    Args:
        granularity: None reads every page; "page" or "token" draws a selection of them with gaps and a count.
        t: room of the tail; None for none.
        in_place: table None, consecutive pages, nothing poisoned in them.
    """
    rng = np.random.default_rng([seed, 7])
    P = B * n if in_place else B * n + 3
    k, v = (rng.normal(size=(P, K, page, d)).astype(np.float32) for _ in range(2))
    kv_len = rng.integers(0, n * page + 1, (B, K)).astype(np.int32)
    kv_len[rng.random((B, K)) < 0.15] = 0
    pages = np.arange(B * n).reshape(B, 1, n) if in_place else rng.permutation(P)[: B * n].reshape(B, 1, n)
    pages = np.repeat(pages, K, axis=1)
    if not in_place and B > 1:
        pages[1, :, 0] = pages[0, :, 0]  # a shared prefix
    used = np.zeros((P, K, page), bool)
    for b, h in np.ndindex(B, K):
        for token in range(kv_len[b, h]):
            used[pages[b, h, token // page], h, token % page] = True
    if not in_place:
        k[~used], v[~used] = np.nan, np.nan
    start = kv_len.max(axis=1)
    length = np.zeros(B, np.int32) if t is None else rng.integers(min(W, t), t + 1, B).astype(np.int32)
    q_positions = np.maximum(start + length - W, 0)[:, None] + np.arange(W)
    q_positions[rng.random((B, W)) < 0.1] = -1
    tail = None
    if t is not None:
        tk, tv = (rng.normal(size=(B, K, t, d)).astype(np.float32) for _ in range(2))
        gone = np.arange(t) >= length[:, None]
        tk[np.repeat(gone[:, None], K, 1)] = np.nan
        tv[np.repeat(gone[:, None], K, 1)] = np.nan
        positions = (start[:, None] + np.arange(t)).astype(np.int32)
        tail = OpenTail(tk.astype(dtype), tv.astype(dtype), length, positions)
    call = Call(
        q=rng.normal(size=(B, W, K * G, d)).astype(dtype),
        k_pages=k.astype(dtype),
        v_pages=v.astype(dtype),
        table=None if in_place else pages.astype(np.int32),
        kv_len=kv_len,
        q_positions=q_positions.astype(np.int32),
        tail=tail,
    )
    return call if granularity is None else select(call, rng, granularity)


def select(call: Call, rng: np.random.Generator, granularity: str) -> Call:
    """``call`` over a random selection of its pages or tokens, in no order, padded, with entries past the count."""
    B, K, n = call.table.shape
    page = call.k_pages.shape[2]
    size = n if granularity == "page" else n * page
    logical = np.stack([[rng.permutation(size) for _ in range(K)] for _ in range(B)]).astype(np.int32)
    logical[rng.random(logical.shape) < 0.3] = -1
    count = rng.integers(0, size + 1, (B, K)).astype(np.int32)
    of_page = logical if granularity == "page" else logical // page
    table = np.take_along_axis(call.table, np.maximum(of_page, 0), axis=2)
    # What stands at an entry of nothing must not matter.
    table[logical < 0] = rng.integers(-5, 1000, (logical < 0).sum())
    return replace(call, table=table, logical=logical, count=count, granularity=granularity)


def quantized(call: Call, bits: int, per_channel: bool) -> tuple[Call, Call]:
    """``call`` over quantised pages (keys per channel where asked), and over the values that those stand for."""

    def pool(pages, per_channel):
        clean = jnp.asarray(np.nan_to_num(pages))
        return quantize_pages(clean, bits=bits, per_channel=per_channel, scale_dtype=jnp.float32)

    k, v = pool(call.k_pages, per_channel), pool(call.v_pages, False)
    plain = replace(call, k_pages=np.asarray(dequantize_pages(k)), v_pages=np.asarray(dequantize_pages(v)))
    return replace(call, k_pages=k, v_pages=v), plain


def by_hand(call: Call):
    """out, lse and (sealed, tail) mass, key by key."""
    B, W, H, d = call.q.shape
    K, page = call.kv_len.shape[1], call.k_pages.shape[2]
    table = call.table
    if table is None:
        n = len(call.k_pages) // B
        table = np.repeat(np.arange(B * n).reshape(B, 1, n), K, axis=1)
    p = page if call.granularity == "page" else 1
    t = 0 if call.tail is None else call.tail.k.shape[2]
    out, lse = np.zeros(call.q.shape), np.full((B, W, H), -np.inf)
    sealed, tail = np.zeros((*table.shape, p)), np.zeros((B, K, t))
    q, kp, vp = (np.asarray(w, np.float64) for w in (call.q, call.k_pages, call.v_pages))
    for b, w, h in np.ndindex(B, W, H):
        at, k = call.q_positions[b, w], h // (H // K)
        keys, where = [], []
        for i in range(table.shape[2] if call.count is None else call.count[b, k]):
            entry = i if call.logical is None else call.logical[b, k, i]
            for slot in range(p if entry >= 0 else 0):
                token = entry * p + slot
                near = call.window is None or at - token < call.window
                if token < call.kv_len[b, k] and token <= at and near:
                    keys.append((kp[table[b, k, i], k, token % page], vp[table[b, k, i], k, token % page]))
                    where.append((sealed, (b, k, i, slot)))
        for j in range(0 if call.tail is None or at < 0 else call.tail.length[b]):
            there = call.tail.positions[b, j]
            near = call.window is None or at - there < call.window
            if there <= at and near and (call.tail.mask is None or call.tail.mask[b, w, j]):
                keys.append([np.asarray(x, np.float64)[b, k, j] for x in call.tail[:2]])
                where.append((tail, (b, k, j)))
        if not keys:
            continue
        score = np.array([key @ q[b, w, h] for key, _ in keys]) / np.sqrt(d)
        score = score if call.soft_cap is None else call.soft_cap * np.tanh(score / call.soft_cap)
        lse[b, w, h] = score.max() + np.log(np.exp(score - score.max()).sum())
        weight = np.exp(score - lse[b, w, h])
        out[b, w, h] = weight @ np.array([value for _, value in keys])
        live = (call.q_positions[b] >= 0).sum() * (H // K)
        for each, (array, index) in zip(weight, where):
            array[index] += each / live
    return out, lse, (sealed, tail)
