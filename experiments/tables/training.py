"""Tables of training, of models beside their peers, and of what comes before and after."""

from typing import Any

from experiments.tables.text import markdown, number


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


def ssd_memory(data: dict[str, Any]) -> str:
    """What bench/ssd_memory.py wrote, in MiB beside inputs and outputs."""
    mib = lambda size: "not run" if size is None else number(size / 2**20, 0)  # noqa: E731
    names = ("inputs", "outputs", "chunk_states", "temporaries", "extra")
    lines = [
        # A file from before there were two layers names none.
        (r.get("op", "ssd"), r["form"], number(r["tokens"], 0), *(mib(r[name]) for name in names))
        for r in data["results"]
    ]
    header = (
        "op",
        "form",
        "tokens",
        "inputs",
        "outputs",
        "states of all chunks",
        "temporaries",
        "extra, measured",
    )
    i = data["inputs"]
    what = f"{i['heads']} heads, {i['groups']} group, P {i['P']}, N {i['N']}, float32; stretches of {i['stretch']} tokens"
    where = f"{data['device']['cpu']}, JAX {data['versions']['jax']}"
    return f"{markdown(header, lines, right=[2, 3, 4, 5, 6, 7])}\nMiB. {what}. Measured on: {where}.\n"
