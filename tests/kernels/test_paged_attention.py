"""Paged attention against plain loops in float64 and against ``attention`` over the flattened cache."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import tree
from pallas_kernels.attention import attention
from pallas_kernels.compat import checkify
from pallas_kernels.paged_attention import OpenTail, paged_attention, translate, window_mask
from tests.kernels.kernel_cases import close, values
from tests.kernels.paged_cases import by_hand, draw_call, quantized
from tests.kernels.tree_cases import random_parents

SEEDS = st.integers(0, 2**20)
IMPLEMENTATIONS = ["xla", "reference"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("granularity", [None, "page", "token"])
@given(seed=SEEDS, shape=st.sampled_from([(1, 2, 2, 4, 6), (3, 1, 4, 8, None), (5, 2, 1, 2, 9)]))
def test_every_key_that_is_seen_counts_once(implementation, granularity, seed, shape):
    W, K, G, page, t = shape
    call = draw_call(seed, W=W, K=K, G=G, page=page, t=t, granularity=granularity)
    close(tuple(call.run(implementation=implementation, return_mass=True)), by_hand(call))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@given(seed=SEEDS, size=st.sampled_from([(1, 4, 5), (7, 4, 5), (1, 20, 1)]), cap=st.sampled_from([None, 1.5]))
def test_consecutive_pages_need_no_table(implementation, seed, size, cap):
    """One page a slot, several, and more query rows than a page has tokens."""
    W, page, n = size
    call = replace(draw_call(seed, W=W, page=page, n=n, in_place=True), window=9, soft_cap=cap)
    close(tuple(call.run(implementation=implementation, return_mass=True)), by_hand(call))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("granularity", [None, "token"])
@given(seed=SEEDS)
def test_a_sliding_window_and_a_soft_cap(implementation, granularity, seed):
    call = replace(draw_call(seed, W=2, granularity=granularity), window=7, soft_cap=2.0)
    close(tuple(call.run(implementation=implementation, return_mass=True)), by_hand(call))


@given(seed=SEEDS, W=st.sampled_from([1, 4]))
def test_every_page_read_is_attention_over_the_flattened_cache(seed, W):
    call = draw_call(seed, W=W)
    length = call.kv_len[:, :1].repeat(2, axis=1)
    call = replace(
        call, kv_len=length, **{w: np.nan_to_num(getattr(call, w)) for w in ("k_pages", "v_pages")}
    )
    tail = OpenTail(*(np.nan_to_num(w) for w in call.tail[:2]), *call.tail[2:])
    call = replace(call, tail=tail)
    flat = {}
    for name, pool, own in (("k", call.k_pages, tail.k), ("v", call.v_pages, tail.v)):
        sealed = pool[call.table, np.arange(2)[:, None]].reshape(2, 2, -1, 16)
        flat[name] = np.concatenate([sealed, own], axis=2)
    S = call.table.shape[2] * 4
    live = [np.arange(S) < length[:, :1], np.arange(6) < tail.length[:, None]]
    positions = [np.tile(np.arange(S), (2, 1)), tail.positions]
    places = {
        "q_positions": np.maximum(call.q_positions, 0),
        "kv_positions": np.concatenate(positions, axis=1).astype(np.int32),
        "q_segment_ids": (call.q_positions >= 0).astype(np.int32),
        "kv_segment_ids": np.concatenate(live, axis=1).astype(np.int32),
    }
    wanted = values(attention, {"q": call.q, **flat, **places}, kv_layout="BKTD", return_lse=True)
    for implementation in IMPLEMENTATIONS:
        close(tuple(call.run(implementation=implementation)[:2]), wanted, 2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@given(seed=SEEDS)
def test_a_tree_window_sees_its_paths(implementation, seed):
    W, t = 5, 9
    call = draw_call(seed, W=W, t=t)
    rng = np.random.default_rng(seed)
    live = rng.random((2, W)) < 0.8
    ancestors = np.asarray(tree.ancestors(jnp.asarray(random_parents(rng, 2, W)), jnp.asarray(live)))
    before = rng.integers(0, t - W + 1, 2).astype(np.int32)
    depth = ancestors.sum(-1) - 1
    start = call.kv_len.max(axis=1)
    positions = start[:, None] + np.arange(t)
    for b in range(2):
        positions[b, before[b] : before[b] + W] = start[b] + before[b] + depth[b]
    mask = np.asarray(window_mask(jnp.asarray(ancestors), jnp.asarray(before), t))
    for b, i in np.ndindex(2, W):
        wanted = [live[b, i]] * before[b] + list(ancestors[b, i]) + [False] * (t - W - before[b])
        assert mask[b, i].tolist() == wanted
    tail = OpenTail(*call.tail[:2], before + W, positions.astype(np.int32), mask)
    tail = tail._replace(k=np.nan_to_num(tail.k), v=np.nan_to_num(tail.v))
    at = np.where(live, (start + before)[:, None] + depth, -1).astype(np.int32)
    call = replace(call, tail=tail, q_positions=at)
    close(tuple(call.run(implementation=implementation, return_mass=True)), by_hand(call))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("granularity", [None, "page", "token"])
@given(seed=SEEDS, W=st.sampled_from([1, 3]))
@settings(max_examples=4)
def test_quantised_pages_are_attention_over_what_they_stand_for(bits, per_channel, granularity, seed, W):
    call, plain = quantized(draw_call(seed, W=W, granularity=granularity), bits, per_channel)
    wanted = by_hand(plain)
    for implementation in IMPLEMENTATIONS:
        close(tuple(call.run(implementation=implementation, return_mass=True)), wanted)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("W", [1, 7])
def test_quantised_pages_are_read_in_place_too(bits, W):
    for per_channel in (False, True):
        call, plain = quantized(draw_call(3, W=W, in_place=True), bits, per_channel)
        close(tuple(call.run(return_mass=True)), by_hand(plain))


def test_what_is_poisoned_behind_quantised_pages_is_not_read():
    call, plain = quantized(draw_call(5, granularity="page"), 4, False)
    unread = np.isnan(draw_call(5).k_pages).all(axis=-1, keepdims=True)
    pools = {
        name: replace(
            pool, scale=jnp.where(unread, np.nan, pool.scale), offset=jnp.where(unread, np.nan, pool.offset)
        )
        for name, pool in (("k_pages", call.k_pages), ("v_pages", call.v_pages))
    }
    close(tuple(replace(call, **pools).run(return_mass=True)), by_hand(plain))


def test_mass_sums_to_one_where_every_query_sees_a_key():
    call = draw_call(11, W=3)
    positions = (call.kv_len.max(axis=1) + call.tail.length)[:, None] - 3 + np.arange(3)
    out = replace(call, q_positions=np.maximum(positions, 0).astype(np.int32)).run(return_mass=True)
    assert np.all(np.isfinite(out.lse))
    sealed, tail = out.mass
    np.testing.assert_allclose(sealed.sum(axis=(2, 3)) + tail.sum(axis=2), 1, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_without_keys_is_zero(implementation):
    call = draw_call(1, t=None)
    call = replace(call, kv_len=np.zeros_like(call.kv_len))
    out = call.run(implementation=implementation, return_mass=True)
    assert not out.out.any() and np.all(out.lse == -np.inf) and not out.mass[0].any()


def test_page_and_token_selections_of_the_same_keys_agree():
    call = draw_call(2, n=6)
    rng = np.random.default_rng(0)
    pages = np.stack([[rng.permutation(6)[:4] for _ in range(2)] for _ in range(2)]).astype(np.int32)
    tokens = (pages[..., None] * 4 + np.arange(4, dtype=np.int32)).reshape(2, 2, -1)
    found = [
        replace(
            call,
            logical=logical,
            granularity=kind,
            table=np.asarray(
                translate(jnp.asarray(call.table), jnp.asarray(logical), page=4, granularity=kind)
            ),
        ).run(return_mass=True)
        for kind, logical in (("page", pages), ("token", tokens))
    ]
    close(found[0][:2], found[1][:2])
    close(found[0].mass[0].reshape(2, 2, -1), found[1].mass[0][..., 0])


def test_operands_are_rounded_and_the_output_has_the_dtype_of_the_queries():
    call = draw_call(4, dtype=jnp.bfloat16)
    exact = replace(
        call,
        **{name: np.asarray(getattr(call, name), np.float32) for name in ("q", "k_pages", "v_pages")},
        tail=OpenTail(*(np.asarray(w, np.float32) for w in call.tail[:2]), *call.tail[2:]),
    )
    found = call.run()
    assert (found.out.dtype, found.lse.dtype) == (jnp.bfloat16, np.float32)
    wanted = exact.run()
    close(found[:2], wanted[:2], 2e-2)
    close(exact.run(operand_dtype=jnp.bfloat16)[:2], wanted[:2], 2e-2)
    assert np.abs(exact.run(operand_dtype=jnp.bfloat16).out - wanted.out).max() > 1e-5


def test_the_same_call_gives_the_same_bits():
    call = draw_call(8, W=3, granularity="page")
    first, second = (call.run(return_mass=True) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def given_arguments(**changes) -> dict:
    call = draw_call(0)
    names = ("q", "k_pages", "v_pages", "table", "kv_len", "q_positions", "tail")
    return jax.tree.map(jnp.asarray, {name: getattr(call, name) for name in names}) | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.zeros((2, 65, 4, 16))}, "q.shape.*W .second. from 1 to 64"),
        ({"q": jnp.zeros((2, 1, 3, 16))}, "K = 2 .second. to divide H = 3"),
        ({"k_pages": jnp.zeros((13, 2, 4, 8))}, "k_pages.shape"),
        ({"v_pages": jnp.zeros((13, 2, 8, 16))}, "v_pages.shape"),
        ({"table": jnp.zeros((2, 1, 5), jnp.int32)}, "table.shape"),
        ({"table": None}, "P .first. to be a multiple of B = 2"),
        ({"logical": jnp.zeros((2, 2, 4), jnp.int32)}, "logical.shape"),
        ({"table": None, "logical": jnp.zeros((2, 2, 4), jnp.int32)}, "logical='given'"),
        ({"count": jnp.zeros((2,), jnp.int32)}, "count.shape"),
        ({"granularity": "row"}, "granularity='row': expected 'page' or 'token'"),
        ({"granularity": "token"}, "logical=None"),
        ({"kv_len": jnp.zeros((2,), jnp.int32)}, "kv_len.shape"),
        ({"q_positions": jnp.zeros((2, 2), jnp.int32)}, "q_positions.shape"),
        ({"window": 0}, "window=0"),
        ({"soft_cap": -1.0}, "soft_cap=-1.0"),
        ({"operand_dtype": jnp.int8}, "operand_dtype='int8'"),
        ({"implementation": "cudnn"}, "implementation='cudnn'"),
    ],
)
def test_bad_arguments_are_named(own_checks, changes, message):
    with pytest.raises(ValueError, match=message):
        paged_attention(**given_arguments(**changes))


@pytest.mark.parametrize("name", ["k", "v", "length", "positions", "mask"])
def test_bad_tails_are_named(own_checks, name):
    tail = given_arguments()["tail"]._replace(**{name: jnp.zeros((1, 1))})
    with pytest.raises(ValueError, match=rf"tail\.{name}\.shape"):
        paged_attention(**given_arguments(tail=tail))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"table": jnp.full((2, 2, 5), 13)},
            "table: 20 entries in use lie outside the pool, expected 0 to 12",
        ),
        ({"table": jnp.full((2, 2, 5), -1)}, "table: 20 entries"),
        ({"count": jnp.full((2, 2), 6)}, "count: expected 0 to 5"),
        ({"kv_len": jnp.full((2, 2), -1)}, "kv_len"),
        ({"logical": jnp.full((2, 2, 5), -2)}, "logical"),
    ],
)
def test_debug_mode_catches_bad_values(changes, message):
    arguments = given_arguments(kv_len=jnp.full((2, 2), 20)) | changes
    checked = jax.jit(checkify.checkify(lambda a: paged_attention(**a, debug=True).out))
    error, _ = checked(arguments)
    assert message in (error.get() or "")
    with pytest.raises(Exception, match=message):
        paged_attention(**arguments, debug=True)


def test_debug_mode_lets_good_values_be():
    selected = draw_call(0, granularity="token")
    names = ("table", "logical", "count", "granularity")
    arguments = given_arguments(**{name: getattr(selected, name) for name in names}, debug=True)
    paged_attention(**jax.tree.map(lambda w: jnp.asarray(w) if isinstance(w, np.ndarray) else w, arguments))
    # Entries of nothing may hold anything.
    assert (selected.table > 100).any()
