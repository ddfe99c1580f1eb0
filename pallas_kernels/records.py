"""Pass records: on which device, with which JAX and which sources an op's kernels were right.

A record is ``{"device", "jax", "passed": {op: {implementation: {"sources": hash, "cases": n}}}}``, one file per device
kind and JAX version. Shipped ones lie in ``pallas_kernels/records``; ``python -m pallas_kernels.verify`` writes its own
to the user's cache.
"""

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pallas_kernels import compat
from pallas_kernels.tiles import file_of

SHIPPED = Path(__file__).parent / "records"
# What every kernel is built of, beside the files of its own op.
_SHARED = ("compat.py", "mosaic.py", "tiles.py")
# And the ops whose kernels, or parts of them, it takes.
_BORROWED = {
    "causal_conv.step": ("causal_conv",),
    "dynamic_conv": ("causal_conv",),
    "paged_attention": ("attention",),
    "ssd.step": ("attention",),
}


def local() -> Path:
    """Where this user's own records lie."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "jaxllm" / "kernel-records"


@functools.cache
def sources(op: str) -> str:
    """Hash of what an op's kernels are made of; its reference, its XLA path and its cases are not."""
    root = Path(__file__).parent
    folders = [root.joinpath(*name.split(".")) for name in (op, *_BORROWED.get(op, ()))]
    files = [file for folder in folders for file in sorted(folder.glob("*.py"))]
    own = [file for file in files if file.name not in ("reference.py", "xla.py", "cases.py")]
    digest = hashlib.sha256()
    for file in [*own, *(root / name for name in _SHARED)]:
        digest.update(file.name.encode() + b"\\0" + file.read_bytes() + b"\\0")
    return digest.hexdigest()[:16]


def file_for(folder: Path, kind: str, jax: str = compat.JAX) -> Path:
    """The record of a device kind and a JAX version."""
    return folder / f"{file_of(kind).stem}_jax_{jax}.json"


@functools.cache
def _read(file: Path, _stamp: int) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def verified(op: str, implementation: str, kind: str) -> str | None:
    """None if a record says that these sources passed on this device kind with this JAX; else what is missing."""
    why = f"no pass record for {kind} with jax {compat.JAX}"
    for folder in (SHIPPED, local()):
        file = file_for(folder, kind)
        if not file.is_file():
            continue
        passed = _read(file, file.stat().st_mtime_ns)["passed"].get(op, {}).get(implementation)
        if passed is None:
            why = f"the record for {kind} with jax {compat.JAX} has no pass of it"
        elif passed["sources"] != sources(op):
            why = "its sources have changed since it was verified"
        else:
            return None
    return why


def write(folder: Path, kind: str, results: Mapping[str, Mapping[str, int | None]]) -> Path:
    """Add results to the record of this device kind and JAX version.

    Args:
        folder: where the record lies.
        kind: device kind.
        results: by op and implementation the number of cases that passed, or None where one failed: an earlier pass
            is taken back then.
    """
    file = file_for(folder, kind)
    record = {"device": kind, "jax": compat.JAX, "passed": {}}
    if file.is_file():
        record = json.loads(file.read_text(encoding="utf-8"))
    for op, implementations in results.items():
        entry = record["passed"].setdefault(op, {})
        for name, count in implementations.items():
            entry.pop(name, None)
            if count is not None:
                entry[name] = {"sources": sources(op), "cases": count}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(file)
    return file
