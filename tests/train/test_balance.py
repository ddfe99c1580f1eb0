"""Load balance: the correction bias and the auxiliary losses in the training step, across microbatches and resumption."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import ConfigError, MoEConfig, MTPConfig
from jaxllm.model.functional import flatten, init_params, map_named, merge
from jaxllm.model.moe import balance as balance_of
from jaxllm.train.balance import BIAS, Routing, corrected, imbalance, joined
from jaxllm.train.settings import TrainSettings
from jaxllm.train.state import init_state
from jaxllm.train.step import StepSettings, batch_loss, gradients, make_train_step
from jaxllm.train.trainer import fit
from jaxllm.train.writers import read_jsonl
from tests.train.tiny import TinyLoader, assert_identical, constant_lr, copied, tiny_batch, tiny_config

EXPERTS, K = 6, 2
CFG = tiny_config("E*E", moe=MoEConfig(EXPERTS, K, 12, shared_intermediate_size=8))
OPTIM = constant_lr(weight_decay=0.5)
SETTINGS = StepSettings(accum_steps=2, balance_loss=0.05, bias_rate=0.01)
NAMES = [f"layers.{i}.mixer.gate.{BIAS}" for i in (0, 2)]


@pytest.fixture(scope="module")
def step() -> Any:
    return make_train_step(CFG, OPTIM, SETTINGS)


def biased(state: Any, seed: int = 4) -> Any:
    """Biases away from zero, so that decay would show."""
    rng = np.random.default_rng(seed)
    move = lambda name, v: v + rng.normal(size=v.shape).astype("f") if name.endswith(BIAS) else v  # noqa: E731
    return state.replace(params=map_named(move, state.params))


def counts_of(params: Any, batch: Any) -> np.ndarray:
    model = merge(CFG, jax.tree.map(jnp.asarray, params))
    _, aux = jax.jit(lambda: model.hidden(batch, model.context(taps=frozenset({"expert_counts"}))))()
    return np.asarray(aux["expert_counts"])


def test_each_update_moves_the_bias_by_the_whole_batches_load(step: Any) -> None:
    start = biased(init_state(CFG, OPTIM))
    before, batch = copied(start), tiny_batch(rows=4)
    counts = counts_of(before.params, jax.tree.map(jnp.asarray, batch))
    valid = int((batch.segment_ids > 0).sum())
    assert valid < batch.tokens.size
    np.testing.assert_array_equal(counts.sum(1), [valid * K] * 2)
    state, metrics = step(start, batch, None)
    old, new = flatten(before.params), flatten(state.params)
    for name, n in zip(NAMES, counts):
        np.testing.assert_allclose(new[name] - old[name], 0.01 * np.sign(n.mean() - n), atol=1e-6)
    np.testing.assert_allclose(metrics.imbalance, (counts.max(1) / counts.mean(1)).max(), rtol=1e-6)
    assert 1.9 < float(metrics.balance_loss) <= 2 * EXPERTS / K
    # The optimiser knows nothing of it.
    assert not any(BIAS in name for name in flatten(state.opt_state[0].mu))


def test_a_skipped_update_leaves_the_bias(step: Any) -> None:
    start = biased(init_state(CFG, OPTIM))
    before, bad = copied(start), tiny_batch()
    state, metrics = step(start, bad.replace(loss_mask=bad.loss_mask * np.float32("nan")), None)
    assert int(metrics.skipped) == 1
    assert_identical((state.params, state.opt_state), (before.params, before.opt_state))


def test_accumulation_is_the_big_batch() -> None:
    params, batch = init_params(CFG, 1), tiny_batch(rows=4)
    whole, parts = (
        jax.jit(lambda p, b, n=n: gradients(CFG, p, b, StepSettings(accum_steps=n, balance_loss=1.0)))(
            params, batch
        )
        for n in (1, 2)
    )
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    assert whole[1].routing.counts.dtype == jnp.int32


def test_the_loss_is_the_mean_over_rows_and_moves_routers_only(step: Any) -> None:
    params, batch = init_params(CFG, 1), jax.tree.map(jnp.asarray, tiny_batch(rows=3))

    @jax.jit
    def run(params: Any) -> Any:
        with_it, without = (
            gradients(CFG, params, batch, StepSettings(balance_loss=weight)) for weight in (1.0, 0.0)
        )
        return jax.tree.map(jnp.subtract, with_it[0], without[0]), with_it[1]

    difference, sums = run(params)
    model = merge(CFG, params)
    _, aux = model.hidden(batch, model.context(taps=frozenset({"balance_sequence"})))
    weights = (batch.loss_mask * (batch.targets[..., 0] >= 0)).sum(1)
    np.testing.assert_allclose(sums.routing.balance, (aux["balance_sequence"] * weights).sum(), rtol=1e-5)
    moved = {name for name, d in flatten(difference).items() if np.abs(d).max() > 1e-6}
    # What stands before a router moves it as well; the last layer's experts and the head do not.
    assert "layers.0.mixer.gate.weight" in moved and "layers.2.mixer.gate.weight" in moved
    assert not any(name.startswith(("layers.2.mixer.experts", "norm_f")) for name in moved)


@pytest.mark.slow
def test_the_bias_evens_the_load_out() -> None:
    """A router that prefers one expert is brought back, without an auxiliary loss and with its weights as they are."""
    settings = StepSettings(balance_loss=0.0, bias_rate=0.002)
    step, state = make_train_step(CFG, constant_lr(lr=1e-6), settings), init_state(CFG, constant_lr())
    lean = jnp.zeros(EXPERTS).at[1].set(0.06)
    state = state.replace(
        params=map_named(lambda name, v: v + lean if name.endswith(BIAS) else v, state.params)
    )
    loads = []
    for _ in range(60):
        state, metrics = step(state, tiny_batch(rows=8), None)
        loads.append(float(metrics.imbalance))
    assert loads[0] > 2.5 and np.mean(loads[-10:]) < 1.6


def test_a_bias_moves_against_its_load() -> None:
    counts, three = jnp.array([[4, 1, 1], [2, 2, 2]]), MoEConfig(3, 1, 4)
    params = {"layers": {i: {"mixer": {"gate": {BIAS: jnp.zeros(3)}}} for i in (2, 10)}, "x": jnp.ones(2)}
    moved = corrected(params, tiny_config("--E-------E", moe=three), counts, 0.5)
    np.testing.assert_array_equal(moved["layers"][2]["mixer"]["gate"][BIAS], [-0.5, 0.5, 0.5])
    np.testing.assert_array_equal(moved["layers"][10]["mixer"]["gate"][BIAS], np.zeros(3))
    assert moved["x"] is params["x"]
    stacked = {"groups": {0: {"blocks": {1: {"mixer": {"gate": {BIAS: jnp.zeros((2, 3))}}}}}}}
    stacked = corrected(stacked, tiny_config("*E*E", moe=three), counts, 0.5)
    np.testing.assert_array_equal(
        stacked["groups"][0]["blocks"][1]["mixer"]["gate"][BIAS], [[-0.5, 0.5, 0.5], [0, 0, 0]]
    )
    assert float(imbalance(jnp.array([[4, 1, 1], [2, 2, 2]]))) == 2.0
    assert float(imbalance(jnp.zeros((2, 3), jnp.int32))) == 0.0


@pytest.mark.parametrize("blocks", [1, 2])
def test_experts_of_prediction_blocks_are_balanced_too(blocks: int) -> None:
    """A single block serves both depths, and its load is that of both; two blocks have one each."""
    cfg = tiny_config("-E", moe=MoEConfig(4, 1, 8), mtp=MTPConfig("E", blocks))
    start, batch = biased(init_state(cfg, OPTIM)), deeper(tiny_batch(rows=3))
    before, tap = copied(start), frozenset({"expert_counts"})

    @jax.jit
    def loads(params: Any, batch: Any) -> Any:
        model = merge(cfg, params)
        ctx = model.context(taps=tap)
        h, aux = model.hidden(batch, ctx)
        counts = [aux["expert_counts"][0]]
        for depth in (1, 2):
            tokens = batch.targets[..., depth - 1]
            read = batch.replace(
                tokens=jnp.maximum(tokens, 0), segment_ids=jnp.where(tokens < 0, 0, batch.segment_ids)
            )
            h, aux = model.predict(h, read, ctx, depth=depth)
            counts.append(aux["expert_counts"][0])
        return counts

    main, first, second = map(np.asarray, loads(before.params, batch))
    wanted = [main, first + second] if blocks == 1 else [main, first, second]
    settings = StepSettings(mtp_depths=2, bias_rate=0.01)
    # The end of a document reads no next token, so it goes to no expert of a prediction block.
    routing = jax.jit(lambda p, b: batch_loss(cfg, p, b, settings)[1].routing)(before.params, batch)
    np.testing.assert_array_equal(routing.counts, np.stack(wanted))
    state, metrics = make_train_step(cfg, OPTIM, settings)(start, batch, None)
    old, new = flatten(before.params), flatten(state.params)
    names = ["layers.1", *(f"mtp.{block}.layers.0" for block in range(blocks))]
    for name, n in zip(names, wanted, strict=True):
        bias = f"{name}.mixer.gate.{BIAS}"
        np.testing.assert_allclose(
            new[bias] - old[bias], 0.01 * np.sign(n.mean() - n), atol=1e-6, err_msg=name
        )
    loads_of = np.stack(wanted)
    np.testing.assert_allclose(metrics.imbalance, (loads_of.max(1) / loads_of.mean(1)).max(), rtol=1e-6)
    assert 0.9 * (1 + blocks) < float(metrics.balance_loss)


def test_a_shared_block_counts_once_in_the_loss() -> None:
    """Its tokens are those of all depths, its loss the mean over them; blocks of their own add up."""
    main, first, second = (
        Routing(jnp.full((1, 2), n), jnp.float32(v)) for n, v in ((5, 1.0), (2, 3.0), (4, 7.0))
    )
    shared = joined(main, [first, second], blocks=1)
    assert shared is not None and shared.counts.tolist() == [[5, 5], [6, 6]]
    assert float(shared.balance) == 1.0 + (3.0 + 7.0) / 2
    own = joined(main, [first, second], blocks=2)
    assert own is not None and own.counts.tolist() == [[5, 5], [2, 2], [4, 4]]
    assert float(own.balance) == 1.0 + 3.0 + 7.0
    assert joined(main, [None], blocks=1) is main


def deeper(batch: Any) -> Any:
    """The batch with targets three steps ahead, none across documents."""
    targets = [np.asarray(batch.targets[..., 0])]
    for _ in range(2):
        ahead = np.roll(targets[-1], -1, axis=1)
        ahead[:, -1] = -1
        targets.append(np.where(targets[0] < 0, -1, ahead).astype(np.int32))
    arrays = jax.tree.map(jnp.asarray, batch)
    return arrays.replace(targets=jnp.asarray(np.stack(targets, axis=-1)))


def test_resumed_is_uninterrupted_and_the_load_is_logged(tmp_path: Path) -> None:
    cfg = tiny_config("E-", moe=MoEConfig(4, 1, 8))

    def run(steps: int, folder: Path) -> Any:
        return fit(cfg, constant_lr(), TinyLoader(), TrainSettings(steps=steps), folder=folder)

    whole = run(4, tmp_path / "a")
    run(2, tmp_path / "b")
    resumed = run(4, tmp_path / "b")
    assert_identical(resumed.params, whole.params)
    bias = flatten(whole.params)[f"layers.0.mixer.gate.{BIAS}"]
    assert np.any(bias) and np.abs(bias).max() <= 4e-3 + 1e-6
    rows = read_jsonl(tmp_path / "b" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(1 <= row["imbalance"] <= 4 and row["balance_loss"] > 0 for row in rows)
    plain = fit(tiny_config("-"), constant_lr(), TinyLoader(), TrainSettings(steps=1), folder=tmp_path / "c")
    assert plain.step == 1 and "imbalance" not in read_jsonl(tmp_path / "c" / "metrics.jsonl")[0]


def test_settings_name_the_field() -> None:
    for change, message in (
        ({"balance_loss": -1.0}, "balance_loss=-1.0"),
        ({"bias_rate": -1.0}, "bias_rate=-1.0"),
        ({"balance_scope": "token"}, "balance_scope='token'"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(SETTINGS, **change)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_batch_loss_is_that_of_transformers() -> None:
    """Which counts all k choices of a token as one each: k times Switch's."""
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 9, EXPERTS)).astype(np.float32)
    mask = np.arange(9) < np.array([[9], [5]])
    theirs = load_balancing_loss_func(
        (torch.tensor(logits.reshape(-1, EXPERTS)),), EXPERTS, K, torch.tensor(mask.astype(np.int64))
    )
    shares = np.where(mask[..., None], jax.nn.softmax(logits), 0).reshape(1, -1, EXPERTS)
    ids = jax.lax.top_k(jnp.asarray(logits), K)[1]
    ids = jnp.where(mask[..., None], ids, EXPERTS).reshape(1, -1, K)
    np.testing.assert_allclose(K * balance_of(jnp.asarray(shares), ids)[0], float(theirs), rtol=1e-5)
