"""Start-up of several processes: what each launcher leaves in the environment, and runs of real processes."""

import os
import pathlib
import socket
import subprocess
import sys
import tempfile

import numpy as np
import pytest

from parallel.distributed import Launch, LaunchError, agreed, find_launch, start

HERE = pathlib.Path(__file__).parent
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
PLAIN = {"JAX_COORDINATOR_ADDRESS": "node0:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
TORCHRUN = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500", "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
MPI = {"PMI_SIZE": "4", "PMI_RANK": "3", "JAX_COORDINATOR_ADDRESS": "node0:1234"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}

FOUND = {
    "alone": ({}, None),
    "slurm": (SLURM, Launch("SLURM", detection="slurm")),
    "slurm, one task": ({**SLURM, "SLURM_NTASKS": "1"}, None),
    "slurm, batch script without srun": ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, None),
    "slurm, given address": (
        {**SLURM, "JAX_COORDINATOR_ADDRESS": "node9:1"},
        Launch("SLURM", "node9:1", detection="slurm"),
    ),
    "plain, per host": (PLAIN, Launch("plain variables", "node0:1234", 4, 3)),
    "plain, per accelerator": (
        {**PLAIN, "JAX_LOCAL_PROCESS_ID": "1"},
        Launch("plain variables", "node0:1234", 4, 3, (1,)),
    ),
    "torchrun": (TORCHRUN, Launch("torchrun", "node0:29500", 4, 3, (1,))),
    "mpirun of Open MPI": ({**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "x"}, Launch("Open MPI", detection="ompi")),
    "Open MPI, given address": (
        {**OPEN_MPI, "JAX_COORDINATOR_ADDRESS": "node0:1"},
        Launch("Open MPI", "node0:1", 4, 3, (1,)),
    ),
    "MPICH": (MPI, Launch("MPI", "node0:1234", 4, 3)),
    "kubernetes": (KUBERNETES, Launch("Kubernetes", detection="k8s")),
    "kubernetes, a pod of no job": ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
}
REFUSED = {
    "SLURM_STEP_NODELIST and SLURM_LOCALID missing": {
        k: v for k, v in SLURM.items() if k not in ("SLURM_STEP_NODELIST", "SLURM_LOCALID")
    },
    "JAX_PROCESS_ID missing": {k: v for k, v in PLAIN.items() if k != "JAX_PROCESS_ID"},
    "JAX_NUM_PROCESSES missing": {k: v for k, v in PLAIN.items() if k != "JAX_NUM_PROCESSES"},
    "JAX_COORDINATOR_ADDRESS missing": {k: v for k, v in PLAIN.items() if k != "JAX_COORDINATOR_ADDRESS"},
    "JAX_COORDINATOR_ADDRESS missing: Open MPI": OPEN_MPI,
    "JAX_COORDINATOR_ADDRESS='node0': must be HOST:PORT": {**PLAIN, "JAX_COORDINATOR_ADDRESS": "node0"},
    "JAX_PROCESS_ID=4: must be below JAX_NUM_PROCESSES=4": {**PLAIN, "JAX_PROCESS_ID": "4"},
    "JAX_NUM_PROCESSES='four': must be a whole number": {**PLAIN, "JAX_NUM_PROCESSES": "four"},
    "MASTER_PORT missing": {k: v for k, v in TORCHRUN.items() if k != "MASTER_PORT"},
}


@pytest.mark.parametrize("name", FOUND)
def test_launchers_are_told_apart(name):
    environment, expected = FOUND[name]
    assert find_launch(environment) == expected


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_missing_is_named(words):
    with pytest.raises(LaunchError) as error:
        find_launch(REFUSED[words])
    assert words in str(error.value)


def test_a_single_process_starts_nothing():
    assert start({}) is None
    assert agreed(3, 4) == (3, 4)


def processes(
    count: int, mesh: str, steps: int, pattern: str = "*-", *data: str
) -> tuple[list[float], set[str], list[int]]:
    """Of ``count`` processes that train together, a device each: losses, the sums of their states, and tokens that each
    has read of ``data``.
    """
    root = HERE.parent.parent
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    common = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)]),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=1 {quick}",
        "JAX_PLATFORMS": "cpu",
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            str(HERE / "distributed_worker.py"),
            mesh,
            str(steps),
            folder,
            pattern,
            *data,
        ]
        started = []
        for rank in range(count):
            plain = {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(rank),
            }
            environment = common | (plain if count > 1 else {})
            started.append(
                subprocess.Popen(
                    command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
            )
        try:
            outputs = [process.communicate(timeout=1500)[0] for process in started]
        finally:
            for process in started:
                process.kill()
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    lines = [line.split() for output in outputs for line in output.splitlines()]
    losses = [[float(word) for word in line[1:]] for line in lines if line[:1] == ["LOSSES"]]
    states = {line[1] for line in lines if line[:1] == ["STATE"]}
    assert len(losses) == count and all(each == losses[0] for each in losses)
    return losses[0], states, [int(line[1]) for line in lines if line[:1] == ["READ"]]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp=2", "tensor=2"])
def test_two_processes_train_as_one(mesh):
    alone, _, _ = processes(1, "data=1", 4)
    together, states, _ = processes(2, mesh, 4)
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert len(states) == 1


@pytest.mark.slow
def test_two_processes_share_documents_and_read_their_own_tokens():
    """Keys, states and halos go from one process to the other; the losses are those of one that has whole rows."""
    alone, _, (whole,) = processes(1, "data=1", 4, "M*", "packed")
    together, states, read = processes(2, "context=2", 4, "M*", "packed")
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert len(states) == 1
    # Each its slots of four batches and of those that it may have begun ahead of the end; never all of a batch.
    assert max(read) < 0.6 * sum(read) and sum(read) < 1.6 * whole


@pytest.mark.nightly
@pytest.mark.parametrize("mesh", ["data=4", "data=2,fsdp=2"])
def test_four_processes_train_a_hybrid_for_fifty_steps_as_one(mesh):
    alone, (state,), _ = processes(1, "data=1", 50, "M*-")
    together, (shared,), _ = processes(4, mesh, 50, "M*-")
    assert len(alone) == 50
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    # Random tokens cannot be learnt, so that losses alone would not tell much of what the steps did.
    np.testing.assert_allclose(float(shared), float(state), rtol=1e-5)
