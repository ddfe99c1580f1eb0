"""What MeCeFO's cheaper gradients cost in quality, beside dropping the lost shards: small models on the quickstart corpus.

Command:  python -m experiments.failover_quality [--quick | --full] [--out FILE]
Time:     an hour of two cores that other work shares, compilation included (--full: several times that).
Expected: skipping attention costs almost nothing and low-rank gradients almost all that MeCeFO costs, which at these widths
          is more than dropping the lost shards costs; less the higher the rank, and at the full one almost nothing.

Four workers train a shard of every batch each. At any time one of them is dead with the stated probability, and its
neighbour trains two shards, with degraded gradients for both. All methods see the same batches and the same failures.
The workers are slots of one device: the step is that of `jaxllm.train.failover` with one living worker that has a slot of all
shards in full and one of all that are degraded, whose inputs alone are not kept here, as gradients are the same. It takes up
where it stopped (runs/failover_quality).
"""

import argparse
import datetime
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from experiments._failover_gradients import make_drawn, relative_error
from experiments._failover_quality_report import draw, summary
from jaxllm import AttentionConfig, MambaConfig, MLPConfig, ModelConfig
from jaxllm.batch import PackedBatch
from jaxllm.cli import machine
from jaxllm.cli.validation import Validation
from jaxllm.data.loader import Loader
from jaxllm.data.prepare import PreparedData, prepare_data
from jaxllm.train.failover import FailoverPlan, FailoverSettings, make_failover_step
from jaxllm.train.optim import OptimConfig
from jaxllm.train.state import TrainPlan, init_state
from jaxllm.train.step import StepSettings
from parallel.failover.assignment import assign

ROOT = Path(__file__).parents[1]
OUT = ROOT / "experiments" / "results" / "failover_quality.json"
WORKERS, PERIOD = 4, 25


@dataclass(frozen=True)
class Method:
    """A way to train the shards of the dead.

    Attributes:
        name: its line.
        settings: of the step; None: nobody ever dies.
        drawn: bases of low-rank gradients are random ones.
    """

    name: str
    settings: FailoverSettings | None
    drawn: bool = False

    @property
    def file(self) -> str:
        """Its name in those of files."""
        return self.name.replace(", ", "-").replace(" ", "-")


def mecefo(**options: Any) -> FailoverSettings:
    """MeCeFO that keeps what it has computed: the same gradients, sooner."""
    return FailoverSettings("mecefo", recompute=False, **options)


def methods(few: bool) -> list[Method]:
    """All of them, or those of the second model."""
    exact = dict.fromkeys("M*WGJ-E", "exact")
    both = mecefo()
    found = [Method("no failure", None), Method("mecefo", both), Method("drop", FailoverSettings("drop"))]
    if few:
        return found
    skip = mecefo(policy={**exact, "*": "skip"})
    low = mecefo(policy=dict.fromkeys("M*-", "low_rank"))
    every = mecefo(policy={"M": "skip"})
    return [
        *found,
        Method("skipped attention alone", skip),
        Method("low rank alone", low),
        Method("mecefo, Mamba skipped too", every),
    ]


def sweeps() -> list[Method]:
    """MeCeFO with other ranks, with random bases, and with bases that are made anew more or less often."""
    return [
        *(Method(f"mecefo, rank {rank}", mecefo(rank=rank)) for rank in (8, 16, 32, "full")),
        Method("mecefo, rank 16, drawn bases", mecefo(rank=16), drawn=True),
        *(Method(f"mecefo, bases every {steps}", mecefo(refresh=steps)) for steps in (1, 25, 400)),
    ]


@dataclass(frozen=True)
class Size:
    """What is run.

    Attributes:
        steps: of a run.
        seeds: runs of each method.
        rates: shares of the time in which one worker is dead.
        rows: of a shard.
        length: tokens of a row.
        validation: tokens of the validation text, spread over it.
        models: name to configuration.
        swept: runs of each method of :func:`sweeps`, of the first model.
    """

    steps: int
    seeds: int
    rates: tuple[float, ...]
    rows: int
    length: int
    validation: int
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    swept: int = 1


HYBRID = {"pattern": "M-*-M-*-"}
LLAMA = {"pattern": "*-*-*-*-"}
SIZES = {
    "quick": Size(8, 1, (0.8,), 1, 32, 4096, {"hybrid": {"pattern": "M-*-"}}),
    "default": Size(2000, 3, (0.8,), 2, 64, 65_536, {"hybrid": HYBRID, "llama": LLAMA}),
    "full": Size(4000, 3, (0.2, 0.4, 0.8), 2, 64, 65_536, {"hybrid": HYBRID, "llama": LLAMA}),
}


def config(pattern: str, vocabulary: int) -> ModelConfig:
    """A model of about half a million parameters without its embedding."""
    swiglu = "M" not in pattern
    return ModelConfig(
        vocabulary,
        64,
        pattern,
        mamba=MambaConfig(num_heads=8, head_dim=16, state_size=16, chunk_size=32),
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16),
        mlp=MLPConfig(176, activation="swiglu") if swiglu else MLPConfig(256),
        tie_embeddings=True,
    )


def failures(steps: int, rate: float, seed: int) -> Iterator[tuple[int, ...]]:
    """Who lives in each step: a worker dies and comes back at the ends of periods of ``PERIOD`` steps."""
    rng = np.random.default_rng((seed, 11))
    everybody = tuple(range(WORKERS))
    for step in range(steps):
        if step % PERIOD == 0:
            dead = int(rng.integers(WORKERS)) if rng.random() < rate else None
        yield tuple(worker for worker in everybody if worker != dead)


STEP = StepSettings(loss_chunk=1024)


@lru_cache
def compiled(
    cfg: ModelConfig,
    optim: OptimConfig,
    method: str,
    policy: tuple[tuple[str, str], ...],
    rank: int | str | None,
) -> Any:
    """The step of a method, for all seeds, and what makes its bases."""
    settings = FailoverSettings(method, policy=dict(policy), rank=rank, recompute=False)
    refresh = settings.make_bases(cfg) if method == "mecefo" else None
    return make_failover_step(cfg, optim, STEP, settings), refresh


def train(
    cfg: ModelConfig, method: Method, rate: float, seed: int, size: Size, data: PreparedData
) -> dict[str, Any]:
    """One run: its validation loss and the errors of its gradients on the way, and its loss at the end."""
    optim = OptimConfig(lr=3e-3, warmup_steps=size.steps // 20, total_steps=size.steps, schedule="cosine")
    settings = method.settings or FailoverSettings("drop")
    policy = tuple(settings.policy.items())
    step, refresh = compiled(cfg, optim, settings.method, policy, settings.rank)
    draw_bases = make_drawn(cfg, policy, settings.rank, seed) if method.drawn else None
    loader = Loader(data.train, WORKERS * size.rows, size.length, seed=seed)
    validation = Validation(
        cfg, data.validation, data.tokenizer, batch_size=32, seq_len=size.length, part=size.validation
    )
    state, bases, losses, degraded = init_state(cfg, optim, seed), None, [], 0
    # Gradients of who does one job are sums over all of them; they take one pass where none is degraded.
    slots = 2 if settings.method == "mecefo" else 1
    every, errors, due = max(1, size.steps // 5), [], False
    for number, live in enumerate(failures(size.steps, rate if method.settings else 0.0, seed)):
        if refresh is not None and number % settings.refresh == 0:
            bases = draw_bases(number) if draw_bases is not None else refresh(state.params, bases)
        jobs, whole = settings.jobs(assign(WORKERS, live, number // PERIOD).jobs), next(loader)
        # At the first failure of each part of the run.
        due |= number % every == 0
        if due and len(live) < WORKERS:
            error = relative_error(cfg, state.params, whole, WORKERS, jobs, settings, bases, STEP)
            errors, due = [*errors, [number, error]], False
        plan, batch = laid_out(jobs, whole, bases, slots)
        degraded += sum(len(own) for own in jobs if len(own) > 1)
        state, metrics = step(state, batch, TrainPlan(failover=plan))
        if number % every == 0 or number == size.steps - 1:
            losses.append([number + 1, validation.partial(state.params, number)["validation_loss"]])
    loader.close()
    return {
        "validation": losses,
        "loss": losses[-1][1],
        "degraded": degraded / (WORKERS * size.steps),
        "train_loss": float(metrics.loss),
        "errors": errors,
    }


def laid_out(
    jobs: tuple[tuple[int, ...], ...], batch: PackedBatch, bases: Any, slots: int = 2
) -> tuple[FailoverPlan, PackedBatch]:
    """The shards of all workers as ``slots`` of one, several in each: those in full, the degraded ones, the idle ones.

    Raises:
        ValueError: shards in full and degraded ones would share a slot.
    """
    order = sorted((len(own) > 1, shard) for own in jobs for shard in own)
    each = WORKERS // slots
    shards = [shard for _, shard in order] + [-1] * (WORKERS - len(order))
    flags = [[flag for flag, _ in order[first : first + each]] for first in range(0, WORKERS, each)]
    if any(len(set(slot)) > 1 for slot in flags):
        raise ValueError(f"jobs={jobs}: slots={slots} of {each} shards would be degraded in part")

    def rows(x: Any) -> Any:
        parts = x.reshape(WORKERS, len(x) // WORKERS, *x.shape[1:])
        return np.concatenate([parts[shard] if shard >= 0 else np.zeros_like(parts[0]) for shard in shards])

    laid = jax.tree.map(rows, batch)
    laid = laid.replace(targets=np.where(laid.segment_ids[..., None] > 0, laid.targets, -1))
    places = [slot if flag else -1 for slot, flag in enumerate(flags)]
    return FailoverPlan(np.array([places], np.int32), np.array([list(map(any, flags))]), bases), laid


def jobs_of(size: Size) -> Iterator[tuple[str, Method, float, int]]:
    """Every run; the second model, and a quick look, have fewer methods, and only the first one is swept."""
    quick = size is SIZES["quick"]
    for seed in range(size.seeds):
        for place, model in enumerate(size.models):
            for method in methods(few=place > 0 or quick):
                for rate in size.rates if method.settings else (0.0,):
                    yield model, method, rate, seed
    # These are compared at the greatest rate alone.
    for seed in range(size.swept):
        for method in sweeps()[4:5] if quick else sweeps():
            yield next(iter(size.models)), method, max(size.rates), seed


def main(argv: list[str] | None = None) -> int:
    """Run what is not there yet, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="few steps, to see that it runs; writes no results"
    )
    parser.add_argument("--full", action="store_true", help="three rates of failure, twice as many steps")
    parser.add_argument("--out", type=Path, help="the result file")
    options = parser.parse_args(argv)
    name = "quick" if options.quick else "full" if options.full else "default"
    size, folder = SIZES[name], ROOT / "runs" / "failover_quality" / name
    out = options.out or (folder / OUT.name if options.quick else OUT)
    folder.mkdir(parents=True, exist_ok=True)
    data = prepare_data("stdlib", vocab_size=512)
    vocabulary = -(-data.tokenizer.vocab_size // 64) * 64
    if jax.config.jax_compilation_cache_dir is None:
        # What one run has compiled the next one need not.
        jax.config.update("jax_compilation_cache_dir", str(folder.parent / "programs"))
    runs, jobs = [], list(jobs_of(size))
    with Progress() as progress:
        task = progress.add_task("runs", total=len(jobs))
        for model, method, rate, seed in jobs:
            progress.update(task, description=f"{model}, {method.name}, seed {seed}")
            file = folder / f"{model}-{method.file}-{rate:g}-{seed}.json"
            if options.quick or not file.is_file():
                cfg = config(**size.models[model], vocabulary=vocabulary)
                found = train(cfg, method, rate, seed, size, data)
                found = {"model": model, "method": method.name, "rate": rate, "seed": seed} | found
                file.write_text(json.dumps(found), encoding="utf-8")
            runs.append(json.loads(file.read_text(encoding="utf-8")))
            progress.advance(task)
    rows = summary(runs)
    report = {
        "command": "python -m experiments.failover_quality" + (" --full" if options.full else ""),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "inputs": {**asdict(size), "workers": WORKERS, "period": PERIOD, "corpus": data.corpus.name},
        "versions": machine.versions(),
        "device": machine.describe(),
        "rows": rows,
        "runs": runs,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report) + "\n", encoding="utf-8")
    draw(runs, rows, WORKERS, out.with_suffix(".png"))
    table = Table(
        "model", "dead", "method", "seeds", "degraded", "validation, nats", "above no failure", "error"
    )
    for row in rows:
        gap, error = row["above_no_failure"], row["gradient_error"]
        table.add_row(
            row["model"],
            f"{row['rate']:.0%}",
            row["method"],
            str(row["seeds"]),
            f"{row['degraded']:.0%}",
            f"{row['loss']:.3f} ({row['least']:.3f} to {row['greatest']:.3f})",
            "-" if gap is None else f"{gap:+.3f}",
            "-" if error is None else f"{error:.2f}",
        )
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
