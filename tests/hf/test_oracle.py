"""Parity with a live transformers model: every family, every option, both directions."""

from pathlib import Path
from typing import Any

import pytest
from hf_cases import CASES, RECORDED
from hf_mutants import surviving
from hf_parity import check_cached, check_prefill

import jaxllm.hf as hf

pytestmark = [
    pytest.mark.oracle,
    # torch, transformers and its dependencies.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]


@pytest.mark.parametrize("case", CASES)
def test_loads_and_agrees(case: str, live: Any, tmp_path: Path) -> None:
    """What transformers saves is loaded; prefill, cached decode and greedy tokens agree; planted errors do not."""
    theirs, expected = live(case)
    theirs.save_pretrained(tmp_path)
    model = hf.load(tmp_path)
    error = check_prefill(model, expected)
    cached, ties = check_cached(model, expected)
    print(f"{case}: prefill {error:.1e}, cached {cached:.1e}, near ties {ties}")
    if case not in RECORDED:
        assert surviving(model, expected) == []
