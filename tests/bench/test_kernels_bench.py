"""The kernel benchmark: its GPU path on interpreted kernels, and what it says where there is nothing to measure."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments.bench import _kernels_gpu, _kernels_peers, _kernels_recurrent, _kernels_torch, kernels
from experiments.bench._kernels_flex import torch_flex
from experiments.tables import kernels as tables
from experiments.tables.text import TableError
from pallas_kernels import compat
from pallas_kernels.attention import cases as attention_cases
from pallas_kernels.paged_attention import cases as paged_cases
from pallas_kernels.quantized_matmul import cases as quantized_cases
from tests.kernels.proof import scaled

CASE = dataclasses.replace(scaled.CASES[1], flops=2e6, bytes_moved=1e6)


def test_the_bound_is_the_slower_of_products_and_bytes():
    reached = {"flops_per_s": 1e9, "bytes_per_s": 1e8}
    assert _kernels_gpu.least(CASE, reached) == pytest.approx(1e-2)
    assert _kernels_gpu.least(dataclasses.replace(CASE, bytes_moved=None), reached) == pytest.approx(2e-3)
    assert _kernels_gpu.least(scaled.CASES[1], reached) is None
    # One of two bounds alone might flatter.
    assert _kernels_gpu.least(CASE, {"flops_per_s": 1e9, "errors": {"bytes_per_s": "no"}}) is None


def test_cases_are_timed_beside_their_peers(monkeypatch):
    monkeypatch.setattr(_kernels_gpu, "bounds", lambda repeats: {"flops_per_s": 1e9, "bytes_per_s": 1e9})
    shown = []
    with compat.interpreted():
        report = _kernels_gpu.run([CASE], 1, shown.append)
    (result,) = report["results"]
    assert shown == [result] and result["implementation"] == "triton"
    assert result["seconds"] > 0 and result["peers"]["xla"] > 0
    assert result["bound_share"] == pytest.approx(2e-3 / result["seconds"])


def test_a_kernel_that_fails_is_a_row_and_other_ops_keep_theirs(monkeypatch, tmp_path, capsys):
    """A machine is lent for minutes: what ran is written at once, and a part of it can be measured again."""
    broken = dataclasses.replace(CASE, name="broken", function=lambda **_: 1 / 0)
    monkeypatch.setattr(_kernels_gpu, "bounds", lambda repeats: {"flops_per_s": 1e9, "bytes_per_s": 1e9})
    monkeypatch.setattr(kernels, "kernel_cases", lambda op: [broken, CASE])
    monkeypatch.setattr(kernels, "RESULTS", tmp_path)
    file = tmp_path / "kernels_gpu.json"
    old = [{"op": "other", "case": "kept"}, {"op": CASE.op, "case": "replaced"}]
    file.write_text(json.dumps({"results": old}))
    seen = []
    monkeypatch.setattr(_kernels_gpu, "peers", lambda case: seen.append(json.loads(file.read_text())) or {})
    with compat.interpreted():
        assert kernels.main(["--device", "gpu", "--op", CASE.op, "--out"]) == 1
    results = json.loads(file.read_text())["results"]
    assert [row["case"] for row in results] == ["kept", "broken", CASE.name]
    assert results[1]["error"].startswith("ZeroDivisionError") and results[2]["seconds"] > 0
    assert [row["case"] for row in seen[-1]["results"]] == ["kept", "broken"]
    assert "broken | failed: ZeroDivisionError" in capsys.readouterr().out
    assert (tmp_path / "kernels_gpu.png").stat().st_size > 1000


def test_a_peer_that_cannot_run_says_why():
    for name, case in (
        ("8B", attention_cases.CASES[-2]),
        ("tree", attention_cases.tree_case("t", 1, 8, 2, 1, 64)),
    ):
        found = _kernels_peers.peers(case)
        assert set(found) - {"xla"} == {
            "cuDNN, causal by row",
            "torch SDPA",
            "torch.compile, flex_attention",
            "pallas.ops.gpu attention_mgpu, causal by row",
            "jax-linear-attention",
        }
        assert (
            found["torch SDPA"] == "it has no mask of pairs"
            if name == "tree"
            else "torch" in found["torch SDPA"]
        )
    assert _kernels_peers._absent("no.such.package").startswith("no.such.package cannot be imported")
    assert "causal mask" in _kernels_peers._pallas_attention(attention_cases.CASES[-2])
    wide = attention_cases.CASES[-1]
    found = _kernels_peers.peers(wide)
    assert "torch" in str(found.pop("torch.compile, flex_attention"))
    assert set(map(str, list(found.values())[1:])) == {"it has no soft cap"}


def test_jax_has_a_peer_for_whole_pages_only():
    by_name = {case.name: _kernels_peers.peers(case) for case in paged_cases.CASES}
    theirs = {
        name: found["pallas.ops.gpu paged_attention, sealed pages only"] for name, found in by_name.items()
    }
    assert callable(theirs["8B decode 32k"]) and callable(theirs["small page16 d64"])
    assert "one query" in theirs["8B window 8 32k"] and "8 bits" in theirs["8B decode 32k 4 bits"]
    assert "no selection" in theirs["8B Quest 64k"]


def test_quantised_products_are_timed_beside_the_product_of_bfloat16():
    case = next(case for case in quantized_cases.CASES if case.small)
    arrays = jax.jit(case.inputs)(jax.random.key(0))
    assert _kernels_peers.peers(case)["a product of bfloat16"](arrays, 1) > 0


def test_what_a_device_reaches_is_measured():
    found = _kernels_gpu.bounds(1, size=64, megabytes=1)
    assert found["flops_per_s"] > 0 and found["bytes_per_s"] > 0


def test_without_a_gpu_or_a_case_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(kernels, "matmul_gflops", lambda *_: 1.0)
    assert kernels.main(["--device", "gpu", "--quick"]) == 2
    assert kernels.main(["--op", "nothing", "--quick"]) == 2
    shown = capsys.readouterr().out
    assert "no kernel is made for this device (cpu)" in shown and "no case of 'nothing'" in shown


def test_one_op_on_the_cpu(capsys, monkeypatch):
    monkeypatch.setattr(_kernels_torch, "torch_threads", lambda: "torch is not installed")
    monkeypatch.setattr(kernels, "matmul_gflops", lambda *_: 1.0)
    monkeypatch.setattr(kernels, "seconds", lambda *_, repeats: 1.0)
    assert kernels.main(["--op", "causal_conv", "--quick"]) == 0
    shown = capsys.readouterr().out
    assert "conv B4" in shown and "attention" not in shown
    assert "Nothing beside it: torch is not installed." in shown


def test_the_table_beside_torch_says_where_we_lose():
    row = {"case": "a", "operands": "float32", "mode": "forward", "seconds": 2e-3, "aim": 1.5}
    rows = [row | {"torch_seconds": 2e-3 * ratio, "ratio": ratio} for ratio in (0.5, 1.2, 2.0)]
    rows[0]["bound_seconds"] = 1e-3
    data = {"device": "cpu", "jax": "0", "beside_torch": {"torch": "1", "threads": 2, "results": rows}}
    lines = tables.kernels_torch(data).splitlines()
    assert [line.split("|")[-2].strip() for line in lines[2:5]] == [
        "we lose",
        "below the aim",
        "meets the aim",
    ]
    assert [line.split("|")[6].strip() for line in lines[2:5]] == ["1.000", "-", "-"]
    assert "torch 1, 2 threads each" in lines[-1]
    with pytest.raises(TableError, match="not there"):
        tables.kernels_torch({"beside_torch": {"missing": "not there", "results": []}})


def test_without_torch_the_rest_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(_kernels_torch, "torch_threads", lambda: "torch is not installed")
    monkeypatch.setattr(kernels, "matmul_gflops", lambda *_: 1.0)
    monkeypatch.setattr(kernels, "seconds", lambda *_, repeats: 1.0)
    assert kernels.main(["--op", "attention", "--quick"]) == 0
    assert "Nothing beside it: torch is not installed." in capsys.readouterr().out


REACHED = {"float32": 1e9, "bfloat16": 2e9, "bytes_per_s": 1e8}


def test_the_bound_of_a_pair_is_the_slower_of_products_and_bytes():
    pair = _kernels_torch.Pair("a", "bfloat16", "forward", int, int, flops=4e9, bytes=1e8)
    assert _kernels_torch.bound(pair, REACHED) == 2
    assert _kernels_torch.bound(dataclasses.replace(pair, dtype="float32"), REACHED) == 4
    assert _kernels_torch.bound(dataclasses.replace(pair, flops=None), REACHED) == 1
    assert _kernels_torch.bound(dataclasses.replace(pair, flops=None, bytes=None), REACHED) is None


def test_calls_that_take_long_are_fewer(monkeypatch):
    calls = []
    pair = _kernels_torch.Pair("a", "float32", "forward", lambda: calls.append(1), int)
    monkeypatch.setattr(_kernels_torch, "agree", lambda pair: None)
    assert _kernels_torch.measure(pair, 9, REACHED)["repeats"] == len(calls) == 9
    monkeypatch.setattr(_kernels_torch, "PATIENCE", 0.0)
    assert _kernels_torch.measure(pair, 9, REACHED)["repeats"] == _kernels_torch.LEAST


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("source", "count"),
    [
        (_kernels_torch.prompts, 4),
        (_kernels_torch.decodes, 6),
        pytest.param(_kernels_recurrent.scans, 5, marks=pytest.mark.nightly),
        pytest.param(_kernels_recurrent.delta_rules, 5, marks=pytest.mark.nightly),
        (_kernels_recurrent.convolutions, 5),
        (_kernels_recurrent.dynamic_convolutions, 4),
    ],
)
def test_both_libraries_give_the_same_and_are_timed(source, count):
    assert _kernels_torch.torch_threads() is None
    pairs = list(source(True))
    assert len({(pair.case, pair.dtype, pair.mode) for pair in pairs}) == len(pairs) == count
    for pair in pairs:
        row = _kernels_torch.measure(pair, 2, REACHED)
        assert row["ratio"] == row["torch_seconds"] / row["seconds"] > 0 and row["bound_seconds"] > 0
        # What a step leaves behind is what the next one finds.
        _kernels_torch.agree(pair)


@pytest.mark.oracle
def test_another_result_is_not_timed():
    pair = next(_kernels_recurrent.convolutions(True))
    ours = pair.ours
    with pytest.raises(AssertionError):
        _kernels_torch.measure(dataclasses.replace(pair, ours=lambda: 1.01 * ours()), 1, REACHED)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", attention_cases.CASES[:2], ids=lambda case: case.name)
def test_torch_is_told_the_same_rules(case):
    """Documents, window and soft cap: flex_attention step by step against the reference."""
    case = dataclasses.replace(case, gradients=())  # flex_attention has none on CPU
    arrays = jax.jit(case.inputs)(jax.random.key(3))
    theirs = torch_flex(case, arrays, compiled=False)().detach().float().numpy()
    ours, _ = case.call("reference")(arrays)
    live = np.asarray(arrays["q_segment_ids"]) != 0
    assert case.options.keys() <= {"window", "soft_cap", "scale"} and live.any()
    np.testing.assert_allclose(theirs[live], np.asarray(ours, np.float32)[live], rtol=0.02, atol=0.02)
