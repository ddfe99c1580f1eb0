"""Accuracy, perplexity and divergence from dense attention against budget, for every cache policy and dtype.

Command:  python -m experiments.long_context [--model FOLDER] [--quick | --full] [--out FILE]
          Without a folder: a retrieval model by construction, and the trained models of experiments/checkpoints that
          are there (not with --quick).
Time:     all three models about 100 minutes of one core (the one by construction 35, attention 25, the hybrid 40), --quick
          half a minute. Compiling is half of that; programs are kept (runs/long_context/programs) for a restart. It
          takes up where it stopped (runs/long_context), and --report shows what there is by then.
Expected: dense attention answers everything; what evicts forgets what is asked later, and answers about as often as its
          budget is large; what selects by the question finds more.

A context is read by a dense prefill. The question is read token by token after it, with the policy at work, and then the
answer is chosen greedily and compared token by token. A task counts at a budget only where dense attention answers at
least 90 % and the last tokens alone, as many as the budget has, at most 50 %. Perplexity and divergence (KL, dense to
policy) are those of the answer's tokens, given the right ones before; of text its next 128 tokens. "read" is what
attention read in those steps of everything that came before, recall the share of the true attention on it. What evicts
has no recall here, and gets its budget as memory: buffers are part of it.
"""

import argparse
import datetime
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import Progress, TaskID

from experiments._long_context_cases import Variant, held_bytes, urgent, variants
from experiments._long_context_data import Job, built_jobs, fingerprint, trained_jobs
from experiments._long_context_report import draw, show
from experiments._long_context_steps import Begun, Reader, compiled_quickly
from experiments._long_context_verdicts import (
    LEAST_DENSE,
    TEXT,
    Figures,
    aggregated,
    left_out,
    verdicts,
)
from experiments._retrieval_model import TokenSample, retrieval_model
from jaxllm import H2O
from jaxllm.cli import machine
from jaxllm.cli.model_parts import parameter_count
from jaxllm.generation.folders import load
from jaxllm.model.functional import LanguageModel

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
SHIPPED = ROOT / "experiments" / "checkpoints"
BUILT = "by construction"
# Changes where old records no longer fit what is measured.
_RECIPE = 1


def measure(
    reader: Reader, begun: Begun, variant: Variant, sample: TokenSample, reference: list[np.ndarray] | None
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """One line on one sample, and the log-probabilities of its answers' tokens, f32[n, V] each.

    Args:
        reader: the model.
        begun: the context, in the line's dtype.
        variant: the line.
        sample: what is asked.
        reference: those log-probabilities of dense attention; None: this is it.
    """
    cache, at = reader.end(begun, variant.made), len(sample.context)
    if sample.lead:
        _, cache = reader.follow(cache, sample.lead, at)
        at += len(sample.lead)
    found, right = [], 0
    losses, divergences, reads, recalls = [], [], [], []
    for number, (question, answer, graded) in enumerate(sample.questions):
        steps, _ = reader.follow(cache, [*question, *answer[:-1]], at, keep=True)
        told = steps.logprobs[len(question) - 1 :]
        best = steps.tokens[len(question) - 1 :].tolist()
        if len(graded) < len(answer):
            # On its own way it may come to the right end after other steps.
            free, _ = reader.follow(cache, question, at, len(answer), keep=True)
            best = free.tokens[-len(answer) :].tolist()
        right += best[-len(graded) :] == graded
        losses.append(-np.mean(told[np.arange(len(answer)), answer]))
        wanted = told if reference is None else reference[number]
        divergences.append(np.mean(np.sum(np.exp(wanted) * (wanted - told), axis=1)))
        before = at + 1 + np.arange(len(steps.tokens))
        reads.append(np.mean(steps.read / before[:, None, None], axis=0))
        recalls.append(np.mean(steps.recall))
        found.append(told)
    record = {
        "asked": len(sample.questions),
        "right": int(right),
        "nll": float(np.mean(losses)),
        "kl": float(np.mean(divergences)),
        "read_by_head": np.mean(reads, axis=0).tolist(),
        "recall": float(np.mean(recalls)),
        "held_bytes": held_bytes(reader.cfg, variant, len(sample.context), more_tokens(sample)),
    }
    return record, found


def more_tokens(sample: TokenSample) -> int:
    """Tokens that come after the context, at most."""
    return len(sample.lead) + max(len(question) + len(answer) for question, answer, _ in sample.questions)


def run(
    reader: Reader, jobs: list[Job], records: list[dict[str, Any]], progress: Progress
) -> Iterator[dict[str, Any]]:
    """Records of everything in ``jobs`` that is not among ``records`` yet, as they come.

    Dense attention is asked about all samples first: of a task that it cannot do nothing else is measured. Then come the
    urgent lines of all samples.
    """
    sizes = {job: variants(job.grid, _tokens(job), reader.layers) for job in jobs}
    done = {key_of(record) for record in records}
    told = list(records)
    bar = progress.add_task("", total=sum(job.samples * len(sizes[job]) for job in jobs))
    for job in jobs:
        lines = sizes[job]
        first, rest = ([v for v in lines[1:] if urgent(v) == now] for now in (True, False))
        # One sample is measured at once: its prefill serves all lines.
        for wanted in [lines] if job.samples == 1 else [lines[:1], first, rest]:
            for number in range(job.samples):
                if hopeless(told, job):
                    break
                missing = [v for v in wanted if (job.task, job.length, number, *v.key) not in done]
                progress.advance(bar, len(wanted) - len(missing))
                if not missing:
                    continue
                for record in _one_sample(reader, job, number, lines[0], missing, progress, bar):
                    told.append(record)
                    yield record
                    progress.advance(bar)
                    if hopeless(told, job):
                        break
        jax.clear_caches()


def _one_sample(
    reader: Reader,
    job: Job,
    number: int,
    first: Variant,
    missing: list[Variant],
    progress: Progress,
    bar: TaskID,
) -> Iterator[dict[str, Any]]:
    """Records of the ``missing`` lines on one sample; ``first`` is dense, which the others are held against."""
    sample, reference = job.make(number), None
    begun: dict[tuple[str, bool], Begun] = {}
    for variant in [first, *(v for v in missing if v is not first)]:
        name = (
            f"{job.task} {job.length:,} #{number + 1}: {variant.policy} {variant.setting:.3g} {variant.dtype}"
        )
        progress.update(bar, description=name)
        kind = variant.dtype, isinstance(variant.made, H2O)
        if kind not in begun:
            # Long contexts are large: of the dtypes one at a time.
            begun = {old: value for old, value in begun.items() if old[0] == variant.dtype}
            begun[kind] = reader.begin(sample.context, kind[0], more_tokens(sample), sums=kind[1])
        record, told = measure(reader, begun[kind], variant, sample, reference)
        reference = told if reference is None else reference
        if variant not in missing:
            continue
        if job.task == TEXT:
            record["right"] = None
        place = {"task": job.task, "length": job.length, "sample": number}
        yield place | {"policy": variant.policy, "setting": variant.setting, "dtype": variant.dtype} | record
        if job.samples == 1:
            # Nobody runs its programs again, and those of all lines together take gigabytes.
            jax.clear_caches()


def hopeless(records: list[dict[str, Any]], job: Job) -> bool:
    """Whether dense attention misses too many of a job's answers to be counted, whatever comes of the samples left."""
    dense = [
        r
        for r in records
        if (r["task"], r["length"], r["policy"], r["dtype"]) == (job.task, job.length, "dense", "compute")
    ]
    if job.task == TEXT or not dense:
        return False
    wrong = sum(r["asked"] - r["right"] for r in dense)
    total = job.samples * dense[0]["asked"]
    return (total - wrong) / total < LEAST_DENSE


def whole(records: list[dict[str, Any]], jobs: list[Job]) -> list[dict[str, Any]]:
    """Records of the lines that were measured on all samples of their job, and of what dense attention cannot do."""
    found = []
    for job in jobs:
        mine = [r for r in records if (r["task"], r["length"]) == (job.task, job.length)]
        counts = Counter((r["policy"], r["setting"], r["dtype"]) for r in mine)
        least = 1 if hopeless(mine, job) else job.samples
        found += [r for r in mine if counts[r["policy"], r["setting"], r["dtype"]] >= least]
    return found


def _tokens(job: Job) -> int:
    """Of a job's whole sequence, which budgets are fractions of: that of its first sample."""
    sample = job.make(0)
    return len(sample.context) + more_tokens(sample)


def key_of(record: dict[str, Any]) -> tuple[Any, ...]:
    """What tells a record from the others of its model."""
    return tuple(record[name] for name in ("task", "length", "sample", "policy", "setting", "dtype"))


def model_report(
    name: str, model: LanguageModel, grid: str, folder: Path, progress: Progress | None
) -> dict[str, Any]:
    """Everything about one model: what is missing is measured, and noted down line by line in ``folder``.

    Without ``progress`` nothing is measured: it is about what there is.
    """
    jobs = built_jobs(grid) if name == BUILT else trained_jobs(model, grid)
    file = folder / f"{name.replace(' ', '-')}-{fingerprint(model)}-{_RECIPE}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    # The last line of a run that was killed may be half a line.
    records = [json.loads(line) for line in lines if line.endswith("}")]
    if progress is not None:
        with file.open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(record) + "\n" for record in records)
            out.flush()
            for record in run(Reader(model), jobs, records, progress):
                out.write(json.dumps(record) + "\n")
                out.flush()
                records.append(record)
    layers, measured = model.cfg.pattern.count("*"), {key_of(record) for record in records}
    planned: set[tuple[Any, ...]] = set()
    for job in jobs:
        named = variants(job.grid, _tokens(job), layers)
        keys = {(job.task, job.length, number, *v.key) for v in named for number in range(job.samples)}
        planned |= keys & measured if hopeless(records, job) else keys
    figures = Figures(aggregated(whole(records, jobs)))
    for row in figures.rows:
        row["counted"] = figures.counts(row)
    return {
        "pattern": model.cfg.pattern,
        "parameters": parameter_count(model.cfg),
        "rows": figures.rows,
        "planned": len(planned),
        "missing": len(planned - measured),
        "left_out": left_out(figures),
        "verdicts": verdicts(figures),
    }


def models(folder: Path | None, shipped: bool) -> Iterator[tuple[str, LanguageModel]]:
    """Names and models: that of ``folder``, or the built one and, if asked for, those that are shipped."""
    if folder is not None:
        yield folder.name, load(folder)
        return
    yield BUILT, retrieval_model()
    for place in sorted(SHIPPED.glob("*/config.json")) if shipped else ():
        yield place.parent.name, load(place.parent)


def main(argv: list[str] | None = None) -> int:
    """Measure what is missing, write and draw; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, help="a folder that jaxllm.load takes; its tokenizer reads the tasks"
    )
    grids = parser.add_mutually_exclusive_group()
    grids.add_argument(
        "--quick", action="store_true", help="short contexts and few lines; no result file but --out"
    )
    grids.add_argument("--full", action="store_true", help="all budgets, dtypes and lengths")
    parser.add_argument("--report", action="store_true", help="measure nothing; write and draw what there is")
    parser.add_argument("--runs", type=Path, help="where finished lines are kept (runs/long_context)")
    parser.add_argument("--out", type=Path, help="the result file (experiments/results/long_context.json)")
    options = parser.parse_args(argv)
    grid = "quick" if options.quick else "full" if options.full else "default"
    runs = options.runs or ROOT / "runs" / ("long_context_quick" if options.quick else "long_context")
    out = options.out or (runs if options.quick else RESULTS) / "long_context.json"
    if jax.config.jax_compilation_cache_dir is None:
        # Every line has programs of its own: a run that goes on has them already.
        jax.config.update("jax_compilation_cache_dir", str(runs / "programs"))
    found: dict[str, Any] = {}
    if out.is_file():
        found = json.loads(out.read_text(encoding="utf-8"))["models"]
    with Progress() as progress, compiled_quickly(options.quick):
        for name, model in models(options.model, shipped=not options.quick):
            bar = None if options.report else progress
            found[name] = model_report(name, model, grid, runs, bar) | {"grid": grid}
            write(out, found)
    show(found)
    draw(out.with_suffix(".png"), found)
    return 0


def write(out: Path, found: dict[str, Any]) -> None:
    """The result file."""
    report = {
        "command": "python -m experiments.long_context",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "inputs": {"protocol": "dense prefill, then token by token", "text": "stdlib"},
        "versions": machine.versions(),
        "device": machine.describe(),
        "models": found,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(_rounded(report), indent=1) + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    """``value`` with floats of six digits."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
