"""Operations and memory of a worker that does two jobs, degraded and in full, against one that does its own.

Command:  python -m experiments.bench.failover_cost [--quick] [--target cpu|h200] [--out FILE]
Time:     some minutes, most of them for the hybrid. Nothing is run: programs are compiled. ``--target h200`` needs the
          extra ``aot`` beside jaxllm and its dependencies, and no GPU; it has not been run yet.
Expected: two degraded jobs take about 2 (a + 3 f) / 3 of a normal one's operations, where a is the share in the forward
          pass of what is skipped and f that of all else (1.56 for a third of attention): low-rank products come on top,
          and the last product of a sub-block, which need not be computed again, comes off. What the paper (arXiv
          2510.16415) claims of a step's time is less, for its pipelines wait.

Operations are counted in the program before XLA optimises it, layer by layer: afterwards loops would count once, and on CPU
what is computed again would be shared with the first time. Memory is that of the compiled program with stacked layers,
whose loops keep the two apart; a double task runs its shards one after the other.
"""

import argparse
import datetime
import json
import sys
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from jaxllm.batch import PackedBatch
from jaxllm.cli import machine
from jaxllm.config import AttentionConfig, MambaConfig, MLPConfig, ModelConfig, RopeConfig
from jaxllm.model.functional import abstract_params, flatten
from jaxllm.train.degraded import POLICY, Degraded, ranks
from jaxllm.train.flops import forward_flops_per_token
from jaxllm.train.step import StepSettings, gradients
from pallas_kernels import compat
from pallas_kernels.proof.aot import H200

RESULTS = Path(__file__).parents[2] / "experiments" / "results"


@dataclass(frozen=True)
class Task:
    """What a worker does of one batch.

    Attributes:
        jobs: shards.
        policy: rule of each letter.
        recompute: sub-blocks keep their inputs only.
    """

    jobs: int = 2
    policy: tuple[tuple[str, str], ...] = tuple(dict.fromkeys(POLICY, "exact").items())
    recompute: bool = False

    @property
    def rules(self) -> dict[str, str]:
        """``policy`` as a dictionary."""
        return dict(self.policy)


def _rules(*kept: str) -> tuple[tuple[str, str], ...]:
    return tuple((letter, rule if rule in kept else "exact") for letter, rule in POLICY.items())


TASKS = {
    "normal": Task(jobs=1),
    "both in full": Task(),
    "skip": Task(policy=_rules("skip")),
    "recompute": Task(recompute=True),
    "low rank": Task(policy=_rules("low_rank")),
    "degraded": Task(policy=_rules("skip", "low_rank"), recompute=True),
}


def models(quick: bool) -> dict[str, ModelConfig]:
    """A Llama-like model, of whose layers attention is a third, and a hybrid."""
    width, vocab = (128, 256) if quick else (1024, 4096)
    heads = width // 64
    shared: dict[str, Any] = dict(
        vocab_size=vocab,
        hidden_size=width,
        attention=AttentionConfig(heads, num_kv_heads=heads, head_dim=64, rope=RopeConfig()),
        mlp=MLPConfig(round(width * 8 / 3 / 16) * 16, activation="swiglu"),
        mamba=MambaConfig(2 * heads, head_dim=64, state_size=32 if quick else 128),
    )
    return {
        "llama": ModelConfig(pattern="*-" * 4, **shared),
        "hybrid": ModelConfig(pattern="M-M-M-*-" * 2, **shared),
    }


def shard(rows: int, length: int, *leading: int) -> PackedBatch:
    """Shapes of a shard's rows."""
    whole = partial(jax.ShapeDtypeStruct, (*leading, rows, length))
    targets = jax.ShapeDtypeStruct((*leading, rows, length, 1), jnp.int32)
    ids = whole(jnp.int32)
    return PackedBatch(ids, ids, ids, targets=targets, loss_mask=whole(jnp.float32))


def degraded_of(cfg: ModelConfig, task: Task, bases: dict[str, Any]) -> Degraded | None:
    """How the task takes its gradients; None: as everybody."""
    skipped = frozenset(letter for letter in cfg.pattern if task.rules[letter] == "skip")
    return Degraded(skipped, bases, task.recompute) if skipped or bases or task.recompute else None


def bases_of(cfg: ModelConfig, task: Task) -> dict[str, Any]:
    """Shapes of V1."""
    shapes = flatten(abstract_params(cfg))
    return {
        name: jax.ShapeDtypeStruct((*shapes[name].shape[:-1], r), jnp.float32)
        for name, r in ranks(cfg, task.rules, None).items()
    }


def operations(cfg: ModelConfig, task: Task, rows: int, length: int) -> float:
    """Floating-point operations of all its jobs."""
    settings = StepSettings(loss_chunk=rows * length)

    def one(params: Any, batch: PackedBatch, bases: dict[str, Any]) -> Any:
        return gradients(cfg, params, batch, settings, degraded=degraded_of(cfg, task, bases))

    lowered = jax.jit(one).lower(abstract_params(cfg), shard(rows, length), bases_of(cfg, task))
    cost: Any = lowered.cost_analysis()
    return task.jobs * cost["flops"]


def memory(cfg: ModelConfig, task: Task, rows: int, length: int, target: str) -> dict[str, int]:
    """Bytes of the compiled program beside its arguments, gradients included."""
    cfg = cfg.replace(scan_layers=True)

    def run(params: Any, batch: PackedBatch, bases: dict[str, Any], count: Any) -> Any:
        degraded = degraded_of(cfg, task, bases)
        take = partial(gradients, cfg, params, settings=StepSettings(), degraded=degraded)
        if task.jobs == 1:
            return take(jax.tree.map(lambda x: x[0], batch))

        def add(place: Any, total: Any) -> Any:
            part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, place, keepdims=False), batch)
            return jax.tree.map(jnp.add, total, take(part))

        found = jax.eval_shape(lambda: take(jax.tree.map(lambda x: x[0], batch)))
        return jax.lax.fori_loop(0, count, add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), found))

    given = (
        abstract_params(cfg),
        shard(rows, length, task.jobs),
        bases_of(cfg, task),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    with ExitStack() as stack:
        where = stack.enter_context(device(target))
        if where is not None:
            given = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(where, jax.P())),
                given,
            )
            stack.enter_context(jax.set_mesh(where))
            stack.enter_context(jax.default_device(where.devices.flat[0]))
        found: Any = jax.jit(run).lower(*given).compile().memory_analysis()
    return {"temporary": found.temp_size_in_bytes, "results": found.output_size_in_bytes}


def device(target: str) -> AbstractContextManager[Any]:
    """A mesh of one H200 that is not there; None for the CPU that is."""
    if target == "cpu":
        return nullcontext()
    topology = compat.topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    return nullcontext(compat.topologies.make_mesh(topology, (1,), ("x",)))


def shares(cfg: ModelConfig, length: int) -> dict[str, float]:
    """Share of each letter in the forward pass's operations; the head's under ``head``."""
    whole = forward_flops_per_token(cfg, length)
    letters = sorted(set(cfg.pattern))
    once = {
        letter: forward_flops_per_token(cfg.replace(pattern=cfg.pattern + letter), length) - whole
        for letter in letters
    }
    found = {letter: cfg.pattern.count(letter) * once[letter] / whole for letter in letters}
    return found | {"head": 1 - sum(found.values())}


def expected(cfg: ModelConfig, task: Task, length: int) -> float:
    """Operations over a normal task's, by the paper's count of three passes: low-rank products are free."""
    passes = {"skip": 1, "low_rank": 2, "exact": 3}

    def of(letter: str) -> int:
        rule = "exact" if letter == "head" else task.rules[letter]
        return passes[rule] + (task.recompute and letter != "head" and rule != "skip")

    return task.jobs * sum(share * of(letter) for letter, share in shares(cfg, length).items()) / 3


def measure(name: str, cfg: ModelConfig, rows: int, length: int, target: str) -> list[dict[str, Any]]:
    """One row for each task of a model."""
    found: list[dict[str, Any]] = []
    for task_name, task in TASKS.items():
        flops = operations(cfg, task, rows, length)
        found.append(
            {
                "model": name,
                "task": task_name,
                "operations": flops,
                "operations_over_normal": flops / (found[0]["operations"] if found else flops),
                "expected": expected(cfg, task, length),
                "memory": memory(cfg, task, rows, length, target),
            }
        )
    return found


def show(rows: list[dict[str, Any]]) -> None:
    """The figures as a table."""
    table = Table("model", "task", "GFLOP", "over normal", "three passes", "temporary MiB", "results MiB")
    for row in rows:
        table.add_row(
            row["model"],
            row["task"],
            f"{row['operations'] / 1e9:.2f}",
            f"{row['operations_over_normal']:.3f}",
            f"{row['expected']:.3f}",
            *(f"{row['memory'][part] / 2**20:.1f}" for part in ("temporary", "results")),
        )
    Console(width=120).print(table)


def main(argv: list[str] | None = None) -> int:
    """Compile, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny models; no file but --out")
    parser.add_argument("--target", choices=("cpu", "h200"), default="cpu", help="what memory is counted for")
    parser.add_argument("--out", type=Path, help="the result file (default: under experiments/results)")
    options = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    rows, length = (2, 128) if options.quick else (4, 1024)
    results = []
    for name, cfg in models(options.quick).items():
        results += measure(name, cfg, rows, length, options.target)
    suffix = "" if options.target == "cpu" else f"_{options.target}"
    out = options.out or (None if options.quick else RESULTS / f"failover_cost{suffix}.json")
    if out is not None:
        report = {
            "command": f"python -m experiments.bench.failover_cost --target {options.target}",
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "inputs": {
                "rows": rows,
                "length": length,
                "target": options.target,
                "models": {name: cfg.to_dict() for name, cfg in models(options.quick).items()},
            },
            "versions": machine.versions(),
            "device": machine.describe(),
            "results": results,
        }
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
