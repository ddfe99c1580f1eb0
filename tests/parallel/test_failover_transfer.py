"""Which step's state goes on when members have parts of two; over processes it is tested by those that are killed."""

import random

import numpy as np
import pytest

from parallel.failover.transfer import Version, carry

LIKE = {part: [np.zeros(3, np.float32), np.zeros((), np.int32)] for part in (-1, 0, 1)}


def leaves(step: int, part: int) -> list[np.ndarray]:
    rng = np.random.default_rng([step, part + 1])
    return [rng.standard_normal(3).astype(np.float32), np.array(step, np.int32)]


def version(step: int, *parts: int) -> Version:
    return Version(step, {part: leaves(step, part) for part in parts}, {"step": step})


@pytest.mark.parametrize(
    ("held", "step"),
    [
        ([version(4, -1, 0, 1), version(5, -1, 0, 1)], 5),
        ([version(5, -1, 0, 1), version(4, -1, 0, 1)], 5),
        ([version(4, -1, 0, 1), version(5, -1, 0)], 4),
        ([version(4, -1, 0), version(5, -1, 0)], None),
        ([], None),
    ],
)
def test_all_go_on_from_the_last_step_of_which_every_part_is_left(held, step):
    wanted = random.sample(sorted(LIKE), 2)
    carried = carry(held, wanted, LIKE)
    if step is None:
        assert carried is None
        return
    assert carried is not None and carried.step == step and carried.notes == {"step": step}
    assert sorted(carried.parts) == sorted(wanted) and carried.bytes == 0
    for part, found in carried.parts.items():
        for ours, theirs in zip(found, leaves(step, part), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_the_state_after_no_step_is_one_too():
    carried = carry([version(0, -1, 0, 1)], [0], LIKE)
    assert carried is not None and carried.step == 0
