"""What scaling the sums of every 128 inputs costs beside the tensor cores: counted in machine code, not measured on a device.

Command:  python -m experiments.bench.rescale_cost --environments FOLDER [--out FILE]
Time:     a minute; minutes more to make the environments once (see kernels_aot.py).
Expected: with a scale for each row and group, converting and scaling take three quarters as many cycles to issue as the
          tensor cores take to multiply, as the arithmetic says.

Atom's W4A4 (arXiv 2310.19102) sums int32 over groups of 128 inputs and scales each sum in float32. Hopper's tensor cores
have no integers of 4 bits, so that codes are also unpacked to 8. The kernels are compiled to sm_90a binaries and
disassembled, and the instructions of one turn of their main loop counted. A warpgroup has one warp at each of the four
schedulers of a multiprocessor, which issue an instruction a cycle: a warp's instructions are cycles, beside the cycles that
all four tensor cores of the multiprocessor take for the warpgroup's products. Two warpgroups take turns, so that one issues
while the other multiplies: a ratio above 1 says that issuing bounds the kernel and not the tensor cores. Stalls, and units
narrower than a scheduler, are not in it: integers become floats at half the rate, so that those alone are twice their count.

Exit codes: 0, 77 where nothing could be compiled.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments.bench.kernels_aot import VERSIONS, Missing, environment
from pallas_kernels.cases import cases
from pallas_kernels.proof.aot import ROOT, machine_code
from pallas_kernels.proof.sass import Mix, mix

OUT = Path(__file__).parents[1] / "results" / "rescale_cost.json"
CASES = (
    "int8 8B up M4096",
    "int8 8B up M4096 group128",
    "W4A8 8B up M4096",
    "W4A4 8B up M4096",
    "int8 8B up M16 group128",
    "W4A8 8B up M16",
    "W4A4 8B up M16",
)
# int8 multiply-adds of a multiprocessor in a cycle: 1979e12 operations a second on 132 of them at 1.83 GHz, NVIDIA's figures
# for the H100 and H200 in SXM modules.
PRODUCTS_PER_CYCLE = 4096
# Bytes of memory for each multiprocessor in a cycle: an H200's 4.8e12 a second, likewise.
BYTES_PER_CYCLE = 4.8e12 / 132 / 1.83e9
# Lanes of the four schedulers together, each of which issues an instruction for 32 in a cycle.
LANES = 128
GROUP = 128
_ANSWER = "counted: "
# What becomes of sums; of codes.
_CONVERT, _SCALE = ("I2FP", "I2F"), ("FMUL", "FFMA", "FADD", "HADD2")
_UNPACK = ("LOP3", "PRMT", "SHF", "IMAD.SHL")


def estimate(steps: int) -> float:
    """Cycles to issue ``steps`` operations for each sum of 128 products, over the tensor cores' for the products."""
    return steps / LANES / (GROUP / PRODUCTS_PER_CYCLE)


def steps_of(options: dict[str, Any]) -> int:
    """Operations for each sum: none without groups; else to float32 and one multiply-add, by a factor that is a
    multiplication more where it depends on row and output both."""
    if not options["grouped_weights"]:
        return 0
    return 3 if options["grouped_rows"] else 2


def row(name: str, found: Mix) -> dict[str, Any]:
    """One case's counts, and their share of the tensor cores' cycles."""
    case = next(case for case in cases("quantized_matmul") if case.name == name)
    avals = case.avals()
    grouped = {"grouped_weights": avals["scale"].shape[0] > 1, "grouped_rows": avals["x_scale"].shape[1] > 1}
    cycles = found.products / PRODUCTS_PER_CYCLE
    rows, bits = avals["x"].shape[0], 4 if avals["codes"].dtype.name == "uint8" else 8
    # Up to 128 rows are one tile, and weights are read once: 64 outputs' of 128 inputs for each turn of a warpgroup.
    memory = 64 * GROUP * bits / 8 / BYTES_PER_CYCLE if rows <= 128 else None
    convert, scale, unpack = found.of(*_CONVERT), found.of(*_SCALE), found.of(*_UNPACK)
    return {
        "case": name,
        "stands_for": case.stands_for,
        **grouped,
        "tensor_cycles": cycles,
        "memory_cycles": memory,
        "convert": convert,
        "scale": scale,
        "unpack": unpack,
        "other": found.total - convert - scale - unpack,
        "total": found.total,
        "scales_share": (convert + scale) / cycles,
        "total_share": found.total / cycles,
        "estimated_share": estimate(steps_of(grouped)),
        "counts": dict(sorted(found.counts.items())),
    }


def counted(python: Path, name: str) -> dict[str, Any]:
    """The row of one case, compiled in a process of another environment.

    Raises:
        RuntimeError: it cannot be compiled there; says why.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": path}
    env["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    command = [str(python), "-m", "experiments.bench.rescale_cost", "--child", name]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    lines = [line for line in done.stdout.splitlines() if line.startswith(_ANSWER)]
    if not lines:
        last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        raise RuntimeError(f"{name} cannot be compiled: {last[:400]}")
    return json.loads(lines[0].removeprefix(_ANSWER))


def _child(name: str) -> None:
    case = next(case for case in cases("quantized_matmul") if case.name == name)
    (listing,) = machine_code(case)
    print(_ANSWER + json.dumps(row(name, mix(listing))), flush=True)


def main(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--environments", type=Path, help="where the environments are or go")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        _child(options.child)
        return 0
    if options.environments is None:
        parser.error("--environments is needed")
    results: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    for version, wanted in VERSIONS.items():
        try:
            python = environment(options.environments.absolute(), version, wanted)
            for name in CASES:
                results.append({"jax": version, **counted(python, name)})
                shown = results[-1]
                print(
                    f"jax {version} | {name} | {shown['tensor_cycles']:.0f} cycles of products | "
                    f"{shown['total']} instructions, {shown['convert'] + shown['scale']} of scales | "
                    f"{shown['scales_share']:.2f} and {shown['total_share']:.2f}, "
                    f"estimated {shown['estimated_share']:.2f}",
                    flush=True,
                )
        except (Missing, RuntimeError) as error:
            missing[version] = str(error)
            print(f"jax {version}: {error}")
    if not results:
        return 77
    report = {
        "command": "python -m experiments.bench.rescale_cost --environments FOLDER",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "target": "sm_90a, from the description of an H200; as counted in machine code, not measured on a device",
        "products_per_cycle": PRODUCTS_PER_CYCLE,
        "bytes_per_cycle": BYTES_PER_CYCLE,
        "missing": missing,
        "results": results,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
