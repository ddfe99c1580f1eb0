"""The kernel benchmark: its GPU path on interpreted kernels, and what it says where there is nothing to measure."""

import dataclasses

import pytest

from experiments.bench import _kernels_gpu, kernels
from pallas_kernels import compat
from tests.kernels.proof import scaled

CASE = dataclasses.replace(scaled.CASES[1], flops=2e6, bytes_moved=1e6)


def test_the_bound_is_the_slower_of_products_and_bytes():
    reached = {"flops_per_s": 1e9, "bytes_per_s": 1e8}
    assert _kernels_gpu.least(CASE, reached) == pytest.approx(1e-2)
    assert _kernels_gpu.least(dataclasses.replace(CASE, bytes_moved=None), reached) == pytest.approx(2e-3)
    assert _kernels_gpu.least(scaled.CASES[1], reached) is None


def test_cases_are_timed_beside_their_peers(monkeypatch):
    monkeypatch.setattr(_kernels_gpu, "bounds", lambda repeats: {"flops_per_s": 1e9, "bytes_per_s": 1e9})
    shown = []
    with compat.interpreted():
        report = _kernels_gpu.run([CASE], 1, shown.append)
    (result,) = report["results"]
    assert shown == [result] and result["implementation"] == "triton"
    assert result["seconds"] > 0 and result["peers"]["xla"] > 0
    assert result["bound_share"] == pytest.approx(2e-3 / result["seconds"])


def test_a_peer_that_cannot_run_says_why():
    case = dataclasses.replace(CASE, op="attention", options={"soft_cap": 3.0})
    found = _kernels_gpu.peers(case)
    assert found["cuDNN, causal by row"] == "no cuDNN is installed"
    assert isinstance(found["torch SDPA"], str)


def test_what_a_device_reaches_is_measured():
    found = _kernels_gpu.bounds(1, size=64, megabytes=1)
    assert found["flops_per_s"] > 0 and found["bytes_per_s"] > 0


def test_without_a_gpu_or_a_case_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(kernels, "matmul_gflops", lambda *_: 1.0)
    assert kernels.main(["--device", "gpu", "--quick"]) == 2
    assert kernels.main(["--op", "nothing", "--quick"]) == 2
    shown = capsys.readouterr().out
    assert "no kernel is made for this device (cpu)" in shown and "no case of 'nothing'" in shown


def test_one_op_on_the_cpu(capsys, monkeypatch):
    monkeypatch.setattr(kernels, "matmul_gflops", lambda *_: 1.0)
    monkeypatch.setattr(kernels, "seconds", lambda *_, repeats: 1.0)
    assert kernels.main(["--op", "causal_conv", "--quick"]) == 0
    shown = capsys.readouterr().out
    assert "conv B4" in shown and "attention" not in shown
