"""The check of the simulator's computing part: its kernels are all of attention, its fit finds a curve that is there."""

import json
from dataclasses import replace

import numpy as np
import pytest

from experiments.bench import _fcp_cpu, fcp_compute
from parallel.context import PlanConfig, make_plan
from parallel.context.costs import Costs
from parallel.context.rivals import causal_pairs


@pytest.mark.parametrize("kind", fcp_compute.KINDS)
def test_kernels_are_all_of_attention(kind):
    lengths = np.array(fcp_compute.DOCUMENTS) * fcp_compute.BLOCK
    plan = make_plan(lengths, PlanConfig(fcp_compute.WORKERS, fcp_compute.BLOCK, kind))
    work = fcp_compute.kernels(plan, kind)
    each = np.array([sum(pairs for _, _, pairs in of) for of in work])
    assert each.sum() == causal_pairs(lengths).sum()
    np.testing.assert_array_equal(each, np.bincount(plan.placement.worker, plan.blocks.work))
    # What has no masked part is all of its queries against all of its keys.
    assert all(pairs <= queries * keys for of in work for queries, keys, pairs in of)


def test_the_fit_finds_a_curve_that_is_there():
    true = replace(Costs(), peak=2e11, kernel_best=1.0, kernel_tokens=300.0)
    shape = fcp_compute.SHAPE
    squares = {n: _fcp_cpu.square(n) for n in fcp_compute.CALIBRATED}
    seconds = {n: _fcp_cpu.predicted(kernel, true, shape) for n, kernel in squares.items()}
    found = _fcp_cpu.fitted(seconds, shape)
    assert found.peak == pytest.approx(2e11, rel=0.02)
    assert found.kernel_tokens == pytest.approx(300, rel=0.05)


@pytest.mark.slow
def test_predictions_are_written_before_anything_is_timed(tmp_path, monkeypatch):
    out = tmp_path / "fcp_compute.json"
    calls = []

    def timed(wanted, repeats):
        calls.append(json.loads(out.read_text()) if out.exists() else None)
        return {kernel: _fcp_cpu.predicted(kernel, Costs(), fcp_compute.SHAPE) for kernel in wanted}

    monkeypatch.setattr(fcp_compute, "measured", timed)
    assert fcp_compute.main(["--quick", "--out", str(out)]) == 0
    assert calls[0] is None and "measured" not in calls[1]["over_fcp"]["ring"]
    report = json.loads(out.read_text())
    assert report["over_fcp"]["ring"]["error"] == pytest.approx(0, abs=0.02)
