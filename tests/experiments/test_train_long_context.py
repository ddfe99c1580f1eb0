"""The training script runs, resumes and leaves a folder that loads."""

import json
import shutil
import sys

import numpy as np
import pytest

import jaxllm
from experiments import train_long_context
from experiments.long_scores import accuracy, bits_per_byte


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["attention", "hybrid"])
def test_quick_run_leaves_a_model_and_figures(kind, tmp_path, monkeypatch):
    def run(out):
        arguments = ["train_long_context.py", "--quick", "--kind", kind, "--out", str(out)]
        monkeypatch.setattr(sys, "argv", arguments)
        train_long_context.main()
        return json.loads((out / "train_long_context.json").read_text())["results"][kind]

    whole = run(tmp_path / "whole")
    assert whole["steps"] == sum(stage.steps for stage in train_long_context.curriculum(True))
    assert {row["task"] for row in whole["accuracy"]} == {"recall", "arithmetic"}
    assert (tmp_path / "whole" / "train_long_context.png").stat().st_size > 1000
    # As if it had been stopped in the second stage: what is left is the checkpoint of the first.
    steps = sorted((tmp_path / "whole" / kind / "checkpoints" / "steps").iterdir(), key=lambda p: int(p.name))
    assert len(steps) == 2
    shutil.rmtree(steps[1])
    again = run(tmp_path / "whole")
    assert again["accuracy"] == whole["accuracy"] and again["bits_per_byte"] == whole["bits_per_byte"]
    model = jaxllm.load(tmp_path / "whole" / f"{kind}-hf")
    assert model.cfg.pattern == train_long_context.models(True)[kind].pattern


def test_models_have_the_sizes_that_are_told():
    from jaxllm.cli.model_parts import parameter_count

    for cfg in train_long_context.models().values():
        assert 1.5e6 <= parameter_count(cfg) <= 2.5e6


def test_scores_of_a_model_that_knows_nothing():
    from experiments.long_batches import byte_tokenizer
    from jaxllm.model.functional import init_params

    cfg = train_long_context.models(True)["attention"]
    model = jaxllm.LanguageModel(cfg, init_params(cfg), byte_tokenizer())
    row = accuracy(model, "recall", 64, 2)
    assert row["exact"] == row["final"] == 0.0 and row["samples"] == 2
    assert abs(bits_per_byte(model, 64, rows=2) - np.log2(cfg.vocab_size)) < 1.0
