"""Rules of the simulator's accounts, each broken on purpose: the sums of a hand must notice."""

from dataclasses import replace

import numpy as np
import pytest

from parallel.context import passes
from parallel.context import simulate as simulator
from parallel.context.blocks import Blocks
from parallel.context.costs import AttentionShape, Costs
from parallel.context.simulate import System, plan_for, simulate, simulate_plan

SHAPE = AttentionShape(heads=8, kv_heads=2, head_dim=16)
# Every kernel at 3e12 FLOP/s while keys travel; a block of 512 tokens crosses the network in 200 us.
COSTS = Costs(
    peak=4e12, kernel_best=1.0, kernel_tokens=1e-3, copy_share=0.25, node=1, network=512 * 128 / 200e-6,
    nvlink=1e12, network_latency=0.0, nvlink_latency=0.0,
)  # fmt: skip
TRANSFER = 200e-6
FULL, DIAGONAL = (pairs * 512 / 3e12 for pairs in (512 * 512, 512 * 513 / 2))


def check_two_blocks():
    """A document's first block on worker 0, its second on worker 1, which attends both."""
    plan = plan_for(np.array([1024]), 2, "ring", COSTS, 512)
    forward, backward, both = (
        simulate_plan(plan, "ring", SHAPE, COSTS, passes=way) for way in ("forward", "backward", "both")
    )
    assert forward.seconds == pytest.approx(max(DIAGONAL, TRANSFER) + FULL)
    # Half of the own work, then the keys, then the gradients on their way home beside the rest; half of a link for each.
    half = 1.25 * DIAGONAL
    assert backward.seconds == pytest.approx(2 * max(half, 2 * TRANSFER) + 2.5 * FULL)
    assert both.seconds == pytest.approx(forward.seconds + backward.seconds)
    busiest = DIAGONAL + FULL
    assert forward.balance == pytest.approx((DIAGONAL + busiest) / 2 / busiest)
    assert forward.received == pytest.approx(512 * 128 / 2)
    assert backward.received == pytest.approx(512 * 128)


def check_one_worker():
    """Nothing travels, and kernels have all of the machine."""
    result = simulate(np.array([512]), 1, "ring", SHAPE, COSTS, block=512, passes="both")
    assert result.seconds == pytest.approx(3.5 * DIAGONAL * 0.75)


def check_reshuffle():
    """Exposed, it takes what the busiest link takes for what has to leave or come."""
    plan = plan_for(np.array([2048, 512, 512, 1024]), 4, "fcp", COSTS, 512)
    blocks, owner = plan.blocks, plan.placement.worker
    home = np.repeat(np.arange(4), 2)
    away = home != owner
    assert away.any() and (blocks.length == 512).all()
    busiest = max(np.bincount(home[away]).max(), np.bincount(owner[away]).max())
    token = (2 * 8 * 16 * 2 + 128) / 128
    for way in ("forward", "backward"):
        exposed, none = (
            simulate_plan(plan, "fcp", SHAPE, COSTS, System(reshuffle=mode), way).seconds
            for mode in ("exposed", "none")
        )
        assert exposed - none == pytest.approx(busiest * TRANSFER * token)


CHECKS = (check_two_blocks, check_one_worker, check_reshuffle)


def test_a_hand_comes_to_the_same():
    for check in CHECKS:
        check()


def patched_steps(change):
    """``steps_of`` whose result is changed."""
    made = passes.steps_of
    return lambda *args, **more: change(made(*args, **more))


def without(steps, gone):
    names = ("step", "sender", "receiver", "seconds", "latency", "size", "after")
    return replace(steps, **{name: getattr(steps, name)[~gone] for name in names})


def evened_out(spread):
    """Every worker with the mean of all work."""
    work = simulator_work_of(spread)
    count, workers = len(work.worker), spread.workers
    return replace(
        work,
        worker=np.tile(np.arange(workers), count),
        step=np.repeat(work.step, workers),
        tokens=np.repeat(work.tokens, workers),
        pairs=np.repeat(work.pairs, workers) / workers,
    )


simulator_work_of = simulator.work_of

PLANTED = {
    "a link takes twice as long": (
        passes, "steps_of", patched_steps(lambda s: replace(s, seconds=2 * s.seconds)),
    ),
    "gradients are never sent": (
        passes, "steps_of", patched_steps(lambda s: without(s, s.after >= 0)),
    ),
    "gradients are sent before they are there": (
        passes, "steps_of", patched_steps(lambda s: replace(s, after=np.minimum(s.after, -1))),
    ),
    "keys are there in backward": (
        passes, "steps_of", patched_steps(lambda s: without(s, s.after < 0) if (s.after >= 0).any() else s),
    ),
    "keys come at once": (passes, "steps_of", patched_steps(lambda s: replace(s, seconds=0 * s.seconds))),
    "gradients are not counted": (passes, "received_bytes", lambda s, w, h, k=False: 512.0 * h.kv_bytes),
    "all workers are equally busy": (simulator, "work_of", evened_out),
    "no reshuffle": (simulator, "_reshuffle", lambda *args: passes.STAY),
    "outputs are not brought back": (
        simulator, "_reshuffle", lambda *args, made=simulator._reshuffle: made(*args)._replace(back=0.0),
    ),
    "backward computes as much as forward": (AttentionShape, "flops", lambda self, way: self.pair_flops),
    "copies cost no multiprocessors": (
        Costs, "rate", lambda self, tokens, copying, made=Costs.rate: made(self, tokens, False),
    ),
    "copies always cost multiprocessors": (
        Costs, "rate", lambda self, tokens, copying, made=Costs.rate: made(self, tokens, True),
    ),
    "all links are inside a node": (
        Costs, "crossing", lambda self, sender, receiver: np.zeros(len(sender), bool),
    ),
    "masked pairs are work": (Blocks, "own", property(lambda self: self.length**2)),
    "half of the pairs with other blocks are forgotten": (
        Blocks, "seen", lambda self, query, key: np.full(len(query), 512 * 256),
    ),
}  # fmt: skip


@pytest.mark.parametrize("error", PLANTED)
def test_an_error_in_the_accounts_is_noticed(error, monkeypatch):
    where, name, wrong = PLANTED[error]
    monkeypatch.setattr(where, name, wrong)
    noticed = 0
    for check in CHECKS:
        try:
            check()
        except AssertionError:
            noticed += 1
    assert noticed
