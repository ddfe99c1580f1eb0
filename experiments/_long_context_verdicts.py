"""Which tasks may be counted, and what the papers' claims come to here: from the figures alone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from experiments._long_context_cases import SELECTING, WINDOW, budget_label

Row = dict[str, Any]
LEAST_DENSE, MOST_WINDOW = 0.9, 0.5
TEXT = "text"
# Tasks whose tokens come step by step, where what evicts has to choose while it goes.
LONG_OUTPUTS = ("trace", "arithmetic")
SHOWN, NOT_SHOWN, LEVEL, NOT_MEASURED = "shown", "not shown", "level", "not measured"
# Accuracies nearer to each other than this are level: about one answer in a hundred.
_SAME = 0.01


def entry(dense: float, window: float) -> str | None:
    """Why a task is not counted at a budget; None: it is.

    Args:
        dense: accuracy with everything read.
        window: accuracy with the last tokens alone, as many as the budget has.
    """
    if dense < LEAST_DENSE:
        return f"dense accuracy is {dense:.0%}, below {LEAST_DENSE:.0%}: the model cannot do it"
    if window > MOST_WINDOW:
        return f"the last tokens alone give {window:.0%}, above {MOST_WINDOW:.0%}: it needs no long context"
    return None


def aggregated(records: Iterable[Row]) -> list[Row]:
    """One row for each task, length, policy, setting and dtype from the records of all samples."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for record in records:
        key = tuple(record[name] for name in ("task", "length", "policy", "setting", "dtype"))
        groups.setdefault(key, []).append(record)
    return [
        dict(zip(("task", "length", "policy", "setting", "dtype"), key)) | _mean(g)
        for key, g in groups.items()
    ]


def _mean(group: list[Row]) -> Row:
    weights = [record["asked"] for record in group]

    def mean(name: str) -> float | None:
        values = [record[name] for record in group]
        return None if values[0] is None else float(np.average(values, weights=weights))

    by_head = np.array([record["read_by_head"] for record in group])
    each = by_head.mean(axis=(1, 2))
    return {
        "samples": len(group),
        "asked": sum(weights),
        "accuracy": None if group[0]["right"] is None else sum(r["right"] for r in group) / sum(weights),
        "perplexity": float(np.exp(mean("nll"))),
        "kl": mean("kl"),
        "read": float(each.mean()),
        "recall": mean("recall") if group[0]["policy"] in (*SELECTING, "dense") else None,
        "read_by_head": by_head.mean(axis=0).tolist(),
        "read_by_sample": [float(each.min()), float(each.max())],
        "held_bytes": group[0]["held_bytes"],
    }


@dataclass
class Figures:
    """The rows of one model.

    Attributes:
        rows: of :func:`aggregated`.
        refused: (task, length, budget) to the reason why it is not counted; budget None: at none, and none was measured.
    """

    rows: list[Row]
    refused: dict[tuple[str, int, float | None], str] = field(init=False)

    def __post_init__(self) -> None:
        self.refused = {}
        for window in self.select(policy=WINDOW, dtype="compute"):
            place = window["task"], window["length"]
            if window["setting"] == 1 or window["accuracy"] is None:
                continue
            reason = entry(self.dense(*place)["accuracy"], window["accuracy"])
            if reason is not None:
                self.refused[(*place, window["setting"])] = reason
        asked = {place[:2] for place in self.refused}
        for dense in self.select(policy="dense", dtype="compute"):
            place = dense["task"], dense["length"]
            reason = None if dense["accuracy"] is None else entry(dense["accuracy"], 0.0)
            if reason is not None and place not in asked:
                self.refused[(*place, None)] = reason

    def select(self, **wanted: Any) -> list[Row]:
        """Rows with these values."""
        return [row for row in self.rows if all(row[name] == value for name, value in wanted.items())]

    def dense(self, task: str, length: int) -> Row:
        """What everything is held against."""
        (row,) = self.select(task=task, length=length, policy="dense", dtype="compute")
        return row

    def counts(self, row: Row) -> bool:
        """Whether a row stands in the table: text always, tasks by the rule at the row's budget.

        Tactic's budget is what it read; the rule is asked at the next larger one that was measured.
        """
        if row["task"] == TEXT or row["policy"] == "dense" or row["setting"] == 1:
            return True
        size = row["read"] if row["policy"] == "tactic" else row["setting"]
        place = {"task": row["task"], "length": row["length"], "policy": WINDOW, "dtype": "compute"}
        budgets = sorted(each["setting"] for each in self.select(**place))
        budget = next((budget for budget in budgets if budget >= size - 1e-9), 1.0)
        return budget < 1 and (row["task"], row["length"], budget) not in self.refused

    def of(self, policy: str, dtype: str = "compute") -> list[Row]:
        """Counted rows of a policy below the full budget."""
        return [r for r in self.select(policy=policy, dtype=dtype) if r["setting"] < 1 and self.counts(r)]

    def equal(self, row: Row, policy: str, name: str) -> float | None:
        """``policy``'s figure where it reads as much as ``row`` does: between its neighbours, by the logarithm."""
        place = {"task": row["task"], "length": row["length"], "policy": policy, "dtype": row["dtype"]}
        points = sorted((r["read"], r[name]) for r in self.select(**place) if r[name] is not None)
        if len(points) < 2 or not points[0][0] <= row["read"] <= points[-1][0]:
            return None
        reads, values = zip(*points)
        return float(np.interp(np.log(row["read"]), np.log(reads), values))


def verdicts(figures: Figures) -> list[Row]:
    """The papers' claims, what was found beside them, and the verdict."""
    return [
        _near_dense(figures),
        _against(figures, "tactic", "accuracy", "Tactic is above Quest at an equal mean budget", _TACTIC),
        _adapts(figures),
        _keeps(figures),
        _against(
            figures, "pillar", "recall", "Pillar recalls more mass than Quest at an equal budget", _PILLAR
        ),
        _int4(figures),
    ]


_TACTIC = (
    "RULER, 16k to 96k, equal token counts: Tactic 84.7 and 84.6, Quest 69.2 and 79.5, full 86.8 (2502.12216)"
)
_PILLAR = "as a drafter at 5 %: 74.2 % of Pillar's tokens accepted, 57.8 % of Quest's (2512.01278)"


def _claim(claim: str, paper: str, aim: str, found: Sequence[Row], verdict: str) -> Row:
    return {"claim": claim, "paper": paper, "aim": aim, "figures": list(found), "verdict": verdict}


def _place(row: Row) -> Row:
    where = {name: row[name] for name in ("task", "length", "setting")}
    return where | {"read": row["read"]}


def _near_dense(figures: Figures) -> Row:
    found = [
        _place(row)
        | {"quest": row["accuracy"], "dense": figures.dense(row["task"], row["length"])["accuracy"]}
        for row in figures.of("quest")
        if row["setting"] == 1 / 16 and row["task"] != TEXT
    ]
    good = all(each["quest"] >= 0.98 * each["dense"] for each in found)
    return _claim(
        "Quest is near lossless at 1/16 of the tokens",
        "passkey at 100k: 92 % at a budget of 512, 100 % at 2,048; LongBench lossless from 1/5 to 1/10 (2406.10774)",
        "at least 98 % of the dense accuracy in every counted task",
        found,
        _verdict(found, good),
    )


def _against(figures: Figures, policy: str, name: str, claim: str, paper: str) -> Row:
    found = []
    for row in figures.of(policy):
        other = None if row[name] is None else figures.equal(row, "quest", name)
        if other is not None:
            found.append(_place(row) | {policy: row[name], "quest": other})
    apart = [each[policy] - each["quest"] for each in found]
    if found and all(abs(each) <= _SAME for each in apart):
        verdict = LEVEL
    else:
        verdict = _verdict(found, min(apart, default=0.0) >= -_SAME)
    aim = f"{name} nowhere below Quest's (interpolated to the tokens read), and somewhere above, by more than {_SAME:.0%}"
    return _claim(claim, paper, aim, found, verdict)


def _adapts(figures: Figures) -> Row:
    found = []
    for row in figures.of("tactic"):
        heads, (least, most) = np.array(row["read_by_head"]), row["read_by_sample"]
        found.append(_place(row) | {"by_head": float(heads.max() / heads.min()), "by_context": most / least})
    good = all(each["by_head"] >= 1.5 for each in found)
    return _claim(
        "Tactic's budget adapts by head and context",
        "the number of tokens that hold a share of the mass varies widely by head, query and context (2502.12216)",
        "the KV head that reads most reads at least 1.5 times as much as the one that reads least",
        found,
        _verdict(found, good),
    )


def _keeps(figures: Figures) -> Row:
    found = []
    for row in figures.of("rkv"):
        if row["task"] not in LONG_OUTPUTS or not 0.1 <= row["setting"] <= 0.16:
            continue
        each = _place(row) | {"rkv": row["accuracy"]}
        each["dense"] = figures.dense(row["task"], row["length"])["accuracy"]
        place = {name: row[name] for name in ("task", "length", "setting", "dtype")}
        for other in ("rkv, importance only", "h2o"):
            for got in figures.select(policy=other, **place):
                each[other] = got["accuracy"]
        if {"rkv, importance only", "h2o"} <= set(each):
            found.append(each)
    good = all(
        each["rkv"] >= 0.95 * each["dense"]
        and max(each["rkv, importance only"], each["h2o"]) <= each["rkv"] - 0.1
        for each in found
    )
    return _claim(
        "R-KV is near full at 10 to 16 % where SnapKV and H2O fall",
        "AIME24, 8B, 10 %: 51.6 % against 49.8 % full, SnapKV 26.0 % (2505.24133)",
        "at 1/8, at least 95 % of the dense accuracy, the others at least 10 points lower; long outputs only",
        found,
        _verdict(found, good),
    )


def _int4(figures: Figures) -> Row:
    found = []
    for row in figures.select(task=TEXT, policy="dense", dtype="int4"):
        dense = figures.dense(TEXT, row["length"])["perplexity"]
        found.append(_place(row) | {"int4": row["perplexity"], "compute": dense})
    good = all(each["int4"] <= 1.01 * each["compute"] for each in found)
    return _claim(
        "int4 keys and values cost at most 1 % of perplexity",
        "4-bit keys and values leave perplexity nearly as it is (2310.19102)",
        "on real text, everything read",
        found,
        _verdict(found, good),
    )


def _verdict(found: Sequence[Row], good: bool) -> str:
    return NOT_MEASURED if not found else SHOWN if good else NOT_SHOWN


def left_out(figures: Figures) -> list[Row]:
    """Tasks that are not counted, and why."""
    return [
        {
            "task": task,
            "length": length,
            "budget": "any" if budget is None else budget_label(budget),
            "reason": reason,
        }
        for (task, length, budget), reason in figures.refused.items()
    ]
