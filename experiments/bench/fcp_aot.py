"""The whole training step over eight H200s compiled without one: memory, collectives, and what runs while they travel.

Command:  python -m experiments.bench.fcp_aot --environments FOLDER [--quick] [--only TEXT] [--keep FOLDER] [--out FILE]
Time:     one to three minutes for each program on two free cores, a quarter of an hour together; --quick, a tiny model,
          two minutes.
Expected: every collective of keys and values begins and ends in two instructions, with attention between them once XLA may
          have more than one in flight; no all-gather brings keys, values or their gradients.

FOLDER holds (or gets) the environments of :mod:`experiments.bench.kernels_aot`. Nothing runs on a GPU: the schedule is
XLA's plan, made without autotuning. ``--only`` compiles programs whose name holds a text and leaves the others in FILE as
they are. ``--keep`` keeps the compiled texts and reads them again where they are there. Exit codes: 0; 77 where nothing
could be compiled.
"""

import argparse
import datetime
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments._fcp_program import KEYS_AND_GRADIENTS, described
from experiments._fcp_step import ANSWER, Case
from experiments.bench.kernels_aot import VERSIONS, Missing, environment

ROOT = Path(__file__).parents[2]
OUT = ROOT / "experiments" / "results" / "fcp_aot.json"
PACKAGES = ("flax", "optax")
# Of an H200, as it is sold.
MEMORY = 141 * 10**9
# XLA's scheduler keeps so many collectives in flight; one unless it is told.
MORE = {"xla_gpu_experimental_parallel_collective_overlap_limit": 16}


def programs(quick: bool) -> list[tuple[str, Case]]:
    """What is compiled, and by which version of JAX: one repeat of Nemotron 3 Nano's letters, unless it says otherwise."""
    first, second = VERSIONS
    # State, gradients and work of one repeat of the model's motif fit GPUs that share nothing but documents.
    whole = Case("fcp, rotations, one repeat", {"context": 8}, pattern="MEMEM*E", options=MORE)
    # Of the exchange alone.
    one = replace(whole, name="fcp, rotations", pattern="*")
    found = [
        (first, whole),
        (first, replace(one, name="fcp, rotations, one in flight", options={})),
        (first, one),
        (first, replace(one, name="fcp, ragged", exchange="ragged")),
        (first, replace(one, name="ring, rotations", strategy="ring")),
        (first, replace(one, name="ulysses", strategy="ulysses")),
        (second, one),
    ]
    if not quick:
        return found
    tiny = {"model": "nemotron-3-tiny", "pattern": "M*E", "tokens": 512, "block": 64, "attention": "xla"}
    return [(first, replace(case, **tiny)) for _, case in found[1:3]]


def compiled(case: Case, file: Path, python: str = sys.executable) -> dict[str, Any]:
    """A case compiled in a process of its own, which may die; its text goes to ``file``.

    Raises:
        RuntimeError: that Python cannot compile for GPUs at all; says why.
    """
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "JAX_ENABLE_COMPILATION_CACHE": "0",
    }
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), str(ROOT), env.get("PYTHONPATH")]))
    command = [python, "-m", "experiments._fcp_step", str(file)]
    done = subprocess.run(command, input=json.dumps(asdict(case)), capture_output=True, text=True, env=env)
    lines = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    if not lines:
        last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        return {"jax": None, "error": f"the compiler died ({done.returncode}): {last[:400]}"}
    answer = json.loads(lines[0].removeprefix(ANSWER))
    if "cannot" in answer:
        raise RuntimeError(answer["cannot"])
    return answer


def row(case: Case, version: str, python: str, keep: Path) -> dict[str, Any]:
    """What came of a program, of a kept text if there is one."""
    made = json.dumps([version, asdict(case) | {"name": ""}], sort_keys=True)
    file = keep / f"{hashlib.sha256(made.encode()).hexdigest()[:16]}.txt"
    told = file.with_suffix(".json")
    if not told.is_file():
        told.write_text(json.dumps(compiled(case, file, python)), encoding="utf-8")
    answer = json.loads(told.read_text(encoding="utf-8"))
    found = {"case": asdict(case), **answer, "jax": version}
    if answer["error"] is not None:
        return found
    memory = answer["memory"]
    memory["device"] = sum(memory.values()) - 2 * memory["alias"]
    memory["share"] = memory["device"] / MEMORY
    return found | described(case, file.read_text(encoding="utf-8"))


def show(rows: list[dict[str, Any]]) -> None:
    """The figures as a table."""
    table = Table(
        "program",
        "jax",
        "letters",
        "GB a GPU",
        "asynchronous",
        "keys travel during attention",
        "received / need",
    )
    for each in rows:
        name = each["case"]["name"], each["jax"], each["case"]["pattern"]
        if each["error"] is not None:
            table.add_row(*name, each["error"][:60])
            continue
        lines = each["collectives"]
        keys = [line for line in lines if line["what"] in KEYS_AND_GRADIENTS]
        share = sum(line["marked_bytes"] for line in keys) / max(sum(line["bytes"] for line in keys), 1)
        runs = [sum(line[key] for line in lines) for key in ("asynchronous", "count")]
        ratio = each["exchange"] and f"{each['exchange']['ratio']:.2f}"
        table.add_row(
            *name, f"{each['memory']['device'] / 1e9:.1f}", "{} of {}".format(*runs), f"{share:.0%}", ratio
        )
    Console(width=150).print(table)


def main(argv: list[str] | None = None) -> int:
    """Compile, read and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--environments", type=Path, required=True, help="where the environments are or go")
    parser.add_argument("--quick", action="store_true", help="a tiny model; no file but --out")
    parser.add_argument("--only", default="", help="programs whose name holds this text")
    parser.add_argument("--keep", type=Path, help="where compiled texts are kept")
    parser.add_argument("--out", type=Path, help="the result file (default: under experiments/results)")
    options = parser.parse_args(argv)
    out = options.out or (None if options.quick else OUT)
    wanted = [each for each in programs(options.quick) if options.only in each[1].name]
    pythons: dict[str, str] = {}
    missing: dict[str, str] = {}
    for version in dict.fromkeys(version for version, _ in wanted):
        try:
            home = options.environments.absolute()
            pythons[version] = str(environment(home, version, VERSIONS[version], PACKAGES))
        except Missing as error:
            missing[version] = str(error)
            print(f"jax {version}: {error}")
    if not pythons:
        return 77
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        keep = options.keep or Path(folder)
        keep.mkdir(parents=True, exist_ok=True)
        for version, case in wanted:
            if version in missing:
                continue
            try:
                rows.append(row(case, version, pythons[version], keep))
            except RuntimeError as error:
                print(error)
                return 77
            show(rows[-1:])
    if out is not None:
        if options.only and out.is_file():
            new = {(each["jax"], each["case"]["name"]) for each in rows}
            old = json.loads(out.read_text(encoding="utf-8"))["results"]
            rows += [each for each in old if (each["jax"], each["case"]["name"]) not in new]
        order = [(version, case.name) for version, case in programs(options.quick)]
        rows.sort(key=lambda each: order.index((each["jax"], each["case"]["name"])))
        written = {
            "command": "python -m experiments.bench.fcp_aot --environments FOLDER",
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "target": "eight H200s of one host, from their description; nothing ran on a GPU",
            "memory_bytes": MEMORY,
            "missing": missing,
            "results": rows,
        }
        out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
