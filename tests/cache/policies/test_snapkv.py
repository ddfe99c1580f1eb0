"""SnapKV against a loop over the attention of the observation window."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxllm.cache.policies import SnapKV
from jaxllm.cache.policies.base import PolicyState
from jaxllm.cache.policies.observation import pool
from jaxllm.config import ConfigError
from tests.cache.policies.stream import Stream, jitted, probabilities
from tests.cache.policies.views import layout

POLICY = SnapKV(budget=9, window=4, kernel=3, pooling="max")


def pooled(scores: np.ndarray, kernel: int, how: str) -> np.ndarray:
    half = kernel // 2
    near = [scores[max(i - half, 0) : i + half + 1] for i in range(len(scores))]
    return np.asarray([x.max() if how == "max" else x.sum() / kernel for x in near])


def voted(policy: SnapKV, q: np.ndarray, k: np.ndarray, scale: float) -> np.ndarray:
    """f64[K, n - w]: scores of a prompt's candidates; the last queries q [w, H, d], keys k [K, n, d]."""
    w, n = len(q), k.shape[1]
    votes = np.zeros((len(k), n - w))
    for j in range(w):
        p = probabilities(q[j], k[:, : n - w + j + 1], scale)
        votes += p.reshape(len(k), -1, p.shape[1]).mean(axis=1)[:, : n - w]
    return np.stack([pooled(head, policy.kernel, policy.pooling) for head in votes])


def fed(
    policy: SnapKV, chunks: list[list[int]], rng: np.random.Generator, width: int = 28
) -> tuple[Stream, PolicyState, list[np.ndarray]]:
    """A stream after ``chunks[i][row]`` tokens each time, and all queries of each row."""
    stream = Stream(layout(), len(chunks[0]), rng)
    state = policy.init(stream.sizes)
    past = [np.zeros((0, 4, 8), np.float32) for _ in chunks[0]]
    for new in chunks:
        q, seen = stream.append(new, width=width)
        past = [np.concatenate([p, q[row, : new[row]]]) for row, p in enumerate(past)]
        state = jitted(policy, "observe")(state, stream.view(), seen._replace(mass=None))
    return stream, state, past


@pytest.mark.parametrize(("pooling", "kernel"), [("max", 3), ("mean", 5), ("mean", 1)])
@given(
    seed=st.integers(0, 2**16),
    first=st.lists(st.integers(0, 12), min_size=2, max_size=2),
    second=st.lists(st.integers(0, 12), min_size=2, max_size=2),
)
@example(seed=0, first=[11, 3], second=[0, 9])
def test_a_long_prompt_keeps_what_its_end_looks_at(
    pooling: str, kernel: int, seed: int, first: list[int], second: list[int]
):
    """In whatever chunks the prompt came, the observation window across two of them included."""
    policy = replace(POLICY, pooling=pooling, kernel=kernel)
    stream, state, past = fed(policy, [first, second], np.random.default_rng(seed), width=12)
    rows = np.asarray(jitted(policy, "triggers")(state, stream.view(), jnp.ones(2, bool)))
    np.testing.assert_array_equal(rows, np.asarray(stream.lengths) > 9)
    after, keep = jitted(policy, "maintain")(state, stream.view(), jnp.asarray(rows))
    jax.tree.map(np.testing.assert_array_equal, after, state)
    for row in np.flatnonzero(rows):
        n = stream.lengths[row]
        scores = voted(policy, past[row][-4:], stream.k[row], stream.sizes.scale)
        assert int(keep.count[row]) == 9
        for head in range(2):
            kept = np.asarray(keep.tokens)[row, head]
            assert np.all(np.diff(kept) > 0) and kept[0] >= 0
            np.testing.assert_array_equal(kept[-4:], np.arange(n - 4, n))
            dropped = np.delete(scores[head], kept[:-4])
            assert scores[head][kept[:-4]].min() >= dropped.max(initial=-np.inf) - 1e-6


def test_of_equal_scores_the_older_token_stays(rng: np.random.Generator):
    """Equal keys are looked at alike: then the first candidates stay."""
    stream = Stream(layout(), 1, rng)
    _, seen = stream.append([20], [np.ones((2, 20, 8))])
    state = jitted(POLICY, "observe")(POLICY.init(stream.sizes), stream.view(), seen._replace(mass=None))
    _, keep = jitted(POLICY, "maintain")(state, stream.view(), jnp.ones(1, bool))
    np.testing.assert_array_equal(keep.tokens[0], [[0, 1, 2, 3, 4, 16, 17, 18, 19]] * 2)


def test_only_the_end_of_a_prompt_evicts(rng: np.random.Generator):
    stream, state, _ = fed(POLICY, [[24, 9, 3]], rng)
    triggers = jitted(POLICY, "triggers")
    np.testing.assert_array_equal(triggers(state, stream.view(), jnp.ones(3, bool)), [True, False, False])
    np.testing.assert_array_equal(triggers(state, stream.view(), jnp.zeros(3, bool)), [False] * 3)
    assert POLICY.stored(100, 50) == 59 and POLICY.stored(5, 50) == 55


def test_rows_are_independent(rng: np.random.Generator):
    stream, state, _ = fed(POLICY, [[20, 13]], rng)
    _, together = jitted(POLICY, "maintain")(state, stream.view(), jnp.ones(2, bool))
    swapped = Stream(stream.sizes, 2, rng)
    swapped.k, swapped.v = stream.k[::-1], stream.v[::-1]
    order = np.asarray([1, 0, 2])
    moved = jax.tree.map(lambda x: x[order], state)
    _, apart = jitted(POLICY, "maintain")(moved, swapped.view(), jnp.asarray([True, False]))
    np.testing.assert_array_equal(apart.tokens[0], together.tokens[1])


@pytest.mark.parametrize("how", ["max", "mean"])
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_pooling_is_that_of_the_loop(rng: np.random.Generator, how: str, kernel: int):
    """Also where the scores are fewer than the kernel is wide, and none of what lies past them counts."""
    scores = rng.normal(size=(2, 12)).astype(np.float32)
    run = jax.jit(pool, static_argnums=(1, 2))
    for length in (9, 2):
        found = run(np.where(np.arange(12) < length, scores, np.nan), kernel, how, jnp.int32(length))
        wanted = np.stack([pooled(head[:length].astype(np.float64), kernel, how) for head in scores])
        np.testing.assert_allclose(found[:, :length], wanted, rtol=1e-5, atol=1e-6)
        assert not np.any(found[:, length:])


@pytest.mark.parametrize(
    ("field", "value"),
    [("budget", 0), ("window", 0), ("window", 2048), ("kernel", 2), ("kernel", 0), ("pooling", "median")],
)
def test_bad_settings_are_refused_by_name(field: str, value: Any):
    with pytest.raises(ConfigError, match=f"policy.{field}"):
        SnapKV(**{field: value})
