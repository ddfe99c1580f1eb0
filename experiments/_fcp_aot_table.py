"""The tables of docs/context-parallelism.md on compiled steps, of what bench/fcp_aot.py wrote."""

from typing import Any

from experiments._fcp_program import KEYS_AND_GRADIENTS

PROGRAMS = (
    "program",
    "letters",
    "state, GB",
    "with its work, GB",
    "collectives in start/done pairs",
    "keys and values behind attention",
    "received over need",
)
COLLECTIVES = (
    "collective",
    "brings",
    "runs",
    "MB received",
    "in pairs",
    "behind a loop or a product",
    "behind attention",
)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "-"


def programs(data: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line for each program: what a GPU holds, how much of its communication is asynchronous, and what that hides."""
    versions = {each["jax"] for each in data["results"]}
    lines = []
    for each in data["results"]:
        case = each["case"]
        name = case["name"] + (f", jax {each['jax']}" if len(versions) > 1 else "")
        if each["error"] is not None:
            lines.append(
                (
                    name,
                    f"`{case['pattern']}`",
                    f"does not compile: {each['error'].splitlines()[0]}",
                    *[""] * 4,
                )
            )
            continue
        memory, rows = each["memory"], each["collectives"]
        keys = [row for row in rows if row["what"] in KEYS_AND_GRADIENTS]
        pairs, count = (sum(row[key] for row in rows) for key in ("asynchronous", "count"))
        hidden, all_bytes = (sum(row[key] for row in keys) for key in ("marked_bytes", "bytes"))
        ratio = "-" if each["exchange"] is None else f"{each['exchange']['ratio']:.2f}"
        lines.append(
            (
                name,
                f"`{case['pattern']}`",
                f"{memory['argument'] / 1e9:.1f}",
                f"{memory['device'] / 1e9:.1f} ({memory['share']:.0%})",
                f"{pairs} of {count}",
                _share(hidden, all_bytes),
                ratio,
            )
        )
    return lines


def collectives(each: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line for each kind and purpose of the collectives of one program."""
    return [
        (
            row["kind"],
            row["what"],
            str(row["count"]),
            f"{row['bytes'] / 1e6:,.1f}",
            str(row["asynchronous"]),
            *(_share(row[f"{name}_bytes"], row["bytes"]) for name in ("hidden", "marked")),
        )
        for row in each["collectives"]
    ]
