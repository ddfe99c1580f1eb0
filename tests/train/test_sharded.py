"""Training that 8 simulated devices share equals training on one: ``sharded_worker.py`` in a process of its own."""

import os
import pathlib
import random
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
        # As the command line has it: several collectives of a device at once, each with a thread.
        "NPROC": str(4 * devices),
    }
    command = [sys.executable, str(HERE / "sharded_worker.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


def test_experts_elsewhere_lose_no_row():
    assert worker("experts").count("EXACT") == 6


def test_a_step_on_three_axes_equals_one_device():
    assert worker("gradients", "*-E", "fsdp=2,tensor=2,expert=2").count("EQUAL") == 1


def test_documents_on_several_devices_equal_one():
    assert worker("context", "M*", "fcp", "fsdp=2,context=2").count("EQUAL") == 1


def test_a_run_that_shares_documents_goes_as_on_one_device():
    assert "SHARED" in worker("context_training")


def test_runs_go_alike_and_checkpoints_move_between_meshes():
    assert "RESUMED" in worker("training")


def test_a_run_in_stages_goes_as_on_one_device():
    assert "STAGED" in worker("stage_training")


def test_a_device_holds_its_share():
    assert worker("memory").count("SHARE") == 2


@pytest.mark.slow
def test_all_tokens_of_one_expert_lose_none():
    assert "DROPLESS" in worker("overflow")


@pytest.mark.slow
@pytest.mark.parametrize("letter", "MGJ*W-E")
def test_every_letter_on_several_axes(letter):
    meshes = "tensor=4", "data=2,fsdp=2,tensor=2", *(("data=2,expert=4",) if letter == "E" else ())
    assert worker("gradients", letter, *meshes).count("EQUAL") == len(meshes)


@pytest.mark.nightly
@pytest.mark.parametrize("letter", "MGJ*W-E")
def test_every_letter_on_every_axis(letter):
    experts = "expert=2", "fsdp=2,tensor=2,expert=2"
    meshes = "data=2", "fsdp=2", "tensor=2", *(experts if letter == "E" else ())
    assert worker("gradients", letter, *meshes).count("EQUAL") == len(meshes)


STRATEGIES = ("fcp-pairs", "ring", "zigzag", "document", "ulysses")


@pytest.mark.slow
def test_documents_on_several_devices_for_every_strategy():
    assert worker("context", "M*", ",".join(STRATEGIES), "context=2").count("EQUAL") == len(STRATEGIES)


@pytest.mark.slow
def test_documents_on_several_devices_for_other_letters():
    assert worker("context", "GJW-", "fcp", "context=2").count("EQUAL") == 1


@pytest.mark.nightly
@pytest.mark.parametrize("letters", ["M*WE-", "GJ"])
def test_documents_on_many_devices_for_every_strategy(letters):
    meshes = "context=2", "fsdp=2,context=4"
    strategies = "fcp", *(name for name in STRATEGIES if name != "ulysses" or letters == "GJ")
    assert worker("context", letters, ",".join(strategies), *meshes).count("EQUAL") == 2 * len(strategies)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prediction", "stacked"])
def test_options_of_a_step_that_shares_documents(kind):
    assert worker("context_options", kind, "fsdp=2,context=2").count("EQUAL") == 1


@pytest.mark.nightly
def test_balance_over_a_batch_that_shares_documents():
    assert worker("context_options", "balance", "fsdp=2,context=2").count("EQUAL") == 1


@pytest.mark.slow
def test_documents_on_products_of_axes():
    meshes = "data=2,context=2,tensor=2", "context=4,expert=2"
    assert worker("context", "M*GE", "fcp", *meshes).count("EQUAL") == 2


PRODUCTS = (
    "data=2,context=2,tensor=2",
    "fsdp=2,context=2,tensor=2",
    "fsdp=2,context=2,expert=2",
    "context=2,tensor=2,expert=2",
    "data=2,fsdp=2,context=2",
    "context=4,tensor=2",
    "context=4,expert=2",
)


@pytest.mark.slow
def test_documents_on_a_drawn_product_of_axes(seed):
    """Of the strategies and products that :func:`test_documents_on_products_of_axes_for_every_strategy` has all of."""
    rng = random.Random(seed)
    letters, strategy, mesh = (
        rng.choice(["M*E", "GW-", "J*-"]),
        rng.choice(["fcp", *STRATEGIES]),
        rng.choice(PRODUCTS),
    )
    if "E" not in letters:
        mesh = mesh.replace("expert", "data")
    assert worker("context", letters, strategy, mesh).count("EQUAL") == 1


@pytest.mark.nightly
@pytest.mark.parametrize("mesh", PRODUCTS)
def test_documents_on_products_of_axes_for_every_strategy(mesh):
    strategies = "fcp", *STRATEGIES
    assert worker("context", "M*E", ",".join(strategies), mesh).count("EQUAL") == len(strategies)


@pytest.mark.slow
def test_validation_that_devices_share():
    meshes = "context=2", "fsdp=2,context=2,expert=2", "fsdp=2,tensor=2"
    assert worker("validation", *meshes).count("SCORED") == len(meshes)


@pytest.mark.parametrize(
    ("motif", "meshes"),
    [
        pytest.param("*-", ("stage=2", "data=2,stage=4"), marks=pytest.mark.nightly),
        pytest.param("ME", ("fsdp=2,stage=2", "tensor=2,expert=2,stage=2"), marks=pytest.mark.slow),
        pytest.param("ME", ("data=2,tensor=2,stage=2", "expert=2,stage=2"), marks=pytest.mark.nightly),
    ],
)
def test_layers_in_stages(motif, meshes):
    assert worker("stages", motif, *meshes).count("EQUAL") == 2 * len(meshes)


@pytest.mark.slow
def test_a_hybrid_on_products():
    assert worker("gradients", "M*GJWE-", "fsdp=2,tensor=2,expert=2", "data=8").count("EQUAL") == 2


@pytest.mark.slow
def test_options_of_a_step():
    assert worker("options", "fsdp=2,tensor=2,expert=2", "data=2,fsdp=2").count("EQUAL") == 4
