"""On 8 simulated devices: ``chained_worker.py CHECK [ARGUMENT ...]`` prints a line for everything that it found right.

A pattern of failures is written as the nodes that are gone: ``03,12`` for stage 3 of replica 0 and stage 2 of replica 1.
"""

import itertools
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.linear import Context
from jaxllm.model.functional import flatten, map_named, merge, param_axes, stack, unstack
from jaxllm.train.chained import (
    ChainPlan,
    chained_batch,
    chained_gradients,
    make_chained_step,
    move_state,
    slot_config,
)
from jaxllm.train.degraded import LowRankGrad
from jaxllm.train.failover import FailoverSettings
from jaxllm.train.loss import cross_entropy
from jaxllm.train.state import TrainPlan, init_state
from jaxllm.train.step import StepSettings, make_train_step
from parallel.failover.assignment import assign_stages
from parallel.failover.chains import chain
from parallel.mesh import MeshShape, make_mesh
from parallel.sharding import Placement
from tests.train.tiny import constant_lr, tiny_batch, tiny_config

REPLICAS, STAGES = 2, 4
GRID = list(itertools.product(range(REPLICAS), range(STAGES)))
CANONICAL = np.arange(STAGES)[:, None]
SETTINGS = StepSettings(accum_steps=2, loss_chunk=64)
OPTIM = constant_lr()
MECEFO = FailoverSettings(rank=2)


def config(motif: str = "*-"):
    return tiny_config(motif * STAGES, scan_layers=True)


def assignment(gone: str, rotation: int = 0):
    dead = [(int(node[0]), int(node[1])) for node in gone.split(",") if node]
    return assign_stages(REPLICAS, STAGES, [node for node in GRID if node not in dead], rotation)


def place_of(nodes: int) -> Placement:
    return Placement(make_mesh(MeshShape(data=nodes), jax.devices()[:nodes]))


def on_devices(batch, place: Placement):
    return jax.device_put(batch, jax.NamedSharding(place.mesh, jax.P("data")))


def bases_of(failover, cfg, chains, params):
    return failover.make_bases(slot_config(cfg, STAGES, *chains.stages.shape))(params)


def start(cfg):
    """A state whose norms and biases are not those that all layers begin with."""
    state = init_state(cfg, OPTIM)
    keys = iter(jax.random.split(jax.random.key(5), 100))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), state.params)
    return state.replace(params=params)


def formula(cfg, params, batch, found, failover):
    """Sums over replicas on one device, layer by layer: (gradients, weight behind each) by plain names.

    A layer of a device with two stages: attention's branch is a constant, products of the MLP are of low rank.
    """
    plain, leaves = unstack(cfg, params)
    refresh = failover.make_bases(plain)(leaves)
    rows, per_stage = len(batch.tokens) // REPLICAS, len(plain.pattern) // STAGES
    total = jax.tree.map(jnp.zeros_like, leaves)
    behind = jax.tree.map(lambda _: 0.0, leaves)

    def add(replica, total, behind):
        own = jax.tree.map(lambda x: x[replica * rows : (replica + 1) * rows], batch)
        cheap = {
            task.stage
            for tasks, degraded in zip(found.tasks, found.degraded, strict=True)
            for task in tasks
            if degraded and failover.method == "mecefo" and task.replica == replica
        }

        def cheaply(name: str) -> bool:
            return name.startswith("layers.") and int(name.split(".")[1]) // per_stage in cheap

        def loss(leaves):
            def weight(name, value):
                if not cheaply(name):
                    return value
                if cfg.pattern[int(name.split(".")[1])] == "*":
                    return jax.lax.stop_gradient(value)
                return (
                    LowRankGrad(value, refresh[name], param_axes(plain)[name]) if name in refresh else value
                )

            model, ctx = merge(plain, map_named(weight, leaves)), Context(precision=cfg.precision)
            h = model.embed(own.tokens, ctx)
            for layer, block in enumerate(model.layers):
                branch, _ = block.mixer(block.norm(h), own, ctx)
                skipped = layer // per_stage in cheap and block.letter == "*"
                h = h + (jax.lax.stop_gradient(branch) if skipped else branch)
            w = leaves["embed"]["weight"]
            return cross_entropy(model.norm_f(h), w, own.targets[..., 0], own.loss_mask, tied=True)

        (_, sums), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(leaves)

        def counts(name, before):
            absent = cheaply(name) and cfg.pattern[int(name.split(".")[1])] == "*"
            return before + (0.0 if absent else float(sums.weight))

        return jax.tree.map(jnp.add, total, grads), map_named(counts, behind)

    for replica in set(range(REPLICAS)) - set(found.dropped):
        total, behind = add(replica, total, behind)
    return flatten(stack(cfg, total)), flatten(behind)


def check_formula(method: str, *patterns: str) -> None:
    """Gradients of every pattern against one device; patterns with as many devices share a program."""
    cfg = config()
    failover = FailoverSettings("exact") if method == "exact" else MECEFO
    state, programs = start(cfg), {}
    for number, gone in enumerate(patterns):
        gone = gone.replace("none", "")
        found = assignment(gone, number)
        slots = 2 if gone else 1
        chains, nodes = chain(found, slots), len(found.live)
        place = place_of(nodes)
        batch = tiny_batch(8, 16, seed=number)
        at = move_state(state, CANONICAL, chains.stages, place).params
        bases = bases_of(failover, cfg, chains, at) if method == "mecefo" else None
        if nodes not in programs:
            programs[nodes] = jax.jit(chained_gradients(cfg, SETTINGS, failover, place=place, stages=STAGES))
        plan = TrainPlan(failover=ChainPlan(chains, bases))
        grads, _, behind, once = programs[nodes](
            at, on_devices(chained_batch(batch, found), place), None, plan
        )
        assert programs[nodes]._cache_size() == 1
        expected, weights = formula(cfg, state.params, batch, found, failover)
        flat = chains.stages.ravel()
        seen, counted = flatten(behind), flatten(once)
        for name, grad in flatten(grads).items():
            grad, want, least = np.asarray(grad), np.asarray(expected[name]), 1e-5
            scale = np.abs(want).max() + 1e-6
            if not name.startswith("groups."):
                np.testing.assert_allclose(grad / scale, want / scale, atol=least, err_msg=f"{gone} {name}")
                np.testing.assert_allclose(seen[name], weights[name], rtol=1e-6)
                continue
            # One layer of each letter in a stage.
            layers = {
                s: f"layers.{2 * s + int(name.split('.')[3])}.{name.split('.', 4)[4]}" for s in range(STAGES)
            }
            firsts = {}
            for slot, stage in enumerate(flat):
                if stage < 0:
                    assert (
                        not grad[slot].any() and not seen[name][slot].any() and not counted[name][slot].any()
                    )
                    continue
                message = f"without {gone or 'nobody'}: {name} of stage {stage}"
                np.testing.assert_allclose(
                    grad[slot] / scale, want[stage] / scale, atol=least, err_msg=message
                )
                np.testing.assert_allclose(
                    seen[name][slot].item(), weights[layers[stage]], rtol=1e-6, err_msg=message
                )
                first = firsts.setdefault(stage, slot)
                assert np.array_equal(grad[first], grad[slot]), "copies have the same bits"
                assert bool(counted[name][slot].item()) == (first == slot)
        print("FORMULA", method, gone or "none")


def check_run(*patterns: str) -> None:
    """Trains through one pattern after the other: state moves without loss, one program for each number of devices."""
    cfg, programs, losses, number = config(), {}, [], 0
    state, before = start(cfg), CANONICAL
    for rotation, gone in enumerate(patterns):
        found = assignment(gone.replace("none", ""), rotation)
        nodes = len(found.live)
        chains = chain(found, 1 if nodes == len(GRID) else 2)
        place = place_of(nodes)
        plain = move_state(state, before, CANONICAL)
        state = move_state(state, before, chains.stages, place)
        again = move_state(state, chains.stages, CANONICAL)
        jax.tree.map(np.testing.assert_array_equal, plain, again)
        if nodes not in programs:
            make = partial(make_chained_step, cfg, OPTIM, SETTINGS, MECEFO, place=place, stages=STAGES)
            programs[nodes] = make(slots=chains.stages.shape[1])
        bases = bases_of(MECEFO, cfg, chains, state.params)
        bases = jax.device_put(bases, jax.NamedSharding(place.mesh, jax.P("data")))
        for _ in range(6):
            batch = on_devices(chained_batch(tiny_batch(8, 16, seed=number % 2), found), place)
            state, metrics = programs[nodes](state, batch, TrainPlan(failover=ChainPlan(chains, bases)))
            losses.append(float(metrics.loss))
            number += 1
        assert programs[nodes]._cache_size() == 1, "another pattern of as many devices compiles nothing"
        assert int(state.step) == number and int(state.skipped) == 0
        # Copies of a stage stay the same, bit by bit.
        flat = chains.stages.ravel()
        for leaf in jax.tree.leaves(state.params["groups"]):
            for stage in range(STAGES):
                copies = np.asarray(leaf)[flat == stage]
                assert (copies == copies[:1]).all()
        before = chains.stages
        print("PATTERN", gone, "loss", losses[-6], "to", losses[-1])
    # The same state and batch, one step of an ordinary run on one device.
    where = move_state(state, before, CANONICAL)
    step = make_train_step(cfg, OPTIM, SETTINGS, donate=False)
    batch = tiny_batch(8, 16, seed=number % 2)
    after, measured = step(jax.tree.map(jnp.asarray, where), batch)
    laid = on_devices(chained_batch(batch, found), place)
    chained, metrics = programs[nodes](state, laid, TrainPlan(failover=ChainPlan(chains, bases)))
    for name in ("loss", "accuracy", "grad_norm", "tokens", "lr"):
        np.testing.assert_allclose(getattr(metrics, name), getattr(measured, name), rtol=1e-5, err_msg=name)
    chained = move_state(chained, before, CANONICAL)
    for got, want in zip(jax.tree.leaves(chained.params), jax.tree.leaves(after.params)):
        np.testing.assert_allclose(got, want, atol=1e-5)
    assert losses[-1] < 0.7 * losses[0], losses
    print("RUN")


if __name__ == "__main__":
    {"formula": check_formula, "run": check_run}[sys.argv[1]](*sys.argv[2:])
