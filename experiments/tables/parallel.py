"""Tables of context parallelism."""

from typing import Any

from experiments import _fcp_aot_table, _fcp_pair_table
from experiments.tables.text import markdown, number

_PASSES = {"forward": "forward", "both": "forward and backward"}


def _by_gpus(title: str, by_size: dict[str, Any], more: list[list[str]]) -> str:
    """MFU of every kind by the number of GPUs, and further rows."""
    kinds = dict.fromkeys(kind for found in by_size.values() for kind in found)
    rows = [
        [kind, *(number(found.get(kind, {}).get("mfu"), 2) for found in by_size.values())] for kind in kinds
    ]
    header = [f"{title}, GPUs:", *(number(int(size), 0) for size in by_size)]
    return markdown(header, rows + more, right=range(1, len(header))) + "\n"


def fcp(data: dict[str, Any]) -> str:
    """What ``experiments.fcp`` simulated: MFU by GPUs, and the paper's figures beside ours."""
    text = ""
    for passes, by_name in data["scale"].items():
        for name, by_size in by_name.items():
            over = data["ratios"][passes][name]
            more = [
                [f"**fcp over {label}**", *(f"**{over[size][key]:.2f}**" for size in by_size)]
                for label, key in (
                    ("oracle", "over_oracle"),
                    ("oracle and magi", "over_paper"),
                    ("all others", "over_best"),
                )
            ]
            text += _by_gpus(f"attention MFU, {_PASSES[passes]}, {name} lengths", by_size, more)
    for passes, by_name in data["stacks"].items():
        for name, by_size in by_name.items():
            text += _by_gpus(f"MFU of all layers, {_PASSES[passes]}, {name}", by_size, [])
    ((workers, variants),) = data["gradients"].items()
    rows = [(variant, number(found["mfu"], 3)) for variant, found in variants.items()]
    text += markdown((f"fcp's backward pass, {workers} GPUs", "MFU"), rows, right=[1]) + "\n"
    lines = [
        (
            each["claim"],
            each["published"],
            f"{each['here']:.2f}",
            "comes out" if each["reproduced"] else f"does not come out: {each['difference']:+.2f}",
        )
        for each in data["claims"]
    ]
    text += markdown(("arXiv 2605.08524", "published", "here", "within 10 %"), lines, right=[1, 2])
    return text


def fcp_compute(data: dict[str, Any]) -> str:
    """What ``bench/fcp_compute.py`` predicted and then timed."""
    lines = [
        (f"slowest worker, {kind} over fcp", number(r["predicted"], 2), number(r["measured"], 2))
        for kind, r in data["over_fcp"].items()
        if kind != "fcp"
    ]
    lines += [
        (
            f"{r['queries']:,} queries, {r['keys']:,} keys, ms",
            *(number(1e3 * r[n], 1) for n in ("predicted", "measured")),
        )
        for r in data["kernels"]
    ]
    where = f"{data['device']['cpu']}, JAX {data['versions']['jax']}"
    return f"{markdown(('', 'predicted', 'measured'), lines, right=[1, 2])}\nMeasured on: {where}.\n"


def fcp_pair(data: dict[str, Any]) -> str:
    """What ``bench/fcp_pair.py`` predicted of two processes and then timed."""
    text = markdown(_fcp_pair_table.RATIOS, _fcp_pair_table.ratios(data), right=[2, 3, 4])
    known = markdown(_fcp_pair_table.CONSTANTS, _fcp_pair_table.constants(data), right=[1, 2])
    return f"{text}\n{known}\n{_fcp_pair_table.steps(data)}\n"


def fcp_aot(data: dict[str, Any]) -> str:
    """What ``bench/fcp_aot.py`` compiled: programs, and the collectives of the one with most in flight."""
    table = _fcp_aot_table
    text = markdown(table.PROGRAMS, table.programs(data), right=range(2, 7))
    shown = next(each for each in data["results"] if each["error"] is None and each["case"]["options"])
    lines = markdown(table.COLLECTIVES, table.collectives(shown), right=range(2, 7))
    gb = data["memory_bytes"] / 1e9
    return f'{text}\nOf {gb:.0f} GB. The collectives of a step of "{shown["case"]["name"]}":\n\n{lines}'
