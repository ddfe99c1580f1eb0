"""A training run whose workers are killed: parameters are those of a run in which nobody was, to the bit."""

import itertools
import json
import os

import jax
import numpy as np
import pytest

from experiments._failover_account import ledgers, samples
from jaxllm.config import ConfigError
from jaxllm.data.loader import Loader
from jaxllm.data.tokens import TokenCorpus
from jaxllm.train.ledger import Ledger
from jaxllm.train.settings import TrainSettings
from jaxllm.train.sharing import check_elastic
from jaxllm.train.step import StepSettings
from parallel.mesh import MeshShape
from tests.train.elastic_runs import elastic

WORKERS, STEPS = 3, 40

REFUSED = {
    "failover=1: one worker has no neighbour": (TrainSettings(steps=1), 1, 12),
    "mesh.data=2: must be the number of workers, 3": (TrainSettings(steps=1, mesh=MeshShape(data=2)), 3, 12),
    "mesh.fsdp=3: .* no second owner": (TrainSettings(steps=1, mesh=MeshShape(data=3, fsdp=3)), 3, 12),
    "mesh.fsdp=2: .* no second owner": (TrainSettings(steps=1, mesh=MeshShape(fsdp=2)), 2, 12),
    "batch_size=10: must be a multiple of workers": (TrainSettings(steps=1), 3, 10),
    r"batch_size=12: .* = 3 \* 8": (TrainSettings(steps=1, step=StepSettings(accum_steps=8)), 3, 12),
    "debug_nans=True": (TrainSettings(steps=1, debug_nans=True), 3, 12),
    "mesh.stage=2: must divide the number of workers, 3": (
        TrainSettings(steps=1, mesh=MeshShape(data=3, stage=2)),
        3,
        12,
    ),
    "mesh.data=4: must be workers / mesh.stage = 4 / 2 = 2": (
        TrainSettings(steps=1, mesh=MeshShape(data=4, stage=2)),
        4,
        12,
    ),
    r"batch_size=9: must be a multiple of mesh.data \* accum_steps = 2 \* 1": (
        TrainSettings(steps=1, mesh=MeshShape(data=2, stage=2)),
        4,
        9,
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_runs_that_cannot_lose_workers_are_refused(words):
    with pytest.raises(ConfigError, match=words):
        check_elastic(*REFUSED[words])
    check_elastic(TrainSettings(steps=1, mesh=MeshShape(data=3)), 3, 12)
    check_elastic(TrainSettings(steps=1, mesh=MeshShape(data=2, stage=2)), 4, 12)


def test_any_row_of_any_batch_is_that_of_the_loader():
    rng = np.random.default_rng(0)
    corpus = TokenCorpus(rng.integers(1, 60, 900).astype(np.int32), np.arange(0, 901, 90), 60, "any")
    loader = Loader(corpus, 4, 16)
    assert loader.batch_size == 4
    whole = loader.batch_at(3)
    found = loader.rows_at(3, [2, -1, 0])
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(ours[[0, 2]], theirs[[2, 0]])
    assert not found.segment_ids[1].any() and (found.targets[1] == -1).all()


def test_the_ledger_leaves_out_idle_rows_and_goes_on_in_the_same_file(tmp_path):
    for generation in (1, 2):
        ledger = Ledger(tmp_path / "run", 3)
        ledger.begin(4, 5, generation, [6, 7, -1, -1])
        ledger.close()
    rows = [json.loads(line) for line in (tmp_path / "run" / "rows-3.jsonl").read_text().splitlines()]
    assert [row["generation"] for row in rows] == [1, 2]
    assert rows[0]["rows"] == [6, 7] and (rows[0]["step"], rows[0]["updates"]) == (4, 5)
    assert rows[0]["pid"] == os.getpid()


@pytest.mark.slow
def test_killed_workers_leave_no_trace_in_the_parameters(tmp_path):
    whole, journal = elastic(tmp_path / "whole", "exact")
    assert len(whole) == 1 and not [row for row in journal if row["event"] == "lost"]
    killed, journal = elastic(tmp_path / "killed", "exact+save", (0,))
    assert killed == whole
    # Programs that one process has compiled the others find, in whatever order they are ranked.
    assert all(int((tmp_path / "killed" / f"hits-{worker}").read_text()) > 0 for worker in range(WORKERS))
    worlds = [row["members"] for row in journal if row["event"] == "world"]
    assert worlds[0] == [0, 1, 2] and [1, 2] in worlds
    told = [json.loads(line) for line in (tmp_path / "killed" / "jobs-1.jsonl").read_text().splitlines()]
    assert told[0] == [[0, 1, 2], [[0], [1], [2]]]
    assert [[1, 2], [[1, 0], [2]]] in told and all(
        sorted(itertools.chain(*jobs)) == [0, 1, 2] for _, jobs in told
    )
    metrics = (tmp_path / "killed" / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [row["step"] for row in map(json.loads, metrics) if row["kind"] == "train"]
    # Rank 0, who writes, was killed: whoever followed it went on in the same file. The line of its last step may be lost.
    assert steps == sorted(set(steps)) and steps[-1] == STEPS and len(steps) >= STEPS - 1
    assert (tmp_path / "killed" / "run" / "checkpoints" / "manifests" / f"{STEPS}.json").is_file()
    # Who trained which rows: every row of every batch once, in the state that the workers ended with.
    found = samples(ledgers(tmp_path / "killed" / "run", WORKERS), STEPS, 12)
    assert not (found["lost"] or found["twice"] or found["other_updates"]) and found["counted"] == STEPS * 12
