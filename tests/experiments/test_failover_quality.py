"""The quality experiment of failover: its quick form, and that all methods see the same failures."""

import json

import numpy as np
import pytest

from experiments import failover_quality as experiment
from experiments._failover_quality_report import summary
from experiments.tables.degraded import failover_cost, failover_quality


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


def run(model, method, seed, loss, errors=()):
    """What a run leaves; those with failures have errors."""
    rate = 0.8 if errors else 0.0
    measured = {"loss": loss, "degraded": rate / 2, "errors": [[25 * n, e] for n, e in enumerate(errors)]}
    return {"model": model, "rate": rate, "method": method, "seed": seed} | measured


RUNS = [
    run("a", "no failure", 0, 2.0),
    run("a", "mecefo", 0, 2.5, (0.25, 0.5, 0.75)),
    run("b", "no failure", 0, 3.0),
    run("b", "mecefo", 0, 3.25, (1.0,)),
    run("a", "no failure", 1, 2.125),
    run("a", "mecefo", 1, 2.25, (0.0, 0.0, 0.875)),
    run("a", "swept", 0, 2.75, (0.5,)),
]


def test_gaps_are_between_runs_of_one_seed_and_model():
    rows = {(row["model"], row["method"]): row for row in summary(RUNS)}
    # Models stand together.
    assert [model for model, _ in rows] == ["a", "a", "a", "b", "b"]
    mecefo = rows["a", "mecefo"]
    assert mecefo["gaps"] == [0.5, 0.125] and mecefo["above_no_failure"] == 0.3125 and mecefo["seeds"] == 2
    assert (mecefo["loss"], mecefo["least"], mecefo["greatest"]) == (2.375, 2.25, 2.5)
    # Of all points of all seeds.
    assert mecefo["gradient_error"] == 0.375 and mecefo["greatest_error"] == 0.875
    assert rows["b", "mecefo"]["gaps"] == [0.25] and rows["a", "swept"]["gaps"] == [0.75]
    assert rows["a", "no failure"]["gradient_error"] is None


def test_the_table_has_a_line_for_each_method():
    inputs = {"steps": 2000, "workers": 4, "rows": 2, "length": 64, "rates": [0.8]}
    report = {"rows": summary(RUNS), "inputs": inputs, "date": "2026-01-02T03", "device": {"cpu": "some CPU"}}
    lines = failover_quality(report).splitlines()
    assert lines[3] == "| a, mecefo | 2 | 40% | 2.375 | +0.312 | +0.125 to +0.500 | +0.500 | 0.38 | 0.88 |"
    assert lines[4].startswith("| a, swept | 1 | 40% | 2.750 | +0.750 |  | +0.750 | 0.50")
    assert lines[5] == "| b, no failure | 1 | 0% | 3.000 |  |  |  |  |  |"
    assert "one dead 80% of the time" in lines[-1]


def test_the_table_of_costs_is_relative_to_one_job():
    def row(task, operations, memory):
        found = {"task": task, "operations": operations, "operations_over_normal": operations / 2e9}
        return {"model": "a", **found, "expected": 1.5, "memory": {"temporary": memory, "results": 1}}

    results = [row("normal", 2e9, 8 << 20), row("degraded", 3.2e9, 2 << 20)]
    lines = failover_cost({"results": results, "inputs": {"target": "cpu"}}).splitlines()
    assert lines[-1] == "| a, degraded | 3 | 1.60 | 1.50 | 2 | 0.25 |"


@pytest.mark.nightly
def test_the_quick_form_runs(tmp_path):
    out = tmp_path / "failover_quality.json"
    assert experiment.main(["--quick", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    swept = "mecefo, rank 16, drawn bases"
    assert [row["method"] for row in found["rows"]] == ["no failure", "mecefo", "drop", swept]
    none, mecefo, drop, drawn = found["runs"]
    # Half of the gradients are cheaper while one of four is dead, and none where it is only left out.
    assert none["degraded"] == drop["degraded"] == 0 and mecefo["degraded"] in (0, 0.5)
    assert all(run["loss"] < run["validation"][0][1] for run in found["runs"])
    assert not none["errors"] and all(0 < each["errors"][0][1] < 1 for each in (mecefo, drop, drawn))
    assert out.with_suffix(".png").stat().st_size > 5_000
