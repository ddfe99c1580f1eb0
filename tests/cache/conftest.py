"""Random numbers of the commit's seed."""

import numpy as np
import pytest


@pytest.fixture
def rng(seed) -> np.random.Generator:
    return np.random.default_rng(seed)
