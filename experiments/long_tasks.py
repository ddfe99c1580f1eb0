"""Two tasks whose answers need the far past: recall of key-value pairs, and arithmetic with a long trace.

Both hide lines ``@<key><value>`` between lines of real Python source, at any depth:

- ``recall``: up to 26 keys of a capital and a letter, each with a letter for its value; the question ``@Kc`` asks one of
  them. Multi-query associative recall (arXiv 2312.04927) with filler: of all that was read, one line matters, and nothing
  says which before the question.
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

CAPITALS, LETTERS = string.ascii_uppercase, string.ascii_lowercase
RECORD = len("@Kab\n")
FACT = len("@A0\n")
STEP = len("@A3+4=7\n")
# Characters of a trace for each character of its context.
TRACE = 3
QUESTION = "#sum\n"
# Share of the training texts that hold as many letters as there is room for.
FULL = 0.5


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


def _records(rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """(capital, letter, value) in random order: no two keys share a capital or a letter, values are free."""
    capitals, letters = rng.permutation(list(CAPITALS)), rng.permutation(list(LETTERS))
    values = rng.choice(list(LETTERS), len(LETTERS))
    return list(zip(capitals.tolist(), letters.tolist(), values.tolist()))


def _fact(*parts: str) -> list[Piece]:
    return [Piece("@", "text"), Piece("".join(parts), "given"), Piece("\n", "text")]


def recall_sample(rng: np.random.Generator, length: int) -> Sample:
    """Every key once (fewer in contexts under 520 characters), one of them asked."""
    records = _records(rng)[: max(2, min(len(CAPITALS), length // 20))]
    context = _joined(scattered(rng, "validation", [_fact(*record) for record in records], length))
    capital, letter, value = records[rng.integers(len(records))]
    return Sample(context, f"@{capital}{letter}", value, value)


def recall_pieces(rng: np.random.Generator, length: int) -> list[Piece]:
    """A document in which keys come again and again: from the second time on, what follows the capital is an answer."""
    # Few keys more often than many: "one of the values so far" is then a first step that pays.
    count = int(np.exp(rng.uniform(np.log(2), np.log(len(CAPITALS) + 1))))
    fresh, known = _records(rng)[:count], []
    # Short documents are nearly all questions.
    share, new = rng.uniform(min(0.8, 100 / length), 1.0), rng.uniform(0.2, 0.9)
    lines = []
    for _ in range(max(2, int(share * length / RECORD))):
        if fresh and (not known or rng.random() < new):
            known.append(fresh.pop())
            lines.append(_fact(*known[-1]))
        else:
            capital, letter, value = known[rng.integers(len(known))]
            asked = [Piece("@", "text"), Piece(capital, "given"), Piece(letter + value, "answer")]
            lines.append([*asked, Piece("\n", "text")])
    return scattered(rng, "train", lines, length)


def _digits(rng: np.random.Generator, count: int = len(CAPITALS)) -> dict[str, int]:
    return {key: int(digit) for key, digit in zip(CAPITALS, rng.integers(0, 10, count))}


def _told(rng: np.random.Generator, digits: dict[str, int]) -> list[list[Piece]]:
    return [_fact(key, str(digits[key])) for key in rng.permutation(list(digits)).tolist()]


def trace(digits: dict[str, int], steps: int) -> list[Piece]:
    """The running sum modulo 10 over the letters in order, round after round.

    Answers are the digits looked up, the sums, and the letter wherever the round begins anew; in the rest, which its
    form tells, they would drown.
    """
    pieces, total = [], 0
    for step in range(steps):
        key = CAPITALS[step % len(digits)]
        after = (total + digits[key]) % 10
        anew = step > 0 and key == CAPITALS[0]
        pieces += [Piece("@", "text"), Piece(key, "answer" if anew else "text")]
        pieces += [Piece(str(digits[key]), "answer"), Piece(f"+{total}=", "text")]
        pieces += [Piece(str(after), "answer"), Piece("\n", "text")]
        total = after
    return pieces


def arithmetic_sample(rng: np.random.Generator, length: int) -> Sample:
    """A digit for each letter, and a trace of about three times the context; the last sum is graded.

    Raises:
        ValueError: ``length`` is less than the 26 facts take.
    """
    digits = _digits(rng)
    context = _joined(scattered(rng, "validation", _told(rng, digits), length))
    answer = _joined(trace(digits, TRACE * length // STEP)).removesuffix("\n")
    return Sample(context, QUESTION, answer, answer[-1])


def arithmetic_pieces(rng: np.random.Generator, length: int) -> list[Piece]:
    """A context and as much of its trace as there is room for."""
    # At most half of it are facts.
    most = min(len(CAPITALS), (length - len(QUESTION) - STEP) // (2 * FACT))
    if most < 2:
        raise ValueError(f"length: got {length}, which leaves no room for a trace; give at least 32")
    # Few letters come again after few steps, and what stood behind them the last time is the nearest to learn from; all
    # of them, where there is room, are what a sample holds, and show that the last letter is followed by the first.
    few = int(np.exp(rng.uniform(np.log(2), np.log(most + 1))))
    digits = _digits(rng, most if rng.random() < FULL else few)
    least = FACT * len(digits)
    context = scattered(
        rng, "train", _told(rng, digits), int(rng.integers(least, max(least, length // 3) + 1))
    )
    room = length - sum(len(piece.text) for piece in context) - len(QUESTION)
    pieces = [*context, Piece(QUESTION, "given")]
    for piece in trace(digits, -(-room // STEP)):
        pieces.append(Piece(piece.text[:room], piece.kind))
        room -= len(pieces[-1].text)
    return [piece for piece in pieces if piece.text]


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
