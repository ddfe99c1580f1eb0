"""Recurrent layers whose documents are scattered over 8 simulated devices equal the ops over the packed documents."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallel.context import (
    PlanConfig,
    causal_conv,
    dynamic_conv,
    gated_delta,
    lane_specs,
    make_lanes,
    make_plan,
    ssd,
)
from parallel.context.prefix import column_groups
from tests.parallel.recurrence_worker import DK, DV, HV, D, H, N, P

HERE = Path(__file__).parent
# Meshes: more workers than blocks of most documents; two axes, and blocks shorter than the convolutions look back;
# blocks of which a document has few; and stretches of the packed documents (block 0).
FAST = [
    {"shape": [8], "block": 3, "rounds": 2, "seed": 1},
    {"shape": [2, 3], "block": 2, "rounds": 2, "seed": 1},
    {"shape": [3], "block": 8, "rounds": 2, "seed": 2},
    {"shape": [7], "block": 0, "rounds": 10, "seed": 1},
]
TRAFFIC = [{"shape": [8], "block": 4}, {"shape": [2, 3], "block": 2}]
TOLERANCE = 1e-5


def simulated(cases: list[dict], traffic: list[dict]) -> dict:
    """What ``recurrence_worker.py`` finds in a process of 8 devices."""
    root = HERE.parent.parent
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    command = [
        sys.executable,
        str(HERE / "recurrence_worker.py"),
        json.dumps({"cases": cases, "traffic": traffic}),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def check(found: list[dict]) -> None:
    """Errors within the tolerance, one program for all plans, and states that were there to compare."""
    for case in found:
        over = {name: error for name, error in case["errors"].items() if not error <= TOLERANCE}
        assert not over, (case, over)
        assert len(case["errors"]) == 22
        assert case["programs"] == case["traces"] == 1 and case["plans"] >= 10
        assert case["states"] > 0


@pytest.fixture(scope="module")
def found() -> dict:
    return simulated(FAST, TRAFFIC)


def test_outputs_states_and_gradients_are_those_of_one_device(found):
    check(found["cases"])
    # What the plans are to show was in them: second tails in a slot, and workers with several blocks.
    assert max(case["extra"] for case in found["cases"]) > 0
    assert max(case["slots"] for case in found["cases"]) > 1


def test_what_travels_is_what_is_said(found):
    """Forward and, in the other direction, backward; nothing but decays is gathered everywhere."""
    for case in found["traffic"]:
        workers, slots, lanes, block = (case[name] for name in ("workers", "slots", "lanes", "block"))

        def shares(size, workers=workers):
            return -(-size // workers) * workers

        ssd = H * shares(P * N)
        assert case["ssd"]["all-to-all"] == sorted([slots * ssd, lanes * ssd] * 2)
        assert case["ssd"]["all-gather"] == [workers * slots * H]
        assert case["ssd"]["reduce-scatter"] == [slots * H]
        groups = column_groups(workers, HV, DK, DV)
        width, units = -(-DV // groups), shares(HV * groups)
        there, back = slots * units * DK * (DK + width), lanes * units * DK * width
        assert case["delta"]["all-to-all"] == sorted([there, back] * 2)
        conv = [slots * min(block, 3) * shares(D), lanes * 3 * shares(D)]
        assert case["conv"]["all-to-all"] == sorted(conv * 2)
        assert "all-gather" not in case["delta"] and "all-gather" not in case["conv"]
        assert not any("collective-permute" in case[name] for name in ("ssd", "delta", "conv"))


def test_outputs_keep_the_inputs_dtype_and_states_are_float32(found):
    for name in ("ssd", "delta", "conv"):
        states = {} if name == "conv" else {f"{name} state": "float32"}
        assert found["traffic"][0][name]["dtypes"] == [{name: "bfloat16"}, states]


@pytest.mark.slow
def test_random_meshes_blocks_and_mixtures(seed):
    """Of each kind of mesh one, and many mixtures in its program."""
    rng = np.random.default_rng(seed)
    few, many, stretches = (int(rng.integers(*of)) for of in ((1, 5), (5, 9), (1, 9)))
    blocks = rng.integers(1, 10, 3).tolist()
    shapes = ([few], [many], [4, 2])
    cases = [
        {"shape": shape, "block": block, "rounds": 6, "seed": seed} for shape, block in zip(shapes, blocks)
    ]
    check(simulated([*cases, {"shape": [stretches], "block": 0, "rounds": 16, "seed": seed}], [])["cases"])


@pytest.mark.nightly
def test_all_numbers_of_workers(seed):
    rng = np.random.default_rng(seed)
    cases = [
        {"shape": [workers], "block": int(rng.integers(1, 10)), "rounds": 4, "seed": seed}
        for workers in range(1, 9)
    ]
    cases += [{"shape": [4, 2], "block": 4, "rounds": 4, "seed": seed}]
    cases += [{"shape": [workers], "block": 0, "rounds": 12, "seed": seed} for workers in (1, 2, 3, 5, 8)]
    check(simulated(cases, [])["cases"])


@pytest.mark.parametrize(
    ("workers", "heads", "keys", "values", "groups"),
    [(8, 32, 128, 128, 1), (8, 12, 96, 256, 2), (64, 32, 128, 128, 2), (4, 2, 8, 8, 2), (16, 1, 4, 3, 3)],
)
def test_columns_are_cut_where_heads_do_not_fill_the_workers(workers, heads, keys, values, groups):
    assert column_groups(workers, heads, keys, values) == groups


@pytest.mark.parametrize("name", ["segment_ids", "initial_state", "num_segments"])
def test_documents_are_the_plans_and_not_the_callers(name):
    """Options of the op go through, but not those that say what is a document."""
    lanes = make_lanes(make_plan([5, 9], PlanConfig(1, block=4)))
    slots = lanes.segment_ids.shape[1] - lanes.moved.shape[1]
    x, kernel = jnp.ones((slots, 4, 2)), jnp.ones((3, 2))
    rates, heads = jnp.ones(2), x[..., None, :]
    calls = (
        lambda **given: ssd(x[..., None], x, -rates, heads, heads, **given),
        lambda **given: gated_delta(heads, heads, heads, x[..., :1], x[..., :1], **given),
        lambda **given: causal_conv(x, kernel, **given),
        lambda **given: dynamic_conv(x, jnp.ones((*x.shape[:2], 3, 2)), **given),
    )
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("context",))
    for call in calls:

        def run(lanes, call=call, **given):
            call(lanes=lanes, axis="context", implementation="xla", **given)
            return lanes.after

        specs = {"in_specs": (lane_specs("context"),), "out_specs": jax.P(), "check_vma": False}
        jax.eval_shape(jax.shard_map(run, mesh=mesh, **specs), lanes)
        with pytest.raises(TypeError, match=f"multiple values for .*{name}"):
            jax.eval_shape(jax.shard_map(partial(run, **{name: 1}), mesh=mesh, **specs), lanes)
