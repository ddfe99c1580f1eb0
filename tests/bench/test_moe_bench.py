"""The benchmark of experts: its contenders compute the same, and its table has a column for each."""

import pytest

from experiments.bench import moe
from experiments.tables import kernels as tables


@pytest.mark.slow
def test_contenders_agree_and_are_timed(monkeypatch):
    monkeypatch.setattr(moe, "D", 16)
    monkeypatch.setattr(moe, "F", 24)
    rows = moe.contest(12, 5, repeats=1, slow=True)
    assert [row["mode"] for row in rows] == ["forward", "forward and backward"]
    assert all({"jaxllm", "ragged_dot", "dense", "ideal"} <= set(row["seconds"]) for row in rows)


def test_the_table_has_a_dash_where_a_contender_did_not_run():
    row = {"tokens": 1, "experts": 64, "top_k": 4, "mode": "forward", "seconds": {"jaxllm": 0.0015}}
    data = {"device": "cpu", "cores": 2, "jax": "0", "width": 8, "expert_width": 8, "results": [row]}
    assert "| 1 | 64 | forward | 1.50 | - | - | - | - |" in tables.moe(data)
