"""Scenarios of failures: drawn at the right rates, and written ones checked."""

import json
import math

import numpy as np
import pytest
import yaml

from parallel.failover.scenario import (
    PUBLISHED,
    Rate,
    Scenario,
    ScenarioError,
    Window,
    draw_scenario,
    read_scenario,
)


def erlang(offered: float, servers: int) -> float:
    """Mean number of busy servers in the loss system M/G/n/n; ``offered`` itself where servers are many."""
    terms = [math.exp(k * math.log(offered) - math.lgamma(k + 1)) for k in range(servers + 1)]
    return offered * (1 - terms[-1] / sum(terms))


@pytest.mark.parametrize("repair", ["fixed", "exponential"])
@pytest.mark.parametrize(
    ("workers", "rate"), [(32, PUBLISHED["high"]), (3, Rate(100.0, 250.0)), (1, Rate(9.0, 4.0))]
)
def test_as_many_are_down_as_queueing_theory_says(workers, rate, repair, seed):
    runs = [draw_scenario(workers, 8 * rate.repair, rate, seed + n, repair, warm=True) for n in range(200)]
    down = np.array([each.mean_down() for each in runs])
    error = down.std(ddof=1) / math.sqrt(len(down))
    # Five standard errors: beyond one draw in a million.
    assert abs(down.mean() - erlang(rate.down, workers)) < 5 * error
    assert error < 0.1 * rate.down


def test_in_a_large_cluster_rate_times_repair_are_down_from_the_first_second_if_warm(seed):
    rate = PUBLISHED["mid"]
    at_first = {
        warm: np.mean(
            [
                sum(w.begin == 0 for w in draw_scenario(1024, 60.0, rate, seed + n, warm=warm).windows)
                for n in range(400)
            ]
        )
        for warm in (True, False)
    }
    assert at_first[False] == 0
    assert abs(at_first[True] - 3) < 5 * math.sqrt(3 / 400)


def test_published_rates():
    """Two, three and four of 32 workers down in the mean."""
    assert [rate.down for rate in PUBLISHED.values()] == [2, 3, 4]


def test_the_same_seed_draws_the_same_windows_and_nobody_fails_while_down(seed):
    draws = [draw_scenario(4, 1e4, Rate(50.0, 120.0), seed) for _ in range(2)]
    assert draws[0] == draws[1] != draw_scenario(4, 1e4, Rate(50.0, 120.0), seed + 1)
    assert len({window.worker for window in draws[0].windows}) == 4
    assert all(0 < window.begin < 1e4 for window in draws[0].windows)


@pytest.mark.parametrize("write", [json.dumps, yaml.safe_dump])
def test_a_file_is_read(write, tmp_path):
    file = tmp_path / "scenario.yaml"
    windows = [{"worker": 1, "begin": 10, "end": 20.5}, {"worker": 1, "begin": 20.5, "end": 30}]
    file.write_text(write({"workers": 2, "seconds": 100, "windows": windows}))
    found = read_scenario(file)
    assert found == Scenario(2, 100.0, (Window(1, 10.0, 20.5), Window(1, 20.5, 30.0)))
    assert found.mean_down() == pytest.approx(0.2)


WINDOW = {"worker": 0, "begin": 1, "end": 2}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"windows": [WINDOW, {"worker": 0, "begin": 1.5, "end": 3}]},
            "worker 0 overlap: 1.0 to 2.0 s and 1.5 to 3.0",
        ),
        ({"windows": [{**WINDOW, "end": 9}, WINDOW]}, "worker 0 overlap"),
        ({"windows": [{**WINDOW, "worker": 2}]}, "unknown worker; the scenario has 0 to 1"),
        ({"windows": [{**WINDOW, "worker": -1}]}, "unknown worker"),
        ({"windows": [{**WINDOW, "begin": -3}]}, "begin must be 0 or a later"),
        ({"windows": [{**WINDOW, "end": 1}]}, "end must be after begin"),
        ({"windows": [{**WINDOW, "begin": float("nan")}]}, "begin must be"),
        ({"windows": [{"worker": 0, "begin": 1}]}, r"windows\[0\]: end is missing"),
        ({"windows": [{**WINDOW, "until": 3}]}, "unknown until; allowed are worker, begin, end"),
        ({"windows": [{**WINDOW, "worker": 0.5}]}, "worker=0.5 must be a whole number"),
        ({"windows": [{**WINDOW, "begin": "soon"}]}, "begin='soon' must be a number"),
        ({"windows": {}}, "windows={} must be a list"),
        ({"windows": [3]}, r"windows\[0\]: must be a mapping"),
        ({"workers": 0}, "workers=0"),
        ({"workers": True}, "workers=True must be a whole number"),
        ({"seconds": -1}, "seconds=-1"),
        ({"sedonds": 4}, "unknown sedonds"),
    ],
)
def test_bad_files_are_refused_by_name(change, words, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(yaml.safe_dump({"workers": 2, "seconds": 100, "windows": [WINDOW], **change}))
    with pytest.raises(ScenarioError, match=f"bad.yaml: .*{words}"):
        read_scenario(file)


def test_files_that_are_none_are_refused_by_name(tmp_path):
    with pytest.raises(ScenarioError, match=r"none\.yaml: cannot be read"):
        read_scenario(tmp_path / "none.yaml")
    (tmp_path / "no.yaml").write_text("{workers: [")
    with pytest.raises(ScenarioError, match=r"no\.yaml: is neither YAML nor JSON"):
        read_scenario(tmp_path / "no.yaml")
    with pytest.raises(ScenarioError, match="both must be above 0"):
        draw_scenario(2, 10.0, Rate(0.0, 1.0), 0)
    with pytest.raises(ScenarioError, match="repair='normal': must be one of fixed, exponential"):
        draw_scenario(2, 10.0, Rate(1.0, 1.0), 0, "normal")
