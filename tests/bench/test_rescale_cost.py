"""Counts of what scales cost: the arithmetic by hand, rows of a made-up loop, and what is published."""

import json

import pytest

from experiments.bench import rescale_cost
from experiments.tables import kernels as tables
from pallas_kernels.proof.sass import Mix


def test_the_estimate_is_the_ratio_of_an_instruction_to_products():
    """NVIDIA's peaks of an H100: 1979e12 operations of int8 and 67e12 of float32 a second, two to a multiply-add."""
    for steps in (2, 3):
        scaling, products = steps / (67e12 / 2), 128 / (1979e12 / 2)
        assert rescale_cost.estimate(steps) == pytest.approx(scaling / products, rel=0.1)


@pytest.mark.parametrize(
    ("case", "grouped", "estimated", "memory"),
    [
        ("int8 8B up M4096", (False, False), 0.0, None),
        ("W4A8 8B up M4096", (True, False), 0.5, None),
        ("W4A4 8B up M16", (True, True), 0.75, 206.1),
        ("int8 8B up M16 group128", (True, True), 0.75, 412.3),
    ],
)
def test_a_row_sorts_instructions_by_what_they_are_for(case, grouped, estimated, memory):
    counts = {"IGMMA.64x32x32.S8.S8": 4, "I2FP.F32.S32": 16, "FMUL": 17, "FFMA": 16, "LOP3.LUT": 24}
    counts |= {"IMAD.SHL.U32": 8, "IMAD.MOV.U32": 3, "HADD2.F32": 2}
    found = rescale_cost.row(case, Mix(counts, 4 * 64 * 32 * 32))
    assert (found["grouped_weights"], found["grouped_rows"]) == grouped
    # Half a cycle for each column of each instruction.
    assert found["tensor_cycles"] == 64 and found["estimated_share"] == estimated
    assert found["memory_cycles"] == (memory if memory is None else pytest.approx(memory, abs=0.1))
    assert [found[name] for name in ("convert", "scale", "unpack", "other", "total")] == [16, 35, 32, 7, 90]
    assert found["scales_share"] == 51 / 64 and found["total_share"] == 90 / 64


def test_what_is_published_adds_up_and_is_near_the_arithmetic():
    published = json.loads(rescale_cost.OUT.read_text(encoding="utf-8"))
    assert "not measured on a device" in published["target"]
    assert {r["case"] for r in published["results"]} == set(rescale_cost.CASES)
    for row in published["results"]:
        assert sum(row["counts"].values()) == row["total"]
        assert abs(row["scales_share"] - row["estimated_share"]) < 0.1
    text = tables.rescale_cost(published)
    assert len(text.strip().splitlines()) == len(rescale_cost.CASES) + 4


def test_nothing_compiled_is_no_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rescale_cost, "VERSIONS", {"0.10.2": "3.99"})
    out = tmp_path / "out.json"
    assert rescale_cost.main(["--environments", str(tmp_path), "--out", str(out)]) == 77
    assert not out.exists() and "no Python 3.99" in capsys.readouterr().out
