"""Tables of single ops and of the experts."""

from typing import Any

from experiments import _op_table
from experiments.tables.text import TableError, markdown, number


def kernels(data: dict[str, Any]) -> str:
    """What bench/kernels.py wrote."""
    names = ("forward_tokens_per_s", "forward_backward_tokens_per_s", "forward_bound_tokens_per_s")
    lines = [(r["case"], r["operands"], *(number(r[name], 0) for name in names)) for r in data["results"]]
    header = ("case", "operands", "forward tokens/s", "forward and backward", "matmul bound of forward")
    return f"{markdown(header, lines, right=[2, 3, 4])}\nMeasured on: {data['device']}, JAX {data['jax']}.\n"


def kernels_torch(data: dict[str, Any]) -> str:
    """The part of bench/kernels.py that ran beside torch, losses included."""
    beside = data["beside_torch"]
    if "missing" in beside:
        raise TableError(f"nothing ran beside torch: {beside['missing']}")

    def verdict(ratio: float, aim: float) -> str:
        return "we lose" if ratio < 1 else "below the aim" if ratio < aim else "meets the aim"

    lines = [
        (
            r["case"],
            r["operands"],
            r["mode"],
            *(
                number(r.get(name) and 1e3 * r[name], 3)
                for name in ("seconds", "torch_seconds", "bound_seconds")
            ),
            number(r["ratio"], 2),
            verdict(r["ratio"], r["aim"]),
        )
        for r in beside["results"]
    ]
    header = (
        "case",
        "operands",
        "pass",
        "ms",
        "torch, ms",
        "bound, ms",
        "torch / ours",
        f"aim {beside['results'][0]['aim']}",
    )
    where = (
        f"{data['device']}, JAX {data['jax']} and torch {beside['torch']}, {beside['threads']} threads each"
    )
    return f"{markdown(header, lines, right=[3, 4, 5, 6])}\nMeasured turn by turn on: {where}; - where not recorded.\n"


def moe(data: dict[str, Any]) -> str:
    """What bench/moe.py wrote: milliseconds, and this library's time against the others'."""
    names = ("jaxllm", "ragged_dot", "dense", "transformers", "ideal")
    lines = [
        (
            number(r["tokens"], 0),
            number(r["experts"], 0),
            r["mode"],
            *(number(None if n not in r["seconds"] else r["seconds"][n] * 1e3, 2) for n in names),
        )
        for r in data["results"]
    ]
    header = (
        "tokens",
        "experts",
        "pass",
        "jaxllm",
        "`lax.ragged_dot`",
        "every expert",
        "transformers",
        "one product",
    )
    shape = f"width {data['width']}, experts of {data['expert_width']}, top {data['results'][0]['top_k']}, float32"
    where = f"{data['device']}, {data['cores']} cores, JAX {data['jax']}; medians of interleaved runs"
    return f"{markdown(header, lines, right=[0, 1, *range(3, 8)])}\nMilliseconds; {shape}. Measured on: {where}.\n"


def kernels_aot(data: dict[str, Any]) -> str:
    """What bench/kernels_aot.py wrote: one line per kernel, a figure per version of JAX."""
    versions = list(dict.fromkeys(r["jax"] for r in data["results"]))
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for result in data["results"]:
        key = (result["op"], result["case"], result["implementation"])
        seen: dict[str, int] = {}
        if result["error"] is not None:
            found.setdefault((*key, "does not compile", "0"), {})[result["jax"]] = None
        for kernel in result["kernels"]:
            # JAX before 0.11 calls every kernel that writes in place so.
            own = kernel["name"] if kernel["name"] != "new_body" else result["op"].replace(".", "_")
            # A program may hold the same kernel twice, for forward and backward.
            index = seen[own] = seen.get(own, -1) + 1
            found.setdefault((*key, own, str(index)), {})[result["jax"]] = kernel

    def each(figures: dict[str, Any], name: str, unit: int = 1) -> str:
        values = [figures[v] and figures[v].get(name) for v in versions if v in figures]
        return " / ".join("-" if v is None else f"{v / unit:,.0f}" for v in dict.fromkeys(values))

    def turn(figures: dict[str, Any], name: str) -> str:
        loops = [(figures[v] or {}).get("loops") for v in versions if v in figures]
        return " / ".join(dict.fromkeys("-" if found is None else str(found[name]) for found in loops))

    def tiles(figures: dict[str, Any]) -> str:
        sizes = [(figures[v] or {}).get("tile_bytes") for v in versions if v in figures]
        shown = (", ".join(f"{size:,}" for size in found) if found else "-" for found in sizes)
        return " / ".join(dict.fromkeys(shown))

    lines = [
        (
            *key[:4],
            each(figures, "registers"),
            each(figures, "spill_bytes"),
            each(figures, "shared_bytes", 1024),
            *(turn(figures, name) for name in ("wgmma", "tma", "spills")),
            each(figures, "threads"),
            each(figures, "blocks_per_sm"),
            tiles(figures),
        )
        for key, figures in found.items()
    ]
    header = ("op", "case", "through", "kernel", "registers", "bytes spilled", "shared KiB")
    header += ("WGMMA", "TMA", "spills", "threads", "blocks per SM", "tiles, bytes")
    absent = "".join(f" jax {version} was left out: {why}." for version, why in data["missing"].items())
    where = f"{data['target']}; jax {' and '.join(versions)}, two figures where they differ"
    turns = "WGMMA, TMA and spills are those of one turn of the innermost loops that hold the first two, in machine code"
    return f"{markdown(header, lines, right=range(4, 12))}\nCompiled for {where}; {turns}; - where not recorded.{absent}\n"


def rescale_cost(data: dict[str, Any]) -> str:
    """What bench/rescale_cost.py counted: one line per case, a figure per version of JAX."""
    versions = list(dict.fromkeys(r["jax"] for r in data["results"]))
    found: dict[str, list[dict[str, Any]]] = {}
    for result in data["results"]:
        found.setdefault(result["case"], []).append(result)

    def each(results: list[dict[str, Any]], name: str, digits: int = 0) -> str:
        return " / ".join(dict.fromkeys(number(r[name], digits) for r in results))

    lines = [
        (
            case,
            *(
                each(rows, name)
                for name in (
                    "tensor_cycles",
                    "memory_cycles",
                    "convert",
                    "scale",
                    "unpack",
                    "other",
                    "total",
                )
            ),
            *(each(rows, name, 2) for name in ("estimated_share", "scales_share", "total_share")),
        )
        for case, rows in found.items()
    ]
    header = ("case", "products, cycles", "weights from memory, cycles", "to float32", "scale and add")
    header += ("unpack, other bits", "the rest", "all instructions")
    header += ("scales / products, by arithmetic", "scales / products, counted", "all / products")
    absent = "".join(f" jax {version} was left out: {why}." for version, why in data["missing"].items())
    where = f"{data['target']}; jax {' and '.join(versions)}, two figures where they differ"
    return f"{markdown(header, lines, right=range(1, 11))}\nCompiled for {where}.{absent}\n"


def kernel_ops(data: dict[str, Any]) -> str:
    """Every op of pallas_kernels and its kernels, with what bench/kernels_aot.py wrote of them."""
    header = (
        "op",
        "what it is",
        "through",
        "beside the kernel XLA does",
        "compiled for sm_90a",
        "verified on",
    )
    return markdown(header, _op_table.rows(data))
