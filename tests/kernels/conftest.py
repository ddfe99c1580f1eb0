"""Fixtures of the kernel tests."""

import jaxtyping
import pytest


@pytest.fixture
def own_checks():
    """Turns the run-time shape annotations off, so that the ops' own refusals are what is seen."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
