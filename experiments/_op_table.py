"""The table of ops in pallas_kernels/README.md: what each is, what runs it, and what is known of its kernels."""

import importlib
import json
from typing import Any

from pallas_kernels import dispatch, records
from pallas_kernels.proof.interpret import UNSEEN


def _summary(op: str) -> str:
    """First sentence of the package's docstring."""
    text = importlib.import_module(f"pallas_kernels.{op}").__doc__ or ""
    return text.strip().split("\n\n")[0].replace("\n", " ").rstrip(".")


def _compiled(results: list[dict[str, Any]]) -> str:
    """How many cases compile, and the worst of their kernels."""
    if not results:
        return "-"
    kernels = [kernel for result in results for kernel in result["kernels"]]
    failed = sum(result["error"] is not None for result in results)
    cases = len({result["case"] for result in results})
    text = f"{cases} cases"
    # Of Triton's kernels the compiler tells only what ptxas says of the dumped PTX, where it can be dumped.
    for name, unit in (("registers", "registers"), ("spill_bytes", "B spilled")):
        known = [kernel[name] for kernel in kernels if kernel[name] is not None]
        text += f", at most {max(known)} {unit}" if known else f", {unit} not known"
    return text if not failed else f"{text}, {failed} do not compile"


def _devices(op: str, implementation: str) -> str:
    """Devices of shipped records with a pass of these sources."""
    found = []
    for file in sorted(records.SHIPPED.glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        passed = record["passed"].get(op, {}).get(implementation)
        if passed is not None and passed["sources"] == records.sources(op):
            found.append(f"{record['device']} (jax {record['jax']})")
    return ", ".join(found)


def _verified(op: str, implementation: str, results: list[dict[str, Any]]) -> str:
    """Where it ran; and what that leaves out where only the interpreter ran it."""
    found = _devices(op, implementation)
    if found or implementation != "mosaic_gpu":
        return found or "no device"
    products = any(kernel["wgmma"] for result in results for kernel in result["kernels"])
    return f"no device; interpreted{f', {UNSEEN}' if products else ''}"


def rows(data: dict[str, Any]) -> list[tuple[str, ...]]:
    """One line for each kernel of an op, one for an op without; ``data`` is what bench/kernels_aot.py wrote.

    Returns:
        op, what it is, implementation, what XLA does beside the kernel, what the compiler says, where it is verified.
    """
    found = []
    for op, names in dispatch.IMPLEMENTATIONS.items():
        kernels = [name for name in names if name not in dispatch.EVERYWHERE]
        for index, name in enumerate(kernels or ["xla"]):
            module = importlib.import_module(f"pallas_kernels.{op}.{name}")
            results = [r for r in data["results"] if (r["op"], r["implementation"]) == (op, name)]
            own = name not in dispatch.EVERYWHERE
            found.append(
                (
                    *((f"`{op}`", _summary(op)) if index == 0 else ("", "")),
                    f"`{name}`",
                    module.BESIDE if own else "-",
                    _compiled(results),
                    _verified(op, name, results) if own else "-",
                )
            )
    return found
