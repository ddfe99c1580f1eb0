"""On 8 simulated devices: ``failover_worker.py CHECK [ARGUMENT ...]`` prints a line for everything that it found right."""

import sys
from functools import lru_cache

import jax
import numpy as np

from jaxllm.batch import PackedBatch
from jaxllm.train.failover import FailoverSettings, failover_plan, make_failover_step
from jaxllm.train.placement import state_shardings
from jaxllm.train.state import TrainPlan, init_state
from jaxllm.train.step import StepSettings, make_train_step
from parallel.mesh import MeshShape, batch_sharding, make_mesh
from parallel.sharding import Placement
from tests.train.sharded_worker import model
from tests.train.tiny import assert_identical, constant_lr, copied, tiny_batch, tiny_config

WORKERS = 4
OPTIM = constant_lr()
SETTINGS = StepSettings(loss_chunk=64)
HEALTHY = tuple((shard,) for shard in range(WORKERS))


def place_of(jobs) -> Placement:
    return Placement(make_mesh(MeshShape(data=len(jobs)), jax.devices()[: len(jobs)]))


def laid_out(batch: PackedBatch, jobs, slots: int) -> PackedBatch:
    """Rows of a batch as the slots of living workers."""

    def rows(x):
        shards = x.reshape(WORKERS, len(x) // WORKERS, *x.shape[1:])
        idle = np.zeros_like(shards[0])
        return np.concatenate(
            [shards[own[slot]] if slot < len(own) else idle for own in jobs for slot in range(slots)]
        )

    laid = jax.tree.map(rows, batch)
    return laid.replace(targets=np.where(laid.segment_ids[..., None] > 0, laid.targets, -1))


@lru_cache
def step_of(cfg, method: str, workers: int, settings: StepSettings = SETTINGS):
    place = place_of(range(workers))
    return make_failover_step(cfg, OPTIM, settings, FailoverSettings(method), place), place


def trained(cfg, method: str, jobs, steps: int = 3, settings: StepSettings = SETTINGS):
    """(the state after some steps, its last metrics)."""
    slots = max(map(len, jobs))
    step, place = step_of(cfg, method, len(jobs), settings)
    state = init_state(cfg, OPTIM, 0, state_shardings(cfg, OPTIM, place))
    metrics = None
    for number in range(steps):
        batch = laid_out(tiny_batch(8, 16, seed=number), jobs, slots)
        batch = jax.device_put(batch, batch_sharding(place.mesh))
        state, metrics = step(state, batch, TrainPlan(failover=failover_plan(jobs, slots)))
    # One program for every pattern of as many workers and slots.
    assert step._cache_size() == 1
    return copied(state), metrics


def config(pattern: str):
    return tiny_config(pattern) if set(pattern) <= set("M*-") else model(pattern)


def check_exact(pattern: str, parts: str, *patterns: str) -> None:
    """Whoever trains which shard, the state is that of all workers alive, bit for bit, and that of the ordinary step."""
    cfg = config(pattern)
    settings = StepSettings(loss_chunk=64, accum_steps=int(parts))
    whole, seen = trained(cfg, "exact", HEALTHY, settings=settings)
    place = place_of(HEALTHY)
    ordinary = make_train_step(cfg, OPTIM, settings, place=place)
    state, metrics = init_state(cfg, OPTIM, 0, state_shardings(cfg, OPTIM, place)), None
    for number in range(3):
        batch = jax.device_put(tiny_batch(8, 16, seed=number), batch_sharding(place.mesh))
        state, metrics = ordinary(state, batch, None)
    np.testing.assert_allclose(seen.loss, metrics.loss, rtol=1e-5)
    assert int(seen.tokens) == int(metrics.tokens)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)
    for text in patterns:
        jobs = tuple(tuple(map(int, own)) for own in text.split(","))
        ours, metrics = trained(cfg, "exact", jobs, settings=settings)
        assert_identical(ours, whole)
        assert int(metrics.tokens) == int(seen.tokens)
        print("EXACT", pattern, text)


if __name__ == "__main__":
    assert jax.device_count() == 8
    globals()[f"check_{sys.argv[1]}"](*sys.argv[2:])
