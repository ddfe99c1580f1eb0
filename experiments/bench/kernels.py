"""Speed of the kernels on this device, beside peers and the bound of what the device reaches in the same run.

Command:  python -m experiments.bench.kernels [--device cpu|gpu] [--op OP] [--quick] [--out]
Time:     about half an hour on 2 CPU cores, 3 minutes with --quick; on a GPU minutes per op, most of it
          compilation.
          On a GPU the cases are those of ``pallas_kernels/<op>/cases.py`` and times are the GPU's own, caches cold; the
          file is written after every case, and --op OP --out measures the rows of that op anew and leaves the others.
          On a CPU attention, paged decode, the recurrent ops, the convolutions and their decode steps also run beside
          torch's forms, where torch and transformers are installed, on the same cores.
Expected: on 2 CPU cores with AMX, SSD (B2 T1024 H8 P64 N128, float32) well above 54 thousand tokens a second
          forward and 22 thousand forward and backward: what Levanter's XLA scan does on one such core. Beside torch the
          aim is 1.5 times its speed; the table shows where we lose.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.bench import _kernels_gpu, _kernels_recurrent, _kernels_torch
from pallas_kernels.attention import attention
from pallas_kernels.cases import cases as kernel_cases
from pallas_kernels.causal_conv import causal_conv
from pallas_kernels.segmented_matmul import segmented_matmul
from pallas_kernels.ssd import ssd
from pallas_kernels.timing import seconds

RESULTS = Path(__file__).parents[1] / "results"

# The first word of a case, where it is not the op.
NAMES = {"conv": "causal_conv"}
# What runs beside torch on a CPU.
_ATTENTION = (_kernels_torch.prompts, _kernels_torch.decodes)
BESIDE_TORCH = {
    "attention": _ATTENTION,
    "paged_attention": _ATTENTION,
    "ssd": (_kernels_recurrent.scans,),
    "gated_delta": (_kernels_recurrent.delta_rules,),
    "causal_conv": (_kernels_recurrent.convolutions,),
    "dynamic_conv": (_kernels_recurrent.dynamic_convolutions,),
}
# Megabytes of the copy that says how fast memory is.
COPY = {True: 64, False: 512}


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


def forward_and_backward(fn, args):
    """A function computing the output and the gradient of every argument."""

    def loss(*args):
        return jnp.sum(jnp.square(jax.tree.leaves(fn(*args))[0]))

    return jax.value_and_grad(loss, argnums=tuple(range(len(args))))


def matmul_gflops(dtype, repeats: int) -> float:
    a = normal(1024, 1024).astype(dtype)
    product = partial(jnp.matmul, preferred_element_type=jnp.float32, precision="highest")
    return 2 * 1024**3 / seconds(product, a, a, repeats=repeats) / 1e9


def ssd_flops(T: int, H: int, P: int, G: int, N: int, chunk: int) -> float:
    """Forward multiply-adds, counted twice, of one row of T tokens."""
    return T * (2 * chunk * N * G + 2 * chunk * P * H + 4 * P * N * H)


def cases(quick: bool):
    """(name, op, arguments, operand dtype, tokens, forward flops or None, also backward)."""
    shapes = [(4, 256, 8, 64, 1, 64)] if quick else [(4, 256, 8, 64, 1, 64), (2, 1024, 8, 64, 1, 128)]
    both = (None, jnp.bfloat16)
    for B, T, H, P, G, N in shapes:
        dt, A = jax.nn.softplus(normal(B, T, H) - 2), -jnp.exp(normal(H))
        args = (normal(B, T, H, P), dt, A, normal(B, T, G, N), normal(B, T, G, N), normal(H))
        name = f"ssd B{B} T{T} H{H} P{P} N{N}"
        for dtype in both:
            op = partial(ssd, chunk_size=64, operand_dtype=dtype)
            yield name, op, args, dtype, B * T, B * ssd_flops(T, H, P, G, N, 64), True
        yield (
            f"{name}, token scan",
            partial(ssd, implementation="reference"),
            args,
            None,
            B * T,
            None,
            not quick,
        )
    B, T, D = (4, 256, 768)
    yield (
        f"conv B{B} T{T} D{D}",
        causal_conv,
        (normal(B, T, D), normal(4, D), normal(D)),
        None,
        B * T,
        None,
        True,
    )
    for B, T, H, K, d in [(4, 256, 8, 2, 64)] if quick else [(4, 256, 8, 2, 64), (1, 1024, 8, 2, 64)]:
        places = jnp.broadcast_to(jnp.arange(T), (B, T))
        ids = jnp.ones_like(places)
        args = (normal(B, T, H, d), normal(B, T, K, d), normal(B, T, K, d))
        for dtype in both:
            op = partial(
                attention,
                q_positions=places,
                kv_positions=places,
                q_segment_ids=ids,
                kv_segment_ids=ids,
                operand_dtype=dtype,
            )
            yield f"attention B{B} T{T} H{H} K{K} d{d}", op, args, dtype, B * T, 4.0 * B * T * T * H * d, True
    yield from adapter_cases(quick)
    yield from decode_cases(quick)


def adapter_cases(quick: bool):
    """Rows of 32 adapters of rank 16; the base product beside them, and factors gathered once per row."""
    K, N, rank, S = 1024, 1024, 16, 33
    for M in (64,) if quick else (64, 1024):
        slots = jnp.asarray(np.random.default_rng(M).integers(1, S, M), jnp.int32)
        args = (normal(M, K), normal(S, K, rank), normal(S, rank, N), jnp.ones(S))
        name = f"segmented_matmul M{M} K{K} N{N} rank {rank} of 32 adapters"
        yield name, partial(segmented_matmul, slots=slots), args, None, M, 2.0 * M * (K + N) * rank, True
        yield f"{name}, base product", jnp.matmul, (args[0], normal(K, N)), None, M, 2.0 * M * K * N, True
        gathered = partial(segmented_matmul, slots=slots, implementation="reference")
        yield f"{name}, gathered per row", gathered, args, None, M, None, False


def decode_cases(quick: bool):
    """One token per row over a warm state; tokens are rows."""
    H, P, N, K, d, S = 8, 64, 128, 2, 64, 1024
    for B in (8,) if quick else (1, 8, 64):
        args = (normal(B, 1, H, P), jnp.ones((B, 1, H)), -jnp.ones(H), normal(B, 1, 1, N), normal(B, 1, 1, N))

        def step(*args):
            return ssd(*args[:5], initial_state=args[5])

        yield f"ssd decode B{B} H{H} P{P} N{N}", step, (*args, normal(B, 1, H, P, N)), None, B, None, False

        def attend(q, k, v):
            places = jnp.broadcast_to(jnp.arange(k.shape[2]), (k.shape[0], k.shape[2]))
            ids = jnp.ones_like(places)
            return attention(
                q,
                k,
                v,
                q_positions=places[:, -1:],
                kv_positions=places,
                q_segment_ids=ids[:, -1:],
                kv_segment_ids=ids,
                kv_layout="BKTD",
            )

        for dtype in (jnp.float32, jnp.bfloat16):
            cache = normal(B, K, S, d).astype(dtype)
            name = f"attention decode B{B} H{H} K{K} d{d} S{S}, {jnp.dtype(dtype).name} cache"
            yield name, attend, (normal(B, 1, H, d).astype(dtype), cache, cache), dtype, B, None, False


def on_gpu(options: argparse.Namespace, console: Console) -> int:
    """Measure the cases of the kernels; 2 where this machine has no GPU that they are made for."""

    def show(result: dict[str, Any]) -> None:
        if "error" in result:
            console.print(f"{result['op']} | {result['case']} | failed: {result['error']}")
            return
        share = "-" if result["bound_share"] is None else f"{result['bound_share']:.0%} of the bound"
        console.print(f"{result['op']} | {result['case']} | {result['seconds'] * 1e6:,.1f} us | {share}")
        for name, other in result["peers"].items():
            text = other if isinstance(other, str) else f"{other / result['seconds']:.2f}x our time"
            console.print(f"    {name}: {text}")

    chosen = [case for case in kernel_cases(options.op) if not (options.quick and not case.small)]
    file = RESULTS / "kernels_gpu.json"
    before = json.loads(file.read_text(encoding="utf-8"))["results"] if options.out and file.is_file() else []

    def keep(report: dict[str, Any]) -> None:
        if options.out:
            file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    try:
        report = _kernels_gpu.run(chosen, 5 if options.quick else 21, show, keep, before)
    except _kernels_gpu.NothingFits as error:
        console.print(f"Nothing to measure: {error}.")
        return 2
    if options.out:
        _kernels_gpu.draw(file.with_suffix(".png"), report["results"])
    return 1 if any("error" in row for row in report["results"]) else 0


def against_torch(
    op: str | None, quick: bool, repeats: int, reached: dict[str, float], console: Console
) -> dict[str, Any]:
    """One op, or all, beside torch and the bound of what is ``reached``, shown; says so where torch is missing."""
    names = ("case", "operands", "pass", "ms", "torch, ms", "bound, ms", "times torch's speed")
    table = Table(*names, title="beside torch")
    sources = dict.fromkeys(s for name, some in BESIDE_TORCH.items() if op in (None, name) for s in some)

    def show(row: dict[str, Any]) -> None:
        times = (row[name] for name in ("seconds", "torch_seconds", "bound_seconds"))
        cells = ("-" if v is None else f"{v * 1e3:.3f}" for v in times)
        verdict = "" if row["ratio"] >= row["aim"] else " we lose" if row["ratio"] < 1 else " below the aim"
        table.add_row(row["case"], row["operands"], row["mode"], *cells, f"{row['ratio']:.2f}{verdict}")

    found = _kernels_torch.run(list(sources), quick, repeats, reached, show)
    console.print(f"Nothing beside it: {found['missing']}." if "missing" in found else table)
    return found


def on_cpu(options: argparse.Namespace, console: Console) -> int:
    """Measure the ops through XLA; 2 where there is no such op."""
    repeats = 5 if options.quick else 11
    gflops = {name: matmul_gflops(name, repeats) for name in ("float32", "bfloat16")}
    device = jax.devices()[0].device_kind
    table = Table(
        "case", "operands", "fwd tok/s", "fwd+bwd tok/s", "bound tok/s", title=f"kernels on {device}"
    )
    results = []
    for name, op, args, dtype, tokens, flops, backward in cases(options.quick):
        if options.op not in (None, NAMES.get(name.split()[0], name.split()[0])):
            continue
        operands = jnp.dtype(dtype or jnp.float32).name
        fwd = tokens / seconds(op, *args, repeats=repeats)
        both = tokens / seconds(forward_and_backward(op, args), *args, repeats=repeats) if backward else None
        bound = tokens * gflops[operands] * 1e9 / flops if flops else None
        results.append(
            {
                "case": name,
                "operands": operands,
                "forward_tokens_per_s": fwd,
                "forward_backward_tokens_per_s": both,
                "forward_bound_tokens_per_s": bound,
            }
        )
        table.add_row(name, operands, *(f"{v:,.0f}" if v else "-" for v in (fwd, both, bound)))
    beside = {"results": []}
    copied = _kernels_gpu.copy_bytes(repeats, COPY[options.quick])
    if options.op is None or options.op in BESIDE_TORCH:
        reached = {name: 1e9 * value for name, value in gflops.items()} | {"bytes_per_s": copied}
        beside = against_torch(options.op, options.quick, 2 * repeats, reached, console)
    if not results and not beside["results"]:
        console.print(f"Nothing to measure: no case of {options.op!r} on the CPU.")
        return 2
    if results:
        console.print(table)
    speeds = [f"{name} {value:.0f} GFLOP/s" for name, value in gflops.items()]
    console.print(
        f"matmul 1024^3: {', '.join(speeds)}; copy: {copied / 1e9:.1f} GB/s, each byte read and written"
    )
    if options.out:
        report = {"device": device, "jax": jax.__version__, "matmul_gflops": gflops}
        report |= {"copy_bytes_per_s": copied, "results": results}
        report["beside_torch"] = beside
        (RESULTS / "kernels_cpu.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="what to measure on")
    parser.add_argument("--op", help="one op, e.g. attention; all by default")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repeats")
    parser.add_argument(
        "--out", action="store_true", help="write kernels_<device>.json to experiments/results"
    )
    options = parser.parse_args(argv)
    if options.out and options.op and options.device == "cpu":
        parser.error("--out writes the results of all ops on a CPU: leave --op out")
    return (on_gpu if options.device == "gpu" else on_cpu)(options, Console())


if __name__ == "__main__":
    sys.exit(main())
