"""What the models are asked: the built model's tasks, a trained model's tasks, and real text."""

import importlib
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from experiments import _retrieval_model as built
from experiments._long_context_verdicts import TEXT
from experiments._retrieval_model import TokenSample
from jaxllm.data.corpus import stdlib_corpus
from jaxllm.model.functional import LanguageModel

# Text that is read token by token after its context.
TEXT_STEPS = 128


@dataclass(frozen=True)
class Job:
    """One task at one length.

    Attributes:
        task: its name.
        length: of the context, in tokens of the built model and of text, in characters of a trained model's tasks.
        samples: contexts.
        grid: which lines of the table, as in ``_long_context_cases.variants``.
        make: the sample of a number.
    """

    task: str
    length: int
    samples: int
    grid: str
    make: Callable[[int], TokenSample]


def built_jobs(grid: str) -> list[Job]:
    """Tasks of the model by construction."""
    sizes = {
        "quick": [("recall", 512, 1, "quick")],
        "default": [
            ("recall", 8192, 1, "default"),
            ("trace", 2048, 1, "default"),
            ("vote", 8192, 1, "default"),
            ("recall", 32768, 1, "one"),
        ],
        "full": [
            *((task, 8192, 4, "full") for task in ("recall", "vote")),
            ("trace", 4096, 2, "full"),
            ("recall", 32768, 2, "full"),
            ("recall", 131072, 1, "one"),
        ],
    }

    def make(task: str, length: int, number: int) -> TokenSample:
        return built.TASKS[task](np.random.default_rng((zlib.crc32(task.encode()), length, number)), length)

    return [
        Job(task, length, samples, lines, lambda number, t=task, n=length: make(t, n, number))
        for task, length, samples, lines in sizes[grid]
    ]


def trained_jobs(model: LanguageModel, grid: str) -> list[Job]:
    """Tasks of a model that reads text: those of ``experiments/long_tasks.py``, and the standard library."""
    tasks = importlib.import_module("experiments.long_tasks").TASKS
    sizes = {
        # Both fill the same pages, so that one program of each policy serves them.
        "quick": [("recall", 512, 1, "quick"), (TEXT, 384, 1, "quick")],
        "default": [
            # As above.
            ("recall", 1024, 24, "default"),
            (TEXT, 896, 8, "default"),
            ("recall", 512, 24, "one"),
            ("recall", 2048, 24, "default"),
            ("arithmetic", 256, 12, "default"),
            (TEXT, 2048, 4, "default"),
            ("recall", 8192, 6, "one"),
            (TEXT, 8192, 2, "one"),
        ],
        "full": [
            *((task, length, 32, "full") for task in tasks for length in (1024, 2048, 8192)),
            *((TEXT, length, 8, "full") for length in (2048, 8192)),
        ],
    }
    jobs = []
    for task, length, samples, lines in sizes[grid]:
        if task == TEXT:
            texts = Texts(model, length)
            jobs.append(Job(task, length, samples, lines, texts.sample))
        else:
            jobs.append(
                Job(
                    task, length, samples, lines, lambda n, t=task, s=length: _asked(model, tasks[t], t, s, n)
                )
            )
    return jobs


def _asked(
    model: LanguageModel, task: Callable[..., Any], name: str, length: int, number: int
) -> TokenSample:
    sample = task(np.random.default_rng((zlib.crc32(name.encode()), length, number)), length)
    encode, decode = model.tokenizer.encode, model.tokenizer.decode
    answer = encode(sample.answer)
    # The fewest of the answer's last tokens whose text ends as the graded part does.
    count = next(n for n in range(1, len(answer) + 1) if decode(answer[-n:]).endswith(sample.final))
    return TokenSample(encode(sample.context), [(encode(sample.question), answer, answer[-count:])])


class Texts:
    """Held out files of the standard library, in pieces of a context and the text that goes on from it."""

    def __init__(self, model: LanguageModel, length: int):
        self.model, self.length = model, length
        self._pieces: list[list[int]] = []

    def sample(self, number: int) -> TokenSample:
        """Piece ``number``: its end is an answer after a question of one token."""
        if not self._pieces:
            size = self.length + 1 + TEXT_STEPS
            # Documents end to end, the longest first, so that most pieces are of a single one.
            texts = sorted(stdlib_corpus().validation.texts, key=len, reverse=True)
            stream: list[int] = []
            for text in texts[:24]:
                stream += self.model.tokenizer.encode(text)
            self._pieces = [stream[at : at + size] for at in range(0, len(stream) - size + 1, size)]
        # Spread over the stream, by a step that meets every piece.
        piece = self._pieces[number * 7919 % len(self._pieces)]
        cut = self.length
        return TokenSample(piece[:cut], [(piece[cut : cut + 1], piece[cut + 1 :], piece[cut + 1 :])])


def fingerprint(model: LanguageModel) -> str:
    """Changes with the model: configuration and the beginning of every parameter."""
    total = zlib.crc32(json.dumps(model.cfg.to_dict(), sort_keys=True).encode())
    for leaf in jax.tree.leaves(model.params):
        total = zlib.crc32(np.asarray(leaf.reshape(-1)[:4096].astype("float32")).tobytes(), total)
    return f"{total:08x}"
