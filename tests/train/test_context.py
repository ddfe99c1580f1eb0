"""Batches planned ahead for devices that share documents: what is read, what is kept, how often a program is outgrown."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.batch import PackedBatch
from jaxllm.config import ConfigError
from jaxllm.train.context import FORESEEN, Ahead, ContextSettings, Scatterer, _further_weights
from jaxllm.train.mtp import ahead
from parallel.context import SCATTER_STRATEGIES
from parallel.mesh import MeshShape, abstract_mesh
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


def scatterer(strategy: str = "fcp", context: int = 4, block: int = 16, **axes: int) -> Scatterer:
    cfg, mesh = tiny_config("M*"), abstract_mesh(MeshShape(context=context, **axes))
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
    "made", [scatterer("ring", 2), scatterer(block=8), scatterer("ulysses"), scatterer("ulysses", 2)]
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
    found = _further_weights(batch)
    assert found is not None and found.shape == (6, 12, 2)
    for depth in (1, 2):
        expected = ahead(jnp.asarray(batch.loss_mask), jnp.asarray(batch.segment_ids), depth)
        np.testing.assert_array_equal(found[..., depth - 1], expected)
