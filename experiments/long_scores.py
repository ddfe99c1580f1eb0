"""Greedy accuracy of a model on the long-context tasks, and its bits per byte on source it was not trained on."""

from typing import Any

import numpy as np

from experiments.long_batches import batch_of
from experiments.long_tasks import TASKS, filler
from jaxllm import LanguageModel, generate
from jaxllm.train.step import make_eval_step


def accuracy(model: LanguageModel, task: str, length: int, count: int, max_batch: int = 16) -> dict[str, Any]:
    """Share of ``count`` samples answered right by greedy decoding, with the 95 % interval of Wilson.

    Args:
        model: with a tokenizer.
        task: of :data:`TASKS`.
        length: characters of the context.
        count: samples; the same for every model.
        max_batch: samples decoded at once.
    """
    samples = [TASKS[task](np.random.default_rng([7, length, index]), length) for index in range(count)]
    longest = max(len(sample.answer) for sample in samples)
    prompts = [sample.context + sample.question for sample in samples]
    answers = [
        result.text
        for result in generate(model, prompts, max_new_tokens=longest, max_batch=max_batch, ignore_eos=True)
    ]
    pairs = list(zip(samples, answers))
    exact = sum(answer[: len(sample.answer)] == sample.answer for sample, answer in pairs)
    final = sum(answer[: len(sample.answer)].endswith(sample.final) for sample, answer in pairs)
    return {
        "task": task,
        "length": length,
        "samples": count,
        "exact": exact / count,
        "final": final / count,
        "exact_interval": wilson(exact, count),
    }


def wilson(hits: int, count: int, z: float = 1.96) -> list[float]:
    """The score interval of a share (E. B. Wilson, 1927)."""
    share, scale = hits / count, 1 + z * z / count
    middle = (share + z * z / (2 * count)) / scale
    half = z * ((share * (1 - share) + z * z / (4 * count)) / count) ** 0.5 / scale
    return [max(0.0, middle - half), min(1.0, middle + half)]


def bits_per_byte(model: LanguageModel, length: int, rows: int = 8) -> float:
    """Of the next character of held-out source, each row beginning anew."""
    drawn = []
    for row in range(rows):
        text = filler(np.random.default_rng([8, row]), "validation", length)
        drawn.append(
            (np.asarray(model.tokenizer.encode(text, bos=True), np.int32), np.ones(length, np.float32))
        )
    sums = make_eval_step(model.cfg)(model.params, batch_of(drawn))
    return float(sums.nats / sums.weight / np.log(2))
