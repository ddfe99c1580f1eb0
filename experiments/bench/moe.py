"""Speed of the experts of a mixture: the dropless path beside its alternatives, and the same FLOPs as one product.

Command:  python -m experiments.bench.moe [--quick] [--shape TOKENSxEXPERTS ...] [--out]
Time:     about 3 minutes on 2 CPU cores, 20 seconds for a single shape.
Expected: on CPU at least 5 times as fast as lax.ragged_dot with 64 experts, which multiplies every row by every expert.

Contenders, interleaved in one process: ``jaxllm`` (sort, grouped products, combine), ``ragged_dot`` (the same with
lax.ragged_dot), ``dense`` (every expert for every token), ``transformers`` (NemotronHExperts on torch, where installed) and
``ideal`` (two plain products of as many rows as there are copies of tokens).
"""

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.table import Table

from pallas_kernels.grouped_matmul import from_experts, grouped_matmul, plan, to_experts

OUT = Path(__file__).parents[1] / "results" / "moe.json"
D, F, K = 256, 512, 4
# With 1024 tokens 64 experts have 64 rows each; 1 and 8 tokens are decode steps.
SHAPES = ("512x8", "128x64", "1024x64", "512x128", "1x64", "8x128")
# Above this, what multiplies every token by every expert would take minutes.
SLOW = 128 * 64
QUICK = ("512x8", "1x64")


def problem(tokens: int, experts: int) -> dict[str, np.ndarray]:
    """Inputs, experts, and routing that is skewed as Zipf's law is: expert e is drawn as 1 / sqrt(e + 1)."""
    rng = np.random.default_rng([tokens, experts])
    odds = -np.log(rng.exponential(size=(tokens, experts))) - 0.5 * np.log(np.arange(experts) + 1)
    return {
        "x": rng.standard_normal((tokens, D), np.float32),
        "up": rng.standard_normal((experts, D, F), np.float32) / D**0.5,
        "down": rng.standard_normal((experts, F, D), np.float32) / F**0.5,
        "weights": rng.random((tokens, K), np.float32),
        "ids": np.argsort(-odds, axis=1)[:, :K].astype(np.int32),
    }


def _act(h: jax.Array) -> jax.Array:
    return jnp.square(jax.nn.relu(h))


def _sorted(product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def run(x, up, down, weights, ids):
        p = plan(ids, len(up))
        return from_experts(product(_act(product(to_experts(x, p), up, p.sizes)), down, p.sizes), weights, p)

    return run


def dense(x, up, down, weights, ids):
    """Every expert for every token."""
    mix = jnp.sum(jax.nn.one_hot(ids, len(up)) * weights[..., None], axis=1)
    hidden = _act(jnp.einsum("td,edf->etf", x, up, precision="highest"))
    return jnp.einsum("etf,efd,te->td", hidden, down, mix, precision="highest")


def ideal(x, up, down, weights, ids):
    """As many FLOPs, in two plain products."""
    rows = jnp.tile(x, (ids.shape[1], 1))
    y = jnp.dot(_act(jnp.dot(rows, up[0], precision="highest")), down[0], precision="highest")
    return y[: len(x)]


JAX = {
    "jaxllm": _sorted(grouped_matmul),
    "ragged_dot": _sorted(lax.ragged_dot),
    "dense": dense,
    "ideal": ideal,
}


def jax_calls(name: str, data: dict[str, np.ndarray]) -> dict[str, Callable[[], Any]]:
    """Compiled forward, and forward and backward to x, the weights of the experts and those of the combination."""
    floats = tuple(jnp.asarray(data[n]) for n in ("x", "up", "down", "weights"))
    ids, op = jnp.asarray(data["ids"]), JAX[name]
    forward = jax.jit(op)
    both = jax.jit(jax.grad(lambda *a: jnp.sum(jnp.square(op(*a, ids))), (0, 1, 2, 3)))
    return {
        "forward": lambda: jax.block_until_ready(forward(*floats, ids)),
        "forward and backward": lambda: jax.block_until_ready(both(*floats)),
    }


def torch_calls(data: dict[str, np.ndarray]) -> dict[str, Callable[[], Any]]:
    """The loop over experts of transformers' Nemotron-H, with as many threads as are fastest here."""
    import torch
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    experts = len(data["up"])
    config = SimpleNamespace(
        n_routed_experts=experts,
        hidden_size=D,
        moe_intermediate_size=F,
        moe_latent_size=None,
        mlp_hidden_act="relu2",
        _experts_implementation="eager",
    )
    module = NemotronHExperts(config)
    with torch.no_grad():
        module.up_proj.copy_(torch.from_numpy(data["up"].swapaxes(1, 2).copy()))
        module.down_proj.copy_(torch.from_numpy(data["down"].swapaxes(1, 2).copy()))
    x, weights = (torch.from_numpy(data[n]).requires_grad_() for n in ("x", "weights"))
    ids = torch.from_numpy(data["ids"]).long()

    def forward():
        with torch.no_grad():
            return module(x, ids, weights)

    def both():
        for leaf in (x, weights, module.up_proj, module.down_proj):
            leaf.grad = None
        module(x, ids, weights).square().sum().backward()

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        forward()
        start = time.perf_counter()
        forward()
        return time.perf_counter() - start

    torch.set_num_threads(min((1, os.cpu_count() or 1), key=seconds))
    return {"forward": forward, "forward and backward": both}


def contest(tokens: int, experts: int, repeats: int, slow: bool) -> list[dict[str, Any]]:
    """Median seconds of each contender; what takes over a second runs twice. Checks that all compute the same."""
    data = problem(tokens, experts)
    names = [name for name in JAX if slow or name not in ("ragged_dot", "dense")]
    calls = {name: jax_calls(name, data) for name in names}
    with contextlib.suppress(ImportError):
        calls["transformers"] = torch_calls(data)
    wanted = np.asarray(calls["jaxllm"]["forward"]())
    for name in set(calls) - {"ideal"}:
        np.testing.assert_allclose(calls[name]["forward"](), wanted, rtol=1e-3, atol=1e-3)
    rows = []
    for mode in ("forward", "forward and backward") if tokens > 8 else ("forward",):
        times: dict[str, list[float]] = {name: [] for name in calls}
        for name in calls:
            calls[name][mode]()
        for turn in range(repeats):
            for name, taken in times.items():
                if turn < 2 or taken[0] < 0.2:
                    start = time.perf_counter()
                    calls[name][mode]()
                    taken.append(time.perf_counter() - start)
        seconds = {name: statistics.median(taken) for name, taken in times.items()}
        rows.append({"tokens": tokens, "experts": experts, "top_k": K, "mode": mode, "seconds": seconds})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repeats")
    parser.add_argument("--shape", nargs="*", help="measure these only; --out keeps the rows of the others")
    parser.add_argument("--out", action="store_true", help=f"write {OUT.name} under experiments/results")
    options = parser.parse_args()
    shapes = options.shape or (QUICK if options.quick else SHAPES)
    repeats = 3 if options.quick else 9
    results = []
    for shape in shapes:
        tokens, experts = map(int, shape.split("x"))
        results += contest(tokens, experts, repeats, tokens > 8 and tokens * experts <= SLOW)
    names = ("jaxllm", "ragged_dot", "dense", "transformers", "ideal")
    table = Table("tokens", "experts", "mode", *names, title="milliseconds")
    for row in results:
        cells = (row["seconds"].get(name) for name in names)
        table.add_row(
            str(row["tokens"]),
            str(row["experts"]),
            row["mode"],
            *("-" if s is None else f"{s * 1e3:.2f}" for s in cells),
        )
    Console(width=120).print(table)
    if options.out:
        known = json.loads(OUT.read_text())["results"] if OUT.is_file() and options.shape else []
        kept = [row for row in known if f"{row['tokens']}x{row['experts']}" not in shapes]
        results = sorted(kept + results, key=lambda row: (row["tokens"] <= 8, row["experts"], row["tokens"]))
        report = {
            "device": jax.devices()[0].device_kind,
            "cores": os.cpu_count(),
            "jax": jax.__version__,
            "width": D,
            "expert_width": F,
            "results": results,
        }
        OUT.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
