"""Medians, rates, gates and ratios on numbers that a hand can check."""

import pytest
from _figures import aim_of, common_prefix, compare, gate, rate, repeats_for, spread, verdict
from _tasks import JAXLLM, JLA, TRANSFORMERS, Task

TRAIN = Task("train", 8, 256)
DECODE = Task("decode", 2, 64, 101)


def test_spread_keeps_least_and_greatest():
    assert spread([5.0, 1.0, 9.0, 2.0]) == {"median": 3.5, "min": 1.0, "max": 9.0}


def test_training_and_prefill_count_every_token():
    assert rate(TRAIN, "jaxllm", {"seconds": [1.0, 3.0]}) == 2048 / 2
    assert rate(Task("prefill", 8, 512), "jla", {"seconds": [0.5]}) == 4096 / 0.5


def test_decode_starts_counting_after_the_first_token():
    answer = {"seconds": [1.2, 1.2], "first": [0.2, 0.2]}
    assert rate(DECODE, "transformers", answer) == pytest.approx(2 * 100 / 1.0)


def test_decode_that_noise_drowns_is_no_figure():
    with pytest.raises(ValueError, match="noise"):
        rate(DECODE, "jaxllm", {"seconds": [0.2], "first": [0.3]})


def test_bounds_count_backward_and_one_step():
    assert rate(TRAIN, "machine", {"seconds": [0.5]}) == pytest.approx(2048 / 1.5)
    assert rate(DECODE, "machine", {"seconds": [0.001]}) == pytest.approx(2000)


@pytest.mark.parametrize(("once", "expected"), [(0.0, 20), (0.1, 5), (0.26, 2), (3.0, 1)])
def test_repeats_fill_a_turn(once, expected):
    assert repeats_for(once, 0.5) == expected


def test_common_prefix_stops_at_the_first_difference():
    assert common_prefix([[1, 2, 3, 4], [1, 9, 3, 4]], [[1, 2, 3, 4], [1, 2, 3, 4]]) == (1 + 0.25) / 2


def test_gate_compares_losses_by_precision():
    reference = {"losses": [6.0, 5.0]}
    near = {"losses": [6.0, 5.02]}
    assert gate(TRANSFORMERS[0], near, reference)[0] == "losses differ by 4.0e-03, at most 1e-03 may be"
    assert gate(JAXLLM[1], near, reference)[0] is None
    assert gate(JLA[0], near, reference) == (None, {})
    assert "nothing to compare" in gate(TRANSFORMERS[0], near, None)[0]


def test_gate_compares_tokens_in_float32_only():
    reference, other = {"tokens": [[1, 2, 3, 4]]}, {"tokens": [[5, 2, 3, 4]]}
    assert gate(TRANSFORMERS[0], other, reference)[0] == "tokens agree for 0% only"
    assert gate(JAXLLM[2], other, reference) == (None, {"common_prefix": 0.0})


def test_aims_are_those_of_the_two_models():
    assert [
        aim_of("quickstart", kind, "transformers", "fp32") for kind in ("train", "prefill", "decode")
    ] == [2, 3, 8]
    assert aim_of("wide", "train", "transformers", "best") == 3
    assert aim_of("wide", "decode", "transformers", "fp32") is None
    assert aim_of("wide", "decode", "jla", "fp32") == 2
    assert aim_of("tiny", "train", "transformers", "fp32") is None


def _entry(library, precision, median, **more):
    return {"library": library, "precision": precision, "tokens_per_second": spread([median]), **more}


def _row(model="quickstart", kind="train", **entries):
    return {"model": model, "name": kind, "task": {"kind": kind}, "contenders": entries}


def test_like_for_like_and_best_take_each_sides_best():
    row = _row(
        **{
            "jaxllm fp32": _entry("jaxllm", "fp32", 90.0),
            "jaxllm bf16-matmul": _entry("jaxllm", "bf16-matmul", 200.0),
            "transformers fp32 eager": _entry("transformers", "fp32", 30.0),
            "transformers fp32 compile": _entry("transformers", "fp32", 40.0),
            "transformers bf16 eager": _entry("transformers", "bf16", 100.0),
            "machine fp32": _entry("machine", "fp32", 180.0),
        }
    )
    same, best = compare([row])
    assert (same["ours"], same["peer"]) == ("jaxllm fp32", "transformers fp32 compile")
    assert same["ratio"] == 90 / 40 and same["bound_share"] == 0.5 and same["verdict"] == "meets the aim"
    assert (best["ours"], best["peer"]) == ("jaxllm bf16-matmul", "transformers bf16 eager")
    assert best["ratio"] == 2.0 and best["bound"] is None and best["verdict"] == "below the aim"


def test_a_figure_whose_gate_failed_does_not_count():
    row = _row(
        **{
            "jaxllm fp32": _entry("jaxllm", "fp32", 90.0),
            "jaxllm bf16-matmul": _entry("jaxllm", "bf16-matmul", 500.0, error="losses differ"),
            "transformers fp32 eager": _entry("transformers", "fp32", 100.0),
            "transformers fp32 compile": {
                "library": "transformers",
                "precision": "fp32",
                "error": "no compiler",
            },
        }
    )
    for line in compare([row]):
        assert line["ours"] == "jaxllm fp32" and line["peer"] == "transformers fp32 eager"
        assert line["verdict"] == "we lose"


def test_without_peers_our_figure_and_its_bound_stand():
    row = _row(
        "wide",
        "decode",
        **{"jaxllm fp32": _entry("jaxllm", "fp32", 60.0), "machine fp32": _entry("machine", "fp32", 80.0)},
    )
    line, _ = compare([row])
    assert line["peer"] is None and line["ratio"] is None
    assert line["bound_share"] == 0.75 and line["verdict"] == "meets the aim"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0.9, None), "we lose"),
        ((0.9, 2.0), "we lose"),
        ((1.5, 2.0), "below the aim"),
        ((2.0, 2.0), "meets the aim"),
        ((1.5, None), "ahead"),
        ((9.0, None, 0.6, 0.7), "below the aim"),
        ((None, 2.0), "no peer"),
    ],
)
def test_verdicts(arguments, expected):
    assert verdict(*arguments) == expected
