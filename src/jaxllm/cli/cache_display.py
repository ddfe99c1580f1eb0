"""The cache's part of ``jaxllm generate --report``."""

from typing import TYPE_CHECKING

from jaxllm.cli.display import count, number, size, table

if TYPE_CHECKING:
    from rich.table import Table

    from jaxllm.generation.kv_report import KVReport


def cache_tables(report: "KVReport") -> "list[Table]":
    """What is held, and what each attention layer stored and read in a mean decode step."""
    assert report.held is not None
    held = table("the cache holds", "", right=(1,))
    for label, value in (
        ("keys and values", report.held.keys_values),
        ("what policies remember", report.held.policies),
        ("tables", report.held.tables),
        ("recurrent states", report.held.recurrent),
    ):
        if value or label == "keys and values":
            held.add_row(label, size(value))
    columns = ["layer", "policy", "keys", "stored", "most", "read", "selected", "bytes read", "by the policy"]
    columns += ["recall", "least"] if report.recall else []
    title = f"attention layers, means of {count(report.steps)} decode steps"
    made = table(*columns, title=title, right=range(3, len(columns)))
    for layer in report.layers:
        selected = None if layer.selected is None else 100 * layer.selected
        cells = [
            str(layer.layer),
            layer.policy,
            layer.dtype,
            number(layer.stored, 1),
            count(layer.most_stored),
        ]
        cells += [number(layer.read, 1), "-" if selected is None else f"{number(selected, 1)} %"]
        cells += [size(layer.read_bytes), size(layer.policy_bytes)]
        cells += [number(layer.recall), number(layer.least_recall)] if report.recall else []
        made.add_row(*cells)
    return [held, made] if report.layers else [held]
