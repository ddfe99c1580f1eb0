"""The decode step of the gated delta rule: against a recurrence in float64, its reference, and the kernel without a GPU."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.gated_delta.step import gated_delta_step, mosaic_gpu
from pallas_kernels.gated_delta.step.cases import CASES, case
from pallas_kernels.proof import lowering, numerics
from tests.kernels.kernel_cases import close
from tests.kernels.proof.poison import must_fail

# Keys of length 1 and queries of at most that: two sums of 64 products, 2 * 64 * 2^-24 = 8e-6 at the very most.
TOLERANCE = 8e-6
SMALL = case("small", 3, 4, 1, 2, 64, 64, dtype=jnp.float32, small=True, tolerance=TOLERANCE)
ROWWISE = ("q", "k", "v", "g", "beta")


def run(arrays: dict[str, Any], implementation: str):
    call = jax.jit(lambda a: gated_delta_step(**a, implementation=implementation))
    return jax.tree.map(np.asarray, call(arrays))


def recurrence(arrays: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The step from its definition, in float64 and with loops over rows and heads."""
    x = {name: np.asarray(arrays[name], np.float64) for name in (*ROWWISE, "pool")}
    (rows, Hv, dv), H, pool = x["v"].shape, x["q"].shape[1], x["pool"].copy()
    slots = np.asarray(arrays.get("slots", np.arange(rows)))
    live = (slots >= 0) & np.asarray(arrays.get("live", True))
    o = np.zeros((rows, Hv, dv))
    for b in np.flatnonzero(live):
        for e in range(Hv):
            q, k = (x[name][b, e * H // Hv] for name in ("q", "k"))
            S = pool[slots[b], e] * (0 if arrays.get("fresh", np.zeros(rows))[b] else np.exp(x["g"][b, e]))
            S = S + np.outer(k, x["beta"][b, e] * (x["v"][b, e] - k @ S))
            pool[slots[b], e] = S
            o[b, e] = q @ S
    return o, pool


def variant(arrays: dict[str, Any], kind: str) -> dict[str, Any]:
    """The same call with other arguments left out."""
    if kind == "bare":
        return {name: x for name, x in arrays.items() if name not in ("slots", "fresh")}
    if kind == "in order":
        named = {name: x for name, x in arrays.items() if name != "slots"}
        return {**named, "live": jnp.array([False, True, True])}
    return arrays


@pytest.mark.parametrize("kind", ["slots", "in order", "bare"])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_step_is_the_recurrence_and_other_slots_keep_their_bits(implementation, kind, seed):
    one = case("one", 3, 5, 2, 4, 8, 6, dtype=jnp.float32)
    arrays = variant(one.inputs(jax.random.key(seed)), kind)
    wanted_o, wanted = recurrence(arrays)
    idle = {"slots": 2, "in order": 0, "bare": None}[kind]
    if idle is not None:
        arrays |= {name: arrays[name].at[idle].set(jnp.nan) for name in ROWWISE}
    o, pool = run(arrays, implementation)
    close((o, pool), (wanted_o, wanted), TOLERANCE)
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
    """NaN in idle rows and in the slots of documents that begin; two key heads, two parts of a head, bfloat16 values."""
    wide = case("wide", 3, 4, 2, 2, 72, 128, small=True, tolerance=2.0**-8)
    with compat.interpreted():
        numerics.compare_case(wide, "mosaic_gpu", seed).require(wide.tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("LOG2E", 1.44),
        pytest.param(
            "_read", lambda S, k: jnp.sum(S * k[:, None], axis=0) * 1.001, marks=pytest.mark.nightly
        ),
        ("_updated", lambda S, k, write: S - k[:, None] * write[None]),
    ],
)
def test_a_wrong_kernel_is_noticed(monkeypatch, name, wrong):
    must_fail(monkeypatch, mosaic_gpu, name, wrong, SMALL, "mosaic_gpu")


@pytest.mark.parametrize("one", [*CASES, replace(SMALL, name="small")], ids=lambda one: one.name)
def test_the_kernel_lowers_in_place_and_xla_does_nothing(one):
    text = lowering.lower_cuda(one.call("mosaic_gpu"), one.avals())
    lowering.require_kernel(text, "mosaic_gpu", "gated_delta_step")
    (call,) = [line for line in text.splitlines() if lowering.MOSAIC in line]
    assert "output_operand_alias" in call
    assert lowering.outside(text) == lowering.Outside(0, 0, ()) and "scatter" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": np.ones((2, 64), np.float32)}, "q.shape=.*three dimensions"),
        ({"k": np.ones((2, 2, 32), np.float32)}, "k.shape"),
        ({"v": np.ones((2, 3, 64), np.float32)}, "v.shape=.*a multiple of H = 2"),
        ({"g": np.ones((2, 2), np.float32)}, "g.shape"),
        ({"beta": np.ones((2, 1), np.float32)}, "beta.shape"),
        ({"pool": np.ones((4, 4, 64, 32), np.float32)}, "pool.shape"),
        ({"pool": np.ones((4, 4, 64, 64), np.float16)}, "pool.dtype='float16': expected float32"),
        ({"pool": np.ones((1, 4, 64, 64), np.float32)}, "a slot for each of 2 rows"),
        ({"slots": np.zeros(3, np.int32)}, "slots.shape"),
        ({"live": np.ones(3, bool)}, "live.shape"),
        ({"fresh": np.ones(3, bool)}, "fresh.shape"),
        ({"implementation": "mosaic_gpu"}, "it needs a Hopper GPU, not cpu"),
    ],
)
def test_bad_arguments_are_named(own_checks, change, message):
    shapes = {
        "q": (2, 2, 64),
        "k": (2, 2, 64),
        "v": (2, 4, 64),
        "g": (2, 4),
        "beta": (2, 4),
        "pool": (4, 4, 64, 64),
    }
    good: dict[str, Any] = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        gated_delta_step(**{**good, **change})


@pytest.mark.parametrize(
    ("dk", "dv", "reason"),
    [(68, 64, "dk = 68 is no multiple of 8"), (64, 96, "dv = 96 is no multiple of 64")],
)
def test_other_sizes_are_refused(dk, dv, reason):
    one = case("one", 2, 2, 1, 1, dk, dv)
    with compat.interpreted(), pytest.raises(ValueError, match=reason):
        jax.eval_shape(one.call("mosaic_gpu"), one.avals())
