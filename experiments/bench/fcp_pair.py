"""A step of FCP against rings on two processes of one core each: ratios predicted by the simulator, then measured.

Command:  python -m experiments.bench.fcp_pair [--quick] [--out FILE]
Time:     about five minutes on two idle cores; --quick takes half a minute.
Expected: of each batch, time of ring and of zigzag over that of FCP within 15 % of the prediction.

Two processes, each pinned to its core, meet over gloo on loopback. First they time square kernels, to which the
simulator's curve is fitted, and permutations between them. From these constants the simulator predicts the steps, which
is written down before any step is compiled. A step is forward and backward of attention over a packed batch of
long-tailed documents; strategies take turns. Gradients are checked against those that one process computes alone.
"""

import argparse
import datetime
import json
import os
import socket
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench._fcp_cpu import Kernel, fitted, square
from experiments.bench._fcp_pair import (
    TILE,
    WORKERS,
    Machine,
    Phase,
    fitted_transfers,
    long_last,
    pair_plan,
    predict,
    shrunk,
    spread,
    step_bytes,
    told,
    verdict,
)
from experiments.bench._protocol import Worker, environment
from jaxllm.cli import machine
from parallel.context.costs import PASSES, AttentionShape

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
# FCP first: the others are measured by it.
KINDS = ("fcp", "fcp-pairs", "ring", "zigzag")
# Gradients and losses of strategies against those of one process.
AGREE = 1e-5
# That a process may take for one request.
SECONDS = 300.0


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    block: int
    squares: tuple[int, ...]
    messages: tuple[int, ...]
    rounds: int
    drawn: tuple[tuple[str, int], ...]
    kinds: tuple[str, ...] = KINDS
    shape: AttentionShape = field(default_factory=lambda: AttentionShape(2, 1, 64, 4, 4))

    @property
    def batches(self) -> dict[str, np.ndarray]:
        """Documents of sixteen blocks together."""
        tokens = 16 * self.block
        drawn = {f"{name}, seed {seed}": shrunk(name, tokens, seed) for name, seed in self.drawn}
        return {"long last": long_last(tokens, self.block // 4)} | drawn


FULL = Size(
    1024,
    (512, 2048, 8192),
    (2**16, 2**20, 2**22, 2**24),
    7,
    (("log-normal", 0), ("log-normal", 1), ("log-normal", 2), ("magiattention", 0)),
)
QUICK = Size(512, (256, 512, 1024), (2**16, 2**20, 2**22), 2, (), KINDS[::2])


class Two:
    """Both processes; what one of them is asked the other is asked too, unless it is ``only``."""

    def __init__(self, stack: ExitStack, folder: Path):
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < WORKERS:
            raise SystemExit(f"{len(cores)} core: must be {WORKERS} that this process may use")
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "experiments.bench._worker_pair"]
        self._workers = []
        for rank in range(WORKERS):
            variables = {
                "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
                "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip(),
                "FCP_PAIR_CORE": str(cores[rank]),
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(WORKERS),
                "JAX_PROCESS_ID": str(rank),
            }
            worker = Worker(command, environment(1, folder / "cache") | variables, folder / f"{rank}.log")
            self._workers.append(stack.enter_context(closing(worker)))

    def ask(self, op: str, only: int | None = None, **arguments: Any) -> list[Any]:
        """The answers, in the order of the processes."""
        workers = self._workers if only is None else [self._workers[only]]
        with ThreadPoolExecutor(len(workers)) as pool:
            return list(pool.map(lambda worker: worker.call(op, SECONDS, **arguments), workers))


def calibrate(two: Two, size: Size, repeats: int) -> tuple[Machine, dict[str, Any]]:
    """The constants, and what was measured for them."""
    tile = (*TILE, TILE[0] * TILE[1])
    several: Kernel = (8 * tile[0], 2 * tile[1], 16 * tile[2])
    kernels = [several, *map(square, size.squares)]
    phases, raw = {}, {}
    for name in PASSES:
        wanted = {"phase": name, "sizes": kernels, "repeats": repeats}
        each = [two.ask("kernels", only=rank, together=False, **wanted)[0] for rank in range(WORKERS)]
        crowded = two.ask("kernels", together=True, **wanted)
        alone = [statistics.fmean(map(statistics.median, times)) for times in zip(*each)]
        beside = [statistics.fmean(map(statistics.median, times)) for times in zip(*crowded)]
        seconds = dict(zip(kernels, alone))
        curve = fitted({n: seconds[square(n)] for n in size.squares}, size.shape, name)
        slower = statistics.median(b / a for a, b in zip(alone, beside))
        phases[name] = Phase(curve, seconds[several] / 16, slower)
        raw[name] = [
            {"queries": q, "keys": k, "pairs": n, "alone": a, "beside": b}
            for (q, k, n), a, b in zip(kernels, alone, beside)
        ]
    moved = two.ask("transfers", sizes=size.messages, repeats=3 * repeats)
    # Others on the machine only ever delay one.
    times = {one["bytes"]: min(one["seconds"]) for one in moved[0]}
    raw["transfers"] = [
        {"bytes": one["bytes"], "seconds": times[one["bytes"]], "cpu_seconds": one["cpu_seconds"]}
        for one in moved[0]
    ]
    return Machine(phases["forward"], phases["backward"], *fitted_transfers(times)), raw


def predictions(size: Size, found: Machine) -> dict[str, Any]:
    """Of every batch: its documents, what each strategy should take and send, and ratios."""
    made = {}
    for name, lengths in size.batches.items():
        plans = {kind: pair_plan(lengths, size.block, kind) for kind in size.kinds}
        steps = {kind: predict(plan, kind, found, size.shape) for kind, plan in plans.items()}
        ratio = lambda kind, by, steps=steps: steps[kind][by] / steps["fcp"][by]  # noqa: E731
        made[name] = {
            "documents": lengths.tolist(),
            "steps": {
                kind: {"predicted": steps[kind], "bytes": step_bytes(plan, size.shape)}
                for kind, plan in plans.items()
            },
            "over_fcp": {
                kind: {"predicted": ratio(kind, "simulator"), "by_tiles": ratio(kind, "tiles")}
                for kind in size.kinds[1:]
            },
        }
    return made


def measure(two: Two, size: Size, batch: dict[str, Any]) -> None:
    """Check and time a batch's strategies, and add what was found to what was predicted.

    Raises:
        SystemExit: what a strategy computes or sends is not what it should.
    """
    loss = two.ask("alone", lengths=batch["documents"])[0]
    for kind, step in batch["steps"].items():
        halves = two.ask("prepare", name=kind, kind=kind, block=size.block)
        step["loss_error"] = abs(sum(half["loss"] for half in halves) / loss - 1)
        step["gradient_error"] = max(error for half in halves for error in half["errors"])
        sent = {half["bytes"].get("collective-permute", 0) for half in halves}
        if max(step["loss_error"], step["gradient_error"]) > AGREE:
            raise SystemExit(
                f"{kind}: loss off by {step['loss_error']:.1e}, gradients by {step['gradient_error']:.1e}"
            )
        if sent != {step["bytes"]} or any(set(half["bytes"]) - {"collective-permute"} for half in halves):
            raise SystemExit(f"{kind}: sends {[half['bytes'] for half in halves]}, not {step['bytes']} bytes")
    taken = two.ask("race", names=list(batch["steps"]), rounds=size.rounds)
    # A step is done when both are.
    seconds = {kind: np.max([half[kind]["seconds"] for half in taken], 0) for kind in batch["steps"]}
    for kind, step in batch["steps"].items():
        step["measured"] = spread(seconds[kind])
        step["cpu_seconds"] = [statistics.median(half[kind]["cpu_seconds"]) for half in taken]
    for kind, ratio in batch["over_fcp"].items():
        ratio["measured"] = spread(seconds[kind] / seconds["fcp"])
        ratio |= verdict(ratio["predicted"], ratio["measured"]["median"])
        ratio["tiles_error"] = ratio["by_tiles"] / ratio["measured"]["median"] - 1


def now() -> str:
    """Of the machine's clock, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def main(argv: list[str] | None = None) -> int:
    """Calibrate, predict, write, measure, write; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="small, to see that it runs; no result file but --out"
    )
    parser.add_argument("--out", type=Path, help="the result file (experiments/results/fcp_pair.json)")
    options = parser.parse_args(argv)
    size, repeats = (QUICK, 3) if options.quick else (FULL, 7)
    folder = ROOT / "runs" / "fcp_pair"
    out = options.out or (folder if options.quick else RESULTS) / "fcp_pair.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write = lambda report: out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")  # noqa: E731
    with ExitStack() as stack:
        two = Two(stack, folder)
        two.ask("join", shape=size.shape._asdict())
        found, raw = calibrate(two, size, repeats)
        report: dict[str, Any] = {
            "command": "python -m experiments.bench.fcp_pair" + (" --quick" if options.quick else ""),
            "inputs": {
                "workers": WORKERS,
                "block": size.block,
                "shape": size.shape._asdict(),
                "rounds": size.rounds,
                "tile": TILE,
            },
            "versions": machine.versions(),
            "device": machine.describe(),
            "machine": told(found),
            "measured_for_it": raw,
            "batches": predictions(size, found),
            "predicted_at": now(),
        }
        # Before any step is compiled.
        write(report)
        for name, batch in report["batches"].items():
            measure(two, size, batch)
            for kind, ratio in batch["over_fcp"].items():
                low, middle, high = (ratio["measured"][key] for key in ("low", "median", "high"))
                print(
                    f"{name}: {kind} {ratio['predicted']:.2f} times FCP predicted, {middle:.2f} measured "
                    f"({low:.2f} to {high:.2f}): {ratio['verdict']}; by tiles {ratio['by_tiles']:.2f}",
                    flush=True,
                )
        report["measured_at"] = now()
        write(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
