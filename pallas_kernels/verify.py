"""``python -m pallas_kernels.verify``: are the kernels right on this GPU? Then ``auto`` takes them from now on.

Cases of every op that has a kernel for this device are run there: values and gradients against the oracle, with poisoned
padding, and a second time for the same bits. These are the small ones and of each kernel the largest, with gradients and
without, which is meant to take under three minutes (no GPU has timed it yet); ``--all`` runs every shape of the presets.
What passes is written to a record (``pallas_kernels.records``).
Exit codes: 0 all passed, 1 something failed, 2 there is nothing to verify on this device.
"""

import argparse
import sys
import time
from collections import defaultdict
from pathlib import Path

from pallas_kernels import records
from pallas_kernels.cases import Case, cases
from pallas_kernels.dispatch import unfit
from pallas_kernels.proof import numerics
from pallas_kernels.target import Target, target

_EXAMPLE = Target("cuda", "NVIDIA H200", (9, 0))


def plan(device: Target, op: str | None = None, everything: bool = True) -> list[tuple[Case, str]]:
    """Cases and implementations that fit the device: all of them, or the small ones and the largest of each kernel."""
    fitting = [
        (case, name) for case in cases(op) for name in case.implementations if unfit(name, device) is None
    ]
    if everything:
        return fitting
    largest: dict[tuple[str, str, bool], Case] = {}
    for case, name in fitting:
        key = case.op, name, bool(case.gradients)
        if key not in largest or (case.flops or 0) > (largest[key].flops or 0):
            largest[key] = case
    return [
        (case, name)
        for case, name in fitting
        if case.small or largest[case.op, name, bool(case.gradients)] is case
    ]


def check(case: Case, implementation: str) -> str | None:
    """None if the case passes here; else what is wrong."""
    try:
        numerics.compare_case(case, implementation).require(case.tolerance)
    except Exception as error:
        return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
    return None


def verify(work: list[tuple[Case, str]], kind: str, folder: Path) -> bool:
    """Run the cases, print a line each, write the record; whether all passed.

    Raises:
        OSError: the record cannot be written.
    """
    passed: dict[tuple[str, str], int] = defaultdict(int)
    failed = set()
    start = time.perf_counter()
    for case, implementation in work:
        fault = check(case, implementation)
        print(f"{'ok  ' if fault is None else 'FAIL'} {case.op} {implementation}: {case.name}", flush=True)
        if fault is None:
            passed[case.op, implementation] += 1
        else:
            print(f"     {fault}")
            failed.add((case.op, implementation))
    results: dict[str, dict[str, int | None]] = defaultdict(dict)
    for op, implementation in {*passed, *failed}:
        results[op][implementation] = None if (op, implementation) in failed else passed[op, implementation]
    file = records.write(folder, kind, results)
    print(f"{len(work)} cases in {time.perf_counter() - start:.0f} s; record: {file}")
    return not failed


def main(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", help="one op; all by default")
    parser.add_argument("--folder", type=Path, help="where the record goes; by default the user's cache")
    parser.add_argument("--all", action="store_true", help="every case, however long that takes")
    options = parser.parse_args(argv)
    device = target()
    work = plan(device, options.op, options.all)
    if not work:
        print(f"Nothing to verify on this device ({device.kind}): no kernel is made for it.")
        there = plan(_EXAMPLE, options.op, options.all)
        if there:
            print(f"On an {_EXAMPLE.kind} this command would run {len(there)} cases:")
            for case, implementation in there:
                print(f"  {case.op} {implementation}: {case.name}")
        return 2
    folder = records.local() if options.folder is None else options.folder
    return 0 if verify(work, device.kind, folder) else 1


if __name__ == "__main__":
    sys.exit(main())
