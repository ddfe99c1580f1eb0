"""The causal convolution against a float64 loop, its reference, and itself under packing, padding and splitting."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.causal_conv import causal_conv
from tests.kernels.kernel_cases import DOCUMENTS, SEGMENTS, close, documents, normal, values, values_and_grads

B, T = SEGMENTS.shape
D, k = 3, 4
LIVE = SEGMENTS[..., None] > 0


def arrays(n: int | None = DOCUMENTS, seed: int = 0) -> dict:
    state = None if n is None else normal(seed, B, n, k - 1, D)
    return {
        "x": normal(seed, B, T, D),
        "weight": normal(seed, k, D),
        "bias": normal(seed, D),
        "initial_state": state,
    }


def by_hand(x, weight, bias, window, silu=True):
    """One document in float64: outputs and the last k-1 inputs."""
    u = np.concatenate([window, x]).astype(np.float64)
    y = bias + np.stack([np.sum(weight * u[t : t + len(weight)], axis=0) for t in range(len(x))])
    return (y / (1 + np.exp(-y)) if silu else y), u[len(x) :]


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("activation", ["silu", None])
def test_every_document_of_a_packed_row_is_convolved_alone_from_its_own_state(implementation, activation):
    a = arrays()
    y, state = values(
        causal_conv, {**a, "segment_ids": SEGMENTS}, activation=activation, implementation=implementation
    )
    left = a["initial_state"].copy()
    for row, s, at in documents(SEGMENTS):
        window = a["initial_state"][row, s - 1]
        wanted, left[row, s - 1] = by_hand(
            a["x"][row, at], a["weight"], a["bias"], window, activation == "silu"
        )
        close(y[row, at], wanted, 1e-6)
    np.testing.assert_array_equal(state, left)


@pytest.mark.parametrize("n", [None, 1, DOCUMENTS])
def test_gradients_are_those_of_the_reference(n):
    a = arrays(n)
    ids = {None: SEGMENTS, 1: None, DOCUMENTS: SEGMENTS}[n]
    y_weight = normal(1, B, T, D) * (LIVE if ids is not None else 1)
    weights = [y_weight] if n is None else [y_weight, normal(2, B, n, k - 1, D)]
    got, wanted = (
        values_and_grads(causal_conv, {**a, "segment_ids": ids}, weights, implementation=i)
        for i in ("xla", "reference")
    )
    mask = LIVE if ids is not None else np.ones_like(LIVE)
    close((got[0][0] * mask, got[0][1]), (wanted[0][0] * mask, wanted[0][1]), 1e-6)
    close(got[1], wanted[1], 1e-5)


@pytest.mark.parametrize("split", [1, 2, 17])
def test_a_row_cut_anywhere_and_resumed_is_the_whole_row(split):
    a = arrays(1)
    y, state = values(causal_conv, a)
    first, middle = values(causal_conv, {**a, "x": a["x"][:, :split]})
    second, last = values(causal_conv, {**a, "x": a["x"][:, split:], "initial_state": middle})
    close(np.concatenate([first, second], axis=1), y, 1e-6)
    np.testing.assert_array_equal(last, state)


@pytest.mark.parametrize("n", [1, 2])
def test_one_token_steps_are_the_row_and_leave_idle_rows_alone(n):
    a = arrays(n)
    y, _ = values(causal_conv, {**a, "segment_ids": np.full((B, T), n)})
    state = a["initial_state"]
    for t in range(6):
        ids = np.array([[n], [0]], np.int32)
        step, state = values(
            causal_conv, {**a, "x": a["x"][:, t : t + 1], "initial_state": state, "segment_ids": ids}
        )
        close(step[0, 0], y[0, t], 1e-6)
    np.testing.assert_array_equal(state[1], a["initial_state"][1])


def test_huge_padding_does_not_leak():
    a = arrays()
    weights = [normal(1, B, T, D) * LIVE, normal(2, B, DOCUMENTS, k - 1, D)]
    clean = values_and_grads(causal_conv, {**a, "segment_ids": SEGMENTS}, weights)
    a["x"] = np.where(LIVE, a["x"], 1e30).astype(np.float32)
    (y, state), grads = values_and_grads(causal_conv, {**a, "segment_ids": SEGMENTS}, weights)
    assert np.isfinite(y).all()
    close((y * LIVE, state, grads), (clean[0][0] * LIVE, clean[0][1], clean[1]), 1e-6)
    assert not grads["x"][~LIVE[..., 0]].any()


def test_final_states_without_initial_ones_are_filled_with_zeros():
    _, state = values(causal_conv, {**arrays(None), "segment_ids": SEGMENTS}, num_segments=DOCUMENTS)
    np.testing.assert_array_equal(state[0, 0, 0], 0)
    np.testing.assert_array_equal(state[0, 0, 1:], arrays()["x"][0, 3:5])
    np.testing.assert_array_equal(state[0, 3], 0)
    assert values(causal_conv, arrays(None))[1] is None


def test_bfloat16_inputs_give_bfloat16_outputs_summed_in_float32():
    x = jnp.asarray(arrays()["x"], jnp.bfloat16)
    weight = jnp.asarray(arrays()["weight"])
    y, state = causal_conv(x, weight, num_segments=1)
    assert y.dtype == state.dtype == jnp.bfloat16
    wanted, _ = causal_conv(x.astype(jnp.float32), weight)
    np.testing.assert_array_equal(y, wanted.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": np.ones((k, D + 1), np.float32)}, "weight.shape"),
        ({"bias": np.ones(D + 1, np.float32)}, "bias.shape"),
        ({"segment_ids": SEGMENTS[:, 1:]}, "segment_ids.shape"),
        ({"initial_state": np.ones((B, 1, k, D), np.float32)}, "initial_state.shape"),
        ({"num_segments": 2}, "num_segments=2"),
        ({"num_segments": 0}, "num_segments=0"),
        ({"activation": "relu"}, "activation='relu': expected 'silu'"),
        (
            {"implementation": "triton"},
            "implementation='triton': expected one of 'auto', 'mosaic_gpu', 'xla', 'reference'",
        ),
    ],
)
def test_bad_arguments_are_named(own_checks, change, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        causal_conv(**{"x": np.ones((B, T, D), np.float32), "weight": np.ones((k, D), np.float32), **change})
