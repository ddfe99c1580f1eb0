"""What a deep model costs to trace and compile, layer by layer and with repeated groups under lax.scan.

    python -m experiments.bench.compile_time            # the 52-layer preset: about ten minutes on two cores
    python -m experiments.bench.compile_time --quick    # half a minute: a preset of 24 layers, to see that it runs

Expected: tracing and compiling the scanned training step of nemotron-h-8b in well under half the time of the other.

The whole training step (forward, backward, AdamW) is traced, lowered and compiled ahead of time from shapes alone: no
weights exist. Every figure is from a process of its own without a compilation cache. It takes up where it stopped.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parents[1] / "results"
PRESETS = ("nemotron-h-8b",)
QUICK = ("mamba2-130m",)
ROWS, TOKENS = 1, 2048


def measure(name: str, scanned: bool, remat: str) -> dict[str, Any]:
    """Seconds and sizes of one training step, in this process."""
    import jax

    from jaxllm import PackedBatch, preset
    from jaxllm.model.functional import abstract_params
    from jaxllm.model.scan import groups_of
    from jaxllm.train.optim import OptimConfig
    from jaxllm.train.state import master_config, state_of
    from jaxllm.train.step import StepSettings, make_train_step

    cfg = preset(name).replace(scan_layers=scanned)
    optim = OptimConfig(schedule="constant", warmup_steps=0)
    state = jax.eval_shape(lambda p: state_of(p, optim), abstract_params(master_config(cfg)))
    whole = jax.ShapeDtypeStruct((ROWS, TOKENS), "int32")
    batch = PackedBatch(
        tokens=whole,
        segment_ids=whole,
        positions=whole,
        targets=jax.ShapeDtypeStruct((ROWS, TOKENS, 1), "int32"),
        loss_mask=jax.ShapeDtypeStruct((ROWS, TOKENS), "float32"),
    )
    step = make_train_step(cfg, optim, StepSettings(remat=remat))
    begin = time.perf_counter()
    lowered = step.trace(state, batch, None).lower()
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    memory = compiled.memory_analysis()
    return {
        "preset": name,
        "execution": "scan" if scanned else "unrolled",
        "layers": len(cfg.pattern),
        "traced_layers": sum(span.length for span in groups_of(cfg.pattern)) if scanned else len(cfg.pattern),
        "remat": remat,
        "trace_seconds": traced - begin,
        "compile_seconds": done - traced,
        "program_bytes": len(lowered.as_text()),
        "temporary_bytes": None if memory is None else memory.temp_size_in_bytes,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }


def in_a_process(name: str, scanned: bool, remat: str) -> dict[str, Any]:
    """:func:`measure` in a fresh interpreter."""
    argv = [sys.executable, "-m", "experiments.bench.compile_time", "--one", name, str(int(scanned)), remat]
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(
        argv, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a preset of 24 layers; writes nothing")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--remat", default="layer", choices=("none", "layer", "dots"))
    parser.add_argument("--out", type=Path, default=RESULTS / "compile_time.json")
    parser.add_argument("--one", nargs=3, metavar=("PRESET", "SCAN", "REMAT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, scanned, remat = options.one
        print(json.dumps(measure(name, scanned == "1", remat)))
        return
    console = Console()
    rows: list[dict[str, Any]] = []
    if options.out.is_file() and not options.fresh and not options.quick:
        rows = json.loads(options.out.read_text(encoding="utf-8"))["results"]
    known = {(row["preset"], row["execution"], row["remat"]) for row in rows}
    for name in QUICK if options.quick else PRESETS:
        for execution in ("scan", "unrolled"):
            if (name, execution, options.remat) in known:
                continue
            with console.status(f"{name}, {execution}"):
                rows.append(in_a_process(name, execution == "scan", options.remat))
            if not options.quick:
                report = {
                    "command": "python -m experiments.bench.compile_time",
                    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                    "inputs": {"rows": ROWS, "tokens": TOKENS},
                    "python": platform.python_version(),
                    "results": rows,
                }
                options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    table = Table("preset", "execution", "layers traced", "trace s", "compile s", "program MB")
    for row in rows:
        seconds = (f"{row['trace_seconds']:.1f}", f"{row['compile_seconds']:.1f}")
        traced = f"{row['traced_layers']} of {row['layers']}"
        table.add_row(row["preset"], row["execution"], traced, *seconds, f"{row['program_bytes'] / 1e6:.1f}")
    console.print(table)


if __name__ == "__main__":
    main()
