"""The check of the FCP simulator on two processes: what it predicts follows from the constants, and the bench runs."""

import json
from dataclasses import replace

import numpy as np
import pytest

from experiments.bench import fcp_pair
from experiments.bench._fcp_pair import (
    TILE,
    Machine,
    Phase,
    fitted_transfers,
    long_last,
    pair_plan,
    predict,
    shrunk,
    step_bytes,
    tiles,
    transfer_seconds,
    verdict,
)
from experiments.tables import parallel as tables
from pallas_kernels.attention import xla
from parallel.context import STRATEGIES
from parallel.context.costs import AttentionShape, Costs

SHAPE = AttentionShape(heads=2, kv_heads=1, head_dim=16, bytes=4, gradient_bytes=4)
BLOCK = 64
# Every pair of tokens takes as long as any other, whatever the chunk.
FLAT = replace(Costs(), peak=1e9, kernel_best=1.0, kernel_tokens=1e-6, copy_share=0.0)
PAIR = SHAPE.pair_flops / FLAT.peak


def machine(crowding: float = 1.0, bandwidth: float = 1e30, latency: float = 0.0) -> Machine:
    phase = Phase(FLAT, TILE[0] * TILE[1] * PAIR, crowding)
    return Machine(
        phase, replace(phase, costs=replace(FLAT, peak=1.25e9), tile=2 * phase.tile), bandwidth, latency
    )


def work(plan) -> np.ndarray:
    return np.bincount(plan.placement.worker, plan.blocks.work, 2)


LENGTHS = long_last(16 * BLOCK, BLOCK // 4)


@pytest.mark.parametrize("kind", STRATEGIES)
def test_with_a_flat_curve_the_busiest_worker_decides(kind):
    plan = pair_plan(LENGTHS, BLOCK, kind)
    found = predict(plan, kind, machine(), SHAPE)
    # Backward takes two and a half times the FLOPs at 1.25 times their speed.
    assert found["simulator"] == pytest.approx(3 * work(plan).max() * PAIR, rel=1e-6)
    assert found["transfers"] == pytest.approx(0, abs=1e-12)


def test_a_ring_on_a_long_last_document_is_slower_by_the_work_that_it_leaves_to_one():
    plans = {kind: pair_plan(LENGTHS, BLOCK, kind) for kind in ("fcp", "ring")}
    seconds = {kind: predict(plan, kind, machine(), SHAPE)["simulator"] for kind, plan in plans.items()}
    ratio = work(plans["ring"]).max() / work(plans["fcp"]).max()
    assert seconds["ring"] / seconds["fcp"] == pytest.approx(ratio) and ratio > 1.6


def test_a_crowded_machine_delays_by_what_the_idler_core_computes():
    plan = pair_plan(LENGTHS, BLOCK, "ring")
    quiet, crowded = (predict(plan, "ring", machine(c), SHAPE) for c in (1.0, 1.25))
    late = crowded["simulator"] - quiet["simulator"]
    assert late == pytest.approx(0.25 * 3 * work(plan).min() * PAIR, rel=1e-6)
    assert crowded["tiles"] > quiet["tiles"]


@pytest.mark.parametrize("kind", ["fcp", "ring", "zigzag"])
def test_transfers_are_three_times_the_blocks_that_move(kind):
    plan = pair_plan(LENGTHS, BLOCK, kind)
    slot = BLOCK * 2 * SHAPE.kv_heads * SHAPE.head_dim * 4
    most = max(np.bincount(plan.moves.receiver, minlength=2))
    assert most > 0
    # Both ways at once, so that the direction that carries more decides; up to the next of the numbers of rounds.
    assert 3 * most * slot <= step_bytes(plan, SHAPE) <= 3 * int(1.25 * most + 1) * slot
    slow = machine(bandwidth=1e6, latency=1e-3)
    seconds = transfer_seconds(plan, SHAPE, slow)
    assert seconds == pytest.approx(step_bytes(plan, SHAPE) / 1e6 + 6e-3)
    found = predict(plan, kind, slow, SHAPE)
    assert found["transfers"] == seconds and found["tiles"] > seconds


def test_tiles_are_those_that_some_pair_of_tokens_needs():
    assert TILE == (xla._BLOCK, xla._KEYS)
    block = 1024
    # Blocks 0 to 2 of one document; a slot of two, whose second half sees nothing of the first.
    plan = pair_plan(np.array([3 * block, 512, 512]), block, "ring")
    assert plan.placement.worker.tolist() == [0, 0, 1, 1, 1]
    own, other = 4 * 1 + 4 * 2, 8 * 2
    np.testing.assert_array_equal(tiles(plan), [2 * own + other, own + 2 * other + 8])
    small = pair_plan(np.array([600, 100]), 128, "ring")
    listed = small.arrays.work_start[:, -1]
    np.testing.assert_array_equal(tiles(small), listed)


def test_bandwidth_and_latency_are_found_in_exact_times():
    bandwidth, latency = fitted_transfers({size: 2e-4 + size / 3e9 for size in (2**16, 2**20, 2**24)})
    assert bandwidth == pytest.approx(3e9) and latency == pytest.approx(2e-4)
    with pytest.raises(ValueError, match="the more bytes"):
        fitted_transfers({2**16: 1.0, 2**20: 0.1})


def test_batches_hold_what_they_should():
    for size in (fcp_pair.FULL, fcp_pair.QUICK):
        for lengths in size.batches.values():
            assert lengths.sum() == 16 * size.block and lengths.min() >= 1
    assert long_last(4096, 64).max() == 3072
    np.testing.assert_array_equal(shrunk("log-normal", 4096, 3), shrunk("log-normal", 4096, 3))


def test_the_verdict_is_about_the_measured_ratio():
    assert verdict(1.14, 1.0)["verdict"] == "within 15%"
    assert verdict(0.8, 1.0) == {"error": pytest.approx(-0.2), "verdict": "short by 5.0%"}


@pytest.mark.slow
def test_two_processes_are_predicted_then_timed(tmp_path, monkeypatch):
    out = tmp_path / "fcp_pair.json"
    written, measure = [], fcp_pair.measure

    def before(two, size, batch):
        written.append(json.loads(out.read_text()))
        measure(two, size, batch)

    monkeypatch.setattr(fcp_pair, "measure", before)
    assert fcp_pair.main(["--quick", "--out", str(out)]) == 0
    assert "measured" not in written[0]["batches"]["long last"]["over_fcp"]["ring"]
    report = json.loads(out.read_text())
    for name, batch in report["batches"].items():
        # Constants and predictions stay what they were before the steps.
        first = written[0]["batches"][name]["over_fcp"]["ring"]
        assert batch["over_fcp"]["ring"].items() >= first.items()
        assert all(
            step["gradient_error"] < 1e-5 and step["loss_error"] < 1e-5 for step in batch["steps"].values()
        )
    assert "ring over fcp" in tables.fcp_pair(report)
