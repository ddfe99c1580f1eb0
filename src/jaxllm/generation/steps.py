"""The steps of generation: pure functions of (parameters, batch, cache, sampling), jitted once per shape bucket.

The cache and the sampling state are donated: a step updates them in place, and the caller goes on with the returned
ones. Configuration, features, read bound and buffer length are static; everything per request is an array.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxllm.batch import Leaf, PackedBatch
from jaxllm.cache.paged import PagedState
from jaxllm.cache.ring import RingState
from jaxllm.cache.rows import RowState
from jaxllm.cache.state import Cache
from jaxllm.config import ModelConfig
from jaxllm.generation import seats
from jaxllm.generation.compiler import decode_options
from jaxllm.generation.sampling import Features, Sampled, SamplingState, advance, sample
from jaxllm.model import functional
from jaxllm.model.functional import Params

HostOrDevice = np.ndarray | Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepOutput:
    """What a call sampled: k steps of R rows.

    Attributes:
        tokens: i32[k, R]; -1 where the row sampled nothing.
        logprobs: f32[k, R] or None.
        top_ids: i32[k, R, n] or None.
        top_logprobs: f32[k, R, n] or None.
        aux: what ``taps`` asked for, [k, layers that report, R, ...] each; anything where a step was not taken.
    """

    tokens: Leaf
    logprobs: Leaf = None
    top_ids: Leaf = None
    top_logprobs: Leaf = None
    aux: Leaf = None


def _prefill(
    params: Params,
    batch: PackedBatch,
    cache: Cache,
    sampling: SamplingState,
    final: Bool[Array, " B"],
    *,
    cfg: ModelConfig,
    features: Features,
    bound: int | None,
    fresh: bool,
) -> tuple[StepOutput, Cache, SamplingState]:
    model = functional.merge(cfg, params)
    ctx = model.context(kv_bound=bound, fresh=fresh, ended=final[:, None])
    h, cache, _ = model.extend(batch, cache, ctx)
    rows = batch.shape[0]
    length = jnp.sum(batch.segment_ids > 0, axis=1, dtype=jnp.int32)
    last = jnp.maximum(length - 1, 0)
    h = jnp.take_along_axis(h, last[:, None, None], axis=1)
    logits = model.head(h, ctx)[:, 0]
    slots = batch.slots[:, 0]
    state = sampling.rows(slots)
    if features.penalties:
        column = jnp.where(batch.segment_ids > 0, batch.tokens, cfg.vocab_size)
        prompted = state.prompted.at[jnp.arange(rows)[:, None], column].set(True, mode="drop")
        state = replace(state, prompted=prompted)
    # The position is that of the last token read; advance() makes it the sampled token's.
    state = replace(state, position=jnp.take_along_axis(batch.positions, last[:, None], axis=1)[:, 0])
    drawn = sample(logits, state, state.position + 1, features)
    state = advance(state, drawn.tokens, final, features)
    return _output(drawn, final, lambda leaf: leaf[None]), cache, sampling.put(slots, state)


def _output(drawn: Sampled, valid: Any, shape: Any, aux: Any = None) -> StepOutput:
    tokens = jnp.where(valid, drawn.tokens, -1)
    leaves = (tokens, drawn.logprobs, drawn.top_ids, drawn.top_logprobs, aux)
    return StepOutput(*(None if leaf is None else shape(leaf) for leaf in leaves))


def _decode_one(
    model: Any,
    cache: Cache,
    state: SamplingState,
    features: Features,
    bound: int | None,
    taps: frozenset[str],
) -> tuple[StepOutput, Cache, SamplingState]:
    live = state.live
    batch = PackedBatch(
        tokens=state.token[:, None],
        segment_ids=live.astype(jnp.int32)[:, None],
        positions=state.position[:, None],
    )
    ctx = model.context(kv_bound=bound, taps=taps)
    h, cache, aux = model.extend(batch, cache, ctx)
    drawn = sample(model.head(h, ctx)[:, 0], state, state.position + 1, features)
    out = _output(drawn, live, lambda leaf: leaf, aux if taps else None)
    return out, cache, advance(state, drawn.tokens, live, features)


def _decode_step(
    params: Params,
    cache: Cache,
    sampling: SamplingState,
    steps: Int[Array, ""],
    least_live: Int[Array, ""],
    *,
    cfg: ModelConfig,
    features: Features,
    rows: int,
    bound: int | None,
    k: int,
    taps: frozenset[str] = frozenset(),
) -> tuple[StepOutput, Cache, SamplingState]:
    model = functional.merge(cfg, params)
    state = sampling.rows(slice(0, rows))
    one = functools.partial(_decode_one, model, features=features, bound=bound, taps=taps)
    if k == 1:
        out, cache, state = one(cache, state)
        out = jax.tree.map(lambda leaf: leaf[None], out)
    else:
        shapes = jax.eval_shape(lambda c, s: one(c, s)[0], cache, state)
        # -1 is what a step that does not run leaves in ``tokens``; nobody reads the rest of it.
        buffer = jax.tree.map(lambda leaf: jnp.full((k, *leaf.shape), -1, leaf.dtype), shapes)

        def more(carry: Any) -> Any:
            i, _, state, _ = carry
            return (i < steps) & (jnp.sum(state.live) >= least_live)

        def body(carry: Any) -> Any:
            i, cache, state, buffer = carry
            out, cache, state = one(cache, state)
            return i + 1, cache, state, jax.tree.map(lambda b, leaf: b.at[i].set(leaf), buffer, out)

        _, cache, state, out = jax.lax.while_loop(more, body, (jnp.int32(0), cache, state, buffer))
    return out, cache, _merge_rows(sampling, state, rows, features)


def _merge_rows(
    sampling: SamplingState, state: SamplingState, rows: int, features: Features
) -> SamplingState:
    """``sampling`` with what decoding changes in its first rows; the rest passes through untouched."""
    changed = ["token", "position", "live", "remaining"]
    changed += ["barred"] if features.min_tokens else []
    changed += ["counts"] if features.penalties else []
    changed += ["thinking"] if features.thinking else []

    def put(name: str) -> Any:
        pools, first = getattr(sampling, name), getattr(state, name)
        return jax.tree.map(lambda pool, leaf: pool.at[:rows].set(leaf), pools, first)

    return replace(sampling, **{name: put(name) for name in changed})


_prefill_jit = jax.jit(_prefill, static_argnames=("cfg", "features", "bound", "fresh"), donate_argnums=(2, 3))


def _operands(cfg: ModelConfig, cache: Cache) -> str:
    """The narrowest dtype of a large product's operands: attention multiplies what the cache keeps, or its codes."""
    pools = [state.k for state in cache.layers if isinstance(state, RowState | RingState | PagedState)]
    # bfloat16 lies there as its bits.
    narrow = any(leaf.dtype in (jnp.uint8, jnp.uint16) for leaf in jax.tree.leaves(pools))
    return "bfloat16" if narrow else cfg.precision.operand or cfg.precision.compute


@functools.cache
def _decode_jit(operands: str) -> Any:
    # Built at the first call: its options need the backend, which importing must not start.
    return jax.jit(
        _decode_step,
        static_argnames=("cfg", "features", "rows", "bound", "k", "taps"),
        donate_argnums=(1, 2),
        compiler_options=decode_options(operands),
    )


def prefill(
    params: Params,
    batch: PackedBatch,
    cache: Cache,
    sampling: SamplingState,
    final: Bool[HostOrDevice, " B"],
    *,
    cfg: ModelConfig,
    features: Features,
    bound: int | None = None,
    fresh: bool = False,
) -> tuple[StepOutput, Cache, SamplingState]:
    """Read one chunk of each row's prompt; rows whose prompt ends here sample their first token and go live.

    Args:
        params: pure parameters.
        batch: one request per row, right padded, [B, T]; ``slots`` i32[B, 1], -1 for a padding row.
        cache: pools; donated.
        sampling: state of all slots; donated.
        final: the prompt ends in this chunk.
        cfg: the model; static.
        features: what sampling needs; static.
        bound: cached positions to read, at least every row's length after the chunk; None: all; static.
        fresh: every row begins here, so that pages are not looked at; static.

    Returns:
        one step of B rows (token -1 where not ``final``), and the new cache and sampling state.
    """
    static: dict[str, Any] = {"cfg": cfg, "features": features, "bound": bound, "fresh": fresh}
    return _prefill_jit(params, batch, cache, sampling, final, **static)


def decode_step(
    params: Params,
    cache: Cache,
    sampling: SamplingState,
    *,
    cfg: ModelConfig,
    features: Features,
    rows: int,
    bound: int | None = None,
    k: int = 1,
    steps: int | None = None,
    least_live: int = 1,
    taps: frozenset[str] = frozenset(),
) -> tuple[StepOutput, Cache, SamplingState]:
    """Decode up to ``steps`` tokens of every live slot below ``rows`` in one call.

    Args:
        params: pure parameters.
        cache: pools; donated.
        sampling: state of all slots; donated.
        cfg: the model; static.
        features: what sampling needs; static.
        rows: slots 0 .. rows - 1 are decoded, the others are not touched; static.
        bound: cached positions to read, at least every live row's length after the call; None: all; static.
        k: length of the output buffer; static.
        steps: steps to take, at most k; None: k.
        least_live: stop as soon as fewer rows than this live.
        taps: what layers shall report (contract 7); static.

    Returns:
        k steps of ``rows`` rows (token -1 where a row was not live or the step was not taken), cache, sampling.
    """
    taken = k if steps is None else min(steps, k)
    step = _decode_jit(_operands(cfg, cache))
    static: dict[str, Any] = {
        "cfg": cfg,
        "features": features,
        "rows": rows,
        "bound": bound,
        "k": k,
        "taps": taps,
    }
    return step(params, cache, sampling, taken, least_live, **static)


def compiled_programs() -> int:
    """Programs compiled so far by the steps; constant while buckets repeat."""
    steps: tuple[Any, ...] = (*seats.PROGRAMS, _prefill_jit, *map(_decode_jit, ("float32", "bfloat16")))
    return sum(step._cache_size() for step in steps)
