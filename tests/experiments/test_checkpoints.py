"""The shipped models of the long-context experiments load and can do what they were trained for."""

from pathlib import Path

import pytest

import jaxllm
from experiments.long_scores import accuracy

FOLDER = Path(__file__).parents[2] / "experiments" / "checkpoints"
SHIPPED = sorted(path.name for path in FOLDER.iterdir()) if FOLDER.is_dir() else []


@pytest.mark.parametrize("kind", SHIPPED)
def test_shipped_models_are_small_and_recall(kind):
    assert sum(file.stat().st_size for file in (FOLDER / kind).iterdir()) <= 5_000_000
    model = jaxllm.load(FOLDER / kind)
    assert model.cfg.precision.param == "bfloat16"
    assert accuracy(model, "recall", 1024, 8)["exact"] >= 0.75
