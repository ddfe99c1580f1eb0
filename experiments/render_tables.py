"""Tables of README.md, docs/ and pallas_kernels/README.md from the JSON in experiments/results/; no figure is typed by hand.

Command: ``python -m experiments.render_tables`` (``--check`` changes nothing and exits with 1 where a table is stale).
A table stands between ``<!-- table: KIND FILE -->`` and ``<!-- end of table -->``; FILE is under experiments/results/.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.tables import caches, degraded, failover, kernels, parallel, training
from experiments.tables.text import TableError

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
TABLE = re.compile(r"(<!-- table: (\w+) ([\w.-]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


KINDS: dict[str, Callable[[dict[str, Any]], str]] = {
    "quickstart": training.quickstart,
    "benchmark": training.benchmark,
    "kernels": kernels.kernels,
    "compile_time": training.compile_time,
    "moe": kernels.moe,
    "kernels_aot": kernels.kernels_aot,
    "kernel_ops": kernels.kernel_ops,
    "rescale_cost": kernels.rescale_cost,
    "kernels_torch": kernels.kernels_torch,
    "convert_memory": training.convert_memory,
    "ssd_memory": training.ssd_memory,
    "decode": caches.decode,
    "long_context": caches.long_context,
    "retrieval_exact": caches.retrieval_exact,
    "selection_limits": caches.selection_limits,
    "fcp": parallel.fcp,
    "fcp_compute": parallel.fcp_compute,
    "fcp_pair": parallel.fcp_pair,
    "fcp_aot": parallel.fcp_aot,
    "failover": failover.failover,
    "failover_cost": degraded.failover_cost,
    "failover_quality": degraded.failover_quality,
    "failover_simulator": failover.failover_simulator,
}


def render(kind: str, file: Path) -> str:
    """The text of one table; says so where nothing was measured yet.

    Raises:
        TableError: as the class says.
    """
    if kind not in KINDS:
        raise TableError(f"table kind {kind!r}: known are {', '.join(sorted(KINDS))}")
    if not file.is_file():
        return "Not measured yet.\n"
    try:
        return KINDS[kind](json.loads(file.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError) as error:
        raise TableError(
            f"{file.name}: is no result of kind {kind!r} ({type(error).__name__}: {error})"
        ) from error


def refreshed(text: str, results: Path = RESULTS) -> str:
    """``text`` with every table made anew."""
    return TABLE.sub(lambda m: f"{m[1]}{render(m[2], results / m[3])}{m[5]}", text)


def main(argv: list[str] | None = None) -> int:
    """Refresh or check the pages; the exit code is 1 if ``--check`` found a stale one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 where a table is stale"
    )
    check = parser.parse_args(argv).check
    stale = []
    for page in [
        ROOT / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        ROOT / "pallas_kernels" / "README.md",
    ]:
        before = page.read_text(encoding="utf-8")
        after = refreshed(before)
        if after != before:
            stale.append(page.relative_to(ROOT).as_posix())
            if not check:
                page.write_text(after, encoding="utf-8")
    print(
        f"{'stale' if check else 'refreshed'}: {', '.join(stale)}" if stale else "all tables are up to date"
    )
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
