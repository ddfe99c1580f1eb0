"""What the nightly oracles leave behind: every draw that passed, in experiments/results/nightly_oracles.json.

A draw is written as soon as it has passed, so a run may stop and be taken up with ``-k``. One that runs again is crossed
out first, so that a failure leaves nothing there. Draws of other versions or another CPU are dropped: a file is about
one environment.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from jaxllm.cli import machine

RESULT = Path(__file__).parents[1] / "experiments" / "results" / "nightly_oracles.json"
# Without the checks of types, which take as long as tracing.
COMMAND = (
    "python -m pytest -o addopts=--import-mode=importlib -m 'oracle and nightly'"
    " tests/hf/test_moe_oracle.py tests/model/test_mixer_oracle.py"
)


def environment() -> dict[str, Any]:
    """Versions and device, as the file has them."""
    device = {"platform": jax.default_backend(), "cpu": machine.cpu_name(), "cores": machine.cores()}
    return {"versions": machine.versions(), "device": device}


@contextmanager
def recorded(
    test: str, family: str, number: int, *, of: int, tolerance: float, file: Path = RESULT
) -> Iterator[dict[str, Any]]:
    """One draw; what the block puts into the dictionary, with its worst ``error``, is written if nothing was raised.

    Args:
        test: the test's file, from the root.
        family: whose draw it is.
        number: which of them, from 0.
        of: how many draws the family has.
        tolerance: what ``error`` may be at most.
        file: where to write.
    """
    head = {"test": test, "family": family, "of": of, "tolerance": tolerance}
    found: dict[str, Any] = {}
    _replace(file, head, number, [])
    yield found
    _replace(file, head, number, [{"number": number} | found])


def _replace(file: Path, head: dict[str, Any], number: int, rows: list[dict[str, Any]]) -> None:
    """Put ``rows``, one or none, in the place of a family's draw."""
    now, families = environment(), []
    data = json.loads(file.read_text()) if file.is_file() else {"families": []} | now
    if {name: data[name] for name in now} == now:
        families = data["families"]
    who = (head["test"], head["family"])
    for family in families:
        if (family["test"], family["family"]) == who:
            rows = [row for row in family["draws"] if row["number"] != number] + rows
    families = [family for family in families if (family["test"], family["family"]) != who]
    if rows:
        worst = max(rows, key=lambda row: row["error"])
        summary = {"passed": len(rows), "worst_error": worst["error"], "worst_number": worst["number"]}
        families.append(head | summary | {"draws": sorted(rows, key=lambda row: row["number"])})
    families.sort(key=lambda family: (family["test"], family["family"]))
    text = json.dumps({"command": COMMAND, **now, "families": families}, indent=1)
    # A line per draw.
    text = re.sub(r'\{\s+("number"[^{}]*?)\s+\}', lambda match: "{" + " ".join(match[1].split()) + "}", text)
    file.write_text(text + "\n")
