"""Batches: resumed = uninterrupted, shards = slices, validation scores everything once."""

import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.data.errors import DataError, LoaderStateError
from jaxllm.data.loader import Loader, scored_bytes, unread_validation_batches, validation_batches
from tests.data.corpora import numbered_corpus, synthetic_corpus

CORPUS = synthetic_corpus(
    [5, 40, 1, 17, 9, 28, 3]
)  # 103 tokens: 13 rows of 8, so that batches straddle epochs


def assert_same(a, b):
    for (path, x), (_, y) in zip(jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b), strict=True):
        assert x.dtype == y.dtype, path
        np.testing.assert_array_equal(x, y, err_msg=str(path))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 11), st.sampled_from([0, 2]), st.integers(0, 3))
def test_resumed_is_uninterrupted(stop, prefetch, seed):
    whole = Loader(CORPUS, 4, 8, seed=seed)
    expected = [next(whole) for _ in range(stop + 4)]
    first = Loader(CORPUS, 4, 8, seed=seed, prefetch=prefetch)
    for _ in range(stop):
        next(first)
    saved = json.dumps(first.state())
    next(first)  # what happens after the state was taken must not count
    second = Loader(CORPUS, 4, 8, seed=seed, prefetch=prefetch)
    next(second)
    second.restore(json.loads(saved))
    assert second.step == stop
    for batch in expected[stop:]:
        assert_same(next(second), batch)
    first.close()
    second.close()


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([1, 2, 3, 6]), st.integers(0, 20))
def test_a_process_reads_its_slice_of_the_global_batch(processes, step):
    whole = Loader(CORPUS, 6, 8, seed=1).batch_at(step)
    shares = [
        Loader(CORPUS, 6, 8, seed=1, process_index=index, process_count=processes).batch_at(step)
        for index in range(processes)
    ]
    assert_same(jax.tree.map(lambda *parts: np.concatenate(parts), *shares), whole)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 20), st.integers(1, 3), st.integers(0, 3), st.integers(0, 32))
def test_any_places_of_a_whole_batch_can_be_read_by_any_process(step, depths, seed, count):
    whole = Loader(CORPUS, 4, 8, seed=seed, depths=depths)
    loader = Loader(CORPUS, 4, 8, seed=seed, depths=depths, process_index=1, process_count=2)
    loader.restore({**loader.state(), "step": step})
    batch, expected = loader.next_unread(), whole.batch_at(step)
    assert_unread(batch, expected, np.random.default_rng(seed), count)
    assert loader.step == step + 1
    assert_same(next(loader), jax.tree.map(lambda x: x[2:], whole.batch_at(step + 1)))
    loader.close()


def assert_unread(batch, expected, rng, count: int) -> None:
    """The same batch, as far as it goes and in ``count`` random places of documents."""
    assert batch.shape == expected.shape
    for name in ("segment_ids", "positions", "loss_mask"):
        assert_same(getattr(batch, name), getattr(expected, name))
    places = rng.permutation(np.flatnonzero(expected.segment_ids))[:count]
    targets = expected.targets.reshape(-1, expected.targets.shape[-1])
    assert_same(batch.read(places), (expected.tokens.reshape(-1)[places], targets[places]))


def test_unread_validation_batches_are_those_with_tokens(seed):
    whole, rng = list(validation_batches(CORPUS, 4, 8)), np.random.default_rng(seed)
    for batch, expected in zip(unread_validation_batches(CORPUS, 4, 8), whole, strict=True):
        assert_unread(batch, expected, rng, 32)
    assert (whole[-1].segment_ids[-1] == 0).all()


def test_iteration_gives_batch_at_each_step_without_moving_for_random_access():
    loader = Loader(CORPUS, 3, 8, seed=2)
    for step in range(6):
        assert_same(loader.batch_at(9), Loader(CORPUS, 3, 8, seed=2).batch_at(9))
        assert loader.step == step
        assert_same(next(loader), loader.batch_at(step))


def test_an_epoch_holds_every_token_once_and_the_next_epoch_another_order():
    corpus = numbered_corpus([7, 30, 12, 15])  # 64 tokens: 8 rows of 8
    loader = Loader(corpus, 2, 8)
    epochs = [np.concatenate([next(loader).tokens.ravel() for _ in range(4)]) for _ in range(2)]
    assert loader.epoch == 2.0 and loader.steps_per_epoch == 4.0 and loader.tokens_per_step == 16
    for tokens in epochs:
        assert sorted(tokens) == list(range(64))
    assert epochs[0].tolist() != epochs[1].tolist()


def test_leaves_are_numpy_with_the_contract_shapes():
    batch = Loader(CORPUS, 4, 8, depths=3).batch_at(0)
    shapes = {
        name: (type(leaf), leaf.dtype, leaf.shape) for name, leaf in vars(batch).items() if leaf is not None
    }
    ids = (np.ndarray, np.dtype(np.int32), (4, 8))
    assert shapes == {
        "tokens": ids,
        "segment_ids": ids,
        "positions": ids,
        "targets": (np.ndarray, np.dtype(np.int32), (4, 8, 3)),
        "loss_mask": (np.ndarray, np.dtype(np.float32), (4, 8)),
    }


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"seq_len": 16}, {"batch_size": 2}, {"depths": 2}, {"corpus": None}]
)
def test_a_state_of_other_settings_is_refused(change):
    corpus = synthetic_corpus([50], seed=9) if "corpus" in change else CORPUS
    settings = {"batch_size": 4, "seq_len": 8, "seed": 0, "depths": 1} | change
    settings.pop("corpus", None)
    with pytest.raises(LoaderStateError, match=rf"{next(iter(change))} was"):
        Loader(corpus, **settings).restore(Loader(CORPUS, 4, 8).state())


def test_a_state_without_a_step_is_refused():
    loader = Loader(CORPUS, 4, 8)
    with pytest.raises(LoaderStateError, match="step is None"):
        loader.restore({name: value for name, value in loader.state().items() if name != "step"})


@pytest.mark.parametrize(
    ("index", "count", "match"), [(0, 3, "multiple"), (2, 2, "0 to 1"), (-1, 2, "0 to 1")]
)
def test_shares_must_exist(index, count, match):
    with pytest.raises(DataError, match=match):
        Loader(CORPUS, 4, 8, process_index=index, process_count=count)
    with pytest.raises(DataError, match=match):
        validation_batches(CORPUS, 4, 8, process_index=index, process_count=count)


def test_steps_count_from_zero():
    with pytest.raises(DataError, match="count from 0"):
        Loader(CORPUS, 4, 8).batch_at(-1)


@pytest.mark.parametrize(("batch_size", "processes"), [(1, 1), (4, 2), (20, 4)])
def test_validation_scores_every_target_once_and_pads_the_end(batch_size, processes):
    corpus = numbered_corpus([5, 40, 1, 17, 9, 28, 3])
    parts = [
        list(validation_batches(corpus, batch_size, 8, process_index=index, process_count=processes))
        for index in range(processes)
    ]
    assert {len(part) for part in parts} == {-(-13 // batch_size)}
    batches = [jax.tree.map(lambda *leaves: np.concatenate(leaves), *step) for step in zip(*parts)]
    tokens = np.concatenate([batch.tokens[batch.segment_ids > 0] for batch in batches])
    np.testing.assert_array_equal(tokens, np.arange(len(corpus)))
    targets = np.concatenate([batch.targets[..., 0][batch.loss_mask > 0] for batch in batches])
    assert len(targets) == corpus.n_targets
    assert sorted(targets) == sorted(set(range(len(corpus))) - set(corpus.offsets[:-1].tolist()))
    padding = batches[-1].segment_ids == 0
    assert padding.sum() == batch_size * 8 * len(batches) - len(corpus)
    assert (batches[-1].targets[padding] == -1).all() and (batches[-1].tokens[padding] == 0).all()


def test_scored_bytes_counts_the_targets_only():
    corpus = synthetic_corpus([6, 5], vocab_size=10)
    lengths = np.arange(10) + 1
    total = sum(scored_bytes(batch, lengths) for batch in validation_batches(corpus, 2, 4))
    assert total == lengths[corpus.tokens].sum() - lengths[corpus.tokens[corpus.offsets[:-1]]].sum()
