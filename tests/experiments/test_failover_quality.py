"""The quality experiment of failover: its quick form, and that all methods see the same failures."""

import json

import numpy as np
import pytest

from experiments import failover_quality as experiment


def test_failures_depend_on_the_seed_alone_and_are_as_frequent_as_stated():
    one, same, other = (list(experiment.failures(4000, 0.8, seed)) for seed in (0, 0, 1))
    assert one == same != other
    # A single worker is dead at a time, for whole periods.
    lives = np.array([len(live) for live in one]).reshape(-1, experiment.PERIOD)
    assert (lives == lives[:, :1]).all() and set(lives.ravel()) == {3, 4}
    assert {len(live) for live in experiment.failures(100, 0.0, 0)} == {4}


def test_slots_of_one_worker_are_the_shards_of_all():
    rows = np.arange(8)[:, None]
    batch = experiment.PackedBatch(tokens=rows, segment_ids=rows + 1, positions=rows, targets=rows[..., None])
    # Those of who does two jobs come last, and are degraded.
    plan, laid = experiment.laid_out(((0,), (1, 2), (3,)), batch, None)
    assert plan.shards.tolist() == [[0, 1]] and plan.degraded.tolist() == [[False, True]]
    assert laid.tokens.ravel().tolist() == [0, 1, 6, 7, 2, 3, 4, 5] == laid.targets.ravel().tolist()
    plan, laid = experiment.laid_out(((0,), (1,), (2,), (3,)), batch, None)
    assert plan.shards.tolist() == [[0, 1]] and not plan.degraded.any()
    assert laid.tokens.ravel().tolist() == list(range(8))
    for slots in (1, 2, 4):
        plan, laid = experiment.laid_out(((0,), (1,), (3,)), batch, None, slots)
        assert plan.shards.tolist() == [[0, 1, 2, -1] if slots == 4 else list(range(slots))]
        assert not plan.degraded.any()
        assert laid.tokens.ravel().tolist() == [0, 1, 2, 3, 6, 7, 0, 0]
        assert laid.targets.ravel().tolist() == [0, 1, 2, 3, 6, 7, -1, -1]
    with pytest.raises(ValueError, match="degraded in part"):
        experiment.laid_out(((0,), (1, 2), (3,)), batch, None, 1)


@pytest.mark.slow
def test_the_quick_form_runs(tmp_path):
    out = tmp_path / "failover_quality.json"
    assert experiment.main(["--quick", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    swept = ["mecefo, rank full", "mecefo, rank 16, drawn bases"]
    assert [row["method"] for row in found["rows"]] == ["no failure", "mecefo", "drop", *swept]
    none, mecefo, drop, full, drawn = found["runs"]
    # Half of the gradients are cheaper while one of four is dead, and none where it is only left out.
    assert none["degraded"] == drop["degraded"] == 0 and mecefo["degraded"] in (0, 0.5)
    assert all(run["loss"] < run["validation"][0][1] for run in found["runs"])
    # Attention is skipped at the full rank too.
    assert not none["errors"] and all(each["errors"] for each in (mecefo, drop, full, drawn))
    assert 0 < full["errors"][0][1] < mecefo["errors"][0][1] < 1
    assert out.with_suffix(".png").stat().st_size > 5_000
