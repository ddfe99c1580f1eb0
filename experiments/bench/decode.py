"""Decoding under every cache policy and dtype: milliseconds and bytes per token, beside dense attention and a bound.

Command:  python -m experiments.bench.decode [--quick] [--kind KIND ...] [--context N ...] [--only NAME ...] [--out FILE]
Time:     not taken in full yet; --quick, 2,048 tokens and few cases, half a minute on idle cores.
          Resumable: finished cases of the result file are kept unless --fresh, those of other machines too.
Needs:    for the peers ``pip install jaxllm[oracle]``, and optimum-quanto or hqq for transformers' caches of 4 bits;
          what is missing stands in the row.
Expected: Quest at a sixteenth of 32,768 tokens reads attention at least 5 times as fast as dense attention over a
          cache in one piece; selecting takes at most 15 % of that; an int4 pool holds at least 3.6 times the tokens of
          bfloat16 per byte; memory under R-KV is flat over 16,384 tokens, and that of a prefill linear in its length.

The model has random weights, Qwen3's shape and 4 attention layers; the cache is filled with random keys, not by a
prefill. Each case is timed against the dense model with its cache in one piece, taking turns in one process. The bound
is the bytes of weights, selected keys and values, and metadata over the bandwidth of a sum, measured in the same run.
Periodic work (Tactic's clustering, R-KV's compaction) is timed apart, not in the steps. transformers decodes the same
weights, eagerly, over its static and its quantised caches (kind ``peers``), in processes of its own. Memory (kinds
``curves`` and ``prefill``) is that of processes of their own too.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from experiments.bench import _decode_cases as cases
from experiments.bench._decode_memory import curve, curve_case, pool_case, prefill, prefill_case
from experiments.bench._decode_peers import PEERS, peers_case
from experiments.bench._decode_report import draw, show
from experiments.bench._decode_runs import STEPS, Decoder, Layer, bandwidth, clocked, timed, turns
from jaxllm import KVCache, Policy
from jaxllm.cache.paged import PagedState
from jaxllm.cli import machine
from jaxllm.model import functional

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
CONTEXTS = (2048, 8192, 32768, 131072)
KINDS = ("model", "layers", "maintenance", "peers", "curves", "prefill")
# Of --quick.
QUICK = (("dense", "bfloat16"), ("quest", "int4"))


def model_case(name: str, dtype: str, context: int, bytes_per_second: float, repeats: int) -> dict[str, Any]:
    """One policy and dtype in the whole model, taking turns with dense bfloat16 in one piece."""
    cfg = cases.model()
    params = functional.init_params(cfg)
    policy = cases.policies(context)[name]
    paged = KVCache(dtype, None if name == "dense" and dtype == "bfloat16" else 16)
    kv = paged if name == "dense" else KVCache(dtype)
    mine = Decoder(cfg, params, context, kv, policy)
    dense = Decoder(cfg, params, context, KVCache("bfloat16"), Policy())
    seconds = turns({"mine": clocked(mine.step), "dense": clocked(dense.step)}, repeats)
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


def layer_case(context: int, repeats: int, names: tuple[str, ...]) -> dict[str, Any]:
    """Attention of one layer: dense in one piece against each reading policy, and its selection alone."""
    layers = {name: Layer(context, KVCache("bfloat16"), cases.policies(context)[name]) for name in names}
    calls = {name: clocked(layer.step) for name, layer in layers.items()}
    paged = {name: layer for name, layer in layers.items() if isinstance(layer.state, PagedState)}
    chosen = {f"select {name}": clocked(layer.select()) for name, layer in paged.items()}
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
    peers = () if quick else tuple(PEERS)
    made: list[tuple[str, Callable[[float], dict[str, Any]], dict[str, Any]]] = []

    def add(kind: str, call: Callable[..., dict[str, Any]], row: dict[str, Any]) -> None:
        if not options.kind or kind in options.kind:
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
        add(
            "peers",
            lambda _, c=context: peers_case(c, repeats, options.torch_python, peers),
            {"context": context},
        )
    new = 512 if quick else 16384
    add("curves", lambda _: curve_case(new), {"new_tokens": new})
    for length in (2048,) if quick else (32768, 65536, 131072):
        add("prefill", lambda _, n=length: prefill_case(n), {"length": length})
    return made


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few and small cases; no file but --out")
    parser.add_argument("--context", type=int, nargs="*", help="these contexts only")
    parser.add_argument("--only", nargs="*", help="these policies only")
    parser.add_argument("--fresh", action="store_true", help="measure finished cases again")
    parser.add_argument("--out", type=Path, help="the result file (default: under experiments/results)")
    parser.add_argument("--kind", nargs="*", choices=KINDS, help="these kinds of cases only")
    parser.add_argument(
        "--torch-python", default=sys.executable, help="interpreter that has transformers and torch"
    )
    parser.add_argument("--prefill", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--curve", nargs=3, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure what the result file does not have yet; the exit code."""
    options = arguments().parse_args(argv)
    if options.prefill or options.curve:
        # A process of its own, whose memory is measured.
        name, *sizes = options.curve or ("", "0", "0")
        print(json.dumps(prefill(options.prefill) if options.prefill else curve(name, *map(int, sizes))))
        return 0
    out = options.out or (None if options.quick else RESULTS / "decode.json")
    found: dict[str, Any] = {kind: [] for kind in KINDS} | {"machines": {}}
    if out is not None and out.is_file() and not options.fresh:
        before = json.loads(out.read_text())
        found |= {name: before[name] for name in found}
    here = machine.describe()["cpu"]
    # Rows of one machine shall have one bound.
    speed = found["machines"].get(here, {}).get("bytes_per_second") or bandwidth(
        3 if options.quick else 9, 2**22 if options.quick else 2**26
    )
    found["machines"][here] = {
        "device": machine.describe(),
        "versions": machine.versions(),
        "bytes_per_second": speed,
    }
    for kind, call, row in plan(options):
        if any(row.items() <= old.items() for old in found[kind]):
            continue
        found[kind].append(call(speed) | {"cpu": here})
        if out is not None:
            out.write_text(json.dumps(report(found), indent=1) + "\n", encoding="utf-8")
    whole = report(found)
    show(whole)
    if out is not None:
        draw(out.with_suffix(".png"), whole)
    return 0


def report(found: dict[str, Any]) -> dict[str, Any]:
    """The result file's contents; a row names the CPU it was measured on, which ``machines`` describes."""
    return {"command": "python -m experiments.bench.decode", "pools": pool_case(), **found}


if __name__ == "__main__":
    sys.exit(main())
