"""The proof system on two tiny kernels, right and wrong."""

import jax
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.proof import interpret, lowering, numerics
from tests.kernels.proof import scaled
from tests.kernels.proof.poison import must_fail

PRODUCT, GATHER = scaled.CASES
PAIRS = [(PRODUCT, "mosaic_gpu"), (GATHER, "triton")]


@pytest.mark.parametrize(("case", "implementation"), PAIRS)
def test_an_interpreted_kernel_agrees_with_its_oracle(case, implementation):
    with compat.interpreted():
        found = numerics.compare_case(case, implementation).require(case.tolerance)
    assert set(found.errors) == {"output 0", *(f"gradient of {name}" for name in case.gradients)}


@pytest.mark.parametrize(("case", "implementation"), PAIRS)
def test_a_poisoned_constant_is_noticed(case, implementation, monkeypatch):
    must_fail(monkeypatch, scaled, "FACTOR", 0.53, case, implementation)


def test_poisoned_padding_is_noticed_where_it_is_read():
    arrays = GATHER.inputs(jax.random.key(0))
    arrays["rows"] = arrays["rows"].at[0].set(63)
    with compat.interpreted():
        found = numerics.compare(
            scaled.gather, arrays, implementation="triton", padding=scaled._unread(arrays)
        )
    assert found.errors == {"output 0": float("inf")}


def test_a_missing_wait_is_a_race(monkeypatch):
    arrays = PRODUCT.inputs(jax.random.key(0))

    def call(arrays):
        return scaled.product(**arrays, implementation="mosaic_gpu")

    interpret.run(call, arrays, races=True)
    monkeypatch.setattr(scaled, "BARRIER", False)
    with pytest.raises(interpret.RaceError):
        interpret.run(call, arrays, races=True)
    monkeypatch.undo()
    interpret.run(call, arrays, races=True)


@pytest.mark.parametrize(("case", "implementation"), PAIRS)
def test_a_kernel_lowers_for_cuda_and_stands_in_the_text(case, implementation):
    text = lowering.lower_cuda(case.call(implementation), case.avals())
    lowering.require_kernel(text, implementation, "scaled_")
    with pytest.raises(AssertionError, match="called 'other'"):
        lowering.require_kernel(text, implementation, "other")
    # The product's gradient of w is XLA's.
    assert lowering.outside(text) == lowering.Outside(len(case.gradients) // 2, 0, ())


def test_a_fallback_is_noticed_and_what_xla_does_is_counted():
    text = lowering.lower_cuda(GATHER.call("xla"), GATHER.avals())
    with pytest.raises(AssertionError, match="no custom call of triton"):
        lowering.require_kernel(text, "triton")
    found = lowering.outside(text)
    assert (found.gathers, found.large_gathers(2048), found.large_gathers(2049)) == ((2048,), 1, 0)
    assert (
        lowering.outside(lowering.lower_cuda(jax.numpy.sort, jax.ShapeDtypeStruct((8,), np.float32))).sorts
        == 1
    )
    assert lowering.outside(lowering.lower_tpu(PRODUCT.call("xla"), PRODUCT.avals())).dots == 3


def test_without_an_interpreter_a_kernel_refuses_the_cpu():
    with pytest.raises(Exception, match=r"(?i)interpret|cpu|gpu"):
        jax.block_until_ready(scaled.gather(**GATHER.inputs(jax.random.key(0)), implementation="triton"))


def test_errors_are_relative_and_see_infinities():
    wanted = np.array([1.0, -4.0, -np.inf])
    assert numerics.error(np.array([1.0, -3.8, -np.inf]), wanted) == pytest.approx(0.05)
    assert numerics.error(np.array([1.0, -4.0, 0.0]), wanted) == float("inf")
    assert numerics.error(np.array([1.0, np.nan, -np.inf]), wanted) == float("inf")
    assert numerics.error(np.array([1.0, np.nan, -np.inf]), wanted, np.array([False, True, False])) == 0
    with pytest.raises(AssertionError, match="other bits"):
        numerics.Comparison({"output 0": 0.0}, repeats=False).require(1.0)
