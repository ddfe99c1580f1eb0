"""``python -m pallas_kernels.tune``: the fastest tile sizes of every kernel on this GPU, each right before it is timed.

Writes ``pallas_kernels/tuned/<device>.json``, which the kernels read at trace time. Exit codes: 0 tuned, 2 there is
nothing to tune on this device.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import compat, tiles
from pallas_kernels.cases import Case
from pallas_kernels.target import target
from pallas_kernels.timing import seconds
from pallas_kernels.verify import check, plan


def asked_by(case: Case, implementation: str) -> list[tuple[str, str, Any]]:
    """The configurations (op, key, default) that a case asks for when traced."""
    with tiles.listening() as asked:
        jax.eval_shape(case.call(implementation), case.avals())
    return list({(op, key): (op, key, default) for op, key, default in asked.entries}.values())


def best(case: Case, implementation: str, op: str, key: str, default: Any) -> tuple[Any, dict[str, float]]:
    """The fastest right configuration and the seconds of each that was tried; the default where none is right."""
    arrays = jax.jit(case.inputs)(jax.random.key(0))
    times: dict[Any, float] = {}
    for candidate in dict.fromkeys([default, *default.candidates()]):
        with tiles.using(op, key, candidate):
            fault = check(case, implementation)
            if fault is None:
                times[candidate] = seconds(case.call(implementation), arrays)
                print(f"  {times[candidate] * 1e6:9.1f} us  {candidate}", flush=True)
            else:
                print(f"      refused  {candidate}: {fault}", flush=True)
    winner = min(times, key=lambda candidate: times[candidate], default=default)
    return winner, {str(candidate): time for candidate, time in times.items()}


def write(kind: str, found: dict[tuple[str, str], Any], folder: Path) -> Path:
    """Add configurations by (op, key) to the file of a device kind."""
    file = tiles.file_of(kind, folder)
    data: dict[str, Any] = {"tiles": {}}
    if file.is_file():
        data = json.loads(file.read_text(encoding="utf-8"))
    data |= {"device": kind, "jax": compat.JAX}
    for (op, key), value in found.items():
        data["tiles"].setdefault(op, {})[key] = dataclasses.asdict(value)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return file


def main(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", help="one op; all by default")
    parser.add_argument("--folder", type=Path, default=tiles.FOLDER, help="where the file goes")
    options = parser.parse_args(argv)
    device = target()
    found: dict[tuple[str, str], Any] = {}
    # Large cases first: a key that several cases share takes what is best for the largest.
    work = sorted(plan(device, options.op), key=lambda pair: pair[0].small)
    for case, implementation in work:
        for op, key, default in asked_by(case, implementation):
            if (op, key) not in found and hasattr(default, "candidates"):
                print(f"{op}, {key} ({case.name}):")
                found[op, key], _ = best(case, implementation, op, key, default)
    if not found:
        print(f"Nothing to tune on this device ({device.kind}): no kernel with tile sizes is made for it.")
        return 2
    print(f"written: {write(device.kind, found, options.folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
