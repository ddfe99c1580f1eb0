"""Pass records: on which device, with which JAX and which sources an op's kernels were right.

A record is ``{"device", "jax", "passed": {op: {implementation: {"sources": hash, "cases": n}}}}``, one file per device
kind and JAX version. Shipped ones lie in ``pallas_kernels/records``; ``python -m pallas_kernels.verify`` writes its own
to the user's cache.
"""

import ast
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pallas_kernels import compat
from pallas_kernels.tiles import file_of

_ROOT = Path(__file__).parent
SHIPPED = _ROOT / "records"
# Not part of a kernel: what it is compared with, and what it is tried on.
_BESIDE = ("reference.py", "xla.py", "cases.py")
# Not followed to what they import: a kernel does not change with the dispatch of other ops.
_CALLERS = ("api.py", "dispatch.py", "__init__.py")


def local() -> Path:
    """Where this user's own records lie."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "jaxllm" / "kernel-records"


def _imported(file: Path) -> Iterator[Path]:
    """Modules of this package that a module imports from."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        words = (getattr(node, "module", None) or "").split(".")
        if isinstance(node, ast.ImportFrom) and words[0] == _ROOT.name:
            at = _ROOT.joinpath(*words[1:])
            files = [at.with_suffix(".py"), *(at / f"{alias.name}.py" for alias in node.names)]
            yield from (found for found in files if found.is_file())


def parts(op: str) -> tuple[Path, ...]:
    """Files that an op's kernels are made of: those of its folder, and all that these import, of other ops as well."""
    own = _ROOT.joinpath(*op.split(".")).glob("*.py")
    todo, found = [file for file in own if file.name not in _BESIDE], set()
    while todo:
        file = todo.pop()
        if file not in found:
            found.add(file)
            if file.name not in _CALLERS:
                todo += [each for each in _imported(file) if each.name not in (*_BESIDE, *_CALLERS)]
    return tuple(sorted(found))


@functools.cache
def sources(op: str) -> str:
    """Hash of what an op's kernels are made of; its reference, its XLA path and its cases are not."""
    digest = hashlib.sha256()
    for file in parts(op):
        digest.update(file.relative_to(_ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
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
