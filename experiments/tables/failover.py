"""Tables of failover."""

from typing import Any

from experiments.tables.text import markdown, number


def failover_simulator(data: dict[str, Any]) -> str:
    """What ``experiments.failover_simulator`` simulated, beside the paper's figures."""
    parts = [
        _grid(data),
        _claims(data),
        _ratios(data),
        _sensitivity(data),
        _rates(data),
        _models(data),
        _scale(data),
    ]
    free = markdown(
        ("free parameter", "here", "where from"),
        [(each["parameter"], each["value"], each["source"]) for each in data["free"]],
    )
    return "\n".join([*parts, free])


def _drop(found: dict[str, float], digits: int = 1) -> str:
    return f"{number(found['drop'], digits)} ± {number(found['error'], digits)}"


def _grid(data: dict[str, Any]) -> str:
    rows = [row for row in data["grid"] if row["size"] == "7B"]
    micro = list(dict.fromkeys(row["micro"] for row in rows))
    lines = [
        (
            f"{stages} stages, {schedule}",
            *(_drop(row["MeCeFO"]) for row in rows if (row["stages"], row["schedule"]) == (stages, schedule)),
        )
        for stages, schedule in dict.fromkeys((row["stages"], row["schedule"]) for row in rows)
    ]
    header = ["MeCeFO 7B, drop in %, micro-batches:", *(number(m, 0) for m in micro)]
    return markdown(header, lines, right=range(1, len(header)))


def _claims(data: dict[str, Any]) -> str:
    grids = list(dict.fromkeys((each["stages"], each["schedule"]) for each in data["claims"]))
    lines = []
    for claim in dict.fromkeys(each["claim"] for each in data["claims"]):
        found = {(e["stages"], e["schedule"]): e for e in data["claims"] if e["claim"] == claim}
        cells = []
        for each in (found[at] for at in grids):
            few_many, low, high = each["between"], each["lowest"], each["highest"]
            cells.append(
                f"M = {few_many[0]} to {few_many[1]}"
                if few_many
                else f"no: {number(low, 1)} to {number(high, 1)}"
            )
        lines.append((claim, number(found[grids[0]]["published"], 2), *cells))
    header = [
        "published drop, %, comes out at",
        "",
        *(f"{stages} stages, {schedule}" for stages, schedule in grids),
    ]
    return markdown(header, lines, right=[1])


def _ratios(data: dict[str, Any]) -> str:
    """Rows nearest to the published drop of MeCeFO, by stages and schedule."""
    drop = data["published"]["7B"]["drops"][2]
    lines = []
    for key in dict.fromkeys((each["stages"], each["schedule"]) for each in data["ratios"]):
        each = min(
            (r for r in data["ratios"] if (r["stages"], r["schedule"]) == key),
            key=lambda r: abs(r["mecefo"] - drop),
        )
        lines.append(
            (
                f"{key[0]} stages, {key[1]}, M = {each['micro']}",
                number(each["mecefo"], 1),
                number(each["bamboo"], 1),
                number(each["oobleck"], 1),
            )
        )
    bamboo, oobleck, mecefo = data["published"]["7B"]["drops"]
    lines.append(("published", number(mecefo, 1), number(bamboo / mecefo, 1), number(oobleck / mecefo, 1)))
    header = (
        "7B, where MeCeFO's drop is nearest to the published one",
        "drop, %",
        "Bamboo's over it",
        "Oobleck's over it",
    )
    return markdown(header, lines, right=[1, 2, 3])


def _sensitivity(data: dict[str, Any]) -> str:
    base = data["inputs"]["base"]
    lines = [
        (
            each["change"],
            _drop(each, 2),
            number(each["dropped"], 2),
            number(100 * each["touched"], 0),
        )
        for each in data["sensitivity"]
    ]
    title = f"MeCeFO 7B, high rate, {base['stages']} stages, M = {base['micro']}, {base['schedule']}, but"
    return markdown((title, "drop, %", "of it replicas dropped", "tokens touched, %"), lines, right=[1, 2, 3])


def _rates(data: dict[str, Any]) -> str:
    lines = [(f"{each['system']}, {each['rate']}", *_columns(each)) for each in data["rates"]]
    return markdown(("7B, 32 workers", *_COLUMNS), lines, right=range(1, 8))


def _models(data: dict[str, Any]) -> str:
    lines = []
    for each in data["models"]:
        by_letter = ", ".join(f"{name} {100 * share:.0f}" for name, share in each["shares"].items())
        lines.append(
            (
                each["model"],
                by_letter,
                each["skips"] or "nothing",
                number(each["pair"], 2),
                *(_drop(each[f"micro {micro}"]) for micro in (4, 8, 32)),
            )
        )
    header = ("model", "forward FLOPs, %", "skips", "c", "drop at M = 4, %", "M = 8", "M = 32")
    return markdown(header, lines, right=[3, 4, 5, 6])


def _scale(data: dict[str, Any]) -> str:
    lines = [
        (
            f"{number(each['workers'], 0)}, {each['rate']}",
            number(each["down"], 0),
            each["system"],
            *_columns(each),
        )
        for each in data["scale"]
    ]
    return markdown(("workers, high rate", "down", "system", *_COLUMNS), lines, right=[1, *range(3, 10)])


_COLUMNS = ("drop, %", "healthy", "throughput", "goodput", "restarts, %", "dropped, %", "touched, %")


def _columns(each: dict[str, Any]) -> list[str]:
    again = sum(each["lost"].get(kind, 0.0) for kind in ("redone", "aborted", "pause", "save"))
    return [
        _drop(each),
        *(number(each[key], 2) for key in ("healthy", "throughput", "goodput")),
        number(again, 1),
        number(each["lost"].get("dropped", 0.0), 1),
        number(100 * each["touched"], 0),
    ]


NAMES = {"undisturbed": "undisturbed", "mecefo": "MeCeFO", "restart": "checkpoint-restart"}


def failover(data: dict[str, Any]) -> str:
    """What ``experiments.failover`` did to real processes."""
    lines = [
        (
            each["kind"],
            number(each["worker"], 0),
            number(each["step"], 0),
            *(_seconds(each[key]) for key in ("detection", "recovery", "readmission")),
            number(each["survivor_steps"], 0),
        )
        for each in data["failures"]
    ]
    header = (
        "failure",
        "worker",
        "in step",
        "noticed, s",
        "others go on, s",
        "back, s",
        "their steps till then",
    )
    runs = [
        (
            NAMES[name],
            number(run["seconds"], 1),
            number(run["lost_seconds"], 1) if "lost_seconds" in run else "",
            number(run["validation_loss"], 4),
            number(run["samples"]["again"], 0) if name != "restart" else "",
        )
        for name, run in data["runs"].items()
    ]
    table = markdown(
        ("run", "first to last step, s", "lost, s", "validation loss", "steps made twice"),
        runs,
        right=[1, 2, 3, 4],
    )
    restart = data["runs"].get("restart", {})
    if "checkpoints_apart" in restart:
        table += (
            f"\nA restart takes {number(restart['restart_seconds'], 1)} s and the steps since the newest checkpoint, which were "
            f"written every {data['inputs']['save_every']} steps; from {number(restart['checkpoints_apart'], 0)} steps between "
            "them on as many restarts lose more than MeCeFO did.\n"
        )
    held = markdown(
        ("property", ""), [(name, "yes" if is_so else "NO") for name, is_so in data["held"].items()]
    )
    load = ", ".join(number(each, 1) for each in data["load"]["average"])
    said = (
        f"{data['date'][:10]}, seed {data['seed']}, {data['machine']['cpu']}, {data['load']['cores']} cores; load average "
        f"before and after the runs: {load}.\n"
    )
    return "\n".join([markdown(header, lines, right=range(1, 7)), table, held, said])


def _seconds(value: float | None) -> str:
    return "never" if value is None else number(value, 2)
