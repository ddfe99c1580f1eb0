"""Training that 8 simulated devices share equals training on one: ``sharded_worker.py`` in a process of its own."""

import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent


def worker(*arguments: str, devices: int = 8) -> str:
    """What the worker printed."""
    root = HERE.parent.parent
    # These programs run once: compiling them costs more than running them.
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)]),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {quick}",
    }
    command = [sys.executable, str(HERE / "sharded_worker.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


def test_experts_elsewhere_lose_no_row():
    assert worker("experts").count("EXACT") == 6


def test_a_step_on_three_axes_equals_one_device():
    assert worker("gradients", "*-E", "fsdp=2,tensor=2,expert=2").count("EQUAL") == 1


def test_runs_go_alike_and_checkpoints_move_between_meshes():
    assert "RESUMED" in worker("training")


def test_a_device_holds_its_share():
    assert worker("memory").count("SHARE") == 2


@pytest.mark.slow
def test_all_tokens_of_one_expert_lose_none():
    assert "DROPLESS" in worker("overflow")


MESHES = ("data=2", "fsdp=2", "tensor=2", "tensor=4", "data=2,fsdp=2,tensor=2")


@pytest.mark.slow
@pytest.mark.parametrize("letter", "MGJ*W-E")
def test_every_letter_on_every_axis(letter):
    meshes = (
        *MESHES,
        *(("expert=2", "fsdp=2,tensor=2,expert=2", "data=2,expert=4") if letter == "E" else ()),
    )
    assert worker("gradients", letter, *meshes).count("EQUAL") == len(meshes)


@pytest.mark.slow
def test_a_hybrid_on_products():
    assert worker("gradients", "M*GJWE-", "fsdp=2,tensor=2,expert=2", "data=8").count("EQUAL") == 2


@pytest.mark.slow
def test_options_of_a_step():
    assert worker("options", "fsdp=2,tensor=2,expert=2", "data=2,fsdp=2").count("EQUAL") == 4
