"""From simulated batches to the figures of ``fcp``: means, ratios, where rivals break, and the paper's figures beside ours."""

from collections.abc import Iterable
from typing import Any

Record = dict[str, Any]
# What arXiv 2605.08524 compares with, or what comes nearest, MagiAttention beside these; the oracle takes the best of these
# for each batch.
PAPER_KINDS = ("ring", "zigzag", "zigzag-each", "document")
MAGI = "magi"
ORACLE = "oracle"
# MFU at 128 GPUs, in the order of the ablation.
PUBLISHED_ABLATION = {
    "forward": (0.29, 0.48, 0.62, 0.70, 0.75),
    "backward": (0.37, 0.46, 0.59, 0.69, 0.74),
}
PUBLISHED_BAND = (1.13, 2.21)
PUBLISHED_IMBALANCE = 0.05
PUBLISHED_MAGI_TRAFFIC = 0.17
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


def _table(records: list[Record], case: str, passes: str) -> dict[str, dict[str, dict[str, Record]]]:
    """Means of some passes over seeds: by the second part of the key, then the third, then the kind."""
    groups: dict[tuple[str, str], list[dict[str, Record]]] = {}
    for record in records:
        key = record["key"]
        if key[0] == case:
            groups.setdefault((str(key[1]), str(key[2])), []).append(record["found"][passes])
    made: dict[str, dict[str, dict[str, Record]]] = {}
    for (name, size), found in groups.items():
        if set(PAPER_KINDS) <= set(found[0]) and case != "stack":
            found = [with_oracle(each) for each in found]
        made.setdefault(name, {})[size] = {kind: mean(each[kind] for each in found) for kind in found[0]}
    return made


def ratios(results: dict[str, Record]) -> Record:
    """FCP over the oracle, over the best of it and MagiAttention, and over the best of all rivals."""
    rivals = {kind: r["mfu"] for kind, r in results.items() if not kind.startswith("fcp")}
    best = max(rivals, key=rivals.__getitem__)
    mfu = results["fcp"]["mfu"]
    return {
        "over_oracle": mfu / results[ORACLE]["mfu"],
        "over_paper": mfu / max(results[ORACLE]["mfu"], results[MAGI]["mfu"]),
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


def claims(
    scale: dict[str, dict[str, Record]], steps: dict[str, dict[str, Record]], workers: int
) -> list[Record]:
    """What the paper says, beside the log-normal batches here; ``steps``: of the ablation, by pass."""
    made = [
        claim(f"{way} MFU at {workers} GPUs, {name}", value, r["mfu"])
        for way, published in PUBLISHED_ABLATION.items()
        for (name, r), value in zip(steps[way].items(), published)
    ]
    sizes = sorted(int(size) for size in scale)
    inside = [size for size in sizes if 16 <= size <= 256]
    found = [ratios(scale[str(size)]) for size in inside]
    last = inside[-1]
    for key, rivals in (("over_oracle", "the oracle"), ("over_paper", "the oracle and MagiAttention")):
        over = [each[key] for each in found]
        sizes_in = f"{inside[0]} to {last} GPUs"
        made.append(claim(f"least MFU over {rivals}, {sizes_in}", PUBLISHED_BAND[0], min(over)))
        made.append(claim(f"greatest MFU over {rivals}, {sizes_in}", PUBLISHED_BAND[1], max(over)))
    own = [scale[str(size)]["fcp"] for size in inside]
    made.append(
        claim(
            f"near-linear: MFU at {last} GPUs over that at {inside[0]}", 1.0, own[-1]["mfu"] / own[0]["mfu"]
        )
    )
    limit = PUBLISHED_IMBALANCE
    for text, worst in (
        ("FCP's imbalance of compute, log-normal, slowest over mean", max(1 / r["balance"] - 1 for r in own)),
        ("FCP's imbalance of communication, busiest link over mean", max(r["traffic"] - 1 for r in own)),
    ):
        made.append(_verdict(text, f"at most {limit:.2f}", worst, max(worst - limit, 0.0), worst <= limit))
    traffic = max(scale[str(size)][MAGI]["traffic"] - 1 for size in inside)
    made.append(claim("MagiAttention's imbalance of communication, at most", PUBLISHED_MAGI_TRAFFIC, traffic))
    document = max(1 - scale[str(size)]["document"]["balance"] for size in inside)
    text = "imbalance of per-document placement, idle share of the slowest's time"
    made.append(claim(text, PUBLISHED_DOCUMENT_IMBALANCE, document))
    return made


def summary(records: list[Record]) -> Record:
    """The result file's figures."""
    scale = {each: _table(records, "scale", each) for each in ("forward", "both")}
    steps = {way: _table(records, "ablation", way) for way in PUBLISHED_ABLATION}
    (workers,) = steps["forward"]["fcp"]
    ablation = {
        way: {kind: by_size[workers] for kind, by_size in found.items()} for way, found in steps.items()
    }
    main = scale["forward"]["log-normal"]
    sensitivity = []
    base_size = str(next(r["key"][3] for r in records if r["key"][0] == "sensitivity"))
    for name in dict.fromkeys(r["key"][1] for r in records if r["key"][0] == "sensitivity"):
        line: Record = {"constant": name}
        for factor, side in ((0.7, "lower"), (1.3, "higher")):
            found = [
                with_oracle(r["found"]["forward"])
                for r in records
                if r["key"][:3] == ["sensitivity", name, factor]
            ]
            results = {kind: mean(each[kind] for each in found) for kind in found[0]}
            line[side] = {"mfu": results["fcp"]["mfu"]} | ratios(results)
        sensitivity.append(line)
    return {
        "scale": scale,
        "ratios": {
            each: {n: {s: ratios(r) for s, r in by_size.items()} for n, by_size in found.items()}
            for each, found in scale.items()
        },
        "breaks": {name: breaks(by_size) for name, by_size in scale["forward"].items()},
        "context": {
            name: next(iter(by_size.values()))
            for name, by_size in _table(records, "context", "forward").items()
        },
        "ablation": {"workers": int(workers), "kinds": ablation},
        "claims": claims(main, {way: found["fcp"] for way, found in ablation.items()}, int(workers)),
        "room": next(iter(_table(records, "room", "forward")["log-normal"].values())),
        "gradients": _table(records, "gradients", "backward")["log-normal"],
        "sensitivity": {
            "workers": int(base_size),
            "base": {"mfu": main[base_size]["fcp"]["mfu"]} | ratios(main[base_size]),
            "constants": sensitivity,
        },
        "stacks": {each: _table(records, "stack", each) for each in scale},
    }
