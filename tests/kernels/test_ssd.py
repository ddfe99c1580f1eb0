"""SSD against a float64 recurrence, its reference, and itself under chunking, packing, padding and splitting."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.ssd import ssd
from tests.kernels.kernel_cases import DOCUMENTS, SEGMENTS, close, documents, normal, values, values_and_grads

B, T = SEGMENTS.shape
H, P, G, N = 4, 3, 2, 5
LIVE = SEGMENTS > 0
TOKENWISE = ("x", "dt", "B", "C")


def arrays(n: int | None = DOCUMENTS, seed: int = 0, groups: int = G) -> dict:
    return {
        "x": normal(seed, B, T, H, P),
        "dt": np.logaddexp(0, normal(seed, B, T, H)),
        "A": -np.exp(normal(seed, H)),
        "B": normal(seed, B, T, groups, N),
        "C": normal(seed + 1, B, T, groups, N),
        "D": normal(seed + 1, H),
        "initial_state": None if n is None else normal(seed, B, n, H, P, N),
    }


def by_hand(x, dt, A, B, C, D, S):
    """One document in float64: outputs and the state after it."""
    S, y = S.astype(np.float64), []
    B, C = (np.repeat(v, H // v.shape[1], axis=1).astype(np.float64) for v in (B, C))
    for t in range(len(x)):
        S = np.exp(dt[t] * A)[:, None, None] * S + (dt[t][:, None] * x[t])[..., None] * B[t][:, None]
        y.append(np.einsum("hpn,hn->hp", S, C[t]) + D[:, None] * x[t])
    return np.stack(y), S


def masked(outputs):
    return (outputs[0] * LIVE[..., None, None], *outputs[1:])


@pytest.mark.parametrize(
    ("implementation", "chunk", "groups"),
    [
        ("reference", 64, G),
        ("xla", 1, G),
        ("xla", 4, G),
        ("xla", 8, 1),
        ("xla", 8, G),
        ("xla", 8, H),
        ("xla", 64, G),
    ],
)
def test_every_document_of_a_packed_row_is_its_own_recurrence(implementation, chunk, groups):
    a = arrays(groups=groups)
    y, state = values(ssd, {**a, "segment_ids": SEGMENTS}, chunk_size=chunk, implementation=implementation)
    left = a["initial_state"].copy()
    for row, s, at in documents(SEGMENTS):
        tokens = (
            [a[name][row, at] for name in ("x", "dt")] + [a["A"]] + [a[name][row, at] for name in ("B", "C")]
        )
        wanted, left[row, s - 1] = by_hand(*tokens, a["D"], a["initial_state"][row, s - 1])
        close(y[row, at], wanted, 3e-6)
    close(state, left, 3e-6)
    np.testing.assert_array_equal(state[0, 3], a["initial_state"][0, 3])
    # Training masks instead of moving documents to chunk boundaries: the same outputs from zero states.
    zero = {**a, "initial_state": np.zeros_like(a["initial_state"]), "segment_ids": SEGMENTS}
    y, _ = values(ssd, zero, chunk_size=chunk, implementation=implementation)
    trained, none = values(
        ssd, {**zero, "initial_state": None}, chunk_size=chunk, implementation=implementation
    )
    assert none is None
    close(masked((trained,)), masked((y,)), 3e-6)


@pytest.mark.parametrize("chunk", [4, 64])
@pytest.mark.parametrize("n", [None, 1, DOCUMENTS])
def test_gradients_are_those_of_the_reference(n, chunk):
    a = {**arrays(n), "segment_ids": None if n == 1 else SEGMENTS}
    mask = 1 if n == 1 else LIVE[..., None, None]
    weights = [normal(1, B, T, H, P) * mask, *([] if n is None else [normal(2, B, n, H, P, N)])]
    (y, *state), grads = values_and_grads(ssd, a, weights, chunk_size=chunk)
    (wanted_y, *wanted_state), wanted = values_and_grads(ssd, a, weights, implementation="reference")
    close((y * mask, state), (wanted_y * mask, wanted_state), 3e-6)
    assert set(grads) == {name for name in a if name != "segment_ids" and a[name] is not None}
    close(grads, wanted)


@pytest.mark.parametrize(
    ("implementation", "chunk"), [("reference", 64), ("xla", 4), ("xla", 8), ("xla", 64)]
)
def test_open_rows_take_a_state_into_their_first_document_and_give_that_of_their_last(implementation, chunk):
    a = arrays(1)
    options = {"chunk_size": chunk, "implementation": implementation}
    y, state = values(ssd, {**a, "segment_ids": SEGMENTS}, open_ends=True, **options)
    each = {**a, "initial_state": np.zeros((B, DOCUMENTS, H, P, N), np.float32), "segment_ids": SEGMENTS}
    each["initial_state"][:, :1] = a["initial_state"]
    wanted, states = values(ssd, each, **options)
    close(masked((y,)), masked((wanted,)), 3e-6)
    last = SEGMENTS.max(axis=1) - 1
    close(state[:, 0], states[np.arange(B), last], 3e-6)
    _, kept = values(ssd, {**a, "segment_ids": np.zeros_like(SEGMENTS)}, open_ends=True, **options)
    np.testing.assert_array_equal(kept, a["initial_state"])


@pytest.mark.parametrize("chunk", [4, 64])
def test_gradients_of_open_rows_are_those_of_the_reference(chunk):
    a = {**arrays(1), "segment_ids": SEGMENTS}
    weights = [normal(1, B, T, H, P) * LIVE[..., None, None], normal(2, B, 1, H, P, N)]
    got = values_and_grads(ssd, a, weights, open_ends=True, chunk_size=chunk)
    wanted = values_and_grads(ssd, a, weights, open_ends=True, implementation="reference")
    close((masked(got[0]), got[1]), (masked(wanted[0]), wanted[1]))


@given(split=st.integers(1, T - 1), chunk=st.sampled_from([4, 8]))
def test_a_row_cut_anywhere_and_resumed_is_the_whole_row(split, chunk):
    a = arrays(1)
    ids = np.ones((B, T), np.int32)
    y, state = values(ssd, {**a, "segment_ids": ids}, chunk_size=chunk)
    # Cut by padding instead of by shape, so that every cut runs the same program; then by shape below.
    head, tail = np.where(np.arange(T) < split, ids, 0), np.where(np.arange(T) < split, 0, ids)
    first, middle = values(ssd, {**a, "segment_ids": head}, chunk_size=chunk)
    second, last = values(ssd, {**a, "segment_ids": tail, "initial_state": middle}, chunk_size=chunk)
    close(np.concatenate([first[:, :split], second[:, split:]], axis=1), y, 3e-6)
    close(last, state, 3e-6)


def test_shorter_rows_resume_too():
    a = arrays(1)
    y, state = values(ssd, a, chunk_size=8)
    cut = {name: v[:, :2] if name in TOKENWISE else v for name, v in a.items()}
    first, middle = values(ssd, cut, chunk_size=8)
    rest = {name: v[:, 2:] if name in TOKENWISE else v for name, v in a.items()}
    second, last = values(ssd, {**rest, "initial_state": middle}, chunk_size=8)
    close((np.concatenate([first, second], axis=1), last), (y, state), 3e-6)


@pytest.mark.parametrize("n", [1, 2])
def test_one_token_steps_are_the_row_and_leave_idle_rows_alone(n):
    a = arrays(n)
    y, _ = values(ssd, {**a, "segment_ids": np.full((B, T), n, np.int32)}, chunk_size=8)
    state = a["initial_state"]
    for t in range(5):
        token = {name: v[:, t : t + 1] if name in TOKENWISE else v for name, v in a.items()}
        ids = np.array([[n], [0]], np.int32)
        step, state = values(ssd, {**token, "initial_state": state, "segment_ids": ids})
        close(step[0, 0], y[0, t], 3e-6)
    np.testing.assert_array_equal(state[1], a["initial_state"][1])


def test_gradients_of_one_token_are_those_of_the_reference():
    a = {name: v[:, :1] if name in TOKENWISE else v for name, v in arrays(1).items()}
    weights = [normal(1, B, 1, H, P), normal(2, B, 1, H, P, N)]
    close(
        values_and_grads(ssd, a, weights), values_and_grads(ssd, a, weights, implementation="reference"), 3e-6
    )


@pytest.mark.parametrize("n", [None, 1, DOCUMENTS])
def test_huge_padding_does_not_leak(n):
    ids = np.minimum(SEGMENTS, 1) if n == 1 else SEGMENTS
    a = {**arrays(n), "segment_ids": ids}
    weights = [
        normal(1, B, T, H, P) * LIVE[..., None, None],
        *([] if n is None else [normal(2, B, n, H, P, N)]),
    ]
    clean, clean_grads = values_and_grads(ssd, a, weights, chunk_size=8)
    for name in TOKENWISE:
        live = LIVE.reshape(B, T, *[1] * (a[name].ndim - 2))
        a[name] = np.where(live, a[name], 1e30).astype(np.float32)
    outputs, grads = values_and_grads(ssd, a, weights, chunk_size=8)
    assert np.isfinite(outputs[0]).all()
    close((masked(outputs), grads), (masked(clean), clean_grads), 1e-6)
    for name in TOKENWISE:
        assert not grads[name][~LIVE].any()


@pytest.mark.parametrize("n", [None, 1])
@pytest.mark.parametrize("decay", [1e-6, 1.0, 50.0])
def test_decays_from_tiny_to_total_stay_finite(n, decay):
    a = arrays(n)
    a["dt"] = np.full_like(a["dt"], decay)
    a["A"] = -np.ones_like(a["A"])
    weights = [normal(1, B, T, H, P), *([] if n is None else [normal(2, B, n, H, P, N)])]
    got = values_and_grads(ssd, a, weights, chunk_size=8)
    close(got, values_and_grads(ssd, a, weights, implementation="reference"), 2e-4)


@pytest.mark.parametrize("n", [None, 1])
def test_rounded_operands_stay_near_float32(n):
    a = arrays(n)
    weights = [normal(1, B, T, H, P), *([] if n is None else [normal(2, B, n, H, P, N)])]
    exact = values_and_grads(ssd, a, weights, chunk_size=8)
    rounded = values_and_grads(ssd, a, weights, chunk_size=8, operand_dtype=jnp.bfloat16)
    close(rounded, exact, 3e-2)
    assert np.abs(rounded[0][0] - exact[0][0]).max() > 1e-4


def test_bfloat16_inputs_keep_float32_states():
    a = {name: jnp.asarray(v, jnp.bfloat16) for name, v in arrays(1).items()}
    y, state = ssd(**{**a, "initial_state": jnp.asarray(arrays(1)["initial_state"])}, chunk_size=8)
    assert y.dtype == jnp.bfloat16
    assert state.dtype == jnp.float32


@pytest.mark.oracle
def test_agrees_with_the_chunk_scan_of_transformers():
    import torch
    from transformers.models.nemotron_h import modeling_nemotron_h as hf

    a = arrays(None, groups=H)
    t = {name: torch.from_numpy(np.asarray(v, np.float32)) for name, v in a.items() if v is not None}
    pad = -T % 8
    if hasattr(hf, "mamba2_chunk_scan"):
        y, state = hf.mamba2_chunk_scan(
            t["x"], t["dt"], t["A"], t["B"], t["C"], chunk_size=8, D=t["D"], return_final_states=True
        )
    else:
        x, dA = (hf.reshape_into_chunks(v, pad, 8) for v in (t["x"] * t["dt"][..., None], t["A"] * t["dt"]))
        Bc, Cc = (hf.reshape_into_chunks(t[name], pad, 8) for name in ("B", "C"))
        dA = dA.permute(0, 3, 1, 2)
        L = torch.exp(hf.segment_sum(dA))
        c = torch.cumsum(dA, -1)
        diag = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", Cc, Bc, L, x)
        states = torch.einsum("bclhn,bhcl,bclhp->bchpn", Bc, torch.exp(c[..., -1:] - c), x)
        states = torch.cat([torch.zeros_like(states[:, :1]), states], 1)
        between = torch.exp(hf.segment_sum(torch.nn.functional.pad(c[..., -1], (1, 0))))
        states = torch.einsum("bhzc,bchpn->bzhpn", between, states)
        states, state = states[:, :-1], states[:, -1]
        y = diag + torch.einsum("bclhn,bchpn,bhcl->bclhp", Cc, states, torch.exp(c))
        y = y.reshape(B, -1, H, P)[:, :T] + t["D"][:, None] * t["x"]
    got, got_state = values(ssd, a, chunk_size=8, num_segments=1)
    close(got, y.numpy(), 1e-5)
    close(got_state[:, 0], state.numpy(), 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": np.ones((B, T, H + 1), np.float32)}, "dt.shape"),
        ({"A": np.ones(H + 1, np.float32)}, "A.shape"),
        ({"C": np.ones((B, T, G, N + 1), np.float32)}, "C.shape"),
        ({name: np.ones((B, T, 3, N), np.float32) for name in "BC"}, "G .third. to divide H = 4"),
        ({"D": np.ones(H + 1, np.float32)}, "D.shape"),
        ({"segment_ids": SEGMENTS[:, 1:]}, "segment_ids.shape"),
        ({"initial_state": np.ones((B, 1, H, N, P), np.float32)}, "initial_state.shape"),
        ({"num_segments": 2}, "num_segments=2"),
        (
            {"num_segments": 2, "segment_ids": SEGMENTS, "open_ends": True},
            "num_segments=2: expected 1 with open_ends",
        ),
        ({"chunk_size": 0}, "chunk_size=0: expected at least 1"),
        ({"operand_dtype": jnp.int8}, "operand_dtype='int8'"),
        (
            {"implementation": "triton"},
            "implementation='triton': expected one of 'auto', 'mosaic_gpu', 'xla'",
        ),
        ({"implementation": "mosaic_gpu"}, "mosaic_gpu: it needs a Hopper GPU, not cpu"),
        ({"implementation": "reference", "operand_dtype": jnp.bfloat16}, "cannot run this call of ssd"),
    ],
)
def test_bad_arguments_are_named(own_checks, change, message):
    with pytest.raises(ValueError, match=message):
        ssd(**{**arrays(None), **change})
