"""Compiled steps that several tests share: compilation is most of the cost here."""

import pytest

from jaxllm.train.step import make_train_step
from tests.train.tiny import constant_lr, tiny_config


@pytest.fixture(scope="session")
def cfg():
    return tiny_config("*-")


@pytest.fixture(scope="session")
def optim():
    return constant_lr()


@pytest.fixture(scope="session")
def train_step(cfg, optim):
    """The step of ``cfg`` and ``optim``; consumes its state."""
    return make_train_step(cfg, optim)
