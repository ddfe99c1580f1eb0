"""Errors of gradients under failures: nothing where all is exact, what a projection leaves out, and the step's own mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _failover_gradients as experiment
from experiments.failover_quality import laid_out
from jaxllm import AttentionConfig, MLPConfig, ModelConfig
from jaxllm.batch import PackedBatch
from jaxllm.model.functional import flatten, init_params
from jaxllm.train.degraded import make_refresh
from jaxllm.train.failover import FailoverSettings, make_failover_step
from jaxllm.train.optim import OptimConfig
from jaxllm.train.state import TrainPlan, init_state
from jaxllm.train.step import StepSettings, gradients

WORKERS, LENGTH = 4, 8
# Worker 3 is dead, and worker 0 does its job beside its own.
JOBS = ((0, 3), (1,), (2,))
CFG = ModelConfig(
    32, 16, "*-", attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8), mlp=MLPConfig(24)
)
LOW = dict.fromkeys("*-", "low_rank")


@pytest.fixture(scope="module")
def params():
    return init_params(CFG, 3)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(5)
    tokens = rng.integers(CFG.vocab_size, size=(WORKERS, LENGTH + 1)).astype(np.int32)
    where = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (WORKERS, LENGTH))
    targets = tokens[:, 1:, None].copy()
    # Shards of different weight.
    targets[3, 2:] = -1
    return PackedBatch(
        tokens=tokens[:, :-1], segment_ids=np.ones_like(where), positions=where, targets=targets
    )


def gradient(params, batch, shards):
    """Of the summed objective of some shards, float64 by dotted path, and their weight."""
    rows = jax.tree.map(lambda x: jnp.asarray(x[np.array(shards)]), batch)
    grads, sums = jax.jit(lambda p, rows: gradients(CFG, p, rows, StepSettings()))(params, rows)
    return {name: np.asarray(x, np.float64) for name, x in flatten(grads).items()}, float(sums.weight)


def error(params, batch, failover, bases=None, jobs=JOBS):
    return experiment.relative_error(CFG, params, batch, WORKERS, jobs, failover, bases)


def test_the_error_of_a_gradient_is_none_where_all_rules_are_exact(params, batch):
    exact = FailoverSettings("mecefo", policy=dict.fromkeys("*-", "exact"))
    assert error(params, batch, exact, {}) < 1e-6
    assert error(params, batch, FailoverSettings("exact")) == 0
    # Nor where everybody lives.
    everybody = tuple((worker,) for worker in range(WORKERS))
    assert error(params, batch, FailoverSettings("mecefo"), jobs=everybody) == 0


def test_the_error_of_a_gradient_is_what_its_projection_leaves_out_and_falls_as_the_rank_rises(params, batch):
    """The sum over shards 0 and 3, less its part in the columns of V1, over the mean of all; by hand from one backward."""

    (cheap, _), (whole, weight) = gradient(params, batch, [0, 3]), gradient(params, batch, [0, 1, 2, 3])
    assert weight == 3 * LENGTH + 2
    size = np.sqrt(sum((each**2).sum() for each in whole.values()))
    found = []
    for rank in (1, 12, "full"):
        failover = FailoverSettings("mecefo", policy=LOW, rank=rank)
        bases = make_refresh(CFG, LOW, rank)(params, None)
        assert len(bases) == 6
        lost = 0.0
        for name, v1 in bases.items():
            v1 = np.asarray(v1, np.float64)
            lost += ((cheap[name] - v1 @ (v1.T @ cheap[name])) ** 2).sum()
        found.append(error(params, batch, failover, bases))
        assert found[-1] == pytest.approx(np.sqrt(lost) / size, rel=1e-4, abs=1e-6)
    assert 1 > found[0] > found[1] > 1e-3 > found[2]


def test_the_error_of_a_gradient_without_the_dead_worker_is_that_of_the_others_mean(params, batch):
    jobs = tuple(own[:1] for own in JOBS)
    given, true = experiment.mean_gradients(CFG, params, batch, WORKERS, jobs, FailoverSettings("drop"))
    grads, weight = gradient(params, batch, [0, 1, 2])
    for name, each in grads.items():
        np.testing.assert_allclose(given[name], each / weight, rtol=1e-4, atol=1e-7)
    assert 0.05 < error(params, batch, FailoverSettings("drop"), jobs=jobs) < 1
    assert set(true) == set(given)


@pytest.mark.slow
def test_the_mean_is_that_of_the_step(batch):
    """Attention skipped, the MLP of rank 2: the norm that the step reports."""
    optim = OptimConfig(lr=1e-3, warmup_steps=1, total_steps=9, clip_norm=None)
    state, failover = init_state(CFG, optim, 3), FailoverSettings("mecefo", rank=2)
    bases = failover.make_bases(CFG)(state.params, None)
    plan, laid = laid_out(JOBS, batch, bases)
    _, metrics = make_failover_step(CFG, optim, StepSettings(), failover)(
        state, laid, TrainPlan(failover=plan)
    )
    given, true = experiment.mean_gradients(CFG, state.params, batch, WORKERS, JOBS, failover, bases)
    norms = [np.sqrt(sum((each**2).sum() for each in grads.values())) for grads in (given, true)]
    assert float(metrics.grad_norm) == pytest.approx(norms[0], rel=1e-4)
    assert abs(norms[0] / norms[1] - 1) > 1e-3


def test_drawn_bases_are_orthonormal_and_new_each_time():
    draw = experiment.make_drawn(CFG, tuple(LOW.items()), 4, 1)
    one, same, other = draw(0), draw(0), draw(100)
    computed = make_refresh(CFG, LOW, 4)(init_params(CFG, 3), None)
    assert set(one) == set(computed)
    for name, v1 in one.items():
        v1 = np.asarray(v1)
        assert v1.shape == computed[name].shape
        np.testing.assert_allclose(v1.T @ v1, np.eye(4), atol=1e-5)
        assert (v1 == same[name]).all() and not np.allclose(v1, other[name], atol=0.01)
    shapes = {}
    for v1 in one.values():
        # Weights of one shape have bases of their own.
        assert all(not np.allclose(v1, each, atol=0.01) for each in shapes.get(v1.shape, []))
        shapes.setdefault(v1.shape, []).append(v1)
