"""The retrieval model by construction answers everything, whatever the length."""

from dataclasses import replace

import pytest

from experiments import retrieval_exact
from tests.bench.retrieval import reader


def test_wrong_answers_are_counted():
    sample = retrieval_exact.sample_of(200, 6)
    assert retrieval_exact.examine(reader(), sample)["right"] == 6
    (first, (value,), graded), *rest = sample.questions
    other = next(answer for _, answer, _ in rest if answer != [value])
    found = retrieval_exact.examine(reader(), replace(sample, questions=[(first, other, graded), *rest]))
    assert found["right"] == 5 and found["least_probability"] < 0.01


@pytest.mark.nightly
@pytest.mark.parametrize("length", retrieval_exact.LENGTHS)
def test_it_is_exact_at_full_length(length):
    found = retrieval_exact.examine(reader(), retrieval_exact.sample_of(length))
    assert found["right"] == found["asked"] == retrieval_exact.QUESTIONS
    assert found["least_probability"] > 0.5
    # Questions reach both ends of the context.
    assert found["depths"][0] < 0.2 and found["depths"][1] > 0.8
