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


@pytest.mark.parametrize("op", ssd_memory.LAYERS)
@pytest.mark.parametrize("form", ["one call", pytest.param("gradients, one call", marks=pytest.mark.slow)])
def test_stretches_are_the_whole(op, form):
    layer = ssd_memory.LAYERS[op]
    arrays = ssd_memory.inputs(layer, 96)
    wanted = jax.jit(partial(ssd_memory.FORMS[form], layer))(arrays)
    cut = ssd_memory.FORMS[form.replace("one call", "stretches")]
    close(jax.jit(partial(cut, layer, stretch=32))(arrays), wanted, 1e-5)
    assert all(float(jnp.ptp(leaf)) > 0 for leaf in jax.tree.leaves(wanted))


def test_memory_that_grows_is_seen():
    rows = [{"op": "ssd", "form": "stretches", "tokens": 2**n, "temporaries": 5} for n in (14, 15)]
    assert ssd_memory.constant([*rows, {**rows[0], "form": "one call", "temporaries": 9}])
    assert not ssd_memory.constant([rows[0], {**rows[1], "temporaries": 6}])
    rows = [{**row, "form": "gradients, stretches"} for row in rows]
    # Four stretches, and the state before each.
    most = 5 + 4 * ssd_memory.STATE_BYTES
    assert ssd_memory.constant([rows[0], {**rows[1], "temporaries": most}])
    assert not ssd_memory.constant([rows[0], {**rows[1], "temporaries": most + 1}])


@pytest.mark.nightly
@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="reads /proc")
def test_the_quick_form_runs(tmp_path):
    out = tmp_path / "found.json"
    assert ssd_memory.main(["--quick", "--out", str(out)]) == 0
    data = json.loads(out.read_text())
    for op in ssd_memory.LAYERS:
        for form in ("one call", "gradients, one call"):
            short, long = (row for row in data["results"] if (row["op"], row["form"]) == (op, form))
            assert long["temporaries"] > 1.9 * short["temporaries"]
    # The whole of them was seen, and what libraries set aside at their first use.
    assert all(row["extra"] > 0.5 * row["temporaries"] for row in data["results"])
    assert {"inputs", "versions", "device", "command", "date"} <= data.keys()
    assert "| ssd | stretches | 32,768 |" in tables.ssd_memory(data)


def test_the_table_says_what_was_not_run():
    row = {
        "op": "ssd",
        "form": "one call",
        "tokens": 2**20,
        "inputs": 2**31,
        "outputs": 2**30,
        "chunk_states": 2**31,
    }
    data = {
        "results": [{**row, "temporaries": 2**33, "extra": None}],
        "inputs": {"heads": 4, "groups": 1, "P": 64, "N": 128, "stretch": 8192},
        "device": {"cpu": "cpu"},
        "versions": {"jax": "0"},
    }
    assert "| ssd | one call | 1,048,576 | 2,048 | 1,024 | 2,048 | 8,192 | not run |" in tables.ssd_memory(
        data
    )
