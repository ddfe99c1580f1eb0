"""The tasks of the long-context experiments are what they say, and a function of the seed."""

import re

import numpy as np
import pytest

from experiments import long_tasks
from experiments.long_tasks import CAPITALS, PIECES, TASKS, document

LENGTHS = {"recall": (64, 256, 1000, 2048), "arithmetic": (104, 256, 1000, 2048)}


@pytest.mark.parametrize("name", TASKS)
def test_same_seed_same_text(name):
    def texts(seed):
        rng = np.random.default_rng(seed)
        return TASKS[name](rng, 300), document(rng, name, 300)

    assert texts(3) == texts(3)
    assert texts(3)[0] != texts(4)[0] and texts(3)[1] != texts(4)[1]


@pytest.mark.parametrize("name", TASKS)
def test_lengths_and_alphabet(name):
    for length in LENGTHS[name]:
        rng = np.random.default_rng(length)
        sample = TASKS[name](rng, length)
        texts = (sample.context, document(rng, name, max(length, 128)))
        assert [len(text) for text in texts] == [length, max(length, 128)]
        assert all(text.isascii() for text in texts)
        assert sample.answer.endswith(sample.final) and sample.final


RECORDS = re.compile(r"^@([A-Z])([a-z])([a-z])$", re.MULTILINE)


def test_recall_answers_stand_once_in_the_context_at_any_depth():
    depths = []
    for seed in range(60):
        sample = TASKS["recall"](np.random.default_rng(seed), 1000)
        told = RECORDS.findall(sample.context)
        assert len(told) == len(CAPITALS) == sample.context.count("@")
        assert len({capital for capital, _, _ in told}) == len({letter for _, letter, _ in told}) == len(told)
        assert ("@", *sample.question[1:], sample.answer) in [("@", *record) for record in told]
        assert sample.final == sample.answer
        depths.append(sample.context.index(sample.question) / 1000)
    assert min(depths) < 0.1 and max(depths) > 0.9 and 0.35 < np.mean(depths) < 0.65


def test_recall_documents_repeat_what_they_told():
    for seed in range(20):
        pieces = PIECES["recall"](np.random.default_rng(seed), 512)
        told, expected = {}, []
        for capital, *rest in RECORDS.findall("".join(piece.text for piece in pieces)):
            if capital in told:
                expected.append("".join(rest))
            assert told.setdefault(capital, rest) == rest
        assert [piece.text for piece in pieces if piece.kind == "answer"] == expected != []


def test_arithmetic_traces_add_up():
    sample = TASKS["arithmetic"](np.random.default_rng(0), 256)
    told = dict(re.findall(r"^@([A-Z])(\d)$", sample.context, re.MULTILINE))
    assert set(told) == set(CAPITALS)
    total = 0
    for step, line in enumerate(sample.answer.split("\n")):
        key = CAPITALS[step % len(CAPITALS)]
        total, before = (total + int(told[key])) % 10, total
        assert line == f"@{key}{told[key]}+{before}={total}"
    assert sample.final == str(total)
    assert len(sample.answer) > 2 * len(sample.context)


def test_arithmetic_documents_hold_a_trace_of_their_own_digits():
    pieces = PIECES["arithmetic"](np.random.default_rng(1), 700)
    asked = next(n for n, piece in enumerate(pieces) if piece.text == long_tasks.QUESTION)
    assert pieces[asked].kind == "given"
    context, told = ("".join(piece.text for piece in part) for part in (pieces[:asked], pieces[asked + 1 :]))
    digits = {key: int(digit) for key, digit in re.findall(r"^@([A-Z])(\d)$", context, re.MULTILINE)}
    digits = dict(sorted(digits.items()))
    assert list(digits) == list(CAPITALS[: len(digits)])
    assert "".join(piece.text for piece in long_tasks.trace(digits, 100)).startswith(told)
    assert len(context) + len(long_tasks.QUESTION) + len(told) == 700
    # Digits looked up, sums, and the letter of each new round.
    worked = re.findall(r"(?<=[A-Z=])\d|(?<=\n@)A", told)
    assert [piece.text for piece in pieces if piece.kind == "answer"] == worked
    assert worked.count("A") >= 1


def test_every_other_arithmetic_document_holds_all_letters():
    def letters(number: int) -> int:
        text = "".join(piece.text for piece in PIECES["arithmetic"](np.random.default_rng(number), 400))
        return len(set(re.findall(r"^@([A-Z])\d$", text, re.MULTILINE)))

    counts = [letters(number) for number in range(200)]
    assert 70 < counts.count(len(CAPITALS)) < 140 and min(counts) == 2


def test_too_short_is_refused():
    with pytest.raises(ValueError, match="length"):
        TASKS["arithmetic"](np.random.default_rng(0), 100)
    with pytest.raises(ValueError, match="length"):
        document(np.random.default_rng(0), "arithmetic", 28)
