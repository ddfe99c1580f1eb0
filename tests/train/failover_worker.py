"""On 8 simulated devices: ``failover_worker.py CHECK [ARGUMENT ...]`` prints a line for everything that it found right."""

import os
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.batch import PackedBatch
from jaxllm.model.functional import flatten
from jaxllm.train.degraded import Degraded, letter_of
from jaxllm.train.failover import FailoverSettings, failover_plan, make_failover_step
from jaxllm.train.foreseen import compile_world
from jaxllm.train.placement import state_shardings
from jaxllm.train.state import TrainPlan, init_state
from jaxllm.train.step import StepSettings, gradients, make_train_step
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


class Runs:
    """Steps of one setting, by their number of workers; each is compiled once."""

    def __init__(self, cfg, failover: FailoverSettings, settings: StepSettings = SETTINGS, optim=OPTIM):
        self.cfg, self.failover, self.settings, self.optim = cfg, failover, settings, optim
        self.steps = {}

    def __call__(self, jobs, steps: int = 3, start=None, bases=None, first: int = 0):
        """(the state after some steps, its last metrics)."""
        jobs = self.failover.jobs(jobs)
        slots, place = max(map(len, jobs)), place_of(jobs)
        key = len(jobs), slots
        if key not in self.steps:
            self.steps[key] = make_failover_step(self.cfg, self.optim, self.settings, self.failover, place)
        step, where = self.steps[key], state_shardings(self.cfg, self.optim, place)
        state = init_state(self.cfg, self.optim, 0, where) if start is None else jax.device_put(start, where)
        metrics = None
        for number in range(first, first + steps):
            batch = laid_out(tiny_batch(8, 16, seed=number), jobs, slots)
            batch = jax.device_put(batch, batch_sharding(place.mesh))
            state, metrics = step(state, batch, TrainPlan(failover=failover_plan(jobs, slots, bases)))
        # One program for every pattern of as many workers and slots.
        assert step._cache_size() == 1
        return copied(state), metrics


def config(pattern: str):
    return tiny_config(pattern) if set(pattern) <= set("M*-") else model(pattern)


def jobs_of(text: str):
    """``0,12,3``: the second of three workers has the shards 1 and 2."""
    return tuple(tuple(map(int, own)) for own in text.split(","))


def of_shard(batch: PackedBatch, shard: int) -> PackedBatch:
    rows = len(batch.tokens) // WORKERS
    return jax.tree.map(lambda x: jnp.asarray(x[shard * rows : (shard + 1) * rows]), batch)


def check_average(pattern: str, rule: str, *patterns: str) -> None:
    """The mean gradient is the closed formula over shards, in float64; what nobody learns from stays as it is."""
    cfg = config(pattern)
    failover = FailoverSettings(rank=3, policy=dict.fromkeys("M*WGJ", rule))
    # The first moment is then a tenth of the mean gradient.
    optim = constant_lr(clip_norm=None)
    run = Runs(cfg, failover, optim=optim)
    params = init_state(cfg, optim).params
    bases, skipped = failover.make_bases(cfg)(params), failover.skipped(cfg)
    batch = tiny_batch(8, 16, seed=0)
    whole = jax.jit(lambda p, b: gradients(cfg, p, b, SETTINGS))
    cheap = jax.jit(lambda p, b: gradients(cfg, p, b, SETTINGS, degraded=Degraded(skipped, bases, True)))
    parts = [(whole(params, of_shard(batch, i)), cheap(params, of_shard(batch, i))) for i in range(WORKERS)]
    weights = np.array([float(exact[1].weight) for exact, _ in parts], np.float64)
    assert np.ptp(weights) > 1
    nats = sum(float(exact[1].nats) for exact, _ in parts)
    for text in patterns:
        jobs = jobs_of(text)
        doubled = {shard for own in jobs if len(own) > 1 for shard in own}
        single = np.array([shard not in doubled for shard in range(WORKERS)])
        (ours, metrics), before = run(jobs, 1, bases=bases), copied(init_state(cfg, optim))
        np.testing.assert_allclose(metrics.loss, nats / weights.sum(), rtol=1e-5)
        square, names = 0.0, {True: 0, False: 0}
        found = [[flatten(grads) for grads, _ in part] for part in parts]
        moments, after = flatten(ours.opt_state[0].mu), flatten(ours.params)
        for name, start in flatten(before.params).items():
            absent = letter_of(cfg, name) in skipped
            among = single if absent else np.ones(WORKERS, bool)
            names[absent] += 1
            total = sum(
                np.asarray(found[i][i in doubled][name], np.float64) for i in range(WORKERS) if among[i]
            )
            mean = total / weights[among].sum() if among.any() else np.zeros(start.shape)
            square += np.sum(np.square(mean))
            np.testing.assert_allclose(
                moments[name] / 0.1, mean, rtol=0, atol=2e-5 * np.max(np.abs(mean)) + 1e-9, err_msg=name
            )
            assert np.array_equal(after[name], start) == (not among.any()), name
        np.testing.assert_allclose(metrics.grad_norm, np.sqrt(square), rtol=1e-4)
        assert names[False] and bool(names[True]) == bool(skipped)
        print("AVERAGE", pattern, text)


def check_untouched(pattern: str, *patterns: str) -> None:
    """A module of which nobody has a gradient keeps its parameters and moments, bit for bit, whatever those are."""
    cfg = config(pattern)
    run = Runs(cfg, FailoverSettings(rank=3))
    bases = run.failover.make_bases(cfg)(init_state(cfg, OPTIM).params)
    start, _ = run(((0,), (1,), (2, 3)), 2, bases=bases)
    for text in patterns:
        after, _ = run(jobs_of(text), 2, start=start, bases=bases)
        for part in (lambda s: s.params, lambda s: s.opt_state[0].mu, lambda s: s.opt_state[0].nu):
            for name, old in flatten(part(start)).items():
                same = np.array_equal(old, flatten(part(after))[name])
                assert same == (letter_of(cfg, name) in "*W" if letter_of(cfg, name) else False), name
            assert any(np.any(x) for n, x in flatten(part(start)).items() if letter_of(cfg, n) == "*")
        print("UNTOUCHED", pattern, text)


def check_foreseen(method: str) -> None:
    """What a world of three of four workers runs is in the persistent cache before there is such a world."""
    cfg, failover, hits = tiny_config("*-"), FailoverSettings(method, rank=3), []
    jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        compile_world(cfg, OPTIM, SETTINGS, failover, tiny_batch(8, 16), None, jax.devices()[:3], WORKERS)
        files = set(os.listdir(folder))
        jax.clear_caches()
        # The state as survivors have it, whole on every device.
        mesh = place_of("abc").mesh
        state = jax.device_put(init_state(cfg, OPTIM), NamedSharding(mesh, P()))
        jobs = failover.jobs(((0,), (1, 3), (2,)))
        slots = max(map(len, jobs))
        batch = jax.device_put(laid_out(tiny_batch(8, 16), jobs, slots), batch_sharding(mesh))
        step = make_failover_step(cfg, OPTIM, SETTINGS, failover, Placement(mesh))
        hits.clear()
        bases = failover.make_bases(cfg)(state.params, None) if method == "mecefo" else None
        step(state, batch, TrainPlan(failover=failover_plan(jobs, slots, bases)))
        wanted = {name for name in set(os.listdir(folder)) - files if "train_step" in name or "bases" in name}
        assert not wanted, wanted
        assert any("cache_hits" in name for name in hits), set(hits)
    print("FORESEEN", method)


def check_all(pattern: str, text: str) -> None:
    """With all of the rank, new bases each step and nothing skipped, failover trains as method exact does."""
    cfg = config(pattern)
    exact = Runs(cfg, FailoverSettings("exact"))
    expected, _ = exact(jobs_of(text), 3)
    failover = FailoverSettings(rank="full", policy=dict.fromkeys("M*WGJ-E", "low_rank"))
    run, make_bases, state, bases = Runs(cfg, failover), failover.make_bases(cfg), None, None
    params = init_state(cfg, OPTIM).params
    for number in range(3):
        bases = make_bases(params, bases)
        state, _ = run(jobs_of(text), 1, start=state, bases=bases, first=number)
        params = state.params
    assert state is not None
    for (name, a), b in zip(flatten(state.params).items(), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.max(np.abs(b)) + 2e-6, err_msg=name)
    print("ALL", pattern)


def check_drop(pattern: str, text: str) -> None:
    """Dropped shards are not there: the ordinary step over the rows of those who live."""
    cfg, jobs = config(pattern), jobs_of(text)
    ours, seen = Runs(cfg, FailoverSettings("drop"))(jobs, 2)
    own = [first for first, *_ in jobs]
    place = place_of(jobs)
    step, where = make_train_step(cfg, OPTIM, SETTINGS, place=place), state_shardings(cfg, OPTIM, place)
    state, metrics = init_state(cfg, OPTIM, 0, where), None
    for number in range(2):
        parts = [of_shard(tiny_batch(8, 16, seed=number), shard) for shard in own]
        rows = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
        state, metrics = step(state, jax.device_put(rows, batch_sharding(place.mesh)), None)
    assert metrics is not None and seen is not None
    assert int(seen.tokens) == int(metrics.tokens)
    np.testing.assert_allclose(seen.loss, metrics.loss, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)
    print("DROP", pattern, text)


def check_exact(pattern: str, parts: str, *patterns: str) -> None:
    """Whoever trains which shard, the state is that of all workers alive, bit for bit, and that of the ordinary step."""
    cfg = config(pattern)
    settings = StepSettings(loss_chunk=64, accum_steps=int(parts))
    run = Runs(cfg, FailoverSettings("exact"), settings)
    whole, seen = run(HEALTHY)
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
        ours, metrics = run(jobs_of(text))
        assert_identical(ours, whole)
        assert int(metrics.tokens) == int(seen.tokens)
        print("EXACT", pattern, text)


if __name__ == "__main__":
    assert jax.device_count() == 8
    globals()[f"check_{sys.argv[1]}"](*sys.argv[2:])
