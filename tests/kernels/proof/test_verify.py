"""``verify`` and ``tune`` on interpreted kernels, and what they say where there is nothing to do."""

import json

import pytest

from pallas_kernels import compat, records, tiles, timing, tune, verify
from tests.kernels.proof import scaled


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The tiny kernels as the only ones there are, interpreted."""
    monkeypatch.setattr(verify, "cases", lambda op=None: scaled.CASES)
    monkeypatch.setattr(records, "local", lambda: tmp_path)
    with compat.interpreted():
        yield tmp_path


def test_verify_records_what_passes_and_takes_back_what_fails(tiny, monkeypatch, capsys):
    assert verify.main([]) == 0
    record = json.loads(next(tiny.iterdir()).read_text())
    assert {name: entry["cases"] for name, entry in record["passed"]["scaled"].items()} == {
        "mosaic_gpu": 1,
        "triton": 1,
    }
    # Only what is broken loses its pass.
    broken = scaled.Case(
        **{**vars(scaled.CASES[0]), "function": lambda x, w, implementation: x * len(implementation)}
    )
    monkeypatch.setattr(verify, "cases", lambda op=None: [broken, scaled.CASES[1]])
    assert verify.main([]) == 1
    assert "FAIL scaled mosaic_gpu: product 128" in capsys.readouterr().out
    assert set(json.loads(next(tiny.iterdir()).read_text())["passed"]["scaled"]) == {"triton"}


def test_a_plan_in_three_minutes_leaves_no_kernel_out(monkeypatch):
    monkeypatch.setattr(compat, "cudnn_version", lambda: 91_000)
    device = verify._EXAMPLE
    short, whole = (verify.plan(device, everything=everything) for everything in (False, True))
    named = {(case.op, name, bool(case.gradients)) for case, name in whole}
    assert {(case.op, name, bool(case.gradients)) for case, name in short} == named
    # cuDNN takes its pass from here too.
    assert ("attention", "cudnn", True) in named
    assert len(short) < 0.75 * len(whole) and {id(c) for c, _ in short} <= {id(c) for c, _ in whole}
    assert all((case, name) in short for case, name in whole if case.small)


def test_the_tuner_times_only_what_is_right_and_kernels_read_its_file(tiny, monkeypatch, capsys):
    times = iter([3.0, 2.0])
    monkeypatch.setattr(tune, "seconds", lambda *_: next(times))
    assert tune.main(["--folder", str(tiny)]) == 0
    assert "refused  Tiles(rows=64, share=0.5)" in capsys.readouterr().out
    monkeypatch.setattr(tiles, "FOLDER", tiny)
    monkeypatch.setattr(tiles, "file_of", lambda kind: tiny / "cpu.json")
    assert tiles.tiles("scaled", "product", scaled.Tiles()) == scaled.Tiles(rows=128)
    assert tiles.tiles("scaled", "other", scaled.Tiles()) == scaled.Tiles()
    with tiles.using("scaled", "product", scaled.Tiles(rows=256)):
        assert tiles.tiles("scaled", "product", scaled.Tiles()).rows == 256


def test_without_a_gpu_both_say_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(verify, "cases", lambda op=None: scaled.CASES)
    assert verify.main([]) == 2
    shown = capsys.readouterr().out
    assert "Nothing to verify on this device (cpu)" in shown and "would run 2 cases" in shown
    assert tune.main(["--folder", str(tmp_path)]) == 2
    assert "Nothing to tune on this device (cpu)" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_timing_takes_the_median_of_wall_times_here():
    assert 0 < timing.seconds(lambda x: x + 1, 1.0, repeats=3) < 1
