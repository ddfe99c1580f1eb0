"""From simulated batches to the figures of ``fcp``: means, ratios, where rivals break, and the paper's figures beside ours."""

from collections.abc import Iterable
from typing import Any

Record = dict[str, Any]
# What arXiv 2605.08524 compares with, or what comes nearest; the oracle takes the best of them for each batch.
PAPER_KINDS = ("ring", "zigzag", "zigzag-each", "document")
ORACLE = "oracle"
# Forward MFU at 128 GPUs, in the order of the ablation.
PUBLISHED_ABLATION = (0.29, 0.48, 0.62, 0.70, 0.75)
PUBLISHED_BAND = (1.13, 2.21)
PUBLISHED_IMBALANCE = 0.05
PUBLISHED_DOCUMENT_IMBALANCE = 0.70
# Of FCP's MFU, under which a rival counts as broken.
BROKEN = 0.8
TOLERANCE = 0.1
SHARES = ("kernel", "balance", "overlap")
CAUSES = {"kernel": "small chunks", "balance": "imbalance", "overlap": "communication"}


def mean(results: Iterable[Record]) -> Record:
    """Of several batches: FLOPs of all over the time of all; the rest is weighted by that time."""
    results = list(results)
    weight = sum(r["seconds"] for r in results)
    names = [name for name in results[0] if name != "seconds"]
    return {name: sum(r[name] * r["seconds"] for r in results) / weight for name in names} | {
        "seconds": weight
    }


def with_oracle(found: dict[str, Record]) -> dict[str, Record]:
    """A batch's results, and under ``oracle`` the fastest of those that the paper compares with."""
    return found | {ORACLE: min((found[kind] for kind in PAPER_KINDS), key=lambda r: r["seconds"])}


def _table(records: list[Record], case: str) -> dict[str, dict[str, dict[str, Record]]]:
    """Means over seeds: by the second part of the key, then the third, then the kind."""
    groups: dict[tuple[str, str], list[dict[str, Record]]] = {}
    for record in records:
        key = record["key"]
        if key[0] == case:
            groups.setdefault((str(key[1]), str(key[2])), []).append(record["found"])
    made: dict[str, dict[str, dict[str, Record]]] = {}
    for (name, size), found in groups.items():
        if set(PAPER_KINDS) <= set(found[0]) and case != "stack":
            found = [with_oracle(each) for each in found]
        made.setdefault(name, {})[size] = {kind: mean(each[kind] for each in found) for kind in found[0]}
    return made


def ratios(results: dict[str, Record]) -> Record:
    """FCP over the best that the paper compares with, and over the best of all rivals."""
    rivals = {kind: r["mfu"] for kind, r in results.items() if not kind.startswith("fcp")}
    best = max(rivals, key=rivals.__getitem__)
    mfu = results["fcp"]["mfu"]
    return {
        "over_oracle": mfu / results[ORACLE]["mfu"],
        "over_best": mfu / rivals[best],
        "best": best,
    }


def breaks(by_size: dict[str, dict[str, Record]]) -> list[Record]:
    """Of each rival the least number of GPUs where it has less than ``BROKEN`` of FCP's MFU, and what costs it most there."""
    found = []
    kinds = dict.fromkeys(kind for results in by_size.values() for kind in results)
    for kind in kinds:
        if kind.startswith("fcp"):
            continue
        at = cause = None
        for size, results in sorted(by_size.items(), key=lambda item: int(item[0])):
            if kind not in results:
                at, cause = int(size), "more workers than heads"
            elif results[kind]["mfu"] < BROKEN * results["fcp"]["mfu"]:
                at = int(size)
                # The share that is worst beside FCP's own.
                cause = CAUSES[min(SHARES, key=lambda s: results[kind][s] / results["fcp"][s])]
            if at is not None:
                break
        found.append({"kind": kind, "workers": at, "cause": cause})
    return found


def claim(text: str, published: float, here: float) -> Record:
    """A published figure beside ours."""
    reproduced = abs(here - published) <= TOLERANCE * published
    return _verdict(text, f"{published:.2f}", here, here - published, reproduced)


def _verdict(text: str, published: str, here: float, difference: float, reproduced: bool) -> Record:
    return {
        "claim": text,
        "published": published,
        "here": here,
        "difference": difference,
        "reproduced": reproduced,
    }


def claims(scale: dict[str, dict[str, Record]], steps: dict[str, Record], workers: int) -> list[Record]:
    """What the paper says, beside the log-normal batches here."""
    made = [
        claim(f"forward MFU at {workers} GPUs, {name}", value, r["mfu"])
        for (name, r), value in zip(steps.items(), PUBLISHED_ABLATION)
    ]
    sizes = sorted(int(size) for size in scale)
    inside = [size for size in sizes if 16 <= size <= 256]
    over = [ratios(scale[str(size)])["over_oracle"] for size in inside]
    last = inside[-1]
    made.append(claim(f"least MFU over the oracle, {inside[0]} to {last} GPUs", PUBLISHED_BAND[0], min(over)))
    made.append(
        claim(f"greatest MFU over the oracle, {inside[0]} to {last} GPUs", PUBLISHED_BAND[1], max(over))
    )
    own = [scale[str(size)]["fcp"] for size in inside]
    made.append(
        claim(
            f"near-linear: MFU at {last} GPUs over that at {inside[0]}", 1.0, own[-1]["mfu"] / own[0]["mfu"]
        )
    )
    worst = max(1 / r["balance"] - 1 for r in own)
    text = "FCP's imbalance of compute, log-normal, slowest over mean"
    limit = PUBLISHED_IMBALANCE
    made.append(_verdict(text, f"at most {limit:.2f}", worst, max(worst - limit, 0.0), worst <= limit))
    document = max(1 - scale[str(size)]["document"]["balance"] for size in inside)
    text = "imbalance of per-document placement, idle share of the slowest's time"
    made.append(claim(text, PUBLISHED_DOCUMENT_IMBALANCE, document))
    return made


def summary(records: list[Record]) -> Record:
    """The result file's figures."""
    scale, steps = _table(records, "scale"), _table(records, "ablation")
    (workers,) = steps["fcp"]
    main = scale["log-normal"]
    sensitivity = []
    base_size = str(next(r["key"][3] for r in records if r["key"][0] == "sensitivity"))
    for name in dict.fromkeys(r["key"][1] for r in records if r["key"][0] == "sensitivity"):
        line: Record = {"constant": name}
        for factor, side in ((0.7, "lower"), (1.3, "higher")):
            found = [
                with_oracle(r["found"]) for r in records if r["key"][:3] == ["sensitivity", name, factor]
            ]
            results = {kind: mean(each[kind] for each in found) for kind in found[0]}
            line[side] = {"mfu": results["fcp"]["mfu"]} | ratios(results)
        sensitivity.append(line)
    return {
        "scale": scale,
        "ratios": {n: {s: ratios(r) for s, r in by_size.items()} for n, by_size in scale.items()},
        "breaks": {name: breaks(by_size) for name, by_size in scale.items()},
        "context": {
            name: next(iter(by_size.values())) for name, by_size in _table(records, "context").items()
        },
        "ablation": {"workers": int(workers), "kinds": {k: v[workers] for k, v in steps.items()}},
        "claims": claims(main, steps["fcp"][workers], int(workers)),
        "room": next(iter(_table(records, "room")["log-normal"].values())),
        "sensitivity": {
            "workers": int(base_size),
            "base": {"mfu": main[base_size]["fcp"]["mfu"]} | ratios(main[base_size]),
            "constants": sensitivity,
        },
        "stacks": _table(records, "stack"),
    }
