"""The decode step of SSD: against a recurrence in float64, its reference, and the kernel without a GPU."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.proof import lowering, numerics
from pallas_kernels.ssd.step import mosaic_gpu, ssd_step
from pallas_kernels.ssd.step.cases import CASES, case
from tests.kernels.kernel_cases import close
from tests.kernels.proof.poison import must_fail

# Three roundings in a state (2^-24 each) and a sum of 64 products in y: 64 * 2^-24 = 4e-6 at the very most.
TOLERANCE = 4e-6
SMALL = case("small", 3, 4, 2, 1, 64, 64, dtype=jnp.float32, small=True, tolerance=TOLERANCE)


def run(arrays: dict[str, Any], implementation: str):
    call = jax.jit(lambda a: ssd_step(**a, implementation=implementation))
    return jax.tree.map(np.asarray, call(arrays))


def recurrence(arrays: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The step from its definition, in float64 and with loops over rows and heads."""
    v = {
        name: np.asarray(a, np.float64)
        for name, a in arrays.items()
        if name not in ("slots", "fresh", "live")
    }
    (rows, H, P), pool, G = v["x"].shape, v["pool"].copy(), v["B"].shape[1]
    slots = np.asarray(arrays.get("slots", np.arange(rows)))
    live = (slots >= 0) & np.asarray(arrays.get("live", True))
    y = np.zeros((rows, H, P))
    for b in np.flatnonzero(live):
        for h in range(H):
            S = 0 if arrays.get("fresh", np.zeros(rows))[b] else pool[slots[b], h]
            B, C = v["B"][b, h * G // H], v["C"][b, h * G // H]
            S = np.exp(v["dt"][b, h] * v["A"][h]) * S + v["dt"][b, h] * np.outer(v["x"][b, h], B)
            pool[slots[b], h] = S
            y[b, h] = S @ C + (v["D"][h] * v["x"][b, h] if "D" in v else 0)
    return y, pool


def variant(arrays: dict[str, Any], kind: str) -> dict[str, Any]:
    """The same call with other arguments left out."""
    if kind == "bare":
        return {name: v for name, v in arrays.items() if name not in ("D", "slots", "fresh")}
    if kind == "in order":
        named = {name: v for name, v in arrays.items() if name != "slots"}
        return {**named, "live": jnp.array([False, True, True])}
    return arrays


@pytest.mark.parametrize("kind", ["slots", "in order", "bare"])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_step_is_the_recurrence_and_other_slots_keep_their_bits(implementation, kind, seed):
    one = case("one", 3, 5, 4, 2, 8, 6, dtype=jnp.float32)
    arrays = variant(one.inputs(jax.random.key(seed)), kind)
    wanted_y, wanted = recurrence(arrays)
    idle = {"slots": 2, "in order": 0, "bare": None}[kind]
    if idle is not None:
        arrays |= {name: arrays[name].at[idle].set(jnp.nan) for name in ("x", "dt", "B", "C")}
    y, pool = run(arrays, implementation)
    close((y, pool), (wanted_y, wanted), 2e-6)
    untouched = (wanted == np.asarray(arrays["pool"])).all(axis=(1, 2, 3))
    assert untouched.any()
    np.testing.assert_array_equal(pool[untouched], np.asarray(arrays["pool"])[untouched])


@pytest.mark.parametrize("kind", ["slots", pytest.param("bare", marks=pytest.mark.slow)])
def test_the_interpreted_kernel_is_the_recurrence(kind, seed):
    arrays = variant(SMALL.inputs(jax.random.key(seed)), kind)
    with compat.interpreted():
        got = run(arrays, "mosaic_gpu")
    close(got, recurrence(arrays), TOLERANCE)


@pytest.mark.slow
def test_the_interpreted_kernel_reads_nothing_idle_and_repeats(seed):
    """NaN in idle rows and in the slots of documents that begin; two groups, two parts of a head, bfloat16 inputs."""
    wide = case("wide", 3, 4, 2, 2, 128, 64, small=True, tolerance=2.0**-8)
    with compat.interpreted():
        for one in (SMALL, wide):
            numerics.compare_case(one, "mosaic_gpu", seed).require(one.tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "wrong"),
    [("LOG2E", 1.44), ("_updated", lambda S, decay, xb, B: S * decay + xb[:, None] * B[None] * 1.001)],
)
def test_a_wrong_kernel_is_noticed(monkeypatch, name, wrong):
    must_fail(monkeypatch, mosaic_gpu, name, wrong, SMALL, "mosaic_gpu")


@pytest.mark.parametrize("one", [*CASES, replace(SMALL, name="small")], ids=lambda one: one.name)
def test_the_kernel_lowers_in_place_and_xla_does_nothing(one):
    text = lowering.lower_cuda(one.call("mosaic_gpu"), one.avals())
    lowering.require_kernel(text, "mosaic_gpu", "ssd_step")
    (call,) = [line for line in text.splitlines() if lowering.MOSAIC in line]
    assert "output_operand_alias" in call
    assert lowering.outside(text) == lowering.Outside(0, 0, ()) and "scatter" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.ones((2, 64), np.float32)}, "x.shape=.*three dimensions"),
        ({"dt": np.ones((2, 1), np.float32)}, "dt.shape"),
        ({"B": np.ones((2, 3, 64), np.float32)}, "B.shape=.*a divisor of H = 2"),
        ({"C": np.ones((2, 1, 32), np.float32)}, "C.shape"),
        ({"D": np.ones(3, np.float32)}, "D.shape"),
        ({"pool": np.ones((4, 2, 64, 32), np.float32)}, "pool.shape"),
        ({"pool": np.ones((4, 2, 64, 64), np.float16)}, "pool.dtype='float16': expected float32"),
        ({"pool": np.ones((1, 2, 64, 64), np.float32)}, "a slot for each of 2 rows"),
        ({"slots": np.zeros(3, np.int32)}, "slots.shape"),
        ({"live": np.ones(3, bool)}, "live.shape"),
        ({"fresh": np.ones(3, bool)}, "fresh.shape"),
        ({"implementation": "mosaic_gpu"}, "it needs a Hopper GPU, not cpu"),
    ],
)
def test_bad_arguments_are_named(own_checks, change, message):
    shapes = {
        "x": (2, 2, 64),
        "dt": (2, 2),
        "A": (2,),
        "B": (2, 1, 64),
        "C": (2, 1, 64),
        "pool": (4, 2, 64, 64),
    }
    good: dict[str, Any] = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        ssd_step(**{**good, **change})


@pytest.mark.parametrize(
    ("P", "N", "reason"), [(80, 64, "P = 80 is not a multiple"), (64, 96, "N = 96 is none of")]
)
def test_other_sizes_are_refused(P, N, reason):
    one = case("one", 2, 2, 1, 1, P, N)
    with compat.interpreted(), pytest.raises(ValueError, match=reason):
        jax.eval_shape(one.call("mosaic_gpu"), one.avals())
