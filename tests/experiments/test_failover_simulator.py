"""The simulator's experiment: shares of models, what counts as coming out, and its quick form."""

import json
import math

import pytest

from experiments import failover_simulator as experiment
from experiments._failover_models import PUBLISHED, degraded, low_rank_units, shares
from experiments.tables.failover import failover_simulator
from jaxllm.presets import preset
from jaxllm.train.flops import forward_flops_per_token


def test_shares_of_a_llama_by_hand():
    """Four square projections and the scores, three of the MLP, the head: multiply-adds of an average token."""
    found = shares(PUBLISHED["7B"].cfg, 256)
    attention = 4 * 4096**2 + 2 * 4096 * 257 / 2
    mlp, head = 3 * 4096 * 11008, 32_000 * 4096
    whole = 32 * (attention + mlp) + head
    assert found == pytest.approx({"*": 32 * attention / whole, "-": 32 * mlp / whole, "head": head / whole})
    assert degraded(PUBLISHED["7B"].cfg, 256).skipped == found["*"]
    assert low_rank_units(PUBLISHED["7B"].cfg) == pytest.approx((256 * 4096 + 256 * 11008) / (4096 * 11008))


def test_shares_of_a_hybrid_are_what_leaving_a_letter_out_saves():
    cfg = preset("nemotron-3-tiny")
    found, whole = shares(cfg, 128), forward_flops_per_token(cfg, 128)
    assert sum(found.values()) == pytest.approx(1) and set(found) == {"M", "E", "*", "head"}
    without = forward_flops_per_token(cfg.replace(pattern=cfg.pattern.replace("M", "")), 128)
    assert found["M"] == pytest.approx(1 - without / whole)
    assert found["head"] == pytest.approx(2 * cfg.vocab_size * cfg.hidden_size / whole)
    attention, mixers = (degraded(cfg, 128, policy).skipped for policy in ("attention", "every mixer"))
    assert mixers == pytest.approx(found["*"] + found["M"]) and attention == found["*"]


def test_published_runs_last_as_long_as_their_tokens_take():
    seconds = {size: model.steps * model.step_seconds for size, model in PUBLISHED.items()}
    assert {size: round(each / 3600, 1) for size, each in seconds.items()} == {
        "350M": 2.9,
        "1B": 12.4,
        "7B": 39.3,
    }


def test_a_figure_comes_out_between_two_counts_of_micro_batches():
    assert experiment.bracket({1: -5.0, 2: 1.0, 4: 11.0}, 4.18) == [2, 4]
    assert experiment.bracket({4: 11.0, 1: 0.5, 2: 1.0}, 4.18) == [2, 4]
    assert experiment.bracket({1: 5.0, 2: 6.0}, 4.18) is None


def test_a_measured_drop_is_what_the_lost_batches_say():
    """The same scenarios for all; a third of the time a node is down, of which it is all that is lost."""
    cluster = experiment.Cluster(1, 8, 4, 1.0)
    mecefo = experiment.Mecefo(skipped=1 / 3)
    found = experiment.measure(cluster, mecefo, experiment.Rate(4e3, 1e3), 20, 4e4)
    assert found["goodput"] + sum(found["lost"].values()) / 100 == pytest.approx(1)
    assert found["drop"] == pytest.approx(sum(found["lost"].values()))
    # Poisson: nobody is down e^-1/4 of the time; a drop counts against a system's own healthy pace.
    assert found["touched"] == pytest.approx(1 - math.exp(-0.25), abs=0.08)
    always = experiment.measure(cluster, experiment.Bamboo(), experiment.Rate(4e9, 1.0), 2, 4e4)
    assert always["healthy"] == pytest.approx(0.75) and always["drop"] == pytest.approx(0, abs=0.01)


@pytest.mark.slow
def test_the_quick_form_runs_and_its_table_is_made(tmp_path):
    out = tmp_path / "failover.json"
    assert experiment.main(["--quick", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert {row["size"] for row in report["grid"]} == set(PUBLISHED)
    for row in report["rates"] + report["scale"]:
        assert row["healthy"] == pytest.approx(0.75 if row["system"] == "Bamboo-like" else 1.0, abs=0.02)
        assert row["goodput"] <= row["throughput"] <= 1
        assert (row["touched"] > 0) == (row["system"] == "MeCeFO")
    text = failover_simulator(report)
    assert all(each["parameter"] in text for each in report["free"]) and " nan " not in text
    for table in text.split("\n\n"):
        assert len({line.count(" | ") for line in table.strip().splitlines()}) == 1, table
