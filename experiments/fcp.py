"""FCP against other context parallelism on 8 to 1,024 simulated GPUs, beside what its paper (arXiv 2605.08524) measured.

Command:  python -m experiments.fcp [--quick] [--out FILE]
Time:     a few minutes on two idle cores; --quick half a minute. It takes up where it stopped (runs/fcp).
Expected: attention MFU of FCP near 0.75 from 64 to 1,024 GPUs on log-normal lengths, forward and backward, 1.2 to 2.4 times
          the best of the rings and of per-document placement; Ulysses is faster where it has heads enough; groups that may
          also share heads come within a few per cent, MagiAttention up to some hundred GPUs. With room for few foreign
          blocks FCP loses its lead.

Nothing runs on a GPU here. The constants are those of parallel/context/costs.py, one set for every figure; the work and
the transfers of FCP, rings and per-document placement are those of real plans. 32,768 tokens a GPU, forward pass, and
forward with backward. A figure of the paper counts as reproduced within 10 %; the others are printed with their difference.
"""

import argparse
import datetime
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from experiments._fcp_report import draw, show
from experiments._fcp_stacks import STACKS, stack_of, stack_results
from experiments._fcp_summary import summary
from jaxllm.cli import machine
from parallel.context import DISTRIBUTIONS, STRATEGIES, draw_lengths
from parallel.context.costs import PASSES, AttentionShape, Costs
from parallel.context.simulate import ABLATION, KINDS, Passes, System, plan_for, simulate, simulate_plan

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
EACH = 32_768
SHOWN: tuple[Passes, ...] = ("forward", "both")
ROOMS = (8, 16, 32, 64, 128, 256, math.inf)
# Changes where old records no longer fit what is simulated.
_RECIPE = 3

Key = tuple[str | int | float, ...]
Case = tuple[Key, Callable[[], dict[str, Any]]]


def lengths_of(name: str, tokens: int, seed: int) -> np.ndarray:
    """Documents of a published distribution, or of one made from it for one longest document.

    ``log-normal to L`` is the log-normal one with another cut, ``all of L`` has documents of one length.
    """
    if name in DISTRIBUTIONS:
        return draw_lengths(name, tokens, seed)
    kind, _, limit = name.rpartition(" ")
    longest = int(limit)
    if kind == "all of":
        drawn = np.full(-(-tokens // longest), longest)
    else:
        rng = np.random.default_rng(seed)
        drawn = np.clip(rng.lognormal(np.log(8192), 1.8, 64 + tokens // 2048), 64, longest).astype(np.int64)
    ends = np.cumsum(drawn)
    last = int(np.searchsorted(ends, tokens))
    kept = drawn[: last + 1].copy()
    kept[-1] -= ends[last] - tokens
    return kept


def every_kind(
    lengths: np.ndarray, workers: int, costs: Costs, passes: tuple[Passes, ...]
) -> dict[str, dict[str, Any]]:
    """Results of every kind that is possible on so many workers, by passes."""
    found: dict[str, dict[str, Any]] = {each: {} for each in passes}
    for kind in KINDS:
        if kind == "ulysses" and AttentionShape().heads % workers:
            continue
        plan = plan_for(lengths, workers, kind, costs) if kind in STRATEGIES else None
        for each in passes:
            if plan is None:
                result = simulate(lengths, workers, kind, costs=costs, passes=each)
            else:
                result = simulate_plan(plan, kind, costs=costs, passes=each)
            found[each][kind] = asdict(result)
    return found


def varied(costs: Costs) -> Iterator[tuple[str, float, Costs]]:
    """Each constant 30 % lower and higher; shares end at 1."""
    for each in fields(costs):
        value = getattr(costs, each.name)
        if each.name in ("node", "room", "memory"):
            continue
        for factor in (0.7, 1.3):
            changed = value * factor
            if each.name == "kernel_best":
                changed = min(changed, 1.0)
            yield each.name, factor, replace(costs, **{each.name: changed})


def cases(quick: bool, costs: Costs) -> Iterator[Case]:
    """Everything that is simulated: a key and what makes its record."""
    sizes = (8, 16, 32, 64) if quick else (8, 16, 32, 64, 128, 256, 512, 1024)
    seeds = range(1 if quick else 3)
    # The paper's ablation is at 128.
    middle, large = 128, 64 if quick else 256

    def drawn(name: str, workers: int, seed: int) -> np.ndarray:
        return lengths_of(name, workers * EACH, seed)

    for name in DISTRIBUTIONS:
        for workers in sizes:
            for seed in seeds:
                yield (
                    ("scale", name, workers, seed),
                    lambda n=name, w=workers, s=seed: every_kind(drawn(n, w, s), w, costs, SHOWN),
                )
    for longest in (131_072, 262_144, 524_288, 1_048_576):
        for name in (f"log-normal to {longest}", f"all of {longest}"):
            for seed in seeds if name.startswith("log") else range(1):
                yield (
                    ("context", name, large, seed),
                    lambda n=name, s=seed: every_kind(drawn(n, large, s), large, costs, ("forward",)),
                )
    for kind in ("fcp", "fcp-pairs"):
        for seed in seeds:
            yield ("ablation", kind, middle, seed), lambda k=kind, s=seed: ablation(k, middle, s, costs)
    for seed in seeds:
        yield ("room", "log-normal", large, seed), lambda s=seed: rooms(large, s, costs)
    for seed in seeds:
        yield ("gradients", "log-normal", large, seed), lambda s=seed: gradients(large, s, costs)
    for name, factor, other in varied(costs):
        for seed in seeds:
            yield (
                ("sensitivity", name, factor, large, seed),
                lambda o=other, s=seed: every_kind(drawn("log-normal", large, s), large, o, ("forward",)),
            )
    for label, preset in STACKS.items():
        for workers in sizes[::2] if quick else (8, 32, 64, 256, 1024):
            for seed in seeds:
                yield (
                    ("stack", label, workers, seed),
                    lambda p=preset, w=workers, s=seed: stack_results(
                        stack_of(p), drawn("log-normal", w, s), w, costs, SHOWN
                    ),
                )


def ablation(kind: str, workers: int, seed: int, costs: Costs) -> dict[str, Any]:
    """The same plan with more and more of FCP switched on, by passes."""
    plan = plan_for(lengths_of("log-normal", workers * EACH, seed), workers, kind, costs)
    return {
        each: {
            name: asdict(simulate_plan(plan, kind, costs=costs, system=system, passes=each))
            for name, system in ABLATION.items()
        }
        for each in PASSES
    }


def gradients(workers: int, seed: int, costs: Costs) -> dict[str, Any]:
    """The same plan's backward pass with other choices of what travels and how."""
    plan = plan_for(lengths_of("log-normal", workers * EACH, seed), workers, "fcp", costs)
    short, long = AttentionShape(), AttentionShape(gradient_bytes=4)
    choices = {
        "keys fetched again, gradients of 2 bytes": (short, System()),
        "gradients of 4 bytes": (long, System()),
        "keys kept": (short, System(kept=True)),
        "keys kept, gradients of 4 bytes": (long, System(kept=True)),
        "keys and gradients in one queue": (short, System(apart=False)),
    }
    return {
        "backward": {
            name: asdict(simulate_plan(plan, "fcp", shape, costs, system, "backward"))
            for name, (shape, system) in choices.items()
        }
    }


def rooms(workers: int, seed: int, costs: Costs) -> dict[str, Any]:
    """The same plan where a worker can hold so many blocks of others at once."""
    plan = plan_for(lengths_of("log-normal", workers * EACH, seed), workers, "fcp", costs)
    found = {
        str(room): asdict(
            simulate_plan(plan, "fcp", costs=replace(costs, room=float(room * plan.capacity.block)))
        )
        for room in ROOMS
    }
    return {"forward": found}


def collect(file: Path, quick: bool, costs: Costs) -> list[dict[str, Any]]:
    """All records; what ``file`` lacks is simulated and added to it line by line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    # The last line of a run that was killed may be half a line.
    records = {tuple(r["key"]): r for r in (json.loads(line) for line in lines if line.endswith("}"))}
    todo = list(cases(quick, costs))
    with Progress() as progress, file.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(record) + "\n" for record in records.values())
        for key, make in progress.track(todo, description="simulating"):
            if key not in records:
                records[key] = {"key": list(key), "found": make()}
                out.write(json.dumps(records[key]) + "\n")
                out.flush()
    return [records[key] for key, _ in todo]


def main(argv: list[str] | None = None) -> int:
    """Simulate what is missing, write, print and draw; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few sizes; no result file but --out")
    parser.add_argument("--runs", type=Path, help="where finished cases are kept (runs/fcp)")
    parser.add_argument("--out", type=Path, help="the result file (experiments/results/fcp.json)")
    options = parser.parse_args(argv)
    costs = Costs()
    runs = options.runs or ROOT / "runs" / ("fcp_quick" if options.quick else "fcp")
    out = options.out or (runs if options.quick else RESULTS) / "fcp.json"
    mark = hashlib.sha256(f"{_RECIPE} {costs}".encode()).hexdigest()[:8]
    records = collect(runs / f"records-{mark}.jsonl", options.quick, costs)
    report = {
        "command": "python -m experiments.fcp",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "inputs": {"tokens_per_gpu": EACH, "shape": AttentionShape()._asdict(), "passes": list(SHOWN)},
        "constants": {k: str(v) if v == math.inf else v for k, v in asdict(costs).items()},
        "versions": machine.versions(),
        **summary(records),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(_rounded(report), indent=1) + "\n", encoding="utf-8")
    show(report)
    draw(out.with_suffix(".png"), report)
    return 0


def _rounded(value: Any) -> Any:
    """``value`` with floats of five digits."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
