"""An elastic run over pipeline stages: neighbours stand in for lost ones, and parameters are those of one device."""

import itertools
import json

import jax
import numpy as np
import pytest

from experiments._failover_account import ledgers, samples
from jaxllm.train.settings import TrainSettings
from jaxllm.train.trainer import fit
from tests.train.elastic_runs import elastic
from tests.train.elastic_worker import OPTIM, SETTINGS, Rows, model

WORKERS, STEPS = 4, 30


def of_one_device(steps: int = STEPS) -> list[np.ndarray]:
    settings = TrainSettings(steps=steps, step=SETTINGS, save_seconds=None)
    return jax.tree.leaves(fit(model(True), OPTIM, Rows(), settings).params)


def worlds(journal: list[dict]) -> list[list[int]]:
    return [row["members"] for row in journal if row["event"] == "world"]


def ends_as_one_device_does(folder) -> None:
    """Every step through every stage once, whoever ran it."""
    with np.load(folder / "params.npz") as file:
        found = list(file.values())
    for ours, theirs in zip(found, of_one_device(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-4)


@pytest.mark.slow
def test_a_neighbour_runs_the_stage_of_a_killed_worker(tmp_path):
    folder = tmp_path / "run"
    finals, journal = elastic(folder, "exact/2+save", (1,), workers=WORKERS, steps=STEPS)
    assert len(finals) == 1
    assert [0, 2, 3] in worlds(journal) and worlds(journal)[-1] == [0, 1, 2, 3]
    told = [json.loads(line) for line in (folder / "jobs-2.jsonl").read_text().splitlines()]
    assert told[0] == [[0, 1, 2, 3], [[0], [1], [2], [3]]]
    assert [[0, 2, 3], [[0, 1], [2], [3]]] in told
    assert all(sorted(itertools.chain(*jobs)) == [0, 1, 2, 3] for _, jobs in told)
    found = samples(ledgers(folder / "run", WORKERS), STEPS, 12)
    assert not (found["lost"] or found["twice"] or found["other_updates"]) and found["counted"] == STEPS * 12
    ends_as_one_device_does(folder)


@pytest.mark.slow
def test_where_nobody_has_a_stage_the_newest_checkpoint_is_taken_up(tmp_path):
    """Both copies of stage 0 are lost: those of stage 1 wait, and none trains without the others."""
    folder = tmp_path / "run"
    finals, _ = elastic(folder, "exact/2+save", (0, 2), workers=WORKERS, steps=STEPS, after=9)
    assert len(finals) == 1
    steps = [json.loads(line) for line in (folder / "steps-1.jsonl").read_text().splitlines()]
    numbers = [row["step"] for row in steps]
    again = [number for number, before in zip(numbers[1:], numbers) if number <= before]
    # Of step 7, the only one saved by then, or of a later one where the kill took its time.
    assert again and all(number % 7 == 1 for number in again), numbers
    told = [json.loads(line) for line in (folder / "jobs-1.jsonl").read_text().splitlines()]
    assert all(sorted(itertools.chain(*jobs)) == [0, 1, 2, 3] for _, jobs in told)
    ends_as_one_device_does(folder)
