"""Draft, verify, commit: whatever is proposed, the tokens are those of plain greedy decoding (SpecEdge, arXiv 2505.17052)."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.batch import PackedBatch
from jaxllm.cache.state import Cache, init_cache
from tests.kernels.tree_cases import path_to, random_parents
from tests.model.window_cases import CAPACITY, MODELS, ROWS, VOCAB, W, chunk, read, steps

PROMPTS = [[5, 11, 2, 30, 7, 7, 19], [1], [8, 3, 3, 21]]
NEW = 16
CHAIN = np.arange(-1, W - 1, dtype=np.int32)


@dataclass
class Draft:
    """A tree for one row: node 0 is the last committed token, which the model has not read yet."""

    tokens: np.ndarray
    parents: np.ndarray
    nodes: int


@functools.cache
def plain(name: str) -> list[list[int]]:
    """NEW greedy tokens for each prompt, one ``extend`` a token."""
    extend, _, _ = steps(MODELS[name])
    cache, tokens = prefilled(name)
    made = [[token] for token in tokens]
    for step in range(NEW - 1):
        starts = [len(prompt) + step for prompt in PROMPTS]
        logits, cache = extend(chunk([[row[-1]] for row in made], starts, None), cache)
        for row, best in zip(made, np.argmax(logits[:, 0], axis=-1)):
            row.append(int(best))
    return made


def prefilled(name: str) -> tuple[Cache, list[int]]:
    """The cache after all prompts but their last tokens' and the first new token of each, which it has not seen."""
    cfg = MODELS[name]
    cache = read(cfg, init_cache(cfg, ROWS, CAPACITY), [prompt[:-1] for prompt in PROMPTS], None)
    last = [[prompt[-1]] for prompt in PROMPTS]
    logits, cache = steps(cfg)[0](chunk(last, [len(prompt) - 1 for prompt in PROMPTS], None), cache)
    return cache, np.argmax(logits[:, 0], axis=-1).tolist()


def always_right(rng: np.random.Generator, root: int, future: list[int]) -> Draft:
    tokens = np.array([root, *future, *[0] * W][:W], np.int32)
    return Draft(tokens, CHAIN, W)


def always_wrong(rng: np.random.Generator, root: int, future: list[int]) -> Draft:
    tokens = [(token + 1) % VOCAB for token in [*future, *[0] * W]]
    return Draft(np.array([root, *tokens][:W], np.int32), CHAIN, W)


def anything(rng: np.random.Generator, root: int, future: list[int]) -> Draft:
    """A random tree, in part right, of random size; siblings carry distinct tokens."""
    parents = np.maximum(random_parents(rng, 1, W)[0], 0)
    parents[0] = -1
    tokens = np.full(W, root, np.int32)
    live = np.ones(W, bool)
    for node in range(1, W):
        depth = len(path_to(parents, live, node)) - 1
        siblings = tokens[:node][parents[:node] == parents[node]]
        free = [token for token in range(VOCAB) if token not in siblings]
        right = depth <= len(future) and future[depth - 1] in free and rng.random() < 0.7
        tokens[node] = future[depth - 1] if right else rng.choice(free)
    return Draft(tokens, parents, int(rng.integers(1, W + 1)))


def accept(draft: Draft, chosen: np.ndarray) -> list[int]:
    """The longest path on which every token is what the model chose at its parent; it begins with node 0."""
    best = [0]
    for node in range(1, draft.nodes):
        path = path_to(draft.parents, np.ones(W, bool), node)
        right = all(draft.tokens[b] == chosen[a] for a, b in itertools.pairwise(path))
        if right and len(path) > len(best):
            best = path
    return best


def speculate(name: str, propose: Callable, seed: int) -> tuple[list[list[int]], list[int]]:
    """NEW tokens for each prompt by windows, and how many windows each row took; done rows are padding."""
    rng = np.random.default_rng(seed)
    _, window_step, commit = steps(MODELS[name])
    cache, roots = prefilled(name)
    made, rounds = [[root] for root in roots], [0] * ROWS
    idle = Draft(np.zeros(W, np.int32), CHAIN, 0)
    while any(len(row) < NEW for row in made):
        drafts = [
            propose(rng, row[-1], plain(name)[index][len(row) :]) if len(row) < NEW else idle
            for index, row in enumerate(made)
        ]
        batch = PackedBatch.from_rows(
            np.stack([draft.tokens for draft in drafts]),
            parents=np.stack([draft.parents for draft in drafts]),
            lengths=[draft.nodes for draft in drafts],
            offset=[len(prompt) + len(row) - 1 for prompt, row in zip(PROMPTS, made)],
        )
        logits, window = window_step(batch, cache)
        chosen = np.argmax(logits, axis=-1)
        path, n = np.zeros((ROWS, W), np.int32), np.zeros(ROWS, np.int32)
        for row, draft in enumerate(drafts):
            if not draft.nodes:
                continue
            accepted = accept(draft, chosen[row])
            path[row, : len(accepted)], n[row] = accepted, len(accepted)
            made[row] += [*draft.tokens[accepted[1:]].tolist(), int(chosen[row, accepted[-1]])]
            rounds[row] += 1
        cache = commit(window, jnp.asarray(path), jnp.asarray(n))
    return made, rounds


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(4))
def test_any_draft_gives_the_greedy_tokens(name, seed):
    made, rounds = speculate(name, anything, seed)
    assert [row[:NEW] for row in made] == plain(name)
    assert min(rounds) < NEW - 1


@pytest.mark.parametrize("name", MODELS)
def test_a_draft_that_is_always_right_gives_a_window_of_tokens_each_time(name):
    """W - 1 drafts and the token behind them; the first new token came with the prompt."""
    made, rounds = speculate(name, always_right, 0)
    assert [row[:NEW] for row in made] == plain(name)
    assert rounds == [-(-(NEW - 1) // W)] * ROWS


@pytest.mark.parametrize("name", MODELS)
def test_a_draft_that_is_always_wrong_gives_one_token_each_time(name):
    made, rounds = speculate(name, always_wrong, 0)
    assert made == plain(name)
    assert rounds == [NEW - 1] * ROWS
