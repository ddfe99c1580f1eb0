"""How a model is asked under a cache policy: a dense prefill, then steps whose tokens are given, then greedy ones.

A prompt's prefill is the same under all policies until it ends: nothing is selected in it, and what evicts does so at its
end. So one prefill without the prompt's last tokens serves many policies: each gets a copy, and reads the rest itself.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxllm import H2O, KVCache, Policy, Quest
from jaxllm.batch import PackedBatch
from jaxllm.cache.paged import PagedState
from jaxllm.cache.state import Cache, init_cache
from jaxllm.config import ModelConfig
from jaxllm.generation.compiler import decode_options
from jaxllm.generation.sampling import Features, init_sampling
from jaxllm.generation.steps import prefill
from jaxllm.generation.weights import operands
from jaxllm.model import functional
from jaxllm.model.functional import LanguageModel, Params

PAGE = 16
CHUNK = 4096
# Tokens of a prompt that every policy reads itself: more than any looks back to at a prompt's end.
LAST = 64
# Steps of a program at most: a question, a piece of text and a piece of a long output are served by the same.
STEPS = 128
TAPS = frozenset({"kv_read", "kv_stored", "kv_recall"})


@dataclass(frozen=True)
class Steps:
    """What n steps gave.

    Attributes:
        tokens: i32[n], the best token after each.
        logprobs: f32[n, V].
        read: i32[n, layers, K], tokens read.
        stored: i32[n, layers, K], tokens stored.
        recall: f32[n, layers, K], the share of attention to what is stored that lies on what was read.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    read: np.ndarray
    stored: np.ndarray
    recall: np.ndarray


@dataclass(frozen=True)
class Begun:
    """A prompt, read but for its last tokens.

    Attributes:
        cache: after them.
        read: tokens read.
        rest: those that remain, ``LAST`` of them or the whole of a shorter prompt.
    """

    cache: Cache
    read: int
    rest: list[int]


@contextlib.contextmanager
def compiled_quickly(wanted: bool) -> Iterator[None]:
    """Programs that are ready sooner and run slower, where ``wanted``: short contexts spend their time compiling."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, wanted or before)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _power_of_two(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


class Reader:
    """One model; capacity and programs grow with what is asked.

    Attributes:
        cfg: configuration.
        params: as the steps take them.
        layers: full attention layers.
    """

    def __init__(self, model: LanguageModel):
        self.cfg: ModelConfig = model.cfg
        self.params: Params = operands(model.cfg, model.params)
        self.layers = model.cfg.pattern.count("*")

    def begin(
        self,
        prompt: Sequence[int],
        dtype: str,
        more: int,
        *,
        sums: bool = False,
        page: int = PAGE,
        scorer: str = "minmax",
        chunk: int = CHUNK,
    ) -> Begun:
        """Read a prompt except for its end.

        Args:
            prompt: token ids.
            dtype: of keys and values.
            more: tokens that come after the prompt.
            sums: for H2O, which adds up the attention of the whole prompt; else for every other policy.
            page: tokens of a page.
            scorer: of Quest, whose boxes are made page by page.
            chunk: tokens that are read at once.
        """
        capacity = -(-(len(prompt) + more) // page) * page
        # Nothing is evicted, and what these two note down while reading is noted for any of their settings.
        big = 2 * capacity
        policy = H2O(heavy=big, recent=big) if sums else Quest(budget=1.0, scorer=scorer, dense_layers=())
        cache = init_cache(self.cfg, 1, capacity, KVCache(dtype, page), policy)
        read = max(len(prompt) - LAST, 0)
        width = min(chunk, _power_of_two(read))
        for start in range(0, read, width):
            cache = self._read(cache, prompt[start : min(start + width, read)], start, width, final=False)
        return Begun(cache, read, list(prompt[read:]))

    def end(self, begun: Begun, policy: Policy) -> Cache:
        """The rest of the prompt under ``policy``, which acts on the whole of it there; ``begun`` stays as it is."""
        cache = under(jax.tree.map(jnp.copy, begun.cache), policy)
        return self._read(cache, begun.rest, begun.read, LAST, final=True)

    def _read(self, cache: Cache, tokens: Sequence[int], start: int, width: int, *, final: bool) -> Cache:
        row = np.zeros((1, width), np.int32)
        row[0, : len(tokens)] = tokens
        batch = PackedBatch.from_rows(
            row, lengths=np.array([len(tokens)]), offset=start, slots=jnp.zeros((1, 1), jnp.int32)
        )
        _, cache, _ = prefill(
            self.params,
            batch,
            cache,
            init_sampling(1),
            np.array([final]),
            cfg=self.cfg,
            features=Features(),
            bound=min(_power_of_two(max(start + width, 64)), capacity_of(cache)),
        )
        return cache

    def follow(
        self, cache: Cache, given: Sequence[int], start: int, new: int = 0, *, keep: bool = False
    ) -> tuple[Steps, Cache]:
        """Read given tokens one by one, and then ``new`` of the model's own choice, the best ones.

        The best token after the last given one is the first of the ``new``; the last of them is not read.

        Args:
            cache: donated unless ``keep``.
            given: token ids, at least one.
            start: position of the first of them.
            new: tokens to choose.
            keep: the caller goes on from ``cache`` itself.

        Returns:
            ``len(given) + new - 1`` steps, or ``len(given)`` without new ones.
        """
        total = len(given) + max(new - 1, 0)
        cache = jax.tree.map(jnp.copy, cache) if keep else cache
        program = _follow_jit(self.cfg.precision.operand or self.cfg.precision.compute)
        known, parts = list(given), []
        # In pieces: one program per policy serves questions and long outputs.
        for done in range(0, total, STEPS):
            steps, told = min(STEPS, total - done), known[done : done + STEPS]
            row = np.zeros(STEPS, np.int32)
            row[: len(told)] = told
            out, cache = program(
                self.params,
                cache,
                row,
                len(told),
                steps,
                start + done,
                cfg=self.cfg,
                bound=capacity_of(cache),
            )
            parts.append(jax.tree.map(lambda leaf, n=steps: np.asarray(leaf)[:n], out))
            # What it chose is what the next piece reads on from.
            known += parts[-1][0][len(known) - done - 1 :].tolist() if done + steps >= len(known) else []
        tokens, logprobs, aux = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        # Sliding windows report too, and have no policy.
        full = [letter == "*" for letter in self.cfg.pattern if letter in "*W"]
        named = (aux[name][:, full, 0] for name in ("kv_read", "kv_stored", "kv_recall"))
        return Steps(tokens, logprobs, *named), cache


def capacity_of(cache: Cache) -> int:
    """Tokens that every slot has room for."""
    page = next(state.layout.page for state in cache.layers if isinstance(state, PagedState))
    return cache.groups[0].table.shape[1] * page


def under(cache: Cache, policy: Policy) -> Cache:
    """``cache`` in the middle of a prompt as if it had been read under ``policy`` all along.

    Prompts are read the same under all policies. Of what policies note down meanwhile, Quest's boxes and H2O's sums have
    to be there already; the others begin with their last tokens or make everything at the prompt's end.
    """
    layers, seen = [], 0
    for state in cache.layers:
        if isinstance(state, PagedState):
            wanted = policy.at(seen)
            seen += 1
            # Subclasses too: what only watches a policy remembers what it does.
            same = isinstance(wanted, type(state.policy))
            if isinstance(wanted, H2O) and not same:
                raise ValueError("H2O needs the sums of the whole prompt: begin(..., sums=True)")
            boxes = state.policy.scorer if isinstance(state.policy, Quest) else None
            if isinstance(wanted, Quest) and wanted.scorer != boxes:
                raise ValueError("Quest needs the boxes of the whole prompt: begin(..., scorer=...)")
            wanted.check(state.layout)
            memory = state.memory if same else jax.tree.map(jnp.copy, wanted.init(state.layout))
            state = replace(state, policy=wanted, memory=memory)
        layers.append(state)
    return replace(cache, layers=tuple(layers))


def _follow(
    params: Params,
    cache: Cache,
    tokens: Int[Array, " n"],
    given: Int[Array, ""],
    steps: Int[Array, ""],
    start: Int[Array, ""],
    *,
    cfg: ModelConfig,
    bound: int,
) -> tuple[tuple[Int[Array, " n"], Float[Array, "n V"], dict[str, Any]], Cache]:
    model = functional.merge(cfg, params)

    def one(i: Any, token: Any, cache: Cache) -> Any:
        batch = PackedBatch(
            tokens=token[None, None],
            segment_ids=jnp.ones((1, 1), jnp.int32),
            positions=(start + i)[None, None],
        )
        ctx = model.context(kv_bound=bound, taps=TAPS)
        h, cache, aux = model.extend(batch, cache, ctx)
        logprobs = jax.nn.log_softmax(model.head(h, ctx)[0, 0])
        return (jnp.argmax(logprobs).astype(jnp.int32), logprobs, aux), cache

    zero = jnp.int32(0)
    shapes = jax.eval_shape(lambda c: one(zero, zero, c)[0], cache)
    buffer = jax.tree.map(lambda leaf: jnp.zeros((len(tokens), *leaf.shape), leaf.dtype), shapes)

    def body(carry: Any) -> Any:
        i, chosen, cache, buffer = carry
        out, cache = one(i, jnp.where(i < given, tokens[i], chosen), cache)
        return i + 1, out[0], cache, jax.tree.map(lambda b, leaf: b.at[i].set(leaf), buffer, out)

    _, _, cache, buffer = jax.lax.while_loop(lambda c: c[0] < steps, body, (zero, zero, cache, buffer))
    return buffer, cache


@functools.cache
def _follow_jit(operands: str) -> Any:
    return jax.jit(
        _follow,
        static_argnames=("cfg", "bound"),
        donate_argnums=1,
        compiler_options=decode_options(operands),
    )
