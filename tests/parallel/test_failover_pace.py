"""What a step costs under failures, against pipelines played pass by pass and assignments counted task by task."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.failover.assignment import assign, assign_stages
from parallel.failover.recovery import CheckpointRestart, Cluster, DropReplica, Mecefo, Recovery
from parallel.failover.rivals import Bamboo, Oobleck
from parallel.failover.schedule import HEALTHY, SCHEDULES, Stage, merged_units, pipeline_units
from tests.parallel.pipeline_schedules import length

LLAMA = Mecefo(skipped=1 / 3)
costs = st.floats(0.25, 8.0)


@settings(max_examples=150)
@given(
    st.lists(st.builds(Stage, costs, costs), min_size=1, max_size=6),
    st.integers(1, 9),
    st.sampled_from(SCHEDULES),
)
def test_a_pipeline_takes_as_long_as_played(stages, micro, schedule):
    played = length([s.forward for s in stages], [s.backward for s in stages], micro, schedule)
    assert pipeline_units(tuple(stages), micro, schedule) == pytest.approx(played, rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_equal_stages_take_three_times_stages_and_micro_batches_less_one(schedule):
    for p, micro in itertools.product(range(1, 9), range(1, 12)):
        assert length([1.0] * p, [2.0] * p, micro, schedule) == 3 * (p + micro - 1)
        assert Cluster(2, p, micro, schedule=schedule).units == 3 * (p + micro - 1)


def _merged(p: int, at: int, task: Stage) -> tuple[list[float], list[float]]:
    forward, backward = [1.0] * (p - 1), [2.0] * (p - 1)
    forward[at], backward[at] = 2 * task.forward, 2 * task.backward
    return forward, backward


@pytest.mark.parametrize("skipped", [0.0, 0.2, 1 / 3, 0.5])
def test_the_merged_stage_takes_what_the_formula_says_where_all_forward_passes_come_first(skipped):
    """Up to a half of the FLOPs skipped, so c >= 4; with 1f1b the formula is a bound, and exact at the last stage."""
    task = Mecefo(skipped=skipped).task
    for p, micro in itertools.product((2, 3, 5, 8), (1, 2, 3, 7)):
        formula = merged_units(p, micro, 2 * sum(task))
        for at in range(p - 1):
            assert length(*_merged(p, at, task), micro, "gpipe") == pytest.approx(formula)
            assert length(*_merged(p, at, task), micro, "1f1b") <= formula + 1e-9
        assert length(*_merged(p, p - 2, task), micro, "1f1b") == pytest.approx(formula)


def test_the_formula_is_too_low_where_more_than_half_is_skipped():
    task = Mecefo(skipped=0.9).task
    assert length(*_merged(4, 1, task), 8, "gpipe") > merged_units(4, 8, 2 * sum(task)) + 1


@pytest.mark.parametrize(("micro", "percent"), [(1, -5.6), (2, 1.2), (4, 11.1), (8, 23.0)])
def test_the_sheet_of_the_published_cost_model(micro, percent):
    """Eight stages, a third of the FLOPs in attention."""
    cluster = Cluster(1, 8, micro)
    pace = LLAMA.pace(cluster, frozenset({3}))
    assert pace is not None
    assert 100 * (pace.seconds - 1) == pytest.approx(percent, abs=0.06)


@st.composite
def failures(draw):
    """A cluster and some of its workers."""
    cluster = Cluster(
        draw(st.integers(1, 5)),
        draw(st.integers(1, 6)),
        draw(st.integers(1, 5)),
        schedule=draw(st.sampled_from(SCHEDULES)),
    )
    return cluster, draw(st.frozensets(st.integers(0, cluster.workers - 1), max_size=cluster.workers - 1))


@settings(max_examples=150)
@given(failures())
def test_mecefo_does_what_the_assignment_of_stages_says(case):
    cluster, down = case
    if cluster.stages == 1:
        return
    grid = itertools.product(range(cluster.replicas), range(cluster.stages))
    found = assign_stages(
        cluster.replicas, cluster.stages, [n for at, n in enumerate(grid) if at not in down]
    )
    pace = LLAMA.pace(cluster, down)
    kept = cluster.replicas - len(found.dropped)
    if not kept:
        assert pace is None
        return
    assert pace is not None
    slowest, touched, degraded = 0.0, set(), 0
    for replica in set(range(cluster.replicas)) - set(found.dropped):
        tasks = [t for n, t in zip(found.live, found.tasks) if n.replica == replica]
        each = [HEALTHY if len(t) == 1 else Stage(*(2 * units for units in LLAMA.task)) for t in tasks]
        slowest = max(
            slowest,
            length([s.forward for s in each], [s.backward for s in each], cluster.micro, cluster.schedule),
        )
        touched |= {replica for t in tasks if len(t) > 1}
        degraded += sum(len(t) for t in tasks if len(t) > 1)
    assert pace.seconds == pytest.approx(slowest / cluster.units)
    assert pace.kept == kept / cluster.replicas
    assert pace.touched == len(touched) / cluster.replicas
    assert pace.approximate == pytest.approx(degraded / cluster.workers)


@settings(max_examples=100)
@given(st.integers(1, 12), st.integers(0, 11), st.integers(1, 4))
def test_mecefo_without_a_pipeline_does_what_the_assignment_of_shards_says(workers, dead, micro):
    dead = min(dead, workers - 1)
    found = assign(workers, range(dead, workers))
    pace = LLAMA.pace(Cluster(workers, 1, micro), frozenset(range(dead)))
    assert pace is not None
    each = [
        micro * len(jobs) * (sum(LLAMA.task) if degraded else 3)
        for jobs, degraded in zip(found.jobs, found.degraded)
    ]
    touched = sum(len(jobs) for jobs, degraded in zip(found.jobs, found.degraded) if degraded)
    assert pace.seconds == pytest.approx(max(each) / (3 * micro))
    assert (pace.kept, pace.touched) == (1, pytest.approx(touched / workers))


RECOVERIES = [LLAMA, DropReplica(), CheckpointRestart(), Oobleck(layers=12), Bamboo(redundant=0.0)]


@pytest.mark.parametrize("recovery", RECOVERIES, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_is_lost_while_nobody_is_down(recovery: Recovery, schedule):
    for stages in (1, 2, 5):
        assert recovery.pace(Cluster(3, stages, 4, 7.0, schedule=schedule), frozenset()) == (
            7.0,
            1.0,
            0.0,
            0.0,
        )


def test_bamboo_pays_always_and_stands_in_for_a_successor():
    cluster = Cluster(2, 4, 5)
    assert Bamboo().pace(cluster, frozenset()) == (pytest.approx(4 / 3), 1, 0, 0)
    # Stage 2 of replica 0 is dead: stages of 4, 6 and 4 units, and four times 2 + 4 for the slowest.
    assert Bamboo().pace(cluster, frozenset({2})) == (pytest.approx((14 + 4 * 6) / 24), 1, 0, 0)
    assert Bamboo().pace(cluster, frozenset({0})) == Bamboo().pace(cluster, frozenset({2})), (
        "the last covers the first"
    )
    assert Bamboo().pace(cluster, frozenset({1, 2})) == (pytest.approx(4 / 3), 0.5, 0, 0)
    assert Bamboo().pace(cluster, frozenset({1, 2, 4, 7})) is None
    assert Bamboo().pace(Cluster(2, 1, 5), frozenset({0})) == (1, 0.5, 0, 0)


def test_oobleck_shortens_pipelines_borrows_and_gives_up():
    cluster = Cluster(3, 4, 2)
    assert Oobleck(layers=12).templates(cluster, frozenset()) == [4, 4, 4]
    assert Oobleck(layers=12).templates(cluster, frozenset({0, 5})) == [4, 3, 3]
    assert Oobleck(layers=12, least=3).templates(cluster, frozenset({0, 1})) == [4, 3, 3]
    assert Oobleck(layers=12, least=4).templates(cluster, frozenset({0})) == [4, 4]
    assert Oobleck(layers=12, least=3).templates(cluster, frozenset({0, 1, 4, 8})) == [4, 4]
    assert Oobleck(layers=12, least=4).templates(cluster, frozenset({0, 1, 4, 5, 8})) == [4]
    assert Oobleck(layers=12, least=4).pace(cluster, frozenset(range(9))) is None


def test_oobleck_deals_micro_batches_as_well_as_can_be():
    """Against all ways to deal six micro-batches to pipelines of 4, 4 and 2 nodes, ten layers over each."""
    cluster = Cluster(3, 4, 2)
    pace = Oobleck(layers=10).pace(cluster, frozenset({0, 1}))
    assert pace is not None
    dealt = {4: (3, 3, 2, 2), 2: (5, 5)}

    def ends(nodes, micro):
        return (
            length([0.4 * n for n in dealt[nodes]], [0.8 * n for n in dealt[nodes]], micro, "gpipe")
            if micro
            else 0.0
        )

    ways = [way for way in itertools.product(range(7), repeat=3) if sum(way) == 6]
    best = min(max(ends(4, a), ends(4, b), ends(2, c)) for a, b, c in ways)
    assert pace.seconds == pytest.approx(best / ends(4, 2))
    assert pace.kept == 1


def test_what_is_outside_the_pipeline_lasts_as_long_as_ever():
    down = frozenset({3})
    plain, half = (LLAMA.pace(Cluster(2, 8, 4, outside=outside), down) for outside in (0.0, 0.5))
    assert plain and half and half.seconds - 1 == pytest.approx((plain.seconds - 1) / 2)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Cluster(0, 2, 1), "replicas=0"),
        (lambda: Cluster(2, 2, 0), "micro=0"),
        (lambda: Cluster(2, 2, 1, 0.0), "seconds=0"),
        (lambda: Cluster(2, 2, 1, outside=1.0), "outside=1"),
        (lambda: Cluster(2, 2, 1, schedule="zb"), "schedule='zb': must be one of gpipe, 1f1b"),
        (lambda: pipeline_units((HEALTHY,), 1, "zb"), "schedule='zb'"),
        (lambda: Mecefo(skipped=1.5), "skipped=1.5"),
        (lambda: Mecefo(rest=0.5), "rest=0.5"),
        (lambda: Mecefo(on_failure=-1.0), "on_failure=-1"),
        (lambda: CheckpointRestart(every=0), "every=0"),
        (lambda: CheckpointRestart(save=-1.0), "save=-1"),
        (lambda: CheckpointRestart(spares=-1), "spares=-1"),
        (lambda: Oobleck(least=0), "least=0"),
        (lambda: Oobleck(layers=3).pace(Cluster(1, 4, 1), frozenset()), "layers=3, least=1: stages=4"),
    ],
)
def test_bad_input_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
