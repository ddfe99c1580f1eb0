"""The training step: accumulation, packing, skipping, rematerialisation, precision."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.batch import PackedBatch
from jaxllm.config import ConfigError, Precision
from jaxllm.model.functional import init_params
from jaxllm.train.loss import LossSums
from jaxllm.train.state import TrainPlan, init_state
from jaxllm.train.step import StepSettings, apply_gradients, gradients, make_eval_step, make_train_step
from tests.train.tiny import assert_identical, copied, tiny_batch, tiny_config


def close(ours, theirs, rtol=1e-4, atol=1e-6):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def grads_of(cfg, params, batch, **settings):
    return jax.jit(lambda p, b: gradients(cfg, p, b, StepSettings(**settings)))(params, batch)


def test_loss_falls_and_state_moves(cfg, optim, train_step):
    state = init_state(cfg, optim)
    batch = tiny_batch()
    losses = []
    for _ in range(6):
        state, metrics = train_step(state, batch, None)
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] - 0.5
    assert int(state.step) == 6 and int(state.skipped) == 0
    assert int(metrics.tokens) == int(np.sum(batch.loss_mask > 0))


def test_step_is_deterministic_and_consumes_its_state(cfg, optim, train_step):
    first = init_state(cfg, optim, seed=3)
    one = copied(train_step(first, tiny_batch(), None))
    assert jax.tree.leaves(first.params)[0].is_deleted()
    two = copied(train_step(init_state(cfg, optim, seed=3), tiny_batch(), None))
    assert_identical(one, two)


def test_plan_sets_the_rate(cfg, optim, train_step):
    start = init_state(cfg, optim)
    before = copied(start)
    state, metrics = train_step(start, tiny_batch(), TrainPlan(lr=np.float32(0.0)))
    assert float(metrics.lr) == 0.0
    assert_identical(state.params, before.params)
    assert np.any(np.asarray(jax.tree.leaves(state.opt_state)[1]) != jax.tree.leaves(before.opt_state)[1])


def test_accumulation_is_the_big_batch(cfg):
    params, batch = init_params(cfg, 1), tiny_batch(rows=4)
    whole, sums = grads_of(cfg, params, batch)
    parts, part_sums = grads_of(cfg, params, batch, accum_steps=2)
    # The rows weigh differently, so a mean of means would not pass.
    weights = batch.loss_mask.sum(1)
    assert np.ptp(weights) > 1
    close(parts, whole)
    close(part_sums, sums)


def test_accumulation_needs_a_divisor(cfg):
    with pytest.raises(ValueError, match="accum_steps=3: the batch has 4 rows"):
        grads_of(cfg, init_params(cfg), tiny_batch(rows=4), accum_steps=3)


def test_packed_is_separate():
    cfg = tiny_config("M*-")
    params, packed = init_params(cfg, 2), tiny_batch(rows=2, length=12, seed=5)
    rows = []
    for row in range(2):
        for segment in (1, 2):
            inside = packed.segment_ids[row] == segment
            count = int(inside.sum())

            def alone(x, fill, inside=inside, row=row, count=count):
                out = np.full((12, *x.shape[2:]), fill, x.dtype)
                out[:count] = x[row][inside]
                return out

            rows.append(
                PackedBatch(
                    tokens=alone(packed.tokens, 0),
                    segment_ids=(np.arange(12) < count).astype(np.int32),
                    positions=alone(packed.positions, 0),
                    targets=alone(packed.targets, -1),
                    loss_mask=alone(packed.loss_mask, 0),
                )
            )
    separate = jax.tree.map(lambda *xs: np.stack(xs), *rows)
    ours, our_sums = grads_of(cfg, params, packed)
    theirs, their_sums = grads_of(cfg, params, separate)
    close(our_sums, their_sums)
    close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("remat", ["layer", "dots"])
def test_remat_changes_nothing(cfg, remat):
    params, batch = init_params(cfg, 1), tiny_batch()
    close(grads_of(cfg, params, batch, remat=remat), grads_of(cfg, params, batch), rtol=1e-5)


def test_non_finite_steps_leave_the_state_alone(cfg, optim, train_step):
    state, _ = train_step(init_state(cfg, optim), tiny_batch(), None)
    before = copied(state)
    bad = tiny_batch(seed=1)
    bad = bad.replace(loss_mask=bad.loss_mask * np.float32("nan"))
    for count in (1, 2):
        state, metrics = train_step(state, bad, None)
        assert int(metrics.consecutive_skips) == int(metrics.skipped) == count
    assert_identical((state.params, state.opt_state), (before.params, before.opt_state))
    assert int(state.step) == 3
    state, metrics = train_step(state, tiny_batch(seed=2), None)
    assert (int(metrics.consecutive_skips), int(metrics.skipped)) == (0, 2)
    assert not np.array_equal(jax.tree.leaves(state.params)[0], jax.tree.leaves(before.params)[0])


def test_finite_loss_with_infinite_gradient_is_skipped(cfg, optim):
    state = init_state(cfg, optim)
    grads = jax.tree.map(lambda p: jnp.full(p.shape, jnp.inf), state.params)
    sums = LossSums(*(jnp.ones(()) for _ in range(5)))
    after, metrics = jax.jit(lambda *given: apply_gradients(optim, *given, 0.1))(state, grads, sums)
    assert int(metrics.skipped) == 1 and np.isfinite(metrics.loss)
    assert_identical((after.params, after.opt_state), (state.params, state.opt_state))


def test_bfloat16_compute_keeps_float32_masters(optim):
    low = Precision(param="bfloat16", compute="bfloat16", matmul="bfloat16")
    cfg = dataclasses.replace(tiny_config("*-"), precision=low)
    state = init_state(cfg, optim)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    state, metrics = make_train_step(cfg, optim)(state, tiny_batch(), None)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    sums = make_eval_step(tiny_config("*-"))(init_state(cfg, optim).params, tiny_batch())
    np.testing.assert_allclose(metrics.loss, sums.nats / sums.weight, rtol=2e-2)
    assert float(metrics.loss) != float(sums.nats / sums.weight)


def test_batches_without_targets_are_refused(cfg):
    batch = tiny_batch()
    with pytest.raises(ValueError, match=r"batch\.targets=None"):
        grads_of(cfg, init_params(cfg), batch.replace(targets=None))
    deep = np.repeat(batch.targets, 2, axis=2)
    with pytest.raises(ValueError, match="2 steps ahead; this model is trained on 1"):
        grads_of(cfg, init_params(cfg), batch.replace(targets=deep))


def test_bad_settings_name_the_field():
    with pytest.raises(ConfigError, match="remat='all'"):
        StepSettings(remat="all")
    with pytest.raises(ConfigError, match="accum_steps=0"):
        StepSettings(accum_steps=0)
