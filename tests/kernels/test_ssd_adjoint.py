"""Gradients of the interpreted SSD kernels, that of A included, against the adjoint of the recurrence in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.proof import numerics
from pallas_kernels.ssd.cases import GRADIENTS, case
from pallas_kernels.ssd.tiles import Tiles
from pallas_kernels.tiles import using
from tests.kernels.kernel_cases import normal
from tests.kernels.test_ssd_mosaic import TOLERANCE, UNIT, layout, recurrence

T, DOCUMENTS = 128, 4
# Roundings to bfloat16 of a term: a state or its cotangent, a weighted operand, and the result where it is bfloat16. A and D
# sum over thousands of terms, whose roundings are independent.
ROUNDINGS = {"x": 3, "B": 3, "C": 3, "dt": 3, "initial_state": 1.01, "A": 0.1, "D": 0.1}


def adjoint(v: dict[str, np.ndarray], ids: np.ndarray, dy: np.ndarray, dfinal: np.ndarray):
    """Gradients of ``sum(dy y) + sum(dfinal final)`` for one head, token by token, in float64, and "a", that of ``dt A``.

    Args:
        v: x [T, P], dt [T], A, D, B and C [T, N], initial_state [n, P, N].
        ids: document of each token, 0 for padding.
        dy: [T, P].
        dfinal: [n, P, N].
    """
    states, before = v["initial_state"].copy(), np.zeros((len(ids), *dfinal.shape[1:]))
    live = np.flatnonzero(ids)
    for t in live:
        s = ids[t] - 1
        before[t] = states[s]
        states[s] = np.exp(v["dt"][t] * v["A"]) * states[s] + v["dt"][t] * np.outer(v["x"][t], v["B"][t])
    g = {name: np.zeros_like(a) for name, a in {**v, "a": v["dt"]}.items()}
    cotangents = dfinal.copy()
    for t in live[::-1]:
        s, x, dt, B, C = ids[t] - 1, v["x"][t], v["dt"][t], v["B"][t], v["C"][t]
        decay = np.exp(dt * v["A"])
        g["C"][t] = (decay * before[t] + dt * np.outer(x, B)).T @ dy[t]
        dS = cotangents[s] + np.outer(dy[t], C)
        g["x"][t], g["B"][t] = dt * dS @ B + v["D"] * dy[t], dt * dS.T @ x
        g["a"][t] = da = decay * np.sum(dS * before[t])
        g["dt"][t], g["A"] = v["A"] * da + x @ dS @ B, g["A"] + dt * da
        g["D"] = g["D"] + x @ dy[t]
        cotangents[s] = decay * dS
    return {**g, "initial_state": cotangents}


@pytest.mark.slow
def test_every_gradient_is_the_adjoint_where_nothing_cancels():
    """Inputs and cotangents of one sign: each result is a sum of positive terms, and as exact as one of them."""
    one = case("one", 1, T, 1, 1, 64, 64, (3,), states=DOCUMENTS, options={"chunk_size": 64})
    made = one.inputs(jax.random.key(5))
    arrays = {name: a if name in ("A", "segment_ids") else jnp.abs(a) for name, a in made.items()}
    rng = np.random.default_rng(0)
    dy = np.abs(rng.normal(size=(T, 64))).astype(jnp.bfloat16)
    dfinal = np.abs(rng.normal(size=(DOCUMENTS, 64, 64))).astype(np.float32)

    @jax.jit
    def gradients(arrays, dy, dfinal):
        def outputs(some):
            return one.function(**{**arrays, **some}, **one.options, implementation="mosaic_gpu")

        return jax.vjp(outputs, {name: arrays[name] for name in GRADIENTS})[1]((dy, dfinal))[0]

    plain = {name: np.asarray(a, np.float64)[0] for name, a in arrays.items()}
    plain |= {name: plain[name][:, 0] for name in ("x", "dt", "B", "C", "initial_state")}
    for ids in (layout(seed, T, DOCUMENTS) for seed in (1, 4)):
        live = ids[0] > 0
        dead_dy = np.where(live[:, None], dy, 0).astype(jnp.bfloat16)
        with compat.interpreted():
            got = gradients(
                {**arrays, "segment_ids": jnp.asarray(ids)}, dead_dy[None, :, None], dfinal[None, :, None]
            )
        wanted = adjoint(plain, ids[0], dead_dy.astype(np.float64), dfinal.astype(np.float64))
        for name in GRADIENTS:
            g, w = np.asarray(got[name], np.float64).reshape(wanted[name].shape), wanted[name]
            # A longer step stores more and lets more fade: alone of all, a difference.
            scale = w - 2 * plain["A"] * wanted["a"] if name == "dt" else w
            worst = (np.abs(g - w) / np.where(scale == 0, 1, scale)).max()
            assert worst <= ROUNDINGS[name] * UNIT, (name, worst / UNIT)


@pytest.mark.parametrize(
    ("chunk", "P", "states", "documents"),
    [
        pytest.param(64, 128, None, (3, 1, 90, 30), marks=pytest.mark.nightly),
        pytest.param(256, 64, 2, (150, 40), marks=pytest.mark.slow),
        pytest.param(128, 64, 1, None, marks=pytest.mark.nightly),
    ],
)
def test_every_chunk_size_and_way_to_keep_states(chunk, P, states, documents):
    """Outputs, final states and every gradient, for random cotangents and with NaN on padding."""
    tokens = 196 if chunk == 256 else 130
    names = tuple(name for name in GRADIENTS if states is not None or name != "initial_state")
    one = case("one", 1, tokens, 1, 1, P, 64, documents, states=states, options={"chunk_size": chunk})
    arrays = one.inputs(jax.random.key(0))
    ids = np.asarray(arrays.get("segment_ids", np.ones((1, tokens), np.int32)))
    live, n = ids[0] > 0, states or len(documents or (1,))
    dy = np.where(live[:, None], normal(1, tokens, P), 0).astype(jnp.bfloat16)
    dfinal = normal(2, n, P, 64) if states else np.zeros((n, P, 64), np.float32)
    padding = one.padding(arrays) if one.padding else {}
    poisoned = {
        name: jnp.where(padding[name], jnp.nan, a) if name in padding else a for name, a in arrays.items()
    }

    def both(arrays, dy, dfinal):
        def outputs(some):
            return one.function(**{**arrays, **some}, **one.options, implementation="mosaic_gpu")

        found, pull = jax.vjp(outputs, {name: arrays[name] for name in names})
        return found, pull((dy, dfinal if states else None))[0]

    with compat.interpreted(), using("ssd", f"P{P} N64", Tiles(chunk=256, stages=2)):
        (y, final), got = jax.jit(both)(poisoned, dy[None, :, None], dfinal[None, :, None])
    exact = {"initial_state": jnp.zeros((1, n, 1, P, 64)), **arrays, "segment_ids": ids}
    wanted_y, wanted_states = recurrence(exact)
    assert numerics.error(y[0, :, 0], wanted_y, ~live[:, None]) < TOLERANCE
    assert final is None or numerics.error(final[0, :, 0], wanted_states) < TOLERANCE
    plain = {name: np.asarray(exact[name], np.float64)[0] for name in GRADIENTS}
    plain |= {name: plain[name][:, 0] for name in ("x", "dt", "B", "C", "initial_state")}
    wanted = adjoint(plain, ids[0], dy.astype(np.float64), dfinal.astype(np.float64))
    for name in (name for name in names if name != "A"):
        g = np.asarray(got[name], np.float64).reshape(wanted[name].shape)
        assert numerics.error(g, wanted[name]) < TOLERANCE, name
    # One sum over all tokens, which nearly cancels: as exact as what it sums.
    terms = np.sum(np.abs(plain["dt"] * wanted["a"]))
    assert np.abs(np.asarray(got["A"], np.float64) - wanted["A"]).max() < TOLERANCE * terms
