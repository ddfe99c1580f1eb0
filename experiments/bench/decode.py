"""Decoding under every cache policy and dtype: milliseconds and bytes per token, beside dense attention and a bound.

Command:  python -m experiments.bench.decode [--quick] [--context N ...] [--only NAME ...] [--out FILE]
Time:     not taken in full yet; --quick, 2,048 tokens and few cases, half a minute on idle cores.
          Resumable: finished cases of the result file are kept unless --fresh.
Expected: Quest at a sixteenth of 32,768 tokens reads attention at least 5 times as fast as dense attention over a
          cache in one piece; selecting takes at most 15 % of that; an int4 pool holds at least 3.6 times the tokens of
          bfloat16 per byte.

The model has random weights, Qwen3's shape and 4 attention layers; the cache is filled with random keys, not by a
prefill. Each case is timed against the dense model with its cache in one piece, taking turns in one process. The bound
is the bytes of weights, selected keys and values, and metadata over the bandwidth of a sum, measured in the same run.
Periodic work (Tactic's clustering, R-KV's compaction) is timed apart, not in the steps.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import _decode_cases as cases
from experiments.bench._decode_memory import curve_case, pool_case, prefill, prefill_case
from experiments.bench._decode_report import draw, show
from jaxllm import RKV, KVCache, KVReport, Policy, Tactic
from jaxllm.batch import PackedBatch
from jaxllm.cache import attend
from jaxllm.cache.evict import maintained
from jaxllm.cache.options import AttendOptions
from jaxllm.cache.paged import PagedState, view_of
from jaxllm.cache.segments import segments_of
from jaxllm.cache.traffic import held
from jaxllm.cli import machine
from jaxllm.generation.sampling import Features, init_sampling
from jaxllm.generation.steps import decode_step
from jaxllm.model import functional

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
CONTEXTS = (2048, 8192, 32768, 131072)
# Of --quick.
QUICK = (("dense", "bfloat16"), ("quest", "int4"))
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


def turns(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, one after the other in every round, after a first round that compiles."""
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            taken[name].append(timed(call))
    return {name: statistics.median(each) for name, each in taken.items()}


def bandwidth(repeats: int, size: int = 2**26) -> float:
    """Bytes per second of a sum over ``4 size`` bytes, far more than the caches hold."""
    values = jnp.ones((2, size // 2), jnp.float32)
    total = jax.jit(lambda x: x.sum(axis=1))
    jax.block_until_ready(total(values))
    return 4 * size / min(timed(lambda: jax.block_until_ready(total(values))) for _ in range(repeats))


def model_case(name: str, dtype: str, context: int, bytes_per_second: float, repeats: int) -> dict[str, Any]:
    """One policy and dtype in the whole model, taking turns with dense bfloat16 in one piece."""
    cfg = cases.model()
    params = functional.init_params(cfg)
    policy = cases.policies(context)[name]
    paged = KVCache(dtype, None if name == "dense" and dtype == "bfloat16" else 16)
    kv = paged if name == "dense" else KVCache(dtype)
    mine = Decoder(cfg, params, context, kv, policy)
    dense = Decoder(cfg, params, context, KVCache("bfloat16"), Policy())
    seconds = turns({"mine": mine.step, "dense": dense.step}, repeats)
    told = mine.report.to_dict()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    moved = weights + told["read_bytes_per_step"] + told["policy_bytes_per_step"]
    return {
        "policy": name,
        "dtype": dtype,
        "context": context,
        "ms_per_token": seconds["mine"] / STEPS * 1e3,
        "dense_ms_per_token": seconds["dense"] / STEPS * 1e3,
        "bound_ms_per_token": moved / bytes_per_second * 1e3,
        "bytes_per_step": moved,
        "weight_bytes": weights,
        "held_bytes": mine.held.total,
        "selected": told["layers"][0]["selected"],
    }


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

        self._step = jax.jit(step, donate_argnums=0)
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


def layer_case(context: int, repeats: int, names: tuple[str, ...]) -> dict[str, Any]:
    """Attention of one layer: dense in one piece against each reading policy, and its selection alone."""
    layers = {name: Layer(context, KVCache("bfloat16"), cases.policies(context)[name]) for name in names}
    calls: dict[str, Callable[[], Any]] = {name: layer.step for name, layer in layers.items()}
    chosen = {f"select {n}": lay.select() for n, lay in layers.items() if isinstance(lay.state, PagedState)}
    seconds = turns(calls | chosen, repeats)
    ms = {name: each * 1e3 for name, each in seconds.items()}
    dense = seconds["dense"]
    return {
        "context": context,
        "ms": ms,
        "speedup": {n: dense / seconds[n] for n in layers if n != "dense"},
        "select_share": {n.removeprefix("select "): seconds[n] / dense for n in chosen},
    }


def maintenance_case(name: str, context: int) -> dict[str, Any]:
    """Milliseconds of one clustering or eviction of one layer; the least of two."""
    work = Layer(context, KVCache("bfloat16"), cases.policies(context)[name]).maintain()
    work()
    return {"policy": name, "context": context, "ms": min(timed(work) for _ in range(2)) * 1e3}


def plan(options: argparse.Namespace) -> list[tuple[str, Callable[[float], dict[str, Any]], dict[str, Any]]]:
    """(kind, what to run given the bandwidth, what a finished row has) of every case."""
    quick = options.quick
    contexts = options.context or ((2048,) if quick else CONTEXTS)
    repeats = 2 if quick else 7
    made: list[tuple[str, Callable[[float], dict[str, Any]], dict[str, Any]]] = []

    def add(kind: str, call: Callable[..., dict[str, Any]], row: dict[str, Any]) -> None:
        made.append((kind, call, row))

    for context in contexts:
        for name in cases.policies(context):
            if options.only and name not in options.only:
                continue
            for dtype in cases.DTYPES:
                if quick and (name, dtype) not in QUICK:
                    continue
                add(
                    "model",
                    lambda speed, n=name, d=dtype, c=context: model_case(n, d, c, speed, repeats),
                    {"policy": name, "dtype": dtype, "context": context},
                )
        names = ("dense", "quest") if quick else ("dense", "quest", "tactic", "pillar")
        add("layers", lambda _, c=context, n=names: layer_case(c, repeats, n), {"context": context})
        for name in ("rkv",) if quick else ("tactic", "rkv"):
            if not quick and context > 32768 and name == "tactic":
                continue  # a clustering of 131,072 keys takes minutes a layer
            add(
                "maintenance",
                lambda _, n=name, c=context: maintenance_case(n, c),
                {"policy": name, "context": context},
            )
    new = 512 if quick else 16384
    add("curves", lambda _: curve_case(new), {"new_tokens": new})
    for length in (2048,) if quick else (32768, 65536, 131072):
        add("prefill", lambda _, n=length: prefill_case(n), {"length": length})
    return made


def main(argv: list[str] | None = None) -> int:
    """Measure what the result file does not have yet; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few and small cases; no file but --out")
    parser.add_argument("--context", type=int, nargs="*", help="these contexts only")
    parser.add_argument("--only", nargs="*", help="these policies only")
    parser.add_argument("--fresh", action="store_true", help="measure finished cases again")
    parser.add_argument("--out", type=Path, help="the result file (default: under experiments/results)")
    parser.add_argument("--prefill", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.prefill:
        prefill(options.prefill)
        return 0
    out = options.out or (None if options.quick else RESULTS / "decode.json")
    kinds = ("model", "layers", "maintenance", "curves", "prefill")
    found: dict[str, Any] = {kind: [] for kind in kinds}
    if out is not None and out.is_file() and not options.fresh:
        found |= {kind: rows for kind, rows in json.loads(out.read_text()).items() if kind in kinds}
    speed = bandwidth(3 if options.quick else 9, 2**22 if options.quick else 2**26)
    for kind, call, row in plan(options):
        if any(row.items() <= old.items() for old in found[kind]):
            continue
        found[kind].append(call(speed))
        if out is not None:
            out.write_text(json.dumps(report(found, speed), indent=1) + "\n", encoding="utf-8")
    whole = report(found, speed)
    show(whole)
    if out is not None:
        draw(out.with_suffix(".png"), whole)
    return 0


def report(found: dict[str, Any], speed: float) -> dict[str, Any]:
    """The result file's contents."""
    return {
        "command": "python -m experiments.bench.decode",
        "device": machine.describe(),
        "versions": machine.versions(),
        "bytes_per_second": speed,
        "pools": pool_case(),
        **found,
    }


if __name__ == "__main__":
    sys.exit(main())
