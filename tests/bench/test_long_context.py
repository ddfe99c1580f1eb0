"""The long-context experiment: its steps are the engine's, its rule of entry and its verdicts follow from the figures."""

import functools
import json
from dataclasses import replace

import numpy as np
import pytest

import jaxllm
from experiments import _long_context_steps, long_context
from experiments import _long_context_verdicts as judge
from experiments import _retrieval_model as built
from experiments._long_context_cases import policies, variants
from experiments._long_context_data import Job
from experiments._long_context_verdicts import Figures
from experiments.tables import caches as tables
from jaxllm import H2O, KVCache, Policy
from tests.bench.retrieval import CHOSEN, LAYERS, LENGTH, chosen, each_policy, reader, sample


@functools.cache
def begun(dtype: str, sums: bool):
    return reader().begin(sample().context, dtype, 32, sums=sums)


def engine(policy: Policy, dtype: str, prompt: list[int]):
    model = built.retrieval_model()
    return jaxllm.generate(
        model, [prompt], max_new_tokens=6, logprobs=0, policy=policy, kv=KVCache(dtype, 16)
    )[0]


@each_policy("tactic", "snapkv", fast=("quest", "h2o"))
def test_a_shared_prefill_is_the_engines_own(name):
    """What a policy makes of a prompt that was mostly read for another one: the same tokens and probabilities."""
    policy = CHOSEN[name]
    wanted = engine(policy, "compute", sample().context)
    cache = reader().end(begun("compute", isinstance(policy, H2O)), policy)
    steps, _ = reader().follow(cache, wanted.token_ids[:1], LENGTH, 6)
    assert steps.tokens[:5].tolist() == wanted.token_ids[1:]
    told = steps.logprobs[np.arange(5), steps.tokens[:5]]
    np.testing.assert_allclose(told, wanted.logprobs[1:], atol=2e-4)


def test_a_cache_is_kept_where_it_is_asked_for():
    cache = reader().end(begun("compute", False), Policy())
    question, answer, _ = sample().questions[0]
    first, _ = reader().follow(cache, question, LENGTH, 1, keep=True)
    again, _ = reader().follow(cache, question, LENGTH, 1, keep=True)
    assert first.tokens[-1] == again.tokens[-1] == answer[0]
    assert first.read.shape == (len(question), 2, 2) and (first.read == first.stored).all()


@each_policy("pillar", "window")
def test_everything_read_is_dense(name):
    policy = chosen(1.0, 1.0)[name]
    question, answer, _ = sample().questions[1]
    given = [*question, *answer, *question]
    cache = reader().end(begun("compute", isinstance(policy, H2O)), policy)
    mine, _ = reader().follow(cache, given, LENGTH)
    dense, _ = reader().follow(reader().end(begun("compute", False), Policy()), given, LENGTH)
    np.testing.assert_allclose(mine.logprobs, dense.logprobs, atol=2e-3)
    assert (mine.read == dense.read).all()


def test_pieces_of_an_output_are_one_output(monkeypatch):
    """Given tokens and chosen ones come out the same wherever the pieces end."""
    cache = reader().end(begun("compute", False), Policy())
    question = sample().questions[0][0]
    whole, _ = reader().follow(cache, question, LENGTH, 9, keep=True)
    monkeypatch.setattr(_long_context_steps, "STEPS", 3)
    pieces, _ = reader().follow(cache, question, LENGTH, 9)
    assert len(question) == 8 and len(whole.tokens) == 16
    assert pieces.tokens.tolist() == whole.tokens.tolist()
    np.testing.assert_allclose(pieces.logprobs, whole.logprobs, atol=1e-5)
    assert (pieces.read == whole.read).all()


def test_sums_cannot_be_made_up():
    with pytest.raises(ValueError, match="sums"):
        reader().end(begun("compute", False), CHOSEN["h2o"])


def test_boxes_cannot_be_made_up():
    for sums, policy in ((True, CHOSEN["quest"]), (False, replace(CHOSEN["quest"], scorer="mean"))):
        with pytest.raises(ValueError, match="boxes"):
            reader().end(begun("compute", sums), policy)


def test_every_budget_is_kept():
    """No policy is given more than the others: what evicts stores at most the budget, its buffer included."""
    for budget in (1 / 64, 1 / 16, 1 / 8):
        for name, policy in policies(budget, 4096, LAYERS).items():
            if policy.evicts and name != "snapkv":
                assert policy.stored(4096, 4096) == round(4096 * budget), name
    assert {v.policy for v in variants("default", 4096, LAYERS)} == {*CHOSEN, "dense"}
    assert variants("default", 4096, LAYERS)[0].policy == "dense"


def record(policy: str, setting: float, accuracy: float, read: float, **changes):
    row = {"task": "recall", "length": 4096, "policy": policy, "setting": setting, "dtype": "compute"}
    row |= {"sample": 0, "asked": 100, "right": round(100 * accuracy), "nll": 0.1, "kl": 0.01, "recall": read}
    row |= {"read_by_head": [[read, read], [read, 2 * read]], "held_bytes": 1}
    return row | changes


def figures(dense: float = 1.0, window: float = 0.1, **tactic) -> Figures:
    rows = [record("dense", 1.0, dense, 1.0), record("quest", 1.0, dense, 0.8)]
    for budget in (1 / 64, 1 / 16, 1 / 8):
        rows += [record("window", budget, window, budget), record("quest", budget, 0.9, budget)]
        rows.append(record("pillar", budget, 0.8, budget, recall=0.99))
    rows.append(record("tactic", 0.9, 0.97, 1 / 20, **tactic))
    return Figures(judge.aggregated(rows))


def test_a_task_that_the_last_tokens_solve_is_not_counted():
    assert judge.entry(1.0, 0.51) is not None and "needs no long context" in judge.entry(1.0, 0.51)
    assert judge.entry(0.89, 0.0) is not None and "cannot do it" in judge.entry(0.89, 0.0)
    assert judge.entry(0.9, 0.5) is None
    for wrong in (figures(window=0.6), figures(dense=0.8)):
        assert len(judge.left_out(wrong)) == 3
        assert not any(wrong.counts(row) for row in wrong.rows if row["setting"] < 1)
        # Nothing may be concluded from it either.
        assert {each["verdict"] for each in judge.verdicts(wrong)} == {judge.NOT_MEASURED}
    assert not judge.left_out(figures()) and all(figures().counts(row) for row in figures().rows)


def test_what_dense_attention_cannot_do_is_not_measured_further():
    job = Job("recall", 4096, 4, "one", lambda number: sample())
    wrong = [record("dense", 1.0, 1 - share, 1.0, sample=number) for number, share in enumerate((0.1, 0.3))]
    assert not long_context.hopeless([], job) and not long_context.hopeless(wrong, job)
    assert long_context.hopeless([*wrong, record("dense", 1.0, 0.98, 1.0, sample=2)], job)
    others = [record("quest", 1 / 16, 0.0, 1 / 16, sample=number) for number in range(4)]
    assert not long_context.hopeless(others, job)
    text = [row | {"task": judge.TEXT, "right": None} for row in wrong]
    assert not long_context.hopeless(text, replace(job, task=judge.TEXT))
    (left,) = judge.left_out(Figures(judge.aggregated([record("dense", 1.0, 0.8, 1.0)])))
    assert left["budget"] == "any" and "cannot do it" in left["reason"]


def test_a_line_counts_when_all_its_samples_are_there():
    job = Job("recall", 4096, 2, "one", lambda number: sample())
    dense = [record("dense", 1.0, 1.0, 1.0, sample=number) for number in range(2)]
    some = [record("quest", 1 / 16, 1.0, 1 / 16, sample=0)]
    elsewhere = [row | {"length": 1} for row in dense]
    assert long_context.whole([*dense, *some, *elsewhere], [job]) == dense
    more = [*some, record("quest", 1 / 16, 0.0, 1 / 16, sample=1)]
    assert long_context.whole([*dense, *more], [job]) == [*dense, *more]
    # Given up after the first sample.
    wrong = [record("dense", 1.0, 0.5, 1.0, sample=0)]
    assert long_context.whole(wrong, [job]) == wrong


def test_the_rule_is_asked_at_each_budget_by_itself():
    found = figures()
    rows = [
        row | {"accuracy": 0.7} if (row["policy"], row["setting"]) == ("window", 1 / 8) else row
        for row in found.rows
    ]
    found = Figures(rows)
    assert [each["budget"] for each in judge.left_out(found)] == ["1/8"]
    assert [row["setting"] for row in found.of("quest")] == [1 / 64, 1 / 16]
    # Tactic read no more than a sixteenth, where the task is counted; then a tenth, and is asked at 1/8.
    assert len(found.of("tactic")) == 1
    more = [row | {"read": 0.1} if row["policy"] == "tactic" else row for row in rows]
    assert not Figures(more).of("tactic")


def verdict(found: Figures, words: str) -> str:
    (one,) = [each for each in judge.verdicts(found) if words in each["claim"]]
    return one["verdict"]


def test_verdicts_follow_the_figures():
    good = figures()
    assert verdict(good, "Tactic is above") == judge.SHOWN
    assert verdict(good, "adapts") == judge.SHOWN
    assert verdict(good, "Pillar recalls") == judge.SHOWN
    assert verdict(good, "near lossless") == judge.NOT_SHOWN  # 0.9 of 1
    assert verdict(good, "R-KV") == verdict(good, "int4") == judge.NOT_MEASURED
    assert verdict(figures(right=80), "Tactic is above") == judge.NOT_SHOWN
    assert verdict(figures(right=90), "Tactic is above") == judge.LEVEL
    assert verdict(figures(read_by_head=[[0.05, 0.05]]), "adapts") == judge.NOT_SHOWN


@pytest.mark.parametrize(
    ("rkv", "h2o", "wanted"), [(0.98, 0.5, "SHOWN"), (0.98, 0.95, "NOT_SHOWN"), (0.9, 0.2, "NOT_SHOWN")]
)
def test_the_verdict_on_rkv_needs_the_others_to_fall(rkv, h2o, wanted):
    rows = [
        record("dense", 1.0, 1.0, 1.0),
        record("window", 1 / 8, 0.1, 0.125),
        record("rkv", 1 / 8, rkv, 0.125),
    ]
    rows += [record(name, 1 / 8, h2o, 0.125) for name in ("h2o", "rkv, importance only")]
    found = Figures(judge.aggregated([row | {"task": "trace"} for row in rows]))
    assert verdict(found, "R-KV") == getattr(judge, wanted)
    elsewhere = Figures(judge.aggregated(rows))
    assert verdict(elsewhere, "R-KV") == judge.NOT_MEASURED


@pytest.mark.parametrize(("nll", "wanted"), [(0.105, "SHOWN"), (0.12, "NOT_SHOWN")])
def test_the_verdict_on_int4_is_about_perplexity(nll, wanted):
    rows = [record("dense", 1.0, 1.0, 1.0), record("dense", 1.0, 1.0, 1.0, dtype="int4", nll=nll)]
    found = Figures(judge.aggregated([row | {"task": judge.TEXT, "right": None} for row in rows]))
    assert verdict(found, "int4") == getattr(judge, wanted)


@pytest.mark.slow
def test_the_quick_form_runs_and_resumes(tmp_path, monkeypatch):
    out, runs = tmp_path / "long_context.json", tmp_path / "runs"
    arguments = ["--quick", "--out", str(out), "--runs", str(runs)]
    assert long_context.main(arguments) == 0
    first = json.loads(out.read_text())["models"][long_context.BUILT]
    dense = [row for row in first["rows"] if row["policy"] == "dense"]
    assert dense and all(row["accuracy"] == 1 for row in dense)
    others = {row["policy"]: row for row in first["rows"] if row["setting"] == 1 / 16}
    assert set(others) == {"window", "quest", "rkv"} and len(first["rows"]) == 4
    assert others["quest"]["accuracy"] > others["rkv"]["accuracy"] and others["window"]["accuracy"] < 0.1
    assert not first["left_out"]
    assert (tmp_path / "long_context.png").stat().st_size > 1000
    (file,) = runs.glob("*.jsonl")
    lines = file.read_text().splitlines()
    assert first["missing"] == 0 and first["planned"] == len(lines)
    table = tables.long_context(json.loads(out.read_text()))
    assert "| recall, 512 | dense |" in table and judge.NOT_MEASURED in table
    # A run that was killed in the middle of a line.
    file.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    assert long_context.main([*arguments, "--report"]) == 0
    assert json.loads(out.read_text())["models"][long_context.BUILT]["missing"] == 1
    asked = []
    measure = long_context.measure
    monkeypatch.setattr(long_context, "measure", lambda *a: asked.append(a[2].policy) or measure(*a))
    assert long_context.main(arguments) == 0
    # The last line again, and what it is held against.
    assert asked == ["dense", json.loads(lines[-1])["policy"]]
    again = json.loads(out.read_text())["models"][long_context.BUILT]
    assert again == first
