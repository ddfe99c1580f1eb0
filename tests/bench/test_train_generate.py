"""The benchmark as a program: what it takes up, what it says of missing peers, and one whole quick run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import train_generate
from _worker_jla import layers_of

SCRIPT = Path(train_generate.__file__)


def test_a_record_is_taken_up_only_under_the_same_mark(tmp_path):
    file = tmp_path / "rows.json"
    record = train_generate.Record(file, "a", fresh=False)
    record.data["rows"]["tiny train"] = {"name": "train"}
    record.save()
    assert train_generate.Record(file, "a", fresh=False).data["rows"] == {"tiny train": {"name": "train"}}
    assert train_generate.Record(file, "b", fresh=False).data["rows"] == {}
    assert train_generate.Record(file, "a", fresh=True).data["rows"] == {}


def test_the_mark_changes_with_the_inputs():
    one = train_generate.fingerprint({"threads": 1})
    assert one == train_generate.fingerprint({"threads": 1}) != train_generate.fingerprint({"threads": 2})


def test_missing_peers_are_named_with_the_reason(tmp_path):
    bare = tmp_path / "bare"
    bare.write_text("#!/bin/sh\necho \"['jla']\"\n")
    bare.chmod(0o755)
    missing = train_generate.missing_peers({"transformers": "no-such-python", "jla": str(bare)})
    assert missing["transformers"] == "there is no interpreter 'no-such-python'"
    assert missing["jla"] == "its interpreter lacks jla"


def test_a_filter_without_rows_says_what_there_is(capsys):
    assert (
        train_generate.main(["--quick", "--only", "nothing", "--torch-python", "no", "--jla-python", "no"])
        == 2
    )
    assert "train 2x64" in capsys.readouterr().out


def test_jla_layers_pair_mixers_with_mlps():
    assert layers_of("M-M*-") == (["mamba2", "mamba2", "attention"], ["relu2", "none", "relu2"])
    with pytest.raises(ValueError, match="without a mixer"):
        layers_of("M--")


def _mark(folder):
    return json.loads((folder / "runs" / "quick" / "rows.json").read_text())["mark"]


@pytest.mark.slow
def test_quick_runs_without_torch_and_is_taken_up_again(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--out", str(out), "--runs", str(tmp_path / "runs")]
    command += ["--torch-python", "no-such-python", "--jla-python", "no-such-python"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "transformers: not measured, there is no interpreter 'no-such-python'" in done.stdout
    result = json.loads(out.read_text())
    assert {row["name"] for row in result["rows"]} == {"train 2x64", "prefill b1", "decode b2"}
    for row in result["rows"]:
        figure = row["contenders"]["jaxllm fp32"]["tokens_per_second"]
        assert 0 < figure["min"] <= figure["median"] <= figure["max"]
    for line in result["comparisons"]:
        assert line["ratio"] is None and line["bound_share"] > 0
    assert result["startup"]["import_to_first_step_seconds"]["warm"]["median"] > 0

    mark = _mark(tmp_path)
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0
    # Sources that change while this runs rightly start it afresh.
    if _mark(tmp_path) == mark:
        assert json.loads(out.read_text())["rows"] == result["rows"]
