"""Why selections miss: what is compared with what."""

import json

import numpy as np
import pytest

from experiments import _retrieval_model as built
from experiments import selection_limits
from experiments.long_context import BUILT


def test_choices_are_as_large_as_each_other_and_causal():
    """Attention that stands still is known from before; attention that moves on is not."""
    context, steps = 64, 6
    still = np.zeros((steps, 2, context + steps), np.float32)
    still[:, :, 10:14] = 0.25
    found = selection_limits.drift(still, context)
    # A sixteenth of 65 tokens or more is 5 tokens; those that came since leave the list of an earlier step fewer.
    assert found["own"] == pytest.approx(1) and found["last"] == 0
    assert found["earlier"] < 1
    moving = np.zeros_like(still)
    for step in range(steps):
        moving[step, :, 8 * step] = 1
    assert selection_limits.drift(moving, context)["earlier"] == 0
    newest = np.zeros_like(still)
    for step in range(steps):
        newest[step, :, context + step] = 1
    found = selection_limits.drift(newest, context)
    assert found["own"] == found["last"] == found["earlier"] == 1


def test_runs_change_filler_alone():
    sample = built.recall(np.random.default_rng(0), 256, 8)
    text, runs = np.array(sample.context), np.array(selection_limits.in_runs(sample, 16).context)
    pairs = text < built.FIRST_FILLER
    assert (runs[pairs] == text[pairs]).all() and (runs[~pairs] >= built.FIRST_FILLER).all()
    for start in range(0, 256, 16):
        assert len(set(runs[start : start + 16][~pairs[start : start + 16]])) == 1


def test_a_box_around_one_key_is_that_key():
    alone = selection_limits.random_keys(512, 1, draws=20)
    assert alone["page_read"] == [1.0]
    assert selection_limits.random_keys(512, 16, draws=200)["page_read"][0] < 0.99


@pytest.mark.slow
def test_the_quick_form_runs(tmp_path):
    out = tmp_path / "limits.json"
    assert selection_limits.main(["--quick", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [row["case"] for row in found["pages"]] == [
        "random keys",
        "as in the table",
        "filler in runs of one token",
    ]
    assert {row["model"] for row in found["steps"]} == {BUILT}
    for row in found["steps"]:
        # Nothing of the same size holds more than the best, and Pillar reads at most a period more.
        assert row["own"] >= max(row["earlier"], row["last"]) - 1e-6
        assert 0 < row["quest"] <= 1.001 and 0 < row["pillar"] <= 1.001
