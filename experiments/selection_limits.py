"""Why Quest misses answers of the retrieval model by construction, and why Pillar's list is out of date there.

Command:  python -m experiments.selection_limits [--quick] [--out FILE]
Time:     not taken on idle cores; 3 minutes of one core, compilation included.
Expected: where the keys of a page resemble each other its box tells what is in it, and where they are unlike it hardly
          does; what one step looks at says much of what the next ones look at in text, and nothing in a list of questions.

Pages: of every question and KV head of the matching layer, whether Quest reads the page with the answer in the step that
needs it, and how many answers come out right, at a sixteenth of the tokens. "Random keys" is the same without a model:
unit vectors of the size of its codes. Steps: the share of a step's true attention on as many tokens, chosen by that step
itself, by an earlier step (with everything that came since), or by a policy at work, of which Pillar only between its
steps of full attention, and the last tokens alone.
"""

import argparse
import datetime
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments import _retrieval_model as built
from experiments._long_context_steps import PAGE, Begun, Reader, compiled_quickly
from experiments._retrieval_model import TokenSample
from experiments.attention_map import Log, probabilities, text_of, watched
from experiments.long_context import ROOT, SHIPPED, more_tokens
from jaxllm import Pillar, Policy, Quest
from jaxllm.cli import machine
from jaxllm.generation.folders import load

OUT = ROOT / "experiments" / "results" / "selection_limits.json"
BUDGET = 1 / 16
# Context and questions of the pages, context and steps of the drift.
SIZES = {"quick": (512, 4, 256, 16), "default": (8192, 24, 1024, 64)}


@dataclass(frozen=True)
class Case:
    """A way to cut or to score pages.

    Attributes:
        name: its line.
        page: tokens of a page.
        scorer: of Quest.
        dense_layers: of Quest.
        runs: the filler repeats itself, so that keys of a page resemble each other.
    """

    name: str
    page: int = 16
    scorer: str = "minmax"
    dense_layers: tuple[int, ...] = ()
    runs: bool = False


CASES = (
    Case("as in the table"),
    Case("first layer dense", dense_layers=(0,)),
    Case("pages of 4 tokens", page=4),
    Case("mean key instead of the box", scorer="mean"),
    Case("filler in runs of one token", runs=True),
)


def in_runs(sample: TokenSample, size: int) -> TokenSample:
    """``sample`` with the filler of its context repeated: ``size`` tokens of one kind, then of another."""
    text = np.array(sample.context)
    first = text[np.arange(len(text)) // size * size]
    filler = np.where(first >= built.FIRST_FILLER, first, built.FIRST_FILLER)
    return replace(sample, context=np.where(text >= built.FIRST_FILLER, filler, text).tolist())


def pages(reader: Reader, sample: TokenSample, case: Case) -> dict[str, Any]:
    """How often Quest reads the page with the answer, by KV head, and how often the answer is right."""
    sample = in_runs(sample, case.page) if case.runs else sample
    quest = Quest(budget=BUDGET, scorer=case.scorer, dense_layers=case.dense_layers)
    begun = reader.begin(
        sample.context,
        "compute",
        more_tokens(sample),
        page=case.page,
        scorer=case.scorer,
        chunk=len(sample.context),
    )
    log, last = Log(), reader.layers - 1
    policy = Policy(overrides=(*((n, quest.at(n)) for n in range(last)), (last, watched(quest, log))))
    cache, at, found = reader.end(begun, policy), len(sample.context), []
    right = 0
    for question, answer, _ in sample.questions:
        _, before = reader.follow(cache, question[:-1], at, keep=True)
        log.take()
        step, _ = reader.follow(before, question[-1:], at + len(question) - 1)
        right += step.tokens.tolist() == answer
        logical, count, _ = log.take()["select"]
        # The matching layer's key of a value is the code of what stands before it.
        wanted = (sample.context.index(question[-1]) + 1) // case.page
        found.append([wanted in each[:n] for each, n in zip(logical, count)])
    return {
        "case": case.name,
        "page": case.page,
        "page_read": np.mean(found, axis=0).tolist(),
        "accuracy": right / len(sample.questions),
    }


def random_keys(tokens: int, page: int, draws: int = 400, seed: int = 0) -> dict[str, Any]:
    """The same for unit keys without structure, of which one is the query itself."""
    rng, number = np.random.default_rng(seed), tokens // page
    read = max(int(np.ceil(BUDGET * (number + 1))), 3) - 1
    hits, slack = 0, []
    for _ in range(draws):
        keys = rng.standard_normal((number, page, built.PART)).astype(np.float32)
        keys /= np.linalg.norm(keys, axis=2, keepdims=True)
        query = keys[0, 0]
        low, high = keys.min(axis=1), keys.max(axis=1)
        bounds = np.maximum(query * low, query * high).sum(axis=1)
        hits += int(np.sum(bounds > bounds[0]) < read)
        slack.append(np.median(bounds[1:] / (keys[1:] @ query).max(axis=1)))
    return {
        "case": "random keys",
        "page": page,
        "page_read": [hits / draws],
        "accuracy": None,
        "bound_over_best": float(np.mean(slack)),
    }


def _best(mass: np.ndarray, stored: int, count: int) -> np.ndarray:
    """Which tokens of [K, L] hold the most of each KV head's probability."""
    chosen = np.zeros(mass.shape, bool)
    top = np.argsort(-mass[:, :stored], axis=1, kind="stable")[:, :count]
    np.put_along_axis(chosen, top, True, axis=1)
    return chosen


def drift(mass: np.ndarray, context: int, period: int = 8) -> dict[str, float]:
    """What choices of a sixteenth hold of a layer's probability, f32[steps, K, L].

    Returns:
        ``own``: chosen by the step itself; ``earlier``: by one to ``period - 1`` steps before, on average, with all that
        came since, and as many tokens in all; ``last``: the last tokens.
    """
    own, earlier, last = [], [], []
    for step, here in enumerate(mass):
        stored = context + step + 1
        count = int(np.ceil(BUDGET * stored))
        own.append(here[_best(here, stored, count)].sum() / len(here))
        last.append(here[:, stored - count : stored].sum() / len(here))
        for lag in range(1, min(period, step + 1)):
            chosen = _best(mass[step - lag], stored - lag, count - lag)
            chosen[:, stored - lag : stored] = True
            earlier.append(here[chosen].sum() / len(here))
    return {name: float(np.mean(each)) for name, each in (("own", own), ("earlier", earlier), ("last", last))}


def masses(reader: Reader, begun: Begun, context: list[int], given: list[int]) -> np.ndarray:
    """Dense attention's probabilities, f32[layers, steps, K, tokens]."""
    logs = [Log() for _ in range(reader.layers)]
    cache = reader.end(begun, Policy(overrides=tuple((n, probabilities(log)) for n, log in enumerate(logs))))
    found, size = [], len(context) + len(given)
    for step, token in enumerate(given):
        _, cache = reader.follow(cache, [token], len(context) + step)
        found.append([log.take()["mass"][0][:, :size] for log in logs])
    return np.moveaxis(np.array(found), 1, 0)


def steps(name: str, reader: Reader, context: list[int], given: list[int]) -> Iterator[dict[str, Any]]:
    """A line for every attention layer of a model on one text."""
    recalls: dict[str, np.ndarray] = {}
    reads: dict[str, np.ndarray] = {}
    begun = reader.begin(context, "compute", len(given), chunk=len(context))
    for label, policy in (
        ("quest", Quest(budget=BUDGET, dense_layers=())),
        ("pillar", Pillar(budget=BUDGET, least=PAGE)),
    ):
        found, _ = reader.follow(reader.end(begun, policy), given, len(context))
        between = (found.read < found.stored).all(axis=(1, 2))
        recalls[label] = found.recall[between].mean(axis=(0, 2))
        reads[label] = (found.read / found.stored)[between].mean(axis=(0, 2))
    for layer, mass in enumerate(masses(reader, begun, context, given)):
        yield {
            "model": name,
            "layer": layer,
            **drift(mass, len(context)),
            **{label: float(each[layer]) for label, each in recalls.items()},
            "read": {label: float(each[layer]) for label, each in reads.items()},
        }


def main(argv: list[str] | None = None) -> int:
    """Measure and write; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="short contexts, few lines; no result file but --out"
    )
    parser.add_argument("--out", type=Path, help="the result file")
    options = parser.parse_args(argv)
    length, asked, context, count = SIZES["quick" if options.quick else "default"]
    out = options.out or (ROOT / "runs" / OUT.name if options.quick else OUT)
    reader = Reader(built.retrieval_model())
    report: dict[str, Any] = {
        "command": "python -m experiments.selection_limits",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "inputs": {"budget": BUDGET, "context": length, "questions": asked, "text": context, "steps": count},
        "versions": machine.versions(),
        "device": machine.describe(),
        "pages": [],
        "steps": [],
    }

    def note(part: str, row: dict[str, Any]) -> None:
        report[part].append(row)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(row))

    with compiled_quickly(options.quick):
        note("pages", random_keys(length, 16))
        sample = built.recall(np.random.default_rng((2, length)), length, asked)
        for case in CASES[:1] + CASES[-1:] if options.quick else CASES:
            note("pages", pages(reader, sample, case))
        models = [("by construction", built.retrieval_model())]
        models += [(each.parent.name, load(each.parent)) for each in sorted(SHIPPED.glob("*/config.json"))]
        for name, model in models[: 1 if options.quick else None]:
            for row in steps(name, Reader(model), *text_of(model, context, count)):
                note("steps", row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
