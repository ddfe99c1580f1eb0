"""Compiled steps of context parallelism: what their collectives are for, and the table; one is compiled (extra ``aot``)."""

import json
import sys
from dataclasses import replace

import pytest

from experiments import _fcp_aot_table, _fcp_program
from experiments._schedule import Collective
from experiments.bench import fcp_aot, kernels_aot
from experiments.tables import parallel as tables

TINY = next(case for _, case in fcp_aot.programs(quick=True))


def brings(kind: str, shape: str, *origin: str, size: int = 8) -> Collective:
    return Collective(kind, "c", origin, shape, 8, size, 2, True, True, ())


@pytest.mark.parametrize(
    ("one", "wanted"),
    [
        (brings("collective-permute", "(bf16[2,64,2,32]{3,2,1,0})", "context_attention"), "keys and values"),
        (brings("collective-permute", "f32[2,64,2,32]{3,2,1,0}", "context_attention"), "their gradients"),
        (
            brings("collective-permute", "(bf16[2,4]{1,0}, f32[2]{0})", "context_attention"),
            "keys, values and gradients",
        ),
        (brings("all-to-all", "f32[8]{0}", "to_shares", "scaled_states", "ssd"), "states of blocks"),
        (brings("all-gather", "f32[8]{0}", "scaled_states", "ssd"), "decays of blocks"),
        (brings("all-gather", "f32[8]{0}", "Placement.share", "at_hand"), "parameters"),
        (brings("reduce-scatter", "f32[8]{0}", "Placement.share"), "gradients of parameters"),
        (brings("all-reduce", "f32[8]{0}"), "gradients and sums"),
    ],
)
def test_every_collective_has_a_purpose(one, wanted):
    assert _fcp_program.purpose(one) == wanted


def test_one_of_unknown_purpose_is_refused():
    with pytest.raises(ValueError, match=r"all-gather of f32\[8\].* of unknown purpose"):
        _fcp_program.purpose(brings("all-gather", "f32[8]{0}", "somewhere"))


def test_gathered_keys_are_found_by_their_shape_and_by_their_place():
    found = [
        brings("all-gather", "bf16[64,64,2,32]{3,2,1,0}", "Placement.share", size=5),
        brings("all-gather", "f32[7]{0}", "context_attention", size=7),
        brings("all-gather", "f32[64,4]{1,0}", "scaled_states"),
        brings("collective-permute", "bf16[64,64,2,32]{3,2,1,0}", "context_attention"),
    ]
    assert _fcp_program.gathered_keys(TINY, found) == 2 * (5 + 7)
    assert _fcp_program.gathered_keys(TINY, found[2:]) == 0


def test_bytes_of_a_plan_stand_beside_those_of_the_program():
    case = replace(TINY, tokens=4096)
    told = _fcp_program.exchange(case, [])
    assert told["fetched_bytes"] == 0 and told["slot_bytes"] == 2 * 64 * 2 * 32 * 2
    assert told["sent_bytes"] == [told["rounds"] * told["slot_bytes"]] * 8
    # A program that fetches twice, and gives gradients back once.
    blocks = f"bf16[{told['rounds']},64,2,32]"
    twice = brings("collective-permute", f"({blocks}{{0}}, {blocks}{{0}})", "context_attention")
    back = brings("collective-permute", "f32[3,64,2,32]{0}", "context_attention")
    told = _fcp_program.exchange(case, [twice, back])
    assert told["fetches"] == 2 and told["returned_bytes"] == 2 * 3 * 64 * 2 * 32 * 4
    ragged = _fcp_program.exchange(replace(case, exchange="ragged"), [])
    assert ragged["need_bytes"] == ragged["sent_bytes"] and ragged["ratio"] == 1
    assert sum(told["need_bytes"]) < sum(told["sent_bytes"]) and told["ratio"] > 1


def test_programs_have_names_and_a_compiler_that_dies_is_told(tmp_path):
    names = [(version, case.name) for version, case in fcp_aot.programs(quick=False)]
    assert len(set(names)) == len(names) and {version for version, _ in names} == set(kernels_aot.VERSIONS)
    found = fcp_aot.row(TINY, "0.10.2", "false", tmp_path)
    assert found["error"].startswith("the compiler died (1)")
    (line,) = _fcp_aot_table.programs({"results": [found]})
    assert "does not compile" in line[2]


def test_packages_of_an_environment_are_installed_once(tmp_path, monkeypatch):
    calls = []

    def run(command, **_):
        calls.append(command)
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(kernels_aot.subprocess, "run", run)
    home = tmp_path / "jax-1"
    home.mkdir()
    (home / "complete").touch()
    assert kernels_aot.environment(tmp_path, "1", "3.11") == home / "bin" / "python" and not calls
    for _ in range(2):
        kernels_aot.environment(tmp_path, "1", "3.11", ("flax",))
    assert [call[4:] for call in calls] == [["-q", "jax==1", "flax"]]


def test_the_table_adds_up():
    keys = {"kind": "collective-permute", "what": "keys and values", "count": 4, "bytes": 4_000_000}
    keys |= {"asynchronous": 3, "hidden_bytes": 3_000_000, "marked_bytes": 1_000_000}
    sums = keys | {"kind": "all-reduce", "what": "gradients and sums", "count": 6, "asynchronous": 5}
    made = {
        "case": {"name": "fcp", "pattern": "M*E", "options": {"flag": 1}},
        "jax": "0.10.2",
        "error": None,
        "memory": {"argument": 2_000_000_000, "device": 14_100_000_000, "share": 0.1},
        "collectives": [keys, sums],
        "exchange": {"ratio": 1.25},
    }
    text = tables.fcp_aot({"results": [made], "memory_bytes": 141_000_000_000})
    assert "| fcp | `M*E` | 2.0 | 14.1 (10%) | 8 of 10 | 25% | 1.25 |" in text
    assert "| collective-permute | keys and values | 4 | 4.0 | 3 | 75% | 25% |" in text


@pytest.mark.aot
def test_a_tiny_step_compiles_for_eight_gpus(tmp_path):
    case = replace(TINY, pattern="*", options=fcp_aot.MORE)
    file = tmp_path / "text"
    answer = fcp_aot.compiled(case, file, sys.executable)
    assert answer["error"] is None, answer["error"]
    told = _fcp_program.described(case, file.read_text())
    json.dumps(told)
    assert told["gathered_keys_bytes"] == 0 and told["exchange"]["fetches"] == 3
    keys = [row for row in told["collectives"] if row["what"] in _fcp_program.KEYS_AND_GRADIENTS]
    assert sum(row["bytes"] for row in keys) == (
        told["exchange"]["fetched_bytes"] + told["exchange"]["returned_bytes"]
    )
    assert sum(row["marked"] for row in keys) > 0
