"""Packed = separate, padded = unpadded, batched = single: forward and gradients, over random mixtures of layers."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.batch import PackedBatch
from jaxllm.config import (
    AttentionConfig,
    GatedDeltaConfig,
    JetConfig,
    MambaConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
)
from jaxllm.model.functional import init_params, map_named, merge
from tests.quick import QUICK

VOCAB, ROWS, LENGTH, TOLERANCE = 61, 3, 24, 2e-5
_BASE = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=24,
    pattern="M*",
    mamba=MambaConfig(num_heads=4, head_dim=6, state_size=8, n_groups=2, chunk_size=8),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, window=5),
    mlp=MLPConfig(40),
)
CONFIGS = {
    "hybrid": _BASE.replace(pattern="M-*M"),
    "window and rope": _BASE.replace(
        pattern="WM*-",
        attention=AttentionConfig(
            4, 2, 8, rope=RopeConfig(), window=5, qk_norm=True, qkv_bias=True, out_bias=True
        ),
        mlp=MLPConfig(40, "swiglu", bias=True),
        norm_cast="first",
        tie_embeddings=True,
    ),
    "experts": _BASE.replace(
        pattern="ME*",
        moe=MoEConfig(
            8, 3, 20, shared_intermediate_size=16, scaling=2.5, n_groups=4, topk_groups=2, latent_size=12
        ),
    ),
    "gated experts": _BASE.replace(
        pattern="*E",
        moe=MoEConfig(6, 2, 20, activation="swiglu", router="softmax", correction_bias=False),
        norm_cast="first",
    ),
    # One token of several documents a chunk; more value heads than key heads; sides of the state that differ.
    "delta": _BASE.replace(
        pattern="GJG",
        delta=GatedDeltaConfig(2, 4, key_head_dim=6, value_head_dim=5, chunk_size=8, allow_neg_eigval=True),
        jet=JetConfig(2, 6, 8, generator_reduction=4, chunk_size=8),
    ),
}
# The norm of heads divides by what a head has read, which is next to nothing where a query meets few keys or none that
# resembles it: rounding is amplified up to norm_eps ** -0.5 = 316 times, in gradients by the square of that.
AMPLIFYING = ("delta",)


@functools.cache
def _params(name: str) -> Any:
    """Parameters away from their initial values, where many would be one or zero."""
    rng = np.random.default_rng(0)
    return map_named(lambda _, v: v + 0.2 * rng.standard_normal(v.shape), init_params(CONFIGS[name]))


@functools.partial(jax.jit, static_argnames=("name", "remat"), compiler_options=QUICK)
def _compiled(params: Any, batch: PackedBatch, weights: jax.Array, *, name: str, remat: str) -> Any:
    def loss(params: Any) -> Any:
        model = merge(CONFIGS[name], params)
        logits = model(batch, model.context(remat=remat))
        return jnp.sum(logits * weights), logits

    (_, logits), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return logits, gradient


def _run(name: str, batch: PackedBatch, weights: np.ndarray, remat: str = "none") -> tuple[np.ndarray, Any]:
    """(logits, gradients of sum(logits * weights)); weights are zero at padding."""
    logits, gradient = _compiled(_params(name), batch, weights, name=name, remat=remat)
    return np.asarray(logits), gradient


@dataclass
class Document:
    """Tokens and the weights of their logits in a scalar loss."""

    tokens: np.ndarray
    weights: np.ndarray


def _documents(seed: int, lengths: list[int]) -> list[Document]:
    rng = np.random.default_rng(seed)
    return [
        Document(rng.integers(0, VOCAB, n), rng.standard_normal((n, VOCAB)).astype(np.float32))
        for n in lengths
    ]


def _rows(rows: list[list[tuple[int, Document]]]) -> tuple[PackedBatch, np.ndarray]:
    """ROWS x LENGTH tokens from (first column, document) placements; all else, whole rows too, is padding."""
    shape = (ROWS, LENGTH)
    # Padding tokens and positions are garbage on purpose: segment 0 has to be inert whatever they are.
    tokens = np.random.default_rng(99).integers(0, VOCAB, shape)
    positions = np.random.default_rng(98).integers(0, LENGTH, shape)
    segments, weights = np.zeros(shape, np.int32), np.zeros((*shape, VOCAB), np.float32)
    for r, row in enumerate(rows):
        for number, (start, document) in enumerate(row, start=1):
            span = slice(start, start + len(document.tokens))
            tokens[r, span], weights[r, span] = document.tokens, document.weights
            segments[r, span], positions[r, span] = number, np.arange(len(document.tokens))
    batch = PackedBatch(*(jnp.asarray(x, jnp.int32) for x in (tokens, segments, positions)))
    return batch, weights


def _assert_close(actual: Any, expected: Any, rounding: float = 0.0) -> None:
    allowed = max(TOLERANCE * max(1.0, float(np.abs(expected).max())), rounding)
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=allowed)


def _rounding(name: str, batch: PackedBatch, weights: np.ndarray) -> tuple[float, Any]:
    """How far logits of documents, and each gradient, move with the last bit of every parameter: the most of three draws.

    Of 24 packings of "delta", one of 24 tokens in three documents each, two had differences above the plain tolerance, at
    most 1.5 times it, while this moved the same values by 0.8 to 9 times the tolerance; no difference was more than half
    of it. With an epsilon of 0.1, which no model has, differences are below 0.3 of the plain tolerance.
    """
    if name not in AMPLIFYING:
        return 0.0, jax.tree.map(lambda _: 0.0, _params(name))
    logits, gradient = _run(name, batch, weights)
    furthest = lambda a, b: float(np.abs(a - b).max())  # noqa: E731
    draws = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        moved = jax.tree.map(
            lambda v: v * (1 + 2.0**-23 * rng.integers(-1, 2, v.shape)).astype(np.float32),  # noqa: B023
            _params(name),
        )
        other, slope = _compiled(moved, batch, weights, name=name, remat="none")
        inside = weights.any(-1)
        draws.append(
            (furthest(np.asarray(other)[inside], logits[inside]), jax.tree.map(furthest, slope, gradient))
        )
    return jax.tree.map(max, *draws)


def _assert_same(name: str, rows: list[list[tuple[int, Document]]]) -> None:
    """``rows`` compute what their documents compute alone: logits, and gradients of every parameter."""
    logits, gradient = _run(name, *_rows(rows))
    rounding, slopes = _rounding(name, *_rows(rows))
    total = jax.tree.map(np.zeros_like, gradient)
    for r, row in enumerate(rows):
        for start, document in row:
            length = len(document.tokens)
            alone, part = _run(name, *_rows([[(0, document)]]))
            _assert_close(logits[r, start : start + length], alone[0, :length], rounding)
            total = jax.tree.map(np.add, total, part)
    jax.tree.map(_assert_close, gradient, total, slopes)


@pytest.mark.parametrize("name", CONFIGS)
@given(
    seed=st.integers(0, 2**31), cuts=st.lists(st.integers(1, LENGTH - 1), min_size=1, max_size=3, unique=True)
)
def test_packed_is_separate(name: str, seed: int, cuts: list[int]) -> None:
    bounds = [0, *sorted(cuts), LENGTH]
    documents = _documents(seed, list(np.diff(bounds)))
    _assert_same(name, [list(zip(bounds, documents))])


@pytest.mark.parametrize("name", CONFIGS)
@given(seed=st.integers(0, 2**31), left=st.integers(0, 5), between=st.integers(1, 5), first=st.integers(1, 8))
def test_padded_is_unpadded(name: str, seed: int, left: int, between: int, first: int) -> None:
    """Padding on the left, between two documents and on the right, one row."""
    documents = _documents(seed, [first, 5])
    _assert_same(name, [[(left, documents[0]), (left + first + between, documents[1])]])


@pytest.mark.parametrize("name", CONFIGS)
@given(seed=st.integers(0, 2**31), lengths=st.lists(st.integers(1, LENGTH), min_size=3, max_size=3))
def test_batched_is_single(name: str, seed: int, lengths: list[int]) -> None:
    _assert_same(name, [[(LENGTH - n, document)] for n, document in zip(lengths, _documents(seed, lengths))])


@pytest.mark.parametrize("remat", ["layer", "dots"])
def test_remat_policies_are_equal(remat: str) -> None:
    batch, weights = _rows([[(0, document)] for document in _documents(5, [LENGTH])])
    (logits, gradient), expected = _run("hybrid", batch, weights, remat), _run("hybrid", batch, weights)
    _assert_close(logits, expected[0])
    jax.tree.map(_assert_close, gradient, expected[1])


def test_unknown_remat_policy() -> None:
    batch, weights = _rows([[(0, document)] for document in _documents(5, [LENGTH])])
    with pytest.raises(ValueError, match="remat='some'"):
        _run("hybrid", batch, weights, "some")


def test_hidden_taps() -> None:
    """Every residual state, the embedding first; the last one, normed, is the hidden state."""
    cfg, params = CONFIGS["hybrid"], _params("hybrid")
    batch, weights = _rows([[(0, document)] for document in _documents(6, [LENGTH])])

    @jax.jit
    def tapped(params: Any) -> Any:
        model = merge(cfg, params)
        assert model.hidden(batch)[1] == {}
        h, aux = model.hidden(batch, model.context(taps=frozenset({"hidden"})))
        return model.head(h), aux["hidden"], model.norm_f(aux["hidden"][-1]) - h

    logits, hidden, difference = tapped(params)
    assert hidden.shape == (len(cfg.pattern) + 1, ROWS, LENGTH, cfg.hidden_size)
    _assert_close(logits[0], _run("hybrid", batch, weights)[0][0])
    _assert_close(hidden[0], params["embed"]["weight"][batch.tokens])
    assert not np.any(difference)
