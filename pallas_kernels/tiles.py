"""Tile sizes as data: what the tuner found best on a device, or the defaults of the kernel.

A kernel's configuration is a frozen dataclass of integers and booleans. It asks ``tiles("attention", "forward d128",
Tiles())`` at trace time. ``tuned/<device>.json`` holds ``{"jax", "tiles": {op: {key: {field: value}}}}`` and is written by ``python -m
pallas_kernels.tune`` only.
"""

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax

from pallas_kernels.target import target

Tiles = TypeVar("Tiles")

FOLDER = Path(__file__).parent / "tuned"
# Part of JAX's trace cache key, so that the tuner's candidates are traced apart.
_candidate = jax.make_user_context(())


def file_of(kind: str, folder: Path = FOLDER) -> Path:
    """The file of a device kind: "NVIDIA H200" is nvidia_h200.json."""
    return folder / f"{re.sub(r'[^a-z0-9]+', '_', kind.lower()).strip('_')}.json"


@functools.cache
def _tuned(file: Path, _stamp: int) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


class Asked:
    """What kernels asked for while traced: (op, key, default), in order."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, str, Any]] = []


# Compared by identity, so that no earlier trace is taken for one in which nobody asks.
_asked = jax.make_user_context(None)


@contextlib.contextmanager
def listening() -> Iterator[Asked]:
    """Collects every configuration that calls traced inside ask for."""
    asked = Asked()
    with _asked(asked):
        yield asked


@contextlib.contextmanager
def using(op: str, key: str, value: Any) -> Iterator[None]:
    """Calls traced inside take ``value`` for this op and key, whatever is tuned."""
    with _candidate((*_candidate.value, (op, key, value))):
        yield


def tiles(op: str, key: str, default: Tiles) -> Tiles:
    """The configuration of a kernel for the device that is traced for.

    Args:
        op: name of the op.
        key: the calls that share a configuration, e.g. "forward d128 bfloat16".
        default: what runs where nothing is tuned; its type says which fields there are, and its method
            ``candidates()``, if there is one, what the tuner shall try.

    Raises:
        TypeError: the tuned file names a field that the dataclass does not have.
    """
    if _asked.value is not None:
        _asked.value.entries.append((op, key, default))
    for candidate_op, candidate_key, value in reversed(_candidate.value):
        if (candidate_op, candidate_key) == (op, key):
            return value
    file = file_of(target().kind)
    if not file.is_file():
        return default
    found = _tuned(file, file.stat().st_mtime_ns).get("tiles", {}).get(op, {}).get(key)
    return default if found is None else dataclasses.replace(default, **found)  # type: ignore[type-var]
