"""Recorded checkpoints, and one live transformers model per case."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from hf_cases import CASES, write_folder
from hf_parity import Expected

import jaxllm.hf as hf

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """recorded(case) -> (model loaded from a folder, what transformers computed); each case is loaded once."""
    cache: dict[str, Any] = {}

    def get(name: str) -> tuple[Any, Expected]:
        if name not in cache:
            data = np.load(FIXTURES / f"{name}.npz")
            config = json.loads(str(data["config"]))
            assert config == json.loads(json.dumps(CASES[name])), f"{name}: run make_fixtures.py again"
            folder = tmp_path_factory.mktemp(name)
            write_folder(folder, config, json.loads(str(data["shapes"])), int(data["seed"]))
            expected = Expected(data["tokens"], data["logits"], data["greedy"], data["gaps"])
            cache[name] = hf.load(folder), expected
        return cache[name]

    return get


@pytest.fixture(scope="session")
def live() -> Any:
    """live(case) -> (transformers model, what it computes); each case is built once."""
    from hf_oracle import expect_case

    cache: dict[str, Any] = {}

    def get(name: str) -> tuple[Any, Expected]:
        if name not in cache:
            cache[name] = expect_case(name, seed=7)
        return cache[name]

    return get
