"""Cached token arrays on disk: written atomically, verified when opened, memory-mapped."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxllm.data.errors import DataError
from jaxllm.data.tokens import TokenCorpus, content_hash, token_dtype

_MAGIC = b"jaxllm tokens 1\n"
_ALIGNMENT = 64


class DamagedFileError(DataError):
    """A token file is torn, altered, or something else."""


def cache_folder(kind: str, root: str | Path | None = None) -> Path:
    """The folder of one kind of cached files; the user's cache unless `root` is given."""
    base = root or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxllm"
    return Path(base) / kind


def write_atomically(path: Path, *parts: bytes | memoryview) -> Path:
    """Writes a file that other processes see either whole or not at all.

    Returns:
        `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def save_tokens(corpus: TokenCorpus, path: Path) -> Path:
    """Writes a corpus: magic, length and sha256 of the header, JSON header, offsets (int64), tokens."""
    tokens, offsets = np.ascontiguousarray(corpus.tokens), np.ascontiguousarray(corpus.offsets, np.int64)
    header = {
        "dtype": tokens.dtype.str,
        "tokens": len(tokens),
        "offsets": len(offsets),
        "vocab_size": corpus.vocab_size,
        "sha256": content_hash(tokens, offsets),
    }
    text = json.dumps(header).encode()
    prefix = _MAGIC + len(text).to_bytes(8, "little") + hashlib.sha256(text).digest() + text
    prefix += b"\0" * (-len(prefix) % _ALIGNMENT)
    return write_atomically(path, prefix, offsets.data, tokens.data)


def open_tokens(path: Path) -> TokenCorpus:
    """Memory-maps a corpus, after checking its size and hash.

    Raises:
        DamagedFileError: the file is not what `save_tokens` wrote.
    """
    fixed = len(_MAGIC) + 8 + 32
    with open(path, "rb") as file:
        start = file.read(fixed)
        length = int.from_bytes(start[len(_MAGIC) : len(_MAGIC) + 8], "little")
        size = os.fstat(file.fileno()).st_size
        text = file.read(length) if start.startswith(_MAGIC) and length < size else b""
    if not text or hashlib.sha256(text).digest() != start[-32:]:
        raise DamagedFileError(
            f"token file {path}: its header is torn or altered; delete the file to have it made again"
        )
    header = json.loads(text)
    dtype = np.dtype(header["dtype"])
    begin = fixed + length + -(fixed + length) % _ALIGNMENT
    middle = begin + 8 * header["offsets"]
    if size != middle + dtype.itemsize * header["tokens"]:
        raise DamagedFileError(
            f"token file {path}: it has {size} bytes, not what its header says; delete the file"
        )
    offsets = np.fromfile(path, np.int64, header["offsets"], offset=begin)
    tokens = np.memmap(path, dtype, "r", middle, (header["tokens"],))
    if content_hash(tokens, offsets) != header["sha256"]:
        raise DamagedFileError(f"token file {path}: its content does not match its hash; delete the file")
    return TokenCorpus(tokens, offsets, header["vocab_size"], header["sha256"])


def cached_tokens(key: str, make: Callable[[], TokenCorpus], root: str | Path | None = None) -> TokenCorpus:
    """The corpus of this key from the cache; made (again) where it is missing or damaged."""
    path = cache_folder("tokens", root) / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.tokens"
    if path.is_file():
        try:
            return open_tokens(path)
        except DamagedFileError:
            path.unlink(missing_ok=True)
    return open_tokens(save_tokens(make(), path))


def join_encoded(batches: Iterator[Sequence[Sequence[int]]], vocab_size: int) -> TokenCorpus:
    """Joins encoded documents batch by batch, in the narrow dtype: Python lists of ids are never held all at once."""
    dtype = token_dtype(vocab_size)
    arrays, lengths = [], [0]
    for batch in batches:
        for ids in batch:
            if ids:
                arrays.append(np.asarray(ids, dtype))
                lengths.append(len(ids))
    offsets = np.cumsum(lengths, dtype=np.int64)
    tokens = np.concatenate(arrays) if arrays else np.zeros(0, dtype)
    return TokenCorpus(tokens, offsets, vocab_size, content_hash(tokens, offsets))
