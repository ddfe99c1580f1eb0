"""Parity with what transformers computed, without torch; and proof that the check would notice an error."""

from typing import Any

import pytest
from hf_cases import RECORDED
from hf_mutants import surviving
from hf_parity import check_cached, check_prefill


@pytest.mark.parametrize("case", RECORDED)
def test_recorded_logits(case: str, recorded: Any) -> None:
    """Prefill, cached decode and 48 greedy tokens."""
    model, expected = recorded(case)
    error = check_prefill(model, expected)
    cached, ties = check_cached(model, expected)
    print(f"{case}: prefill {error:.1e}, cached {cached:.1e}, near ties {ties}")


@pytest.mark.parametrize("case", RECORDED)
def test_every_mutant_is_noticed(case: str, recorded: Any) -> None:
    """Each planted error moves the logits past the tolerance."""
    assert surviving(*recorded(case)) == []
