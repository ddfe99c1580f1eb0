"""Tokenised documents as one flat array and document offsets."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jaxllm.data.errors import DataError


@dataclass(frozen=True, eq=False)
class TokenCorpus:
    """Documents as token ids, end to end.

    Attributes:
        tokens: uint16[N] or uint32[N] (any integer dtype works); may be memory-mapped.
        offsets: int64[D + 1]; document d is `tokens[offsets[d]:offsets[d + 1]]`; no document is empty.
        vocab_size: ids are below this.
        fingerprint: names the content; a saved loader state only fits the corpus that it was saved with.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    vocab_size: int
    fingerprint: str

    def __post_init__(self) -> None:
        sound = (
            len(self.offsets) >= 2
            and self.offsets[0] == 0
            and self.offsets[-1] == len(self.tokens)
            and bool(np.all(np.diff(self.offsets) > 0))
        )
        if not sound:
            raise DataError(
                f"offsets of {len(self.tokens)} tokens: got {len(self.offsets)} entries that do not rise strictly from "
                "0 to the number of tokens; a corpus needs at least one document and no empty ones"
            )

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    @property
    def n_documents(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1

    @property
    def n_targets(self) -> int:
        """Tokens that are predicted: all but the first of each document."""
        return len(self.tokens) - self.n_documents

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64[D]; tokens of each document."""
        return np.diff(self.offsets)

    def document(self, index: int) -> np.ndarray:
        """Token ids of one document."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @classmethod
    def from_documents(
        cls, documents: Iterable[Sequence[int] | np.ndarray], vocab_size: int
    ) -> "TokenCorpus":
        """Joins documents of token ids; empty ones are dropped.

        Raises:
            DataError: no document is left, or an id is outside 0 .. vocab_size - 1.
        """
        dtype = token_dtype(vocab_size)
        parts = [np.asarray(document, np.int64) for document in documents]
        parts = [part for part in parts if part.size]
        if not parts:
            raise DataError("documents: got none with a token in it; give at least one non-empty document")
        wide = np.concatenate(parts)
        if wide.min() < 0 or wide.max() >= vocab_size:
            raise DataError(
                f"documents: got token ids from {wide.min()} to {wide.max()}; allowed are 0 to {vocab_size - 1} "
                "(vocab_size - 1); tokenise with the tokenizer that vocab_size belongs to"
            )
        tokens = wide.astype(dtype)
        offsets = np.concatenate([[0], np.cumsum([part.size for part in parts])]).astype(np.int64)
        return cls(tokens, offsets, vocab_size, content_hash(tokens, offsets))


def token_dtype(vocab_size: int) -> type:
    """The narrowest dtype that holds every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def content_hash(tokens: np.ndarray, offsets: np.ndarray) -> str:
    """sha256 of the offsets' and tokens' bytes, as hex."""
    digest = hashlib.sha256(np.ascontiguousarray(offsets).data)
    digest.update(np.ascontiguousarray(tokens).data)
    return digest.hexdigest()
