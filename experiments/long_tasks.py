"""Two tasks whose answers need the far past: recall of key-value pairs, and arithmetic with a long trace.

Both hide lines ``@<key><value>`` between lines of real Python source, at any depth:

- ``recall``: up to 26 keys with two-letter values; the question ``@Q`` asks one of them. Multi-query associative recall
  (arXiv 2312.04927) with filler: of all that was read, one line matters, and nothing says which before the question.
- ``arithmetic``: a digit for each of the 26 letters; the answer walks through them in order, again and again, and adds
  them up modulo 10, as ``@<letter><digit>+<sum so far>=<new sum>``. The trace is three times as long as the context, and
  restates in each round what the rounds before it said (the planted repetition of arXiv 2505.24133).

A character is one token of a byte-level tokenizer: the texts are ASCII. Everything is a function of the generator that
is passed in; filler of samples comes from the validation split of the standard library, that of documents from the
training split.
"""

import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from jaxllm.data.corpus import stdlib_corpus

KEYS = string.ascii_uppercase
LETTERS = string.ascii_lowercase
FACT = len("@A0\n")
STEP = len("@A3+4=7\n")
# Characters of a trace for each character of its context.
TRACE = 3
QUESTION = "#sum\n"


@dataclass(frozen=True)
class Sample:
    """One graded question.

    Attributes:
        context: read by a dense prefill.
        question: asked token by token after it.
        answer: what has to come next, greedy.
        final: the graded part of the answer, its suffix.
    """

    context: str
    question: str
    answer: str
    final: str


@dataclass(frozen=True)
class Piece:
    """A stretch of a document.

    Attributes:
        text: its characters.
        kind: "text" (filler), "given" (nobody can know it: keys, and values that are told for the first time) or
            "answer" (it follows from what was read).
    """

    text: str
    kind: str


@lru_cache(2)
def source_text(split: str) -> str:
    """Python sources of one split ("train" or "validation"): ASCII, without tabs and without lines that hold "@"."""
    documents = getattr(stdlib_corpus(), split).texts
    lines = (line for text in documents for line in text.expandtabs(4).splitlines())
    return "\n".join(line for line in lines if line.isascii() and line.isprintable() and "@" not in line)


def filler(rng: np.random.Generator, split: str, length: int) -> str:
    """``length`` characters of source from the begin of a line, the last of them a newline."""
    if length == 0:
        return ""
    source = source_text(split)
    # Any line may come first but those of the very end.
    start = source.find("\n", int(rng.integers(len(source) - length - 4096)))
    return source[start + 1 : start + length] + "\n"


def scattered(rng: np.random.Generator, split: str, lines: list[list[Piece]], length: int) -> list[Piece]:
    """The lines in their order, put between lines of filler so that all have ``length`` characters together.

    Raises:
        ValueError: the lines alone are longer.
    """
    rest = length - sum(len(piece.text) for line in lines for piece in line)
    if rest < 0:
        raise ValueError(
            f"length: got {length}, which is {-rest} characters less than the task's own lines take"
        )
    text = filler(rng, split, rest)
    ends = np.array([0] + [index + 1 for index, character in enumerate(text) if character == "\n"])
    # Places are drawn by character and moved to the end of their line: long lines get their share.
    places = ends[np.searchsorted(ends, np.sort(rng.integers(0, rest + 1, len(lines))))]
    pieces, last = [], 0
    for place, line in zip(places.tolist(), lines):
        pieces += [Piece(text[last:place], "text"), *line]
        last = place
    return [piece for piece in (*pieces, Piece(text[last:], "text")) if piece.text]


def _joined(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def _values(rng: np.random.Generator) -> dict[str, str]:
    """A two-letter value for each key."""
    return {key: "".join(rng.choice(list(LETTERS), 2)) for key in KEYS}


def _fact(key: str, value: str) -> list[Piece]:
    return [Piece("@", "text"), Piece(key + value, "given"), Piece("\n", "text")]


def recall_sample(rng: np.random.Generator, length: int) -> Sample:
    """Every key once (fewer in contexts under 520 characters), one of them asked."""
    count = max(2, min(len(KEYS), length // 20))
    values = _values(rng)
    keys = list(rng.permutation(list(KEYS))[:count])
    context = _joined(scattered(rng, "validation", [_fact(key, values[key]) for key in keys], length))
    asked = str(rng.choice(keys))
    return Sample(context, f"@{asked}", values[asked], values[asked])


def recall_pieces(rng: np.random.Generator, length: int) -> list[Piece]:
    """A document in which keys come again and again: from the second time on their value is an answer."""
    values, known = _values(rng), []
    fresh = list(rng.permutation(list(KEYS))[: rng.integers(min(6, len(KEYS)), len(KEYS) + 1)])
    share, new = rng.uniform(0.08, 0.9), rng.uniform(0.2, 0.9)
    lines = []
    for _ in range(max(2, int(share * length / len("@Aab\n")))):
        if fresh and (not known or rng.random() < new):
            known.append(fresh.pop())
            lines.append(_fact(known[-1], values[known[-1]]))
        else:
            key = known[rng.integers(len(known))]
            lines.append(
                [Piece("@", "text"), Piece(key, "given"), Piece(values[key], "answer"), Piece("\n", "text")]
            )
    return scattered(rng, "train", lines, length)


def _digits(rng: np.random.Generator) -> dict[str, int]:
    return {key: int(digit) for key, digit in zip(KEYS, rng.integers(0, 10, len(KEYS)))}


def _told(rng: np.random.Generator, digits: dict[str, int]) -> list[list[Piece]]:
    return [_fact(key, str(digits[key])) for key in rng.permutation(list(KEYS)).tolist()]


def trace(digits: dict[str, int], steps: int) -> str:
    """The running sum modulo 10 over the letters in order, round after round."""
    lines, total = [], 0
    for step in range(steps):
        key = KEYS[step % len(KEYS)]
        after = (total + digits[key]) % 10
        lines.append(f"@{key}{digits[key]}+{total}={after}\n")
        total = after
    return "".join(lines)


def arithmetic_sample(rng: np.random.Generator, length: int) -> Sample:
    """A digit for each letter, and a trace of about three times the context; the last sum is graded.

    Raises:
        ValueError: ``length`` is less than the 26 facts take.
    """
    digits = _digits(rng)
    context = _joined(scattered(rng, "validation", _told(rng, digits), length))
    answer = trace(digits, TRACE * length // STEP).removesuffix("\n")
    return Sample(context, QUESTION, answer, answer[-1])


def arithmetic_pieces(rng: np.random.Generator, length: int) -> list[Piece]:
    """A context and as much of its trace as there is room for."""
    digits = _digits(rng)
    least = FACT * len(KEYS)
    context = scattered(
        rng, "train", _told(rng, digits), int(rng.integers(least, max(least, length // 3) + 1))
    )
    room = length - sum(len(piece.text) for piece in context) - len(QUESTION)
    if room < STEP:
        raise ValueError(f"length: got {length}, which leaves no room for a trace; give at least 128")
    steps = trace(digits, -(-room // STEP))[:room]
    return [*context, Piece(QUESTION, "given"), Piece(steps, "answer")]


TASKS: dict[str, Callable[[np.random.Generator, int], Sample]] = {
    "recall": recall_sample,
    "arithmetic": arithmetic_sample,
}
PIECES: dict[str, Callable[[np.random.Generator, int], list[Piece]]] = {
    "recall": recall_pieces,
    "arithmetic": arithmetic_pieces,
}


def document(rng: np.random.Generator, name: str, length: int) -> str:
    """Training text of ``length`` characters in the format of the task ``name``: many questions with their answers."""
    return _joined(PIECES[name](rng, length))
