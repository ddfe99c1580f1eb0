"""The gated delta rule against a float64 recurrence, its reference, and itself under chunking, packing and splitting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.gated_delta import gated_delta
from pallas_kernels.gated_delta.triangular import unit_lower_inverse
from tests.kernels.kernel_cases import DOCUMENTS, SEGMENTS, close, documents, normal, values, values_and_grads

B, T = SEGMENTS.shape
H, HV, DK, DV = 2, 4, 5, 3
LIVE = SEGMENTS > 0
TOKENWISE = ("q", "k", "v", "g", "beta")


def arrays(n: int | None = DOCUMENTS, heads: int = H, dk: int = DK, dv: int = DV) -> dict:
    k = normal(1, B, T, heads, dk)
    return {
        "q": normal(0, B, T, heads, dk) / dk**0.5,
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": normal(0, B, T, HV, dv),
        "g": -np.logaddexp(0, normal(0, B, T, HV)),
        # Up to 2: an eigenvalue of the transition reaches -1.
        "beta": 2 / (1 + np.exp(normal(1, B, T, HV))),
        "initial_state": None if n is None else normal(0, B, n, HV, dk, dv),
    }


def by_hand(q, k, v, g, beta, S):
    """One document in float64: outputs and the state after it."""
    S, o = S.astype(np.float64), []
    q, k = (np.repeat(x, HV // x.shape[1], axis=1).astype(np.float64) for x in (q, k))
    for t in range(len(q)):
        S = np.exp(g[t].astype(np.float64))[:, None, None] * S
        write = beta[t][:, None] * (v[t] - np.einsum("hkv,hk->hv", S, k[t]))
        S = S + k[t][..., None] * write[:, None]
        o.append(np.einsum("hkv,hk->hv", S, q[t]))
    return np.stack(o), S


def masked(outputs):
    return (outputs[0] * LIVE[..., None, None], *outputs[1:])


@pytest.mark.parametrize(
    ("implementation", "chunk", "heads"),
    [("reference", 64, H), ("xla", 1, H), ("xla", 4, H), ("xla", 8, 1), ("xla", 8, HV), ("xla", 64, H)],
)
def test_every_document_of_a_packed_row_is_its_own_recurrence(implementation, chunk, heads):
    a = {**arrays(heads=heads), "segment_ids": SEGMENTS}
    options = {"chunk_size": chunk, "implementation": implementation}
    o, state = values(gated_delta, a, **options)
    left = a["initial_state"].copy()
    for row, s, at in documents(SEGMENTS):
        tokens = [a[name][row, at] for name in TOKENWISE]
        wanted, left[row, s - 1] = by_hand(*tokens, a["initial_state"][row, s - 1])
        close(o[row, at], wanted, 3e-6)
    close(state, left, 3e-6)
    np.testing.assert_array_equal(state[0, 3], a["initial_state"][0, 3])
    # Training masks instead of moving documents to chunk boundaries: the same outputs from zero states.
    zero = {**a, "initial_state": np.zeros_like(a["initial_state"])}
    o, _ = values(gated_delta, zero, **options)
    trained, none = values(gated_delta, {**zero, "initial_state": None}, **options)
    assert none is None
    close(masked((trained,)), masked((o,)), 3e-6)


@pytest.mark.parametrize("chunk", [4, 64])
@pytest.mark.parametrize("n", [None, 1, DOCUMENTS])
def test_gradients_are_those_of_the_reference(n, chunk):
    a = {**arrays(n), "segment_ids": None if n == 1 else SEGMENTS}
    mask = 1 if n == 1 else LIVE[..., None, None]
    weights = [normal(1, B, T, HV, DV) * mask, *([] if n is None else [normal(2, B, n, HV, DK, DV)])]
    (o, *state), grads = values_and_grads(gated_delta, a, weights, chunk_size=chunk)
    (wanted_o, *wanted_state), wanted = values_and_grads(gated_delta, a, weights, implementation="reference")
    close((o * mask, state), (wanted_o * mask, wanted_state), 3e-6)
    assert set(grads) == {name for name in a if name != "segment_ids" and a[name] is not None}
    close(grads, wanted)


@pytest.mark.parametrize(
    ("implementation", "chunk"), [("reference", 64), ("xla", 4), ("xla", 8), ("xla", 64)]
)
def test_open_rows_take_a_state_into_their_first_document_and_give_that_of_their_last(implementation, chunk):
    a = arrays(1)
    options = {"chunk_size": chunk, "implementation": implementation}
    o, state = values(gated_delta, {**a, "segment_ids": SEGMENTS}, open_ends=True, **options)
    each = {**a, "initial_state": np.zeros((B, DOCUMENTS, HV, DK, DV), np.float32), "segment_ids": SEGMENTS}
    each["initial_state"][:, :1] = a["initial_state"]
    wanted, states = values(gated_delta, each, **options)
    close(masked((o,)), masked((wanted,)), 3e-6)
    last = SEGMENTS.max(axis=1) - 1
    close(state[:, 0], states[np.arange(B), last], 3e-6)
    _, kept = values(gated_delta, {**a, "segment_ids": np.zeros_like(SEGMENTS)}, open_ends=True, **options)
    np.testing.assert_array_equal(kept, a["initial_state"])


@pytest.mark.parametrize("chunk", [4, 64])
def test_gradients_of_open_rows_are_those_of_the_reference(chunk):
    a = {**arrays(1), "segment_ids": SEGMENTS}
    weights = [normal(1, B, T, HV, DV) * LIVE[..., None, None], normal(2, B, 1, HV, DK, DV)]
    got = values_and_grads(gated_delta, a, weights, open_ends=True, chunk_size=chunk)
    wanted = values_and_grads(gated_delta, a, weights, open_ends=True, implementation="reference")
    close((masked(got[0]), got[1]), (masked(wanted[0]), wanted[1]))


@given(split=st.integers(1, T - 1), chunk=st.sampled_from([4, 8]))
def test_a_row_cut_anywhere_and_resumed_is_the_whole_row(split, chunk):
    a = arrays(1)
    ids = np.ones((B, T), np.int32)
    o, state = values(gated_delta, {**a, "segment_ids": ids}, chunk_size=chunk)
    # Cut by padding instead of by shape, so that every cut runs the same program; then by shape below.
    head, tail = np.where(np.arange(T) < split, ids, 0), np.where(np.arange(T) < split, 0, ids)
    first, middle = values(gated_delta, {**a, "segment_ids": head}, chunk_size=chunk)
    second, last = values(gated_delta, {**a, "segment_ids": tail, "initial_state": middle}, chunk_size=chunk)
    close(np.concatenate([first[:, :split], second[:, split:]], axis=1), o, 3e-6)
    close(last, state, 3e-6)


def test_shorter_rows_resume_too():
    a = arrays(1)
    o, state = values(gated_delta, a, chunk_size=8)
    cut = {name: x[:, :2] if name in TOKENWISE else x for name, x in a.items()}
    first, middle = values(gated_delta, cut, chunk_size=8)
    rest = {name: x[:, 2:] if name in TOKENWISE else x for name, x in a.items()}
    second, last = values(gated_delta, {**rest, "initial_state": middle}, chunk_size=8)
    close((np.concatenate([first, second], axis=1), last), (o, state), 3e-6)


@pytest.mark.parametrize("n", [1, 2])
def test_one_token_steps_are_the_row_and_leave_idle_rows_alone(n):
    a = arrays(n)
    o, _ = values(gated_delta, {**a, "segment_ids": np.full((B, T), n, np.int32)}, chunk_size=8)
    state = a["initial_state"]
    for t in range(5):
        token = {name: x[:, t : t + 1] if name in TOKENWISE else x for name, x in a.items()}
        ids = np.array([[n], [0]], np.int32)
        step, state = values(gated_delta, {**token, "initial_state": state, "segment_ids": ids})
        close(step[0, 0], o[0, t], 3e-6)
    np.testing.assert_array_equal(state[1], a["initial_state"][1])


def test_gradients_of_one_token_are_those_of_the_reference():
    a = {name: x[:, :1] if name in TOKENWISE else x for name, x in arrays(1).items()}
    weights = [normal(1, B, 1, HV, DV), normal(2, B, 1, HV, DK, DV)]
    got, wanted = (values_and_grads(gated_delta, a, weights, implementation=i) for i in ("xla", "reference"))
    close(got, wanted, 3e-6)


@pytest.mark.parametrize("n", [None, 1, DOCUMENTS])
def test_padding_full_of_nan_does_not_leak(n):
    ids = np.minimum(SEGMENTS, 1) if n == 1 else SEGMENTS
    a = {**arrays(n), "segment_ids": ids}
    mask = LIVE[..., None, None]
    weights = [normal(1, B, T, HV, DV) * mask, *([] if n is None else [normal(2, B, n, HV, DK, DV)])]
    clean, clean_grads = values_and_grads(gated_delta, a, weights, chunk_size=8)
    for name in TOKENWISE:
        live = LIVE.reshape(B, T, *[1] * (a[name].ndim - 2))
        a[name] = np.where(live, a[name], np.nan).astype(np.float32)
    outputs, grads = values_and_grads(gated_delta, a, weights, chunk_size=8)
    assert np.isfinite(outputs[0]).all()
    close((masked(outputs), grads), (masked(clean), clean_grads), 1e-6)
    for name in TOKENWISE:
        assert not grads[name][~LIVE].any()


@pytest.mark.parametrize("n", [None, 1])
@pytest.mark.parametrize("decay", [1e-6, 1.0, 50.0])
def test_decays_from_tiny_to_total_stay_finite(n, decay):
    a = arrays(n)
    a["g"] = np.full_like(a["g"], -decay)
    weights = [normal(1, B, T, HV, DV), *([] if n is None else [normal(2, B, n, HV, DK, DV)])]
    got = values_and_grads(gated_delta, a, weights, chunk_size=8)
    close(got, values_and_grads(gated_delta, a, weights, implementation="reference"), 2e-4)


def test_repeated_keys_and_full_writes_keep_their_digits():
    """One key all along, beta near 2, no decay: the powers of the chunk matrix reach 1e20, its inverse stays at 2."""
    tokens = 64
    one = np.full((1, tokens, 1, 4), 0.5, np.float32)
    a = {
        "q": one,
        "k": one,
        "v": normal(3, 1, tokens, 1, 4),
        "g": np.zeros((1, tokens, 1), np.float32),
        "beta": np.full((1, tokens, 1), 1.9, np.float32),
    }
    got, wanted = (values(gated_delta, a, implementation=i, num_segments=1) for i in ("xla", "reference"))
    close(got, wanted, 1e-4)


@pytest.mark.parametrize("size", [1, 3, 8, 20, 64])
def test_the_inverse_is_that_of_numpy_with_its_gradient(size):
    N = np.tril(normal(0, 2, 3, size, size), -1) / size**0.5
    weight = normal(1, 2, 3, size, size)
    X, gradient = jax.jit(lambda N: (unit_lower_inverse(N), jax.vjp(unit_lower_inverse, N)[1](weight)[0]))(N)
    wanted = np.linalg.inv(np.eye(size) + N.astype(np.float64))
    close(X, wanted, 1e-5)
    transposed = wanted.swapaxes(-1, -2)
    close(gradient, np.tril(-transposed @ weight @ transposed, -1), 1e-5)


@pytest.mark.parametrize("n", [None, 1])
def test_rounded_operands_stay_near_float32(n):
    a = arrays(n)
    weights = [normal(1, B, T, HV, DV), *([] if n is None else [normal(2, B, n, HV, DK, DV)])]
    exact = values_and_grads(gated_delta, a, weights, chunk_size=8)
    rounded = values_and_grads(gated_delta, a, weights, chunk_size=8, operand_dtype=jnp.bfloat16)
    close(rounded, exact, 5e-2)
    assert np.abs(rounded[0][0] - exact[0][0]).max() > 1e-4


def test_bfloat16_inputs_keep_float32_states():
    a = {name: jnp.asarray(x, jnp.bfloat16) for name, x in arrays(1).items()}
    a["initial_state"] = jnp.asarray(arrays(1)["initial_state"])
    o, state = jax.eval_shape(lambda a: gated_delta(**a, chunk_size=8), a)
    assert (o.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize(("dk", "dv"), [(64, 256), (256, 64)])
def test_wide_heads(dk, dv):
    a = {**arrays(1, dk=dk, dv=dv), "segment_ids": np.minimum(SEGMENTS, 1)}
    got, wanted = (values(gated_delta, a, implementation=i) for i in ("xla", "reference"))
    close(masked(got), masked(wanted), 3e-6)


def test_the_reference_keeps_float64():
    with jax.enable_x64(True):
        a = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in arrays(1).items()}
        o, state = gated_delta(**a, implementation="reference")
        assert o.dtype == state.dtype == jnp.float64
    wanted, last = by_hand(*(arrays(1)[name][0] for name in TOKENWISE), arrays(1)["initial_state"][0, 0])
    close(o[0], wanted, 1e-14)
    close(state[0, 0], last, 1e-14)


@pytest.mark.oracle
@pytest.mark.parametrize("heads", [1, HV])
def test_agrees_with_the_two_rules_of_transformers(heads):
    import torch
    from transformers.models.qwen3_next import modeling_qwen3_next as hf

    a = arrays(1, heads=heads)
    t = {name: torch.from_numpy(np.asarray(x, np.float32)) for name, x in a.items()}
    tokens = {"query": t["q"], "key": t["k"], "value": t["v"], "g": t["g"], "beta": t["beta"]}
    options = {"initial_state": t["initial_state"][:, 0], "output_final_state": True}
    ours, state = values(gated_delta, {**a, "q": a["q"] * DK**-0.5}, chunk_size=8)
    for rule in (hf.torch_recurrent_gated_delta_rule, hf.torch_chunk_gated_delta_rule):
        theirs, last = rule(**tokens, **options)
        close(ours, theirs.numpy(), 1e-5)
        close(state[:, 0], last.numpy(), 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": np.ones((B, T, H, DK + 1), np.float32)}, "k.shape"),
        ({"v": np.ones((B, T, 3, DV), np.float32)}, "Hv .third. to be a multiple of H = 2"),
        ({"g": np.ones((B, T, H), np.float32)}, "g.shape"),
        ({"beta": np.ones((B, T, H), np.float32)}, "beta.shape"),
        ({"segment_ids": SEGMENTS[:, 1:]}, "segment_ids.shape"),
        ({"initial_state": np.ones((B, 1, HV, DV, DK), np.float32)}, "initial_state.shape"),
        ({"num_segments": 2}, "num_segments=2"),
        ({"chunk_size": 0}, "chunk_size=0: expected at least 1"),
        ({"operand_dtype": jnp.int8}, "operand_dtype='int8'"),
        (
            {"implementation": "triton"},
            "implementation='triton': expected one of 'auto', 'mosaic_gpu', 'xla'",
        ),
        (
            {"implementation": "reference", "operand_dtype": jnp.bfloat16},
            "cannot run this call of gated_delta",
        ),
    ],
)
def test_bad_arguments_are_named(own_checks, change, message):
    with pytest.raises(ValueError, match=message):
        gated_delta(**{**arrays(None), **change})
