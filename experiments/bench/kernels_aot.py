"""Every kernel compiled to an sm_90a binary without a GPU: registers, spills, shared memory, on two versions of JAX.

Command:  python -m experiments.bench.kernels_aot --environments FOLDER [--op OP] [--check [--minutes N --seed N]] [--out FILE]
Time:     a few seconds per case and version, and minutes to make the environments once.
Expected: no kernel of Mosaic spills, and none takes more registers than its case allows.

FOLDER holds (or gets) one virtual environment per version of JAX, with its CUDA plugin and ptxas beside it. ``--check``
writes nothing; with ``--minutes`` it compiles only as many cases as begin within them, drawn by ``--seed``. ``--op``
leaves the results of other ops in FILE as they are. Exit codes: 0, 1 where something is a regression, 77 where nothing
could be compiled.
"""

import argparse
import datetime
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pallas_kernels.cases import Case, cases
from pallas_kernels.proof.aot import Compilation, compile_jobs, jobs

OUT = Path(__file__).parents[1] / "results" / "kernels_aot.json"
# The last JAX for Python 3.11, and one whose interpreter sees races.
VERSIONS = {"0.10.2": "3.11", "0.11.2": "3.12"}

TOOLS = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-nvdisasm")


class Missing(RuntimeError):
    """No environment for a version of JAX, and why."""


def interpreter(version: str) -> list[str]:
    """A command that runs Python ``version``, found by running it: pyenv's shims exist where the version does not.

    Raises:
        Missing: there is none.
    """
    tries: list[list[str]] = [[f"python{version}"]]
    if shutil.which("pyenv"):
        shown = subprocess.run(["pyenv", "versions", "--bare"], capture_output=True, text=True)
        names = [name for name in shown.stdout.split() if name.startswith(f"{version}.")]
        tries += [["env", f"PYENV_VERSION={name}", f"python{version}"] for name in reversed(names)]
    asked = "import sys; print('%d.%d' % sys.version_info[:2])"
    for command in tries:
        try:
            shown = subprocess.run([*command, "-c", asked], capture_output=True, text=True)
        except OSError:
            continue
        if shown.returncode == 0 and shown.stdout.strip() == version:
            return command
    raise Missing(f"no Python {version} here")


def environment(folder: Path, jax: str, python: str, more: Sequence[str] = ()) -> Path:
    """The interpreter of the environment for a version of JAX, made if need be; with ``more`` packages beside it.

    Raises:
        Missing: no such Python, or the packages cannot be installed.
    """
    home = folder / f"jax-{jax}"
    own, done = home / "bin" / "python", home / "complete"
    wanted: list[list[str]] = []
    have = set(done.read_text(encoding="utf-8").split()) if done.is_file() else None
    if have is None:
        subprocess.run([*interpreter(python), "-m", "venv", "--clear", str(home)], check=True)
        plugin = [f"jax-cuda13-plugin=={jax}", f"jax-cuda13-pjrt=={jax}", *TOOLS]
        wanted += [[f"jax=={jax}", "numpy", "jaxtyping", "absl-py"], ["--no-deps", *plugin]]
    elif have >= set(more):
        return own
    if more:
        wanted.append([f"jax=={jax}", *more])
    install = [str(own), "-m", "pip", "install", "-q"]
    for packages in wanted:
        shown = subprocess.run([*install, *packages], capture_output=True, text=True)
        if shown.returncode:
            last = (shown.stderr.strip().splitlines() or ["pip failed without a word"])[-1]
            raise Missing(f"the packages for jax {jax} cannot be installed: {last[:200]}")
    done.write_text("\n".join(sorted({*(have or ()), *more})), encoding="utf-8")
    return own


def row(done: Compilation, case: Case) -> dict[str, Any]:
    """One result as plain JSON values."""
    kernels = [{**asdict(kernel), "blocks_per_sm": kernel.blocks_per_sm()} for kernel in done.kernels]
    more = {"kernels": kernels, "stands_for": case.stands_for, "faults": done.faults(case)}
    return {**asdict(done), **more}


def run(
    pythons: dict[str, Path], op: str | None, minutes: float = math.inf, seed: int = 0
) -> list[dict[str, Any]]:
    """Every case on every version, a line each as they come; or those drawn for the minutes there are."""
    known = {(case.op, case.name): case for case in cases(op)}
    results = []
    for version, python in pythons.items():
        todo = jobs(op)
        if minutes < math.inf:
            random.Random(f"{seed} {version}").shuffle(todo)
        before = len(results)
        for done in compile_jobs(todo, str(python), 60 * minutes / len(pythons)):
            result = row(done, known[done.op, done.case])
            results.append({**result, "jax": version})
            figures = ", ".join(f"{k.name} {k.registers} reg {k.spill_bytes} B spilled" for k in done.kernels)
            print(f"jax {version} | {done.op} | {done.case} | {done.implementation} | {figures}", flush=True)
            for fault in result["faults"]:
                print(f"    FAULT: {fault}", flush=True)
        print(f"jax {version}: {len(results) - before} of {len(todo)} compiled", flush=True)
    return results


def merged(results: list[dict[str, Any]], op: str | None, file: Path) -> list[dict[str, Any]]:
    """New results, and with ``op`` those of the other ops that the file has, in the order of a whole run."""
    if op is not None and file.is_file():
        known = json.loads(file.read_text(encoding="utf-8"))["results"]
        results = results + [result for result in known if result["op"] != op]
    versions, ops = list(VERSIONS), list(dict.fromkeys(case.op for case in cases()))
    return sorted(results, key=lambda r: (versions.index(r["jax"]), ops.index(r["op"])))


def main(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--environments", type=Path, required=True, help="where the environments are or go")
    parser.add_argument("--op", help="one op; all by default")
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="with --check: begin no compile later"
    )
    parser.add_argument("--seed", type=int, default=0, help="what --minutes draws the order of cases by")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(argv)
    if options.minutes < math.inf and not options.check:
        parser.error("--minutes leaves cases out, and results are of all: only with --check")
    pythons: dict[str, Path] = {}
    missing: dict[str, str] = {}
    for version, python in VERSIONS.items():
        try:
            pythons[version] = environment(options.environments.absolute(), version, python)
        except Missing as error:
            missing[version] = str(error)
            print(f"jax {version}: {error}")
    if not pythons:
        return 77
    os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        results = run(pythons, options.op, options.minutes, options.seed)
    except RuntimeError as error:
        print(error)
        return 77
    if not options.check:
        report = {
            "command": "python -m experiments.bench.kernels_aot --environments FOLDER",
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "target": "sm_90a, from the description of an H200; nothing ran on a GPU",
            "missing": missing,
            "results": merged(results, options.op, options.out),
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(any(result["faults"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
