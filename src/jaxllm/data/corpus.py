"""Corpora of text, and the one that every machine has: the running interpreter's standard library."""

import hashlib
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from jaxllm.data.errors import CorpusError, DataError

VALIDATION_SHARE = 0.05

# Third-party packages, tests, and (by prefix) files that hold the paths and flags of one particular build.
_LEFT_OUT_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_LEFT_OUT_PREFIXES = ("config-", "_sysconfigdata")
# Chosen for the size of the split alone: 4.3 to 5.6 % of the bytes in every release from 3.6 to 3.13. The library holds
# one file of 6 % of its bytes, so that a hash without salt can miss the intended share by far.
_SPLIT_SALT = "stdlib:"


class Document(NamedTuple):
    """A text and the name that it goes by: a relative path, or a file and record number."""

    name: str
    text: str


@dataclass(frozen=True)
class Documents:
    """One split of a corpus, sorted by name."""

    items: tuple[Document, ...]

    def __len__(self) -> int:
        return len(self.items)

    @property
    def texts(self) -> list[str]:
        """The documents' texts, in order."""
        return [document.text for document in self.items]

    @cached_property
    def n_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return sum(len(document.text.encode()) for document in self.items)

    @cached_property
    def sha256(self) -> str:
        """sha256 over names and contents, as hex; equal on every machine that holds the same files."""
        digest = hashlib.sha256()
        for name, text in self.items:
            for part in (name.encode(), text.encode()):
                digest.update(len(part).to_bytes(8, "big") + part)
        return digest.hexdigest()


@dataclass(frozen=True)
class Corpus:
    """Documents in two splits that share no document.

    Attributes:
        name: what the corpus was loaded from.
        train: the documents to train on.
        validation: the documents to measure on.
    """

    name: str
    train: Documents
    validation: Documents

    @property
    def files(self) -> int:
        """Number of documents in both splits."""
        return len(self.train) + len(self.validation)

    def report(self) -> dict[str, dict[str, int | str]]:
        """Documents, bytes and sha256 of each split, as plain JSON values."""
        splits = {"train": self.train, "validation": self.validation}
        return {
            name: {"documents": len(split), "bytes": split.n_bytes, "sha256": split.sha256}
            for name, split in splits.items()
        }


def in_validation(key: str) -> bool:
    """Whether the hash of `key` falls into the validation share; the same for ever, whatever else the corpus holds."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") < VALIDATION_SHARE * 2**64


def split_corpus(name: str, documents: Iterable[Document], key: Callable[[Document], str]) -> Corpus:
    """Splits documents by the hash of their key, so that about 5 % of them become the validation split.

    A corpus so small that a split stays empty gives its document of the smallest hash to it; a single document is cut
    at a line's end near 95 % of its length.

    Raises:
        DataError: there is no text to split.
    """
    kept = sorted(document for document in documents if document.text)
    sides: dict[bool, list[Document]] = {False: [], True: []}
    for document in kept:
        sides[in_validation(key(document))].append(document)
    if not kept or (len(kept) == 1 and len(kept[0].text) < 2):
        raise DataError(
            f"data: got {name!r}, which holds no text to split; give files or records that are not empty"
        )
    if len(kept) == 1:
        first, rest = _cut(kept[0])
        sides = {False: [first], True: [rest]}
    for side in (False, True):
        if not sides[side]:
            moved = min(kept, key=lambda document: hashlib.sha256(key(document).encode()).digest())
            sides = {side: [moved], not side: [document for document in kept if document is not moved]}
    return Corpus(name, Documents(tuple(sides[False])), Documents(tuple(sides[True])))


def _cut(document: Document) -> tuple[Document, Document]:
    name, text = document
    place = min(max(1, round(len(text) * (1 - VALIDATION_SHARE))), len(text) - 1)
    place = text.rfind("\n", 0, place) + 1 or place
    return Document(f"{name}#train", text[:place]), Document(f"{name}#validation", text[place:])


def stdlib_corpus(root: str | Path | None = None) -> Corpus:
    """The Python sources of the running interpreter's standard library, without its tests.

    Files that are not UTF-8 are left out. The splits depend on the relative paths only: two machines with the same
    Python release have the same corpus, which `Documents.sha256` shows.

    Args:
        root: the library's folder; None: `sysconfig.get_path("stdlib")`.

    Raises:
        CorpusError: there are no sources there, as in zipped or compiled-only installations.
    """
    folder = Path(root if root is not None else sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(folder.rglob("*.py")) if folder.is_dir() else []:
        parts = path.relative_to(folder).parts
        if _LEFT_OUT_FOLDERS.intersection(parts) or any(
            part.startswith(_LEFT_OUT_PREFIXES) for part in parts
        ):
            continue
        try:
            documents.append(Document("/".join(parts), path.read_bytes().decode("utf-8")))
        except (UnicodeDecodeError, OSError):
            continue
    if not any(document.text for document in documents):
        raise CorpusError(
            f"the standard library's sources: looked for .py files in {folder} and found none "
            "(the interpreter may be zipped or installed without sources); pass other text with --data, "
            "such as --data 'texts/*.txt'"
        )
    return split_corpus("stdlib", documents, key=lambda document: _SPLIT_SALT + document.name)
