"""Safetensors folders: headers, one tensor at a time in, one tensor at a time out."""

import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype(jnp.bfloat16)}
NAME_OF_DTYPE = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message has every reason at once."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a folder.

    Attributes:
        file: the safetensors file that holds it.
        name: in that file.
        dtype: as safetensors spells it: F32, BF16, ...
        shape: as stored.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


def _files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """(files, tensor name to file name where an index says so)."""
    index = folder / INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return [folder / name for name in sorted(set(weight_map.values()))], weight_map
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index}: is not a safetensors index ({error!r})") from error
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], {}
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    found = f"found {', '.join(others + pickles)}" if others or pickles else "found no weights at all"
    raise CheckpointError(f"{folder}: has neither {SINGLE} nor {INDEX}; {found}")


def read_headers(folder: Path) -> dict[str, Entry]:
    """Every tensor of a folder by name, from the headers alone.

    Raises:
        CheckpointError: missing, truncated or malformed files, and disagreements with the index, all of them.
    """
    files, weight_map = _files(folder)
    problems, entries = [], {}
    for file in files:
        if not file.is_file():
            problems.append(f"{file.name}: missing, but {INDEX} names it")
            continue
        try:
            with safe_open(file, framework="np") as handle:
                for name in handle.keys():  # noqa: SIM118
                    part = handle.get_slice(name)
                    if name in entries:
                        problems.append(f"{name}: in {entries[name].file.name} and in {file.name}")
                    entries[name] = Entry(file, name, part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            problems.append(f"{file.name}: truncated or no safetensors file ({error})")
    if not problems:
        problems += [
            f"{name}: {INDEX} names it, {weight_map[name]} lacks it"
            for name in sorted(set(weight_map) - set(entries))
        ]
    if problems:
        raise CheckpointError("\n  ".join([f"{folder}: cannot read the weights:", *problems]))
    return entries


def read_tensors(entries: Iterable[Entry]) -> Iterable[tuple[Entry, np.ndarray]]:
    """The tensors of ``entries``, file by file, one in memory at a time."""
    by_file: dict[Path, list[Entry]] = {}
    for entry in entries:
        by_file.setdefault(entry.file, []).append(entry)
    for file, members in by_file.items():
        with safe_open(file, framework="np") as handle:
            for entry in members:
                yield entry, handle.get_tensor(entry.name)


@dataclass(frozen=True)
class Output:
    """One tensor to write.

    Attributes:
        name: in the file.
        shape: in the file.
        dtype: in the file.
        value: makes the array, only when it is its turn.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    value: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def _write_file(stream: BinaryIO, outputs: list[Output]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for output in outputs:
        offsets = [start, start + output.nbytes]
        header[output.name] = {
            "dtype": NAME_OF_DTYPE[output.dtype],
            "shape": output.shape,
            "data_offsets": offsets,
        }
        start += output.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    # The data start at a multiple of 8.
    text += b" " * (-len(text) % 8)
    stream.write(struct.pack("<Q", len(text)) + text)
    for output in outputs:
        array = np.ascontiguousarray(output.value().astype(output.dtype, copy=False))
        assert array.shape == output.shape, (output.name, array.shape, output.shape)
        stream.write(array.view(np.uint8).data if array.size else b"")


def _shards(outputs: Iterable[Output], limit: int) -> list[list[Output]]:
    shards: list[list[Output]] = [[]]
    size = 0
    for output in outputs:
        if shards[-1] and size + output.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(output)
        size += output.nbytes
    return shards


def write_tensors(folder: Path, outputs: list[Output], max_shard_bytes: int) -> None:
    """Write safetensors into ``folder``: one file, or shards of at most ``max_shard_bytes`` and their index.

    A tensor larger than a shard has one of its own. Host memory holds one tensor at a time.
    """
    # Wide dtypes first keeps every tensor aligned to its own item size.
    outputs = sorted(outputs, key=lambda output: -output.dtype.itemsize)
    shards = _shards(outputs, max_shard_bytes)
    if len(shards) == 1:
        with open(folder / SINGLE, "wb") as stream:
            _write_file(stream, shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with open(folder / name, "wb") as stream:
            _write_file(stream, shard)
        weight_map |= {output.name: name for output in shard}
    total = sum(output.nbytes for output in outputs)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
