"""Tables of cache policies and dtypes."""

from typing import Any

from experiments.tables.text import markdown, number


def decode(data: dict[str, Any]) -> str:
    """What ``experiments.bench.decode`` wrote."""
    lines = [
        (
            number(r["context"], 0),
            r["policy"],
            r["dtype"],
            *(number(r[key], 2) for key in ("ms_per_token", "dense_ms_per_token", "bound_ms_per_token")),
            *(number(r[key] / 1e6, 1) for key in ("bytes_per_step", "held_bytes")),
            f"{r['selected']:.1%}",
        )
        for r in sorted(data["model"], key=lambda r: (r["context"], r["dtype"]))
    ]
    header = ("context", "policy", "keys", "ms/token", "dense", "bound", "MB/step", "MB held", "selected")
    text = markdown(header, lines, right=[0, *range(3, 9)])
    for r in data["layers"]:
        faster = ", ".join(f"{name} {value:.1f}" for name, value in r["speedup"].items())
        share = ", ".join(f"{name} {value:.0%}" for name, value in r["select_share"].items())
        text += f"\nAttention alone at {number(r['context'], 0)}, times as fast as dense: {faster}; selecting takes {share} of dense.\n"
    text += decode_peers(data["peers"]) + _decode_memory(data["curves"], data["prefill"])
    pools = number(data["pools"]["int4_over_bfloat16"], 2)
    where = "; ".join(_measured(data, cpu) for cpu in data["machines"])
    return (
        f"{text}\nAn int4 pool holds {pools} times the tokens of bfloat16 in a byte. Measured on: {where}.\n"
    )


def _measured(data: dict[str, Any], cpu: str) -> str:
    """A machine, and which rows are its own where there are several."""
    told = data["machines"][cpu]
    text = f"{cpu}, {told['device']['cores']} cores, JAX {told['versions']['jax']}"
    if len(data["machines"]) == 1:
        return text
    kinds = {
        "model": ("steps", "context"),
        "layers": ("attention alone", "context"),
        "peers": ("transformers' caches", "context"),
        "curves": ("long texts", "new_tokens"),
        "prefill": ("prompts", "length"),
    }
    parts = []
    for kind, (name, size) in kinds.items():
        sizes = sorted({row[size] for row in data[kind] if row["cpu"] == cpu})
        if sizes:
            parts.append(f"{name} of {', '.join(number(each, 0) for each in sizes)}")
    return f"{text} ({'; '.join(parts)})"


def decode_peers(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    rows = sorted(rows, key=lambda row: row["context"])
    names = list(dict.fromkeys(name for row in rows for name in (*row["ms_per_token"], *row["missing"])))
    lines = [[name, *(number(row["ms_per_token"].get(name), 1) for row in rows)] for name in names]
    header = ["ms/token", *(f"{row['context']:,}" for row in rows)]
    reasons = dict(sorted({name: why for row in rows for name, why in row["missing"].items()}.items()))
    notes = "".join(f"Not measured: {name}, {why.rstrip('.')}.\n" for name, why in reasons.items())
    return f"\n{markdown(header, lines, right=range(1, len(header)))}" + (f"\n{notes}" if notes else "")


def _decode_memory(curves: list[dict[str, Any]], prefill: list[dict[str, Any]]) -> str:
    mib = lambda value: number(value / 2**20, 0)  # noqa: E731
    text = ""
    for row in curves:
        lines = [
            (
                name,
                *(number(t[k], 0) for k in ("length", "most_stored")),
                mib(t["held_bytes"]),
                mib(t["peak_bytes"]),
            )
            for name, curve in row["curves"].items()
            for t in curve["texts"]
        ]
        header = ("policy", "tokens of the text", "stored at most", "MiB held", "peak MiB of the process")
        text += f"\n{markdown(header, lines, right=range(1, 5))}"
    if prefill:
        lines = [
            (number(r["length"], 0), mib(r["peak_bytes"])) for r in sorted(prefill, key=lambda r: r["length"])
        ]
        text += f"\n{markdown(('prompt, tokens', 'peak MiB of the process'), lines, right=(0, 1))}"
    return text


def long_context(data: dict[str, Any]) -> str:
    """What ``experiments.long_context`` wrote: what each policy got at each budget, and the verdicts."""
    text = ""
    for name, model in data["models"].items():
        rows = [r for r in model["rows"] if r["dtype"] == "compute"]
        budgets = sorted({r["setting"] for r in rows if r["policy"] != "tactic"})
        label = lambda b: "1" if b == 1 else f"1/{round(1 / b)}"  # noqa: E731
        lines = []
        for task, length, policy in dict.fromkeys((r["task"], r["length"], r["policy"]) for r in rows):
            mine = [r for r in rows if (r["task"], r["length"], r["policy"]) == (task, length, policy)]
            first = (f"{task}, {number(length, 0)}", policy)
            if policy == "tactic":
                # Its budget is an outcome: what it reads stands beside what it gets.
                told = (f"{_got(r)} at {r['read']:.1%}" for r in mine if r["setting"] < 1)
                lines.append((*first, "; ".join(told), *[""] * (len(budgets) - 1)))
            else:
                at = {r["setting"]: r for r in mine}
                lines.append((*first, *(_got(at[b]) if b in at else "" for b in budgets)))
        header = ("task, tokens", "policy", *map(label, budgets))
        text += f"Model: {name}, {number(model['parameters'], 0)} parameters.\n\n{markdown(header, lines)}\n"
        if model["missing"]:
            text += f"Of {model['planned']} lines {model['missing']} have not been measured yet.\n\n"
        text += markdown(("claim", "here"), ((v["claim"], v["verdict"]) for v in model["verdicts"])) + "\n"
    where = f"{data['device']['cpu']}, JAX {data['versions']['jax']}"
    return (
        f"{text}Answers right (of text, perplexity) at a fraction of the tokens; in brackets where a task is not counted, "
        f"since the last tokens alone solve it. Computed on: {where}.\n"
    )


def _got(row: dict[str, Any]) -> str:
    text = f"{row['perplexity']:.3f}" if row["accuracy"] is None else f"{row['accuracy']:.0%}"
    return text if row["counted"] else f"({text})"


def retrieval_exact(data: dict[str, Any]) -> str:
    """What ``experiments.retrieval_exact`` wrote."""
    lines = [
        (
            number(r["length"], 0),
            f"{r['right']} of {r['asked']}",
            f"{r['least_probability']:.3f}",
            f"{r['depths'][0]:.0%} to {r['depths'][1]:.0%}",
        )
        for r in data["rows"]
    ]
    header = ("context, tokens", "right", "least probability of a right answer", "depths")
    where = f"{data['device']['cpu']}, JAX {data['versions']['jax']}"
    return f"{markdown(header, lines, right=[0, 1, 2])}\nDense attention, float32. Computed on: {where}.\n"


def selection_limits(data: dict[str, Any]) -> str:
    """What ``experiments.selection_limits`` wrote."""
    share = lambda value: "" if value is None else f"{value:.0%}"  # noqa: E731
    lines = [
        (
            r["case"],
            number(r["page"], 0),
            " and ".join(share(each) for each in r["page_read"]),
            share(r["accuracy"]),
        )
        for r in data["pages"]
    ]
    header = ("Quest at 1/16", "page", "page of the answer read, by KV head", "right")
    text = markdown(header, lines, right=[1])
    names = ("own", "earlier", "pillar", "quest", "last")
    lines = [(r["model"], str(r["layer"]), *(f"{r[name]:.1%}" for name in names)) for r in data["steps"]]
    header = (
        "model",
        "layer",
        "chosen by the step itself",
        "by one of the 7 steps before",
        "Pillar",
        "Quest",
        "last tokens",
    )
    inputs = data["inputs"]
    where = f"{data['device']['cpu']}, JAX {data['versions']['jax']}"
    return (
        f"{text}\n{markdown(header, lines, right=range(2, 7))}\nAbove: {number(inputs['context'], 0)} tokens, "
        f"{inputs['questions']} questions. Below: share of the true attention on a sixteenth of "
        f"{number(inputs['text'], 0)} tokens, mean of {inputs['steps']} steps. Computed on: {where}.\n"
    )
