"""The memory benchmark of long texts: its two forms are one function, it runs, and its table names what was compared."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments.bench import ssd_memory
from experiments.tables import training as tables
from tests.kernels.kernel_cases import close


def test_stretches_are_the_whole():
    arrays, A = ssd_memory.inputs(96), -jnp.linspace(0.1, 2.0, ssd_memory.H)
    wanted = jax.jit(ssd_memory.one_call)(arrays, A)
    close(jax.jit(partial(ssd_memory.in_stretches, stretch=32))(arrays, A), wanted, 1e-5)
    assert float(jnp.abs(wanted[0]).min()) < float(jnp.abs(wanted[0]).max())


def test_memory_that_grows_is_seen():
    rows = [{"form": "stretches", "tokens": n, "temporaries": 5} for n in (1, 2)]
    assert ssd_memory.constant([*rows, {"form": "one call", "tokens": 2, "temporaries": 9}])
    assert not ssd_memory.constant([rows[0], {**rows[1], "temporaries": 6}])


@pytest.mark.nightly
@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="reads /proc")
def test_the_quick_form_runs(tmp_path):
    out = tmp_path / "found.json"
    assert ssd_memory.main(["--quick", "--out", str(out)]) == 0
    data = json.loads(out.read_text())
    short, long = (row for row in data["results"] if row["form"] == "one call")
    assert long["temporaries"] > 1.9 * short["temporaries"]
    # The whole of them was seen, and what libraries set aside at their first use.
    assert all(row["extra"] > 0.5 * row["temporaries"] for row in data["results"])
    assert {"inputs", "versions", "device", "command", "date"} <= data.keys()
    assert "| stretches | 32,768 |" in tables.ssd_memory(data)


def test_the_table_says_what_was_not_run():
    row = {"form": "one call", "tokens": 2**20, "inputs": 2**31, "outputs": 2**30, "chunk_states": 2**31}
    data = {
        "results": [{**row, "temporaries": 2**33, "extra": None}],
        "inputs": {"heads": 4, "groups": 1, "P": 64, "N": 128, "stretch": 8192},
        "device": {"cpu": "cpu"},
        "versions": {"jax": "0"},
    }
    assert "| one call | 1,048,576 | 2,048 | 1,024 | 2,048 | 8,192 | not run |" in tables.ssd_memory(data)
