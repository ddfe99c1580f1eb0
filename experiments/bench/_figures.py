"""From seconds to figures: rates, gates, ratios against aims. Standard library only."""

import statistics
from collections.abc import Sequence
from typing import Any

from _bounds import passes
from _tasks import Contender, Task, operands, storage

# Largest error of a logit over the logits' spread; largest relative difference of a loss of the first steps.
LOGIT_LIMIT = {"fp32": 2e-3, "bf16-matmul": 0.15, "bf16": 0.15}
LOSS_LIMIT = {"fp32": 1e-3, "bf16-matmul": 1e-2, "bf16": 1e-2}
# Greedy float32 tokens may part at a tie, after which everything differs.
LEAST_COMMON = 0.5
BOUND_AIM = 0.7


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def rate(task: Task, library: str, answer: dict[str, Any]) -> float:
    """Tokens per second of one round; for the machine those that its bound allows.

    Args:
        task: what ran.
        library: whose round it is.
        answer: of the worker: ``seconds`` of each repeat and, for decode, ``first``: those up to the first token.

    Raises:
        ValueError: a decode took no longer than its first token.
    """
    seconds = statistics.fmean(answer["seconds"])
    if library == "machine":
        if task.kind == "decode":
            return task.batch / seconds
        return task.tokens / (seconds * passes(task.kind))
    if task.kind == "decode":
        seconds -= statistics.fmean(answer["first"])
    if seconds <= 0:
        raise ValueError("a decode took no longer than its first token: noise drowns it")
    return task.tokens / seconds


def repeats_for(once: float, least: float) -> int:
    """Repeats that make a round last about ``least`` seconds, at most 20."""
    return min(20, max(1, round(least / max(once, 1e-4))))


def common_prefix(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]]) -> float:
    """Mean share of each row before the first token that differs."""
    shares = []
    for one, other in zip(a, b, strict=True):
        same = next((i for i, (x, y) in enumerate(zip(one, other)) if x != y), len(other))
        shares.append(same / max(1, len(other)))
    return statistics.fmean(shares)


def gate(
    contender: Contender, answer: dict[str, Any], reference: dict[str, Any] | None
) -> tuple[str | None, dict]:
    """(why a figure must not count, or None; what was compared) of a prepared task.

    Args:
        contender: whose answer it is.
        answer: its losses of the first steps or its tokens; a bound has neither.
        reference: those of jaxllm in float32; None where it did not answer.
    """
    if contender.library in ("machine", "jla"):
        return None, {}
    if reference is None:
        return "nothing to compare with: jaxllm fp32 gave no answer", {}
    if "losses" in answer:
        pairs = list(zip(answer["losses"], reference["losses"], strict=True))
        error = max(abs(x - y) / abs(y) for x, y in pairs)
        limit = LOSS_LIMIT[contender.precision]
        failed = None if error <= limit else f"losses differ by {error:.1e}, at most {limit:.0e} may be"
        return failed, {"loss_error": error}
    share = common_prefix(answer["tokens"], reference["tokens"])
    bad = contender.precision == "fp32" and share < LEAST_COMMON
    return (f"tokens agree for {share:.0%} only" if bad else None), {"common_prefix": share}


def aim_of(model: str, kind: str, peer: str, group: str) -> float | None:
    """The ratio to reach, or None where none is set."""
    if model not in ("quickstart", "wide"):
        return None
    if peer == "jla":
        return 2.0 if kind == "decode" else None
    if kind == "train":
        return 2.0 if group == "fp32" else 3.0
    if kind == "prefill":
        return 3.0
    # On the wide model memory bounds decode, and the aim is a share of that bound.
    return 8.0 if model == "quickstart" else None


def _best(entries: dict[str, Any], library: str, group: str) -> tuple[str, dict[str, Any]] | None:
    found = [
        (name, entry)
        for name, entry in entries.items()
        if entry["library"] == library
        and "tokens_per_second" in entry
        and not entry.get("error")
        and group in ("best", entry["precision"])
    ]
    return max(found, key=lambda item: item[1]["tokens_per_second"]["median"], default=None)


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per row, peer and group ("fp32" like for like; "best": each at its best precision).

    Lines without a peer's figure have ratio None: our figure and its share of the bound still stand.
    """
    lines = []
    for row in rows:
        entries, kind = row["contenders"], row["task"]["kind"]
        for peer in ("transformers", "jla"):
            if peer == "jla" and not any(e["library"] == peer for e in entries.values()):
                continue
            for group in ("fp32", "best"):
                ours, theirs = _best(entries, "jaxllm", group), _best(entries, peer, group)
                if ours is None:
                    continue
                lines.append(_line(row, peer, group, ours, theirs, aim_of(row["model"], kind, peer, group)))
    return lines


def _line(row: Any, peer: str, group: str, ours: Any, theirs: Any, aim: float | None) -> dict[str, Any]:
    name, entry = ours
    figure = entry["tokens_per_second"]["median"]
    kind = row["task"]["kind"]
    dtype = storage(entry["precision"]) if kind == "decode" else operands(entry["precision"])
    machine = row["contenders"].get(f"machine {dtype}", {}).get("tokens_per_second")
    share = figure / machine["median"] if machine else None
    theirs_figure = theirs[1]["tokens_per_second"]["median"] if theirs else None
    ratio = figure / theirs_figure if theirs_figure else None
    share_aim = BOUND_AIM if (row["model"], kind, peer) == ("wide", "decode", "transformers") else None
    return {
        "model": row["model"],
        "task": row["name"],
        "kind": kind,
        "group": group,
        "ours": name,
        "tokens_per_second": figure,
        "peer_library": peer,
        "peer": theirs[0] if theirs else None,
        "peer_tokens_per_second": theirs_figure,
        "ratio": ratio,
        "aim": aim,
        "bound": machine["median"] if machine else None,
        "bound_share": share,
        "bound_aim": share_aim,
        "verdict": verdict(ratio, aim, share, share_aim),
    }


def verdict(
    ratio: float | None, aim: float | None, share: float | None = None, share_aim: float | None = None
) -> str:
    """In words; a loss is a loss whatever the aim."""
    if ratio is not None and ratio < 1:
        return "we lose"
    missed = (ratio is not None and aim is not None and ratio < aim) or (
        share is not None and share_aim is not None and share < share_aim
    )
    if missed:
        return "below the aim"
    if ratio is None and share_aim is None:
        return "no peer"
    return "ahead" if aim is None and share_aim is None else "meets the aim"
