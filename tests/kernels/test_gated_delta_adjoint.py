"""Gradients of the gated delta rule, through XLA and of the interpreted kernels, against its adjoint in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.gated_delta import gated_delta
from pallas_kernels.gated_delta.cases import ALL, case
from pallas_kernels.proof import numerics
from tests.kernels.kernel_cases import DOCUMENTS, SEGMENTS, normal
from tests.kernels.test_gated_delta_mosaic import TOLERANCE
from tests.kernels.test_ssd_mosaic import layout


def forward(v: dict[str, np.ndarray], ids: np.ndarray):
    """Outputs, final states, and per token the decayed state before it and what was left of its value; one head, float64."""
    states, o, kept = v["initial_state"].copy(), np.zeros_like(v["v"]), {}
    for t in np.flatnonzero(ids):
        before = np.exp(v["g"][t]) * states[ids[t] - 1]
        left = v["v"][t] - before.T @ v["k"][t]
        states[ids[t] - 1] = before + np.outer(v["k"][t], v["beta"][t] * left)
        o[t] = states[ids[t] - 1].T @ v["q"][t]
        kept[t] = before, left
    return o, states, kept


def adjoint(v: dict[str, np.ndarray], ids: np.ndarray, do: np.ndarray, dfinal: np.ndarray):
    """Gradients of ``sum(do o) + sum(dfinal final)`` for one head, token by token, in float64.

    Args:
        v: q and k [T, dk], v [T, dv], g and beta [T], initial_state [n, dk, dv].
        ids: document of each token, 0 for padding.
        do: [T, dv].
        dfinal: [n, dk, dv].
    """
    _, _, kept = forward(v, ids)
    found, cotangents = {name: np.zeros_like(a) for name, a in v.items()}, dfinal.copy()
    for t in np.flatnonzero(ids)[::-1]:
        s, q, k, beta = ids[t] - 1, v["q"][t], v["k"][t], v["beta"][t]
        before, left = kept[t]
        dS = cotangents[s] + np.outer(q, do[t])
        dwrite = dS.T @ k
        found["q"][t] = before @ do[t] + k * (beta * left @ do[t])
        found["beta"][t], found["v"][t] = dwrite @ left, beta * dwrite
        found["k"][t] = dS @ (beta * left) - before @ (beta * dwrite)
        dS = dS - np.outer(k, beta * dwrite)
        found["g"][t] = np.sum(dS * before)
        cotangents[s] = np.exp(v["g"][t]) * dS
    return {**found, "initial_state": cotangents}


def drawn(T: int, n: int, dk: int, dv: int) -> dict[str, np.ndarray]:
    k = normal(1, T, dk)
    return {
        "q": normal(0, T, dk) / dk**0.5,
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": normal(0, T, dv),
        "g": -np.logaddexp(0, normal(0, T)),
        "beta": 2 / (1 + np.exp(normal(1, T))),
        "initial_state": normal(0, n, dk, dv),
    }


def test_the_adjoint_is_the_slope():
    ids = SEGMENTS[0]
    v = {name: a.astype(np.float64) for name, a in drawn(len(ids), DOCUMENTS, 5, 3).items()}
    do, dfinal = (normal(2, *v[name].shape).astype(np.float64) for name in ("v", "initial_state"))
    gradients = adjoint(v, ids, do, dfinal)

    def loss(v):
        o, states, _ = forward(v, ids)
        return np.sum(o * do) + np.sum(states * dfinal)

    for name in ALL:
        along, h = normal(3, *v[name].shape), 1e-5
        slope = (loss({**v, name: v[name] + h * along}) - loss({**v, name: v[name] - h * along})) / (2 * h)
        np.testing.assert_allclose(np.sum(gradients[name] * along), slope, rtol=1e-7)


def gradients_of(arrays, do, dfinal, **options):
    """Of one head of one row, by name, without these two dimensions."""

    def outputs(some):
        return gated_delta(**{**arrays, **some}, **options)

    found = jax.vjp(outputs, {name: arrays[name] for name in ALL})[1]((do, dfinal))[0]
    return {name: jnp.squeeze(g, (0, 2)) for name, g in found.items()}


@pytest.mark.parametrize("chunk", [8, 64])
def test_gradients_through_xla_are_the_adjoint(chunk):
    ids = SEGMENTS[0]
    plain = drawn(len(ids), DOCUMENTS, 5, 3)
    do = np.where(ids[:, None] > 0, normal(2, len(ids), 3), 0)
    dfinal = normal(2, DOCUMENTS, 5, 3)
    arrays = {
        name: jnp.asarray(np.expand_dims(a, (0, 2 if a.ndim > 1 else 1 + 1))) for name, a in plain.items()
    }
    run = jax.jit(
        lambda a, ids, do, dfinal: gradients_of(
            {**a, "segment_ids": ids}, do, dfinal, chunk_size=chunk, implementation="xla"
        )
    )
    got = run(arrays, jnp.asarray(ids[None]), do[None, :, None], dfinal[None, :, None])
    wanted = adjoint(
        {name: a.astype(np.float64) for name, a in plain.items()},
        ids,
        do.astype(np.float64),
        dfinal.astype(np.float64),
    )
    for name in ALL:
        assert numerics.error(got[name], wanted[name]) < 2e-5, name


@pytest.mark.slow
def test_gradients_of_the_kernels_are_the_adjoint_in_random_layouts():
    T, n = 192, 5
    one = case("one", 1, T, 1, 1, 64, 64, (3,), states=n)
    arrays = one.inputs(jax.random.key(3))
    plain = {name: np.asarray(arrays[name], np.float64)[0] for name in ALL}
    plain = {name: a[:, 0] for name, a in plain.items()}
    do = normal(2, T, 64).astype(jnp.bfloat16)
    dfinal = normal(2, n, 64, 64)
    run = jax.jit(
        lambda a, do, dfinal: gradients_of(a, do, dfinal, **one.options, implementation="mosaic_gpu")
    )
    for seed in (1, 4, 6):
        ids = layout(seed, T, n)
        dead_do = np.where(ids[0, :, None] > 0, do, 0).astype(jnp.bfloat16)
        with compat.interpreted():
            got = run(
                {**arrays, "segment_ids": jnp.asarray(ids)}, dead_do[None, :, None], dfinal[None, :, None]
            )
        wanted = adjoint(plain, ids[0], dead_do.astype(np.float64), dfinal.astype(np.float64))
        for name in ALL:
            assert numerics.error(got[name], wanted[name]) < TOLERANCE, (seed, name)
