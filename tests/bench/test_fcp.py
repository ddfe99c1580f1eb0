"""The simulation of FCP at scale: its figures follow from its records, its stacks from their presets; its quick form runs."""

import json

import numpy as np
import pytest

from experiments import _fcp_stacks as stacks
from experiments import _fcp_summary as summary
from experiments import fcp
from experiments.tables import parallel as tables
from jaxllm import preset
from jaxllm.cli.model_parts import active_parameter_count
from parallel.context.costs import Costs


def result(seconds: float, mfu: float, kernel: float = 0.8, balance: float = 1.0, overlap: float = 1.0):
    shares = {"kernel": kernel, "balance": balance, "overlap": overlap}
    return {"seconds": seconds, "mfu": mfu, "received": 0.0, "tokens": 1.0, "traffic": 1.0} | shares


def batch(**mfu: float):
    found = {kind: result(1 / value, value) for kind, value in mfu.items()}
    rivals = (*summary.PAPER_KINDS, summary.MAGI)
    return summary.with_oracle({kind: result(10.0, 0.1) for kind in rivals} | found)


def test_batches_count_by_their_time():
    # 1 s at 0.8 and 3 s at 0.4 of the peak: 2.0 of 4 s.
    assert summary.mean([result(1.0, 0.8), result(3.0, 0.4)])["mfu"] == pytest.approx(0.5)


def test_the_oracle_is_the_best_that_the_paper_compares_with():
    found = batch(ring=0.3, zigzag=0.5, grouping=0.7, fcp=0.6)
    assert found[summary.ORACLE]["mfu"] == 0.5
    ratios = summary.ratios(found)
    assert ratios["over_oracle"] == pytest.approx(1.2)
    assert ratios["over_best"] == pytest.approx(0.6 / 0.7) and ratios["best"] == "grouping"
    assert summary.ratios(batch(ring=0.3, magi=0.5, fcp=0.6))["over_paper"] == pytest.approx(1.2)


def test_a_rival_breaks_where_it_falls_far_behind_and_for_what_it_lacks():
    small, large = batch(fcp=0.6, ring=0.5, ulysses=0.7), batch(fcp=0.6, ring=0.3)
    large["ring"] |= {"balance": 0.4, "overlap": 0.9}
    found = {each["kind"]: each for each in summary.breaks({"8": small, "128": large})}
    assert (found["ring"]["workers"], found["ring"]["cause"]) == (128, "imbalance")
    assert (found["ulysses"]["workers"], found["ulysses"]["cause"]) == (128, "more workers than heads")
    assert found["zigzag"]["workers"] == 8 and "fcp" not in found


@pytest.mark.parametrize(
    ("here", "reproduced"), [(0.54, False), (0.55, False), (0.56, True), (0.68, True), (0.69, False)]
)
def test_a_figure_counts_within_a_tenth(here, reproduced):
    made = summary.claim("x", 0.62, here)
    assert made["reproduced"] is reproduced and made["difference"] == pytest.approx(here - 0.62)


def test_context_lengths_fill_the_batch():
    for name in ("log-normal", "log-normal to 131072", "all of 131072"):
        lengths = fcp.lengths_of(name, 1_000_000, 0)
        assert lengths.sum() == 1_000_000 and lengths.min() >= 1
        assert lengths.max() <= (131_072 if name[-1].isdigit() else 524_288)
    assert (lengths[:-1] == 131_072).all()


def test_every_constant_is_varied_or_known_to_decide_otherwise():
    names = {name for name, _, _ in fcp.varied(Costs())}
    assert names | {"node", "room", "memory"} == set(Costs.__dataclass_fields__)
    assert all(other != Costs() for _, _, other in fcp.varied(Costs()))


def test_a_stack_has_the_size_of_its_model():
    stack = stacks.stack_of("nemotron_h_8b")
    # 8.1 billion parameters, of which the embeddings, in and out, are no part of the stack.
    assert stack.flops / 2 + 2 * 131_072 * 4096 == pytest.approx(8.1e9, rel=0.01)
    # 128 heads of 64 channels and 128 numbers of state each, in float32.
    assert stack.state == 128 * 64 * 128 * 4


@pytest.mark.slow
@pytest.mark.parametrize("name", stacks.STACKS.values())
def test_a_stack_is_its_preset(name):
    stack, cfg = stacks.stack_of(name), preset(name)
    inside = active_parameter_count(cfg) - 2 * cfg.vocab_size * cfg.hidden_size
    # Norms, convolutions and decays are no products of matrices.
    assert stack.flops == pytest.approx(2 * inside, rel=0.01)


def test_stacks_pay_for_tokens_and_states():
    lengths = fcp.lengths_of("log-normal", 8 * 32_768, 0)
    stack = stacks.stack_of("nemotron_h_8b")
    by_passes = stacks.stack_results(stack, lengths, 8, Costs(node=4), ("forward", "backward", "both"))
    found = by_passes["forward"]
    assert found[stacks.RESHUFFLED]["tokens"] == pytest.approx(1)
    assert found[stacks.SCATTERED]["tokens"] > 1.01
    assert found[stacks.SCATTERED]["states"] > found[stacks.RESHUFFLED]["states"] > 0
    for results in by_passes.values():
        assert all(0 < each["mfu"] < 0.9 for each in results.values())
    one, more, both = (by_passes[each][stacks.RESHUFFLED]["seconds"] for each in by_passes)
    assert 2 * one < more < 2.5 * one and both == pytest.approx(one + more)
    alone = stacks.stack_results(stack, np.array([32_768]), 1, Costs(), ("forward",))["forward"]
    assert all(each["states"] == 0 for each in alone.values())


@pytest.mark.slow
def test_the_quick_form_runs_and_resumes(tmp_path, monkeypatch):
    out, runs = tmp_path / "fcp.json", tmp_path / "runs"
    arguments = ["--quick", "--out", str(out), "--runs", str(runs)]
    assert fcp.main(arguments) == 0
    first = json.loads(out.read_text())
    assert (tmp_path / "fcp.png").stat().st_size > 10_000
    assert len(first["claims"]) == 19 and {"fcp", "oracle", "grouping"} <= set(
        first["scale"]["both"]["log-normal"]["64"]
    )
    table = tables.fcp(first)
    assert "| **fcp over oracle** |" in table and "comes out" in table
    # A run that was killed in the middle of a line: only that line is simulated again.
    (file,) = runs.glob("*.jsonl")
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    made = []
    simulated = fcp.stack_results
    monkeypatch.setattr(fcp, "stack_results", lambda *a: made.append(1) or simulated(*a))
    monkeypatch.setattr(fcp, "every_kind", None)
    assert fcp.main(arguments) == 0
    again = json.loads(out.read_text())
    assert made == [1] and {k: v for k, v in again.items() if k != "date"} == {
        k: v for k, v in first.items() if k != "date"
    }
