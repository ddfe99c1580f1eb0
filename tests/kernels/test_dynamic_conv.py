"""The convolution with a kernel per token against a float64 loop, its reference, the static one, and itself split."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.causal_conv import causal_conv
from pallas_kernels.dynamic_conv import dynamic_conv
from tests.kernels.kernel_cases import DOCUMENTS, SEGMENTS, close, documents, normal, values, values_and_grads

B, T = SEGMENTS.shape
D, k = 3, 4
LIVE = SEGMENTS[..., None] > 0


def arrays(n: int | None = DOCUMENTS) -> dict:
    state = None if n is None else normal(0, B, n, k - 1, D)
    return {"x": normal(0, B, T, D), "kernels": normal(0, B, T, k, D), "initial_state": state}


def by_hand(x, kernels, window, silu=True):
    """One document in float64: outputs and the last k-1 inputs."""
    u = np.concatenate([window, x]).astype(np.float64)
    y = np.stack([np.sum(kernels[t] * u[t : t + k], axis=0) for t in range(len(x))])
    return (y / (1 + np.exp(-y)) if silu else y), u[len(x) :]


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("activation", ["silu", None])
def test_every_document_of_a_packed_row_is_convolved_alone_from_its_own_state(implementation, activation):
    a = arrays()
    options = {"activation": activation, "implementation": implementation}
    y, state = values(dynamic_conv, {**a, "segment_ids": SEGMENTS}, **options)
    left = a["initial_state"].copy()
    for row, s, at in documents(SEGMENTS):
        window = a["initial_state"][row, s - 1]
        wanted, left[row, s - 1] = by_hand(
            a["x"][row, at], a["kernels"][row, at], window, activation == "silu"
        )
        close(y[row, at], wanted, 1e-6)
    np.testing.assert_array_equal(state, left)


@pytest.mark.parametrize("n", [None, 1, DOCUMENTS])
def test_gradients_are_those_of_the_reference(n):
    ids = None if n == 1 else SEGMENTS
    mask = np.ones_like(LIVE) if ids is None else LIVE
    weights = [normal(1, B, T, D) * mask, *([] if n is None else [normal(2, B, n, k - 1, D)])]
    got, wanted = (
        values_and_grads(dynamic_conv, {**arrays(n), "segment_ids": ids}, weights, implementation=i)
        for i in ("xla", "reference")
    )
    close((got[0][0] * mask, got[0][1]), (wanted[0][0] * mask, wanted[0][1]), 1e-6)
    close(got[1], wanted[1], 1e-5)


def test_equal_kernels_everywhere_are_the_static_convolution():
    a = {**arrays(), "segment_ids": SEGMENTS}
    weight = normal(5, k, D)
    y, state = values(dynamic_conv, {**a, "kernels": np.broadcast_to(weight, (B, T, k, D)).copy()})
    static = {name: v for name, v in a.items() if name != "kernels"} | {"weight": weight}
    wanted_y, wanted_state = values(causal_conv, static)
    close((y * LIVE, state), (wanted_y * LIVE, wanted_state), 1e-6)


@pytest.mark.parametrize("split", [1, 2, 17])
def test_a_row_cut_anywhere_and_resumed_is_the_whole_row(split):
    a = arrays(1)
    y, state = values(dynamic_conv, a)
    head = {name: a[name][:, :split] for name in ("x", "kernels")}
    tail = {name: a[name][:, split:] for name in ("x", "kernels")}
    first, middle = values(dynamic_conv, {**a, **head})
    second, last = values(dynamic_conv, {**tail, "initial_state": middle})
    close(np.concatenate([first, second], axis=1), y, 1e-6)
    np.testing.assert_array_equal(last, state)


@pytest.mark.parametrize("n", [1, 2])
def test_one_token_steps_are_the_row_and_leave_idle_rows_alone(n):
    a = arrays(n)
    y, _ = values(dynamic_conv, {**a, "segment_ids": np.full((B, T), n)})
    state = a["initial_state"]
    for t in range(6):
        token = {name: a[name][:, t : t + 1] for name in ("x", "kernels")}
        ids = np.array([[n], [0]], np.int32)
        step, state = values(dynamic_conv, {**token, "initial_state": state, "segment_ids": ids})
        close(step[0, 0], y[0, t], 1e-6)
    np.testing.assert_array_equal(state[1], a["initial_state"][1])


def test_padding_full_of_nan_does_not_leak():
    a = {**arrays(), "segment_ids": SEGMENTS}
    weights = [normal(1, B, T, D) * LIVE, normal(2, B, DOCUMENTS, k - 1, D)]
    clean, clean_grads = values_and_grads(dynamic_conv, a, weights)
    a["x"] = np.where(LIVE, a["x"], np.nan).astype(np.float32)
    a["kernels"] = np.where(LIVE[..., None], a["kernels"], np.nan).astype(np.float32)
    (y, state), grads = values_and_grads(dynamic_conv, a, weights)
    assert np.isfinite(y).all()
    close((y * LIVE, state, grads), (clean[0] * LIVE, clean[1], clean_grads), 1e-6)
    assert not grads["x"][~LIVE[..., 0]].any() and not grads["kernels"][~LIVE[..., 0]].any()


def test_final_states_without_initial_ones_are_filled_with_zeros():
    _, state = values(dynamic_conv, {**arrays(None), "segment_ids": SEGMENTS}, num_segments=DOCUMENTS)
    np.testing.assert_array_equal(state[0, 0, 0], 0)
    np.testing.assert_array_equal(state[0, 0, 1:], arrays()["x"][0, 3:5])
    np.testing.assert_array_equal(state[0, 3], 0)
    assert values(dynamic_conv, arrays(None))[1] is None


def test_bfloat16_inputs_give_bfloat16_outputs_summed_in_float32():
    x, kernels = (jnp.asarray(arrays()[name], jnp.bfloat16) for name in ("x", "kernels"))
    y, state = dynamic_conv(x, kernels, num_segments=1)
    assert y.dtype == state.dtype == jnp.bfloat16
    wanted, _ = dynamic_conv(x.astype(jnp.float32), kernels.astype(jnp.float32))
    np.testing.assert_array_equal(y, wanted.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernels": np.ones((B, T, k, D + 1), np.float32)}, "kernels.shape"),
        ({"kernels": np.ones((B, T, 1, D), np.float32)}, "at least two taps"),
        ({"segment_ids": SEGMENTS[:, 1:]}, "segment_ids.shape"),
        ({"initial_state": np.ones((B, 1, k, D), np.float32)}, "initial_state.shape"),
        ({"num_segments": 2}, "num_segments=2"),
        ({"activation": "relu"}, "activation='relu': expected 'silu'"),
        (
            {"implementation": "triton"},
            "implementation='triton': expected one of 'auto', 'mosaic_gpu', 'xla', 'reference'",
        ),
    ],
)
def test_bad_arguments_are_named(own_checks, change, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        dynamic_conv(**{**arrays(None), **change})
