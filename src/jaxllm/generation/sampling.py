"""Sampling as pure functions of (logits, per-slot parameters, positions).

Everything that differs between requests is an array, so that one compiled step serves any mixture of them. What no
request of a step needs is left out of the program through :class:`Features`, which is static.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from jaxllm.batch import Leaf
from jaxllm.generation.thinking import Thinking, advance_thinking, force, init_thinking


@dataclass(frozen=True)
class Features:
    """What a compiled step can do; static.

    Attributes:
        random: some row has a temperature above 0.
        filters: some row uses top_k, top_p or min_p.
        penalties: some row uses a penalty; the state then holds token counts.
        min_tokens: some row must not stop before a number of tokens.
        thinking: some row has a budget of thinking tokens; the state then holds where its thinking is.
        logprobs: None for none, otherwise the number of most likely tokens reported beside the chosen one.
        vocab_limit: only ids below it are sampled or reported; None: all. Models pad their vocabulary past the
            tokenizer's, and no text belongs to the rest.
    """

    random: bool = False
    filters: bool = False
    penalties: bool = False
    min_tokens: bool = False
    thinking: bool = False
    logprobs: int | None = None
    vocab_limit: int | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingState:
    """Per-slot state of generation, S slots.

    Attributes:
        token: i32[S]; the token that the next decode step reads.
        position: i32[S]; its position.
        live: bool[S]; the slot is decoding.
        remaining: i32[S]; tokens that may still be sampled.
        barred: i32[S]; tokens that must still be sampled before a stop id may be.
        stop_ids: i32[S, n]; tokens that end the request, -1 for none.
        seed: u32[S].
        temperature: f32[S]; 0 takes the most likely token.
        top_k: i32[S]; 0 for all.
        top_p: f32[S]; 1 for all.
        min_p: f32[S]; 0 for all.
        repetition: f32[S]; 1 for none.
        presence: f32[S]; 0 for none.
        frequency: f32[S]; 0 for none.
        prompted: bool[S, V]; tokens of the prompt; None without penalties.
        counts: i32[S, V]; how often each token was sampled; None without penalties.
        thinking: where each slot is in its thinking; None without budgets.
        newline: bool[V]; ids whose text has a newline, for all slots; None without budgets and in rows to be put.
    """

    token: Leaf
    position: Leaf
    live: Leaf
    remaining: Leaf
    barred: Leaf
    stop_ids: Leaf
    seed: Leaf
    temperature: Leaf
    top_k: Leaf
    top_p: Leaf
    min_p: Leaf
    repetition: Leaf
    presence: Leaf
    frequency: Leaf
    prompted: Leaf = None
    counts: Leaf = None
    thinking: Thinking | None = None
    newline: Leaf = None

    def rows(self, index: Any) -> "SamplingState":
        """The state at ``index`` of the slot axis: a slice, or i32[B] slots, of which -1 reads some slot's values."""
        rows = jax.tree.map(lambda leaf: leaf[index], replace(self, newline=None))
        return replace(rows, newline=self.newline)

    def put(self, slots: Int32[Array, " B"], rows: "SamplingState") -> "SamplingState":
        """This state with ``rows`` (leaves [B, ...]) at ``slots``; slot -1 is dropped."""
        slots = jnp.where(slots < 0, self.token.shape[0], slots)
        put = jax.tree.map(
            lambda pool, row: pool.at[slots].set(row.astype(pool.dtype), mode="drop"),
            replace(self, newline=None),
            replace(rows, newline=None),
        )
        return replace(put, newline=self.newline)


def init_sampling(
    slots: int,
    *,
    stop_width: int = 1,
    counted_vocab: int | None = None,
    thinking_width: int = 0,
    newline: Bool[Array, " V"] | None = None,
) -> SamplingState:
    """A state in which no slot lives.

    Args:
        slots: S.
        stop_width: most stop ids of a request.
        counted_vocab: V where penalties shall be possible; None leaves the counts out.
        thinking_width: longest closing or ending sequence of a thinking budget; 0 leaves thinking out.
        newline: ids whose text has a newline, where there are thinking budgets.
    """

    def full(value: Any, dtype: Any) -> jax.Array:
        return jnp.full((slots,), value, dtype)

    counted = counted_vocab is not None
    return SamplingState(
        token=full(0, jnp.int32),
        position=full(0, jnp.int32),
        live=full(False, jnp.bool_),
        remaining=full(0, jnp.int32),
        barred=full(0, jnp.int32),
        stop_ids=jnp.full((slots, stop_width), -1, jnp.int32),
        seed=full(0, jnp.uint32),
        temperature=full(0, jnp.float32),
        top_k=full(0, jnp.int32),
        top_p=full(1, jnp.float32),
        min_p=full(0, jnp.float32),
        repetition=full(1, jnp.float32),
        presence=full(0, jnp.float32),
        frequency=full(0, jnp.float32),
        prompted=jnp.zeros((slots, counted_vocab), jnp.bool_) if counted else None,
        counts=jnp.zeros((slots, counted_vocab), jnp.int32) if counted else None,
        thinking=init_thinking(slots, thinking_width) if thinking_width else None,
        newline=newline if thinking_width else None,
    )


def penalise(logits: Float[Array, "R V"], state: SamplingState) -> Float[Array, "R V"]:
    """Repetition penalty over prompt and output (arXiv 1909.05858), then OpenAI's frequency and presence penalties
    over the output."""
    counts, seen = state.counts, state.prompted | (state.counts > 0)
    factor = state.repetition[:, None]
    logits = jnp.where(seen, jnp.where(logits < 0, logits * factor, logits / factor), logits)
    return logits - state.frequency[:, None] * counts - state.presence[:, None] * (counts > 0)


def bar_padding(logits: Float[Array, "R V"], limit: int) -> Float[Array, "R V"]:
    """Ids from ``limit`` on are impossible."""
    return jnp.where(jnp.arange(logits.shape[-1]) < limit, logits, -jnp.inf)


def bar_stops(logits: Float[Array, "R V"], state: SamplingState) -> Float[Array, "R V"]:
    """Stop ids are impossible while ``barred`` is above 0."""
    rows, vocab = logits.shape
    column = jnp.where((state.stop_ids >= 0) & (state.barred > 0)[:, None], state.stop_ids, vocab)
    return logits.at[jnp.arange(rows)[:, None], column].set(-jnp.inf, mode="drop")


def filter_logits(logits: Float[Array, "R V"], state: SamplingState) -> Float[Array, "R V"]:
    """Top-k, then top-p, then min-p, each over what the one before left; what is left out becomes -inf.

    Tokens as likely as the last one kept are kept too. At least the most likely token stays.
    """
    ordered = -jnp.sort(-logits, axis=-1)
    vocab = logits.shape[-1]
    k = jnp.where(state.top_k > 0, jnp.minimum(state.top_k, vocab), vocab)
    least = jnp.take_along_axis(ordered, k[:, None] - 1, axis=-1)
    ordered = jnp.where(ordered >= least, ordered, -jnp.inf)
    top = ordered[:, :1]
    weights = jnp.exp(ordered - jnp.where(jnp.isfinite(top), top, 0))
    mass = jnp.cumsum(weights, axis=-1)
    before = (mass - weights) / jnp.maximum(mass[:, -1:], jnp.finfo(jnp.float32).tiny)
    kept = jnp.maximum(jnp.sum(before < state.top_p[:, None], axis=-1), 1)
    nucleus = jnp.take_along_axis(ordered, kept[:, None] - 1, axis=-1)
    nucleus = jnp.where(state.top_p[:, None] < 1, nucleus, -jnp.inf)
    likely = top + jnp.log(state.min_p)[:, None]
    return jnp.where(logits >= jnp.maximum(jnp.maximum(least, nucleus), likely), logits, -jnp.inf)


def most_likely(logits: Float[Array, "R V"]) -> Int32[Array, " R"]:
    """The first of each row's highest logits; 0 in a row with NaN.

    Two plain reductions: XLA:CPU makes a scalar loop of the one over pairs that ``argmax`` is.
    """
    top = jnp.max(logits, axis=-1, keepdims=True)
    ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(logits < top, logits.shape[-1], ids), axis=-1)


def draw(
    logits: Float[Array, "R V"], state: SamplingState, positions: Int[Array, " R"], features: Features
) -> Int32[Array, " R"]:
    """One token per row from processed ``logits``, keyed by (the row's seed, the new token's position)."""
    if not features.random:
        return most_likely(logits)
    greedy = state.temperature == 0
    scaled = logits / jnp.where(greedy, 1.0, state.temperature)[:, None]
    if features.filters:
        scaled = filter_logits(scaled, state)

    def noise(seed: Any, position: Any) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, (logits.shape[-1],), jnp.float32)

    gumbel = jax.vmap(noise)(state.seed, positions)
    return most_likely(jnp.where(greedy[:, None], logits, scaled + gumbel))


def log_softmax(logits: Float[Array, "R V"]) -> Float[Array, "R V"]:
    """Log-probabilities; -inf, never NaN, in rows without a possible token."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    shifted = logits - jnp.where(jnp.isfinite(top), top, 0)
    total = jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True)
    return shifted - jnp.log(jnp.where(total > 0, total, 1))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """One sampled token per row.

    Attributes:
        tokens: i32[R].
        logprobs: f32[R]; of the raw logits, before temperature and penalties; None unless asked for.
        top_ids: i32[R, n]; the most likely tokens; None unless asked for.
        top_logprobs: f32[R, n].
    """

    tokens: Leaf
    logprobs: Leaf = None
    top_ids: Leaf = None
    top_logprobs: Leaf = None


def sample(
    logits: Float[Array, "R V"], state: SamplingState, positions: Int[Array, " R"], features: Features
) -> Sampled:
    """One token per row.

    The order is that of Hugging Face's processors: penalties, minimum length, temperature, top-k, top-p, min-p; ids
    past ``vocab_limit`` go before top-k. A row whose thinking is being closed takes its closing id instead of the draw.
    Log-probabilities stay those of the whole vocabulary.

    Args:
        logits: raw logits.
        state: rows of the sampling state, in the order of ``logits``.
        positions: position of the token that is sampled; with the seed it decides the draw, so that neither the
            slot, nor the batch, nor the order of requests matters.
        features: what the rows need.
    """
    logits = logits.astype(jnp.float32)
    processed = penalise(logits, state) if features.penalties else logits
    if features.min_tokens:
        processed = bar_stops(processed, state)
    if features.vocab_limit is not None:
        processed = bar_padding(processed, features.vocab_limit)
    tokens = draw(processed, state, positions, features)
    if features.thinking and state.thinking is not None:
        tokens = force(tokens, state.thinking)
    if features.logprobs is None:
        return Sampled(tokens)
    log_p = log_softmax(logits)
    chosen = jnp.take_along_axis(log_p, tokens[:, None], axis=-1)[:, 0]
    if features.logprobs == 0:
        return Sampled(tokens, chosen)
    if features.vocab_limit is not None:
        log_p = bar_padding(log_p, features.vocab_limit)
    top, ids = jax.lax.top_k(log_p, features.logprobs)
    return Sampled(tokens, chosen, ids.astype(jnp.int32), top)


def advance(
    state: SamplingState, tokens: Int32[Array, " R"], sampled: Bool[Array, " R"], features: Features
) -> SamplingState:
    """Rows of ``state`` after their next token; rows that are not ``sampled`` stay.

    A row dies when its token is one of its stop ids, or its last allowed one.
    """
    one = sampled.astype(jnp.int32)
    stopped = jnp.any(tokens[:, None] == state.stop_ids, axis=-1)
    remaining = state.remaining - one
    state = replace(
        state,
        token=jnp.where(sampled, tokens, state.token),
        position=state.position + one,
        remaining=remaining,
        live=jnp.where(sampled, ~stopped & (remaining > 0), state.live),
    )
    if features.min_tokens:
        state = replace(state, barred=state.barred - one)
    if features.penalties:
        counts = state.counts.at[jnp.arange(tokens.shape[0]), tokens].add(one)
        state = replace(state, counts=counts)
    if features.thinking and state.thinking is not None:
        thinking = advance_thinking(state.thinking, tokens, sampled, state.newline)
        state = replace(state, thinking=thinking)
    return state
