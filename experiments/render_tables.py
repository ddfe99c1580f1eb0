"""Tables of README.md, docs/ and pallas_kernels/README.md from the JSON in experiments/results/; no figure is typed by hand.

Command: ``python -m experiments.render_tables`` (``--check`` changes nothing and exits with 1 where a table is stale).
A table stands between ``<!-- table: KIND FILE -->`` and ``<!-- end of table -->``; FILE is under experiments/results/.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from experiments import _fcp_aot_table, _fcp_pair_table, _op_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
TABLE = re.compile(r"(<!-- table: (\w+) ([\w.-]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


class TableError(ValueError):
    """A table that cannot be made: an unknown kind, or a file without what the kind needs."""


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]], right: Iterable[int] = ()) -> str:
    """A Markdown table; the columns in ``right`` hold numbers."""
    header, right = list(header), set(right)
    rule = ["---:" if index in right else "---" for index in range(len(header))]
    return "".join(f"| {' | '.join(row)} |\n" for row in [header, rule, *map(list, rows)])


def number(value: float | None, digits: int = 3) -> str:
    """A figure with separators, or a dash where there is none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def quickstart(data: dict[str, Any]) -> str:
    """What ``jaxllm quickstart`` wrote as figures.json."""
    f, machine, versions = data["figures"], data["machine"], data["versions"]
    rivals = [
        ("gzip -9", "gzip"),
        ("xz -9", "xz"),
        ("Kneser-Ney bigram, same tokens", "bigram"),
        ("modified Kneser-Ney trigram, same tokens", "trigram"),
    ]
    rows = [("**this model after training**", f"**{number(f['bits_per_byte_after'])}**", "")]
    rows.append(("the model before training", number(f["bits_per_byte_before"]), ""))
    for label, key in rivals:
        if f"{key}_bits_per_byte" in f:
            rows.append((label, number(f[f"{key}_bits_per_byte"]), "yes" if data[f"beats_{key}"] else "no"))
    rows.sort(key=lambda row: float(row[1].strip("*")))
    text = markdown(["on the validation text", "bits per byte", "beaten"], rows, right=[1])
    speed = [
        ("parameters", number(f["parameters"], 0)),
        ("training time", f"{f['train_seconds'] / 60:.1f} min, {number(f['steps'], 0)} steps"),
        (
            "tokens trained on",
            f"{number(f['train_tokens'], 0)}, {number(f['unique_tokens'], 0)} of them unique",
        ),
        ("compilation, beside the training time", f"{f['compile_seconds']:.1f} s"),
        ("training speed", f"{number(f['tokens_per_second'], 0)} tokens/s"),
    ]
    if f.get("first_token_seconds") is not None:
        speed.append(("prompt to first token", f"{f['first_token_seconds'] * 1e3:.1f} ms"))
    if f.get("decode_tokens_per_second") is not None:
        speed.append(("decoding, one sequence", f"{number(f['decode_tokens_per_second'], 0)} tokens/s"))
    corpus = data["inputs"]["corpus"]
    where = f"{machine['cpu']}, {machine['cores']} cores; Python {versions['python']}, JAX {versions['jax']}; {corpus['name']}"
    return f"{text}\n{markdown(['measured', ''], speed, right=[1])}\nMeasured on: {where}.\n"


def benchmark(data: dict[str, Any]) -> str:
    """What bench/train_generate.py wrote: figures against peers, losses included."""
    lines = []
    for line in data["comparisons"]:
        share = "-" if line["bound_share"] is None else f"{line['bound_share']:.0%}"
        peer = line["peer"] or f"{line['peer_library']}: none"
        lines.append(
            (
                line["model"],
                line["task"],
                "float32" if line["group"] == "fp32" else "best precision",
                number(line["tokens_per_second"], 0),
                peer,
                number(line["peer_tokens_per_second"], 0),
                number(line["ratio"], 2),
                share,
                line["verdict"],
            )
        )
    header = (
        "model",
        "task",
        "compared in",
        "jaxllm tokens/s",
        "peer",
        "its tokens/s",
        "ratio",
        "share of bound",
        "verdict",
    )
    text = markdown(header, lines, right=[3, 5, 6, 7])
    missing = "".join(f" {name} was not measured: {reason}." for name, reason in data["missing"].items())
    threads = data["inputs"]["threads"]
    return f"{text}\nMeasured on: {data['device']['cpu']}, {threads} threads; medians of interleaved runs.{missing}\n"


def kernels(data: dict[str, Any]) -> str:
    """What bench/kernels.py wrote."""
    names = ("forward_tokens_per_s", "forward_backward_tokens_per_s", "forward_bound_tokens_per_s")
    lines = [(r["case"], r["operands"], *(number(r[name], 0) for name in names)) for r in data["results"]]
    header = ("case", "operands", "forward tokens/s", "forward and backward", "matmul bound of forward")
    return f"{markdown(header, lines, right=[2, 3, 4])}\nMeasured on: {data['device']}, JAX {data['jax']}.\n"


def kernels_torch(data: dict[str, Any]) -> str:
    """The part of bench/kernels.py that ran beside torch, losses included."""
    beside = data["beside_torch"]
    if "missing" in beside:
        raise TableError(f"nothing ran beside torch: {beside['missing']}")

    def verdict(ratio: float, aim: float) -> str:
        return "we lose" if ratio < 1 else "below the aim" if ratio < aim else "meets the aim"

    lines = [
        (
            r["case"],
            r["operands"],
            r["mode"],
            *(number(1e3 * r[name], 3) for name in ("seconds", "torch_seconds")),
            number(r["ratio"], 2),
            verdict(r["ratio"], r["aim"]),
        )
        for r in beside["results"]
    ]
    header = (
        "case",
        "operands",
        "pass",
        "ms",
        "torch, ms",
        "torch / ours",
        f"aim {beside['results'][0]['aim']}",
    )
    where = (
        f"{data['device']}, JAX {data['jax']} and torch {beside['torch']}, {beside['threads']} threads each"
    )
    return f"{markdown(header, lines, right=[3, 4, 5])}\nMeasured turn by turn on: {where}.\n"


def compile_time(data: dict[str, Any]) -> str:
    """What bench/compile_time.py wrote."""
    lines = [
        (
            r["preset"],
            r["execution"],
            f"{r['traced_layers']} of {r['layers']}",
            number(r["trace_seconds"], 1),
            number(r["compile_seconds"], 1),
        )
        for r in data["results"]
    ]
    header = ("preset", "layers run", "layers traced", "trace and lower, s", "compile, s")
    inputs, first = data["inputs"], data["results"][0]
    where = f"{first['device']}, JAX {first['jax']}; training step of {inputs['rows']} x {inputs['tokens']} tokens"
    return f"{markdown(header, lines, right=[3, 4])}\nMeasured ahead of time, without weights, on: {where}.\n"


def moe(data: dict[str, Any]) -> str:
    """What bench/moe.py wrote: milliseconds, and this library's time against the others'."""
    names = ("jaxllm", "ragged_dot", "dense", "transformers", "ideal")
    lines = [
        (
            number(r["tokens"], 0),
            number(r["experts"], 0),
            r["mode"],
            *(number(None if n not in r["seconds"] else r["seconds"][n] * 1e3, 2) for n in names),
        )
        for r in data["results"]
    ]
    header = (
        "tokens",
        "experts",
        "pass",
        "jaxllm",
        "`lax.ragged_dot`",
        "every expert",
        "transformers",
        "one product",
    )
    shape = f"width {data['width']}, experts of {data['expert_width']}, top {data['results'][0]['top_k']}, float32"
    where = f"{data['device']}, {data['cores']} cores, JAX {data['jax']}; medians of interleaved runs"
    return f"{markdown(header, lines, right=[0, 1, *range(3, 8)])}\nMilliseconds; {shape}. Measured on: {where}.\n"


def kernels_aot(data: dict[str, Any]) -> str:
    """What bench/kernels_aot.py wrote: one line per kernel, a figure per version of JAX."""
    versions = list(dict.fromkeys(r["jax"] for r in data["results"]))
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for result in data["results"]:
        key = (result["op"], result["case"], result["implementation"])
        seen: dict[str, int] = {}
        if result["error"] is not None:
            found.setdefault((*key, "does not compile", "0"), {})[result["jax"]] = None
        for kernel in result["kernels"]:
            # A program may hold the same kernel twice, for forward and backward.
            index = seen[kernel["name"]] = seen.get(kernel["name"], -1) + 1
            found.setdefault((*key, kernel["name"], str(index)), {})[result["jax"]] = kernel

    def each(figures: dict[str, Any], name: str, unit: int = 1) -> str:
        values = [figures[v] and figures[v][name] for v in versions if v in figures]
        return " / ".join("-" if v is None else f"{v / unit:,.0f}" for v in dict.fromkeys(values))

    lines = [
        (
            *key[:4],
            each(figures, "registers"),
            each(figures, "spill_bytes"),
            each(figures, "shared_bytes", 1024),
            each(figures, "wgmma"),
            each(figures, "tma"),
        )
        for key, figures in found.items()
    ]
    header = ("op", "case", "through", "kernel", "registers", "bytes spilled", "shared KiB", "WGMMA", "TMA")
    absent = "".join(f" jax {version} was left out: {why}." for version, why in data["missing"].items())
    where = f"{data['target']}; jax {' and '.join(versions)}, two figures where they differ"
    return f"{markdown(header, lines, right=range(4, 9))}\nCompiled for {where}.{absent}\n"


def kernel_ops(data: dict[str, Any]) -> str:
    """Every op of pallas_kernels and its kernels, with what bench/kernels_aot.py wrote of them."""
    header = (
        "op",
        "what it is",
        "through",
        "beside the kernel XLA does",
        "compiled for sm_90a",
        "verified on",
    )
    return markdown(header, _op_table.rows(data))


def convert_memory(data: dict[str, Any]) -> str:
    """What bench/convert_memory.py wrote, in MiB above an idle interpreter."""
    mib = lambda size: number(size / 2**20, 0)  # noqa: E731
    known = data["bytes"]
    lines = [
        (r["direction"], *(mib(r["above_idle"][name]) for name in ("RssAnon", "RssFile", "VmHWM")))
        for r in data["results"]
    ]
    header = ("conversion", "own memory, MiB", "mapped files, MiB", "resident at most, MiB")
    sizes = (
        f"{mib(known['model'])} MiB in {known['shards']} shards; largest shard {mib(known['shard'])} MiB, largest layer "
        f"{mib(known['layer'])} MiB, together {mib(known['bound'])} MiB"
    )
    where = f"{data['device']['cpu']}, JAX {data['versions']['jax']}"
    return f"{markdown(header, lines, right=[1, 2, 3])}\nAbove an idle interpreter. Model: {sizes}. Measured on: {where}.\n"


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
    text += _decode_peers(data["peers"]) + _decode_memory(data["curves"], data["prefill"])
    where = f"{data['device']['cpu']}, {data['device']['cores']} cores, JAX {data['versions']['jax']}"
    pools = number(data["pools"]["int4_over_bfloat16"], 2)
    return (
        f"{text}\nAn int4 pool holds {pools} times the tokens of bfloat16 in a byte. Measured on: {where}.\n"
    )


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


def _decode_peers(rows: list[dict[str, Any]]) -> str:
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


KINDS: dict[str, Callable[[dict[str, Any]], str]] = {
    "quickstart": quickstart,
    "benchmark": benchmark,
    "kernels": kernels,
    "compile_time": compile_time,
    "moe": moe,
    "kernels_aot": kernels_aot,
    "kernel_ops": kernel_ops,
    "kernels_torch": kernels_torch,
    "convert_memory": convert_memory,
    "decode": decode,
    "long_context": long_context,
    "retrieval_exact": retrieval_exact,
    "selection_limits": selection_limits,
    "fcp": fcp,
    "fcp_compute": fcp_compute,
    "fcp_pair": fcp_pair,
    "fcp_aot": fcp_aot,
}


def render(kind: str, file: Path) -> str:
    """The text of one table; says so where nothing was measured yet.

    Raises:
        TableError: as the class says.
    """
    if kind not in KINDS:
        raise TableError(f"table kind {kind!r}: known are {', '.join(sorted(KINDS))}")
    if not file.is_file():
        return "Not measured yet.\n"
    try:
        return KINDS[kind](json.loads(file.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError) as error:
        raise TableError(
            f"{file.name}: is no result of kind {kind!r} ({type(error).__name__}: {error})"
        ) from error


def refreshed(text: str, results: Path = RESULTS) -> str:
    """``text`` with every table made anew."""
    return TABLE.sub(lambda m: f"{m[1]}{render(m[2], results / m[3])}{m[5]}", text)


def main(argv: list[str] | None = None) -> int:
    """Refresh or check the pages; the exit code is 1 if ``--check`` found a stale one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 where a table is stale"
    )
    check = parser.parse_args(argv).check
    stale = []
    for page in [
        ROOT / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        ROOT / "pallas_kernels" / "README.md",
    ]:
        before = page.read_text(encoding="utf-8")
        after = refreshed(before)
        if after != before:
            stale.append(page.relative_to(ROOT).as_posix())
            if not check:
                page.write_text(after, encoding="utf-8")
    print(
        f"{'stale' if check else 'refreshed'}: {', '.join(stale)}" if stale else "all tables are up to date"
    )
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
