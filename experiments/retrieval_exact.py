"""Whether the retrieval model by construction is exact at 32,768 and 131,072 tokens: dense attention, every answer.

Command:  python -m experiments.retrieval_exact [--lengths N ...] [--questions N] [--out FILE]
Time:     6 minutes at 32,768 tokens and 12 at 131,072, of a core that does other work as well, compilation included.
Expected: every answer right at every depth, each with nearly all of the probability.

Pairs of a key and a value stand anywhere in a context of filler, once each. The context is read by the engine's own
prefill in chunks, so that nothing of the size of the context squared exists, and every question token by token after it,
by itself. Lengths that are not asked for keep what the result file has of them.
"""

import argparse
import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from experiments import _retrieval_model as built
from experiments._long_context_steps import Reader
from experiments._retrieval_model import TokenSample
from experiments.bench._protocol import peak_rss_mib
from jaxllm import Policy
from jaxllm.cli import machine

OUT = Path(__file__).parents[1] / "experiments" / "results" / "retrieval_exact.json"
LENGTHS, QUESTIONS = (32_768, 131_072), 24
# Every chunk gathers all pages that were written before it: larger ones gather less often.
CHUNK = 2048


def sample_of(length: int, questions: int = QUESTIONS) -> TokenSample:
    """The same context and questions for everyone."""
    return built.recall(np.random.default_rng((1, length)), length, questions)


def examine(reader: Reader, sample: TokenSample) -> dict[str, Any]:
    """What dense attention answers.

    Returns:
        asked, right; ``least_probability``, that of the answer which the model is least sure of; ``depths``, where the
        first and the last of the questioned keys stand, as parts of the context.
    """
    length = len(sample.context)
    more = max(len(question) + len(answer) for question, answer, _ in sample.questions)
    cache = reader.end(reader.begin(sample.context, "compute", more, chunk=CHUNK), Policy())
    right, sure, depths = 0, [], []
    for question, answer, _ in sample.questions:
        steps, _ = reader.follow(cache, [*question, *answer[:-1]], length, keep=True)
        at = len(question) - 1 + np.arange(len(answer))
        right += steps.tokens[at].tolist() == answer
        sure.append(float(np.exp(steps.logprobs[at, answer].min())))
        depths.append(sample.context.index(question[-1]) / length)
    return {
        "length": length,
        "asked": len(sample.questions),
        "right": int(right),
        "least_probability": min(sure),
        "depths": [min(depths), max(depths)],
    }


def main(argv: list[str] | None = None) -> int:
    """Ask; the exit code is 1 where an answer is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of the contexts")
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    parser.add_argument("--out", type=Path, default=OUT, help="the result file")
    options = parser.parse_args(argv)
    reader = Reader(built.retrieval_model())
    rows: dict[int, dict[str, Any]] = {}
    if options.out.is_file():
        rows = {row["length"]: row for row in json.loads(options.out.read_text(encoding="utf-8"))["rows"]}
    for length in options.lengths:
        peak_rss_mib(reset=True)
        started = time.perf_counter()
        row = examine(reader, sample_of(length, options.questions))
        row |= {"seconds": round(time.perf_counter() - started, 1), "peak_mib": round(peak_rss_mib())}
        rows[length] = row
        report = {
            "command": "python -m experiments.retrieval_exact",
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": machine.versions(),
            "device": machine.describe(),
            "rows": [rows[each] for each in sorted(rows)],
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(
            f"{length:,} tokens: {row['right']} of {row['asked']} right, the least sure with probability"
            f" {row['least_probability']:.4f}; {row['seconds']:.0f} s, peak {row['peak_mib']:,} MiB"
        )
    return int(any(rows[length]["right"] < rows[length]["asked"] for length in options.lengths))


if __name__ == "__main__":
    sys.exit(main())
