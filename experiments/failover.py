"""Training that survives failures, on real processes: a chaos driver kills and stops workers of `jaxllm launch`.

Command:  python -m experiments.failover [--quick] [--failures N] [--seed S] [--only mecefo ...] [--out FILE]
Time:     a quarter of an hour of two cores (--quick: minutes; --failures 100: a night).
Expected: every sample counted once, no state from disk, survivors' processes kept, validation loss within 1 % of the
          undisturbed run's, and less wall time lost than by restarting from checkpoints.

Four workers on loopback train the quickstart model (--quick: a tiny hybrid) three times: undisturbed; with failures, under
MeCeFO and without checkpoints on the way; with the same failures, all workers stopped and restarted from the newest
checkpoint. Who fails when is drawn from --seed, by default of the commit; 5 failures are rank 0 and one more while it is
recovered from, two at once, and a hang. The exit code is 1 where one of the properties does not hold.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from experiments import _failover_account as account
from experiments._failover_chaos import Run, disturb, draw, restart
from experiments._failover_chart import draw as picture
from experiments._failover_chart import show
from jaxllm.cli import machine

ROOT = Path(__file__).parents[1]
OUT = ROOT / "experiments" / "results" / "failover.json"
WORKERS, TOLERANCE = 4, 0.01
KINDS = ("undisturbed", "mecefo", "restart")

TINY = {
    "pattern": "M-*-",
    "hidden_size": 64,
    "mamba": {"num_heads": 4, "head_dim": 16, "state_size": 16, "chunk_size": 32},
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
    "mlp": {"intermediate_size": 128},
}


def config(quick: bool, steps: int) -> dict[str, Any]:
    """What is trained."""
    data = {"batch_size": 8, "prefetch": 0, "evaluation_tokens": 2048}
    if quick:
        data |= {"source": str(ROOT / "docs" / "*.md"), "vocab_size": 512, "seq_len": 32}
    else:
        data |= {"source": "stdlib", "vocab_size": 4096, "seq_len": 256}
    return {
        "model": TINY if quick else {"preset": "quickstart"},
        "data": data,
        # The same at every step, whatever the length of the run.
        "optim": {"lr": 3e-3, "schedule": "constant", "warmup_steps": 10},
        "trainer": {"steps": steps, "save_seconds": None},
    }


def commit_seed() -> int:
    """Of the commit, so that it is in no file."""
    text = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return zlib.crc32(text.stdout.encode()) % 2**31


def environment(quick: bool) -> dict[str, str]:
    """Of the workers."""
    cache = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", ROOT / "runs" / "failover-xla"))
    own = {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        "JAX_PLATFORMS": "cpu",
        # Programs of smaller worlds are compiled once, not by every process that comes back.
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "MPLBACKEND": "Agg",
    }
    if quick:
        own["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    return {**os.environ, **own}


def expected_tokens(content: dict[str, Any]) -> list[int]:
    """Scored tokens of every batch of the run, from the corpus itself; also leaves the tokenizer in the cache."""
    from jaxllm.cli.train_run import build
    from jaxllm.data.loader import Loader
    from jaxllm.data.prepare import prepare_data

    run = build(content)
    data = prepare_data(run.data.source, vocab_size=run.data.vocab_size)
    loader = Loader(data.train, run.data.batch_size, run.data.seq_len, seed=run.data.seed)
    rows = range(run.data.batch_size)
    return [int((loader.rows_at(step, rows).loss_mask > 0).sum()) for step in range(run.trainer.steps or 0)]


def begin(kind: str, work: Path, content: dict[str, Any], options: argparse.Namespace) -> Run:
    """One of the three runs, started."""
    folder = work / kind
    folder.mkdir(parents=True)
    more = {"save_every": options.save_every} if kind == "restart" else {}
    file = folder / "given.yaml"
    file.write_text(yaml.safe_dump({**content, "trainer": {**content["trainer"], **more}}), encoding="utf-8")
    launch = [sys.executable, "-m", "jaxllm.cli.main", "launch", "--workers", str(WORKERS)]
    launch += ["--max-restarts", "1000", "--heartbeat", str(options.heartbeat), "--folder", str(folder)]
    launch += ["--collective-timeout", str(options.collective_timeout)]
    command = [*launch, "--", "jaxllm", "train", str(file), "--out", str(folder), "--failover", "mecefo"]
    run = Run(folder, command, environment(options.quick), WORKERS)
    run.start()
    return run


def outcome(run: Run, expected: Sequence[int], batch: int) -> dict[str, Any]:
    """What is reported of every run."""
    metrics = account.read(run.folder / "metrics.jsonl")
    begun = account.ledgers(run.folder, WORKERS)
    figures = json.loads((run.folder / "figures.json").read_text())["figures"]
    return {
        "seconds": account.span(begun),
        "validation_loss": figures["validation_loss"],
        "tokens": account.tokens(metrics, expected),
        "samples": account.samples(begun, len(expected), batch),
        "loss": [[row["step"], row["loss"]] for row in metrics if row["kind"] == "train"],
        "begun": account.progress(begun),
        "first": min(rows[0]["time"] for rows in begun.values()),
    }


def verdicts(runs: dict[str, Any], failures: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """Which of the properties hold."""
    mecefo = runs["mecefo"]
    samples, tokens = mecefo["samples"], mecefo["tokens"]
    found = {
        "every sample once": not (samples["lost"] or samples["twice"] or samples["other_updates"]),
        "tokens of every batch": not (tokens["repeated"] or tokens["different"]) and tokens["sum"],
        "no checkpoint to read": all(each["checkpoints"] == 0 for each in failures),
        "every failure noticed": all(each["detection"] is not None for each in failures),
        "everybody taken back": all(each["readmission"] is not None for each in failures),
        "survivors' processes kept": all(each["kept"] for each in failures),
        "steps before re-admission": any(each["survivor_steps"] > 0 for each in failures),
    }
    if "undisturbed" in runs:
        whole = runs["undisturbed"]["validation_loss"]
        mecefo["loss_difference"] = mecefo["validation_loss"] / whole - 1
        found["loss within 1 %"] = abs(mecefo["loss_difference"]) <= TOLERANCE
        for name in runs:
            runs[name]["lost_seconds"] = runs[name]["seconds"] - runs["undisturbed"]["seconds"]
    if "undisturbed" in runs and "restart" in runs:
        found["less wall time lost than by restarts"] = (
            mecefo["lost_seconds"] < runs["restart"]["lost_seconds"]
        )
    return found


def main(argv: list[str] | None = None) -> int:
    """Run, write, print and draw; the exit code is 1 where a property does not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model; no result file but --out")
    parser.add_argument("--failures", type=int, default=5, help="workers to lose, at least 2")
    parser.add_argument("--seed", type=int, help="of the failures; the commit's unless given")
    parser.add_argument("--steps", type=int, help="of each run; enough for the failures unless given")
    parser.add_argument("--heartbeat", type=float, default=10.0, help="seconds of silence that are a hang")
    parser.add_argument("--collective-timeout", type=int, default=60, help="seconds, as of jaxllm launch")
    parser.add_argument("--save-every", type=int, default=20, help="steps between checkpoints, with restarts")
    parser.add_argument(
        "--only", nargs="+", choices=KINDS, default=KINDS, help="leave out runs; mecefo stays"
    )
    parser.add_argument("--work", type=Path, help="folder of the runs, which must not exist")
    parser.add_argument("--out", type=Path, help="the result file")
    options = parser.parse_args(argv)
    seed = commit_seed() if options.seed is None else options.seed
    steps = options.steps or 60 * options.failures
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    work = options.work or ROOT / "runs" / f"failover-{stamp}"
    out = options.out or (ROOT / "runs" / OUT.name if options.quick else OUT)
    print(f"seed {seed}, runs in {work}", flush=True)
    events = draw(options.failures, WORKERS, seed)
    content = config(options.quick, steps)
    expected = expected_tokens(content)
    batch = content["data"]["batch_size"]
    load = [os.getloadavg()[0]]
    runs: dict[str, Any] = {}
    happened: list[dict[str, Any]] = []
    for kind in KINDS:
        if kind not in options.only and kind != "mecefo":
            continue
        clock = time.monotonic()
        run = begin(kind, work, content, options)
        try:
            if kind == "mecefo":
                happened = disturb(run, events, print)
            restarts = restart(run, happened, options.heartbeat, print) if kind == "restart" else None
            run.finish()
        finally:
            run.end()
        runs[kind] = outcome(run, expected, batch) | {"wall_seconds": time.monotonic() - clock}
        if restarts is not None:
            runs[kind]["restarts"] = restarts
            # Its worlds are counted anew by every supervisor, so that they do not tell which steps were given up.
            del runs[kind]["samples"]
        load.append(os.getloadavg()[0])
    folder = work / "mecefo"
    journal, begun = account.read(folder / "membership.jsonl"), account.ledgers(folder, WORKERS)
    failures = [
        each | account.failure(each["worker"], each["time"], journal, begun, WORKERS) for each in happened
    ]
    held = verdicts(runs, failures)
    if {"undisturbed", "restart"} <= set(runs):
        runs["restart"] |= account.break_even(runs, steps)
    report = {
        "command": "python -m experiments.failover" + " --quick" * options.quick,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "inputs": {
            "workers": WORKERS,
            "failures": options.failures,
            "steps": steps,
            "heartbeat": options.heartbeat,
            "collective_timeout": options.collective_timeout,
            "save_every": options.save_every,
            **content,
        },
        "machine": machine.describe(),
        "device": machine.devices(),
        "versions": machine.versions(),
        # Of one minute, before and after each run: of an idle machine about the runs' own processes.
        "load": {"average": load, "cores": machine.cores()},
        "failures": failures,
        # Of workers that nobody touched: a machine so loaded that they seem to hang, or a fault.
        "other_losses": account.others(journal, failures),
        "runs": runs,
        "held": held,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(report)
    picture(out.with_suffix(".png"), report)
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
