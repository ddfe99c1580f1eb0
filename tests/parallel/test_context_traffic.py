"""Bytes on the wire, from plans and from the text of compiled programs."""

import numpy as np

from parallel.context import PlanConfig, compiled_bytes, make_plan, planned_bytes

PROGRAM = """
ENTRY %main {
  %a = bf16[3,4,2]{2,1,0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %s = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%y), channel_id=2
  %d = f32[8]{0:T(256)} collective-permute-done(%s)
  %g = (s8[16]{0}, /*index=1*/pred[32]{0}) all-gather(%p, %q), dimensions={0}
  %r = f32[2]{0} reduce-scatter(%z), dimensions={0}, to_apply=%add
  %t = u4[10]{0} ragged-all-to-all(%m, %n, %o, %p, %q, %r)
  %u = f32[] all-reduce(%w), to_apply=%add
  %f = f32[99]{0} fusion(%d), kind=kLoop, calls=%all-gather.fused
}
"""


def test_collectives_of_a_program_are_added_up_by_kind():
    assert compiled_bytes(PROGRAM, 4) == {
        # 24 elements of two bytes, eight of four; the start brings nothing yet.
        "collective-permute": 48 + 32,
        # Three quarters come from others.
        "all-gather": 36,
        "reduce-scatter": 24,
        "ragged-all-to-all": 5,
        "all-reduce": 6,
    }


def test_back_ends_send_at_least_the_need():
    plan = make_plan([90, 40, 7, 33], PlanConfig(4, block=8, rounds="rotations", stage_rounds=3))
    exact, rotated, gathered = (planned_bytes(plan, 100, name) for name in ("ragged", "rotate", "allgather"))
    received = np.bincount(plan.moves.receiver, minlength=4)
    np.testing.assert_array_equal(exact, 100 * received)
    # As many blocks as the capacity has rounds, whoever needs them.
    np.testing.assert_array_equal(rotated, 100 * sum(plan.capacity.shifts))
    np.testing.assert_array_equal(gathered, 100 * 3 * plan.capacity.slots)
    assert (exact <= rotated).all() and exact.sum() > 0
    alone = make_plan([90, 40], PlanConfig(1, block=8, rounds="rotations"))
    assert [planned_bytes(alone, 100, name).tolist() for name in ("ragged", "rotate", "allgather")] == [
        [0]
    ] * 3
