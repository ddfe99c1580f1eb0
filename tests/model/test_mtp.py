"""Multi-token prediction: batched training equals one position at a time; drafts, losses and errors."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.batch import PackedBatch
from jaxllm.config import ConfigError, MTPConfig
from jaxllm.data.packing import RowSource
from jaxllm.data.tokens import TokenCorpus
from jaxllm.model.functional import abstract_params, flatten, init_params, map_named, merge
from jaxllm.train.loss import cross_entropy
from jaxllm.train.mtp import ahead
from jaxllm.train.step import StepSettings, batch_loss, make_eval_step
from tests.train.tiny import VOCAB, tiny_config

CFG = tiny_config("M*-", mtp=MTPConfig("*-"))
DEPTHS, LONGEST = 2, 9


@functools.cache
def params(blocks: int = 1) -> Any:
    rng = np.random.default_rng(0)
    cfg = CFG.replace(mtp=MTPConfig("*-", blocks))
    return map_named(lambda _, v: v + 0.2 * rng.standard_normal(v.shape).astype(v.dtype), init_params(cfg))


def batch_of(documents: list[np.ndarray], length: int, rows: int = 1) -> PackedBatch:
    """Whole documents packed by the library's own packer, with targets of all depths."""
    offsets = np.concatenate([[0], np.cumsum([len(d) for d in documents])]).astype(np.int64)
    corpus = TokenCorpus(np.concatenate(documents).astype(np.int32), offsets, VOCAB, "test")
    source = RowSource(corpus, length, depths=1 + DEPTHS, shuffle=False)
    picked = [source[row] for row in range(rows)]
    return PackedBatch(**{name: jnp.asarray(np.stack([row[name] for row in picked])) for name in picked[0]})


@functools.partial(jax.jit, static_argnames=("blocks", "remat"))
def objective(p: Any, batch: PackedBatch, blocks: int = 1, remat: str = "none") -> Any:
    settings = StepSettings(mtp_depths=DEPTHS, mtp_scale=0.3, remat=remat)
    return batch_loss(CFG.replace(mtp=MTPConfig("*-", blocks)), p, batch, settings)


@functools.partial(jax.jit, static_argnames="blocks")
def alone(p: Any, tokens: Any, length: Any, weights: Any, blocks: int) -> Any:
    """Weighted nats of every depth of one document at the start of its row, by shifting the row; no targets, no packing."""
    model = merge(CFG.replace(mtp=MTPConfig("*-", blocks)), p)
    index = jnp.arange(len(tokens))
    h, _ = model.hidden(PackedBatch.from_rows(tokens[None], lengths=length[None]))
    nats = []
    for depth in range(DEPTHS + 1):
        if depth:
            read = PackedBatch.from_rows(jnp.roll(tokens, -depth)[None], lengths=length[None] - depth)
            h, _ = model.predict(h, read, depth=depth)
        log_p = jax.nn.log_softmax(model.head(h)[0])
        picked = jnp.take_along_axis(log_p, jnp.roll(tokens, -depth - 1)[:, None], axis=1)[:, 0]
        picked *= jnp.roll(weights, -depth)
        nats.append(-jnp.sum(jnp.where(index < length - depth - 1, picked, 0)))
    return jnp.stack(nats)


def by_hand(p: Any, documents: list[np.ndarray], blocks: int = 1) -> tuple[float, float, int]:
    """(main nats, mean over depths of nats, tokens) of documents one by one."""
    total, counts = np.zeros(DEPTHS + 1), np.zeros(DEPTHS + 1)
    for document in documents:
        row = np.zeros(LONGEST, np.int32)
        row[: len(document)] = document
        total += np.asarray(alone(p, row, np.int32(len(document)), np.ones(LONGEST, np.float32), blocks))
        counts += np.maximum(0, len(document) - 1 - np.arange(DEPTHS + 1))
    further = np.mean(total[1:] / np.maximum(counts[1:], 1)) * counts[0]
    return float(total[0]), float(further), int(counts[0])


@given(seed=st.integers(0, 2**31), lengths=st.lists(st.integers(1, LONGEST), min_size=1, max_size=4))
def test_packed_rows_equal_documents_alone(seed: int, lengths: list[int]) -> None:
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, VOCAB, n) for n in lengths]
    value, sums = objective(params(), batch_of(documents, 36))
    main, further, count = by_hand(params(), documents)
    assert int(sums.weight) == count
    np.testing.assert_allclose(sums.nats, main, rtol=2e-5, atol=1e-4)
    np.testing.assert_allclose(sums.mtp, further, rtol=2e-5, atol=1e-4)
    np.testing.assert_allclose(value, main + 0.3 * further, rtol=2e-5, atol=1e-4)


def twice(p: Any) -> Any:
    """Parameters of two blocks, both the first one of ``p``; the rest as in ``p``."""
    found = flatten(p)
    target = abstract_params(CFG.replace(mtp=MTPConfig("*-", 2)))
    return map_named(lambda name, _: found[name.replace("mtp.1.", "mtp.0.", 1)], target)


def test_a_block_for_each_depth() -> None:
    documents = [np.random.default_rng(3).integers(0, VOCAB, 7)]
    _, sums = objective(params(2), batch_of(documents, 8), blocks=2)
    np.testing.assert_allclose(sums.mtp, by_hand(params(2), documents, 2)[1], rtol=2e-5)
    # The second block matters: with the first one in its place the loss is another.
    swapped = twice(params(2))
    assert abs(objective(swapped, batch_of(documents, 8), blocks=2)[1].mtp - sums.mtp) > 1e-3


def test_the_gradient_of_a_shared_block_is_the_sum_over_depths() -> None:
    documents = [np.random.default_rng(4).integers(0, VOCAB, 8)]
    batch = batch_of(documents, 8)
    shared = jax.jit(jax.grad(lambda p: objective(p, batch)[0]))(params())
    pair = twice(params())
    each = jax.jit(jax.grad(lambda p: objective(p, batch, blocks=2)[0]))(pair)
    grads, whole = flatten(each), flatten(shared)
    for name in (name for name in whole if name.startswith("mtp.0.")):
        total = grads[name] + grads[name.replace("mtp.0.", "mtp.1.", 1)]
        np.testing.assert_allclose(whole[name], total, rtol=1e-4, atol=1e-5, err_msg=name)
    # Remat changes nothing.
    again = jax.jit(jax.grad(lambda p: objective(p, batch, remat="layer")[0]))(params())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), shared, again)


def test_a_draft_is_one_position_without_context() -> None:
    """As trained at the first position of a document, where attention has itself only."""

    @jax.jit
    def predict(p: Any, h: Any, batch: PackedBatch) -> Any:
        return merge(CFG, p).predict(h, batch)[0]

    h = jnp.asarray(np.random.default_rng(5).standard_normal((1, 3, CFG.hidden_size)), jnp.float32)
    read = PackedBatch.from_rows(np.array([[9, 4, 7]]))
    drafted = predict(params(), h[:, :1], PackedBatch.from_rows(np.array([[9]])))
    np.testing.assert_allclose(drafted, predict(params(), h, read)[:, :1], rtol=1e-5, atol=1e-5)
    # Embedding first: the halves of the projection are not interchangeable.
    flipped = map_named(
        lambda name, v: jnp.roll(v, CFG.hidden_size, 0) if name.endswith("eh_proj.weight") else v, params()
    )
    assert np.abs(predict(flipped, h, read) - predict(params(), h, read)).max() > 1e-2


def test_a_target_has_one_weight_at_every_depth() -> None:
    """It is that of the position whose next token the target is."""
    rng = np.random.default_rng(8)
    tokens = rng.integers(0, VOCAB, LONGEST).astype(np.int32)
    weights = rng.uniform(0.1, 2, LONGEST).astype(np.float32)
    batch = batch_of([tokens], LONGEST)
    _, sums = objective(params(), batch.replace(loss_mask=batch.loss_mask * weights))
    nats = np.asarray(alone(params(), tokens, np.int32(LONGEST), weights, 1))
    totals = np.array([weights[depth : LONGEST - 1].sum() for depth in range(DEPTHS + 1)])
    np.testing.assert_allclose([sums.nats, sums.weight], [nats[0], totals[0]], rtol=2e-5)
    np.testing.assert_allclose(sums.mtp, np.mean(nats[1:] / totals[1:]) * totals[0], rtol=2e-5)


def test_a_block_by_hand() -> None:
    """Both inputs are normed before the projection, the embedding first, and the outcome behind the last sub-block."""
    cfg = tiny_config("-", mtp=MTPConfig("-"))
    rng = np.random.default_rng(7)
    p = map_named(lambda _, v: v + 0.3 * rng.standard_normal(v.shape).astype(v.dtype), init_params(cfg))
    w = {name: np.asarray(leaf, np.float64) for name, leaf in flatten(p).items()}
    h = rng.standard_normal((1, 4, cfg.hidden_size)).astype(np.float32)
    tokens = np.array([[9, 4, 7, 4]])

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        mean = np.mean(np.square(x), axis=-1, keepdims=True)
        return x / np.sqrt(mean + cfg.norm_eps) * w[f"mtp.0.{name}.weight"]

    e = w["embed.weight"][tokens]
    pair = np.concatenate([norm(e, "enorm"), norm(h.astype(np.float64), "hnorm")], axis=-1)
    u = pair @ w["mtp.0.eh_proj.weight"]
    up = norm(u, "layers.0.norm") @ w["mtp.0.layers.0.mixer.up_proj.weight"]
    u = u + np.square(np.maximum(up, 0)) @ w["mtp.0.layers.0.mixer.down_proj.weight"]
    found = jax.jit(lambda p, h: merge(cfg, p).predict(h, PackedBatch.from_rows(tokens))[0])(p, h)
    np.testing.assert_allclose(found, norm(u, "final_layernorm"), rtol=1e-4, atol=1e-4)


def test_weights_move_with_their_targets() -> None:
    segments = jnp.array([[1, 1, 1, 2, 2, 0]])
    weights = jnp.array([[1.0, 2, 3, 4, 5, 0]])
    np.testing.assert_array_equal(ahead(weights, segments, 1), [[2, 3, 3, 5, 5, 0]])
    np.testing.assert_array_equal(ahead(weights, segments, 2), [[3, 2, 3, 4, 5, 0]])


def test_evaluation_scores_the_next_token_only() -> None:
    batch = batch_of([np.random.default_rng(6).integers(0, VOCAB, 8)], 8)
    sums = make_eval_step(CFG)(params(), batch.replace(targets=batch.targets[..., :1]))
    h = jax.jit(lambda p: merge(CFG, p).hidden(batch)[0])(params())
    weight = params()["embed"]["weight"]
    alone = cross_entropy(h, weight, batch.targets[..., 0], batch.loss_mask, tied=True)[1]
    np.testing.assert_allclose(sums.nats, alone.nats, rtol=1e-6)
    assert float(sums.mtp) == 0


def test_mistakes_are_named() -> None:
    batch = batch_of([np.arange(8)], 8)
    with pytest.raises(ValueError, match=r"batch.targets: 3 steps ahead; this model is trained on 2"):
        batch_loss(CFG, params(), batch, StepSettings())
    with pytest.raises(ConfigError, match=r"mtp_depths=3: must be None or 2"):
        StepSettings(mtp_depths=3).depths(CFG.replace(mtp=MTPConfig("*-", 2)))
    model = merge(CFG.replace(mtp=MTPConfig("*-", 2)), params(2))
    with pytest.raises(ConfigError, match=r"depth=3: must be 1 to 2"):
        model.predict(jnp.zeros((1, 1, 16)), PackedBatch.from_rows([[1]]), depth=3)
    bare = CFG.replace(mtp=None)
    with pytest.raises(ConfigError, match=r"mtp=None: the model has no multi-token prediction"):
        merge(bare, init_params(bare)).predict(jnp.zeros((1, 1, 16)), PackedBatch.from_rows([[1]]))
    with pytest.raises(ConfigError, match=r"mtp.pattern='\*X': unknown letter X"):
        CFG.replace(mtp=MTPConfig("*X"))
    with pytest.raises(ConfigError, match=r"mamba=None: the mtp.pattern 'M' needs it"):
        tiny_config("*-", mamba=None, mtp=MTPConfig("M"))
