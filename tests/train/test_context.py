"""Batches planned ahead for devices that share documents: what is read, what is kept, how often a program is outgrown."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.batch import PackedBatch
from jaxllm.config import AttentionConfig, ConfigError, MTPConfig
from jaxllm.data.loader import Loader
from jaxllm.data.unread import UnreadBatch
from jaxllm.train.context import FORESEEN, Ahead, ContextSettings, Scatterer, Slots, _further_weights
from jaxllm.train.mtp import ahead
from parallel.context import SCATTER_STRATEGIES
from parallel.mesh import MeshShape, abstract_mesh
from tests.data.corpora import numbered_corpus
from tests.train.tiny import tiny_batch, tiny_config


class Documents:
    """Rows of documents of log-normal lengths, a function of the batch's number."""

    def __init__(self, rows: int = 4, length: int = 512, seed: int = 0, fails_at: int = -1):
        self.rows, self.length, self.seed, self.fails_at = rows, length, seed, fails_at
        self.step = self.read = 0

    def __next__(self) -> PackedBatch:
        if self.step == self.fails_at:
            raise OSError("the disk is gone")
        rng = np.random.default_rng((self.seed, self.step))
        shape = self.rows, self.length
        lengths = np.exp(rng.normal(4, 1.5, shape)).astype(int) + 1
        ids = 1 + np.sum(np.arange(self.length)[:, None] >= np.cumsum(lengths, axis=1)[:, None, :], axis=2)
        index = np.broadcast_to(np.arange(self.length), shape)
        opens = np.concatenate([np.ones((self.rows, 1), bool), ids[:, 1:] != ids[:, :-1]], axis=1)
        begin = np.maximum.accumulate(np.where(opens, index, 0), axis=1)
        self.step, self.read = self.step + 1, self.read + 1
        tokens = rng.integers(0, 61, shape)
        return PackedBatch(*(x.astype(np.int32) for x in (tokens, ids, index - begin)))

    def state(self) -> dict:
        return {"step": self.step}

    def restore(self, state: dict) -> None:
        assert state.keys() == {"step"}
        self.step = state["step"]


WINDOW = 20


def scatterer(
    strategy: str = "fcp",
    context: int = 4,
    block: int = 16,
    pattern: str = "M*",
    mtp: str | None = None,
    **axes: int,
) -> Scatterer:
    attention = AttentionConfig(2, num_kv_heads=1, head_dim=8, window=WINDOW)
    prediction = None if mtp is None else MTPConfig(pattern=mtp)
    cfg = tiny_config(pattern, attention=attention, mtp=prediction)
    mesh = abstract_mesh(MeshShape(context=context, **axes))
    return Scatterer(cfg, ContextSettings(strategy, block, stage_rounds=4), mesh)


def assert_same(ours, theirs) -> None:
    assert jax.tree.structure(tuple(ours)) == jax.tree.structure(tuple(theirs))
    for a, b in zip(jax.tree.leaves(tuple(ours)), jax.tree.leaves(tuple(theirs)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("strategy", SCATTER_STRATEGIES)
def test_a_program_is_seldom_outgrown(strategy, seed):
    """In any run of 30 random batches; each change of the room is one more compilation of the step."""
    batches, programs, last = Ahead(Documents(seed=seed), scatterer(strategy)), 0, None
    for _ in range(30):
        next(batches)
        room = batches.state()["context"]
        programs += room != last
        last = room
    batches.close()
    assert programs <= 3


def test_a_run_begins_with_the_first_batch_and_room_for_several():
    documents = Documents()
    batches = Ahead(documents, scatterer())
    assert batches.state() == {"step": 0} and documents.read == 0
    first, whole, again = next(batches), scatterer(), Documents()
    for _ in range(FORESEEN):
        whole.grow(next(again))
    assert_same(first, whole(next(Documents())))
    assert batches.state()["step"] == 1
    batches.close()


def test_a_process_reads_the_tokens_of_its_own_slots_only(monkeypatch, seed):
    """Nothing to foresee the batches, and of each no more than what stands in the half of the slots that it holds."""
    lengths = np.exp(np.random.default_rng(seed).normal(4, 1.5, 90)).astype(int) + 1
    loader, read = Loader(numbered_corpus(lengths.tolist()), 2, 96, depths=2), []

    def spied(self, places, made=UnreadBatch.read):
        read.append(len(places))
        return made(self, places)

    monkeypatch.setattr(UnreadBatch, "read", spied)
    monkeypatch.setattr("jaxllm.train.context.held", lambda mesh, spec, count: np.arange(count) < count // 2)
    batches = Ahead(loader, scatterer())
    one = next(batches)
    batches.close()
    # The thread may have begun the batch after it.
    monkeypatch.undo()
    made = scatterer()
    made.room = made.room_of(batches.state()["context"])
    whole = made(loader.batch_at(0))
    half = len(whole.batch.tokens) // 2
    there = whole.batch.segment_ids > 0
    assert read[0] == there[:half].sum() and len(read) <= 2
    for name in ("tokens", "targets", "loss_mask"):
        mine, full = getattr(one.batch, name), getattr(whole.batch, name)
        np.testing.assert_array_equal(mine[:half], full[:half])
        assert (mine[half:] == (-1 if name == "targets" else 0)).all()
    np.testing.assert_array_equal(one.scattered.ahead[:half], whole.scattered.ahead[:half])
    assert_same((one.scattered.plan, one.batch.segment_ids), (whole.scattered.plan, whole.batch.segment_ids))


def test_restored_batches_are_the_same_whatever_was_read_ahead():
    one = Ahead(Documents(), scatterer())
    next(one), next(one)
    state = one.state()
    expected = [next(one) for _ in range(3)]
    one.restore(state)
    for each in expected:
        assert_same(next(one), each)
    one.close()
    other = Ahead(Documents(), scatterer())
    other.restore(state)
    assert other.state() == state
    for each in expected:
        assert_same(next(other), each)
    other.close()


@pytest.mark.parametrize(
    "made",
    [
        scatterer("ring", 2),
        scatterer(block=8),
        scatterer("ulysses"),
        scatterer("ulysses", 2),
        scatterer(pattern="WM"),
    ],
)
def test_a_room_of_other_devices_or_blocks_is_left(made):
    one = Ahead(Documents(), scatterer())
    next(one)
    state = one.state()
    one.close()
    other = Ahead(Documents(), made)
    other.restore(state)
    assert made.room is None
    next(other)
    assert other.state()["step"] == 2 and made.room_of(other.state()["context"]) == made.room
    other.close()


@pytest.mark.parametrize(
    ("pattern", "mtp", "seen"),
    [
        ("M*-", None, None),
        ("WM", None, WINDOW),
        ("W*", None, None),
        ("W-", "*-", None),
        ("*-", "W-", None),
        ("M-", "W-", WINDOW),
        ("M-", None, 1),
    ],
)
def test_plans_are_for_the_widest_attention_of_the_model(pattern, mtp, seen):
    for strategy in ("fcp", "ulysses"):
        made = scatterer(strategy, pattern=pattern, mtp=mtp)
        made(next(Documents(length=64)))
        assert made.room is not None and made.room.capacity.window == made.config.window == seen


def travelling(slots: Slots, workers: int, block: int, window: float) -> int:
    """(worker, block of keys of another one) of which a query of the worker sees some, token by token."""
    ids, positions = (np.asarray(x).reshape(-1) for x in (slots.batch.segment_ids, slots.batch.positions))
    worker = np.repeat(np.arange(workers), len(ids) // workers)
    ids, positions, worker = (x[ids > 0] for x in (ids, positions, worker))
    apart = positions[:, None] - positions
    seen = (ids[:, None] == ids) & (apart >= 0) & (apart < window) & (worker[:, None] != worker)
    query, key = np.nonzero(seen)
    return len(np.unique(np.stack([worker[query], ids[key], positions[key] // block]), axis=1).T)


@pytest.mark.parametrize("strategy", ["fcp", "fcp-pairs", "ring"])
def test_only_keys_that_some_layer_sees_travel(strategy, seed):
    """Of random documents in one row, and of a long one in another."""
    batch, sent = next(Documents(2, 384, seed=seed)), []
    for x, long in zip(jax.tree.leaves(batch), (0, 1, np.arange(384))):
        x[1] = long
    for pattern, window in (("M*", np.inf), ("WM", WINDOW), ("M-", 1)):
        made = scatterer(strategy, pattern=pattern)
        slots = made(batch)
        sent.append(int((np.asarray(slots.scattered.plan.send_slot) >= 0).sum()))
        assert sent[-1] == travelling(slots, 4, 16, window)
    assert made.room is not None and made.room.capacity.rounds == 0
    assert sent[0] > sent[1] > sent[2] == 0


def test_a_window_spares_most_of_what_would_travel():
    """A document of 384 tokens: of its 24 blocks each is seen by at most two later ones."""
    ones = np.ones((1, 384), np.int32)
    batch = PackedBatch(ones, ones, np.arange(384, dtype=np.int32)[None])
    sent = {
        pattern: int((np.asarray(scatterer(pattern=pattern)(batch).scattered.plan.send_slot) >= 0).sum())
        for pattern in ("M*", "WM")
    }
    assert sent["WM"] <= 2 * 24 < sent["M*"]


def test_what_fails_while_planning_ahead_fails_at_its_batch():
    batches = Ahead(Documents(fails_at=FORESEEN), scatterer())
    for _ in range(FORESEEN):
        next(batches)
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    batches.close()


@pytest.mark.parametrize(
    ("axes", "block", "words"),
    [
        ({"data": 3}, 16, "batch_size=4: must be a multiple of data * fsdp * expert * accum_steps = 3 * 1"),
        ({"data": 2}, 512, "context.block=512: must be at most the 256 tokens of a device in a microbatch"),
    ],
)
def test_rows_that_cannot_be_shared_are_refused(axes, block, words):
    with pytest.raises(ConfigError) as caught:
        scatterer(block=block, **axes)(next(Documents()))
    assert words in str(caught.value)


def test_positions_that_do_not_count_from_the_segment_are_refused():
    batch = next(Documents())
    with pytest.raises(ValueError, match=r"batch\.positions: must count from each segment's first token"):
        scatterer()(batch.replace(positions=np.asarray(batch.positions) + 1))


def test_weights_of_further_tokens_are_those_that_whole_rows_have():
    batch = tiny_batch(6, 12)
    batch = batch.replace(targets=np.repeat(batch.targets, 3, axis=-1))
    found = _further_weights(batch.segment_ids, batch.loss_mask, 2)
    assert found is not None and found.shape == (6, 12, 2)
    for depth in (1, 2):
        expected = ahead(jnp.asarray(batch.loss_mask), jnp.asarray(batch.segment_ids), depth)
        np.testing.assert_array_equal(found[..., depth - 1], expected)
