"""Where documents come from: text files, JSON lines, Parquet, Hugging Face datasets, the standard library."""

import glob
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from jaxllm.data.corpus import Corpus, Document, split_corpus, stdlib_corpus
from jaxllm.data.errors import DataError

TEXT_SUFFIXES = (".txt", ".py", ".md")
ALLOWED = (
    "allowed are 'stdlib', text files or globs ('texts/**/*.txt'; .txt, .py, .md; several with commas), "
    "'file.jsonl:column', 'file.parquet:column', and 'hf:name:split:column'"
)

_RECORDS = re.compile(r"(?P<files>.+\.(?P<kind>jsonl|parquet))(?::(?P<column>[^:/\\]+))?")


def load_documents(spec: str) -> Corpus:
    """Loads a corpus and splits it by the hash of each document's text, so that copies of a text stay on one side.

    Args:
        spec: `stdlib`; text files (.txt, .py, .md) or globs of them, several with commas between; `file.jsonl:column`
            or `file.parquet:column` (globs too; the column is `text` if it is left out); `hf:name:split:column` of the
            `datasets` package.

    Raises:
        DataError: the message names what was given, what is allowed and what to do.
    """
    if spec == "stdlib":
        return stdlib_corpus()
    if spec.startswith("hf:"):
        documents = _hub_dataset(spec)
    elif match := _RECORDS.fullmatch(spec):
        read = _json_lines if match["kind"] == "jsonl" else _parquet
        documents = _records(spec, _matches(match["files"], spec), match["column"] or "text", read)
    else:
        documents = _text_files(spec)
    return split_corpus(spec, documents, key=lambda document: document.text)


def _matches(pattern: str, spec: str) -> list[Path]:
    if os.path.isdir(pattern):
        raise DataError(
            f"data: got {spec!r}, which is a folder; {ALLOWED}; for its text files write '{pattern.rstrip('/')}/**/*.txt'"
        )
    files = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))
    if not files:
        raise DataError(f"data: got {spec!r}; no file matches {pattern!r} in {os.getcwd()}; {ALLOWED}")
    return files


def _names(files: list[Path]) -> list[str]:
    # Relative to what all have in common, so that the corpus hash does not depend on where the files lie.
    common = os.path.commonpath([os.path.abspath(file.parent) for file in files])
    return [Path(os.path.relpath(os.path.abspath(file), common)).as_posix() for file in files]


def _text_files(spec: str) -> Iterator[Document]:
    found = {file for pattern in spec.split(",") for file in _matches(pattern.strip(), spec)}
    files = sorted(file for file in found if file.suffix in TEXT_SUFFIXES)
    if not files:
        suffixes = ", ".join(sorted({file.suffix or "none" for file in found}))
        raise DataError(f"data: got {spec!r}; its files have the endings {suffixes}; {ALLOWED}")
    for name, file in zip(_names(files), files):
        try:
            yield Document(name, file.read_bytes().decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(
                f"data: got {str(file)!r}, which is not UTF-8 text at byte {error.start}; convert it or leave it out"
            ) from error


def _records(
    spec: str, files: list[Path], column: str, read: Callable[[Path, str], Iterable[tuple[int, object]]]
) -> Iterator[Document]:
    for name, file in zip(_names(files), files):
        for number, value in read(file, column):
            yield _record(spec, f"{name}:{number:09d}", column, value)


def _record(spec: str, name: str, column: str, value: object) -> Document:
    if not isinstance(value, str):
        raise DataError(
            f"data: got {spec!r}; record {name} has {type(value).__name__} in column {column!r}; a column of texts is needed"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"data: got {spec!r}; record {name} has half a surrogate pair in column {column!r}, which is no text; "
            "correct or remove the record"
        ) from error
    return Document(name, value)


def _no_column(given: str, column: str, columns: Iterable[str]) -> DataError:
    return DataError(
        f"data: column {column!r} is not in {given}; its columns are {', '.join(sorted(columns)) or 'none'}; "
        "name one of them after the last colon"
    )


def _json_lines(file: Path, column: str) -> Iterator[tuple[int, object]]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"data: line {number} of {file} is not JSON ({error}); each line must be one JSON object: "
                    "correct or remove the line"
                ) from error
            if not isinstance(record, dict):
                raise DataError(
                    f"data: line {number} of {file} is a JSON {type(record).__name__}; an object is needed"
                )
            if column not in record:
                raise _no_column(f"line {number} of {file}", column, record)
            yield number, record[column]


def _parquet(file: Path, column: str) -> Iterator[tuple[int, object]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"data: got {str(file)!r}, but pyarrow, which reads Parquet, is not installed; "
            "pip install 'jaxllm[parquet]', or give a .jsonl file"
        ) from error
    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise DataError(
            f"data: got {str(file)!r}, which does not read as Parquet ({error}); give a whole file"
        ) from error
    with table:
        if column not in table.schema_arrow.names:
            raise _no_column(str(file), column, table.schema_arrow.names)
        number = 0
        for batch in table.iter_batches(columns=[column]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield number, value


def _hub_dataset(spec: str) -> Iterator[Document]:
    parts = spec.split(":")
    if len(parts) != 4 or not all(parts):
        raise DataError(f"data: got {spec!r}; a Hugging Face dataset is written 'hf:name:split:column'")
    _, name, split, column = parts
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DataError(
            f"data: got {spec!r}, but the package `datasets` is not installed; pip install 'jaxllm[datasets]', "
            "or give a local .jsonl or .parquet file"
        ) from error
    table = datasets.load_dataset(name, split=split)
    if column not in table.column_names:
        raise _no_column(f"{name}, split {split}", column, table.column_names)
    for number, value in enumerate(table[column]):
        yield _record(spec, f"{name}:{number:09d}", column, value)
