"""The computing part of the FCP simulation against this CPU: predicted and measured times of the workers of real plans.

Command:  python -m experiments.bench.fcp_compute [--quick] [--out FILE]
Time:     about a minute on two idle cores, most of it compiling.
Expected: ratios of the slowest workers of different kinds of context parallelism within 15 % of the prediction.

Three square chunks give the two constants of the kernel's curve on this CPU. From these the simulator's rules predict the
time of every other kernel and of whole workers, which are written down before they are timed. A worker's kernels run one
after the other, as many queries against as many keys as its plan says.
"""

import argparse
import datetime
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench._fcp_cpu import Kernel, fitted, forward, predicted, square, turn_by_turn
from jaxllm.cli import machine
from parallel.context import Plan, PlanConfig, make_plan
from parallel.context.costs import AttentionShape

RESULTS = Path(__file__).parents[1] / "results"
SHAPE = AttentionShape(heads=8, kv_heads=2, head_dim=64, bytes=4)
WORKERS, BLOCK = 8, 256
# Blocks of each document: a long one among short ones.
DOCUMENTS = (16, 6, 4, 2, 1, 1, 1, 1)
CALIBRATED, OTHERS = (256, 1024, 4096), ((512, 512), (2048, 2048), (256, 2048), (512, 4096))
KINDS = ("fcp", "ring", "zigzag", "document")


def kernels(plan: Plan, kind: str) -> list[list[Kernel]]:
    """What each worker runs: of every chunk of queries one kernel for each step that brings keys."""
    blocks, owner = plan.blocks, plan.placement.worker
    begins = (np.diff(owner, prepend=-1) != 0) | (blocks.index == 0)
    chunk = np.arange(len(blocks)) if kind == "fcp" else np.cumsum(begins) - 1
    stage = dict(
        zip(
            zip(plan.moves.receiver.tolist(), plan.moves.block.tolist()),
            (plan.rounds // plan.capacity.stage_rounds).tolist(),
        )
    )
    found: dict[tuple[int, int, int], tuple[set[int], set[int], int]] = {}
    for query in range(len(blocks)):
        worker = int(owner[query])
        for key in range(query - int(blocks.index[query]), query + 1):
            step = -1
            if owner[key] != worker:
                step = (
                    (worker - int(owner[key])) % WORKERS if kind in ("ring", "zigzag") else stage[worker, key]
                )
            seen = found.setdefault((worker, int(chunk[query]), step), (set(), set(), 0))
            size = int(blocks.length[query])
            pairs = size * (size + 1) // 2 if key == query else size * int(blocks.length[key])
            found[worker, int(chunk[query]), step] = (seen[0] | {query}, seen[1] | {key}, seen[2] + pairs)
    made: list[list[Kernel]] = [[] for _ in range(WORKERS)]
    for (worker, _, _), (queries, keys, pairs) in found.items():
        made[worker].append((len(queries) * plan.blocks.size, len(keys) * plan.blocks.size, pairs))
    return made


def measured(wanted: set[Kernel], repeats: int) -> dict[Kernel, float]:
    """Median seconds of each kernel, all of them turn by turn."""
    times = turn_by_turn({kernel: forward(kernel, SHAPE) for kernel in sorted(wanted)}, repeats)
    return {kernel: statistics.median(each) for kernel, each in times.items()}


def main(argv: list[str] | None = None) -> int:
    """Calibrate, predict, write, measure, write; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="few repeats and two kinds; no result file but --out"
    )
    parser.add_argument("--out", type=Path, help="the result file (experiments/results/fcp_compute.json)")
    options = parser.parse_args(argv)
    root = Path(__file__).parents[2]
    out = options.out or (root / "runs" if options.quick else RESULTS) / "fcp_compute.json"
    kinds, repeats = (KINDS[:2], 1) if options.quick else (KINDS, 5)
    first = measured({square(n) for n in CALIBRATED}, repeats)
    costs = fitted({n: first[square(n)] for n in CALIBRATED}, SHAPE)
    singles = [square(q) if q == k else (q, k, q * k) for q, k in OTHERS]
    lengths = np.array(DOCUMENTS) * BLOCK
    work = {kind: kernels(make_plan(lengths, PlanConfig(WORKERS, BLOCK, kind)), kind) for kind in kinds}
    slowest = {k: max(sum(predicted(x, costs, SHAPE) for x in w) for w in of) for k, of in work.items()}
    report: dict[str, Any] = {
        "command": "python -m experiments.bench.fcp_compute",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "inputs": {"workers": WORKERS, "block": BLOCK, "documents": lengths.tolist()},
        "versions": machine.versions(),
        "device": machine.describe(),
        "curve": {"flops": costs.peak, "tokens": costs.kernel_tokens},
        "kernels": [
            {"queries": q, "keys": k, "predicted": predicted((q, k, n), costs, SHAPE)} for q, k, n in singles
        ],
        "slowest": {kind: {"predicted": seconds} for kind, seconds in slowest.items()},
        "over_fcp": {kind: {"predicted": seconds / slowest["fcp"]} for kind, seconds in slowest.items()},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    # Before anything of it is timed.
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    got = measured({x for of in work.values() for w in of for x in w} | set(singles), repeats)
    took = {kind: max(sum(got[x] for x in w) for w in of) for kind, of in work.items()}
    for line, kernel in zip(report["kernels"], singles):
        line["measured"] = got[kernel]
    for kind, seconds in took.items():
        report["slowest"][kind]["measured"] = seconds
        ratio = report["over_fcp"][kind]
        ratio["measured"] = seconds / took["fcp"]
        ratio["error"] = ratio["predicted"] / ratio["measured"] - 1
        print(f"{kind}: {ratio['predicted']:.2f} times FCP predicted, {ratio['measured']:.2f} measured")
    for line in report["kernels"]:
        print(
            f"{line['queries']} x {line['keys']}: {1e3 * line['predicted']:.2f} ms predicted, {1e3 * line['measured']:.2f} measured"
        )
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
