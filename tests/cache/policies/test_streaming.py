"""StreamingLLM keeps what a deque and a list would keep, over many rounds."""

from collections import deque
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.cache.policies.base import PolicyState
from jaxllm.cache.policies.streaming import StreamingLLM
from jaxllm.cache.view import Layout, View
from jaxllm.config import ConfigError
from tests.cache.policies.views import layout, view

TRIGGERS = jax.jit(StreamingLLM.triggers, static_argnums=0)
MAINTAIN = jax.jit(StreamingLLM.maintain, static_argnums=0)


def lengths_only(sizes: Layout, lengths: list[int]) -> View:
    """A view of which only the lengths matter."""
    k = np.zeros((len(lengths), sizes.kv_heads, sizes.tokens, sizes.head_dim), np.float32)
    return view(sizes, k, k, lengths, np.random.default_rng(0))


@given(
    sinks=st.integers(0, 3),
    recent=st.integers(1, 9),
    buffer=st.integers(1, 5),
    prompts=st.lists(st.integers(1, 24), min_size=2, max_size=2),
    steps=st.lists(st.integers(1, 3), min_size=12, max_size=12),
)
def test_sinks_and_recent_tokens_stay_in_order(
    sinks: int, recent: int, buffer: int, prompts: list[int], steps: list[int]
):
    """Rows of names of tokens, appended to and cut as the policy says, beside a list of sinks and a deque."""
    policy, sizes = StreamingLLM(sinks=sinks, recent=recent, buffer=buffer), layout()
    rows = [list(range(n)) for n in prompts]
    told = [list(range(n)) for n in prompts]
    for step, added in enumerate([0, *steps]):
        for row, names in enumerate(told):
            fresh = range(len(names), len(names) + added)
            names.extend(fresh)
            rows[row].extend(fresh)
        seen = lengths_only(sizes, [len(row) for row in rows])
        due = TRIGGERS(policy, PolicyState(), seen, jnp.full((2,), step == 0))
        state, keep = MAINTAIN(policy, PolicyState(), seen, due)
        assert state == PolicyState()
        for row, names in enumerate(told):
            over = len(rows[row]) - sinks - recent
            assert bool(due[row]) == (over >= buffer or (step == 0 and over > 0))
            if not due[row]:
                continue
            wanted = names[:sinks] + list(deque(names[sinks:], maxlen=recent))
            for head in range(2):
                kept = np.asarray(keep.tokens)[row, head, : int(keep.count[row])].tolist()
                assert min(kept) >= 0 and [rows[row][i] for i in kept] == wanted
            rows[row] = wanted
        assert all(len(row) < sinks + recent + buffer for row in rows)


def test_rows_that_store_less_keep_everything():
    """What comes out for a row that did not trigger is whole, so that it may be kept like the others."""
    policy, seen = StreamingLLM(sinks=2, recent=6, buffer=1), lengths_only(layout(), [0, 5, 8])
    _, keep = MAINTAIN(policy, PolicyState(), seen, jnp.asarray([False] * 3))
    assert keep.count.tolist() == [0, 5, 8]
    assert keep.tokens.tolist() == [[list(range(8))] * 2] * 3


def test_a_window_wider_than_a_slot_keeps_everything():
    sizes = layout()
    seen = lengths_only(sizes, [27, 9])
    assert not TRIGGERS(StreamingLLM(), PolicyState(), seen, jnp.asarray([True, True])).any()
    _, keep = MAINTAIN(StreamingLLM(), PolicyState(), seen, jnp.asarray([True, True]))
    assert keep.tokens.shape[2] == sizes.tokens and keep.count.tolist() == [27, 9]


@pytest.mark.parametrize(
    ("prompt", "new", "stored"), [(3, 4, 7), (3, 900, 15), (900, 1, 15), (8, 7, 15), (8, 6, 14)]
)
def test_memory_is_bounded(prompt: int, new: int, stored: int):
    assert StreamingLLM(sinks=2, recent=9, buffer=4).stored(prompt, new) == stored


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sinks": -1}, "policy.sinks=-1"),
        ({"recent": 0}, "policy.recent=0"),
        ({"buffer": 0}, "policy.buffer=0"),
        ({"dense_layers": (-1,)}, "policy.dense_layers"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        StreamingLLM(**settings)
