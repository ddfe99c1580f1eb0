"""The record of nightly draws: written one by one, failures crossed out, environments never mixed."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests import nightly_record
from tests.nightly_record import recorded


def draw(file: Path, family: str, number: int, error: float | None) -> None:
    """A draw that ends with ``error``, or fails."""
    with recorded("test_a.py", family, number, of=3, tolerance=1e-4, file=file) as found:
        assert error is not None
        found |= {"error": error, "caught": 3}


def families(file: Path) -> list[Any]:
    return json.loads(file.read_text())["families"]


def test_every_draw_that_passed_stands_there_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    for number, error in ((2, 3e-5), (0, 1e-6)):
        draw(file, "second", number, error)
    draw(file, "first", 1, 2e-6)
    first, second = families(file)
    assert first["family"] == "first" and first["draws"] == [{"number": 1, "error": 2e-6, "caught": 3}]
    assert [row["number"] for row in second["draws"]] == [0, 2]
    assert (second["passed"], second["of"], second["tolerance"]) == (2, 3, 1e-4)
    assert (second["worst_error"], second["worst_number"]) == (3e-5, 2)
    assert '{"number": 2, "error": 3e-05, "caught": 3}' in file.read_text()

    draw(file, "second", 0, 4e-5)
    assert families(file)[1]["worst_error"] == 4e-5 and families(file)[1]["passed"] == 2
    with pytest.raises(AssertionError):
        draw(file, "second", 0, None)
    assert [row["number"] for row in families(file)[1]["draws"]] == [2]
    assert families(file)[1]["worst_error"] == 3e-5
    with pytest.raises(AssertionError):
        draw(file, "first", 1, None)
    assert [family["family"] for family in families(file)] == ["second"]


def test_another_environment_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "found.json"
    draw(file, "first", 0, 1e-6)
    here = nightly_record.environment()
    monkeypatch.setattr(nightly_record, "environment", lambda: here | {"versions": {"jax": "0"}})
    draw(file, "first", 1, 2e-6)
    (family,) = families(file)
    assert [row["number"] for row in family["draws"]] == [1]
    assert json.loads(file.read_text())["versions"] == {"jax": "0"}
