"""The chaos driver: when who fails, what the files of a run say of samples, and its quick form on real processes."""

import json
import time

import pytest

from experiments import _failover_account as account
from experiments import failover as experiment
from experiments._failover_chaos import draw
from experiments._failover_chart import throughput

WORKERS, BATCH, STEPS = 3, 6, 5
NONE = {"lost": [], "twice": [], "other_updates": []}


@pytest.mark.parametrize("failures", [2, 3, 5, 6, 100])
def test_failures_are_of_all_kinds_and_of_rank_0(failures):
    schedules = [draw(failures, 4, seed) for seed in range(30)]
    assert len({str(each) for each in schedules}) == 30 and draw(failures, 4, 3) == schedules[3]
    for events in schedules:
        lost = [worker for event in events for worker in event.workers]
        assert len(lost) == failures and set(lost) <= set(range(4))
        assert all(len(set(event.workers)) == len(event.workers) for event in events)
        kinds = {event.kind for event in events}
        assert "again" in kinds and ("hang" in kinds or failures < 3) and ("pair" in kinds or failures < 5)
        assert any(0 in event.workers for event in events if event.kind == "again")
    with pytest.raises(ValueError, match="failures=1"):
        draw(1, 4, 0)


def begun():
    """Worker 1 dies in step 2, which the others begin again in a smaller world; it is back for step 4."""
    rows = {worker: [] for worker in range(WORKERS)}

    def add(worker, generation, step, which):
        now = 10.0 + 4 * generation + step
        row = {"time": now, "pid": 100 + worker + 10 * (worker == 1) * (generation > 2)}
        rows[worker].append(row | {"generation": generation, "step": step, "updates": step, "rows": which})

    for step in range(3):
        for worker in range(WORKERS):
            add(worker, 1, step, [2 * worker, 2 * worker + 1])
    for step in (2, 3):
        add(0, 2, step, [0, 1])
        add(2, 2, step, [4, 5, 2, 3])
    for worker in range(WORKERS):
        add(worker, 3, 4, [2 * worker, 2 * worker + 1])
    return rows


def test_every_sample_of_the_final_state_is_counted():
    found = account.samples(begun(), STEPS, BATCH)
    assert found == {"counted": STEPS * BATCH, "lost": [], "twice": [], "other_updates": [], "again": 1}
    assert account.lineage(begun()) == {0: 1, 1: 1, 2: 2, 3: 2, 4: 3}
    # World 1 had committed step 2, though its members began no later one.
    rows = {worker: [row for row in each if row["generation"] > 1] for worker, each in begun().items()}
    assert account.samples(rows, STEPS, BATCH)["lost"] == [(s, r) for s in (0, 1) for r in range(BATCH)]


def test_lost_and_repeated_samples_are_noticed():
    lost = begun()
    lost[2][-2]["rows"].remove(2)
    assert account.samples(lost, STEPS, BATCH)["lost"] == [(3, 2)]
    twice = begun()
    twice[0][-2]["rows"].append(3)
    assert account.samples(twice, STEPS, BATCH)["twice"] == [(3, 3)]
    # A state that was trained on step 2 and begins it again would have one update more than batches.
    repeated = begun()
    for row in [row for rows in repeated.values() for row in rows if row["generation"] > 1]:
        row["updates"] += 1
    assert account.samples(repeated, STEPS, BATCH)["other_updates"] == [2, 3, 4]
    skipped = {worker: [row for row in rows if row["step"] != 3] for worker, rows in begun().items()}
    assert account.samples(skipped, STEPS, BATCH)["lost"] == [(3, row) for row in range(BATCH)]
    # World 2 went back to step 1; what world 1 had made of step 2 is in no state, and world 3 left it out.
    row = {"time": 1.0, "pid": 1, "rows": list(range(BATCH))}
    begins = [(1, 0), (1, 1), (1, 2), (2, 1), (3, 3)]
    given_up = [row | {"generation": world, "step": step, "updates": step} for world, step in begins]
    assert account.samples({0: given_up}, 4, BATCH)["lost"] == [(2, row) for row in range(BATCH)]
    late = begun()
    late[0].append({**late[0][-1], "step": STEPS, "updates": STEPS})
    assert account.samples(late, STEPS, BATCH)["twice"] == [(STEPS, 0), (STEPS, 1)]


def test_tokens_of_the_device_are_those_of_the_corpus():
    rows = [{"kind": "train", "step": 1, "tokens": 7, "tokens_seen": 7}, {"kind": "eval", "step": 1}]
    rows += [{"kind": "train", "step": step, "tokens": 5, "tokens_seen": 2 + 5 * step} for step in (3, 4)]
    sound = {"missing": [2], "repeated": [], "different": [], "sum": True}
    assert account.tokens(rows, [7, 5, 5, 5]) == sound
    assert account.tokens(rows, [7, 5, 5, 6]) == sound | {"different": [4], "sum": False}
    assert account.tokens([rows[0], *rows], [7, 5, 5, 5]) == sound | {"repeated": [1]}


def test_what_a_failure_cost():
    journal = [
        {"time": 9.0, "event": "recovered", "members": [0, 1, 2], "generation": 1},
        {"time": 16.75, "event": "lost", "worker": 1, "why": "killed by SIGKILL"},
        {"time": 20.5, "event": "recovered", "members": [0, 2], "generation": 2},
        {"time": 26.5, "event": "recovered", "members": [0, 1, 2], "generation": 3},
    ]
    found = account.failure(1, 16.5, journal, begun(), WORKERS)
    assert (found["detection"], found["recovery"], found["readmission"]) == (0.25, 4.0, 10.0)
    assert found["alone"] and found["survivor_steps"] == 2
    assert found["survivors"] == [0, 2] and found["kept"]
    assert account.others(journal, [found]) == []
    second = {**journal[1], "time": 18.0, "worker": 0}
    assert [row["worker"] for row in account.others([*journal, second], [found])] == [0]
    # Worker 0 had been lost a moment ago, and has another process when it is back.
    earlier = [*journal[:1], {**second, "time": 16.4}, *journal[1:]]
    assert account.failure(1, 16.5, earlier, begun(), WORKERS)["survivors"] == [2]
    other = begun()
    other[2][-1]["pid"] = 7
    assert not account.failure(1, 16.5, journal, other, WORKERS)["kept"]
    other = begun()
    for row in other[2]:
        row["pid"] += row["time"] < 16.5
    assert not account.failure(1, 16.5, journal, other, WORKERS)["kept"]
    assert account.failure(1, 16.5, journal[:1], begun(), WORKERS)["detection"] is None


def sound():
    """Runs and failures of which everything holds."""
    run = {
        "samples": NONE,
        "tokens": {"missing": [3], "repeated": [], "different": [], "sum": True},
    }
    runs = {
        name: {**run, "seconds": seconds, "validation_loss": loss}
        for name, seconds, loss in (
            ("undisturbed", 10.0, 2.0),
            ("mecefo", 15.0, 2.019),
            ("restart", 30.0, 2.0),
        )
    }
    failure = {"detection": 1.0, "readmission": 9.0, "kept": True, "checkpoints": 0, "survivor_steps": 3}
    return runs, [failure, failure | {"survivor_steps": 0}]


def test_every_property_can_fail():
    runs, failures = sound()
    held = experiment.verdicts(runs, failures)
    assert len(held) == 9 and all(held.values())
    assert [runs[name]["lost_seconds"] for name in runs] == [0.0, 5.0, 20.0]
    changes = {
        "every sample once": lambda runs, each: runs["mecefo"].update(samples={**NONE, "lost": [(3, 1)]}),
        "tokens of every batch": lambda runs, each: runs["mecefo"]["tokens"].update(sum=False),
        "no checkpoint to read": lambda runs, each: each.update(checkpoints=1),
        "every failure noticed": lambda runs, each: each.update(detection=None),
        "everybody taken back": lambda runs, each: each.update(readmission=None),
        "survivors' processes kept": lambda runs, each: each.update(kept=False),
        "steps before re-admission": lambda runs, each: each.update(survivor_steps=0),
        "loss within 1 %": lambda runs, each: runs["mecefo"].update(validation_loss=1.979),
        "less wall time lost than by restarts": lambda runs, each: runs["restart"].update(seconds=14.0),
    }
    assert set(changes) == set(held)
    for name, change in changes.items():
        runs, failures = sound()
        change(runs, failures[0])
        assert [each for each, holds in experiment.verdicts(runs, failures).items() if not holds] == [name]
    assert len(experiment.verdicts({"mecefo": sound()[0]["mecefo"]}, failures)) == 7


def test_restarts_lose_as_much_where_checkpoints_are_far_enough_apart():
    """Steps of 2 s; two restarts of 3 s each, after 4 and 6 steps that were made again."""
    rows = [{"step": 14, "from": 10}, {"step": 26, "from": 20}]
    runs = {"undisturbed": {"seconds": 98.0}, "mecefo": {"lost_seconds": 40.0}}
    runs["restart"] = {"lost_seconds": 2 * 3.0 + 2.0 * (4 + 6), "restarts": rows}
    found = account.break_even(runs, 50)
    assert found["restart_seconds"] == pytest.approx(3.0)
    # 17 of the 20 s of each are 8.5 steps: half of what then lies between two checkpoints.
    assert found["checkpoints_apart"] == pytest.approx(17.0)


def test_throughput_counts_every_step():
    steps = account.progress(begun())
    assert [row[1:] for row in steps] == [[0, 3], [1, 3], [2, 3], [2, 2], [3, 2], [4, 3]]
    assert steps[0][0] == 0.0 and steps[-1][0] == account.span(begun())
    middles, per_second = throughput(steps, 2.0)
    assert per_second.sum() * 2.0 == len(steps) and len(middles) == len(per_second)


def chaos(tmp_path, *words):
    out, begin = tmp_path / "failover.json", time.monotonic()
    code = experiment.main(["--quick", "--work", str(tmp_path / "runs"), "--out", str(out), *words])
    report = json.loads(out.read_text())
    print(report["seed"], f"{time.monotonic() - begin:.0f} s", json.dumps(report["held"]))
    assert code == 0, json.dumps([report["held"], report["failures"]], indent=1)
    assert out.with_suffix(".png").stat().st_size > 10_000
    return report


@pytest.mark.nightly
def test_killed_workers_lose_no_sample(tmp_path, seed):
    report = chaos(tmp_path, "--only", "mecefo", "--failures", "2", "--steps", "40", "--seed", str(seed))
    assert len(report["failures"]) == 2 and {each["kind"] for each in report["failures"]} == {"again"}


@pytest.mark.nightly
def test_a_hundred_failures(tmp_path, seed):
    report = chaos(tmp_path, "--failures", "100", "--seed", str(seed))
    assert len(report["failures"]) == 100
