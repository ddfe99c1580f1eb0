"""Bytes that recurrent layers make devices receive under context parallelism, in scattered blocks and in contiguous stretches.

Command:  python -m experiments.bench.context_states [--quick] [--out FILE]
Time:     about two minutes; --quick, tiny shapes, half of one. Nothing is run: programs are compiled for simulated devices.
Expected: for a model of few attention layers, blocks that stay scattered cost fewer bytes than a reshuffle around attention
          at Mamba-2's sizes, for a state is small beside the activations of a block.

FCP (arXiv 2605.08524) places blocks for attention only and restores the user's layout around it: every attention layer
moves queries, keys, values and outputs of all tokens that the two layouts hold on different devices (counted from the
plan), and recurrent layers hand one state from each device to the next. The other way leaves blocks where they are: nothing
is reshuffled, but a state of every block travels. What the recurrent layers receive is read off the compiled forward
programs, where XLA:CPU widens the convolutions' bfloat16 inputs to float32. Projections, experts and the exchange of keys
and values are the same both ways and not counted.
"""

import argparse
import datetime
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxllm import preset
from jaxllm.cli import machine
from jaxllm.config import ModelConfig
from parallel.context import (
    Lanes,
    Plan,
    PlanConfig,
    causal_conv,
    contiguous_lanes,
    draw_lengths,
    dynamic_conv,
    gated_delta,
    lane_specs,
    layout,
    make_lanes,
    make_plan,
    ssd,
)

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
AXIS = "context"
WORKERS = 8
# Bytes of an element of activations: bfloat16.
ELEMENT = 2
COLLECTIVE = re.compile(
    r"= (?P<shapes>[^=]*?) (?P<kind>all-gather|all-to-all|all-reduce|collective-permute)(?:-start)?\("
)
SIZES = {"f32": 4, "bf16": 2}
Op = tuple[Callable[..., Any], tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]


def received(text: str, workers: int) -> int:
    """Bytes that a device receives from others in one run of a compiled program.

    Raises:
        ValueError: a collective that these layers do not need.
    """
    total = 0
    # Long tuples are numbered in comments, with an equals sign.
    for found in COLLECTIVE.finditer(re.sub(r"/\*.*?\*/", "", text)):
        if found["kind"] not in ("all-gather", "all-to-all"):
            raise ValueError(
                f"{found['kind']} in a program of recurrent layers: expected all-to-all and all-gather only"
            )
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", found["shapes"]):
            total += SIZES[dtype] * int(np.prod([int(n) for n in dims.split(",") if n], dtype=np.int64))
    return total * (workers - 1) // workers


def ops(cfg: ModelConfig) -> dict[str, Op]:
    """The ops of a recurrent layer of the model: function, shapes of what tokens carry, shapes of parameters."""
    if cfg.mamba is not None:
        m = cfg.mamba
        heads, state, channels = (
            (m.num_heads, m.head_dim),
            (m.n_groups, m.state_size),
            m.num_heads * m.head_dim,
        )
        channels += 2 * m.n_groups * m.state_size
        scan = ssd, (heads, (m.num_heads,), state, state), ((m.num_heads,),)
        return {"scan": scan, "convolution": (causal_conv, ((channels,),), ((m.conv_kernel, channels),))}
    j = cfg.jet
    assert j is not None
    key, value = (j.num_heads, j.key_head_dim), (j.num_heads, j.value_head_dim)
    channels = j.num_heads * j.value_head_dim
    scan = gated_delta, (key, key, value, (j.num_heads,), (j.num_heads,)), ()
    return {"scan": scan, "convolution": (dynamic_conv, ((channels,), (j.conv_kernel, channels)), ())}


def compiled(op: Op, lanes: Lanes) -> str:
    """The forward program of one op on the devices that hold the lanes."""
    function, tokenwise, parameters = op
    workers, count, block = lanes.segment_ids.shape
    rows = workers * (count - lanes.moved.shape[1])
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:workers]), (AXIS,))

    def abstract(shape, spec, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

    def local(lanes, tokens, weights):
        if function is ssd:
            x, dt, B, C = tokens
            return ssd(
                x, dt.astype(jnp.float32), *weights, B, C, lanes=lanes, axis=AXIS, operand_dtype=jnp.bfloat16
            )[0]
        if function is gated_delta:
            return gated_delta(*tokens, lanes=lanes, axis=AXIS, operand_dtype=jnp.bfloat16)[0]
        return function(*tokens, *weights, lanes=lanes, axis=AXIS)

    specs = lane_specs(AXIS)
    call = jax.shard_map(
        local, mesh=mesh, in_specs=(specs, jax.P(AXIS), jax.P()), out_specs=jax.P(AXIS), check_vma=False
    )
    given = (
        jax.tree.map(lambda v, spec: abstract(v.shape, spec, v.dtype), lanes, specs),
        tuple(abstract((rows, block, *shape), jax.P(AXIS)) for shape in tokenwise),
        tuple(abstract(shape, jax.P()) for shape in parameters),
    )
    return jax.jit(call).lower(*given).compile().as_text()


def reshuffled(plan: Plan) -> float:
    """Tokens that the busiest device receives when contiguous stretches become the plan's slots."""
    index = layout(plan).index.reshape(plan.capacity.workers, -1)
    share = -(-plan.blocks.tokens // plan.capacity.workers)
    away = (index >= 0) & (index // share != np.arange(plan.capacity.workers)[:, None])
    return float(away.sum(1).max())


def measure(name: str, cfg: ModelConfig, tokens: int, block: int, seed: int) -> list[dict[str, Any]]:
    """One row for each way of running a model's layers on a batch; bytes that a device receives in a forward pass."""
    attention = cfg.attention
    assert attention is not None
    lengths = draw_lengths("log-normal", WORKERS * tokens, seed)
    counts = {
        kind: sum(cfg.pattern.count(letter) for letter in letters)
        for kind, letters in (("recurrent", "MJ"), ("attention", "*W"))
    }
    # Queries, keys and values come, outputs go back.
    width = 2 * (attention.num_heads + attention.num_kv_heads) * attention.head_dim
    rows = []
    for strategy in ("fcp", "fcp-pairs"):
        plan = make_plan(lengths, PlanConfig(WORKERS, block=block, strategy=strategy))
        for way, lanes in (
            ("scattered", make_lanes(plan)),
            ("reshuffled", contiguous_lanes(lengths, WORKERS)),
        ):
            layer = {op: received(compiled(what, lanes), WORKERS) for op, what in ops(cfg).items()}
            moved = int(reshuffled(plan) * width * ELEMENT) if way == "reshuffled" else 0
            total = counts["recurrent"] * sum(layer.values()) + counts["attention"] * moved
            rows.append(
                {
                    "model": name,
                    "layers": counts,
                    "strategy": strategy,
                    "way": way,
                    "documents": len(lengths),
                    "slots": plan.capacity.slots,
                    "lanes": lanes.after.shape[1],
                    "recurrent_layer": layer,
                    "attention_layer": moved,
                    "forward_pass": total,
                }
            )
    return rows


def models(quick: bool) -> dict[str, ModelConfig]:
    """A Mamba-2 and a delta-rule hybrid."""
    names = ("nemotron-3-tiny", "jet-tiny") if quick else ("nemotron-3-nano-30b-a3b", "jet-nemotron-4b")
    return {name: preset(name) for name in names}


def show(rows: list[dict[str, Any]]) -> None:
    """The figures as a table."""
    table = Table(
        "model",
        "plan",
        "blocks",
        "lanes",
        "scan",
        "convolution",
        "attention",
        "forward pass",
        title="MiB received by a device",
    )
    for row in rows:
        layer = (*row["recurrent_layer"].values(), row["attention_layer"], row["forward_pass"])
        table.add_row(
            row["model"],
            row["strategy"],
            row["way"],
            str(row["lanes"]),
            *(f"{size / 2**20:.3f}" for size in layer),
        )
    Console(width=130).print(table)


def main(argv: list[str] | None = None) -> int:
    """Count and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny models and blocks; no file but --out")
    parser.add_argument("--seed", type=int, default=0, help="of the documents' lengths")
    parser.add_argument("--out", type=Path, help="the result file (default: under experiments/results)")
    options = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", WORKERS)
    tokens, block = (512, 64) if options.quick else (32_768, 4_096)
    rows = []
    for name, cfg in models(options.quick).items():
        rows += measure(name, cfg, tokens, block, options.seed)
    out = options.out or (None if options.quick else RESULTS / "context_states.json")
    if out is not None:
        report = {
            "command": "python -m experiments.bench.context_states",
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "inputs": {
                "workers": WORKERS,
                "tokens_per_worker": tokens,
                "block": block,
                "lengths": "log-normal",
                "seed": options.seed,
                "activations": "bfloat16",
            },
            "versions": machine.versions(),
            "device": machine.describe(),
            "results": rows,
        }
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
