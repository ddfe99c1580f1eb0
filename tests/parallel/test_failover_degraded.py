"""Degraded gradients against their formulas in float64, and bases against NumPy's decomposition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallel.failover import degraded
from parallel.failover.degraded import low_rank_grouped_matmul, low_rank_matmul, refresh, skip

INPUTS, OUTPUTS, RANK = 24, 18, 5


def drawn(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in shapes]


def orthonormal(*shape, seed):
    return np.linalg.qr(drawn(seed, shape)[0])[0]


def single(*arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


def close(ours, exact, tolerance=1e-5):
    np.testing.assert_allclose(ours, exact, rtol=0, atol=tolerance * np.max(np.abs(exact)))


def test_a_skipped_branch_is_a_constant(seed):
    h, w, goal = single(*drawn(seed, (3, 4), (4, 4), (3, 4)))
    value, (to_h, to_w) = jax.value_and_grad(
        lambda h, w: jnp.sum(goal * skip(h, jnp.sin(h @ w))), argnums=(0, 1)
    )(h, w)
    assert np.array_equal(to_h, goal) and not np.any(to_w)
    assert value == jnp.sum(goal * (h + jnp.sin(h @ w)))


def test_low_rank_gradients(seed):
    x, w, goal = drawn(seed, (2, 11, INPUTS), (INPUTS, OUTPUTS), (2, 11, OUTPUTS))
    v1 = orthonormal(INPUTS, RANK, seed=seed + 1)
    y, back = jax.vjp(low_rank_matmul, *single(x, w, v1))
    to_x, to_w, to_v1 = back(single(goal)[0])
    close(y, x @ w)
    close(to_x, goal @ w.T)
    exact = np.einsum("bti,bto->io", x, goal)
    close(to_w, v1 @ v1.T @ exact)
    assert not np.any(to_v1)
    assert np.linalg.norm(v1 @ v1.T @ exact - exact) > 0.3 * np.linalg.norm(exact)


def test_low_rank_gradients_in_bfloat16(seed):
    """As near to the formula as the ordinary product's are."""
    x, w, goal = drawn(seed, (2, 64, INPUTS), (INPUTS, OUTPUTS), (2, 64, OUTPUTS))
    v1 = orthonormal(INPUTS, RANK, seed=seed + 1)
    x16, w32, v32, goal32 = single(x, w, v1, goal)
    _, back = jax.vjp(
        lambda x, w: low_rank_matmul(x, w, v32, operand_dtype="bfloat16", out_dtype=jnp.bfloat16),
        x16.astype(jnp.bfloat16),
        w32,
    )
    to_x, to_w = back(goal32.astype(jnp.bfloat16))
    assert to_x.dtype == jnp.bfloat16 and to_w.dtype == jnp.float32
    close(to_x.astype(jnp.float32), goal @ w.T, 0.03)
    close(to_w, v1 @ v1.T @ np.einsum("bti,bto->io", x, goal), 0.05)


def test_low_rank_gradients_of_experts(seed):
    sizes = np.array([3, 0, 9, 1])
    rows = sizes.sum() + 2
    x, w, goal = drawn(seed, (rows, INPUTS), (4, INPUTS, OUTPUTS), (rows, OUTPUTS))
    v1 = np.stack([orthonormal(INPUTS, RANK, seed=seed + 1 + e) for e in range(4)])
    # What belongs to no expert is never read.
    x[-2:] = np.nan

    @jax.jit
    def run(x, w, v1, goal):
        product = lambda x, w, v1: low_rank_grouped_matmul(x, w, v1, jnp.asarray(sizes))  # noqa: E731
        y, back = jax.vjp(product, x, w, v1)
        return y, *back(goal)

    y, to_x, to_w, to_v1 = run(*single(x, w, v1, goal))
    first = 0
    for e, size in enumerate(sizes):
        own = slice(first, first + size)
        first += size
        exact = x[own].T @ goal[own]
        if size:
            close(y[own], x[own] @ w[e])
            close(to_x[own], goal[own] @ w[e].T)
            close(to_w[e], v1[e] @ v1[e].T @ exact)
        else:
            assert not np.any(to_w[e])
    assert not np.any(to_v1) and not np.any(to_x[first:])


def spectrum(inputs, outputs, seed):
    """A matrix whose singular values fall by a tenth from one to the next."""
    count = min(inputs, outputs)
    left, right = orthonormal(inputs, count, seed=seed), orthonormal(outputs, count, seed=seed + 1)
    return left, (left * 0.9 ** np.arange(count)) @ right.T


def span_distance(v, u):
    """Norm of what the columns of ``u`` have outside the span of ``v``."""
    v = np.asarray(v, np.float64)
    return np.linalg.norm(u - v @ (v.T @ u), 2)


def test_bases_are_the_first_left_singular_vectors(seed):
    (left, w), (other, shifted) = spectrum(INPUTS, OUTPUTS, seed), spectrum(INPUTS, OUTPUTS, seed + 7)
    found = refresh(jnp.stack(single(w, shifted)).astype(jnp.bfloat16).astype(jnp.float32), RANK)
    assert found.dtype == jnp.float32
    for v, u in zip(found, (left, other), strict=True):
        close(v.T @ v, np.eye(RANK))
        assert span_distance(v, u[:, :RANK]) < 0.1
    v = refresh(single(w)[0], RANK)
    assert span_distance(v, left[:, :RANK]) < 1e-4


def test_all_of_the_rank_spans_everything(seed):
    (w,) = single(*drawn(seed, (INPUTS, OUTPUTS)))
    v = refresh(w, INPUTS)
    close(v @ v.T, np.eye(INPUTS))


def test_large_bases_follow_a_weight_that_moves(seed, monkeypatch):
    monkeypatch.setattr(degraded, "SMALL", 8)
    left, w = spectrum(60, 40, seed)
    cold = refresh(single(w)[0], RANK)
    close(cold.T @ cold, np.eye(RANK))
    # The last of them differs from the next by a factor of 0.81 a pass.
    assert span_distance(cold, left[:, :1]) < 0.1
    warm, distances = cold, []
    for _ in range(12):
        warm = refresh(single(w)[0], RANK, warm)
        distances.append(span_distance(warm, left[:, :RANK]))
    assert distances[-1] < 0.2 * distances[0] and distances[-1] < 0.05


def test_bad_ranks_are_named():
    x, w = jnp.ones((1, 2, 4)), jnp.ones((4, 3))
    with pytest.raises(ValueError, match=r"rank=5: must be 1 to 4, the rows of w \(4, 3\)"):
        refresh(w, 5)
    with pytest.raises(ValueError, match=r"v1: shape \(4, 5\)"):
        low_rank_matmul(x, w, jnp.ones((4, 5)))
    with pytest.raises(ValueError, match=r"v1: shape \(2, 4, 5\)"):
        low_rank_grouped_matmul(x[0], jnp.ones((2, 4, 3)), jnp.ones((2, 4, 5)), jnp.array([1, 1]))
