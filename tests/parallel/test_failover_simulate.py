"""Runs under failures, against timelines written by hand and a clock that ticks second by second."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.failover.recovery import CheckpointRestart, Cluster, DropReplica, Mecefo, Pace
from parallel.failover.rivals import Bamboo, Oobleck
from parallel.failover.scenario import PUBLISHED, Scenario, Window, draw_scenario
from parallel.failover.simulate import simulate


def lines(outcome):
    """Segments without what a step costs."""
    return [(s.begin, s.end, s.kind, s.down, s.steps) for s in outcome.timeline]


def test_two_failures_by_hand():
    """Two replicas of four stages, five micro-batches, half of the FLOPs skipped: 24 s a step, 26 s with a merged stage."""
    cluster = Cluster(2, 4, 5, 24.0)
    recovery = Mecefo(on_failure=5.0, on_repair=2.0, skipped=0.5)
    windows = (Window(1, 100.0, 200.0), Window(6, 150.0, 300.0))
    outcome = simulate(cluster, recovery, Scenario(8, 400.0, windows))
    assert lines(outcome) == [
        (0, 96, "train", 0, 4),
        (96, 100, "aborted", 0, 0),
        (100, 105, "pause", 1, 0),
        (105, 131, "train", 1, 1),
        (131, 150, "aborted", 1, 0),
        (150, 155, "pause", 2, 0),
        (155, 207, "train", 2, 2),
        (207, 209, "pause", 1, 0),
        (209, 313, "train", 1, 4),
        (313, 315, "pause", 0, 0),
        (315, 387, "train", 0, 3),
        (387, 400, "unfinished", 0, 0),
    ]
    assert outcome.trained == 14
    assert outcome.throughput == outcome.goodput == pytest.approx(14 * 24 / 400)
    # One replica of two is degraded in five of fourteen steps, both in two; each in two stages of four.
    assert outcome.touched == pytest.approx((5 * 0.5 + 2) / 14)
    assert outcome.approximate == pytest.approx((5 * 0.5 + 2) / 28)
    assert outcome.lost == pytest.approx(
        {"aborted": 23 / 24, "pause": 14 / 24, "slower": 7 * 2 / 24, "dropped": 0, "unfinished": 13 / 24}
    )


def test_a_restart_by_hand():
    """A checkpoint of 1 s every 3 steps of 10 s; the second failure strikes the restart, the third a checkpoint."""
    recovery = CheckpointRestart(on_failure=7.0, every=3, save=1.0)
    windows = (Window(0, 45.0, 46.0), Window(1, 50.0, 60.0), Window(0, 87.5, 90.0))
    outcome = simulate(Cluster(2, 1, 1, 10.0), recovery, Scenario(2, 130.0, windows))
    assert [line[:3] + line[4:] for line in lines(outcome)] == [
        (0, 30, "train", 3),
        (30, 31, "save", 0),
        (31, 41, "redone", 1),
        (41, 45, "aborted", 0),
        (45, 46, "pause", 0),
        (46, 50, "pause", 0),
        (50, 57, "pause", 0),
        (57, 67, "redone", 1),
        (67, 87, "redone", 2),
        (87, 87.5, "aborted", 0),
        (87.5, 90, "pause", 0),
        (90, 94.5, "pause", 0),
        (94.5, 124.5, "train", 3),
        (124.5, 125.5, "save", 0),
        (125.5, 130, "unfinished", 0),
    ]
    assert outcome.trained == 6 and outcome.throughput == pytest.approx(100 / 130)
    assert outcome.lost["redone"] == 4


def test_without_spares_all_wait_for_a_repair():
    recovery = CheckpointRestart(on_failure=5.0, every=100, spares=0)
    outcome = simulate(Cluster(2, 1, 1, 10.0), recovery, Scenario(2, 100.0, (Window(0, 15.0, 60.0),)))
    assert lines(outcome) == [
        (0, 10, "redone", 0, 1),
        (10, 15, "aborted", 0, 0),
        (15, 60, "stall", 1, 0),
        (60, 65, "pause", 0, 0),
        (65, 95, "train", 0, 3),
        (95, 100, "unfinished", 0, 0),
    ]


def test_touching_windows_and_a_dropped_replica():
    windows = (Window(0, 20.0, 40.0), Window(0, 40.0, 60.0))
    outcome = simulate(Cluster(2, 1, 1, 10.0), DropReplica(), Scenario(2, 80.0, windows))
    assert lines(outcome) == [(0, 20, "train", 0, 2), (20, 60, "train", 1, 4), (60, 80, "train", 0, 2)]
    assert (outcome.trained, outcome.lost["dropped"]) == (6, 2)


@dataclass(frozen=True)
class Table(CheckpointRestart):
    """Steps of whole seconds that depend on how many are down; three stop everything."""

    def pace(self, cluster, down):
        return None if len(down) > 2 else Pace(3.0 + len(down), 1 - len(down) / 4, len(down) / 8)


@dataclass(frozen=True)
class Peers(DropReplica):
    """The same without checkpoints."""

    def pace(self, cluster, down):
        return Table.pace(self, cluster, down)  # type: ignore[arg-type]


def ticked(recovery, scenario) -> dict[str, int]:
    """Seconds by kind, and steps that count, from a clock that ticks: one second is one tick, one thing at a time."""
    begins = {(w.begin, w.worker): w.end for w in scenario.windows}
    saves = recovery if isinstance(recovery, CheckpointRestart) else None
    back: dict[int, float] = {}
    seconds: dict[str, int] = dict.fromkeys(("step", "aborted", "save", "pause", "stall", "unfinished"), 0)
    owed = since = kept = done = 0
    busy, left = None, 0
    for now in range(int(scenario.seconds)):
        # A step or checkpoint in hand goes on; only a failure ends it, and only its end lets others return.
        struck = [(worker, end) for (begin, worker), end in begins.items() if begin == now]
        if struck or busy is None:
            for worker in [w for w, end in back.items() if end <= now]:
                del back[worker]
                owed = max(owed, int(recovery.on_repair))
        if struck:
            back |= dict(struck)
            owed = max(owed, int(recovery.on_failure))
            if busy:
                seconds["aborted"] += left
            if saves:
                done, since = kept, 0
            busy = None
        pace = recovery.pace(None, frozenset(back))
        if busy is None:
            left = 0
            if pace is None:
                seconds["stall"] += 1
                continue
            if owed:
                seconds["pause"] += 1
                owed -= 1
                continue
            if saves and since == saves.every:
                busy, ends = "save", int(saves.save)
            else:
                busy, ends = "step", int(pace.seconds)
        left += 1
        if left == ends:
            seconds[busy] += ends
            if busy == "step":
                done, since = done + 1, since + 1
            else:
                kept, since = done, 0
            busy = None
    if busy:
        seconds["unfinished"] += left
    return {**seconds, "count": done}


@st.composite
def windows_of_four(draw):
    """Windows of whole seconds for four workers, and the length of a run."""
    windows = []
    for worker in range(4):
        cuts = sorted(draw(st.sets(st.integers(0, 130), max_size=8)))
        windows += [Window(worker, float(a), float(b)) for a, b in zip(cuts[::2], cuts[1::2])]
    return draw(st.permutations(windows)), float(draw(st.integers(20, 120)))


pauses = st.integers(0, 6).map(float)


@settings(max_examples=250)
@given(
    windows_of_four(),
    st.builds(Peers, pauses, pauses)
    | st.builds(Table, pauses, pauses, every=st.integers(1, 5), save=st.integers(1, 4).map(float)),
)
def test_a_ticking_clock_sees_the_same_run(drawn, recovery):
    scenario = Scenario(4, drawn[1], tuple(drawn[0]))
    outcome = simulate(Cluster(4, 1, 1), recovery, scenario)
    found = dict.fromkeys(("step", "aborted", "save", "pause", "stall", "unfinished"), 0.0)
    for each in outcome.timeline:
        found[{"train": "step", "redone": "step"}.get(each.kind, each.kind)] += each.end - each.begin
    # A pause in which the run ends is one to the clock.
    last = outcome.timeline[-1]
    ticks = ticked(recovery, scenario)
    if last.kind == "unfinished" and found["pause"] != ticks["pause"]:
        found["pause"] += last.end - last.begin
        found["unfinished"] -= last.end - last.begin
    count = sum(s.steps for s in outcome.timeline if s.kind == "train")
    assert {**found, "count": count} == ticks


@settings(max_examples=25)
@given(
    st.integers(0, 10**6),
    st.sampled_from(
        [
            Mecefo(3.0, 2.0),
            DropReplica(),
            CheckpointRestart(30.0, spares=6, every=7, save=3.0),
            Bamboo(),
            Oobleck(9.0),
        ]
    ),
)
def test_what_is_trained_and_what_is_lost_is_all_there_is(seed, recovery):
    scenario = draw_scenario(32, 4e4, PUBLISHED["high"], seed)
    outcome = simulate(Cluster(4, 8, 4, 11.0, schedule="1f1b"), recovery, scenario)
    assert outcome.trained + sum(outcome.lost.values()) == pytest.approx(4e4 / 11)
    assert outcome.timeline[0].begin == 0 and outcome.timeline[-1].end == 4e4
    assert all(a.end == b.begin and a.begin < a.end for a, b in zip(outcome.timeline, outcome.timeline[1:]))
    assert 0 < outcome.goodput <= outcome.throughput
    assert 0 <= outcome.approximate <= outcome.touched <= 1


@pytest.mark.parametrize("recovery", [Mecefo(9.0), DropReplica(), CheckpointRestart(9.0), Oobleck(9.0)])
def test_without_failures_all_is_trained(recovery):
    outcome = simulate(Cluster(4, 8, 4, 10.0), recovery, Scenario(32, 1000.0))
    assert lines(outcome) == [(0, 1000, "train", 0, 100)]
    assert outcome.goodput == outcome.throughput == 1 and outcome.touched == 0


def test_a_scenario_of_other_workers_is_refused():
    with pytest.raises(ValueError, match="workers=31: the cluster has 4 replicas x 8 stages = 32"):
        simulate(Cluster(4, 8, 1), DropReplica(), Scenario(31, 10.0))
