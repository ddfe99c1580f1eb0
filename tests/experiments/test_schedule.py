"""A schedule's collectives: how often they run, what they bring, and what runs while they travel."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments._hlo import parse
from experiments._schedule import collectives, summed

ROOT = Path(__file__).parents[2]
TEXT = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}, num_partitions=4

FileNames
1 "step.py"

FunctionNames
1 "step"
2 "mix"
3 "Attention.attend"

FileLocations
1 {file_name_id=1 function_name_id=1 line=3 end_line=3 column=2 end_column=9}
2 {file_name_id=1 function_name_id=2 line=7 end_line=7 column=2 end_column=9}
3 {file_name_id=1 function_name_id=3 line=9 end_line=9 column=2 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=2}

%fused (p.0: f32[8]) -> f32[8] {
  %p.0 = f32[8]{0} parameter(0)
  ROOT %m.0 = f32[8]{0} multiply(%p.0, %p.0)
}

%wrapped (p.1: f32[8]) -> f32[8] {
  %p.1 = f32[8]{0} parameter(0)
  ROOT %t.1 = f32[8]{0} all-to-all(%p.1), channel_id=5, replica_groups={{0,1},{2,3}}, metadata={op_name="jit(step)/mix" stack_frame_id=2}
}, execution_thread="main"

%pairs (p.2: f32[8]) -> f32[8] {
  %p.2 = f32[8]{0} parameter(0)
  ROOT %c.2 = f32[8]{0} custom-call(%p.2), custom_call_target="kernel"
}

%more (p.3: f32[8]) -> pred[] {
  %p.3 = f32[8]{0} parameter(0)
  ROOT %k.3 = pred[] constant(false)
}

%layer (p.4: (f32[8], /*index=1*/f32[4])) -> (f32[8], f32[4]) {
  %p.4 = (f32[8]{0}, /*index=1*/f32[4]{0}) parameter(0)
  %g.4 = f32[8]{0} get-tuple-element(%p.4), index=0
  %s.4 = ((f32[8]{0}), f32[8]{0}) async-start(%g.4), calls=%wrapped
  %b.4 = ((f32[8]{0}), f32[8]{0}) copy(%g.4)
  %d.4 = f32[8]{0} async-done(%s.4)
  %r.4 = f32[2]{0} reduce-scatter(%d.4), replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %u.4 = (f32[8]{0}, f32[4]{0}) tuple(%d.4, %r.4)
}

%rare (p.5: f32[8]) -> f32[8] {
  %p.5 = f32[8]{0} parameter(0)
  %s.5 = (f32[8]{0}, f32[16]{0}) all-gather-start(%p.5), replica_groups={}, backend_config={"collective_backend_config":{"is_sync":true}}
  %d.5 = f32[16]{0} all-gather-done(%s.5)
  ROOT %f.5 = f32[8]{0} fusion(%d.5), kind=kLoop, calls=%fused
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %s.6 = (bf16[8]{0}, bf16[8]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}, metadata={op_name="jit(step)/fetch" stack_frame_id=1}
  %w.6 = f32[8]{0} while(%x), condition=%more, body=%pairs, metadata={op_name="jit(step)/attend" stack_frame_id=3}
  %f.6 = f32[8]{0} fusion(%w.6), kind=kLoop, calls=%fused
  %d.6 = bf16[8]{0:T(256)(2,1)} collective-permute-done(%s.6)
  %l.6 = (f32[8]{0}, f32[4]{0}) while(%d.6), condition=%more, body=%layer, backend_config={"known_trip_count":{"n":"3"}}
  %i.6 = f32[8]{0} conditional(%x, %x, %x), branch_computations={%rare, %fused}
  ROOT %a.6 = f32[8]{0} all-reduce(%i.6), replica_groups={{0,1,2,3}}, to_apply=%add
}
"""


def test_collectives_of_a_schedule():
    found = {each.name: each for each in collectives(parse(TEXT))}
    assert set(found) == {"s.4", "r.4", "s.5", "s.6", "a.6"}
    permute, exchange, scatter, gather = (found[name] for name in ("s.6", "s.4", "r.4", "s.5"))
    assert (permute.kind, permute.bytes, permute.times, permute.certain) == (
        "collective-permute",
        16,
        1,
        True,
    )
    assert permute.asynchronous and [each.name for each in permute.meanwhile] == ["w.6", "f.6"]
    # In the loop of three; half of what two exchange is one's own; nothing but a copy runs meanwhile.
    assert (exchange.kind, exchange.members, exchange.bytes, exchange.times) == ("all-to-all", 2, 16, 3)
    assert exchange.origin == ("mix", "step") and exchange.asynchronous and not exchange.meanwhile
    assert (scatter.members, scatter.bytes, scatter.times, scatter.asynchronous) == (4, 24, 3, False)
    assert (gather.members, gather.bytes, gather.certain, gather.asynchronous) == (4, 48, False, False)
    assert found["a.6"].bytes == 48


def test_groups_along_axes_of_a_mesh():
    groups = "replica_groups={{0,1,2,3}}"
    for named, bytes_ in (
        ("mesh['a'=2,'b'=2] {'b'}", 32),
        ("mesh['a'=2,'b'=2] {'a','b'}", 48),
    ):
        found = collectives(parse(TEXT.replace(groups, f"replica_groups={named}")))
        assert next(each for each in found if each.name == "a.6").bytes == bytes_


def test_rows_add_up_and_find_what_runs_meanwhile():
    program = parse(TEXT)
    rows = summed(
        collectives(program),
        lambda each: each.origin[0] if each.origin else "unknown",
        lambda work: "Attention.attend" in program.origin(work),
    )
    by_kind = {row["kind"]: row for row in rows}
    permute, exchange = by_kind["collective-permute"], by_kind["all-to-all"]
    assert permute["what"] == "step" and permute["hidden"] == permute["marked"] == 1
    assert permute["marked_bytes"] == permute["bytes"] == 16
    assert permute["meanwhile"] == {"loops": 1, "kernels": 0, "fusions": 1}
    assert (exchange["in_text"], exchange["count"], exchange["bytes"]) == (1, 3, 48)
    assert exchange["asynchronous"] == 3 and exchange["hidden"] == exchange["marked"] == 0
    assert by_kind["all-gather"]["uncertain"] == 1 and by_kind["all-gather"]["asynchronous_bytes"] == 0
    assert by_kind["all-reduce"]["what"] == "unknown"
    assert [row["bytes"] for row in rows] == sorted((row["bytes"] for row in rows), reverse=True)


def test_parents_of_frames_are_numbered_in_two_ways():
    from_none = TEXT.replace("parent_frame_id=1}", "parent_frame_id=0}").replace(
        "parent_frame_id=2}", "parent_frame_id=1}"
    )
    for text in (TEXT, from_none):
        assert parse(text).frames == {1: ("step",), 2: ("mix", "step"), 3: ("Attention.attend", "step")}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("is_scheduled=true, ", ""), "must be the text of a scheduled HLO module"),
        (("ENTRY %main", "%main"), "no computation is the entry"),
        (("collective-permute-done(%s.6)", "copy(%s.6)"), "s.6: begins and does not end"),
        (("replica_groups={{0,1,2,3}}", "replica_groups=?"), "no replica_groups"),
    ],
)
def test_texts_that_cannot_be_read_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        collectives(parse(TEXT.replace(*change)))


PROGRAM = """
import json
import jax, jax.numpy as jnp
from experiments._hlo import parse
from experiments._schedule import collectives
mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
def step(x):
    def body(x, _):
        x = jnp.sin(jax.lax.ppermute(x, "d", [(i, (i + 1) % 8) for i in range(8)]))
        return x + jax.lax.all_to_all(x, "d", 0, 0, tiled=True), None
    x, _ = jax.lax.scan(body, x, None, length=3)
    return jax.lax.psum(jax.lax.all_gather(x, "d", tiled=True), "d")
each = jax.P("d")
call = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=each, out_specs=jax.P(), check_vma=False))
text = call.lower(jnp.ones((64, 4))).compile().as_text()
print(json.dumps([[c.kind, c.members, c.bytes, c.times, c.certain, c.asynchronous] for c in collectives(parse(text))]))
"""


def test_a_real_program_of_eight_devices():
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    found = {kind: rest for kind, *rest in json.loads(done.stdout.splitlines()[-1])}
    # Eight rows of four floats on each device; collectives of CPUs are not asynchronous.
    assert found == {
        "collective-permute": [0, 128, 3, True, False],
        "all-to-all": [8, 112, 3, True, False],
        "all-gather": [8, 7 * 128, 1, True, False],
        "all-reduce": [8, 2 * 7 * 128, 1, True, False],
    }
