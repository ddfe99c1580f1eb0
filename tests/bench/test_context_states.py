"""The count of what recurrent layers receive: HLO is read right, and the quick form adds up."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.bench import context_states
from parallel.context import PlanConfig, layout, make_plan

ROOT = Path(__file__).parents[2]


def test_bytes_are_those_from_other_devices():
    text = """
    %all-to-all = (f32[2,1,3]{2,1,0}, /*index=1*/bf16[2,1,3]{2,1,0}) all-to-all(%a, %b), channel_id=1
    ROOT %all_gather.3 = f32[16,2]{1,0} all-gather(%c), channel_id=2
    %add.1 = f32[16,2]{1,0} add(%c, %c), metadata={op_name="all_gather"}
    """
    assert context_states.received(text, 2) == (6 * 4 + 6 * 2 + 32 * 4) // 2
    with pytest.raises(ValueError, match="all-reduce in a program"):
        context_states.received("%r = f32[2]{0} all-reduce(%a)", 2)


def test_reshuffled_tokens_are_those_of_other_stretches():
    plan = make_plan([40, 40, 17, 3], PlanConfig(3, block=4))
    owner = np.full(100, -1)
    for worker, slots in enumerate(layout(plan).index):
        owner[slots[slots >= 0]] = worker
    contiguous = np.arange(100) // 34
    received = [int(((owner == worker) & (contiguous != worker)).sum()) for worker in range(3)]
    assert context_states.reshuffled(plan) == max(received) > 0


@pytest.mark.slow
def test_the_quick_form_counts_what_the_layouts_say(tmp_path):
    out = tmp_path / "found.json"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    command = [sys.executable, "-m", "experiments.bench.context_states", "--quick", "--out", str(out)]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=600)
    data = json.loads(out.read_text())
    assert {"inputs", "versions", "device", "command", "date"} <= data.keys()
    assert len(data["results"]) == 8
    for row in data["results"]:
        layer = row["recurrent_layer"]
        wanted = row["layers"]["recurrent"] * (layer["scan"] + layer["convolution"])
        assert row["forward_pass"] == wanted + row["layers"]["attention"] * row["attention_layer"]
        assert (row["attention_layer"] == 0) == (row["way"] == "scattered")
    scattered, stretches = data["results"][:2]
    # States of slots there and of lanes back; of a stretch one each.
    ratio = scattered["recurrent_layer"]["scan"] / stretches["recurrent_layer"]["scan"]
    assert ratio == pytest.approx((scattered["slots"] + scattered["lanes"]) / 2, rel=0.05)
