"""What the tests of the long-context experiments share: the model by construction, a question to it, every policy."""

import functools

import numpy as np
import pytest

from experiments import _retrieval_model as built
from experiments._long_context_cases import policies
from experiments._long_context_steps import Reader
from jaxllm import Policy, Tactic

LENGTH, BUDGET, LAYERS = 200, 1 / 4, 2


def chosen(budget: float, mass: float) -> dict[str, Policy]:
    """Every policy by its name."""
    return policies(budget, LENGTH, LAYERS) | {"tactic": Tactic(mass=mass)}


CHOSEN = chosen(BUDGET, 0.5)


def each_policy(*slow: str, fast: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """``name`` of every policy: those of ``fast`` always, those of ``slow`` among the slow tests, the others by night."""

    def marks(name: str) -> tuple[pytest.MarkDecorator, ...]:
        return () if name in fast else (pytest.mark.slow if name in slow else pytest.mark.nightly,)

    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in CHOSEN])


@functools.cache
def sample() -> built.TokenSample:
    """A context of ``LENGTH`` tokens and six questions."""
    return built.recall(np.random.default_rng(0), LENGTH, 6)


@functools.cache
def reader() -> Reader:
    """Of the model by construction."""
    return Reader(built.retrieval_model())
