"""Tactic: read as many of the best tokens as hold a share of the softmax (arXiv 2502.12216)."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxllm.cache.policies.base import Policy, PolicyState, Selection
from jaxllm.cache.policies.budget import check_fraction, part, parts
from jaxllm.cache.policies.curve import Curve, fit, harmonic, ranks_for
from jaxllm.cache.policies.kmeans import cluster
from jaxllm.cache.view import Layout, View
from jaxllm.config import positive_fields, require
from pallas_kernels.precision import contract


class Ranking(NamedTuple):
    """Clustered tokens in the order in which each query would read them; Q = G W queries of a KV head.

    Attributes:
        clusters: i32[B, K, Q, C], best first.
        end: i32[B, K, Q, C], tokens up to and with each of those.
        size: i32[B, K, C], members of each cluster.
        first: i32[B, K, C], where each cluster's members begin in ``members``.
        members: i32[B, K, N], token numbers grouped by cluster.
    """

    clusters: Any
    end: Any
    size: Any
    first: Any
    members: Any

    def tokens(self, ranks: Int[Array, "B K Q m"]) -> Int[Array, "B K Q m"]:
        """The tokens of ranks counted from 0; any token past the last."""
        at = jnp.minimum(_search(self.end, ranks), self.end.shape[-1] - 1)
        chosen = jnp.take_along_axis(self.clusters, at, axis=-1)
        size, first = (jnp.take_along_axis(w[:, :, None], chosen, axis=-1) for w in (self.size, self.first))
        within = ranks - (jnp.take_along_axis(self.end, at, axis=-1) - size)
        return _pick(self.members, first + within)

    def starts(self) -> Int[Array, "B K Q C"]:
        """Tokens ahead of each cluster, by cluster."""
        size = jnp.broadcast_to(self.size[:, :, None], self.clusters.shape)
        before = self.end - jnp.take_along_axis(size, self.clusters, axis=-1)
        return jnp.put_along_axis(jnp.zeros_like(before), self.clusters, before, axis=-1, inplace=False)


def _search(ends: Int[Array, "*b C"], at: Int[Array, "*b m"]) -> Int[Array, "*b m"]:
    """How many of each row's ascending ``ends`` are at most each of ``at``."""
    flat = jax.vmap(lambda end, x: jnp.searchsorted(end, x, side="right"))
    found = flat(ends.reshape(-1, ends.shape[-1]), at.reshape(-1, at.shape[-1]))
    return found.reshape(at.shape).astype(jnp.int32)


def _pick(members: Int[Array, "B K N"], at: Int[Array, "B K *m"]) -> Int[Array, "B K *m"]:
    """Entries of each KV head's list; the nearest where ``at`` lies outside."""
    B, K, N = members.shape
    flat = jnp.clip(at.reshape(B, K, -1), 0, N - 1)
    return jnp.take_along_axis(members, flat, axis=2).reshape(at.shape)


@dataclass(frozen=True, kw_only=True)
class Tactic(Policy):
    """Read-only token selection whose size is an outcome: by head, layer, query and context.

    At the end of a prompt the keys of its sealed tokens are clustered (K-means, for each KV head). In a step each query
    orders the clusters by ``q . centroid``, computes the exact scores of its first ``head`` of the tokens and of two
    short windows of ranks, draws ``y = a / x + b`` through the windows, and reads as many tokens, in that order, as
    hold ``mass`` of the estimated total. A KV head reads the union over its group's query heads and a window's
    queries, and all of them attend to all of it. The bound: attention over a part that holds the share p of the
    softmax is off by at most ``2 (1 - p) max |v|``. Estimates fail: the paper reaches the mass in 84 to 92 % of cases.

    Always read beside those: the first ``sinks`` tokens, tokens that were sealed since the last clustering, and the
    open tail; the mass is that of the other, clustered, tokens, so what is read holds more. Every ``refresh`` fresh
    tokens everything is clustered anew.

    Assumptions, where the paper is silent: keys are clustered after RoPE; the width of the windows; the head counts
    with its exact scores in the total, and is always read; the curve is clamped at 0; sinks are left out of clusters
    and fit, and fresh tokens out of the mass; a window's value stands for its mean of 1 / x; soft caps of scores are
    ignored; what is read has a bound.

    Attributes:
        mass: share of the softmax to read, P (0.9 and 0.75 are the published settings). 1 reads everything.
        cluster: tokens of a cluster on average (16; an earlier version says 32).
        rounds: most K-means iterations (10).
        head: fraction of the clustered tokens scored exactly (0.02; the paper says 1 to 2 %).
        windows: the two windows' middles, fractions of the clustered tokens (0.1 and 0.6).
        width: the windows' width, likewise (assumed).
        refresh: fresh tokens that trigger the next clustering (2,048).
        sinks: first tokens that are always read (assumed).
        most: bound of a step's clustered tokens, a fraction of the row's sealed ones (assumed). A union that
            is larger loses its worst clusters, and then holds less than ``mass``.
        seed: of the tokens that clusters start from.
    """

    mass: float = 0.9
    cluster: int = 16
    rounds: int = 10
    head: float = 0.02
    windows: tuple[float, float] = (0.1, 0.6)
    width: float = 0.01
    refresh: int = 2048
    sinks: int = 4
    most: float = 0.25
    seed: int = 0

    granularity: ClassVar[str] = "token"
    default_page_size: ClassVar[int | None] = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_fields(self, "policy", "cluster", "rounds", "refresh")
        for name in ("mass", "head", "width", "most"):
            check_fraction(f"policy.{name}", getattr(self, name))
        ascending = len(self.windows) == 2 and 0 < self.windows[0] < self.windows[1] <= 1
        require(ascending, "policy.windows", self.windows, "two fractions, ascending, above 0 and at most 1")
        whole = isinstance(self.sinks, int) and self.sinks >= 0
        require(whole, "policy.sinks", self.sinks, "must be an integer of at least 0")

    def init(self, layout: Layout) -> PolicyState:
        """``centroids`` f32[S, K, C, d], ``size`` i32[S, K, C], ``members`` i32[S, K, N] and ``clustered`` i32[S].

        N: tokens that a slot's pages hold. Tokens before ``clustered`` are sinks or in a cluster.
        """
        S, K, N = layout.slots, layout.kv_heads, layout.pages_per_slot * layout.page
        C = -(-N // self.cluster)
        return PolicyState(
            per_slot={
                "centroids": jnp.zeros((S, K, C, layout.head_dim), jnp.float32),
                "size": jnp.zeros((S, K, C), jnp.int32),
                "members": jnp.zeros((S, K, N), jnp.int32),
                "clustered": jnp.zeros((S,), jnp.int32),
            }
        )

    def step_bytes(self, layout: Layout, sealed: Any, key: int) -> Any:
        """Centroids and sizes of all clusters, and for each query the keys that it scores, with their numbers.

        As if all sealed tokens were clustered: an upper bound between two clusterings.
        """
        clusters = -(-np.maximum(sealed - self.sinks, 0) // self.cluster)
        scored = layout.group * (self.head + 2 * self.width) * np.maximum(sealed - self.sinks, 0)
        return layout.kv_heads * (clusters * 4 * (layout.head_dim + 1) + np.ceil(scored) * (key + 4))

    def triggers(self, state: PolicyState, view: View, ended: Bool[Array, " B"]) -> Bool[Array, " B"]:
        """Rows with sealed tokens in no cluster, at a prompt's end any and then ``refresh`` of them."""
        fresh = view.sealed - _of(view, state.per_slot["clustered"])
        return (fresh >= self.refresh) | (ended & (fresh > 0))

    def maintain(self, state: PolicyState, view: View, rows: Bool[Array, " B"]) -> tuple[PolicyState, None]:
        """Cluster all sealed tokens of the rows that triggered; the others' keys are not read."""
        C, N = state.per_slot["size"].shape[2], view.table.shape[1] * view.page

        def one(row: Array) -> tuple[Array, Array, Array]:
            names = ("slots", "table", "sealed", "tail_k", "tail_v", "tail_len")
            alone = replace(view, **{name: getattr(view, name)[row][None] for name in names})
            number, sealed = jnp.arange(N), view.sealed[row]
            there = (number >= self.sinks) & (number < sealed)
            count = -(-jnp.maximum(sealed - self.sinks, 0) // self.cluster)
            keys = alone.keys()[0, :, :N]
            return cluster(keys, there, count, most=C, rounds=self.rounds, seed=self.seed)

        shapes = jax.eval_shape(one, jnp.int32(0))

        def nothing(_: Array) -> Any:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        at = jnp.arange(len(rows))
        found = lax.map(lambda row: lax.cond(rows[row], one, nothing, row), at)
        old = state.per_slot
        slots = jnp.where(rows, view.slots, len(old["clustered"]))
        new = {
            "centroids": old["centroids"].at[slots].set(found.centroids, mode="drop"),
            "size": old["size"].at[slots].set(found.size, mode="drop"),
            "members": old["members"].at[slots, :, :N].set(found.members, mode="drop"),
            "clustered": old["clustered"].at[slots].set(view.sealed, mode="drop"),
        }
        return PolicyState(per_page=state.per_page, per_slot=new), None

    def rank(self, state: PolicyState, q: Float[Array, "B K Q d"], view: View) -> Ranking:
        """Clusters by the product of each query and their centroid: products order as scores do, distances would not.

        Empty clusters stand somewhere among them and add no token.
        """
        size = _of(view, state.per_slot["size"])
        products = contract("bkqd,bkcd->bkqc", q, _of(view, state.per_slot["centroids"]))
        clusters = jnp.argsort(products, axis=-1, descending=True, stable=True).astype(jnp.int32)
        sizes = jnp.take_along_axis(jnp.broadcast_to(size[:, :, None], clusters.shape), clusters, axis=-1)
        first = jnp.cumsum(size, axis=-1) - size
        members = _of(view, state.per_slot["members"])
        return Ranking(clusters, jnp.cumsum(sizes, axis=-1), size, first, members)

    def budgets(
        self, q: Float[Array, "B K Q d"], view: View, ranking: Ranking, n: Int[Array, " B"]
    ) -> tuple[Int[Array, "B K Q"], Curve]:
        """How many of its n clustered tokens, best first, each query needs, and the curve that says so."""
        most = view.table.shape[1] * view.page
        B, K, Q, d = q.shape

        def of_n(fraction: float) -> Array:
            return jnp.maximum(jnp.asarray(parts(fraction, most))[n], jnp.minimum(n, 1))

        m, width = of_n(self.head), of_n(self.width)
        samples = [jnp.broadcast_to(jnp.arange(part(self.head, most)), (B, part(self.head, most)))]
        live = [samples[0] < m[:, None]]
        starts = []
        for middle in self.windows:
            # Ranks count from 0 here; the middle one is the fraction's.
            start = jnp.clip(of_n(middle) - 1 - width // 2, 0, jnp.maximum(n - width, 0))
            inside = jnp.arange(max(part(self.width, most), 1))
            starts.append(start)
            samples.append(start[:, None] + inside)
            live.append(inside < width[:, None])
        ranks = jnp.concatenate(samples, axis=1)[:, None, None]
        tokens = ranking.tokens(jnp.broadcast_to(ranks, (B, K, Q, ranks.shape[-1])))
        keys = view.read_keys(tokens.reshape(B, K, -1)).reshape(*tokens.shape, d)
        scores = view.scale * contract("bkqmd,bkqd->bkqm", keys, q)
        shown = jnp.concatenate(live, axis=1)[:, None, None]
        # A common factor changes nothing: the greatest score becomes 1.
        peak = jnp.max(scores, axis=-1, keepdims=True, where=shown, initial=-jnp.inf)
        y = jnp.where(shown, jnp.exp(scores - jnp.where(shown.any(-1, keepdims=True), peak, 0)), 0)
        cuts = [live[0].shape[1], live[0].shape[1] + live[1].shape[1]]
        head, *parts_of = (jnp.sum(w, axis=-1) for w in jnp.split(y, cuts, axis=-1))
        sums = jnp.asarray(harmonic(most))
        wide = jnp.maximum(width, 1)
        inverse = [((sums[start + width] - sums[start]) / wide)[:, None, None] for start in starts]
        values = [w / wide[:, None, None] for w in parts_of]
        curve = fit((values[0], values[1]), (inverse[0], inverse[1]))
        shape = (B, K, Q)
        m, n = (jnp.broadcast_to(w[:, None, None], shape) for w in (m, n))
        return n if self.mass == 1 else ranks_for(self.mass, head, curve, m, n, sums), curve

    def select(self, state: PolicyState, q: Float[Array, "B W H d"], view: View) -> Selection:
        """Sinks, then clustered tokens by cluster, best first, then fresh tokens."""
        B, W, H, d = q.shape
        K, N = view.tail_k.shape[1], view.table.shape[1] * view.page
        grouped = jnp.moveaxis(q.reshape(B, W, K, H // K, d), 1, 3).reshape(B, K, -1, d).astype(jnp.float32)
        clustered = _of(view, state.per_slot["clustered"])
        sinks = jnp.minimum(view.sealed, self.sinks)
        ranking = self.rank(state, grouped, view)
        budget, _ = self.budgets(grouped, view, ranking, jnp.maximum(clustered - sinks, 0))
        # All queries read a cluster's members in one order, so their union is its longest part.
        starts = ranking.starts()
        taken = jnp.max(jnp.clip(budget[..., None] - starts, 0, ranking.size[:, :, None]), axis=2)
        urgent = jnp.where(taken > 0, jnp.min(starts, axis=2), N)
        order = jnp.argsort(urgent, axis=-1, stable=True)
        end = jnp.cumsum(jnp.take_along_axis(taken, order, axis=-1), axis=-1)

        size = N if self.mass == 1 else min(N, self.sinks + part(self.most, N) + self.refresh)
        begin = jnp.maximum(clustered, sinks)
        fresh = jnp.maximum(view.sealed - begin, 0)
        room = jnp.maximum(size - sinks - fresh, 0)
        if self.mass < 1:
            # Of the row's own tokens: the view is as wide as the longest row's needs.
            room = jnp.minimum(room, jnp.asarray(parts(self.most, N))[jnp.minimum(view.sealed, N)])
        chosen = jnp.minimum(end[..., -1], room[:, None])
        at = jnp.broadcast_to(jnp.arange(size), (B, K, size))
        rank = at - sinks[:, None, None]
        place = jnp.minimum(_search(end, rank), end.shape[-1] - 1)
        of = jnp.take_along_axis(order, place, axis=-1)
        before = jnp.take_along_axis(end, place, axis=-1) - jnp.take_along_axis(taken, of, axis=-1)
        token = _pick(ranking.members, jnp.take_along_axis(ranking.first, of, axis=-1) + rank - before)
        later = rank - chosen[..., None]
        token = jnp.where(later >= 0, begin[:, None, None] + later, token)
        token = jnp.where(rank < 0, at, token)
        count = jnp.minimum((sinks + fresh)[:, None] + chosen, size)
        return Selection(jnp.where(at < count[..., None], token, -1), count)


def _of(view: View, held: Array) -> Array:
    """The slots' own entries of [S, ...], by row; anything where a row has no slot."""
    return held.at[view.slots].get(mode="clip")
