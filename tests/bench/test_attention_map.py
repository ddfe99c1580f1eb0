"""The attention map: what it draws is what attention reports to have read."""

import json

import numpy as np
import pytest

from experiments import attention_map
from jaxllm import H2O
from tests.bench.retrieval import CHOSEN, LENGTH, each_policy, reader, sample


def test_positions_follow_evictions_and_selections():
    stored = attention_map.Positions(2, 6)
    everything = stored.read({}, None)
    assert [each.tolist() for each in everything] == [[0, 1, 2, 3, 4, 5]] * 2
    stored.keep(np.array([[0, 2, 5, 0], [1, 4, 5, 0]]), np.array(3))
    stored.append()
    assert [each.tolist() for each in stored.stored] == [[0, 2, 5, 6], [1, 4, 5, 6]]
    # Page 1 of 1 token, and the tail from stored token 2 on; then single tokens.
    notes = {"select": (np.array([[1, -1], [0, -1]]), np.array([1, 1]), np.array(2))}
    assert [each.tolist() for each in stored.read(notes, 1)] == [[2, 5, 6], [1, 5, 6]]
    assert [each.tolist() for each in stored.read(notes, None)] == [[2, 5, 6], [1, 5, 6]]
    due = notes | {"due": (np.array(True),)}
    assert [each.tolist() for each in stored.read(due, None)] == [[0, 2, 5, 6], [1, 4, 5, 6]]


@pytest.mark.slow
def test_the_map_is_drawn_and_knows_what_was_read(tmp_path):
    out = tmp_path / "map.png"
    assert attention_map.main(["--quick", "--out", str(out)]) == 0
    assert out.stat().st_size > 1000
    found = json.loads(out.with_suffix(".json").read_text())["policies"]
    assert found["dense"] == {"read": 1.0, "recall": 1.0}
    assert found["rkv"]["read"] < 0.15 and 0.1 < found["quest"]["recall"] <= 1.0001


@each_policy("tactic", "rkv")
def test_a_map_agrees_with_the_taps(name):
    """Tokens counted from what policies named are those that attention reports to have read."""
    given = [token for question, answer, _ in sample().questions[:2] for token in (*question, *answer)]
    maker = attention_map.Cartographer(reader(), sample().context, given, 1)
    np.testing.assert_allclose(maker.mass.sum(axis=2), 1, atol=1e-4)
    policy = CHOSEN[name]
    drawn = maker.map(policy)
    cache = reader().end(
        reader().begin(sample().context, "compute", len(given), sums=isinstance(policy, H2O)), policy
    )
    steps, _ = reader().follow(cache, given, LENGTH)
    np.testing.assert_allclose(drawn.read.sum(axis=1), steps.read[:, 1].mean(axis=1), atol=1e-3)
    if not policy.evicts:
        assert abs(drawn.recall - steps.recall[:, 1].mean()) < 0.01
