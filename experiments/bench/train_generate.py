"""jaxllm against transformers and jax-linear-attention: training, prefill and decode on the same cores.

    python experiments/bench/train_generate.py            # two cores: about an hour, torch.compile most of it
    python experiments/bench/train_generate.py --quick    # half a minute: a tiny model, to see that it runs

Expected on two cores: training 2x transformers in float32 and 3x in the best precision that leaves the loss unharmed,
prefill 3x, decode 8x on the quickstart model and 70 % of the weight-stream bound on the wide one, decode 2x
jax-linear-attention. Rows where we lose are printed and published like the others.

Every contender is a process of its own; they take turns, so that a busy machine is busy for all of them. transformers
runs eager, compiled and with a static cache, in float32 and bfloat16, and its best counts. A figure counts only if
logits, first losses or tokens agree with jaxllm's in float32; jax-linear-attention has weights of its own, so only its
parameter count is checked. Needs jaxllm, and for the peers ``pip install jaxllm[oracle]`` and, in a Python 3.12,
``pip install jax-linear-attention`` (``--jla-python``). It takes up where it stopped; a change of code, versions or
settings starts afresh, as does ``--fresh``.
"""

import argparse
import datetime
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

sys.path.insert(0, str(Path(__file__).parent))
import _startup
from _contest import Contest, Settings
from _figures import compare
from _report import draw, print_report
from _tasks import (
    JAXLLM,
    JLA,
    MACHINE,
    QUICK,
    QUICK_TASKS,
    TASKS,
    TRANSFORMERS,
    Contender,
    Task,
    model_config,
)

ROOT = Path(__file__).parents[2]
NEEDED = {"transformers": ("transformers", "torch"), "jla": ("jla",)}


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model, few rounds, transformers eager only"
    )
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--only", default="", metavar="REGEX", help="rows whose 'model task' matches")
    parser.add_argument("--contenders", default="", metavar="REGEX", help="contenders whose name matches")
    parser.add_argument("--rounds", type=int, help="turns of each contender per row (5; --quick 2)")
    parser.add_argument("--threads", type=int, default=_cores(), help="cores for each contender")
    parser.add_argument("--patience", type=float, default=600, help="most seconds of one compilation or turn")
    parser.add_argument(
        "--torch-python", default=sys.executable, help="interpreter that has transformers and torch"
    )
    parser.add_argument(
        "--jla-python", default="python3.12", help="interpreter that has jax-linear-attention"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "experiments" / "results" / "train_generate.json")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "bench" / "train_generate")
    return parser.parse_args(argv)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def missing_peers(pythons: dict[str, str]) -> dict[str, str]:
    """Library to the reason why it cannot be measured."""
    missing = {}
    for library, modules in NEEDED.items():
        if shutil.which(pythons[library]) is None:
            missing[library] = f"there is no interpreter {pythons[library]!r}"
            continue
        probe = f"import importlib.util as u; print([m for m in {modules!r} if u.find_spec(m) is None])"
        done = subprocess.run([pythons[library], "-c", probe], capture_output=True, text=True)
        if done.returncode or done.stdout.strip() != "[]":
            missing[library] = f"its interpreter lacks {' or '.join(modules)}"
    return missing


def device() -> dict[str, Any]:
    """What ran it, without names of hosts."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = re.findall(r"model name\s*: (.*)", info.read_text())
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def fingerprint(inputs: dict[str, Any]) -> str:
    """Changes with the inputs, our code and this experiment's."""
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode())
    files = [Path(__file__), *sorted(Path(__file__).parent.glob("_*.py"))]
    for package in ("jaxllm", "pallas_kernels"):
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None
        files += sorted(Path(spec.origin).parent.rglob("*.py"))
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


class Record:
    """Rows on disk, so that a run that was stopped goes on."""

    def __init__(self, file: Path, mark: str, fresh: bool):
        self.file = file
        self.data: dict[str, Any] = {"mark": mark, "rows": {}, "startup": None, "versions": {}}
        if file.exists() and not fresh:
            found = json.loads(file.read_text(encoding="utf-8"))
            if found.get("mark") == mark:
                self.data = found

    def save(self) -> None:
        """Write, whole or not at all."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1), encoding="utf-8")
        os.replace(part, self.file)


def measure(
    plan: list[tuple[str, Task]],
    contenders: list[Contender],
    settings: Settings,
    record: Record,
    console: Console,
) -> None:
    """Fill ``record`` with the rows of ``plan`` that it does not have."""
    rows = record.data["rows"]
    columns = (BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(plan))
        for model in dict.fromkeys(model for model, _ in plan):
            todo = [task for name, task in plan if name == model and f"{model} {task.name}" not in rows]
            progress.advance(bar, sum(name == model for name, _ in plan) - len(todo))
            if not todo:
                continue
            contest = Contest(model, model_config(model).to_dict(), contenders, settings)
            try:
                for task in todo:
                    contest.keep(task.kind)
                    row = contest.row(task, lambda text: progress.update(bar, description=text))
                    rows[f"{model} {task.name}"] = row
                    record.data["versions"] |= contest.versions
                    record.save()
                    progress.advance(bar)
            finally:
                contest.keep(None)


def main(argv: list[str] | None = None) -> int:
    """Measure, write, draw, print."""
    args, console = options(argv), Console()
    if not console.is_terminal:
        console = Console(width=170)
    pythons = {name: sys.executable for name in ("jaxllm", "machine")}
    pythons |= {"transformers": args.torch_python, "jla": args.jla_python}
    missing = missing_peers(pythons)
    models, tasks = (("tiny",), QUICK_TASKS) if args.quick else (("quickstart", "wide"), TASKS)
    field = QUICK if args.quick else (*JAXLLM, *TRANSFORMERS, *JLA, *MACHINE)
    field = [c for c in field if c.library not in missing]
    # jaxllm in float32 is what everybody is compared with.
    field = [c for c in field if c == JAXLLM[0] or re.search(args.contenders, c.name)]
    plan = [(m, t) for m in models for t in tasks if re.search(args.only, f"{m} {t.name}")]
    if not plan:
        console.print(
            f"--only {args.only!r}: no row has such a name; rows are {', '.join(t.name for t in tasks)}"
        )
        return 2
    rounds = args.rounds or (2 if args.quick else 5)
    inputs = {
        "threads": args.threads,
        "rounds": rounds,
        "quick": args.quick,
        "contenders": [c.name for c in field],
        "models": {m: model_config(m).to_dict() for m in models},
    }
    runs = args.runs / ("quick" if args.quick else "full")
    settings = Settings(pythons, args.threads, rounds, 0.1 if args.quick else 0.5, args.patience, runs)
    record = Record(runs / "rows.json", fingerprint(inputs), args.fresh)
    measure(plan, field, settings, record, console)
    if not record.data["startup"] and not args.only:
        with console.status("start-up"):
            record.data["startup"] = _startup.measure(
                models[0], pythons, args.threads, runs, 1 if args.quick else 3
            )
            record.save()
    rows = [
        record.data["rows"][key]
        for m in models
        for t in tasks
        if (key := f"{m} {t.name}") in record.data["rows"]
    ]
    result = {
        "command": "python experiments/bench/train_generate.py"
        + (" --quick" if args.quick else "")
        + (f" --rounds {args.rounds}" if args.rounds else "")
        + (f" --contenders '{args.contenders}'" if args.contenders else ""),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "inputs": inputs,
        "device": device(),
        "versions": record.data["versions"],
        "missing": missing,
        "comparisons": compare(rows),
        "startup": record.data["startup"],
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    drawn = draw(args.out.with_suffix(".png"), result)
    print_report(console, result)
    console.print(f"written: {args.out.name}" + (f", {args.out.with_suffix('.png').name}" if drawn else ""))
    return 0 if all("tokens_per_second" in row["contenders"]["jaxllm fp32"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
