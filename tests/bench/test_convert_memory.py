"""The memory benchmark of conversions: its quick form runs, and its table names what was compared."""

import json
import os
from pathlib import Path

import pytest

from experiments.bench import convert_memory
from experiments.tables import training as tables

LINUX = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")


@LINUX
def test_the_sizes_and_the_memory_of_a_process(tmp_path):
    cfg, _ = convert_memory.TINY
    folder = convert_memory.write_folder(tmp_path / "model", cfg, 2000)
    known = convert_memory.sizes(folder)
    assert known["shards"] > 1 and known["layer"] < known["model"] and known["shard"] < known["model"]
    other = convert_memory.write_folder(tmp_path / "other", cfg, 2**20)
    assert convert_memory.sizes(other)["shards"] == 1
    assert convert_memory.digest(folder) == convert_memory.digest(other)
    status = convert_memory.status(os.getpid())
    assert set(status) == set(convert_memory.FIELDS) and status["VmHWM"] >= status["RssAnon"] > 2**20
    assert convert_memory.status(2**30) == {}


@LINUX
@pytest.mark.slow
def test_the_quick_form_keeps_every_bit(tmp_path):
    out = tmp_path / "found.json"
    assert convert_memory.main(["--quick", "--out", str(out)]) == 0
    data = json.loads(out.read_text())
    assert data["same_bits"] and [len(row["above_idle"]) for row in data["results"]] == [3, 3]
    assert {"inputs", "versions", "device", "command", "date"} <= data.keys()
    assert "MiB in 10 shards" in tables.convert_memory(data)


def test_the_table_is_in_mebibytes():
    sizes = {"RssAnon": 3 * 2**20, "RssFile": 0, "VmHWM": 5 * 2**20}
    known = {"model": 2**30, "shards": 4, "shard": 2**28, "layer": 2**27, "bound": 2**28 + 2**27}
    data = {
        "bytes": known,
        "results": [{"direction": "there", "above_idle": sizes}],
        "device": {"cpu": "cpu"},
        "versions": {"jax": "0"},
    }
    table = tables.convert_memory(data)
    assert "| there | 3 | 0 | 5 |" in table and "together 384 MiB" in table
