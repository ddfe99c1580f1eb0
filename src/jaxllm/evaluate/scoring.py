"""Log-likelihoods of tokens under a model: packed rows of few shapes, one jitted step."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxllm.batch import PackedBatch
from jaxllm.config import ConfigError, ModelConfig
from jaxllm.evaluate.windows import Window, bucket, pack
from jaxllm.model.functional import LanguageModel, Params, merge

# Tokens of one scoring step; enough to fill a core or two, few enough for a laptop.
STEP_TOKENS = 4096
# Positions whose logits exist at once.
CHUNK_POSITIONS = 512


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Scores of one window's scored tokens, in order.

    Attributes:
        nll: float64[n]; negative log-likelihood of each token, in nats.
        greedy: bool[n]; whether the token is the model's most likely one there.
    """

    nll: np.ndarray
    greedy: np.ndarray


@functools.partial(jax.jit, static_argnames=("cfg", "chunk"))
def score_step(
    cfg: ModelConfig, params: Params, batch: PackedBatch, chunk: int = CHUNK_POSITIONS
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Negative log-likelihood of every position's target, and whether the target is the most likely token.

    Args:
        cfg: the model.
        params: its pure parameters.
        batch: with ``targets`` i32[B, T, 1]; -1 gives a score of 0.
        chunk: positions whose logits exist at once.
    """
    model = merge(cfg, params)
    hidden, _ = model.hidden(batch)
    rows, length, width = hidden.shape
    chunks = -(-rows * length // chunk)
    pad = chunks * chunk - rows * length
    flat = jnp.pad(hidden.reshape(-1, width), ((0, pad), (0, 0))).reshape(chunks, 1, chunk, width)
    targets = jnp.pad(batch.targets.reshape(-1), (0, pad), constant_values=-1).reshape(chunks, chunk)

    def one(chunk_of: tuple[Array, Array]) -> tuple[Array, Array]:
        h, target = chunk_of
        logits = model.head(h)[0]
        chosen = jnp.take_along_axis(logits, jnp.maximum(target, 0)[:, None], axis=-1)[:, 0]
        nll = jax.nn.logsumexp(logits, axis=-1) - chosen
        return jnp.where(target >= 0, nll, 0.0), jnp.argmax(logits, axis=-1) == target

    nll, greedy = jax.lax.map(one, (flat, targets))
    count = rows * length
    return nll.reshape(-1)[:count].reshape(rows, length), greedy.reshape(-1)[:count].reshape(rows, length)


def _batch_of(
    windows: Sequence[Window], rows: Sequence[Sequence[int]], count: int, length: int
) -> tuple[PackedBatch, list]:
    """``count`` rows (the last ones may be empty), and where each window's scores will stand: (window, row, slice)."""
    fields = {name: np.zeros((count, length), np.int32) for name in ("tokens", "segment_ids", "positions")}
    targets = np.full((count, length, 1), -1, np.int32)
    places = []
    for r, row in enumerate(rows):
        start = 0
        for segment, index in enumerate(row, 1):
            window = windows[index]
            inputs = len(window.tokens) - 1
            span = slice(start, start + inputs)
            fields["tokens"][r, span] = window.tokens[:-1]
            fields["segment_ids"][r, span] = segment
            fields["positions"][r, span] = np.arange(inputs)
            scored = slice(start + window.first - 1, start + inputs)
            targets[r, scored, 0] = window.tokens[window.first :]
            places.append((index, r, scored))
            start += inputs
    return PackedBatch(**fields, targets=targets), places


def score_windows(
    lm: LanguageModel, windows: Sequence[Window], *, step_tokens: int = STEP_TOKENS
) -> list[TokenScores]:
    """Scores of every window, in the given order.

    Windows are packed into rows of one bucketed length, so that a call compiles at most two shapes; packing does not
    change a score beyond rounding, because segments do not see each other.

    Args:
        lm: the model.
        windows: of any lengths.
        step_tokens: tokens of one step; a row is never shorter than the longest window.

    Raises:
        ConfigError: a token id that the model does not have.
    """
    if not windows:
        return []
    highest, lowest = max(int(w.tokens.max()) for w in windows), min(int(w.tokens.min()) for w in windows)
    if lowest < 0 or highest >= lm.cfg.vocab_size:
        raise ConfigError(
            f"tokens: ids from {lowest} to {highest}; the model has 0 to {lm.cfg.vocab_size - 1}. "
            "Use the tokenizer that belongs to the model."
        )
    inputs = [len(window.tokens) - 1 for window in windows]
    total, longest = sum(inputs), max(inputs)
    # Longer rows waste less of themselves, up to a length at which attention's square starts to count.
    length = max(bucket(longest), min(512, bucket(total)))
    packed = pack(inputs, length)
    per_step = max(1, min(step_tokens // length, 1 << math.ceil(math.log2(len(packed)))))
    scores: list[TokenScores | None] = [None] * len(windows)
    for begin in range(0, len(packed), per_step):
        rows = packed[begin : begin + per_step]
        count = min(per_step, 1 << math.ceil(math.log2(len(rows))))
        batch, places = _batch_of(windows, rows, count, length)
        nll, greedy = jax.device_get(score_step(lm.cfg, lm.params, batch))
        for index, row, span in places:
            scores[index] = TokenScores(nll[row, span].astype(np.float64), greedy[row, span])
    return [score for score in scores if score is not None]
