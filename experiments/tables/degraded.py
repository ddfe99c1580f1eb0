"""Tables of what MeCeFO's cheaper gradients cost: quality, operations and memory."""

from typing import Any

from experiments.tables.text import markdown, number


def failover_quality(data: dict[str, Any]) -> str:
    """Validation losses and errors of gradients of ``experiments.failover_quality``."""
    lines = []
    for row in data["rows"]:
        failing = row["rate"] > 0
        lines.append(
            (
                f"{row['model']}, {row['method']}"
                + (f", {row['rate']:.0%} dead" if _rates(data) > 1 else ""),
                number(row["seeds"], 0),
                f"{row['degraded']:.0%}",
                number(row["loss"]),
                f"{row['above_no_failure']:+.3f}" if failing else "",
                f"{min(row['gaps']):+.3f} to {max(row['gaps']):+.3f}"
                if len(row["gaps"]) > 1 and failing
                else "",
                f"{row['gaps'][0]:+.3f}" if failing else "",
                number(row["gradient_error"], 2) if failing else "",
                number(row["greatest_error"], 2) if failing else "",
            )
        )
    header = (
        "model, method",
        "seeds",
        "gradients degraded",
        "validation loss, nats",
        "above no failure",
        "range of seeds",
        "first seed",
        "gradient's error, median",
        "greatest",
    )
    inputs = data["inputs"]
    said = (
        f"{inputs['steps']:,} steps of {inputs['workers']} workers' {inputs['rows']} rows of {inputs['length']} tokens each, one "
        f"dead {max(inputs['rates']):.0%} of the time; {data['date'][:10]}, {data['device']['cpu']}.\n"
    )
    return "\n".join([markdown(header, lines, right=range(1, 9)), said])


def _rates(data: dict[str, Any]) -> int:
    return len({row["rate"] for row in data["rows"] if row["rate"] > 0})


def failover_cost(data: dict[str, Any]) -> str:
    """Operations and memory of both jobs of ``experiments.bench.failover_cost``, over those of one."""
    normal = {row["model"]: row["memory"] for row in data["results"] if row["task"] == "normal"}
    lines = [
        (
            f"{row['model']}, {row['task']}",
            number(row["operations"] / 1e9, 0),
            number(row["operations_over_normal"], 2),
            number(row["expected"], 2),
            number(row["memory"]["temporary"] / 2**20, 0),
            number(row["memory"]["temporary"] / normal[row["model"]]["temporary"], 2),
        )
        for row in data["results"]
    ]
    header = (
        f"model, task; compiled for {data['inputs']['target']}",
        "GFLOP",
        "over normal",
        "counting passes",
        "temporary memory, MiB",
        "over normal",
    )
    return markdown(header, lines, right=range(1, 6))
