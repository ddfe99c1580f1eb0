"""A retrieval model whose weights are written down, not trained: induction over two attention layers, and its tasks.

Every token has a random code of two parts, one for each KV head. The first layer's heads look one position back (rotary
pairs of high frequency, keys and queries constant) and copy that token's code beside the token's own. The second layer's
heads compare the current token's code with those copies (rotary pairs so slow that they hardly turn) and copy what stood
there: "key value ... key" gives "value", at any distance.

Attention of the second layer is a spike over a floor: codes are only nearly orthogonal, so that every stored token has
some weight, and all together as much as the spike where the context is long. KV head 0 is sharp, KV head 1 diffuse.
"""

from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np

from jaxllm.config import AttentionConfig, ModelConfig, RopeConfig
from jaxllm.model import functional
from jaxllm.model.functional import LanguageModel
from jaxllm.model.rope import inverse_frequencies

KV_HEADS, GROUP, HEAD_DIM = 2, 2, 64
# Rotary pairs that tell positions apart, and the others: dimensions for contents, of which 131,072 positions turn the
# fastest by 0.13 radians.
FAST = 8
CONTENT = np.concatenate([np.arange(FAST, HEAD_DIM // 2), np.arange(HEAD_DIM // 2 + FAST, HEAD_DIM)])
PART = len(CONTENT)
CODE = KV_HEADS * PART
# The residual stream: own code, code of the token before, what was retrieved, and a constant.
OWN, BEFORE, FOUND, CONSTANT = 0, CODE, 2 * CODE, 3 * CODE
WIDTH = 3 * CODE + 16
# Greatest score of every fast pair, so that the token before has nearly all of the first layer's attention.
LOOK_BACK = 24.0
# Greatest score of the second layer's query heads, by KV head.
MATCH = ((16.0, 14.0), (12.0, 11.0))
LOGIT = 20.0

# Tokens: one that announces a question, then keys, values and filler.
ASK, KEYS, VALUES, FILLER = 0, 512, 512, 1023
FIRST_KEY, FIRST_VALUE, FIRST_FILLER = 1, 1 + KEYS, 1 + KEYS + VALUES
VOCABULARY = FIRST_FILLER + FILLER


def config() -> ModelConfig:
    """Two attention layers and nothing else."""
    return ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        pattern="**",
        attention=AttentionConfig(
            num_heads=KV_HEADS * GROUP, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, rope=RopeConfig(theta=1e24)
        ),
        norm_eps=1e-8,
    )


def retrieval_model(seed: int = 0) -> LanguageModel:
    """The model; only the tokens' codes are random.

    Args:
        seed: of the codes.
    """
    cfg = config()
    codes = np.random.default_rng(seed).standard_normal((VOCABULARY, KV_HEADS, PART))
    codes /= np.linalg.norm(codes, axis=-1, keepdims=True) * KV_HEADS**0.5
    codes = codes.reshape(VOCABULARY, CODE)
    embedding = np.zeros((VOCABULARY, WIDTH))
    embedding[:, OWN : OWN + CODE] = codes
    embedding[:, CONSTANT] = 1
    head = np.zeros((WIDTH, VOCABULARY))
    head[FOUND : FOUND + CODE] = LOGIT * codes.T

    leaves = {"embed.weight": embedding, "lm_head.weight": head, "norm_f.weight": _undo_norm(4)}
    # The residual's square is 2 before the first layer (code and constant), 3 before the second.
    for layer, square, weights in ((0, 2, _look_back(cfg)), (1, 3, _match())):
        leaves[f"layers.{layer}.norm.weight"] = _undo_norm(square)
        for name, weight in zip(("q_proj", "k_proj", "v_proj", "o_proj"), weights):
            leaves[f"layers.{layer}.mixer.{name}.weight"] = weight
    params = functional.map_named(
        lambda name, leaf: jnp.asarray(leaves[name], leaf.dtype), functional.abstract_params(cfg)
    )
    return LanguageModel(cfg, params)


def _undo_norm(square: float) -> np.ndarray:
    """The weight that makes RMSNorm the identity for a residual of this sum of squares."""
    return np.full(WIDTH, (square / WIDTH) ** 0.5)


def _look_back(cfg: ModelConfig) -> tuple[np.ndarray, ...]:
    """q, k, v and o of the heads that copy the code of the token before."""
    assert cfg.attention is not None and cfg.attention.rope is not None
    frequencies = inverse_frequencies(cfg.attention.rope, HEAD_DIM)[:FAST]
    size = (LOOK_BACK * HEAD_DIM**0.5) ** 0.5
    query, key = np.zeros(HEAD_DIM), np.zeros(HEAD_DIM)
    # A constant query, turned back by one position: it meets the constant key of the position before.
    query[:FAST], query[HEAD_DIM // 2 :][:FAST] = np.cos(frequencies) * size, -np.sin(frequencies) * size
    key[:FAST] = size
    q, k = np.zeros((WIDTH, KV_HEADS * GROUP, HEAD_DIM)), np.zeros((WIDTH, KV_HEADS, HEAD_DIM))
    q[CONSTANT], k[CONSTANT] = query, key
    return _flat(q), _flat(k), *_copy(BEFORE)


def _match() -> tuple[np.ndarray, ...]:
    """q, k, v and o of the heads that find the current token's code among those of the tokens before."""
    q, k = np.zeros((WIDTH, KV_HEADS * GROUP, HEAD_DIM)), np.zeros((WIDTH, KV_HEADS, HEAD_DIM))
    for head in range(KV_HEADS):
        part = np.arange(PART) + head * PART
        k[BEFORE + part, head, CONTENT] = 1
        for member, score in enumerate(MATCH[head]):
            # A part's square is 1 / KV_HEADS, and attention divides by the root of the head's size.
            q[OWN + part, head * GROUP + member, CONTENT] = score * KV_HEADS * HEAD_DIM**0.5
    return _flat(q), _flat(k), *_copy(FOUND)


def _copy(target: int) -> tuple[np.ndarray, np.ndarray]:
    """v and o: each KV head moves its part of the tokens' own codes to ``target``, the mean over its group."""
    v, o = np.zeros((WIDTH, KV_HEADS, HEAD_DIM)), np.zeros((KV_HEADS, GROUP, HEAD_DIM, WIDTH))
    for head in range(KV_HEADS):
        part = np.arange(PART)
        v[OWN + head * PART + part, head, part] = 1
        o[head, :, part, target + head * PART + part] = 1 / GROUP
    return _flat(v), o.reshape(-1, WIDTH)


def _flat(weight: np.ndarray) -> np.ndarray:
    return weight.reshape(WIDTH, -1)


@dataclass(frozen=True)
class TokenSample:
    """One context in tokens, and questions that are asked of it, each by itself.

    Attributes:
        context: read by a dense prefill.
        questions: (question, answer, graded end of the answer).
        lead: read token by token after the context, before any question.
    """

    context: list[int]
    questions: list[tuple[list[int], list[int], list[int]]]
    lead: list[int] = field(default_factory=list)


def _filler(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.integers(FIRST_FILLER, VOCABULARY, length)


def _places(rng: np.random.Generator, count: int, length: int) -> np.ndarray:
    """Beginnings of ``count`` pairs in ``length`` tokens, in random order, none over another."""
    return 2 * rng.permutation(length // 2)[:count]


def recall(rng: np.random.Generator, length: int, asked: int = 24) -> TokenSample:
    """Keys and their values, once each, anywhere in filler; every question names a key."""
    keys = FIRST_KEY + rng.permutation(KEYS)[:asked]
    values = rng.integers(FIRST_VALUE, FIRST_FILLER, asked)
    text = _filler(rng, length)
    at = _places(rng, asked, length)
    text[at], text[at + 1] = keys, values
    return TokenSample(text.tolist(), [_question(rng, *pair) for pair in zip(keys, values)])


def vote(
    rng: np.random.Generator, length: int, asked: int = 16, most: int = 15, least: int = 9
) -> TokenSample:
    """Keys that stand in many places with either of two values; the answer is the more frequent one.

    No single token answers: what a policy reads has to be a fair part of the evidence.
    """
    keys = FIRST_KEY + rng.permutation(KEYS)[:asked]
    pairs = FIRST_VALUE + rng.permutation(VALUES)[: 2 * asked].reshape(asked, 2)
    text = _filler(rng, length)
    at = _places(rng, asked * (most + least), length).reshape(asked, -1)
    for key, (right, wrong), places in zip(keys, pairs, at):
        text[places] = key
        text[places[:most] + 1], text[places[most:] + 1] = right, wrong
    return TokenSample(text.tolist(), [_question(rng, key, pair[0]) for key, pair in zip(keys, pairs)])


def trace(rng: np.random.Generator, length: int, asked: int = 16, phrase: int = 4) -> TokenSample:
    """A long output that repeats itself, read token by token: facts, each stated once, between endless repetitions.

    Most of it is one phrase, over and over, as in a reasoning trace that checks itself again and again.
    """
    head, tail = 64, length - 64
    keys = FIRST_KEY + rng.permutation(KEYS)[:asked]
    values = rng.integers(FIRST_VALUE, FIRST_FILLER, asked)
    text = np.resize(_filler(rng, phrase), tail)
    at = _places(rng, asked, tail)
    text[at], text[at + 1] = keys, values
    questions = [_question(rng, *pair) for pair in zip(keys, values)]
    return TokenSample(_filler(rng, head).tolist(), questions, text.tolist())


def _question(rng: np.random.Generator, key: int, value: int) -> tuple[list[int], list[int], list[int]]:
    """As many tokens as Pillar has steps in a period: what it reads is then its long-run mean."""
    return [*_filler(rng, 6).tolist(), ASK, int(key)], [int(value)], [int(value)]


TASKS = {"recall": recall, "vote": vote, "trace": trace}
