"""``jaxllm doctor``: devices, versions, and which implementation each op takes here and why."""

import json
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.panel import Panel

from jaxllm.cli import accelerators, environment, machine
from jaxllm.cli.display import MISSING, duration, make_console, size, table


@dataclass(frozen=True)
class Args:
    """Show devices, versions, and which implementation each op takes here.

    Attributes:
        json: print everything as JSON, for a bug report.
    """

    json: bool = False


def _first_product() -> float:
    """Seconds for JAX to start and multiply two matrices: proof that the device works, not only that it is listed."""
    import time

    import jax.numpy as jnp

    start = time.perf_counter()
    product = jnp.ones((256, 256)) @ jnp.ones((256, 256))
    if float(product[0, 0]) != 256.0:
        raise RuntimeError(f"the device multiplied 256 ones by ones and got {float(product[0, 0])}")
    return time.perf_counter() - start


def examine() -> dict[str, Any]:
    """Everything that doctor prints, as plain JSON values."""
    import jax

    from pallas_kernels import dispatch

    backend = jax.default_backend()
    advice = accelerators.advice(backend)
    return {
        "versions": machine.versions(),
        "machine": machine.describe(),
        "backend": backend,
        "devices": machine.devices(),
        "first_product_seconds": _first_product(),
        "ops": [
            {
                "op": choice.op,
                "implementation": choice.implementation,
                "reason": choice.reason,
                "unverified": list(choice.unverified),
            }
            for choice in dispatch.explain()
        ],
        "compile_cache": {
            "folder": str(environment.compile_cache_folder()),
            "bytes": environment.compile_cache_bytes(),
        },
        "unused_accelerator": None if advice is None else {"found": str(advice[0]), "install": advice[1]},
    }


def show_advice(console: Console, found: object, install: str) -> None:
    """The panel that says how to make an idle accelerator work."""
    text = f"{found} is here, but the installed JAX only runs on the CPU. To use it:\n\n    {install}"
    console.print(
        Panel(text, title="accelerator not used", title_align="left", border_style="yellow", expand=False),
        soft_wrap=False,
    )


def _show(report: dict[str, Any], console: Console) -> None:
    here = report["machine"]
    memory = here["memory_bytes"]
    about = table("machine", "")
    about.add_row("system", here["system"])
    about.add_row("CPU", f"{here['cpu']}, {here['cores']} cores for this process")
    about.add_row("memory", MISSING if memory is None else size(memory))
    about.add_row(
        "bfloat16 products",
        "in hardware" if here["bfloat16_products"] else "not in hardware: float32 is faster",
    )
    cache = report["compile_cache"]
    about.add_row("compilation cache", f"{cache['folder']} ({size(cache['bytes'])})")
    console.print(about)

    found = table("device", "platform", "kind", "memory", right=(3,))
    for device in report["devices"]:
        limit = device["memory_bytes"]
        found.add_row(
            str(device["id"]), device["platform"], device["kind"], MISSING if limit is None else size(limit)
        )
    console.print(found)
    console.print(f"A first matrix product took {duration(report['first_product_seconds'])} and is right.\n")

    ops = table("op", "takes", "because")
    for op in report["ops"]:
        ops.add_row(op["op"], op["implementation"], op["reason"])
    console.print(ops)

    console.print(
        "versions: " + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    )
    absent = [name for name in machine.OPTIONAL if name not in report["versions"]]
    if absent:
        console.print(f"not installed, only needed by some features: {', '.join(absent)}")
    if report["unused_accelerator"]:
        show_advice(console, report["unused_accelerator"]["found"], report["unused_accelerator"]["install"])


def run(args: Args) -> int:
    """Print the report."""
    report = examine()
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _show(report, make_console())
    return 0
