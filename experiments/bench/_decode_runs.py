"""What ``decode`` runs and times: a model or one layer that decodes from a filled cache, and calls that take turns."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import _decode_cases as cases
from jaxllm import RKV, KVCache, KVReport, Policy, Tactic
from jaxllm.batch import PackedBatch
from jaxllm.cache import attend
from jaxllm.cache.evict import maintained
from jaxllm.cache.options import AttendOptions
from jaxllm.cache.paged import view_of
from jaxllm.cache.segments import segments_of
from jaxllm.cache.traffic import held
from jaxllm.generation.compiler import decode_options
from jaxllm.generation.sampling import Features, init_sampling
from jaxllm.generation.steps import decode_step

# Steps of one timed call.
STEPS = 8


class Decoder:
    """A model that decodes one row from a filled cache; each call goes on where the last one ended."""

    def __init__(self, cfg: Any, params: Any, context: int, kv: KVCache, policy: Policy):
        self.cfg, self.params = cfg, params
        self.cache = cases.filled(cfg, context, kv, policy)
        self.held = held(self.cache)
        self.report = KVReport()
        self.report.begin(cfg, self.cache)
        full = lambda value: jnp.full(1, value, jnp.int32)  # noqa: E731
        self.sampling = replace(
            init_sampling(1), live=jnp.ones(1, bool), position=full(context), remaining=full(2**30)
        )
        self.bound = context + cases.ROOM
        # One period of Pillar, whose first step reads everything.
        self.step(frozenset({"kv_read", "kv_stored"}))

    def step(self, taps: frozenset[str] = frozenset()) -> None:
        """``STEPS`` steps."""
        out, self.cache, self.sampling = decode_step(
            self.params,
            self.cache,
            self.sampling,
            cfg=self.cfg,
            features=Features(),
            rows=1,
            bound=self.bound,
            k=STEPS,
            taps=taps,
        )
        tokens = np.asarray(out.tokens)
        if taps:
            self.report.add(tokens, jax.tree.map(np.asarray, out.aux))


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def clocked(call: Callable[[], Any]) -> Callable[[], float]:
    """``call``, which tells its seconds."""
    return lambda: timed(call)


def turns(calls: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median of the seconds that each tells, one after the other in every round, after a first round that compiles."""
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            taken[name].append(call())
    return {name: statistics.median(each) for name, each in taken.items()}


def bandwidth(repeats: int, size: int = 2**26) -> float:
    """Bytes per second of a sum over ``4 size`` bytes, far more than the caches hold."""
    values = jnp.ones((2, size // 2), jnp.float32)
    total = jax.jit(lambda x: x.sum(axis=1))
    jax.block_until_ready(total(values))
    return 4 * size / min(timed(lambda: jax.block_until_ready(total(values))) for _ in range(repeats))


class Layer:
    """Attention of one layer over a filled cache, without projections."""

    def __init__(self, context: int, kv: KVCache, policy: Policy):
        self.cfg = cases.model(layers=1)
        cache = cases.filled(self.cfg, context, kv, policy)
        self.state, self.context = cache.opened()[0], context
        a = self.cfg.attention
        assert a is not None
        key = jax.random.key(5)
        self.q = jax.random.normal(key, (1, 1, a.num_heads, a.head_dim), jnp.float32)
        self.k = jax.random.normal(key, (1, 1, a.num_kv_heads, a.head_dim), jnp.float32)
        options = AttendOptions(bound=context + cases.ROOM)

        def step(state: Any, position: Any, q: Any, k: Any) -> Any:
            batch = PackedBatch(
                tokens=jnp.zeros((1, 1), jnp.int32),
                segment_ids=jnp.ones((1, 1), jnp.int32),
                positions=position[None, None],
            )
            out, state, _ = attend.extend(state, q, k, k, batch, options)
            return out, state

        # As decode steps are compiled; all of these keys are narrow.
        self._step = jax.jit(step, donate_argnums=0, compiler_options=decode_options("bfloat16"))
        self._at = context

    def step(self) -> None:
        """One token."""
        out, self.state = self._step(self.state, jnp.int32(self._at), self.q, self.k)
        self._at += 1
        jax.block_until_ready(out)

    def view(self) -> Any:
        """What the policy sees now."""
        state = self.state
        assert state.pages is not None
        batch = PackedBatch.from_rows(jnp.zeros((1, 1), jnp.int32))
        return view_of(state, segments_of(batch, 1), state.pages.table[:1], True)

    def select(self) -> Callable[[], Any]:
        """The policy's choice alone."""
        policy = self.state.policy
        chosen = jax.jit(lambda memory, q, view: policy.select(memory, q, view))
        memory, view = jax.tree.map(jnp.copy, (self.state.memory, self.view()))
        return lambda: jax.block_until_ready(chosen(memory, self.q, view))

    def maintain(self) -> Callable[[], Any]:
        """The policy's periodic work, as at a prompt's end."""
        state, policy = self.state, self.state.policy
        if isinstance(policy, Tactic):
            per_slot = state.memory.per_slot | {"clustered": jnp.zeros(1, jnp.int32)}
            state = replace(state, memory=replace(state.memory, per_slot=per_slot))
        elif isinstance(policy, RKV):
            # The tokens that there are shall be those that trigger it.
            over = min(policy.buffer, policy.budget // 2)
            smaller = replace(policy, budget=policy.budget - over, buffer=over)
            state = replace(state, policy=smaller)
        row = jnp.ones(1, bool)

        def work(state: Any, view: Any) -> Any:
            after = maintained(state, view, row, row)
            # What did not change would have to be copied out.
            return after if policy.evicts else after.memory

        run, view = jax.jit(work), self.view()
        return lambda: jax.block_until_ready(jax.tree.leaves(run(state, view)))
