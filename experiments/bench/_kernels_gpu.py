"""The cases of every op on a GPU: time, share of the bound measured in the same run, and peers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench._kernels_peers import peers
from jaxllm.cli import machine
from pallas_kernels import dispatch
from pallas_kernels.cases import Case
from pallas_kernels.target import target
from pallas_kernels.timing import seconds


class NothingFits(Exception):
    """There is nothing to measure on this device."""


def _product(repeats: int, size: int) -> float:
    a = jnp.ones((size, size), jnp.bfloat16)
    product = seconds(
        lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32).astype(a.dtype), a, repeats=repeats
    )
    return 2 * size**3 / product


def copy_bytes(repeats: int, megabytes: int) -> float:
    """Bytes/s of a copy, each byte read and written."""
    words = jnp.zeros(megabytes * 2**18, jnp.int32)
    return 2 * words.nbytes / seconds(lambda w: w + 1, words, repeats=repeats)


def bounds(repeats: int, size: int = 8192, megabytes: int = 2048) -> dict[str, Any]:
    """What this device reaches: FLOP/s of a bfloat16 product and bytes/s of a copy (each byte read and written).

    What cannot be measured is left out, and ``errors`` says why: rows are worth having without their share of it.
    """
    found, errors = {}, {}
    for name, measured in (
        ("flops_per_s", lambda: _product(repeats, size)),
        ("bytes_per_s", lambda: copy_bytes(repeats, megabytes)),
    ):
        try:
            found[name] = measured()
        except Exception as error:  # out of memory, a profiler that is attached already
            errors[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return found | ({"errors": errors} if errors else {})


def least(case: Case, reached: dict[str, Any]) -> float | None:
    """Seconds that the case must take at what the device reaches; None unless all that it counts was reached."""
    counted = {"flops_per_s": case.flops, "bytes_per_s": case.bytes_moved}
    counted = {name: amount for name, amount in counted.items() if amount is not None}
    # The other of two bounds alone might be the lower one.
    if not counted.keys() <= reached.keys():
        return None
    times = [amount / reached[name] for name, amount in counted.items()]
    return max(times, default=None)


def measure(case: Case, implementation: str, reached: dict[str, Any], repeats: int) -> dict[str, Any]:
    """One case through one implementation, beside its peers, as plain JSON values."""
    arrays = jax.jit(case.inputs)(jax.random.key(0))
    own = seconds(case.call(implementation), arrays, repeats=repeats)
    bound = least(case, reached)
    others: dict[str, Any] = {}
    for name, contender in peers(case).items():
        try:
            others[name] = contender if isinstance(contender, str) else contender(arrays, repeats)
        except Exception as error:  # a peer that fails is a line of the table, not the end of the run
            others[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return {
        "op": case.op,
        "case": case.name,
        "stands_for": case.stands_for,
        "implementation": implementation,
        "seconds": own,
        "flops": case.flops,
        "bytes": case.bytes_moved,
        "bound_share": None if bound is None else bound / own,
        "peers": others,
    }


def run(
    cases: list[Case],
    repeats: int,
    show: Callable[[dict[str, Any]], None],
    keep: Callable[[dict[str, Any]], None] = lambda report: None,
    before: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Every case that fits this device.

    Args:
        cases: to measure.
        repeats: timed calls of each.
        show: takes every row as it comes.
        keep: takes the report after every row, for a run that ends early.
        before: rows of an earlier report; those of other ops stay.

    Raises:
        NothingFits: no case does.
    """
    device = target()
    work = [
        (case, name)
        for case in cases
        for name in case.implementations
        if dispatch.unfit(name, device) is None
    ]
    if not work:
        raise NothingFits(f"no kernel is made for this device ({device.kind})")
    reached = bounds(repeats)
    ops = {case.op for case in cases}
    rows = [row for row in before or [] if row["op"] not in ops]
    report = {"versions": machine.versions(), "device": device.kind, "bounds": reached, "results": rows}
    for case, name in work:
        try:
            row = measure(case, name, reached, repeats)
        except Exception as error:  # a kernel that fails is a row with its reason, and others follow
            row = {"op": case.op, "case": case.name, "implementation": name}
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        rows.append(row | {"bounds": reached})
        show(rows[-1])
        keep(report)
    return report


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Share of the bound of every case."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.get("bound_share") is not None]
    figure = Figure(figsize=(9, 1 + 0.22 * max(1, len(shown))), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.barh(
        [f"{row['op']}: {row['case']} ({row['implementation']})" for row in shown],
        [100 * row["bound_share"] for row in shown],
        color="#2c5f9e",
    )
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("% of the bound measured in the same run")
    figure.savefig(path)
