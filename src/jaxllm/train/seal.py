"""Checksum manifests: what makes a checkpoint trustworthy after a kill, a full disk or a bad copy."""

import hashlib
import json
import os
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """All of ``data`` at ``path`` or nothing, whenever the process or the machine stops."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path, manifest: Path) -> None:
    """Write size and sha256 of every file under ``folder`` to ``manifest``."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    entries = {p.relative_to(folder).as_posix(): [p.stat().st_size, _digest(p)] for p in files}
    write_atomically(manifest, json.dumps({"files": entries}, indent=1).encode())


def damage(folder: Path, manifest: Path) -> str | None:
    """What is wrong with a sealed folder, in a few words; None: every file is as it was sealed."""
    if not manifest.is_file():
        return "the save was not finished (it has no manifest)"
    try:
        entries = json.loads(manifest.read_bytes())["files"].items()
    except (ValueError, KeyError, AttributeError, TypeError):
        return "its manifest cannot be read"
    for name, (size, digest) in entries:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if _digest(path) != digest:
            return f"{name} has other contents than were saved"
    return None
