"""The whole-model benchmark: its quick form runs, is taken up again, and tells what could not be measured."""

import dataclasses
import json

import jax
import pytest

from experiments.bench import _kernels_gpu, _model_runs, _model_work, model_gpu
from jaxllm.model.functional import abstract_params, flatten
from pallas_kernels import dispatch

QUICK = _model_work.models(True)


def test_models_have_the_sizes_that_rows_claim_and_every_op_has_a_name():
    full = _model_work.models(False)
    for name in ("M*-E", "M-*", "dense"):
        assert 1e9 < sum(leaf.size for leaf in flatten(abstract_params(full[name])).values()) < 3e9
    for row in _model_work.rows(False):
        assert row.model in full and set(row.implementations()) == set(dispatch.IMPLEMENTATIONS)
    names = [row.name for row in _model_work.rows(False)]
    assert len(set(names)) == len(names)
    assert _model_work.Row("train", "dense", 1, 8).implementations()["attention"] == "mosaic_gpu"


def test_a_decode_step_moves_the_experts_it_draws_and_the_states():
    cfg = _model_work.precise(QUICK["nano"], "decode")
    one, many = (_model_work.decode_bytes(cfg, batch, 64) for batch in (1, 1000))
    read, state = _model_work._states(cfg, 64)
    assert read == 2 * 64 * cfg.attention.num_kv_heads * cfg.attention.head_dim * 2
    weights = 2 * sum(leaf.size for leaf in flatten(abstract_params(cfg)).values())
    embedding = 2 * cfg.vocab_size * cfg.hidden_size
    whole = weights - embedding + 1000 * 2 * cfg.hidden_size
    assert many - 1000 * (read + 2 * state) == pytest.approx(whole, rel=1e-3)
    assert one < many / 2


def test_memory_is_judged_before_a_row_is_tried(monkeypatch):
    cfg = _model_work.precise(QUICK["nano"], "decode")
    few, many = (_model_work.Row("decode", "nano", batch, 1024, 64, "xla") for batch in (4, 8))
    read, state = _model_work._states(cfg, 1024 + 64)
    more = _model_work.memory(cfg, many) - _model_work.memory(cfg, few)
    assert 4 * (read + state) < more < 40 * (read + state)
    monkeypatch.setitem(_model_runs.KINDS, "decode", None)
    refused = _model_runs.measure(many, QUICK["nano"], _model_work.memory(cfg, many) - 1, 1)
    assert refused["error"].startswith("needs about 0 GiB, the device has 0")


def test_a_row_that_fails_says_why_and_leaves_the_others(monkeypatch):
    row = _model_work.rows(True)[0]

    def exhausted(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7 bytes")

    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    monkeypatch.setitem(_model_runs.KINDS, "train", exhausted)
    assert "out of memory" in _model_runs.measure(row, QUICK[row.model], None, 1)["error"]
    monkeypatch.setitem(_model_runs.KINDS, "train", lambda *_: 1 / 0)
    assert _model_runs.measure(row, QUICK[row.model], None, 1)["error"].startswith("ZeroDivisionError")
    # On this device the kernels that full rows name are refused, not replaced.
    monkeypatch.setitem(_model_runs.KINDS, "train", lambda *_: dispatch.choose("attention", "auto"))
    named = dataclasses.replace(row, attention="mosaic_gpu")
    assert "needs a Hopper GPU" in _model_runs.measure(named, QUICK[row.model], None, 1)["error"]


def test_without_a_gpu_or_a_row_it_says_so(capsys):
    assert model_gpu.main([]) == 2
    assert model_gpu.main(["--quick", "--only", "nothing"]) == 2
    shown = capsys.readouterr().out
    assert "the device is cpu" in shown and "rows are train M*-E" in shown


def test_aims_and_shares():
    data = {"bounds": {"flops_per_s": 8e14, "bytes_per_s": 4e12}, "peak_flops_per_s": 1e15, "rows": {}}
    train = model_gpu.shares(
        _model_work.Row("train", "a", 1, 8, aims=(("mfu", 0.45),)), {"flops_per_s": 4e14}, data
    )
    assert train["mfu"] == 0.4 and train["product_share"] == 0.5 and not train["aims"]["mfu"]["met"]
    data["rows"]["p"] = {"kind": "prefill", "model": "a", "length": 8, "seconds": 2.0}
    row = _model_work.Row("decode", "a", 4, 8, 6, aims=(("output_tokens_per_s", 2.0),))
    found = model_gpu.shares(row, {"flops_per_s": 1e14, "bytes_per_s": 1e12, "seconds": 0.5}, data)
    assert found["byte_share"] == 0.25 and found["output_tokens_per_s"] == 24 / (8 + 3)
    assert found["aims"]["output_tokens_per_s"] == {"least": 2.0, "met": True}


def test_a_row_during_which_the_process_died_is_not_tried_again(tmp_path, monkeypatch):
    file, mark = tmp_path / "rows.json", {"quick": True}
    row = _model_work.rows(True)[0]
    model_gpu.Record(file, mark, False).put(row.name, {"error": model_gpu.RUNNING})
    record = model_gpu.Record(file, mark, False)
    monkeypatch.setattr(model_gpu, "measure", None)
    model_gpu.run([row], record, 60, True, None)
    assert record.data["rows"][row.name]["error"] == model_gpu.RUNNING
    assert model_gpu.Record(file, {"quick": False}, False).data["rows"] == {}
    assert model_gpu.Record(file, mark, True).data["rows"] == {}


def test_a_bound_that_fails_costs_its_shares_and_no_row(tmp_path, monkeypatch, capsys):
    """And the next run, which reaches it, adds the shares to the rows that are there."""
    figures = {"tokens_per_s": 1.0, "flops_per_s": 1e9, "bytes_per_s": 1e9, "seconds": 1.0}
    out, measured = tmp_path / "found.json", []
    monkeypatch.setattr(model_gpu, "measure", lambda row, *_: measured.append(row.name) or dict(figures))

    def failing(*_, **__):
        raise RuntimeError("the GPU reports no kernel times")

    reached = {"flops_per_s": 4e9, "bytes_per_s": 2e9}
    for fail, shares in ((("_product", "copy_bytes"), {}), (("copy_bytes",), {"product_share": 0.25})):
        with monkeypatch.context() as broken:
            for name, key in (("_product", "flops_per_s"), ("copy_bytes", "bytes_per_s")):
                value = failing if name in fail else lambda *_, key=key: reached[key]
                broken.setattr(_kernels_gpu, name, value)
            assert model_gpu.main(["--quick", "--out", str(out)]) == 0
        data, shown = json.loads(out.read_text()), capsys.readouterr().out
        assert "a copy reaches is not known (RuntimeError: the GPU reports" in shown.replace("\n", " ")
        assert len(data["bounds"]["errors"]) == len(fail) and "bytes_per_s" in data["bounds"]["errors"]
        for row in data["rows"].values():
            assert "byte_share" not in row and shares == {k: row[k] for k in shares}
            assert ("product_share" in row) == bool(shares) and row["tokens_per_s"] == 1.0
    monkeypatch.setattr(_kernels_gpu, "_product", lambda *_: 4e9)
    monkeypatch.setattr(_kernels_gpu, "copy_bytes", lambda *_: 2e9)
    assert model_gpu.main(["--quick", "--out", str(out)]) == 0
    data = json.loads(out.read_text())
    assert data["bounds"] == reached and "reaches 0.00 TFLOP/s" in capsys.readouterr().out
    assert {row.get("byte_share") for row in data["rows"].values()} == {None, 0.5}
    assert measured == [row.name for row in _model_work.rows(True)]


@pytest.mark.slow
def test_the_quick_form_measures_every_kind(tmp_path, capsys):
    out = tmp_path / "found.json"
    assert model_gpu.main(["--quick", "--out", str(out)]) == 0
    data = json.loads(out.read_text())
    assert [row["name"] for row in data["rows"].values()] == [row.name for row in _model_work.rows(True)]
    for row in data["rows"].values():
        assert "error" not in row and row["tokens_per_s"] > 0 and row["product_share"] > 0
        if row["kind"] == "decode":
            assert row["byte_share"] > 0 and row["output_tokens_per_s"] < row["tokens_per_s"]
    assert out.with_suffix(".png").stat().st_size > 1000
    assert model_gpu.main(["--quick", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["rows"] == data["rows"]
