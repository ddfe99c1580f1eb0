"""Cached = full: any split of a document into chunks and decode steps gives the logits of the whole."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.batch import PackedBatch
from jaxllm.cache.kv import KVCache
from jaxllm.cache.rows import read_rows_kv, write_rows_kv
from jaxllm.cache.state import Cache, init_cache, state_bytes, zero_slots
from jaxllm.config import (
    AttentionConfig,
    ConfigError,
    GatedDeltaConfig,
    JetConfig,
    MambaConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
)
from jaxllm.model import functional

SLOTS, CAPACITY, CHUNK, SEGMENTS, VOCAB = 4, 32, 12, 3, 37
TOLERANCE = 2e-5


def model(pattern: str, rope: bool, groups: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        pattern=pattern,
        mamba=MambaConfig(num_heads=4, head_dim=4, state_size=8, n_groups=groups, chunk_size=4),
        attention=AttentionConfig(
            num_heads=4, num_kv_heads=2, head_dim=4, window=5, rope=RopeConfig() if rope else None
        ),
        mlp=MLPConfig(16),
        moe=MoEConfig(6, 2, 12, shared_intermediate_size=8, scaling=1.5),
        delta=GatedDeltaConfig(2, 2 * groups, key_head_dim=4, value_head_dim=3, chunk_size=4),
        jet=JetConfig(2, key_head_dim=4, value_head_dim=6, generator_reduction=2, chunk_size=4),
        init_std=0.2,
    )


MODELS = {
    "mamba": model("MM", False, 2),
    "mixed": model("M*-W", True, 1),
    "attention": model("*-W", False, 1),
    "experts": model("ME*", False, 2),
    "delta": model("GJ", False, 2),
}
PAGES = {
    "mamba": (None,),
    "mixed": (None, 4),
    "attention": (8,),
    "experts": (None,),
    "delta": (None,),
}
CASES = [(name, page) for name in MODELS for page in PAGES[name]]


@functools.cache
def steps(name: str):
    cfg = MODELS[name]
    # Away from the initial values: many are zero, the kernel generator of a JetBlock among them.
    noise = np.random.default_rng(0)
    params = functional.init_params(cfg)
    params = jax.tree.map(lambda v: v + 0.1 * noise.standard_normal(v.shape).astype(np.float32), params)

    @functools.partial(jax.jit, static_argnames="bound")
    def extend(batch, cache, bound=None):
        m = functional.merge(cfg, params)
        ctx = m.context(kv_bound=bound)
        h, cache, _ = m.extend(batch, cache, ctx)
        return m.head(h, ctx), cache

    full = jax.jit(lambda tokens: functional.merge(cfg, params)(PackedBatch.from_rows(tokens)))

    def logits(document):
        tokens = np.zeros((1, CAPACITY), np.int32)
        tokens[0, : len(document)] = document
        return np.asarray(full(tokens))[0, : len(document)]

    return cfg, extend, logits


def packed(pieces, *, pad_to=CHUNK, lead=0):
    """One row of segments: ``pieces`` are (slot, offset, tokens); ``lead`` tokens of padding stand before them."""
    tokens, ids, positions = (np.zeros((1, pad_to), np.int32) for _ in range(3))
    slots, at = np.full((1, SEGMENTS), -1, np.int32), lead
    for index, (slot, offset, piece) in enumerate(pieces):
        part = slice(at, at + len(piece))
        tokens[0, part], ids[0, part] = piece, index + 1
        positions[0, part] = np.arange(offset, offset + len(piece))
        slots[0, index], at = slot, at + len(piece)
    return PackedBatch(tokens, ids, positions, slots=slots)


def decode_batch(tokens, positions, live):
    column = functools.partial(np.asarray, dtype=np.int32)
    return PackedBatch(column(tokens)[:, None], column(live)[:, None], column(positions)[:, None])


def dirty(cache: Cache, rng) -> Cache:
    """Pools as earlier, longer requests leave them."""
    fill = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)  # noqa: E731
    return replace(cache, layers=jax.tree.map(fill, cache.layers))


def slot_leaves(cache: Cache, slot: int) -> list[np.ndarray]:
    return [np.asarray(leaf.reshape(SLOTS, -1)[slot]) for leaf in jax.tree.leaves(cache)]


@pytest.mark.parametrize(("name", "page"), CASES)
@settings(max_examples=6)
@given(seed=st.integers(0, 2**31 - 1))
def test_any_chunking_gives_the_logits_of_the_whole(name, page, seed):
    """Random documents in random slots, packed in random pieces beside segments without a slot, then decoded."""
    rng = np.random.default_rng(seed)
    cfg, extend, logits = steps(name)
    cache = dirty(init_cache(cfg, SLOTS, CAPACITY, KVCache(page_size=page)), rng)
    owners = [int(s) for s in rng.permutation(SLOTS)[:2]]
    cache = zero_slots(cache, jnp.asarray([*owners, -1]))
    bystanders = [s for s in range(SLOTS) if s not in owners]
    before = [slot_leaves(cache, s) for s in bystanders]
    documents = [rng.integers(0, VOCAB, rng.integers(6, 20)).tolist() for _ in owners]
    until = [int(rng.integers(1, len(d))) for d in documents]
    read, got = [0, 0], [[], []]
    while read != until:
        pieces, members, room = [], [], CHUNK - int(rng.integers(0, 3))
        lead = CHUNK - room
        for index in rng.permutation(2):
            take = int(min(rng.integers(0, 8), until[index] - read[index], room))
            if take:
                pieces.append(
                    (owners[index], read[index], documents[index][read[index] : read[index] + take])
                )
                members.append(index)
                read[index] += take
                room -= take
        if room >= 2 and rng.random() < 0.5:
            pieces.append((-1, 0, rng.integers(0, VOCAB, 2).tolist()))
        if not members:
            continue
        out, cache = extend(packed(pieces, lead=lead), cache)
        at = lead
        for index, (_, _, piece) in zip(members, pieces):
            got[index] += list(np.asarray(out)[0, at : at + len(piece)])
            at += len(piece)
    while any(r < len(d) for r, d in zip(read, documents)):
        tokens, positions, live = np.zeros(SLOTS), np.zeros(SLOTS), np.zeros(SLOTS)
        for index, slot in enumerate(owners):
            if read[index] < len(documents[index]):
                tokens[slot], positions[slot], live[slot] = documents[index][read[index]], read[index], 1
        out, cache = extend(decode_batch(tokens, positions, live), cache, bound=24)
        for index, slot in enumerate(owners):
            if live[slot]:
                got[index].append(np.asarray(out)[slot, 0])
                read[index] += 1
    for document, mine in zip(documents, got):
        np.testing.assert_allclose(np.stack(mine), logits(document), atol=TOLERANCE, rtol=TOLERANCE)
    for slot, old in zip(bystanders, before):
        for a, b in zip(old, slot_leaves(cache, slot)):
            np.testing.assert_array_equal(a, b, err_msg=f"slot {slot} was touched")


def test_inactive_rows_leave_their_slot_bit_for_bit(rng):
    cfg, extend, _ = steps("mixed")
    cache = dirty(init_cache(cfg, SLOTS, CAPACITY), rng)
    before = slot_leaves(cache, 2)
    _, after = extend(decode_batch([1, 2, 3, 4], [3, 4, 5, 6], [1, 1, 0, 1]), cache, bound=24)
    for a, b in zip(before, slot_leaves(after, 2)):
        np.testing.assert_array_equal(a, b)
    changed = [not np.array_equal(a, b) for a, b in zip(slot_leaves(cache, 1), slot_leaves(after, 1))]
    assert all(changed), "the live neighbour must have been written"


def test_fewer_rows_than_slots_leave_the_rest(rng):
    cfg, extend, _ = steps("mixed")
    cache = dirty(init_cache(cfg, SLOTS, CAPACITY), rng)
    full_out, _ = extend(decode_batch([1, 2, 0, 0], [3, 4, 0, 0], [1, 1, 0, 0]), cache, bound=24)
    out, after = extend(decode_batch([1, 2], [3, 4], [1, 1]), cache, bound=24)
    np.testing.assert_allclose(out, full_out[:2], atol=TOLERANCE)
    for slot in (2, 3):
        for a, b in zip(slot_leaves(cache, slot), slot_leaves(after, slot)):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("page", [None, 4])
def test_positions_of_padding_reach_no_slot(page, rng):
    """Whatever they are: behind the last slot's end a negative one would lead back into it."""
    cfg, extend, _ = steps("mixed")
    cache = dirty(init_cache(cfg, SLOTS, CAPACITY, KVCache(page_size=page)), rng)
    _, after = extend(
        decode_batch([1, 2, 3, 4], [0, -1, -CAPACITY, 2 * CAPACITY], [1, 0, 0, 0]), cache, bound=24
    )
    for slot in (1, 2, 3):
        for a, b in zip(slot_leaves(cache, slot), slot_leaves(after, slot)):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("page", [None, 4])
def test_positions_past_the_capacity_reach_no_other_slot(page, rng):
    cfg, extend, _ = steps("mixed")
    cache = dirty(init_cache(cfg, SLOTS, CAPACITY, KVCache(page_size=page)), rng)
    _, after = extend(decode_batch([1, 0, 0, 0], [CAPACITY, 0, 0, 0], [1, 0, 0, 0]), cache, bound=24)
    for slot in (1, 2, 3):
        for a, b in zip(slot_leaves(cache, slot), slot_leaves(after, slot)):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["mamba", "delta"])
def test_zero_slots_zeroes_recurrent_state_there_alone(name, rng):
    cfg = MODELS[name]
    cache = dirty(init_cache(cfg, SLOTS, CAPACITY), rng)
    after = zero_slots(cache, jnp.asarray([1, -1]))
    assert not any(leaf.any() for leaf in slot_leaves(after, 1))
    for slot in (0, 2, 3):
        for a, b in zip(slot_leaves(cache, slot), slot_leaves(after, slot)):
            np.testing.assert_array_equal(a, b)


def test_bfloat16_keys_are_kept_as_asked():
    cache = init_cache(MODELS["mixed"], 2, 8, KVCache(dtype="bfloat16"))
    assert cache.layers[1].k.dtype == jnp.uint16 and cache.layers[0].matrix.dtype == jnp.float32


def test_bfloat16_keys_come_back_rounded_once(rng):
    cfg = MODELS["attention"]
    state = init_cache(cfg, SLOTS, 8, KVCache(dtype="bfloat16")).layers[0]
    batch = decode_batch([0] * SLOTS, [3] * SLOTS, [1, 0, 1, 1])
    k, v = (jnp.asarray(rng.normal(size=(SLOTS, 1, 2, 4)), jnp.float32) for _ in range(2))
    for written, value in zip(read_rows_kv(write_rows_kv(state, batch, k, v), batch, None), (k, v)):
        assert written.dtype == jnp.bfloat16
        kept = np.asarray(value.astype(jnp.bfloat16)[:, 0], np.float32) * batch.segment_ids[:, :, None]
        np.testing.assert_array_equal(np.asarray(written[:, :, 3], np.float32), kept)
        assert np.count_nonzero(np.asarray(written, np.float32)) == np.count_nonzero(kept)


def test_state_bytes_by_hand():
    """mixed = M*-W: conv 3 * (16 + 2 * 8), ssm 4 * 4 * 8, 2 * 2 * 4 floats for each of 10 tokens and
    a ring of 5."""
    assert state_bytes(MODELS["mixed"], 10) == 4 * (3 * 32 + 128 + (10 + 5) * 2 * 2 * 4)


def test_state_bytes_of_the_delta_rule_by_hand():
    """GJ: conv 3 * (2 * 2 * 4 + 4 * 3) and matrix 4 * 4 * 3; conv 3 * 12 and matrix 2 * 4 * 6, at any length."""
    assert state_bytes(MODELS["delta"], 10) == 4 * (3 * 28 + 48 + 3 * 12 + 48)


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: init_cache(MODELS["mixed"], 0, 8), "slots"),
        (lambda: init_cache(MODELS["mixed"], 1, 0), "capacity"),
        (lambda: init_cache(MODELS["mixed"], 1, 10, KVCache(page_size=4)), "kv.page_size"),
        (lambda: KVCache(dtype="int3"), "kv.dtype"),
        (lambda: KVCache(page_size=0), "kv.page_size"),
    ],
)
def test_wrong_sizes_are_named(build, named):
    with pytest.raises(ConfigError, match=f"^{named}="):
        build()
