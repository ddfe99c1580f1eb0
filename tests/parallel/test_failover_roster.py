"""What the supervisor concludes from what it has heard: who is hung."""

from parallel.failover.roster import Roster, Worker


def world(*entered: tuple[tuple[int, int], float], generation: int = 3) -> Roster:
    """Members of a world who have begun these (world, step) at these times."""
    workers = [
        Worker(index, "inside", generation=generation, connected=generation, entered=what, entered_at=at)
        for index, (what, at) in enumerate(entered)
    ]
    return Roster(workers, generation, tuple(range(len(workers))))


def test_whoever_does_not_follow_into_a_step_is_hung():
    roster = world(((3, 7), 100.0), ((3, 6), 90.0), ((3, 7), 95.0))
    assert roster.behind(194.0, 100.0) == []
    assert [worker.index for worker in roster.behind(196.0, 100.0)] == [1]


def test_newcomers_are_not_behind_what_others_began_in_an_older_world():
    # The survivor had been compiling for long when the world of its newcomers was formed.
    roster = world(((0, -1), 0.0), ((0, -1), 0.0), ((2, 2), 100.0))
    assert roster.behind(1000.0, 100.0) == []
    roster.workers[2].entered, roster.workers[2].entered_at = (3, 2), 1000.0
    assert roster.behind(1099.0, 100.0) == []
    assert [worker.index for worker in roster.behind(1101.0, 100.0)] == [0, 1]
