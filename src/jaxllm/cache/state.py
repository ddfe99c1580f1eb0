"""What a sequence leaves behind between tokens: slot pools, passed in and returned (contracts 2, 4 and 9).

Attention layers own a pool of pages ``[pages, K, page, d]``; slot s owns pages s * n .. s * n + n - 1, one after the
other, so that a slot is read as a slice. Recurrent layers own ``[S, ...]`` pools. Keys are cached after RoPE.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.batch import Leaf, PackedBatch
from jaxllm.config import ModelConfig, positive, require


@dataclass(frozen=True)
class KVCache:
    """How keys and values are kept.

    Attributes:
        dtype: "compute" (the run's compute dtype), "float32" or "bfloat16".
        page_size: tokens of a page; None makes each slot one page, the fastest to read while slots share none.
    """

    dtype: str = "compute"
    page_size: int | None = None

    def __post_init__(self) -> None:
        require(
            self.dtype in ("compute", "float32", "bfloat16"),
            "kv.dtype",
            self.dtype,
            "compute, float32 or bfloat16",
        )
        require(
            self.page_size is None or self.page_size >= 1,
            "kv.page_size",
            self.page_size,
            "None or at least 1",
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionState:
    """Keys and values of one layer: [S * pages_per_slot, K, page, d] each.

    bfloat16 is stored as its bits, uint16: XLA:CPU scatters integers in place, but would convert a whole pool of
    bfloat16 to float32 and back for every token written.
    """

    k: Leaf
    v: Leaf
    pages_per_slot: int = field(metadata={"static": True})

    @property
    def page(self) -> int:
        """Tokens of a page."""
        return self.k.shape[2]

    @property
    def capacity(self) -> int:
        """Most tokens of a slot."""
        return self.pages_per_slot * self.page


class RecurrentState:
    """A layer whose whole memory of a slot is a fixed number of values: ``[S, ...]`` pools, zeroed at admission."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MatrixState(RecurrentState):
    """conv [S, k-1, channels]: last raw inputs of the convolution; matrix f32[S, heads, ., .]: the recurrence's state."""

    conv: Leaf
    matrix: Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """The states of all layers, one entry per pattern letter; None where a layer keeps nothing."""

    layers: tuple[Any, ...]

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.layers))


def layer_state(
    cfg: ModelConfig, letter: str, slots: int, capacity: int, kv: KVCache
) -> AttentionState | RecurrentState | None:
    """A zeroed state of one layer with pattern letter ``letter``; arguments as in :func:`init_cache`."""
    compute = jnp.dtype(cfg.precision.compute)
    recurrent = {"M": cfg.mamba, "G": cfg.delta, "J": cfg.jet}.get(letter)
    if recurrent is not None:
        return MatrixState(
            conv=jnp.zeros((slots, recurrent.conv_kernel - 1, recurrent.conv_size), compute),
            matrix=jnp.zeros((slots, *recurrent.state_shape), jnp.float32),
        )
    if letter in "*W":
        a = cfg.attention
        assert a is not None
        page = capacity if kv.page_size is None else kv.page_size
        require(
            capacity % page == 0, "kv.page_size", page, f"must divide the slot capacity of {capacity} tokens"
        )
        dtype = compute if kv.dtype == "compute" else jnp.dtype(kv.dtype)
        dtype = jnp.dtype(jnp.uint16) if dtype == jnp.bfloat16 else dtype
        n = capacity // page
        shape = (slots * n, a.num_kv_heads, page, a.head_dim)
        return AttentionState(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype), pages_per_slot=n)
    return None


def init_cache(cfg: ModelConfig, slots: int, capacity: int, kv: KVCache | None = None) -> Cache:
    """Zeroed pools for every layer.

    Args:
        cfg: the model.
        slots: S; sequences held at once.
        capacity: most tokens that a slot holds.
        kv: dtype and page size of keys and values.

    Raises:
        ConfigError: a size below 1, or a page size that does not divide ``capacity``.
    """
    positive(slots=slots, capacity=capacity)
    kv = kv or KVCache()
    return Cache(layers=tuple(layer_state(cfg, letter, slots, capacity, kv) for letter in cfg.pattern))


def state_bytes(cfg: ModelConfig, length: int, kv: KVCache | None = None) -> int:
    """Bytes that one sequence of ``length`` tokens leaves behind."""
    return jax.eval_shape(lambda: init_cache(cfg, 1, length, kv)).nbytes()


def zero_slots(cache: Cache, slots: Int[Array, " n"]) -> Cache:
    """Admission: recurrent pools are zeroed at ``slots`` (-1: none); keys past a row's length are never visible."""

    def zero(state: Any) -> Any:
        if not isinstance(state, RecurrentState):
            return state
        return jax.tree.map(lambda pool: pool.at[_drop(slots, len(pool))].set(0, mode="drop"), state)

    return replace(cache, layers=tuple(zero(state) for state in cache.layers))


def _drop(slots: Any, size: int) -> Any:
    """Slot -1 becomes an index past the end, which scatters drop and gathers fill with zeros."""
    return jnp.where(slots < 0, size, slots)


def read_rows(pool: Float[Array, "S ..."], batch: PackedBatch) -> Float[Array, "B n ..."]:
    """The recurrent state of every segment of ``batch``; zeros for slot -1."""
    if batch.slots is None:
        return pool[: batch.shape[0], None]
    return pool.at[_drop(batch.slots, len(pool))].get(mode="fill", fill_value=0)


def write_rows(pool: Float[Array, "S ..."], batch: PackedBatch, value: Float[Array, "B n ..."]) -> Any:
    """``pool`` with the segments' new states; slot -1 is dropped."""
    value = value.astype(pool.dtype)
    if batch.slots is None:
        rows = batch.shape[0]
        return value[:, 0] if rows == len(pool) else pool.at[:rows].set(value[:, 0])
    return pool.at[_drop(batch.slots, len(pool))].set(value, mode="drop")


def _token_slots(batch: PackedBatch, slots: int) -> Any:
    """i32[B, T]: the slot of each token; an index past the end for padding and slot -1."""
    if batch.slots is None:
        owner = jnp.arange(batch.shape[0], dtype=jnp.int32)[:, None]
        return jnp.where(batch.segment_ids > 0, owner, slots)
    owner = jnp.take_along_axis(batch.slots, jnp.maximum(batch.segment_ids - 1, 0), axis=1)
    return jnp.where((batch.segment_ids > 0) & (owner >= 0), owner, slots)


def _stored(value: Array, dtype: Any) -> Array:
    """``value`` as a pool of ``dtype`` keeps it."""
    if dtype != jnp.uint16:
        return value.astype(dtype)
    return jax.lax.bitcast_convert_type(value.astype(jnp.bfloat16), jnp.uint16)


def _loaded(stored: Array) -> Array:
    """The floats of what a pool keeps."""
    return stored if stored.dtype != jnp.uint16 else jax.lax.bitcast_convert_type(stored, jnp.bfloat16)


def write_kv(
    state: AttentionState, batch: PackedBatch, k: Float[Array, "B T K d"], v: Float[Array, "B T K d"]
) -> AttentionState:
    """``state`` with every valid token's key and value at (its slot, its position)."""
    slots = len(state.k) // state.pages_per_slot
    owner = _token_slots(batch, slots)
    page = owner * state.pages_per_slot + batch.positions // state.page
    # A position past the capacity, or any of padding, must not reach another slot's pages.
    page = jnp.where((owner < slots) & (batch.positions < state.capacity), page, len(state.k))
    offset = batch.positions % state.page
    return replace(
        state,
        k=state.k.at[page, :, offset].set(_stored(k, state.k.dtype), mode="drop"),
        v=state.v.at[page, :, offset].set(_stored(v, state.v.dtype), mode="drop"),
    )


def read_kv(
    state: AttentionState, batch: PackedBatch, bound: int | None
) -> tuple[Float[Array, "B K L d"], Float[Array, "B K L d"], Int[Array, "B L"], Int[Array, "B L"]]:
    """Keys, values, their positions and their segment ids for every row, L = n * bound.

    Args:
        state: one layer's pages.
        batch: names the slots; n segments per row.
        bound: positions read of each slot; at least every row's length. None reads the capacity.
    """
    n = state.pages_per_slot
    bound = state.capacity if bound is None else min(bound, state.capacity)
    pages = -(-bound // state.page)
    rows = batch.shape[0]
    segments = 1 if batch.slots is None else batch.slots.shape[1]

    def read(pool: Any) -> Any:
        _, heads, page, d = pool.shape
        per_slot = pool.reshape(-1, n, heads, page, d)
        if batch.slots is None:
            kept = per_slot[:rows, :pages, :, :bound][:, None]
        else:
            kept = per_slot.at[_drop(batch.slots, len(per_slot)), :pages].get(mode="fill", fill_value=0)
            kept = kept[..., :bound, :] if pages == 1 else kept
        if pages == 1 and segments == 1:
            return kept[:, 0, 0]
        kept = jnp.moveaxis(kept, 3, 1).reshape(rows, heads, segments, -1, d)
        return kept[:, :, :, :bound].reshape(rows, heads, segments * bound, d)

    index = jnp.arange(segments * bound, dtype=jnp.int32)
    positions = jnp.broadcast_to(index % bound, (rows, segments * bound))
    owners = jnp.broadcast_to(index // bound + 1, (rows, segments * bound))
    return _loaded(read(state.k)), _loaded(read(state.v)), positions, owners
