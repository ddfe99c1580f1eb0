"""Pipelines that have lost devices: ``chained_worker.py`` on simulated devices, in a process of its own."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxllm.config import ConfigError
from jaxllm.train.chained import ChainPlan, _check_plan, make_chained_step, move_state
from jaxllm.train.failover import FailoverSettings
from jaxllm.train.state import init_state
from parallel.failover.assignment import assign_stages
from parallel.failover.chains import chain
from parallel.mesh import MeshShape, abstract_mesh
from parallel.sharding import Placement
from tests.train.sharded_worker import model
from tests.train.tiny import assert_identical, constant_lr, tiny_config

HERE = pathlib.Path(__file__).parent


def worker(*arguments: str) -> str:
    """What the worker printed; its programs run a few times, and are compiled quickly."""
    root = HERE.parent.parent
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 " + flags,
        "NPROC": "32",
    }
    command = [sys.executable, str(HERE / "chained_worker.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_a_run_that_loses_a_stage_trains_on_and_takes_it_back():
    assert "RUN" in worker("run", "none", "02", "13", "none")


@pytest.mark.slow
def test_cheaper_gradients_are_those_of_the_formula():
    assert worker("formula", "mecefo", "02").count("FORMULA") == 1


@pytest.mark.nightly
def test_gradients_in_full_are_those_of_one_device():
    assert worker("formula", "exact", "none", "02", "10", "03,12", "00,03", "10,11").count("FORMULA") == 6


@pytest.mark.nightly
def test_cheaper_gradients_with_several_lost():
    # Replica 1 without two stages at its end is dropped; both replicas' stage 2 is cheap: nobody has its attention.
    patterns = "10", "12,03", "02,12", "10,11", "01,03"
    assert worker("formula", "mecefo", *patterns).count("FORMULA") == len(patterns)


def test_states_move_to_slots_and_back():
    cfg = tiny_config("*-*-*-*-", scan_layers=True)
    state = init_state(cfg, constant_lr())
    live = [(0, 0), (0, 1), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)]
    stages = chain(assign_stages(2, 4, live)).stages
    canonical = np.arange(4)[:, None]
    slots = move_state(state, canonical, stages)
    assert_identical(move_state(slots, stages, canonical), state)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(slots.params["groups"])} == {stages.size}


def test_what_has_no_failover_is_refused():
    def make(cfg, shape, stages=2, **failover):
        place = Placement(abstract_mesh(MeshShape(**shape)))
        return make_chained_step(
            cfg, constant_lr(), None, FailoverSettings(**failover), place=place, stages=stages
        )

    cfg = tiny_config("*-*-", scan_layers=True)
    with pytest.raises(ConfigError, match=r"mesh.stage=2: the living devices stand along data"):
        make(cfg, dict(stage=2))
    with pytest.raises(ConfigError, match=r"stages=1: a pipeline has 2 or more"):
        make(cfg, dict(data=2), 1)
    with pytest.raises(ConfigError, match=r"set model.scan_layers to true"):
        make(tiny_config("*-*-"), dict(data=3))
    with pytest.raises(ConfigError, match=r"failover.method='drop'"):
        make(cfg, dict(data=3), method="drop")
    with pytest.raises(ConfigError, match=r"pipelines with experts have no failover"):
        make(model("*E*E", scan_layers=True), dict(data=3))


def test_plans_name_what_is_wrong_with_them():
    place = Placement(abstract_mesh(MeshShape(data=2)))
    plan = ChainPlan(chain(assign_stages(1, 4, [(0, 0), (0, 1), (0, 3)])))
    with pytest.raises(ValueError, match=r"plan.failover.bases: of 0 weights; this method needs those of 3"):
        _check_plan(plan, place, {"a": 1, "b": 1, "c": 1})
    with pytest.raises(ValueError, match=r"plan.failover.chains: of 3 devices; the mesh has data=2"):
        _check_plan(plan, place, {})
