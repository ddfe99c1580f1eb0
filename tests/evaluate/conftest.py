"""One tiny model for all tests of this folder."""

import pytest

from tests.evaluate.tiny import tiny_model


@pytest.fixture(scope="session")
def lm():
    return tiny_model()
