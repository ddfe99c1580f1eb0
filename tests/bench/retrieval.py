"""What the tests of the long-context experiments share: the model by construction, a question to it, every policy."""

import functools

import numpy as np

from experiments import _retrieval_model as built
from experiments._long_context_cases import policies
from experiments._long_context_steps import Reader
from jaxllm import Policy, Tactic

LENGTH, BUDGET, LAYERS = 200, 1 / 4, 2


def chosen(budget: float, mass: float) -> dict[str, Policy]:
    """Every policy by its name."""
    return policies(budget, LENGTH, LAYERS) | {"tactic": Tactic(mass=mass)}


CHOSEN = chosen(BUDGET, 0.5)


@functools.cache
def sample() -> built.TokenSample:
    """A context of ``LENGTH`` tokens and six questions."""
    return built.recall(np.random.default_rng(0), LENGTH, 6)


@functools.cache
def reader() -> Reader:
    """Of the model by construction."""
    return Reader(built.retrieval_model())
