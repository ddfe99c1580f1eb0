"""K-means over the keys of one sequence: the groups in which Tactic reads them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.precision import contract

# Tokens whose distances to all centroids are held at once.
_TILE = 1024


class Clusters(NamedTuple):
    """K partitions of a sequence's tokens.

    Attributes:
        centroids: f32[K, C, d], the mean of each cluster's keys; an empty cluster's last one.
        size: i32[K, C], members.
        members: i32[K, N], tokens grouped by cluster, ascending in each; then those in none.
    """

    centroids: Any
    size: Any
    members: Any


def cluster(
    keys: Float[Array, "K N d"],
    there: Bool[Array, " N"],
    count: Int[Array, ""],
    *,
    most: int,
    rounds: int | Int[Array, ""],
    seed: int | Int[Array, ""],
) -> Clusters:
    """Lloyd's algorithm by Euclidean distance, each KV head by itself, from distinct tokens drawn uniformly.

    Which tokens are drawn depends on ``seed``, on which are there and on nothing else: neither on the row nor on N.

    Args:
        keys: finite wherever they may stand.
        there: which tokens are clustered.
        count: clusters wanted; at most the number of tokens that are there.
        most: C, room for clusters.
        rounds: most assignments; fewer where one changes nothing.
        seed: of the draw.
    """
    K, N, _ = keys.shape
    keys = keys.astype(jnp.float32)
    draw = jax.vmap(lambda i: jax.random.bits(jax.random.fold_in(jax.random.key(seed), i)))(jnp.arange(N))
    first = jnp.lexsort((draw, ~there))[: min(most, N)]
    start = jnp.pad(keys[:, first], ((0, 0), (0, most - len(first)), (0, 0)))
    used = jnp.arange(most) < count
    head = jnp.arange(K)[:, None]

    def assign(centroids: Array) -> Array:
        nearest = _nearest(keys, centroids, used)
        return jnp.where(there, nearest, most)

    def means(centroids: Array, owner: Array) -> tuple[Array, Array]:
        size = jnp.zeros((K, most), jnp.int32).at[head, owner].add(1, mode="drop")
        total = jnp.zeros_like(centroids).at[head, owner].add(keys, mode="drop")
        return jnp.where(size[..., None] > 0, total / jnp.maximum(size, 1)[..., None], centroids), size

    def go_on(carry: Any) -> Any:
        return (carry[0] < rounds) & carry[1]

    def body(carry: Any) -> Any:
        done, _, owner, centroids, _ = carry
        new = assign(centroids)
        return done + 1, jnp.any(new != owner), new, *means(centroids, new)

    nobody = jnp.full((K, N), -1, jnp.int32)
    carry = (0, jnp.array(True), nobody, start, jnp.zeros((K, most), jnp.int32))
    _, _, owner, centroids, size = lax.while_loop(go_on, body, carry)
    return Clusters(centroids, size, jnp.argsort(owner, axis=1, stable=True).astype(jnp.int32))


def _nearest(keys: Float[Array, "K N d"], centroids: Float[Array, "K C d"], used: Bool[Array, " C"]) -> Any:
    """i32[K, N]: the used centroid next to each key, the first of equals; never all distances at once."""
    K, N, d = keys.shape
    squares = jnp.where(used, jnp.sum(centroids**2, axis=-1), jnp.inf)

    def some(tile: Array) -> Array:
        # The key's own square is the same for every centroid.
        return jnp.argmin(squares[:, None] - 2 * contract("knd,kcd->knc", tile, centroids), axis=-1)

    if N <= _TILE:
        return some(keys).astype(jnp.int32)
    tiles = jnp.pad(keys, ((0, 0), (0, -N % _TILE), (0, 0))).reshape(K, -1, _TILE, d)
    found = lax.map(some, jnp.moveaxis(tiles, 1, 0))
    return jnp.moveaxis(found, 0, 1).reshape(K, -1)[:, :N].astype(jnp.int32)
