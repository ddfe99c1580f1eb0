"""The decode step of the causal convolution: against the op over rows, its reference, and the kernel without a GPU."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.causal_conv import causal_conv
from pallas_kernels.causal_conv.step import causal_conv_step, mosaic_gpu
from pallas_kernels.causal_conv.step.cases import CASES, case
from pallas_kernels.proof import lowering, numerics
from tests.kernels.kernel_cases import close
from tests.kernels.proof.poison import must_fail

SMALL = case("small", 3, 5, 256, dtype=jnp.float32, small=True, tolerance=2e-6)


def run(arrays: dict[str, Any], implementation: str, **options: Any):
    call = jax.jit(lambda a: causal_conv_step(**a, **options, implementation=implementation))
    return jax.tree.map(np.asarray, call(arrays))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("activation", ["silu", None])
def test_steps_are_the_row_and_other_slots_keep_their_bits(implementation, activation, seed):
    arrays = SMALL.inputs(jax.random.key(seed))
    tokens = jax.random.normal(jax.random.key(seed + 1), (3, 6, 256))
    slots, pool = np.asarray(arrays["slots"]), arrays["pool"]
    weights = arrays["weight"], arrays["bias"]
    wanted, state = causal_conv(
        tokens,
        *weights,
        initial_state=pool[slots][:, None],
        activation=activation,
        implementation="reference",
    )
    assert state is not None
    idle = np.setdiff1d(np.arange(5), slots[:2])
    for t in range(6):
        given = {**arrays, "x": tokens[:, t].at[2].set(jnp.nan), "pool": pool}
        y, pool = run(given, implementation, activation=activation)
        close(y[:2], wanted[:2, t], 1e-5)
        assert not y[2].any()
    np.testing.assert_array_equal(pool[slots[:2]], state[:2, 0])
    np.testing.assert_array_equal(pool[idle], np.asarray(arrays["pool"])[idle])


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_rows_in_the_order_of_their_slots_are_the_same_step(implementation, seed):
    arrays = SMALL.inputs(jax.random.key(seed))
    live = jnp.array([True, False, True])
    named = {**arrays, "slots": jnp.where(live, jnp.arange(3), -1)}
    wanted = run(named, "reference")
    in_order = {name: v for name, v in arrays.items() if name != "slots"} | {"live": live}
    in_order["x"] = in_order["x"].at[1].set(jnp.nan)
    close(run(in_order, implementation), wanted, 2e-6)
    np.testing.assert_array_equal(run(in_order, implementation)[1][1], arrays["pool"][1])
    all_live = {name: v for name, v in arrays.items() if name != "slots"}
    close(run(all_live, implementation), run({**arrays, "slots": jnp.arange(3)}, "reference"), 2e-6)


def test_the_interpreted_kernel_agrees_with_the_reference_and_repeats(seed):
    bare = {name: v for name, v in SMALL.inputs(jax.random.key(seed)).items() if name != "bias"}
    with compat.interpreted():
        numerics.compare_case(SMALL, "mosaic_gpu", seed).require(SMALL.tolerance)
        got = run(bare, "mosaic_gpu", activation=None)
    close(got, run(bare, "reference", activation=None), 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("sigmoid", lambda y: 1.0 / (1.0 + jnp.exp(-1.01 * y))),
        ("weighted", lambda weights, taps, bias: weights[-1] * taps[-1] + bias),
    ],
)
def test_a_wrong_kernel_is_noticed(monkeypatch, name, wrong):
    must_fail(monkeypatch, mosaic_gpu, name, wrong, SMALL, "mosaic_gpu")


@pytest.mark.parametrize("one", [*CASES, replace(SMALL, name="small")], ids=lambda one: one.name)
def test_the_kernel_lowers_in_place_and_xla_does_nothing(one):
    text = lowering.lower_cuda(one.call("mosaic_gpu"), one.avals())
    lowering.require_kernel(text, "mosaic_gpu", "causal_conv_step")
    (call,) = [line for line in text.splitlines() if lowering.MOSAIC in line]
    assert "output_operand_alias" in call
    assert lowering.outside(text) == lowering.Outside(0, 0, ()) and "scatter" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": np.ones((1, 128), np.float32)}, "weight.shape=.*at least two taps"),
        ({"weight": np.ones((4, 64), np.float32)}, "weight.shape"),
        ({"bias": np.ones(64, np.float32)}, "bias.shape"),
        ({"pool": np.ones((2, 4, 128), np.float32)}, "pool.shape"),
        ({"slots": np.zeros(2, np.int32)}, "slots.shape"),
        ({"live": np.ones(2, bool)}, "live.shape"),
        ({"slots": None}, "a slot for each of 3 rows"),
        ({"activation": "relu"}, "activation='relu': expected 'silu'"),
        ({"implementation": "mosaic_gpu"}, "it needs a Hopper GPU, not cpu"),
    ],
)
def test_bad_arguments_are_named(own_checks, change, message):
    good: dict[str, Any] = {"x": np.ones((3, 128), np.float32), "weight": np.ones((4, 128), np.float32)}
    good |= {"pool": np.ones((2, 3, 128), np.float32), "slots": np.array([0, 1, -1], np.int32)}
    with pytest.raises(ValueError, match=message):
        causal_conv_step(**{**good, **change})
