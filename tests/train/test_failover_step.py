"""The step of a run that has lost workers: ``failover_worker.py`` on simulated devices, in a process of its own."""

import os
import pathlib
import subprocess
import sys

import pytest

from jaxllm.config import ConfigError, MTPConfig
from jaxllm.train.failover import FailoverSettings, failover_plan, make_failover_step
from jaxllm.train.step import StepSettings
from parallel.mesh import MeshShape, abstract_mesh
from parallel.sharding import Placement
from tests.train.sharded_worker import model
from tests.train.tiny import constant_lr

HERE = pathlib.Path(__file__).parent


def worker(*arguments: str, optimise: bool = False) -> str:
    """What the worker printed; what runs once is compiled quickly unless it is to ``optimise``."""
    quick = "" if optimise else " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    root = HERE.parent.parent
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8" + quick,
        "NPROC": "32",
    }
    command = [sys.executable, str(HERE / "failover_worker.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


def test_exact_is_bit_for_bit_the_undisturbed_run():
    assert worker("exact", "-", "1", "30,2,1").count("EXACT") == 1


@pytest.mark.slow
def test_exact_for_every_number_of_workers():
    patterns = "0,12,3", "2301"
    assert worker("exact", "M-", "1", *patterns, optimise=True).count("EXACT") == len(patterns)


@pytest.mark.nightly
@pytest.mark.parametrize("pattern", ["GE", "JW"])
def test_exact_for_every_letter(pattern):
    assert worker("exact", pattern, "2", "1,02,3", "12,30", optimise=True).count("EXACT") == 2


@pytest.mark.slow
def test_means_are_of_those_who_have_a_gradient():
    assert worker("average", "*-", "skip", "0,12,3", "30,12").count("AVERAGE") == 2


@pytest.mark.nightly
def test_means_of_every_letter():
    for pattern, rule in (("M*-E", "skip"), ("GJ-", "low_rank")):
        assert worker("average", pattern, rule, "0,12,3", "30,12").count("AVERAGE") == 2


@pytest.mark.nightly
def test_what_nobody_learns_from_stays_as_it_is():
    assert worker("untouched", "*-", "10,23", "30,21").count("UNTOUCHED") == 2


@pytest.mark.nightly
def test_all_of_the_rank_and_nothing_skipped_trains_as_exact():
    assert "ALL" in worker("all", "*-", "0,12,3")


@pytest.mark.parametrize("method", ["mecefo", pytest.param("exact", marks=pytest.mark.slow)])
def test_programs_of_smaller_worlds_are_found_in_the_cache(method):
    assert "FORESEEN" in worker("foreseen", method)


@pytest.mark.slow
def test_dropped_shards_are_not_there():
    assert "DROP" in worker("drop", "-", "0,21,3")


def test_other_axes_and_objectives_of_whole_batches_are_refused():
    def make(cfg, shape, **settings):
        place = Placement(abstract_mesh(MeshShape(**shape)))
        return make_failover_step(cfg, constant_lr(), StepSettings(**settings), None, place)

    with pytest.raises(ConfigError, match=r"mesh.fsdp=2: a lost worker's share of it has no second owner"):
        make(model("*-"), dict(data=2, fsdp=2))
    with pytest.raises(ConfigError, match=r"mtp=.*is of the whole batch"):
        make(model("*-", mtp=MTPConfig("*-")), dict(data=2))
    with pytest.raises(ConfigError, match=r"balance_scope='batch'.*choose sequence"):
        make(model("*E"), dict(data=2), balance_scope="batch")


def test_plans_name_what_is_wrong_with_them():
    assert failover_plan(((1, 0), (2,)), 2).shards.tolist() == [[1, 0], [2, -1]]
    with pytest.raises(ValueError, match="a shard stands there twice"):
        failover_plan(((1, 0), (0,)), 2)
    with pytest.raises(ValueError, match=r"1 to slots=2"):
        failover_plan(((1, 0, 2), (3,)), 2)
    with pytest.raises(ConfigError, match=r"failover.method='quick'"):
        FailoverSettings(method="quick")


def test_dropping_leaves_every_worker_its_own_shard():
    assert FailoverSettings("drop").jobs(((2, 1), (3, 0))) == ((2,), (3,))
    assert FailoverSettings("exact").jobs(((2, 1), (3, 0))) == ((2, 1), (3, 0))
