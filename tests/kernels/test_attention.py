"""Attention against float64 sums, its reference, torch, and itself under packing, padding and blocking."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tree
from pallas_kernels.attention import attention, attention_backward, merge, xla
from tests.kernels.kernel_cases import SEGMENTS, close, documents, normal, values, values_and_grads
from tests.kernels.tree_cases import path_to, random_parents

B, T = SEGMENTS.shape
H, K, d = 4, 2, 8
LIVE = SEGMENTS > 0
POSITIONS = np.zeros_like(SEGMENTS)
for _row, _, _at in documents(SEGMENTS):
    POSITIONS[_row, _at] = np.arange(_at.stop - _at.start)
PLACES = {
    "q_positions": POSITIONS,
    "kv_positions": POSITIONS,
    "q_segment_ids": SEGMENTS,
    "kv_segment_ids": SEGMENTS,
}


@pytest.fixture(autouse=True, params=["all keys", "blocks of keys"])
def small_blocks(monkeypatch, request):
    """Several query blocks, the last one ragged, at test lengths, and blocks of keys, the last one overlapping."""
    monkeypatch.setattr(xla, "_BLOCK", 12)
    monkeypatch.setattr(xla, "_KEYS", 7 if request.param == "blocks of keys" else 512)


def arrays(seed: int = 0) -> dict:
    return {"q": normal(seed, B, T, H, d), "k": normal(seed, B, T, K, d), "v": normal(seed + 1, B, T, K, d)}


def by_hand(q, k, v, window, soft_cap):
    """One document in float64: outputs and log-sum-exps."""
    out, lse = np.zeros(q.shape), np.zeros(q.shape[:2])
    for t in range(len(q)):
        since = 0 if window is None else max(0, t + 1 - window)
        for h in range(H):
            keys, vals = (w[since : t + 1, h // (H // K)].astype(np.float64) for w in (k, v))
            score = keys @ q[t, h] / np.sqrt(d)
            score = score if soft_cap is None else soft_cap * np.tanh(score / soft_cap)
            weight = np.exp(score)
            out[t, h], lse[t, h] = weight @ vals / weight.sum(), np.log(weight.sum())
    return out, lse


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (4, None), (None, 1.5), (1, 2.0)])
def test_every_document_of_a_packed_row_attends_to_itself(implementation, window, soft_cap):
    a = arrays()
    out, lse = values(
        attention,
        {**a, **PLACES},
        window=window,
        soft_cap=soft_cap,
        return_lse=True,
        implementation=implementation,
    )
    for row, _, at in documents(SEGMENTS):
        wanted = by_hand(*(a[name][row, at] for name in "qkv"), window, soft_cap)
        close((out[row, at], lse[row, at]), wanted, 3e-6)
    assert not out[~LIVE].any()
    assert np.all(lse[~LIVE] == -np.inf)


@pytest.mark.parametrize("kv_layout", ["BTKD", "BKTD"])
@pytest.mark.parametrize(
    ("window", "soft_cap", "masked"), [(None, None, False), (4, 1.5, False), (9, None, True)]
)
def test_gradients_are_those_of_the_reference(kv_layout, window, soft_cap, masked):
    a = arrays()
    if masked:
        a["mask"] = np.random.default_rng(3).random((B, T, T)) < 0.7
    if kv_layout == "BKTD":
        a["k"], a["v"] = a["k"].swapaxes(1, 2), a["v"].swapaxes(1, 2)
    options = {"window": window, "soft_cap": soft_cap, "kv_layout": kv_layout}
    got, wanted = (
        values_and_grads(attention, {**a, **PLACES}, [normal(2, B, T, H, d)], implementation=i, **options)
        for i in ("xla", "reference")
    )
    close(got, wanted, 5e-6)


def test_the_log_sum_exp_merges_two_halves_of_the_keys_and_has_a_gradient():
    a = arrays()
    half = np.arange(T) < 13
    whole = values(attention, {**a, **PLACES}, return_lse=True)
    parts = [
        values(attention, {**a, **PLACES, "kv_segment_ids": np.where(keep, SEGMENTS, 0)}, return_lse=True)
        for keep in (half, ~half)
    ]
    # Row 0 has queries that see keys of one half only, and padding that sees none.
    close(merge(*jax.tree.map(jnp.asarray, parts)), whole, 3e-6)
    ids = {name: np.ones_like(v) if "segment" in name else v for name, v in PLACES.items()}
    weights = [normal(2, B, T, H, d), normal(2, B, T, H)]
    got, wanted = (
        values_and_grads(attention, {**a, **ids}, weights, return_lse=True, implementation=i)
        for i in ("xla", "reference")
    )
    close(got, wanted, 5e-6)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize(("kv_layout", "window", "soft_cap"), [("BTKD", None, None), ("BKTD", 6, 1.5)])
def test_backward_over_parts_of_the_keys_adds_up_to_the_gradient(implementation, kv_layout, window, soft_cap):
    """From the output and the log-sum-exp of all keys; one part has a mask, which hides nothing."""
    a, cut = arrays(), 13
    axis = 1 if kv_layout == "BTKD" else 2
    if kv_layout == "BKTD":
        a["k"], a["v"] = a["k"].swapaxes(1, 2), a["v"].swapaxes(1, 2)
    options = {"window": window, "soft_cap": soft_cap, "kv_layout": kv_layout}
    # Padding has no log-sum-exp to differentiate.
    weights = [normal(2, B, T, H, d), normal(2, B, T, H)]
    weights[1] *= LIVE[..., None]

    def op(q, k, v, q_positions, kv_positions, q_segment_ids, kv_segment_ids):
        out, lse = attention(
            q,
            k,
            v,
            q_positions=q_positions,
            kv_positions=kv_positions,
            q_segment_ids=q_segment_ids,
            kv_segment_ids=kv_segment_ids,
            return_lse=True,
            implementation="reference",
            **options,
        )
        return out, jnp.where(lse == -jnp.inf, 0, lse)

    (out, _), wanted = values_and_grads(op, {**a, **PLACES}, weights)
    lse = values(attention, {**a, **PLACES}, return_lse=True, implementation="reference", **options)[1]
    parts = []
    for at in (slice(0, cut), slice(cut, T)):
        keys = {name: np.split(a[name], [cut], axis=axis)[at.start > 0] for name in "kv"}
        places = {name: v[:, at] if name.startswith("kv") else v for name, v in PLACES.items()}
        seen = {"mask": np.ones((B, T, cut), bool)} if at.start == 0 else {}
        given = {"q": a["q"], **keys, "out": out, "lse": lse, "dout": weights[0], "dlse": weights[1]}
        parts.append(
            values(attention_backward, {**given, **places, **seen}, implementation=implementation, **options)
        )
    got = {"q": parts[0][0] + parts[1][0]}
    got |= {name: np.concatenate([p[n] for p in parts], axis=axis) for n, name in ((1, "k"), (2, "v"))}
    close(got, wanted, 5e-6)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_mask_leaves_each_node_of_a_tree_its_path(implementation):
    """Over more than one block of queries; the window counts positions, that is depths."""
    a, (rows, W) = arrays(), SEGMENTS.shape
    parents = random_parents(np.random.default_rng(4), rows, W)
    live = np.random.default_rng(5).random((rows, W)) < 0.8
    seen = np.asarray(tree.ancestors(jnp.asarray(parents), jnp.asarray(live)))
    depth = np.maximum(seen.sum(-1) - 1, 0).astype(np.int32)
    ids = live.astype(np.int32)
    places = dict(zip(PLACES, (depth, depth, ids, ids)))
    out, lse = values(
        attention, {**a, **places, "mask": seen}, window=5, return_lse=True, implementation=implementation
    )
    for b, i in np.argwhere(live):
        path = path_to(parents[b], live[b], i)
        wanted = by_hand(*(a[name][b, path] for name in "qkv"), 5, None)
        close((out[b, i], lse[b, i]), (wanted[0][-1], wanted[1][-1]), 3e-6)
    assert not out[~live].any()


@pytest.mark.parametrize("kv_layout", ["BTKD", "BKTD"])
def test_one_query_over_a_cache_is_the_last_row(kv_layout):
    a = arrays()
    wanted = values(attention, {**a, **PLACES}, window=6)[1, -1]
    # The cache holds the keys in another order, among slots of other documents.
    order = np.random.default_rng(0).permutation(T)
    cache = {name: a[name][:, order] for name in "kv"}
    if kv_layout == "BKTD":
        cache = {name: v.swapaxes(1, 2) for name, v in cache.items()}
    places = {
        "q_positions": POSITIONS[:, -1:],
        "kv_positions": POSITIONS[:, order],
        "q_segment_ids": SEGMENTS[:, -1:],
        "kv_segment_ids": SEGMENTS[:, order],
    }
    out = values(attention, {"q": a["q"][:, -1:], **cache, **places}, window=6, kv_layout=kv_layout)
    close(out[1, 0], wanted, 3e-6)
    assert not out[0].any()


@pytest.mark.parametrize(
    ("long", "window", "read"),
    [
        (False, None, [[0], [1], [2]]),
        (True, None, [[0], [0, 1], [0, 1, 2]]),
        (True, 4, [[0], [0, 1], [1, 2]]),
    ],
)
def test_blocks_of_keys_that_no_query_sees_are_not_read(monkeypatch, long, window, read):
    """Their values may be anything, NaN too; of keys that are read 0 * NaN would spoil the output."""
    monkeypatch.setattr(xla, "_KEYS", 8)
    length = 24
    place, block = np.broadcast_to(np.arange(length), (2, length)), np.arange(length) // 8
    positions, ids = (place, np.ones_like(place)) if long else (place % 8, 1 + place // 8)
    a = {"k": normal(0, 2, length, K, d), "v": normal(1, 2, length, K, d)}
    a |= {"kv_positions": positions, "kv_segment_ids": ids}
    for number, seen in enumerate(read):
        mine = slice(8 * number, 8 * number + 8)
        a |= {"q": normal(2, 2, 8, H, d), "q_positions": positions[:, mine], "q_segment_ids": ids[:, mine]}
        unseen = ~np.isin(block, seen)[:, None, None]
        spoiled = {name: np.where(unseen, np.nan, a[name]).astype(np.float32) for name in "kv"}
        wanted, got = (
            values(attention, given, window=window, implementation="xla") for given in (a, a | spoiled)
        )
        np.testing.assert_array_equal(got, wanted)
        assert np.isfinite(wanted).all()


def test_neighbours_in_the_batch_do_not_change_a_row(monkeypatch):
    """A block that only another row sees must not change a bit of this one."""
    monkeypatch.setattr(xla, "_KEYS", 7)
    a = arrays()
    mine = jax.jit(lambda q, k, v, places: attention(q, k, v, **places, implementation="xla"))
    others = dict(PLACES)
    # The first row stays; the others become one document, so that every block is visited.
    for name in others:
        others[name] = np.where(
            np.arange(B)[:, None] == 0, others[name], 1 if "segment" in name else np.arange(T)
        )
    one, two = (np.asarray(mine(a["q"], a["k"], a["v"], places)) for places in (PLACES, others))
    np.testing.assert_array_equal(one[0], two[0])
    assert not np.array_equal(one[1], two[1])


def test_huge_padding_does_not_leak():
    a = arrays()
    weights = [normal(2, B, T, H, d) * LIVE[..., None, None]]
    clean = values_and_grads(attention, {**a, **PLACES}, weights)
    a = {name: np.where(LIVE[..., None, None], v, 1e30).astype(np.float32) for name, v in a.items()}
    got = values_and_grads(attention, {**a, **PLACES}, weights)
    close(got, clean, 1e-6)
    assert not any(grad[~LIVE].any() for grad in got[1].values())


def test_scale_and_rounded_operands():
    a = {**arrays(), **PLACES}
    exact = values_and_grads(attention, a, [normal(2, B, T, H, d)], scale=0.7)
    close(values(attention, {**a, "q": a["q"] * 0.7 * d**0.5}), exact[0], 3e-6)
    rounded = values_and_grads(attention, a, [normal(2, B, T, H, d)], scale=0.7, operand_dtype=jnp.bfloat16)
    close(rounded, exact, 3e-2)
    assert np.abs(rounded[0] - exact[0]).max() > 1e-4


def test_the_output_has_the_dtype_of_the_queries():
    places = {name: jnp.asarray(v) for name, v in PLACES.items()}
    a = {name: jnp.asarray(v, jnp.bfloat16) for name, v in arrays().items()}
    out, lse = attention(**a, **places, return_lse=True)
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.oracle
def test_agrees_with_torch():
    import torch

    a = {name: torch.from_numpy(v.swapaxes(1, 2).copy()).requires_grad_() for name, v in arrays().items()}
    weight = normal(2, B, T, H, d)
    out = torch.nn.functional.scaled_dot_product_attention(
        a["q"], a["k"], a["v"], is_causal=True, enable_gqa=True
    )
    out.backward(torch.from_numpy(weight.swapaxes(1, 2).copy()))
    places = {
        name: np.ones_like(v) if "segment" in name else np.tile(np.arange(T), (B, 1))
        for name, v in PLACES.items()
    }
    got, grads = values_and_grads(attention, {**arrays(), **places}, [weight])
    close(got, out.detach().numpy().swapaxes(1, 2), 5e-6)
    close(grads, {name: v.grad.numpy().swapaxes(1, 2) for name, v in a.items()}, 5e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"k": np.ones((B, T, 3, d), np.float32), "v": np.ones((B, T, 3, d), np.float32)},
            "K = 3 to divide H = 4",
        ),
        ({"v": np.ones((B, T, K, d + 1), np.float32)}, "v.shape"),
        ({"kv_positions": POSITIONS[:, 1:]}, "kv_positions.shape"),
        ({"q_segment_ids": SEGMENTS[:, 1:]}, "q_segment_ids.shape"),
        ({"mask": np.ones((B, T, T + 1), bool)}, "mask.shape"),
        ({"q": np.ones((B, T, H, d), np.int32)}, "q.dtype='int32': expected a floating dtype"),
        ({"kv_positions": POSITIONS.astype(np.float32)}, "kv_positions.dtype='float32': expected an integer"),
        ({"mask": np.ones((B, T, T), np.int32)}, "mask.dtype='int32': expected bool"),
        ({"window": 0}, "window=0: expected None or at least 1"),
        ({"soft_cap": 0.0}, "soft_cap=0.0"),
        ({"kv_layout": "KTBD"}, "kv_layout='KTBD': expected 'BTKD' or 'BKTD'"),
        ({"operand_dtype": jnp.int8}, "operand_dtype='int8'"),
        ({"implementation": "pallas"}, "implementation='pallas': expected one of 'auto', "),
    ],
)
def test_bad_arguments_are_named(own_checks, change, message):
    with pytest.raises(ValueError, match=message):
        attention(**{**arrays(), **PLACES, **change})
