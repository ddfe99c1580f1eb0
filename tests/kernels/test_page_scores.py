"""Quest's page scores: bounds of what a page's keys can score."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.compat import checkify
from pallas_kernels.paged_attention import page_scores
from tests.kernels.kernel_cases import close

B, K, G, d, page, n = 2, 2, 3, 8, 4, 5
SEEDS = st.integers(0, 2**20)


def draw(seed: int, tokens: int = page):
    """Queries, pages of keys, their bounds (NaN in pages that no table names) and a table of permuted pages."""
    rng = np.random.default_rng(seed)
    P = B * n + 2
    keys = rng.normal(size=(P, K, tokens, d)).astype(np.float32)
    table = rng.permutation(P)[: B * n].reshape(B, 1, n).repeat(K, axis=1)
    num_pages = rng.integers(0, n + 1, (B, K)).astype(np.int32)
    low, high = keys.min(axis=2), keys.max(axis=2)
    unused = np.ones((P, K), bool)
    for b, k in np.ndindex(B, K):
        unused[table[b, k, : num_pages[b, k]], k] = False
    low[unused], high[unused] = np.nan, np.nan
    q = rng.normal(size=(B, K * G, d)).astype(np.float32)
    return {
        "q": q,
        "page_min": low,
        "page_max": high,
        "table": table.astype(np.int32),
        "num_pages": num_pages,
    }, keys


def score(arguments: dict, **options) -> np.ndarray:
    return np.asarray(_jitted(tuple(options.items()))(jax.tree.map(jnp.asarray, arguments)))


def _jitted(options: tuple, _made: dict = {}):  # noqa: B006
    if options not in _made:
        _made[options] = jax.jit(lambda arguments: page_scores(**arguments, **dict(options)))
    return _made[options]


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@given(seed=SEEDS, tokens=st.sampled_from([page, 1]))
def test_no_key_scores_more_than_its_page(implementation, seed, tokens):
    arguments, keys = draw(seed, tokens)
    found = score(arguments, reduce="none", implementation=implementation)
    for b, h in np.ndindex(B, K * G):
        k = h // G
        for i in range(n):
            if i >= arguments["num_pages"][b, k]:
                assert found[b, h, i] == -np.inf
                continue
            best = (keys[arguments["table"][b, k, i], k].astype(np.float64) @ arguments["q"][b, h]).max()
            assert found[b, h, i] >= best - 1e-5
            # A page of one token has no slack.
            assert tokens > 1 or found[b, h, i] <= best + 1e-5


@given(seed=SEEDS)
def test_implementations_agree_and_a_group_takes_its_greatest(seed):
    arguments, _ = draw(seed)
    each, reference = (score(arguments, reduce="none", implementation=i) for i in ("xla", "reference"))
    close(each, reference)
    close(score(arguments), reference.reshape(B, K, G, n).max(axis=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.zeros((B, d))}, "q.shape"),
        ({"q": jnp.zeros((B, 5, d))}, "K = 2 .second. to divide H = 5"),
        ({"page_min": jnp.zeros((3, K, d + 1))}, "page_min.shape"),
        ({"page_max": jnp.zeros((3, K, d))}, "page_max.shape"),
        ({"table": jnp.zeros((B, n), jnp.int32)}, "table.shape"),
        ({"num_pages": jnp.zeros((B,), jnp.int32)}, "num_pages.shape"),
        ({"reduce": "mean"}, "reduce='mean': expected 'max' or 'none'"),
        ({"implementation": "cudnn"}, "implementation='cudnn'"),
    ],
)
def test_bad_arguments_are_named(own_checks, changes, message):
    arguments = jax.tree.map(jnp.asarray, draw(0)[0]) | changes
    with pytest.raises(ValueError, match=message):
        page_scores(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": np.full((B, K, n), 1000)}, "entries in use lie outside the pool"),
        ({"table": np.full((B, K, n), -1)}, "entries in use lie outside the pool"),
        ({"num_pages": np.full((B, K), n + 1)}, f"num_pages: expected 0 to {n} [table's entries]"),
        ({"num_pages": np.full((B, K), -1)}, f"num_pages: expected 0 to {n}"),
    ],
)
def test_debug_mode_catches_bad_values(changes, message):
    arguments = jax.tree.map(jnp.asarray, draw(0)[0] | changes)
    checked = jax.jit(checkify.checkify(lambda a: page_scores(**a, debug=True)))
    assert message in (checked(arguments)[0].get() or "")
    with pytest.raises(Exception, match=re.escape(message)):
        page_scores(**arguments, debug=True)


def test_debug_mode_lets_entries_of_nothing_be():
    arguments = draw(0)[0]
    unused = np.arange(n) >= arguments["num_pages"][..., None]
    assert unused.any()
    arguments["table"] = np.where(unused, 1000, arguments["table"])
    page_scores(**jax.tree.map(jnp.asarray, arguments), debug=True)
